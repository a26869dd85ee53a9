"""Weights as bitsandbytes stores them, for `tiny_published`, with what they mean: its formats written down a second time."""

from __future__ import annotations

import json

import torch
from tiny_published import Quantize, Tensors, is_matrix

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4, 0, -1 / 192, -2 / 3, -1, -1 / 3, -1 / 2, -1 / 6, -1 / 4]
TABLES = {"nf4": NF4, "fp4": FP4}


def four_bits(
    kind: str, size: int = 64, *, nested: bool = False, dtype: torch.dtype = torch.bfloat16, storage: torch.dtype = torch.uint8
) -> Quantize:
    """A factor for each `size` numbers, whatever the rows; of each byte the upper half comes first."""

    def quantize(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not is_matrix(name, weight):
            return None
        table, flat = torch.tensor(TABLES[kind]), weight.reshape(-1)
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
        said = {"quant_type": kind, "blocksize": size, "dtype": str(dtype)[6:], "shape": list(weight.shape)}
        factors = blocks.abs().amax(1)
        beside = {"absmax": factors, "quant_map": table}
        if nested:
            factors, beside["absmax"], offset, others = in_bytes(factors)
            beside |= others
            said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        codes = (blocks[..., None] / factors[:, None, None] - table).abs().argmin(-1)
        meant = (table[codes].double() * factors[:, None].double()).float().to(dtype).float().view(-1)[: len(flat)]
        codes = torch.nn.functional.pad(codes.view(-1)[: len(flat)], (0, len(flat) % 2))
        packed = (codes[::2] * 16 + codes[1::2]).to(torch.uint8)
        beside[f"quant_state.bitsandbytes__{kind}"] = as_bytes(said)
        tensors = {name: packed.view(storage)[:, None]} | {f"{name}.{end}": tensor for end, tensor in beside.items()}
        return tensors, meant.view(weight.shape)

    return quantize


def in_bytes(factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float, Tensors]:
    """Quantize factors once more; returns what they become, their bytes, the offset, and what they are unpacked with."""
    table, offset = torch.linspace(-1, 1, 256) ** 3, factors.mean()
    blocks = torch.nn.functional.pad(factors - offset, (0, -len(factors) % 256)).view(-1, 256)
    largest = blocks.abs().amax(1) + 0.01
    codes = (blocks[..., None] / largest[:, None, None] - table).abs().argmin(-1)
    become = (table[codes].double() * largest[:, None].double()).float().view(-1)[: len(factors)] + offset
    stored = codes.view(-1)[: len(factors)].to(torch.uint8)
    return become, stored, offset.item(), {"nested_absmax": largest, "nested_quant_map": table}


def as_bytes(said: object) -> torch.Tensor:
    """JSON as a tensor."""
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def eight_bits(*, order: int | None = 0) -> Quantize:
    """LLM.int8(): the largest magnitude of each row is 127."""

    def quantize(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not is_matrix(name, weight):
            return None
        largest = weight.abs().amax(1)
        codes = (weight / largest[:, None] * 127).round().to(torch.int8)
        tensors = {name: codes, name.removesuffix("weight") + "SCB": largest}
        if order is not None:
            tensors[name.removesuffix("weight") + "weight_format"] = torch.tensor(order, dtype=torch.uint8)
        return tensors, (codes.double() * largest[:, None].double()).float() * torch.tensor(1 / 127)

    return quantize


def config(bits: int, kind: str = "nf4", *, nested: bool = False, **fields: object) -> dict:
    """As transformers writes it."""
    return {
        "_load_in_4bit": bits == 4, "_load_in_8bit": bits == 8, "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0, "load_in_4bit": bits == 4, "load_in_8bit": bits == 8,
        "quant_method": "bitsandbytes",
    } | fields  # fmt: skip
