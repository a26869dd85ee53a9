"""Turns the bytes of weights that others have quantized into numbers: just those that transformers dequantizes them to.

Each object here is called with the bytes of a tensor, what they are unpacked into, and the bytes of the tensors beside it. It
works on the reading thread, in pieces that PyTorch handles without others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from airllm_nb.compat.quantization import PLAIN
from airllm_nb.engine.conversion import SERIAL
from airllm_nb.engine.readable import AGAIN
from airllm_nb.errors import CheckpointError, UnsupportedError

Grid = tuple[int, int]

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What four bits stand for: a sign, two bits of exponent, one of mantissa (E2M1 of the OCP Microscaling Formats 1.0, 5.3.3)."""
BITS, EACH, LAST = 4, 8, 15
"""Of whole numbers of four bits: how many in a word of 32, and the largest."""
SHIFTS = torch.arange(0, 32, BITS, dtype=torch.int32, device="cpu")
BIAS = 127
"""What is taken from an exponent that is stored as a byte (E8M0, 5.4.1 there)."""


class Blocks:
    """A matrix of small numbers, each block of which is to be multiplied by one factor, perhaps less a zero point.

    Parameters
    ----------
    codes : Codes
        The small numbers.
    block : tuple of int
        Rows and columns that share a factor. What is left at the lower and right edges are blocks too, smaller ones.
    factor : torch.dtype
        Of the factors.
    computed : torch.dtype
        What it is multiplied in: the product is rounded to it before anything else.
    zeros : Zeros, optional
        The zero points, of which each block has one.
    """

    def __init__(self, codes: Codes, block: Grid, factor: torch.dtype, computed: torch.dtype, zeros: Zeros | None = None) -> None:
        self._codes = codes
        self._block = block
        self._factor = factor
        self._computed = computed
        self._zeros = zeros

    def __call__(self, raw: torch.Tensor, into: torch.Tensor, factors: torch.Tensor, *others: torch.Tensor) -> None:
        """Unpack into a matrix of any floating dtype."""
        rows, columns = into.shape
        if not into.numel():
            return
        high, wide = self._block
        grid = (-(-rows // high), -(-columns // wide))
        numbers, scales = raw.view(rows, -1), factors.view(self._factor).view(grid).to(self._computed)
        zeros = self._zeros(others[0], grid).to(self._computed) if self._zeros else None
        for begin, end in self._pieces(rows, columns):
            blocks = slice(begin // high, (end - 1) // high + 1)
            part = self._codes(numbers[begin:end])[:, :columns].to(self._computed)
            if zeros is not None:
                part.sub_(_wide(zeros[blocks], wide, columns))
            into[begin:end].copy_(part.mul_(_wide(scales[blocks], wide, columns)))

    def _pieces(self, rows: int, columns: int) -> Iterator[tuple[int, int]]:
        """Yield rows that have one row of factors in common, or one each."""
        high, step = self._block[0], max(SERIAL // columns, 1)
        for block in range(0, rows, rows if high == 1 else high):
            end = rows if high == 1 else min(block + high, rows)
            for begin in range(block, end, step):
                yield begin, min(begin + step, end)


def _wide(values: torch.Tensor, wide: int, columns: int) -> torch.Tensor:
    return values.repeat_interleave(wide, 1)[:, :columns] if values.shape[1] > 1 else values


class Codes:
    """Small numbers that PyTorch has a dtype for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """Return the numbers in the bytes of some rows."""
        return raw.view(self._dtype)


class Packed(Codes):
    """Whole numbers of 4 or 8 bits in words of 32, the first one lowest, less the middle of their range.

    That is how ``compressed_tensors/compressors/pack_quantized/helpers.py`` packs them.
    """

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """Return the numbers in the bytes of some rows, as int16."""
        if self._bits == 4:  # noqa: PLR2004
            raw = torch.stack((raw & 15, raw >> 4), -1).flatten(-2)
        return raw.to(torch.int16) - (1 << (self._bits - 1))


class Zeros:
    """Zero points, one for each factor.

    Parameters
    ----------
    codes : Codes
        How they are stored.
    along_rows : bool
        Whether a word has those of several rows.
    """

    def __init__(self, codes: Codes, *, along_rows: bool = False) -> None:
        self._codes = codes
        self._along_rows = along_rows

    def __call__(self, raw: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Return them as a matrix."""
        if not self._along_rows:
            return self._codes(raw).view(grid)
        words = raw.view(torch.int32).view(-1, grid[1]).T.contiguous()
        return self._codes(words.view(torch.uint8))[:, : grid[0]].T


class OfShape:
    """An unpacking that first looks whether the shape that is stored with the numbers is the one that they get."""

    def __init__(self, name: str, dtype: torch.dtype, unpack: Callable[..., None]) -> None:
        self._name = name
        self._dtype = dtype
        self._unpack = unpack

    def __call__(self, raw: torch.Tensor, into: torch.Tensor, shape: torch.Tensor, *others: torch.Tensor) -> None:
        """Unpack into a matrix of any floating dtype.

        Raises
        ------
        CheckpointError
            If it has another shape.
        """
        if shape.view(self._dtype).tolist() != list(into.shape):
            raise CheckpointError(
                f"{self._name} says {shape.view(self._dtype).tolist()}, and the numbers beside it are {list(into.shape)}.", AGAIN
            )
        self._unpack(raw, into, *others)


class ByInput:
    """Numbers of four bits, a row for each input of the layer: the matrix that is wanted, transposed.

    A group of inputs has one factor and one zero point for each output; the product is rounded to the factors' dtype.

    Parameters
    ----------
    name : str
        Of the tensor, for errors.
    factor : torch.dtype
        Of the factors.
    """

    def __init__(self, name: str, factor: torch.dtype) -> None:
        self._name = name
        self._factor = factor

    def __call__(
        self, raw: torch.Tensor, into: torch.Tensor, zeros: torch.Tensor, factors: torch.Tensor, *groups: torch.Tensor
    ) -> None:
        """Unpack into a matrix of any floating dtype.

        Raises
        ------
        CheckpointError
            If a zero point or the number of a group means nothing.
        """
        outputs, inputs = into.shape
        if not into.numel():
            return
        scales = factors.view(self._factor).view(-1, outputs)
        zero = self._zeros(zeros.view(torch.int32).view(len(scales), -1)).to(self._factor)
        group = self._groups(inputs, len(scales), *groups)
        step = max(SERIAL // outputs // EACH, 1) * EACH
        for begin in range(0, inputs, step):
            end = min(begin + step, inputs)
            part = self._codes(raw.view(torch.int32), begin, end, outputs).to(self._factor)
            part.sub_(zero[group[begin:end]]).mul_(scales[group[begin:end]])
            into[:, begin:end].copy_(part.T)

    def _codes(self, words: torch.Tensor, begin: int, end: int, outputs: int) -> torch.Tensor:
        raise NotImplementedError

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _groups(self, inputs: int, count: int, *_: torch.Tensor) -> torch.Tensor:
        return torch.arange(inputs) // (inputs // count)


class Gptq(ByInput):
    """The layout of AutoGPTQ: a word has eight inputs of one output, and a zero point is stored less one.

    See ``auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py`` of 0.7.1.

    Parameters
    ----------
    name : str
        Of the tensor, for errors.
    factor : torch.dtype
        Of the factors.
    any_order : bool
        Whether the inputs of a group may lie anywhere (``desc_act``).
    """

    def __init__(self, name: str, factor: torch.dtype, *, any_order: bool) -> None:
        super().__init__(name, factor)
        self._any_order = any_order

    def _codes(self, words: torch.Tensor, begin: int, end: int, outputs: int) -> torch.Tensor:
        rows = words.view(-1, 1, outputs)[begin // EACH : end // EACH]
        return ((rows >> SHIFTS[:, None]) & LAST).view(-1, outputs)

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        found = ((words[..., None] >> SHIFTS) & LAST).flatten(1)
        if (found == LAST).any():  # some readers take the sum for 16, others for 0
            raise UnsupportedError(f"A zero point of {self._name} is 15, which is 16 to some readers and 0 to others.", PLAIN)
        return found + 1

    def _groups(self, inputs: int, count: int, *groups: torch.Tensor) -> torch.Tensor:
        found = groups[0].view(torch.int32).long()
        usual = super()._groups(inputs, count)
        if self._any_order and int(found.min()) >= 0 and int(found.max()) < count:
            return found
        if not torch.equal(found, usual):
            raise CheckpointError(f"The g_idx of {self._name} is not what config.json says (desc_act, group_size).", AGAIN)
        return usual


class Awq(ByInput):
    """The layout of AutoAWQ's "gemm": a word has eight outputs of one input, in the order of `ORDER`.

    See ``awq/utils/packing_utils.py`` of 0.2.9.
    """

    ORDER = torch.tensor((0, 4, 1, 5, 2, 6, 3, 7), device="cpu")

    def _codes(self, words: torch.Tensor, begin: int, end: int, outputs: int) -> torch.Tensor:
        return self._zeros(words.view(-1, outputs // EACH)[begin:end])

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        return ((words[..., None] >> (self.ORDER * BITS).to(torch.int32)) & LAST).flatten(1)


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
