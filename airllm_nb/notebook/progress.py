"""Who listens to a run, and when it is drawn: one listener collects events, and has what they add up to drawn now and then."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Protocol

from airllm_nb.events import ComputeBegin, ComputeEnd, Event, Fetching, LayerRead, LayerReady, LoadBegin, PassBegin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airllm_nb import LayeredModel
    from airllm_nb.events import Listener
    from airllm_nb.notebook.run_state import Ended, RunState
    from airllm_nb.notebook.summary import LayerTotals

DRAW_INTERVAL = 1 / 4
BURST = 3
"""Least seconds between draws in the long run, and how many may follow each other at once: at most 7 in any second.

The burst keeps the picture true when layers are slow: the end of one and the begin of the next are drawn both.
"""

DRAW_SHARE = 1 / 500
RECENT_DRAWS = 5
"""Largest share of the time that drawing may take of its thread, by the quickest of so many draws.

As much again, or twice, goes to the thread that sends the message and to the server that passes it on: within 1% of the run.
"""

STOPPABLE = frozenset((Fetching, LoadBegin, LayerRead, LayerReady, PassBegin, ComputeBegin, ComputeEnd))
"""Events at which a run may be interrupted: not those that say that something is over, which come while it is put in order."""


class Renderer(Protocol):
    """Draws a `RunState`; is called on the thread that runs the cell, and nowhere else."""

    def draw(self, state: RunState) -> None:
        """Show the state as it is now."""

    def before_text(self) -> None:
        """Make room: text is about to be written below."""

    def close(self) -> None:
        """Take the drawing away."""


class Progress:
    """The listener: takes events from any thread, draws up to 4 times a second on the thread it was made on.

    Parameters
    ----------
    state : RunState
        What the events are added to.
    renderer : Renderer
        What draws it.
    stop : threading.Event, optional
        Once it is set, by any thread, the run is interrupted before the next layer computes.
    """

    def __init__(self, state: RunState, renderer: Renderer, stop: threading.Event | None = None) -> None:
        self._state = state
        self._stop = stop
        self._renderer = renderer
        self._lock = threading.Lock()
        self._events: collections.deque[Event] = collections.deque()  # not added up yet
        self._thread = threading.get_ident()
        self._scheduled = 0.0  # when the next draw would come if they were evenly spaced
        self._costs: collections.deque[float] = collections.deque(maxlen=RECENT_DRAWS)
        renderer.draw(state)

    def __call__(self, event: Event) -> None:
        """Take one event; draw if it is time and this is the thread that may."""
        self._events.append(event)
        if threading.get_ident() != self._thread:
            return
        if self._stop is not None and self._stop.is_set() and type(event) in STOPPABLE:
            raise KeyboardInterrupt
        if event.at < self._scheduled - (BURST - 1) * DRAW_INTERVAL:
            return
        began = time.perf_counter()
        state = self.state
        if type(event) is ComputeEnd and not state.waits:
            return  # a layer's end is worth a picture if nothing follows at once
        self._renderer.draw(state)
        self._costs.append(time.perf_counter() - began)
        # The first ones are slower than those that follow, and a load may be over before the next.
        share = min(self._costs) / DRAW_SHARE if len(self._costs) == RECENT_DRAWS else 0.0
        self._scheduled = max(self._scheduled, event.at) + max(DRAW_INTERVAL, share)

    @property
    def state(self) -> RunState:
        """What all events so far add up to.

        They are added up when somebody looks: between two layers' weights nothing of that is in the processor's cache, and an
        event takes 22 us, but 3 us together with others.
        """
        with self._lock:
            while self._events:
                self._state.apply(self._events.popleft())
        return self._state

    def before_text(self) -> None:
        """Make room: text is about to be written below."""
        self._renderer.before_text()

    def finish(self, ended: Ended) -> None:
        """Draw the last state: it is always drawn."""
        state = self.state
        state.end(ended)
        self._renderer.draw(state)
        if not state.layers:  # it failed before there was anything to show
            self._renderer.close()

    def totals(self) -> tuple[LayerTotals, ...]:
        """Return what each layer has done so far."""
        return tuple(layer.totals() for layer in self.state.layers)


@contextlib.contextmanager
def drawn(state: RunState, renderer: Renderer, stop: threading.Event | None = None) -> Iterator[Progress]:
    """Give the listener of one run, and draw at its end how that was."""
    progress = Progress(state, renderer, stop)
    ended: Ended = "failed"
    try:
        yield progress
        ended = "done"
    except KeyboardInterrupt:
        ended = "interrupted"
        raise
    finally:
        progress.finish(ended)


def listener_of_user(model: LayeredModel) -> Listener | None:
    """Return whom the user has put there to be told of events: one of ours is there only if an interrupt has left it behind."""
    listener = model.progress
    ours = str(getattr(listener, "__module__", None)).startswith(f"{__package__}.")
    return None if ours else listener


@contextlib.contextmanager
def listening(model: LayeredModel, listener: Listener) -> Iterator[None]:
    """Let one of ours be told of events for a while, in place of the user's own."""
    before = listener_of_user(model)
    try:
        model.progress = listener
        yield
    finally:
        model.progress = before
