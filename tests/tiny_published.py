"""Tiny checkpoints as others quantize them, made on the spot, each with its twin: the same weights as plain float32.

The twin's numbers come from the definition of each format, written down here a second time and as plainly as possible; the tests
compare them with what transformers and the formats' own packages make of the same tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, SHAPE, make_checkpoint

Tensors = dict[str, torch.Tensor]
Quantize = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor] | None]
"""From a weight's name and numbers to the tensors that are stored for it, and what they mean; None leaves it as it is."""

GPT_OSS = SHAPE | {
    "model_type": "gpt_oss", "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6,
    "max_position_embeddings": 128, "rope_theta": 150000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                     "original_max_position_embeddings": 16},
}  # fmt: skip
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def publish(
    folder: Path, quantize: Quantize, config: dict, *, raw: dict | None = None, dtype: torch.dtype = torch.bfloat16, **changes
) -> tuple[Path, Path]:
    """Return the folder of a quantized checkpoint, and that of its twin. What a weight is unpacked with lies in a second file."""
    plain = make_checkpoint(folder / "plain", raw=raw or CONFIGS["llama"], dtype=dtype, shards="1GB", **changes)
    stored: list[Tensors] = [{}, {}]
    meant = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        found = quantize(name, tensor.float())
        if found is None:
            stored[0][name], meant[name] = tensor, tensor.float()
            continue
        tensors, meant[name] = found
        first, *others = tensors
        stored[0][first] = tensors[first].contiguous()
        stored[1] |= {other: tensors[other].contiguous() for other in others}
    (plain / "model.safetensors").unlink()
    save_file({name: tensor.contiguous() for name, tensor in meant.items()}, plain / "model.safetensors", {"format": "pt"})
    settings = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(settings | {"torch_dtype": "float32"}))
    quantized = folder / "quantized"
    quantized.mkdir()
    (quantized / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    save_sharded(quantized, stored)
    return quantized, plain


def save_sharded(folder: Path, files: list[Tensors]) -> None:
    """Write tensors into files, and the index of them."""
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for name, tensors in zip(names, files, strict=True):
        save_file(tensors, folder / name, {"format": "pt"})
    index = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a quantized checkpoint, which then lie in one file."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def is_matrix(name: str, weight: torch.Tensor) -> bool:
    """Tell whether a weight is that of a linear layer in a decoder layer."""
    return weight.dim() == 2 and ".layers." in name and not name.endswith(("router.weight", "gate.weight"))


def fp8(block: tuple[int, int] | None, *, static: bool = False, factor: torch.dtype = torch.float32) -> Quantize:
    """DeepSeek's fp8: a factor for each block, those at the edges smaller; without blocks one for all."""

    def quantize(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not is_matrix(name, weight):
            return None
        rows, columns = weight.shape
        high, wide = block or (rows, columns)
        factors = torch.rand(-(-rows // high), -(-columns // wide), generator=torch.Generator().manual_seed(rows)) / 300 + 1e-3
        factors = factors.to(factor)
        each = factors.float().repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        numbers = (weight / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors = {name: numbers, f"{name}_scale_inv": factors if block else factors.view(())}
        if static:
            tensors[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.5)
        return tensors, numbers.float() * each

    return quantize


def mxfp4(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
    """The experts of gpt-oss: whatever numbers come, a little less than those of the other weights."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return None
    experts, columns, rows = weight.shape
    generator = torch.Generator().manual_seed(rows)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(121, 126, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
    values = torch.tensor([*FP4, *(-value for value in FP4)])
    numbers = torch.stack((values[(blocks & 15).long()], values[(blocks >> 4).long()]), -1).flatten(-2)
    meant = numbers * 2.0 ** (scales[..., None].float() - 127)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, meant.flatten(-2).transpose(1, 2)


def compressed(
    kind: str,
    bits: int,
    grid: Callable[[int, int], tuple[int, int]],
    *,
    packed: bool = False,
    symmetric: bool = True,
    factor: torch.dtype = torch.bfloat16,
    scale: tuple[int, ...] | None = None,
) -> Quantize:
    """The formats of compressed-tensors. `grid` gives the size of a block, `scale` the shape of one factor for all."""

    def quantize(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not is_matrix(name, weight):
            return None
        (rows, columns), (high, wide), most = weight.shape, grid(*weight.shape), 2 ** (bits - 1)
        generator = torch.Generator().manual_seed(rows)
        factors = (torch.rand(-(-rows // high), -(-columns // wide), generator=generator) / most + 0.1 / most).to(factor)
        zeros = torch.zeros(factors.shape, dtype=torch.int64)
        if not symmetric:
            zeros = torch.randint(-most, most, factors.shape, generator=generator)
        each, zero = (
            tensor.double().repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
            for tensor in (factors, zeros)
        )
        codes = weight / each + zero
        if kind == "float":
            codes = codes.clamp(-448, 448).to(torch.float8_e4m3fn)
        else:
            codes = codes.round().clamp(-most, most - 1).to(torch.int8)
        meant = ((codes.double() - zero) * each).to(factor).float()
        stored = {"weight_scale": factors if scale is None else factors.view(scale)}
        if packed:
            stored = {"weight_packed": words(codes, bits), "weight_shape": torch.tensor(weight.shape)} | stored
            zeros = words(zeros.T, bits).T
        else:
            stored = {"weight": codes} | stored
        if not symmetric:
            stored["weight_zero_point"] = zeros if packed else zeros.to(torch.int8)
        return {name.removesuffix("weight") + end: tensor for end, tensor in stored.items()}, meant

    return quantize


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the numbers of each row into words of 32 bits, the first one lowest, from the least number that there is upwards."""
    each = 32 // bits
    codes = torch.nn.functional.pad(codes.long() + 2 ** (bits - 1), (0, -codes.shape[1] % each)).unflatten(1, (-1, each))
    return (codes << (torch.arange(each) * bits)).sum(-1).to(torch.int32)


def compressed_config(stored: str, kind: str, bits: int, strategy: str, **fields) -> dict:
    """As compressed-tensors writes it."""
    weights = {
        "num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, "observer": "minmax",
        "group_size": None, "block_structure": None, "actorder": None,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights | fields, "output_activations": None}
    group["input_activations"] = {"num_bits": 8, "type": kind, "dynamic": True, "strategy": "token"}
    return {
        "quant_method": "compressed-tensors", "format": stored, "config_groups": {"group_0": group}, "ignore": ["lm_head"],
        "dequantize": True, "quantization_status": "compressed",
        "kv_cache_scheme": None, "global_compression_ratio": 1.5, "version": "0.20.0",
    }  # fmt: skip


def gptq(size: int, *, any_order: bool = False, factor: torch.dtype = torch.float16, bits: int = 4, less: int = 1) -> Quantize:
    """AutoGPTQ: words of eight inputs, the zero points less one."""

    def quantize(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not is_matrix(name, weight):
            return None
        codes, zeros, factors, group, meant = by_input(weight, size, any_order, factor, 2**bits)
        stem = name.removesuffix("weight")
        stored = {
            "qweight": together(codes.T, bits).T, "qzeros": together(zeros - less, bits), "scales": factors,
            "g_idx": group.to(torch.int32),
        }  # fmt: skip
        return {stem + end: tensor for end, tensor in stored.items()}, meant

    return quantize


def awq(size: int) -> Quantize:
    """AutoAWQ's gemm: words of eight outputs, of which 0, 2, 4, 6, 1, 3, 5, 7 follow each other, from the lowest bits upwards."""

    def quantize(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not is_matrix(name, weight):
            return None
        codes, zeros, factors, _, meant = by_input(weight, size, False, torch.float16)
        order = [8 * word + place for word in range(weight.shape[0] // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
        stored = {"qweight": together(codes[:, order]), "qzeros": together(zeros[:, order]), "scales": factors}
        return {name.removesuffix("weight") + end: tensor for end, tensor in stored.items()}, meant

    return quantize


def by_input(weight: torch.Tensor, size: int, any_order: bool, factor: torch.dtype, levels: int = 16) -> tuple[torch.Tensor, ...]:
    """Return codes (inputs, outputs), zero points and factors (groups, outputs), each input's group, and what it all means."""
    outputs, inputs = weight.shape
    generator = torch.Generator().manual_seed(inputs)
    group = torch.arange(inputs) // size
    if any_order:
        group = group[torch.randperm(inputs, generator=generator)]
    factors = (torch.rand(inputs // size, outputs, generator=generator) / levels + 0.01).to(factor)
    zeros = torch.randint(1, levels, factors.shape, generator=generator)
    codes = (weight.T / factors[group].float() + zeros[group]).round().clamp(0, levels - 1).long()
    meant = ((codes - zeros[group]).double() * factors[group].double()).to(factor).float()
    return codes, zeros, factors, group, meant.T


def together(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Pack the numbers of each row into words of 32 bits, the first one lowest."""
    each = 32 // bits
    return (codes.unflatten(1, (-1, each)) << (torch.arange(each) * bits)).sum(-1).to(torch.int32)
