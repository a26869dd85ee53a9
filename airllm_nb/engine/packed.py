"""Weights in 8 or 4 bits: how they lie in memory, how they are unpacked, and the kernels of PyTorch that multiply by them.

A packed weight is one flat tensor of bytes: first the codes, then the scales, both as PyTorch's kernels for the CPU take them.
Where there is no kernel (another device, many rows), it is unpacked and multiplied as any weight: the same but for last bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import linear

from airllm_nb.errors import UnsupportedError

SCALES = torch.bfloat16
"""What scales are stored and multiplied in: kernels take scales in the activations' dtype, and are fast in bfloat16 alone."""
UNPACKED = 16 << 20
"""Bytes of a weight that are unpacked at once: no budget counts them, and larger pieces are fresh from the system each time."""
PIECE = 1 << 18
"""Weights that several steps work on one after the other, while they are in the processor's cache."""
BLOCK = 64
"""Outputs that no unpacking takes apart: see `layout`."""
ROWS, COLUMNS = 16, 64
"""Weights have multiples of these, or are left as they are: with others, `torch._weight_int8pack_mm` reads beyond its end."""


@dataclass(frozen=True)
class Int8:
    """A code from -127 to 127 for each weight, and a scale for each output: the weight is their product."""

    most_rows: ClassVar[int] = 16

    def __str__(self) -> str:
        return "int8"

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Return why a weight of a shape cannot be packed; None if it can."""
        return _refusal(shape, COLUMNS)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that a weight of a shape takes."""
        outputs, inputs = shape
        return outputs * inputs + outputs * SCALES.itemsize

    def pack(self, codes: torch.Tensor, scales: torch.Tensor, _zeros: torch.Tensor | None = None) -> torch.Tensor:
        """Store codes (outputs, inputs), int8, with their scales (outputs,)."""
        return torch.cat([_bytes(codes), _bytes(scales.to(SCALES))])

    def dense(self, packed: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the weight that is meant, in full."""
        codes, scales = self.parts(packed, shape)
        exact = torch.float32 if dtype == torch.float16 else dtype  # which has no room for small scales
        return codes.to(exact).mul_(scales.to(exact)[:, None]).to(dtype)

    def multiply(self, rows: torch.Tensor, packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Multiply bfloat16 rows, shape (rows, inputs), by the kernel on the CPU; returns (rows, outputs)."""
        return torch._weight_int8pack_mm(rows, *self.parts(packed, shape))  # noqa: SLF001  # has no public name

    def rows(self, packed: torch.Tensor, shape: tuple[int, ...], begin: int, end: int) -> torch.Tensor:
        """Return the packed weight of some outputs."""
        codes, scales = self.parts(packed, shape)
        return torch.cat([_bytes(codes[begin:end]), _bytes(scales[begin:end])])

    @staticmethod
    def parts(packed: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes, shape (outputs, inputs), and scales, shape (outputs,)."""
        outputs, inputs = shape
        codes, scales = packed[: outputs * inputs], packed[outputs * inputs :]
        return codes.view(torch.int8).view(shape), scales.view(SCALES)


@dataclass(frozen=True)
class Int4:
    """A code from 0 to 15 for each weight; `group` neighbouring inputs share scale and zero: ``(code - 8) * scale + zero``."""

    group: int = 64
    rounding: Literal["nearest", "gptq"] = "nearest"
    """How codes are chosen, which matters only where they are."""
    most_rows: ClassVar[int] = 96

    def __str__(self) -> str:
        return f"int4-{self.group}{'-gptq' if self.rounding == 'gptq' else ''}"

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Return why a weight of a shape cannot be packed; None if it can."""
        return _refusal(shape, max(self.group, COLUMNS))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that a weight of a shape takes."""
        outputs, inputs = shape
        return outputs * inputs // 2 + outputs * (inputs // self.group) * 2 * SCALES.itemsize

    def pack(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Store codes (outputs, inputs), uint8, with scales and zeros (outputs, inputs / group)."""
        outputs, inputs = codes.shape
        packed = torch.empty(outputs * inputs // 2, dtype=torch.uint8)
        block, neighbours = layout()  # put so by us: PyTorch's own function takes three times as long, and codes of 32 bits
        whole = outputs // block * block
        shared = (-1, block // 2, 2, inputs) if neighbours else (-1, 2, block // 2, inputs)
        low, high = codes[:whole].view(shared).unbind(2 if neighbours else 1)
        packed[: whole * inputs // 2].view(-1, inputs, block // 2).copy_((low | high << 4).transpose(1, 2))
        if rest := outputs - whole:  # there, neighbours share a byte
            packed[whole * inputs // 2 :].view(inputs, rest // 2).copy_((codes[whole::2] | codes[whole + 1 :: 2] << 4).T)
        both = torch.stack([scales.to(SCALES), zeros.to(SCALES)], dim=-1).transpose(0, 1).contiguous()
        return torch.cat([packed, _bytes(both)])

    def codes(self, packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the codes less 8, shape (outputs, inputs), int8."""
        outputs, inputs = shape
        out = torch.empty(shape, dtype=torch.int8, device=packed.device)
        block, neighbours = layout()
        whole = outputs // block * block
        # Turned round as bytes of two weights each: PyTorch is much slower where it converts numbers on the way.
        half = packed[: whole * inputs // 2].view(-1, inputs, block // 2).transpose(1, 2).contiguous()
        shared = (-1, block // 2, 2, inputs) if neighbours else (-1, 2, block // 2, inputs)
        low, high = out[:whole].view(shared).unbind(2 if neighbours else 1)
        low.copy_(half & 15)
        high.copy_(half >> 4)
        if rest := outputs - whole:  # there, neighbours share a byte
            pairs = packed[whole * inputs // 2 : outputs * inputs // 2].view(inputs, rest // 2).T
            out[whole::2], out[whole + 1 :: 2] = pairs & 15, pairs >> 4
        return out.sub_(8)

    def dense(self, packed: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the weight that is meant, in full."""
        exact = torch.float32 if dtype == torch.float16 else dtype  # which has no room for small scales
        scales, zeros = self._scales(packed, shape).to(exact).permute(2, 1, 0).unsqueeze(-1).contiguous()
        codes = self.codes(packed, shape).view(shape[0], -1, self.group)
        out = torch.empty(codes.shape, dtype=dtype, device=packed.device)
        step = max(PIECE // shape[1], 1)
        for part in (slice(begin, begin + step) for begin in range(0, shape[0], step)):
            out[part].copy_(codes[part].to(exact).mul_(scales[part]).add_(zeros[part]))
        return out.view(shape)

    def multiply(self, rows: torch.Tensor, packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Multiply bfloat16 rows, shape (rows, inputs), by the kernel on the CPU; returns (rows, outputs)."""
        codes = packed[: shape[0] * shape[1] // 2].view(shape[0], -1)
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(  # noqa: SLF001  # has no public name
            rows, codes, self.group, self._scales(packed, shape)
        )
        return product

    def rows(self, packed: torch.Tensor, shape: tuple[int, ...], begin: int, end: int) -> torch.Tensor:
        """Return the packed weight of some outputs; `begin` must be a multiple of `BLOCK`."""
        half = shape[1] // 2
        return torch.cat([packed[begin * half : end * half], _bytes(self._scales(packed, shape)[:, begin:end])])

    def _scales(self, packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return scales and zeros, shape (inputs / group, outputs, 2)."""
        outputs, inputs = shape
        return packed[outputs * inputs // 2 :].view(SCALES).view(inputs // self.group, outputs, 2)


Packing = Int8 | Int4
"""A way to store a weight of shape (outputs, inputs). With more than `most_rows` rows it is faster to unpack it first."""


@functools.cache
def layout() -> tuple[int, bool]:
    """Return how PyTorch's 4-bit kernel wants weights: outputs in a block, and whether neighbours share a byte.

    Otherwise the first half of a block is in the lower half of each byte. That depends on the CPU, and is found by packing
    numbers that differ.

    Raises
    ------
    UnsupportedError
        If it is none of those that are known, or there is no such kernel.
    """
    outputs, inputs = 128, COLUMNS
    codes = torch.arange(outputs, dtype=torch.int32)[:, None].expand(outputs, inputs).contiguous()
    try:
        parts = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes >> shift & 15, 1).flatten() for shift in (0, 4)]  # noqa: SLF001
    except (AttributeError, RuntimeError) as error:
        raise _no_int4() from error
    found = [(parts[0] >> shift & 15) + (parts[1] >> shift & 15) * 16 for shift in (0, 4)]
    rows = torch.arange(outputs, dtype=torch.uint8)
    for block, neighbours in ((64, False), (32, False), (32, True), (64, True)):
        halves = rows.view(-1, block // 2, 2).unbind(2) if neighbours else rows.view(-1, 2, block // 2).unbind(1)
        expected = [half[:, None, :].expand(-1, inputs, -1).flatten() for half in halves]
        if all(map(torch.equal, found, expected)):
            return block, neighbours
    raise _no_int4()


def _no_int4() -> UnsupportedError:
    return UnsupportedError(
        f"PyTorch {torch.__version__} has no 4-bit kernel for this processor that is known here.", 'Use quantize="int8".'
    )


def _refusal(shape: tuple[int, ...], columns: int) -> str | None:
    if len(shape) != 2:  # noqa: PLR2004  # a matrix
        return "it is no matrix"
    if shape[0] % ROWS or shape[1] % columns or not all(shape):
        return f"{shape[0]} x {shape[1]} are no multiples of {ROWS} x {columns}"
    return None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def multiply(
    packing: Packing, rows: torch.Tensor, packed: torch.Tensor, shape: tuple[int, ...], bias: torch.Tensor | None = None,
    *, most_rows: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Multiply as ``linear`` does by a packed weight: a few rows by its kernel, more than `most_rows` by the weight unpacked."""
    most = packing.most_rows if most_rows is None else most_rows
    flat = rows.reshape(-1, shape[1])
    if packed.device.type == "cpu" and len(flat) <= most and not torch.is_grad_enabled():
        product = packing.multiply(flat.to(SCALES).contiguous(), packed, shape).to(rows.dtype)
        if bias is not None:
            product += bias
        return product.view(*rows.shape[:-1], shape[0])
    step = max(UNPACKED // (shape[1] * rows.dtype.itemsize) // BLOCK, 1) * BLOCK
    if step >= shape[0]:
        return linear(rows, packing.dense(packed, shape, rows.dtype), bias)
    product = rows.new_empty((*rows.shape[:-1], shape[0]))
    for begin in range(0, shape[0], step):
        end = min(begin + step, shape[0])
        part = packing.dense(packing.rows(packed, shape, begin, end), (end - begin, shape[1]), rows.dtype)
        product[..., begin:end] = linear(rows, part, None if bias is None else bias[begin:end])
    return product
