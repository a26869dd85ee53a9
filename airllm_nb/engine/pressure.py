"""Memory that becomes short while a model is loaded: what it may still do without, before the system swaps or kills."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from airllm_nb.engine import memory
from airllm_nb.engine.memory import ACTIVATIONS, format_size
from airllm_nb.engine.plan import Plan
from airllm_nb.engine.residency import release
from airllm_nb.engine.skeleton import Layer
from airllm_nb.engine.weights import WeightGroup
from airllm_nb.events import MemoryShort

ENOUGH = ACTIVATIONS
SHORT = ACTIVATIONS // 2
"""Bytes that should be left, and below which memory is short.

An automatic budget leaves room for activations and the estimated KV cache. Our own use comes near to half of the former only in a
conversation much longer than estimated; otherwise somebody else has taken memory. The other half is for what computes until the
next look. Layers are released until all of it is there again, so that the next ones do not follow at once.
"""
INTERVAL = 1.0
"""Seconds between two looks, which take half a millisecond each."""
LOWERED = "; lowered when memory became short"


class Watch:
    """Looks at the memory now and then, and finds a plan that needs less when it is short.

    That holds for a budget that the user gave, too: it is slower, but not killed. Layers are never loaded for good again: loading
    the model anew does that. What is mapped (`shared`) is not released, since the system can take those pages itself, nor are
    experts that are read when they are hit, nor a layer whose weights were changed since it was loaded: the checkpoint does not
    have them.

    Parameters
    ----------
    layers : sequence of Layer
        The model's, as loaded.
    plan : Plan
        How they were loaded.
    others : sequence of WeightGroup
        What stays beside them.
    """

    def __init__(self, layers: Sequence[Layer], plan: Plan, others: Sequence[WeightGroup] = ()) -> None:
        self._layers = layers
        self._others = () if plan.shared_nbytes is not None else others
        self._others_loaded = [group.state() for group in self._others]
        self._loaded = (
            {} if plan.shared_nbytes is not None else {i.index: layers[i.index].group.state() for i in plan.layers if i.resident}
        )
        self._next = 0.0
        self._told = False

    def __call__(self, plan: Plan) -> tuple[Plan, MemoryShort] | None:
        """Return a plan that needs less than the present one (or the same, if nothing can be released) and what to tell of it.

        Returns
        -------
        tuple of Plan and MemoryShort, or None
            None if nothing is to be done: memory is not short, or that nothing can be released was told already.
        """
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + INTERVAL
        left, limit = memory.available(plan.device, mapped=plan.shared_nbytes is not None)
        if left >= SHORT:
            return None
        text = f"Memory is short ({format_size(left)} left of the {limit})"
        less = self._less(plan, ENOUGH - left)
        if less is not None:
            stay = sum(layer.resident for layer in less.layers)
            count = sum(layer.resident for layer in plan.layers) - stay
            return less, MemoryShort(
                less.layers,
                f"{text}: {count} more {'layer streams' if count == 1 else 'layers stream'} now, {stay} still stay. "
                "Free memory and load the model again for its full speed.",
            )
        if self._told:
            return None
        self._told = True
        return plan, MemoryShort(
            plan.layers,
            f"{text}, and nothing more can be released: this model needs at least {format_size(plan.least)}. "
            "Free memory, or the system may end this process.",
        )

    def changed(self, plan: Plan) -> bool:
        """Tell whether weights that stay are not what was loaded, as far as `WeightGroup.state` notices; never of shared ones."""
        return [group.state() for group in self._others] != self._others_loaded or any(
            self._layers[layer.index].group.state() != self._loaded.get(layer.index)
            for layer in plan.layers
            if layer.resident and self._loaded
        )

    def _less(self, plan: Plan, nbytes: int) -> Plan | None:
        """Return a plan that needs `nbytes` bytes less, or as little as possible; None if it cannot need less."""
        released, slots = release(
            [layer.nbytes for layer in plan.layers],
            [
                layer.resident and self._layers[layer.index].group.state() == self._loaded.get(layer.index)
                for layer in plan.layers
            ],
            plan.window,
            nbytes,
        )
        if not released:
            return None
        layers = tuple(replace(layer, resident=layer.resident and layer.index not in released) for layer in plan.layers)
        entries = [
            () if layer.resident else tuple(
                part
                for recipe in self._layers[layer.index].group.recipes
                for source in recipe.sources
                for part in plan.work.checkpoint[source].stored
            )
            for layer in layers
        ]  # fmt: skip
        read = tuple(sum(entry.nbytes for entry in sources) for sources in entries)
        window = (*plan.window, *slots)
        work = replace(plan.work, read=read, streamed=tuple(e for sources in entries for e in sources), slots=len(window), room=0)
        device, number, budget = plan.reasons
        reasons = (device, number, budget.removesuffix(LOWERED) + LOWERED)
        less = replace(plan, layers=layers, window=window, streamed_nbytes=sum(read), work=work, reasons=reasons)
        return replace(less, budget=less.used_nbytes)
