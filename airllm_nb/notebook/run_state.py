"""What a run is doing right now: the engine's events added up."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from airllm_nb.events import (
    BatchBegin,
    BatchEnd,
    ComputeBegin,
    ComputeEnd,
    Event,
    Fetching,
    LayerInfo,
    LayerRead,
    LayerReady,
    LoadBegin,
    LoadEnd,
    MemoryShort,
    PassBegin,
    PassEnd,
)
from airllm_nb.notebook.batches import Batches
from airllm_nb.notebook.summary import LayerTotals
from airllm_nb.notebook.timeline import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

Phase = Literal["waiting", "reading", "ready", "resident", "computing", "done"]
"""What a layer does: its weights are on disk, being read, read ahead, or stay; it computes; it has computed."""

Ended = Literal["done", "interrupted", "failed"]
"""How it ended."""

RECENT_PASSES = 16
"""Passes whose times say how fast it goes now."""


@dataclass
class LayerState:
    """One layer: where its weights are, what it does, and what it has done in this run."""

    info: LayerInfo
    weights: Literal["waiting", "reading", "ready", "resident"]
    work: Literal["idle", "computing", "done"] = "idle"
    passes: int = 0
    disk_nbytes: int = 0
    cache_nbytes: int = 0
    read_seconds: float = 0.0
    waited_seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def phase(self) -> Phase:
        """The one thing to show of it."""
        if self.work == "computing":
            return "computing"
        if self.work == "done" and self.weights in ("waiting", "resident"):
            return "done"
        return self.weights  # read ahead for the next pass, it is more than done

    def totals(self) -> LayerTotals:
        """Freeze what it has done."""
        return LayerTotals(
            self.info.index,
            self.info.name,
            self.info.nbytes,
            self.info.resident,
            self.passes,
            self.disk_nbytes,
            self.cache_nbytes,
            self.read_seconds,
            self.waited_seconds,
            self.compute_seconds,
        )


@dataclass
class PassTime:
    """Where the seconds of one pass went: all of them, those that it waited for weights, and those until the next pass."""

    seconds: float
    waited: float
    between: float = 0.0


class RunState:
    """The engine's events of one load or one run, added up. Knows nothing about drawing.

    Parameters
    ----------
    model : str
        The model's name, for people.
    layers : tuple of LayerInfo, optional
        Its layers, if they are known before the first event.
    tokens_wanted : int, optional
        The largest number of tokens that a run can give; 0 for a load.
    memory_left : int, optional
        Bytes in which more layers could stay; None where what a run waits for cannot be told (see `airllm_nb.notebook.verdict`).
    recorder : Recorder, optional
        What keeps the time of everything; that of a run that goes on with an earlier one.
    """

    def __init__(
        self,
        model: str,
        layers: tuple[LayerInfo, ...] = (),
        tokens_wanted: int = 0,
        memory_left: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.model = model
        self.tokens_wanted = tokens_wanted
        self.memory_left = memory_left
        self.kind: Literal["opening", "load", "prefill", "decode"] = "opening"
        self.fetching = ""  # what is being fetched before a load can begin, in words
        self.files: dict[str, tuple[int, int]] = {}  # its files: bytes that are here, and all
        self.ended: Ended | None = None  # None while it runs
        self.seconds = 0.0  # of the load; or from the first pass's begin to the last one's end
        self.prompt_tokens = 0
        self.passes_begun = 0
        self.tokens = 0  # passes that are over: each gives a token
        self.layer = 0  # the layer that computes, or did last
        self.decode_seconds = 0.0
        self.loaded_layers = 0
        self.loaded_nbytes = 0
        self.batches: Batches | None = None  # of a map
        self.note = ""  # what the user should know, in words
        self.layers = [LayerState(info, "resident" if info.resident else "waiting") for info in layers]
        self.recent: collections.deque[PassTime] = collections.deque(maxlen=RECENT_PASSES)  # of the present kind
        self.now = 0.0  # when the last event was made
        self.phase_at = 0.0  # when fetching, the load or the present pass began
        self.waited = 0.0  # in the present pass
        self.recorder = recorder or Recorder()
        self._began_at = self._ended_at = 0.0  # the first pass's begin, the last one's end
        self._apply: dict[type[Event], Callable[[Any], None]] = {
            Fetching: self._fetching,
            LoadBegin: self._load_begin,
            LoadEnd: self._load_end,
            MemoryShort: self._memory_short,
            BatchBegin: self._batch_begin,
            BatchEnd: self._batch_end,
            PassBegin: self._pass_begin,
            PassEnd: self._pass_end,
            LayerRead: self._layer_read,
            LayerReady: self._layer_ready,
            ComputeBegin: self._compute_begin,
            ComputeEnd: self._compute_end,
        }

    def apply(self, event: Event) -> None:
        """Take one event into account."""
        self._apply[type(event)](event)
        self.now = event.at
        self.recorder.apply(event)

    def end(self, ended: Ended) -> None:
        """Close the account: what was read ahead will not be used, and what was interrupted is not done."""
        self.ended = ended
        for layer in self.layers:
            if layer.weights != "resident":
                layer.weights = "waiting"
            if layer.work == "computing":
                layer.work = "idle"

    @property
    def tokens_per_second(self) -> float:
        """Rate of the decoding passes while it runs, of the whole run when it is over; 0.0 before it is known."""
        if self.ended:
            return self.tokens / self.seconds if self.seconds else 0.0
        return (self.tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def fraction(self) -> float:
        """How much is done, from 0 to 1."""
        if self.ended == "done":
            return 1.0
        if self.kind == "load":
            wanted = sum(layer.info.resident for layer in self.layers)
            return self.loaded_layers / wanted if wanted else 1.0
        if self.kind == "opening" and self.batches is None:
            done, total = (sum(sizes) for sizes in zip((0, 0), *self.files.values(), strict=True))
            return done / total if total else 0.0
        return min(1.0, (self.passes_begun - 1 + self.pass_fraction) / self.tokens_wanted) if self.passes_begun else 0.0

    @property
    def pass_fraction(self) -> float:
        """How much of the present pass is done, from 0 to 1."""
        return sum(layer.work == "done" for layer in self.layers) / len(self.layers)

    @property
    def waits(self) -> bool:
        """Whether the computation stands still, or is about to: the next layer is not in memory yet."""
        following = self.layer + 1
        return (
            following < len(self.layers)
            and self.layers[self.layer].work == "done"
            and self.layers[following].weights in ("waiting", "reading")
        )

    def _fetching(self, event: Fetching) -> None:
        if event.text.partition(" ")[0] != self.fetching.partition(" ")[0]:  # downloading is over, and converting begins
            self.phase_at = event.at
            self.files = {}
        self.fetching = event.text
        if event.file:
            self.files[event.file] = event.done, event.total

    def _load_begin(self, event: LoadBegin) -> None:
        self.kind = "load"
        self.phase_at = event.at
        self.model = event.model
        self.layers = [LayerState(info, "waiting") for info in event.layers]

    def _load_end(self, event: LoadEnd) -> None:
        self.seconds = event.seconds

    def _memory_short(self, event: MemoryShort) -> None:
        self.note = event.text
        for layer, info in zip(self.layers, event.layers, strict=True):
            if layer.info.resident and not info.resident:
                layer.weights = "waiting"
            layer.info = info

    def _batch_begin(self, event: BatchBegin) -> None:
        """Begin anew: a batch is a run of its own."""
        if self.batches is None:
            self.batches = Batches(event)
        self.batches.begin(event)
        self.tokens_wanted = event.tokens
        self.passes_begun = self.tokens = 0
        self.decode_seconds = 0.0
        self.kind = "opening"
        self.recent.clear()

    def _batch_end(self, event: BatchEnd) -> None:
        if self.batches is not None:
            self.batches.end(event)

    def _pass_begin(self, event: PassBegin) -> None:
        self.passes_begun += 1
        if self.recent:
            self.recent[-1].between = event.at - self._ended_at
        self.phase_at = event.at
        self.waited = 0.0
        if self.passes_begun == 1:
            self.kind = "prefill"
            self._began_at = event.at
            self.prompt_tokens = event.tokens
        else:  # also where the event says prefill: a model that runs without KV cache goes through the prompt every time
            self.kind = "decode"
        for layer in self.layers:
            layer.work = "idle"

    def _pass_end(self, event: PassEnd) -> None:
        self._ended_at = event.at
        self.seconds = event.at - self._began_at
        if event.completed:
            self.tokens += 1
            if self.tokens <= 2:  # noqa: PLR2004  # the prompt's pass says nothing about those that follow
                self.recent.clear()
            self.recent.append(PassTime(event.at - self.phase_at, self.waited))
            self.decode_seconds += self.recent[-1].seconds if self.kind == "decode" else 0.0

    def _layer_read(self, event: LayerRead) -> None:
        self.layers[event.index].weights = "reading"

    def _layer_ready(self, event: LayerReady) -> None:
        layer = self.layers[event.index]
        layer.weights = "resident" if layer.info.resident else "ready"
        layer.read_seconds += event.seconds
        if event.source == "disk":
            layer.disk_nbytes += event.nbytes
        else:
            layer.cache_nbytes += event.nbytes
        if self.kind == "load" and layer.info.resident:
            self.loaded_layers += 1
            self.loaded_nbytes += event.nbytes

    def _compute_begin(self, event: ComputeBegin) -> None:
        self.layer = event.index
        layer = self.layers[event.index]
        layer.work = "computing"
        layer.waited_seconds += event.waited
        self.waited += event.waited

    def _compute_end(self, event: ComputeEnd) -> None:
        layer = self.layers[event.index]
        layer.work = "done"
        layer.passes += 1
        layer.compute_seconds += event.seconds
        if layer.weights == "ready":  # and not already being read for the next pass
            layer.weights = "waiting"
