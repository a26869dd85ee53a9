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
    by_rows : bool
        Whether the embedding does not stay, and the rows that are looked up are read from disk.
    experts : int
        Bytes for experts that are read when they are hit; 0 if the layers stay or stream with their experts.
    """

    resident: tuple[bool, ...]
    window: tuple[int, ...]
    least: int
    by_rows: bool = False
    experts: int = 0


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
    resident = _spread(layers, budget - least)
    streamed = sorted(size for size, stays in zip(layers, resident, strict=True) if not stays)
    return Residency(tuple(resident), tuple(streamed[-2:]), least, by_rows)


def decide_with_experts(
    always: int, layers: Sequence[int], lean: Sequence[int], few: int, budget: int, embedding: int = 0
) -> Residency:
    """Choose what stays of a model whose experts can be read when they are hit.

    Of a layer without experts every byte is needed for every token, and of an expert only when it is hit: if not everything
    stays, the layers without their experts come first, and all that is left is for the experts that are hit most often.

    Parameters
    ----------
    always, layers, budget, embedding
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
        return replace(decide(always, layers, budget, embedding), least=least)
    decision = decide(always + few, lean, budget)
    used = always + sum(size for size, stays in zip(lean, decision.resident, strict=True) if stays) + sum(decision.window)
    return replace(decision, by_rows=embedding > 0, experts=budget - used)


def release(layers: Sequence[int], releasable: Sequence[bool], slots: Sequence[int], nbytes: int) -> tuple[list[int], list[int]]:
    """Choose layers that stay and shall stream from now on, at even distances, to free `nbytes` bytes, or else as many as can be.

    Parameters
    ----------
    layers : sequence of int
        Bytes of each layer.
    releasable : sequence of bool
        For each layer whether it stays now and may stream.
    slots : sequence of int
        Sizes of the buffers that streaming recycles now. Where there are fewer than two, the memory of the largest layers that
        are released goes on as such; otherwise layers that fit into none of them are not released.
    nbytes : int
        What is missing.

    Returns
    -------
    list of int, list of int
        The layers to release, and the sizes of the buffers that become of them; both are empty if it would free nothing.
    """
    largest = max(slots, default=None)
    fit = [index for index, may in enumerate(releasable) if may and (largest is None or layers[index] <= largest)]
    if not fit:
        return [], []
    sizes = [layers[index] for index in fit]
    recycled = max(2 - len(slots), 0)
    free = sum(sizes) - nbytes - sum(_largest(sizes, recycled))
    released = [index for index, stays in zip(fit, _spread(sizes, max(free, 0)), strict=True) if not stays]
    own = _largest([layers[index] for index in released], recycled)
    return (released, own) if len(released) > len(own) else ([], [])


def _largest(sizes: Sequence[int], count: int) -> list[int]:
    return sorted(sizes)[max(len(sizes) - count, 0) :]


def least_budget(always: int, layers: Sequence[int], lean: Sequence[int] = (), few: int = 0) -> int:
    """Return the smallest budget that works: what is always resident and the two largest layers, if possible without experts."""
    whole = always + sum(sorted(layers)[-2:])
    return min(whole, always + few + sum(sorted(lean)[-2:])) if lean else whole


def _spread(layers: Sequence[int], free: int) -> list[bool]:
    """Choose layers to stay within `free` bytes, at even distances, since what a layer reads hides behind its neighbours.

    The first one comes half a distance after the beginning: before that, the head has computed. Where layers differ in size,
    those that fit into what is left stay too.
    """
    count = len(layers)
    for stay in range(count - 1, -1, -1):
        resident = [(index * stay + count // 2) // count != ((index + 1) * stay + count // 2) // count for index in range(count)]
        if (left := free - sum(size for size, stays in zip(layers, resident, strict=True) if stays)) >= 0:
            break
    for index, size in enumerate(layers):
        if not resident[index] and size <= left:
            resident[index] = True
            left -= size
    return resident
