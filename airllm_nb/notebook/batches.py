"""How far a map is: the batches that were answered, what a prompt takes on average, and how long the others will."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airllm_nb.events import BatchBegin, BatchEnd

SURE_AFTER = 2.0
"""Seconds before the rest is guessed from what is done."""


class Batches:
    """The batch events of one map, added up.

    Attributes
    ----------
    total, done, computed : int
        Prompts; those that have an answer, and those of them that were computed in this call.
    rows : int
        Prompts that share the present batch; 0 between two.
    """

    def __init__(self, first: BatchBegin) -> None:
        self.total = first.total
        self.done = self.computed = self.rows = 0
        self._began_at = self._ended_at = first.at
        self.begin(first)

    def begin(self, event: BatchBegin) -> None:
        """Take the begin of a batch into account."""
        self.done, self.computed, self.rows = event.done, event.computed, event.rows

    def end(self, event: BatchEnd) -> None:
        """Take the end of a batch into account."""
        self.done, self.computed, self.rows = event.done, event.computed, 0
        self._ended_at = event.at

    @property
    def seconds(self) -> float:
        """How long it has taken, up to the end of the last batch."""
        return self._ended_at - self._began_at

    @property
    def seconds_per_prompt(self) -> float:
        """Amortised: all seconds, shared among all prompts that were computed. 0.0 before the first batch is over."""
        return self.seconds / self.computed if self.computed else 0.0

    def fraction(self, of_batch: float) -> float:
        """Return how much of all is done, when so much of the present batch is."""
        return min((self.done + self.rows * of_batch) / self.total, 1.0)

    def seconds_left(self, now: float, of_batch: float) -> float | None:
        """Guess how long the others will take; None before that can be known."""
        computed = self.computed + self.rows * of_batch
        passed = now - self._began_at
        if passed < SURE_AFTER or computed <= 0:
            return None
        return passed / computed * max(self.total - self.done - self.rows * of_batch, 0.0)
