"""The read-ahead window: reads the layers that stream, in the order they will compute, on a thread of its own.

The order is a guess: at first that of the model's own lists, and after the last layer the first one of the next token; then
whatever came after each layer the last time (a picture's layers do not compute for a text). A wrong guess is read on demand.

The computing thread is the one that an interrupt can hit between any two bytecodes. It therefore never waits in a
``threading.Condition`` (an interrupt in its ``wait`` can lose the lock), every change of state is a single assignment, and locks
are plain ones, which ``with`` takes and releases in one step.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Literal

from airllm_nb.engine import threads
from airllm_nb.engine.patience import LAST, Unanswered, require_here, wait
from airllm_nb.engine.slots import Slot
from airllm_nb.errors import AirLLMError

State = tuple[Literal["free", "reading", "ready", "used"], int]
"""What a slot is doing, and with which layer."""

FREE: State = ("free", -1)


class WeightStream:
    """Hands out streamed layers, reading ahead into the slots that are free.

    Parameters
    ----------
    sizes : dict of int to int
        Bytes of each layer that streams, by its index, in the order of computation.
    slots : sequence of Slot
        At least two, or one if a single layer streams; every layer fits into at least one of them.
    fill : callable(index, slot)
        Reads a layer into a slot. Runs on the reading thread; what it raises is raised by `take`.
    unanswered : callable()
        See `patience`.
    """

    def __init__(
        self, sizes: dict[int, int], slots: Sequence[Slot], fill: Callable[[int, Slot], None], unanswered: Unanswered
    ) -> None:
        self._sizes = sizes
        self._order = list(sizes)
        self._successor = _ring(self._order)
        self._fill = fill
        self._unanswered = unanswered
        self._slots = list(slots)
        self._states: list[State] = [FREE] * len(slots)
        self._last: int | None = None  # what was taken last
        self._taker: int | None = None  # by which thread
        self._wanted: int | None = None  # what the computation waits for
        self._next: int | None = self._order[0]  # where reading ahead goes on; None: nowhere, until the next `take`
        self._behind = 0  # how many more layers had to be waited for than not, about
        self._failed: tuple[int, BaseException] | None = None
        self._closed = False
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[None] = queue.SimpleQueue()  # wakes the reading thread
        self._arrival: queue.SimpleQueue[None] = queue.SimpleQueue()  # wakes the computing thread
        self._thread = threading.Thread(target=self._run, name="airllm_nb-read-ahead", daemon=True)

    def start(self) -> None:
        """Begin to read ahead. Apart from making it, so that an interrupt cannot lose a stream whose thread runs."""
        self._thread.start()

    @property
    def in_use(self) -> bool:
        """Whether a layer is out: between passes, one that an aborted pass has left."""
        return any(state == "used" for state, _ in self._states)

    @property
    def layers(self) -> frozenset[int]:
        """The layers that it can hand out."""
        return frozenset(self._successor)

    @property
    def slots(self) -> int:
        """How many slots there are."""
        return len(self._slots)

    def add(self, sizes: dict[int, int], slots: Sequence[Slot]) -> None:
        """Let more layers stream, and more slots be filled. Layers are known last: should an interrupt hit, add what is left."""
        with self._lock:
            self._sizes = dict(sorted((self._sizes | sizes).items()))
            self._states += [FREE] * (len(self._slots) + len(slots) - len(self._states))
            self._slots += slots
            self._order = list(self._sizes)
            self._successor = _ring(self._order)
        self._work.put(None)

    def take(self, index: int) -> Slot:
        """Return the slot that holds a layer, waiting for it to be read.

        Raises
        ------
        AirLLMError
            If reading it failed, or takes for ever, or this thread holds all slots: one that a layer calls within itself, such
            as by a function given to ``on_layer``. The next `take` tries again.
        """
        require_here(self._process)
        with self._lock:
            self._failed = None
            self._wanted = index
            if self._last is not None:
                self._successor[self._last] = index
            self._last = index
            self._next = self._successor[index]
            waits = self._slot_of("ready", index) is None
            self._behind = max(self._behind + (1 if waits else -1), 0)
        self._work.put(None)
        while True:
            with self._lock:
                if self._closed:
                    raise AirLLMError("The model was unloaded while it was computing.", "Load it again.")
                if self._failed is not None and self._failed[0] == index:
                    self._wanted = self._next = None
                    raise self._failed[1]
                number = self._slot_of("ready", index)
                if number is not None:
                    self._taker = threading.get_ident()
                    self._states[number] = ("used", index)
                    self._wanted = None
                    break
                if self._taker == threading.get_ident() and not self._may_hold(index):
                    self._wanted = self._next = None
                    raise AirLLMError(
                        "The model was called within itself too often: no memory is left to read a layer into.",
                        "Call it at most once within a function given to on_layer, or load it with a larger memory=.",
                    )
                arrival = self._arrival = queue.SimpleQueue()
            wait(arrival, self._unanswered)
        self._slots[number].begin_use()
        return self._slots[number]

    def give_back(self, index: int) -> None:
        """Say that the layer has computed: its slot may be filled again. Does nothing for a layer that is not out."""
        with self._lock:
            number = self._slot_of("used", index)
            if number is None:
                return
            self._slots[number].end_use()
            self._states[number] = FREE
        self._work.put(None)

    def reset(self) -> None:
        """Take back every slot, after a pass that was interrupted or failed."""
        for state, index in list(self._states):
            if state == "used":
                self.give_back(index)
        with self._lock:
            self._wanted = self._last = None
            if self._failed is None:
                self._next = self._order[0]
        self._work.put(None)

    def close(self) -> None:
        """Stop the thread and let the slots' memory go."""
        with self._lock:
            self._closed = True
            self._arrival.put(None)
        self._work.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(LAST)  # a disk that does not answer holds it, for longer than anybody should wait
        with self._lock:
            self._slots.clear()
            self._states.clear()

    def _run(self) -> None:
        rested = False
        while True:
            if not rested and self._behind > len(self._order):  # reading takes longer than computing: it needs a core, too
                rested = True
                threads.rest_sooner()
            with self._lock:
                if self._closed:
                    return
                job = self._job()
                if job is not None:
                    index, number = job
                    self._states[number] = ("reading", index)
                    slot = self._slots[number]
            if job is None:
                self._work.get()
                continue
            failure: BaseException | None = None
            try:
                self._fill(index, slot)
                slot.upload()
            except BaseException as error:  # noqa: BLE001  # it is raised again where the layer is waited for
                failure = error
            with self._lock:
                if self._closed:  # perhaps by a listener on this very thread
                    return
                self._states[number] = ("ready", index) if failure is None else FREE
                if failure is not None:
                    self._failed = (index, failure)
                self._arrival.put(None)

    def _job(self) -> tuple[int, int] | None:
        """Choose which layer to read now and into which slot: first what is waited for, then the layers that come next."""
        wanted = self._wanted
        if self._failed is not None and wanted in (None, self._failed[0]):  # wait for the next `take`, which tries again
            return None
        if wanted is not None and self._slot_of("ready", wanted) is None:
            number = self._fitting(wanted)
            while number is None and (ready := [n for n, (state, _) in enumerate(self._states) if state == "ready"]):
                self._states[ready[0]] = FREE  # read ahead in vain: the order was not as predicted
                number = self._fitting(wanted)
            return None if number is None else (wanted, number)
        upcoming = self._upcoming()
        for number, (state, index) in enumerate(self._states):
            if state == "ready" and upcoming and index not in (wanted, *upcoming):
                self._states[number] = FREE
        held = {index for state, index in self._states if state != "free"}
        following = next((index for index in upcoming if index not in held), None)
        free = None if following is None else self._fitting(following)
        return None if following is None or free is None else (following, free)

    def _upcoming(self) -> list[int]:
        """Return the layers that come next, as far as guessed, no more than there are slots."""
        layers: list[int] = []
        index = self._next
        while index is not None and index not in layers and len(layers) < len(self._slots):
            layers.append(index)
            index = self._successor[index]
        return layers

    def _slot_of(self, state: str, index: int) -> int | None:
        return next((number for number, held in enumerate(self._states) if held == (state, index)), None)

    def _may_hold(self, index: int) -> bool:
        """Tell whether a slot that a layer fits into is free, or will be without the computing thread's doing."""
        states = zip(self._slots, self._states, strict=True)
        return any(state != "used" and slot.nbytes >= self._sizes[index] for slot, (state, _) in states)

    def _fitting(self, index: int) -> int | None:
        """Return the smallest free slot that a layer fits into."""
        free = [
            number
            for number, slot in enumerate(self._slots)
            if self._states[number] == FREE and slot.nbytes >= self._sizes[index]
        ]
        return min(free, key=lambda number: self._slots[number].nbytes, default=None)


def _ring(order: list[int]) -> dict[int, int]:
    """Return what comes after each layer; after the last one the first one of the next token."""
    return dict(zip(order, order[1:] + order[:1], strict=True))
