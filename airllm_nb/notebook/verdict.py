"""What the times of a run say in words: what it waits for, what would help, and how long it will go on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from airllm_nb.notebook.run_state import PassTime

if TYPE_CHECKING:
    from airllm_nb import LayeredModel
    from airllm_nb.notebook.run_state import LayerState, RunState

WORTH_TELLING = 1.1
"""How much faster more memory has to make a run to be advised."""

SURE_AFTER = 2.0
LEAST_FRACTION = 0.05
"""Seconds, and the part that must be done, before the rest of a load or a prompt is guessed from it."""


def verdict(state: RunState) -> str:
    """Say what a run waits for, from its last passes: ``91% disk · 6% compute — 2 GB more memory would make it 1.8x faster``.

    Compute is whatever a pass does but wait for weights; the rest, between passes, goes into choosing and showing tokens.

    Returns
    -------
    str
        Empty where nothing is known: before the first layer that streams has computed, on a GPU, which computes on its own, and
        where experts are read within their layer.
    """
    if state.memory_left is None:
        return ""
    streams = [layer for layer in state.layers if not layer.info.resident]
    if state.kind not in ("prefill", "decode") or not any(layer.passes for layer in streams or state.layers):
        return ""
    times = list(state.recent) or [PassTime(state.now - state.phase_at, state.waited)]
    waited, between = sum(time.waited for time in times), sum(time.between for time in times)
    whole = sum(time.seconds for time in times) + between
    if whole <= 0:
        return ""
    reading, rest = round(100 * waited / whole), round(100 * between / whole)
    shares = f"{100 - reading - rest}% compute" + (f" · {rest}% choosing tokens" if rest else "")
    if not streams:
        return f"all in memory · {shares}"
    cached = sum(layer.cache_nbytes for layer in streams) > sum(layer.disk_nbytes for layer in streams)
    advice = _advice(state, streams, whole / len(times), waited / len(times)) if state.tokens > 1 else ""
    return f"{reading}% {'reading from the page cache' if cached else 'disk'} · {shares}{advice}"


def _advice(state: RunState, streamed: list[LayerState], seconds: float, waited: float) -> str:
    """Say how much memory would make passes faster that take so long and wait so long; nothing if there is no such memory.

    Each further layer that stays saves its read, as long as the computation would have waited for it.
    """
    nbytes = sum(layer.disk_nbytes + layer.cache_nbytes for layer in streamed)
    pace = sum(layer.read_seconds for layer in streamed) / nbytes if nbytes else 0.0
    more, saved = 0, 0.0
    for layer in streamed:
        if saved >= waited or more + layer.info.nbytes > (state.memory_left or 0):
            break
        more += layer.info.nbytes
        saved += layer.info.nbytes * pace
    faster = seconds / (seconds - min(saved, waited)) if waited < seconds else 1.0
    if faster < WORTH_TELLING:
        return ""
    return f" — {_about(more)} more memory would make it {faster:.1f}x faster"


def _about(nbytes: int) -> str:
    """Write a size with two digits, rounded up: so much is enough."""
    from airllm_nb.engine.memory import format_size

    step = 10 ** max(int(math.log10(max(nbytes, 1))) - 1, 0)
    value, _, unit = format_size(math.ceil(nbytes / step) * step).partition(" ")
    return f"{float(value):g} {unit}"


def memory_left(model: LayeredModel) -> int | None:
    """Return in how many bytes more layers of a loaded model could stay; None where what it waits for cannot be told."""
    from airllm_nb.engine import memory, planning

    plan = model.plan
    if plan.device.type != "cpu" or plan.experts is not None:
        return None
    reserve = memory.ACTIVATIONS + planning.cache_nbytes(model.config, len(plan.layers), plan.dtype)
    return max(memory.available(plan.device)[0] - reserve, 0)


def time_left(state: RunState) -> str:
    """Say how long it will go on, from what was measured: ``about 40 s left``; empty before that can be known, and at the end."""
    if state.ended:
        return ""
    if state.batches is not None:
        left = state.batches.seconds_left(state.now, state.fraction)
        return "" if left is None else f"{_rounded(left)} left at most"
    if state.kind == "decode":
        if state.tokens < 2:  # noqa: PLR2004  # the prompt's pass, and one to measure
            return ""
        seconds = sum(time.seconds + time.between for time in state.recent) / len(state.recent)
        under_way = state.passes_begun > state.tokens
        seconds *= state.tokens_wanted - state.tokens - under_way * min((state.now - state.phase_at) / seconds, 1.0)
        return f"{_rounded(seconds)} left at most"  # the model may end its text before
    passed, done = state.now - state.phase_at, state.pass_fraction if state.kind == "prefill" else state.fraction
    if passed < SURE_AFTER or not LEAST_FRACTION <= done < 1:
        return ""
    words = "to the first token" if state.kind == "prefill" else "left"
    return f"{_rounded(passed * (1 - done) / done)} {words}"


def _rounded(seconds: float) -> str:
    """Write a time so roughly that it does not jump about."""
    if seconds < 100:  # noqa: PLR2004  # seconds people read as such
        step = 1 if seconds < 10 else 5  # noqa: PLR2004
        return f"about {max(round(seconds / step) * step, 1)} s"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 100 else f"about {round(minutes / 60)} h"  # noqa: PLR2004
