"""What happens around each layer and each pass: weights come in and go out, events are told, an abort leaves no trace.

A streamed layer's life in a pass has four steps, as with accelerate's hooks: fetch its weights, begin, end, release them. The
model that fits needs none of them: its layers have no hooks at all, unless someone listens.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

from airllm_nb.compat import cache
from airllm_nb.engine.attention import forget_watches
from airllm_nb.engine.plan import Plan
from airllm_nb.engine.pressure import Watch
from airllm_nb.engine.release import Release
from airllm_nb.engine.skeleton import Layer
from airllm_nb.engine.stream import WeightStream
from airllm_nb.engine.taps import Tap, visit
from airllm_nb.errors import AirLLMError
from airllm_nb.events import ComputeBegin, ComputeEnd, LayerInfo, Listener, MemoryShort, PassBegin, PassEnd, Source

T = TypeVar("T")


def unloaded() -> AirLLMError:
    """Return what is raised by a model that was closed: a new one, since each keeps the frames it was raised through."""
    return AirLLMError("This model was unloaded.", "Load it again.")


class Runtime:
    """Runs the passes of one loaded model, one at a time.

    Parameters
    ----------
    layers : sequence of Layer
        The decoder layers.
    plan : Plan
        Says which of them stay.
    """

    def __init__(self, layers: Sequence[Layer], plan: Plan) -> None:
        self.lock = threading.RLock()
        self.plan = plan
        self.stream: WeightStream | None = None
        self.watch: Watch | None = None
        self.release: Release | None = None
        self.sources: dict[int, Source] = {}
        self.closed = False
        self.keeps_cache = True
        self.listener: Listener | None = None
        """Who is told of events; may be set at any time, also by a listener."""
        self.taps: tuple[Tap, ...] = ()
        """Who shall see what leaves each layer, from the next pass on; replaced as a whole, under `taps_lock`."""
        self.present: tuple[Tap, ...] = ()
        """Who sees it in this pass. Each pass begins with its own: what an interrupt leaves of one does not reach the next."""
        self.taps_lock = threading.Lock()
        self._layers = [_LayerHooks(self, layer, info) for layer, info in zip(layers, plan.layers, strict=True)]
        self._hooked: tuple[Plan, bool] | None = None
        self._pending: tuple[Plan, MemoryShort] | None = None
        self.passes = 0
        self._hook_layers()

    def emit(self, event: Any) -> None:
        """Tell the listener, if there is one."""
        listener = self.listener
        if listener is not None:
            listener(event)

    def run(self, call: Callable[[], T], tokens: int, past: Any, *guests: Tap) -> T:
        """Run one forward pass, `call`, over `tokens` new positions with the KV cache `past`; `guests` see this pass alone.

        Whatever happens inside, no layer keeps weights that are not its own, no buffer is lost, and after an abort the cache is
        what it was (unless it is one that ``generate`` made and drops: `keeps_cache`). The clean-up stands in ``finally``, since
        a forward hook does not run when the user interrupts the layer; and should a second interrupt hit the clean-up itself,
        the next pass begins with it. A pass within a pass (of the model's own inner model) is part of it.
        """
        with self.lock:
            if self._within_pass():
                return self._run_within(call, guests)
            self.require_open()
            self.present = (*self.taps, *guests)
            forget_watches()
            self.recover()
            self.relieve()
            self._hook_layers()
            index, self.passes = self.passes, self.passes + 1
            restore = cache.snapshot(past) if self.keeps_cache else None
            begin = time.perf_counter()
            completed = False
            grad = torch.is_grad_enabled()
            try:
                if self.listener is not None:
                    self.emit(PassBegin(index, tokens, "decode" if cache.length(past) else "prefill"))
                with torch.no_grad():
                    result = call()
                completed = True
                return result
            finally:
                torch.set_grad_enabled(grad)  # an interrupt within no_grad's own exit would leave it off
                self.present = ()
                if not completed:
                    self.recover()
                    if restore is not None:
                        restore()
                self.emit(PassEnd(index, tokens, time.perf_counter() - begin, completed))

    def _run_within(self, call: Callable[[], T], guests: tuple[Tap, ...]) -> T:
        """Run a pass within a pass. One with guests is no part of what those of the other see."""
        before = self.present
        try:
            if guests:
                self.present = (*self.taps, *guests)
            return call()
        finally:
            self.present = before

    def recover(self) -> None:
        """Take back what an aborted pass has left attached, if it has."""
        if self.stream is not None and self.stream.in_use:
            for hooks in self._layers:
                if not hooks.info.resident:
                    hooks.layer.group.detach()
            self.stream.reset()

    def before_layer(self) -> None:
        """Prepare for a streamed layer: also for one that is called on its own, outside of any pass."""
        self.require_open()
        if not self._within_pass():
            self.recover()

    def _within_pass(self) -> bool:
        """Tell whether a pass of this model has called, by looking at who calls: an interrupt might leave a flag behind."""
        frame = sys._getframe(1).f_back  # noqa: SLF001  # Python has no other name for it
        while frame is not None:
            if frame.f_code is _RUN and frame.f_locals["self"] is self:
                return True
            frame = frame.f_back
        return False

    def relieve(self) -> None:
        """Let layers stream that stayed, if memory is short. What an interrupt leaves half done, the next call completes."""
        if self.watch is None or self.release is None or (self.stream is not None and self.stream.in_use):
            return
        if self._pending is None:
            self._pending = self.watch(self.plan)
            if self._pending is None:
                return
        self.plan, news = self._pending
        self.emit(news)  # before anything is read
        self._hook_layers()
        self.stream = self.release(self.plan, self.stream)
        if self.closed:  # meanwhile, by another thread, which may not have seen this stream
            if self.stream is not None:
                self.stream.close()
            raise unloaded()
        self._pending = None
        if self.listener is None:
            warnings.warn(news.text, RuntimeWarning, stacklevel=2)

    def require_open(self) -> None:
        """Refuse what needs weights that were freed."""
        if self.closed:
            raise unloaded()

    def close(self) -> None:
        """Stop telling and computing. Freeing the weights is up to whoever made them."""
        self.closed = True
        self.listener = None
        self.taps = ()

    def _hook_layers(self) -> None:
        """Put hooks on the layers that stream, and while someone listens or sees what leaves them on all of them."""
        wanted = self.plan, self.listener is not None or bool(self.present)
        if self._hooked is not None and self._hooked[0] is wanted[0] and self._hooked[1] == wanted[1]:
            return
        self._hooked = None  # what an interrupt leaves half done is done again
        for hooks, info in zip(self._layers, wanted[0].layers, strict=True):
            hooks.info = info
            hooks.put(wanted=wanted[1] or not info.resident)
        self._hooked = wanted


_RUN = Runtime.run.__code__


class _LayerHooks:
    """The four steps of one layer."""

    def __init__(self, runtime: Runtime, layer: Layer, info: LayerInfo) -> None:
        self.runtime = runtime
        self.layer = layer
        self.info = info
        self.began = 0.0
        self.source: Source = "resident"

    def put(self, *, wanted: bool) -> None:
        """Put the hooks on or take them off.

        They are found by what they are: an interrupt could lose a handle to them. That `after` takes keyword arguments is noted
        first and forgotten last, or it would be called without them; `register_forward_hook` could be interrupted in between.
        """
        module = self.layer.module
        with_kwargs = module._forward_hooks_with_kwargs  # noqa: SLF001
        tables: tuple[tuple[dict[int, Any], Callable[..., Any]], ...] = (
            (module._forward_pre_hooks, self.before),  # noqa: SLF001
            (module._forward_hooks, self.after),  # noqa: SLF001
        )
        for table, hook in tables:
            numbers = [number for number, other in table.items() if other == hook]
            if wanted and not numbers:
                number = RemovableHandle(table).id
                if hook == self.after:
                    with_kwargs[number] = True
                table[number] = hook
            for number in () if wanted else numbers:
                del table[number]
        for number in with_kwargs.keys() - module._forward_hooks.keys():  # noqa: SLF001
            del with_kwargs[number]

    def before(self, _module: torch.nn.Module, _args: Any) -> None:
        """Fetch the weights, then begin."""
        begin = time.perf_counter()
        if not self.info.resident:
            self.runtime.before_layer()
            self.runtime.relieve()  # where layers stream, a pass can take long
            stream = self.runtime.stream
            assert stream is not None
            self.layer.group.attach(stream.take(self.info.index).buffer)
            self.source = self.runtime.sources[self.info.index]
        self.began = time.perf_counter()
        if self.runtime.listener is not None:
            waited = self.began - begin
            self.runtime.emit(ComputeBegin(self.info.index, self.info.name, self.info.nbytes, self.source, waited))

    def after(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """End, show the output to the taps, then release the weights. Returns what they make of it."""
        seconds = time.perf_counter() - self.began
        taps = self.runtime.present
        changed = visit(taps, self.info, module, args, kwargs, output) if taps else None
        if self.runtime.listener is not None:
            self.runtime.emit(ComputeEnd(self.info.index, self.info.name, self.info.nbytes, seconds, self.source))
        if not self.info.resident:
            self.layer.group.detach()
            if self.runtime.stream is not None:
                self.runtime.stream.give_back(self.info.index)
        return changed
