"""Layers that stayed begin to stream: their memory becomes the read-ahead window, or goes back to the system."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from airllm_nb.engine.memory import trim
from airllm_nb.engine.patience import Unanswered
from airllm_nb.engine.plan import Plan
from airllm_nb.engine.skeleton import Layer
from airllm_nb.engine.slots import Slot
from airllm_nb.engine.stream import WeightStream


class Release:
    """Brings weights and read-ahead in line with a plan that keeps fewer layers. On the CPU only.

    Nothing is allocated for it: memory is just what is missing.

    Parameters
    ----------
    layers : sequence of Layer
        The model's.
    fill : callable(index, slot)
        Reads a layer into a slot.
    unanswered : callable()
        See `patience`.
    streams : list
        Gets a new read-ahead before its thread starts: whoever owns the list closes it.
    """

    def __init__(
        self, layers: Sequence[Layer], fill: Callable[[int, Slot], None], unanswered: Unanswered, streams: list[Any]
    ) -> None:
        self._layers = layers
        self._fill = fill
        self._unanswered = unanswered
        self._streams = streams

    def __call__(self, plan: Plan, stream: WeightStream | None) -> WeightStream | None:
        """Let go what does not stay any more; returns the read-ahead, which is a new one if there was none.

        No released layer may be computing. What an interrupt leaves half done, the next call completes: that a layer is released
        is known by the read-ahead, which learns it last.
        """
        known = stream.layers if stream is not None else ()
        released = {info.index: info.nbytes for info in plan.layers if not info.resident and info.index not in known}
        if not released:
            return stream
        sizes = list(plan.window[stream.slots if stream is not None else 0 :])
        slots = []
        for index, nbytes in released.items():
            memory = self._layers[index].group.let_go()
            if nbytes in sizes:
                sizes.remove(nbytes)
                slots.append(Slot(nbytes, memory))
        del memory
        trim()
        if stream is not None:
            stream.add(released, slots)
            return stream
        for lost in self._streams:  # by an interrupt, right here
            if isinstance(lost, WeightStream):
                lost.close()
        stream = WeightStream(released, slots, self._fill, self._unanswered)
        self._streams.append(stream)
        stream.start()
        return stream
