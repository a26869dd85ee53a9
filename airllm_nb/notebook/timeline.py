"""When what happened in a run: its first passes layer by layer, the later ones in stretches; small however long it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airllm_nb.events import ComputeBegin, ComputeEnd, Event, LayerReady, PassBegin, PassEnd

if TYPE_CHECKING:
    from collections.abc import Callable

DETAILED_PASSES = 8
DETAILED_LAYERS = 640
"""So many passes are kept layer by layer, and no more of them once they hold so many layers: 8 of 30 layers, 6 of 126."""

STRETCHES = 8
"""So many stretches take all other passes: when there are more, neighbours become one, and new ones are twice as long."""

NOTICEABLE = 1e-4
"""Seconds: a shorter wait is no wait but the clock being read twice."""

Span = tuple[int, float, float]
"""A layer, and when something with it began and ended: seconds since the first pass began."""


@dataclass(frozen=True)
class Pass:
    """One pass, layer by layer.

    Attributes
    ----------
    begin, end : float
        Seconds since the first pass began.
    completed : bool
        False if it was stopped before its end, and gave no token.
    waited, computed : tuple of Span
        When the computation stood still for a layer's weights, and when a layer computed.
    """

    begin: float
    end: float
    completed: bool
    waited: tuple[Span, ...]
    computed: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


@dataclass(frozen=True)
class Stretch:
    """Passes that followed each other, added up.

    Attributes
    ----------
    passes : int
        How many.
    seconds, read_seconds, waited_seconds, compute_seconds : float
        Of all of them together.
    """

    passes: int = 0
    seconds: float = 0.0
    read_seconds: float = 0.0
    waited_seconds: float = 0.0
    compute_seconds: float = 0.0

    def __add__(self, other: Stretch) -> Stretch:
        return Stretch(
            self.passes + other.passes,
            self.seconds + other.seconds,
            self.read_seconds + other.read_seconds,
            self.waited_seconds + other.waited_seconds,
            self.compute_seconds + other.compute_seconds,
        )


@dataclass(frozen=True)
class Timeline:
    """When what happened in a run.

    Attributes
    ----------
    passes : tuple of Pass
        The first ones (the prompt's and some tokens'): at most `DETAILED_PASSES`, and none after `DETAILED_LAYERS` layers.
    read : tuple of Span
        What was read until the last of them was over; reading goes on between passes, and ahead of them.
    later : tuple of Stretch
        All other passes that were completed, at most `STRETCHES`.
    """

    passes: tuple[Pass, ...] = ()
    read: tuple[Span, ...] = ()
    later: tuple[Stretch, ...] = ()


class Recorder:
    """Takes the engine's events of one run, and has its `Timeline`. An event costs less than a microsecond."""

    def __init__(self) -> None:
        self._passes: list[Pass] = []
        self._read: list[Span] = []
        self._later: list[Stretch] = []
        self._length = 1  # of a stretch
        self._origin: float | None = None  # when the first pass began
        self._pass_at = self._ended_at = 0.0
        self._pause = 0.0  # how long nothing happened, in between
        self._resumes = False
        self._detail = True
        self._until = float("inf")  # what is read from then on is not kept
        self._waited: list[Span] = []  # in the present pass
        self._computed: list[Span] = []
        self._sums = [0.0, 0.0, 0.0]
        self._take: dict[type[Event], Callable[[Any], None]] = {
            PassBegin: self._pass_begin,
            PassEnd: self._pass_end,
            LayerReady: self._layer_ready,
            ComputeBegin: self._compute_begin,
            ComputeEnd: self._compute_end,
        }

    def apply(self, event: Event) -> None:
        """Take one event into account."""
        take = self._take.get(type(event))
        if take is not None:
            take(event)

    def resume(self) -> None:
        """Take the next pass for one that follows the last one at once: a run that was stopped goes on."""
        self._resumes = self._origin is not None

    def timeline(self) -> Timeline:
        """Return what happened so far."""
        start = self._origin or 0.0

        def since(spans: tuple[Span, ...] | list[Span]) -> tuple[Span, ...]:
            return tuple((layer, begin - start, end - start) for layer, begin, end in spans)

        return Timeline(
            tuple(
                Pass(one.begin - start, one.end - start, one.completed, since(one.waited), since(one.computed))
                for one in self._passes
            ),
            since(self._read),
            tuple(self._later),
        )

    def _pass_begin(self, event: PassBegin) -> None:
        if self._resumes:
            self._resumes = False
            self._pause = event.at - self._ended_at
        at = event.at - self._pause
        if self._origin is None:
            self._origin = at
        self._pass_at = at
        layers = sum(len(one.computed) for one in self._passes) if self._detail else 0
        self._detail = self._detail and len(self._passes) < DETAILED_PASSES and layers < DETAILED_LAYERS
        if not self._detail:
            self._until = min(self._until, at)
        self._waited, self._computed, self._sums = [], [], [0.0, 0.0, 0.0]

    def _pass_end(self, event: PassEnd) -> None:
        self._ended_at = at = event.at - self._pause
        if self._detail:
            self._passes.append(Pass(self._pass_at, at, event.completed, tuple(self._waited), tuple(self._computed)))
        if self._detail or not event.completed:
            return
        one = Stretch(1, at - self._pass_at, *self._sums)
        if self._later and self._later[-1].passes < self._length:
            self._later[-1] += one
            return
        if len(self._later) == STRETCHES:
            self._later = [first + second for first, second in zip(self._later[::2], self._later[1::2], strict=True)]
            self._length *= 2
        self._later.append(one)

    def _layer_ready(self, event: LayerReady) -> None:
        span = self._span(event.index, event.at, event.seconds)
        if span[1] < self._until:
            self._read.append(span)
        self._sums[0] += event.seconds

    def _compute_begin(self, event: ComputeBegin) -> None:
        self._sums[1] += event.waited
        if self._detail and event.waited > NOTICEABLE:
            self._waited.append(self._span(event.index, event.at, event.waited))

    def _compute_end(self, event: ComputeEnd) -> None:
        self._sums[2] += event.seconds
        if self._detail:
            self._computed.append(self._span(event.index, event.at, event.seconds))

    def _span(self, layer: int, at: float, seconds: float) -> Span:
        return layer, at - self._pause - seconds, at - self._pause
