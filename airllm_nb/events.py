"""The events the engine emits: frozen facts, and the one contract between the engine and any display.

A listener is any ``callable(event)``. It is called synchronously, so it should be quick. The order of a run is::

    Fetching* LoadBegin (LayerRead LayerReady)* LoadEnd
    (PassBegin (ComputeBegin ComputeEnd)* PassEnd)*

``LayeredModel.map`` puts a ``BatchBegin`` before the passes of each batch, and a ``BatchEnd`` after them.
``MemoryShort`` may come before any ``PassBegin`` or, where layers stream, ``ComputeBegin``.

For a layer that streams, ``LayerRead`` and ``LayerReady`` arrive from the engine's *reading thread*, ahead of the layer's
``ComputeBegin`` and possibly in another pass (read-ahead wraps from the last layer to the first one of the next token).
All other events come from the thread that called the model. Sizes are bytes; durations are seconds; ``at`` is
``time.perf_counter()`` when the event was made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Source = Literal["resident", "cache", "disk"]
"""Where a layer's weights came from: already in memory, the operating system's page cache, or the disk."""


@dataclass(frozen=True)
class LayerInfo:
    """One decoder layer of a loaded (or planned) model.

    Attributes
    ----------
    index : int
        Position in the order of computation, from 0.
    name : str
        Module path in transformers' model, for example ``"model.layers.11"``.
    nbytes : int
        Size of its weights in the dtype they compute in.
    resident : bool
        True if the weights stay in memory, False if they stream from disk in every pass.
    """

    index: int
    name: str
    nbytes: int
    resident: bool


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    at: float = field(default_factory=time.perf_counter, kw_only=True)


@dataclass(frozen=True)
class Fetching(Event):
    """The model's files are being fetched or converted; `text` says it in words for people, the first of which is what is done.

    Where it is known, `done` of the `total` bytes of `file` are here.
    """

    text: str
    file: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class LoadBegin(Event):
    """The plan is made and the weights that stay are about to be read."""

    model: str
    device: str
    dtype: str
    layers: tuple[LayerInfo, ...]


@dataclass(frozen=True)
class LoadEnd(Event):
    """Loading is over; `completed` is False if it was interrupted or failed."""

    seconds: float
    completed: bool


@dataclass(frozen=True)
class PassBegin(Event):
    """A forward pass begins: pass number `index` since loading, over `tokens` new positions of each sequence.

    ``kind`` is ``"prefill"`` for a pass without a filled KV cache (a whole prompt), else ``"decode"``.
    """

    index: int
    tokens: int
    kind: Literal["prefill", "decode"]


@dataclass(frozen=True)
class PassEnd(Event):
    """The forward pass is over; `completed` is False if it was interrupted or failed."""

    index: int
    tokens: int
    seconds: float
    completed: bool


@dataclass(frozen=True)
class MemoryShort(Event):
    """The system has little memory left, and the engine has made room as far as it can.

    ``layers`` are all decoder layers as they are from now on: some that stayed may stream. ``text`` says it in words for people.
    """

    layers: tuple[LayerInfo, ...]
    text: str


@dataclass(frozen=True)
class LayerRead(Event):
    """Reading the weights of a layer begins."""

    index: int
    name: str
    nbytes: int


@dataclass(frozen=True)
class LayerReady(Event):
    """The weights of a layer are in memory; `seconds` is what reading them took, `source` where they came from."""

    index: int
    name: str
    nbytes: int
    seconds: float
    source: Source


@dataclass(frozen=True)
class ComputeBegin(Event):
    """A layer begins to compute, after the computation waited `waited` seconds for its weights."""

    index: int
    name: str
    nbytes: int
    source: Source
    waited: float


@dataclass(frozen=True)
class ComputeEnd(Event):
    """A layer has computed in `seconds`. On CUDA this is the time to *launch* its kernels: they run asynchronously."""

    index: int
    name: str
    nbytes: int
    seconds: float
    source: Source


@dataclass(frozen=True)
class BatchBegin(Event):
    """The next `rows` prompts of a map are about to be answered together, with up to `tokens` new tokens each.

    ``done`` of the `total` prompts have an answer, of which `computed` in this call: the others were in the file of results, or
    are the same prompt again.
    """

    rows: int
    tokens: int
    done: int
    computed: int
    total: int


@dataclass(frozen=True)
class BatchEnd(Event):
    """A batch is over; `texts` are its answers by the prompt's index, fewer than there were rows if it was interrupted.

    The first may come without a `BatchBegin`: with what was in the file of results.
    """

    seconds: float
    texts: dict[int, str]
    done: int
    computed: int
    total: int


Listener = Callable[[Event], object]
"""What ``progress=`` takes."""
