"""Turns the bytes of weights that others have quantized into numbers: just those that transformers dequantizes them to.

Each object here is called with the bytes of a tensor, what they are unpacked into, and the bytes of the tensors beside it. It
works on the reading thread, in pieces that PyTorch handles without others.
"""

from __future__ import annotations

import torch

from airllm_nb.engine.conversion import SERIAL

Grid = tuple[int, int]

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What four bits stand for: a sign, two bits of exponent, one of mantissa (E2M1 of the OCP Microscaling Formats 1.0, 5.3.3)."""
BIAS = 127
"""What is taken from an exponent that is stored as a byte (E8M0, 5.4.1 there)."""


class Blocks:
    """Numbers of a floating dtype, each block of them to be multiplied by one factor.

    Parameters
    ----------
    dtype, factor : torch.dtype
        Of the numbers, and of the factors.
    block : tuple of int
        Rows and columns that share a factor. What is left at the lower and right edges are blocks too, smaller ones.

    Notes
    -----
    Multiplied in float32, and then rounded once, as ``Fp8Dequantize`` of transformers 5.23 does.
    """

    def __init__(self, dtype: torch.dtype, factor: torch.dtype, block: Grid) -> None:
        self._dtype = dtype
        self._factor = factor
        self._block = block

    def __call__(self, raw: torch.Tensor, into: torch.Tensor, factors: torch.Tensor) -> None:
        """Unpack into a matrix of any floating dtype."""
        rows, columns = into.shape
        if not into.numel():
            return
        high, wide = self._block
        numbers = raw.view(self._dtype).view(rows, columns)
        step = max(SERIAL // columns, 1)
        for number, row in enumerate(factors.view(self._factor).view(-(-rows // high), -1).float()):
            each = row.repeat_interleave(wide)[:columns] if len(row) > 1 else row
            for begin in range(number * high, min((number + 1) * high, rows), step):
                end = min(begin + step, (number + 1) * high, rows)
                into[begin:end].copy_(numbers[begin:end].float().mul_(each))


class MxFp4:
    """Numbers of four bits, 32 of a row with one exponent, and the matrix transposed.

    The formula is that of ``convert_moe_packed_tensors`` in ``transformers/integrations/mxfp4.py``: of each byte the lower half
    comes first.
    """

    GROUP = 32

    def __init__(self) -> None:
        low, high = torch.meshgrid(torch.tensor(FP4), torch.tensor(FP4), indexing="xy")
        self._pairs = torch.stack((low, high), -1).view(256, 2)

    def __call__(self, raw: torch.Tensor, into: torch.Tensor, exponents: torch.Tensor) -> None:
        """Unpack into one expert's matrix, of shape (columns, rows)."""
        columns, rows = into.shape
        if not into.numel():
            return
        pairs, powers = self._pairs.to(into.dtype), exponents.view(rows, -1, 1).to(torch.int32) - BIAS
        packed = raw.view(rows, columns // self.GROUP, self.GROUP // 2)
        step = max(SERIAL // columns, 1)
        for begin in range(0, rows, step):
            numbers = pairs[packed[begin : begin + step].int()].view(-1, columns // self.GROUP, self.GROUP)
            scaled = torch.ldexp(numbers, powers[begin : begin + step])  # no product: zero times infinity is none
            into[:, begin : begin + step].copy_(scaled.view(-1, columns).T)
