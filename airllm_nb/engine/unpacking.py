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
WORD = 32
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
    zeros : callable, optional
        Returns the zero points, of which each block has one, from their bytes and how many there are, as a matrix.
    by_column : bool
        Whether the factors lie in the file column by column.
    """

    def __init__(
        self,
        codes: Codes,
        block: Grid,
        factor: torch.dtype,
        computed: torch.dtype,
        zeros: Callable[[torch.Tensor, Grid], torch.Tensor] | None = None,
        *,
        by_column: bool = False,
    ) -> None:
        self._codes = codes
        self._block = block
        self._factor = factor
        self._computed = computed
        self._zeros = zeros
        self._by_column = by_column

    def __call__(self, raw: torch.Tensor, into: torch.Tensor, factors: torch.Tensor, *others: torch.Tensor) -> None:
        """Unpack into a matrix of any floating dtype."""
        rows, columns = into.shape
        if not into.numel():
            return
        high, wide = self._block
        down, across = grid = (-(-rows // high), -(-columns // wide))
        scales = factors.view(self._factor)
        scales = (scales.view(across, down).T if self._by_column else scales.view(grid)).to(self._computed)
        zeros = self._zeros(others[0], grid).to(self._computed) if self._zeros else None
        order = self._order(grid, columns, *others)
        numbers = self._codes.rows(raw, rows)
        for begin, end in self._pieces(rows, columns):
            blocks = slice(begin // high, (end - 1) // high + 1)
            part = self._codes(numbers, begin, end)[:, :columns].to(self._computed)
            if zeros is not None:
                part.sub_(self._wide(zeros[blocks], columns, order))
            into[begin:end].copy_(part.mul_(self._wide(scales[blocks], columns, order)))

    def _pieces(self, rows: int, columns: int) -> Iterator[tuple[int, int]]:
        """Yield rows that have one row of factors in common, or one each."""
        high, together = self._block[0], self._codes.together
        step = max(SERIAL // columns // together, 1) * together
        for block in range(0, rows, rows if high == 1 else high):
            end = rows if high == 1 else min(block + high, rows)
            for begin in range(block, end, step):
                yield begin, min(begin + step, end)

    def _order(self, _grid: Grid, _columns: int, *_others: torch.Tensor) -> torch.Tensor | None:
        """Return for each column which one of factors it has; None where neighbours share them."""
        return None

    def _wide(self, values: torch.Tensor, columns: int, order: torch.Tensor | None) -> torch.Tensor:
        if order is not None:
            return values.index_select(1, order)
        return values.repeat_interleave(self._block[1], 1)[:, :columns] if values.shape[1] > 1 else values


class Codes:
    """Small whole numbers that PyTorch has a dtype for."""

    together = 1
    """How many neighbouring rows are unpacked at once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def rows(self, raw: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the bytes so that those of a row lie together."""
        return raw.view(self._dtype).view(rows, -1)

    def __call__(self, numbers: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Return the numbers of some rows."""
        return numbers[begin:end]

    def zeros(self, raw: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Return zero points that are stored like this, as a matrix."""
        return self(self.rows(raw, grid[0]), 0, grid[0])


class Float8(Codes):
    """Numbers of one byte, looked up: three times as fast as PyTorch's own conversion."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(torch.uint8)
        self._table = torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float()

    def __call__(self, numbers: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Return the numbers of some rows, in float32."""
        part = numbers[begin:end]
        return self._table.index_select(0, part.reshape(-1).int()).view(part.shape)


class Packed(Codes):
    """Whole numbers of 4 or 8 bits in words of 32, the first one lowest, less the middle of their range.

    That is how ``compressed_tensors/compressors/pack_quantized/helpers.py`` packs them.
    """

    def __init__(self, bits: int, middle: int) -> None:
        super().__init__(torch.uint8)
        self._bits = bits
        self._middle = middle

    def __call__(self, numbers: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Return the numbers of some rows, as int16."""
        part = numbers[begin:end]
        return (halves(part) if self._bits == BITS else part).to(torch.int16) - self._middle

    def zeros_of_rows(self, raw: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Return zero points of which a word has those of several rows, as a matrix."""
        words = raw.view(torch.int32).view(-1, grid[1]).T.contiguous()
        return self(words.view(torch.uint8), 0, grid[1])[:, : grid[0]].T


def halves(part: torch.Tensor) -> torch.Tensor:
    """Return both halves of each byte, the lower one first, in twice as many columns."""
    return torch.stack((part & LAST, part >> BITS), -1).flatten(-2)


class Inputs(Packed):
    """GPTQ's words: each has eight inputs of one output (or four), and so is of a row of the matrix that is wanted."""

    def __init__(self, bits: int) -> None:
        super().__init__(bits, 0)

    def rows(self, raw: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the bytes so that those of a row lie together."""
        return raw.view(torch.int32).view(-1, rows).T.contiguous().view(torch.uint8)


class Outputs(Codes):
    """AWQ's words, as AutoAWQ's "gemm" has them: each has eight outputs of one input, in the order of `ORDER`.

    See ``awq/utils/packing_utils.py`` of AutoAWQ 0.2.9.
    """

    ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
    """For each output which four bits of the word are its own, from the lowest upwards."""
    together = 8

    def __init__(self) -> None:
        super().__init__(torch.uint8)
        self._order = torch.tensor(self.ORDER, device="cpu")

    def rows(self, raw: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the bytes so that those of two rows lie together."""
        return raw.view(-1, rows // 2).T.contiguous()

    def __call__(self, numbers: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Return the numbers of some rows, as uint8."""
        part = numbers[begin // 2 : end // 2]
        both = torch.stack((part & LAST, part >> BITS), 1).view(-1, EACH, part.shape[1])
        return both.index_select(1, self._order).view(end - begin, -1)


class Gptq(Blocks):
    """The layout of AutoGPTQ, in which a zero point is stored less one, and its second version, in which it is not.

    See ``auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py`` of AutoGPTQ 0.7.1, and ``dequantize_weight`` in
    ``gptqmodel/nn_modules/qlinear/__init__.py`` of GPTQModel 7.7. Rounded to the factors' dtype.

    Parameters
    ----------
    name : str
        Of the tensor, for errors.
    size : int
        Of a group of inputs.
    factor : torch.dtype
        Of the factors.
    bits : int
        Of a number: 4 or 8.
    any_order : bool
        Whether the inputs of a group may lie anywhere (``desc_act``).
    less : int
        What has been taken from zero points: 1, or 0 in the second version.
    """

    def __init__(self, name: str, size: int, factor: torch.dtype, bits: int, *, any_order: bool, less: int) -> None:
        self._inputs = Inputs(bits)
        super().__init__(self._inputs, (1, size), factor, factor, self._zero_points, by_column=True)
        self._name = name
        self._last = (1 << bits) - 1
        self._any_order = any_order
        self._less = less

    def _zero_points(self, raw: torch.Tensor, grid: Grid) -> torch.Tensor:
        found = self._inputs(raw.view(grid[1], -1), 0, grid[1]).T
        if self._less and (found == self._last).any():
            raise UnsupportedError(
                f"A zero point of {self._name} is {self._last}, which is {self._last + 1} to some readers and 0 to others.", PLAIN
            )
        return found + self._less

    def _order(self, grid: Grid, columns: int, *others: torch.Tensor) -> torch.Tensor | None:
        groups = others[1].view(torch.int32)
        if torch.equal(groups, torch.arange(columns, dtype=torch.int32) // self._block[1]):
            return None
        if self._any_order and int(groups.min()) >= 0 and int(groups.max()) < grid[1]:
            return groups
        raise CheckpointError(f"The g_idx of {self._name} is not what config.json says (desc_act, group_size).", AGAIN)


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


class MxFp4:
    """Numbers of four bits, 32 of a row with one exponent, and the matrix transposed.

    The formula is that of ``convert_moe_packed_tensors`` in ``transformers/integrations/mxfp4.py``: of each byte the lower half
    comes first.
    """

    GROUP = 32
    INFINITE = 255
    """An exponent that no dtype has: the power is infinite, and zero times that would be no number."""

    def __call__(self, raw: torch.Tensor, into: torch.Tensor, exponents: torch.Tensor) -> None:
        """Unpack into one expert's matrix, of shape (columns, rows)."""
        columns, rows = into.shape
        if not into.numel():
            return
        table = torch.tensor(FP4, dtype=torch.float32, device="cpu")
        powers = exponents.view(rows, -1).T.to(torch.int32) - BIAS
        factors = torch.ldexp(torch.ones(powers.shape, dtype=torch.float32, device="cpu"), powers)
        infinite = bool((exponents == self.INFINITE).any())
        packed = raw.view(rows, -1).T.contiguous()
        half = self.GROUP // 2
        step = min(max(SERIAL // rows // 2, 1), half)
        for begin in (place for group in range(0, columns // 2, half) for place in range(group, group + half, step)):
            part, group = packed[begin : min(begin + step, begin // half * half + half)], begin // half
            both = torch.stack((part & LAST, part >> BITS), 1).view(-1).int()
            numbers = table.index_select(0, both).view(-1, rows)
            numbers = torch.ldexp(numbers, powers[group]) if infinite else numbers.mul_(factors[group])
            into[2 * begin : 2 * begin + len(numbers)].copy_(numbers)
