"""Which layers stay in memory and which stream from disk: a pure function of sizes and budget.

Decoding visits the layers in a cycle. For a cycle, keeping a fixed set is the best that any policy can do, and least recently
used (what the operating system's page cache does) is the worst: it drops each layer just before it is needed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from airllm_nb.engine.memory import format_size
from airllm_nb.errors import MemoryBudgetError


@dataclass(frozen=True)
class Residency:
    """The decision.

    Attributes
    ----------
    resident : tuple of bool
        For each layer whether it stays.
    window : tuple of int
        Sizes in bytes of the buffers that streaming recycles: one layer computes while the next one is read. Empty if all stay.
    least : int
        The smallest budget in bytes that works: what is always resident and the two largest layers.
    by_rows : bool
        Whether the embedding does not stay, and the rows that are looked up are read from disk.
    """

    resident: tuple[bool, ...]
    window: tuple[int, ...]
    least: int
    by_rows: bool


def decide(always: int, layers: Sequence[int], budget: int, embedding: int = 0) -> Residency:
    """Choose the layers that stay, as many as fit, spread so that reading can hide behind them.

    An embedding that can be read by rows stays only if everything does: a token needs one row of it, and the whole of a layer.

    Parameters
    ----------
    always : int
        Bytes of what every pass needs whole and no layer holds: final norm, head, a tied embedding, buffers.
    layers : sequence of int
        Bytes of each decoder layer in the dtype it computes in.
    budget : int
        Bytes that weights and read-ahead buffers may use together.
    embedding : int
        Bytes of an embedding that can be read by rows; 0 if there is none.

    Raises
    ------
    MemoryBudgetError
        If the budget is below the least that works.
    """
    least = least_budget(always, layers)
    if budget < least:
        raise MemoryBudgetError(
            f"A budget of {format_size(budget)} is too small for this model: it needs at least {format_size(least)} "
            f"({format_size(always)} that always stay and its two largest layers).",
            f'Give memory="{-(-least // 10**6)}MB" or more, or choose a smaller model.',
        )
    by_rows = 0 < embedding > budget - always - sum(layers)
    if always + sum(layers) <= budget:
        return Residency((True,) * len(layers), (), least, by_rows)
    free = budget - least
    resident = [False] * len(layers)
    for index in _spread(len(layers)):
        if layers[index] <= free:
            resident[index] = True
            free -= layers[index]
    streamed = sorted(size for size, stays in zip(layers, resident, strict=True) if not stays)
    return Residency(tuple(resident), tuple(streamed[-2:]), least, by_rows)


def least_budget(always: int, layers: Sequence[int]) -> int:
    """Return the smallest budget that works: what is always resident and the two largest layers."""
    return always + sum(sorted(layers)[-2:])


def _spread(count: int) -> list[int]:
    """Return 0 .. count-1 in an order whose every prefix is spread evenly: multiples of the golden ratio, modulo 1."""
    golden = 0.6180339887498949
    return sorted(range(count), key=lambda index: (index * golden) % 1.0)
