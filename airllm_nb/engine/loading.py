"""Reads the weights that stay, and starts the read-ahead of those that stream."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from airllm_nb.compat import initialize, routing
from airllm_nb.engine import memory, rows
from airllm_nb.engine.conversion import Converter
from airllm_nb.engine.expert_stacks import ExpertStack
from airllm_nb.engine.experts import ExpertStore
from airllm_nb.engine.plan import ExpertsPlan, Plan
from airllm_nb.engine.pressure import Watch
from airllm_nb.engine.release import Release
from airllm_nb.engine.runtime import Runtime
from airllm_nb.engine.skeleton import Skeleton
from airllm_nb.engine.slots import Slot, make_slots
from airllm_nb.engine.stacked import stacked
from airllm_nb.engine.stream import WeightStream
from airllm_nb.engine.weights import GroupReader
from airllm_nb.errors import MemoryBudgetError
from airllm_nb.events import Event, LayerInfo, LayerRead, LayerReady, LoadBegin, LoadEnd, Source


@torch.inference_mode(mode=False)
def load_weights(
    skeleton: Skeleton,
    plan: Plan,
    groups: GroupReader,
    runtime: Runtime,
    streams: list[WeightStream | ExpertStore],
    stacks: Sequence[ExpertStack] = (),
) -> None:
    """Bring a model's weights to where `plan` wants them, and tell the runtime's listener of every step.

    Ordinary tensors, whatever mode the caller is in: those of ``inference_mode`` do not count their changes.

    Parameters
    ----------
    skeleton : Skeleton
        Gets the weights that stay.
    plan : Plan
        Says which those are.
    groups : GroupReader
        Reads (or maps) them.
    runtime : Runtime
        Gets the stream of the others.
    streams : list of WeightStream and ExpertStore
        Gets what has threads, before they start: whoever owns the list closes it, whatever happens.
    stacks : sequence of ExpertStack
        The experts that are read when they are hit.

    Raises
    ------
    MemoryBudgetError
        If what stays is more than there is.
    """
    _require_room(plan)
    begin, completed = time.perf_counter(), False
    runtime.emit(LoadBegin(plan.name, str(plan.device), str(plan.dtype).removeprefix("torch."), plan.layers))
    telling = _Telling(runtime)
    try:
        others = list(filter(None, (skeleton.always, None if plan.by_rows else skeleton.embedding)))
        for group in others:
            groups.load(group, plan.device)
        if plan.by_rows and skeleton.embedding is not None:
            rows.attach(skeleton.embedding, groups, runtime, plan.device)
        initialize.rewrite_buffers(skeleton.model)
        routing.refuse_negative_bias(skeleton.model)
        for layer, info in zip(skeleton.layers, plan.layers, strict=True):
            if info.resident:
                telling(info, groups.load, layer.group, plan.device)
            else:
                layer.group.detach()
        if plan.experts:
            streams.append(store := _experts(groups, plan.experts, stacks, plan.device))
            store.start()
        streamed = {info.index: info.nbytes for info in plan.layers if not info.resident}
        layer_groups = [layer.group for layer in skeleton.layers]
        stream = functools.partial(groups.fill, keep_cached=False, converter=Converter() if plan.device.type == "cpu" else None)

        def read(index: int, slot: Slot) -> None:
            telling(plan.layers[index], stream, layer_groups[index], slot.host)

        if plan.device.type == "cpu":
            runtime.watch = Watch(skeleton.layers, plan, others)
            runtime.release = Release(skeleton.layers, read, groups.unanswered, streams)
        if streamed:
            runtime.stream = WeightStream(streamed, make_slots(list(plan.window), plan.device), read, groups.unanswered)
            streams.append(runtime.stream)
            runtime.stream.start()
        memory.trim()
        completed = True
    finally:
        runtime.emit(LoadEnd(time.perf_counter() - begin, completed))


def _require_room(plan: Plan) -> None:
    """Refuse a budget of the user's that is more than there is: the system would end the process while it is filled."""
    if plan.device.type != "cpu" or plan.shared_nbytes is not None:
        return
    left, limit = memory.available(plan.device)
    if plan.used_nbytes > left:
        raise MemoryBudgetError(
            f"{memory.format_size(plan.used_nbytes)} of {plan.name} would stay in memory with this budget, and "
            f"{'' if limit[0].isupper() else 'the '}{limit} leaves {memory.format_size(left)}.",
            'Give a smaller budget or memory="auto", or free memory.',
        )


def _experts(groups: GroupReader, plan: ExpertsPlan, stacks: Sequence[ExpertStack], device: torch.device) -> ExpertStore:
    """Let the experts be read when they are hit."""

    def read(stack: ExpertStack, expert: int, into: torch.Tensor) -> None:
        groups.read(stack.sources[expert], into, keep_cached=False)

    store = ExpertStore(stacks, plan.slots, read, groups.unanswered)
    for number, stack in enumerate(stacks):
        parameter = stacked(store, number, device)
        for place in stack.places:
            place.table[place.attribute] = parameter
    return store


class _Telling:
    """Tells of a layer's reading; the reading thread that holds this must not keep a forgotten model (or listener) alive."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = weakref.ref(runtime)
        self._sources = runtime.sources

    def __call__(self, info: LayerInfo, read: Callable[..., bool], *args: Any) -> None:
        start = time.perf_counter()
        self._emit(LayerRead(info.index, info.name, info.nbytes))
        source: Source = "disk" if read(*args) else "cache"
        self._sources[info.index] = source
        self._emit(LayerReady(info.index, info.name, info.nbytes, time.perf_counter() - start, source))

    def _emit(self, event: Event) -> None:
        runtime = self._runtime()
        if runtime is not None:
            runtime.emit(event)
