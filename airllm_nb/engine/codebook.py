"""Turns the bytes of weights that bitsandbytes has quantized into numbers: just those that its own functions dequantize them to.

Called as the objects of ``unpacking.py`` are, and on the reading thread as they are.
"""

from __future__ import annotations

import torch

from airllm_nb.compat.quantization import PLAIN
from airllm_nb.engine.conversion import SERIAL
from airllm_nb.engine.quant_state import NESTED, QuantState
from airllm_nb.engine.readable import AGAIN
from airllm_nb.errors import CheckpointError, UnsupportedError

TABLES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}  # fmt: skip
"""What four bits stand for (``get_4bit_type`` in ``functional.py`` of bitsandbytes 0.50.2): quantiles of a normal distribution,
or a sign, two bits of exponent and one of mantissa. Its kernels have these numbers built in, whatever the file says."""
NEAR = 1e-6
"""By how much a table in a file may differ from that: the last bits of float32. What counts is the file's."""
UNIT = 7.874015718698502e-3
"""1 / 127, as in ``int8_vectorwise_dequant``."""


class Codebook:
    """Numbers of four bits that a table has, each block of them multiplied by its factor.

    Computed in float32 and rounded to the dtype that the weight had: ``dequantize_4bit`` in ``backends/default/ops.py`` of
    bitsandbytes 0.50.2. Of each byte the upper half comes first, and blocks go on from one row to the next.

    Parameters
    ----------
    name : str
        Of the weight, for errors.
    kind : {"nf4", "fp4"}
        Which table it is.
    nested : bool
        Whether the factors are quantized, too: bytes that another table of 256 numbers has, `NESTED` of them with one factor,
        plus an offset.
    """

    def __init__(self, name: str, kind: str, *, nested: bool) -> None:
        self._name = name
        self._kind = kind
        self._nested = nested

    def state(self, raw: torch.Tensor) -> QuantState:
        """Parse the bytes of the ``quant_state``."""
        return QuantState.of(raw.numpy().tobytes(), f"The quant_state of {self._name}", self._kind, nested=self._nested)

    def __call__(self, raw: torch.Tensor, into: torch.Tensor, *beside: torch.Tensor) -> None:
        """Unpack into a matrix of any floating dtype.

        Parameters
        ----------
        raw : torch.Tensor
            The bytes, two numbers in each.
        into : torch.Tensor
            The matrix.
        *beside : torch.Tensor
            The bytes of ``quant_state``, ``quant_map`` and ``absmax``, and if that is nested, ``nested_quant_map`` and
            ``nested_absmax``.

        Raises
        ------
        CheckpointError
            If any of that is not what it should be.
        """
        said, table, factors, *nested = beside
        state = self.state(said)
        if state.shape != tuple(into.shape):
            raise CheckpointError(f"{self._name} is said to be {state.shape}, and is used as {tuple(into.shape)}.", AGAIN)
        factors = self._factors(factors, state, *nested)
        pairs = self._pairs(table)
        flat, size = into.view(-1), state.size
        step = SERIAL // size * size
        for begin in range(0, flat.numel(), step):
            target = flat[begin : begin + step]
            part = pairs.index_select(0, raw[begin // 2 : (begin + step) // 2].int()).view(torch.float32)[: len(target)]
            whole, first = len(part) // size, begin // size
            part[: whole * size].view(-1, size).mul_(factors[first : first + whole, None])
            part[whole * size :].mul_(factors[-1])
            target.copy_(part.to(state.dtype))

    def _pairs(self, raw: torch.Tensor) -> torch.Tensor:
        """Return for each byte the two numbers that it stands for, as one of 64 bits."""
        table, known = raw.view(torch.float32), torch.tensor(TABLES[self._kind], device="cpu")
        if not torch.allclose(table, known, rtol=0, atol=NEAR):
            raise CheckpointError(f"The quant_map of {self._name} is not that of {self._kind}.", AGAIN)
        return torch.cartesian_prod(table, table).view(torch.int64).view(-1)

    def _factors(self, raw: torch.Tensor, state: QuantState, *nested: torch.Tensor) -> torch.Tensor:
        if not self._nested:
            return raw.view(torch.float32)
        table, largest = (tensor.view(torch.float32) for tensor in nested)
        if not table.isfinite().all():
            raise CheckpointError(f"The nested_quant_map of {self._name} is not finite.", AGAIN)
        return table[raw.int()].mul_(largest.repeat_interleave(NESTED)[: len(raw)]).add_(state.offset or 0.0)


class Rows:
    """Whole numbers of eight bits, each row with one factor: ``int8_vectorwise_dequant`` of bitsandbytes 0.50.2, in float32.

    Parameters
    ----------
    name : str
        Of the weight, for errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, raw: torch.Tensor, into: torch.Tensor, factors: torch.Tensor, *order: torch.Tensor) -> None:
        """Unpack into a matrix of any floating dtype.

        Raises
        ------
        UnsupportedError
            If the numbers lie in another order than row by row: older versions could write those of their GPU kernels.
        """
        if any(int(kind) for kind in order):
            raise UnsupportedError(f"The numbers of {self._name} do not lie row by row (weight_format {int(order[0])}).", PLAIN)
        rows, columns = into.shape
        numbers, each = raw.view(torch.int8).view(rows, columns), factors.view(torch.float32).view(rows, 1)
        step = max(SERIAL // max(columns, 1), 1)
        for begin in range(0, rows, step):
            part = numbers[begin : begin + step].float()
            into[begin : begin + step].copy_(part.mul_(each[begin : begin + step]).mul_(UNIT))
