"""What happens around each layer and each pass: weights come in and go out, events are told, an abort leaves no trace.

A streamed layer's life in a pass has four steps, as with accelerate's hooks: fetch its weights, begin, end, release them. The
model that fits needs none of them: its layers have no hooks at all, unless someone listens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from airllm_nb.compat import cache
from airllm_nb.engine.skeleton import Layer
from airllm_nb.engine.stream import WeightStream
from airllm_nb.errors import AirLLMError
from airllm_nb.events import ComputeBegin, ComputeEnd, LayerInfo, Listener, PassBegin, PassEnd, Source

T = TypeVar("T")


class Runtime:
    """Runs the passes of one loaded model, one at a time.

    Parameters
    ----------
    layers : sequence of Layer
        The decoder layers.
    infos : sequence of LayerInfo
        The same layers, as events name them.
    """

    def __init__(self, layers: Sequence[Layer], infos: Sequence[LayerInfo]) -> None:
        self.lock = threading.RLock()
        self.stream: WeightStream | None = None
        self.sources: dict[int, Source] = {}
        self.closed = False
        self.keeps_cache = True
        self._layers = list(zip(layers, infos, strict=True))
        self._listener: Listener | None = None
        self._handles: list[Any] = []
        self._passes = 0
        self._clean = True

    @property
    def listener(self) -> Listener | None:
        """Who is told of events. Hooks that only tell exist only while there is one."""
        return self._listener

    @listener.setter
    def listener(self, listener: Listener | None) -> None:
        with self.lock:
            self._listener = listener
            self.install()

    def emit(self, event: Any) -> None:
        """Tell the listener, if there is one."""
        if self._listener is not None:
            self._listener(event)

    def install(self) -> None:
        """Put on each layer the hooks that it needs now."""
        self.remove()
        for layer, info in self._layers:
            if info.resident and self._listener is None:
                continue
            hooks = _LayerHooks(self, layer, info)
            self._handles.append(layer.module.register_forward_pre_hook(hooks.before))
            self._handles.append(layer.module.register_forward_hook(hooks.after))

    def remove(self) -> None:
        """Take all hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def run(self, call: Callable[[], T], tokens: int, past: Any) -> T:
        """Run one forward pass, `call`, over `tokens` new positions with the KV cache `past`.

        Whatever happens inside, no layer keeps weights that are not its own, no buffer is lost, and after an abort the cache is
        what it was (unless it is one that ``generate`` made and drops: `keeps_cache`). The clean-up stands in
        ``finally``, since a forward hook does not run when the user interrupts the layer; and should a second interrupt hit the
        clean-up itself, the next pass begins with it.
        """
        with self.lock:
            if self.closed:
                raise AirLLMError("This model was unloaded.", "Load it again.")
            if not self._clean:
                self._clean_up()
            self._clean = completed = False
            index, self._passes = self._passes, self._passes + 1
            begin = time.perf_counter()
            restore = cache.snapshot(past) if self.keeps_cache else None
            try:
                if self._listener is not None:
                    self.emit(PassBegin(index, tokens, "decode" if cache.length(past) else "prefill"))
                with torch.no_grad():
                    result = call()
                completed = True
                return result
            finally:
                if not completed:
                    self._clean_up()
                    if restore is not None:
                        restore()
                self._clean = True
                self.emit(PassEnd(index, tokens, time.perf_counter() - begin, completed))

    def _clean_up(self) -> None:
        for layer, info in self._layers:
            if not info.resident:
                layer.group.detach()
        if self.stream is not None:
            self.stream.reset()

    def close(self) -> None:
        """Stop reading and let go of all weights."""
        with self.lock:
            self.closed = True
            self.remove()
            if self.stream is not None:
                self.stream.close()
                self.stream = None
            for layer, _ in self._layers:
                layer.group.detach()


class _LayerHooks:
    """The four steps of one layer."""

    def __init__(self, runtime: Runtime, layer: Layer, info: LayerInfo) -> None:
        self.runtime = runtime
        self.layer = layer
        self.info = info
        self.began = 0.0

    def before(self, _module: torch.nn.Module, _args: Any) -> None:
        """Fetch the weights, then begin."""
        begin = time.perf_counter()
        if not self.info.resident:
            stream = self.runtime.stream
            assert stream is not None
            self.layer.group.attach(stream.take(self.info.index).buffer)
        self.began = time.perf_counter()
        if self.runtime.listener is not None:
            self.source: Source = "resident" if self.info.resident else self.runtime.sources[self.info.index]
            waited = self.began - begin
            self.runtime.emit(ComputeBegin(self.info.index, self.info.name, self.info.nbytes, self.source, waited))

    def after(self, _module: torch.nn.Module, _args: Any, _output: Any) -> None:
        """End, then release the weights. The output is not touched: its type differs between versions."""
        if self.runtime.listener is not None:
            seconds = time.perf_counter() - self.began
            self.runtime.emit(ComputeEnd(self.info.index, self.info.name, self.info.nbytes, seconds, self.source))
        if not self.info.resident:
            self.layer.group.detach()
            if self.runtime.stream is not None:
                self.runtime.stream.give_back(self.info.index)
