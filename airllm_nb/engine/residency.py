"""Which layers stay in memory and which stream from disk: a pure function of sizes and budget.

Decoding visits the layers in a cycle. For a cycle, keeping a fixed set is the best that any policy can do, and least recently
used (what the operating system's page cache does) is the worst: it drops each layer just before it is needed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    experts : int
        Bytes for experts that are read when they are hit; 0 if the layers stay or stream with their experts.
    """

    resident: tuple[bool, ...]
    window: tuple[int, ...]
    least: int
    experts: int = 0


def decide(always: int, layers: Sequence[int], budget: int) -> Residency:
    """Choose the layers that stay, as many as fit, spread so that reading can hide behind them.

    Parameters
    ----------
    always : int
        Bytes of what every pass needs and no layer holds: embedding, final norm, head, buffers.
    layers : sequence of int
        Bytes of each decoder layer in the dtype it computes in.
    budget : int
        Bytes that weights and read-ahead buffers may use together.

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
    if always + sum(layers) <= budget:
        return Residency((True,) * len(layers), (), least)
    free = budget - least
    resident = [False] * len(layers)
    for index in _spread(len(layers)):
        if layers[index] <= free:
            resident[index] = True
            free -= layers[index]
    streamed = sorted(size for size, stays in zip(layers, resident, strict=True) if not stays)
    return Residency(tuple(resident), tuple(streamed[-2:]), least)


def decide_with_experts(always: int, layers: Sequence[int], lean: Sequence[int], few: int, budget: int) -> Residency:
    """Choose what stays of a model whose experts can be read when they are hit.

    Of a layer without experts every byte is needed for every token, and of an expert only when it is hit: if not everything
    stays, the layers without their experts come first, and all that is left is for the experts that are hit most often.

    Parameters
    ----------
    always, layers, budget
        As for `decide`.
    lean : sequence of int
        Bytes of each layer without those experts; empty if the model has none.
    few : int
        Bytes of as many experts as must be in memory at once.

    Raises
    ------
    MemoryBudgetError
        If the budget is below the least that works.
    """
    least = least_budget(always, layers, lean, few)
    if budget >= always + sum(layers) or least == least_budget(always, layers):
        return replace(decide(always, layers, budget), least=least)
    decision = decide(always + few, lean, budget)
    used = always + sum(size for size, stays in zip(lean, decision.resident, strict=True) if stays) + sum(decision.window)
    return replace(decision, experts=budget - used)


def least_budget(always: int, layers: Sequence[int], lean: Sequence[int] = (), few: int = 0) -> int:
    """Return the smallest budget that works: what is always resident and the two largest layers, if possible without experts."""
    whole = always + sum(sorted(layers)[-2:])
    return min(whole, always + few + sum(sorted(lean)[-2:])) if lean else whole


def _spread(count: int) -> list[int]:
    """Return 0 .. count-1 in an order whose every prefix is spread evenly: multiples of the golden ratio, modulo 1."""
    golden = 0.6180339887498949
    return sorted(range(count), key=lambda index: (index * golden) % 1.0)
