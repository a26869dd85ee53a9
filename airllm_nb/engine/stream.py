"""The read-ahead window: reads the layers that stream, in the order they will compute, on a thread of its own.

The order is a hint. After the last layer comes the first one of the next token; a layer may also be skipped, repeated or called
out of order, and is then read on demand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from airllm_nb.engine.slots import Slot
from airllm_nb.errors import AirLLMError

Fill = Callable[[int, Slot], None]


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
    """

    def __init__(self, sizes: dict[int, int], slots: Sequence[Slot], fill: Fill) -> None:
        self._sizes = sizes
        self._order = list(sizes)
        self._successor = dict(zip(self._order, self._order[1:] + self._order[:1], strict=True))
        self._fill = fill
        self._free = list(slots)
        self._ready: dict[int, Slot] = {}
        self._used: dict[int, Slot] = {}
        self._reading: int | None = None
        self._wanted: int | None = None
        self._next: int | None = self._order[0]
        self._failed: dict[int, BaseException] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="airllm_nb-read-ahead", daemon=True)
        self._thread.start()

    def take(self, index: int) -> Slot:
        """Return the slot that holds a layer, waiting for it to be read.

        Raises
        ------
        AirLLMError
            If reading it failed. The next `take` tries again.
        """
        with self._changed:
            self._require_open()
            self._failed.pop(index, None)
            if index not in self._ready:
                self._wanted = index
            self._next = self._successor[index]
            self._changed.notify_all()
            while index not in self._ready:
                if index in self._failed:
                    self._wanted = self._next = None  # read nothing more until the next `take`
                    raise self._failed.pop(index)
                self._changed.wait()
                self._require_open()
            self._wanted = None
            slot = self._used[index] = self._ready.pop(index)
        slot.begin_use()
        return slot

    def give_back(self, index: int) -> None:
        """Say that the layer has computed: its slot may be filled again. Does nothing for a layer that is not out."""
        with self._changed:
            slot = self._used.pop(index, None)
            if slot is not None:
                slot.end_use()
                self._free.append(slot)
                self._changed.notify_all()

    def reset(self) -> None:
        """Take back every slot, after a pass that was interrupted or failed."""
        for index in list(self._used):
            self.give_back(index)
        with self._changed:
            self._wanted = None
            self._next = self._order[0]
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the thread and let the slots' memory go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._free.clear()
        self._ready.clear()
        self._used.clear()

    def _require_open(self) -> None:
        if self._closed:
            raise AirLLMError("The model was unloaded.", "Load it again.")

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (job := self._job()) is None:
                    self._changed.wait()
                if self._closed:
                    return
                assert job is not None
                index, slot = job
                self._free.remove(slot)
                self._reading = index
            failure: BaseException | None = None
            try:
                self._fill(index, slot)
                slot.upload()
            except BaseException as error:  # noqa: BLE001  # it is raised again where the layer is waited for
                failure = error
            with self._changed:
                self._reading = None
                if failure is None:
                    self._ready[index] = slot
                else:
                    self._free.append(slot)
                    self._failed[index] = failure
                self._changed.notify_all()

    def _job(self) -> tuple[int, Slot] | None:
        """Choose what to read now: first what is waited for, then the layers that come next."""
        wanted = self._wanted
        if wanted is not None and wanted not in self._ready and wanted not in self._failed:
            slot = self._fitting(wanted)
            while slot is None and self._ready:  # read ahead in vain: the order was not as predicted
                self._free.append(self._ready.pop(next(reversed(self._ready))))
                slot = self._fitting(wanted)
            return None if slot is None else (wanted, slot)
        index = self._next
        for _ in self._order:
            if index is None or index in self._failed or index == wanted:
                return None
            if index not in self._ready and index not in self._used:
                slot = self._fitting(index)
                return None if slot is None else (index, slot)
            index = self._successor[index]
        return None

    def _fitting(self, index: int) -> Slot | None:
        """Return the smallest free slot that a layer fits into."""
        fitting = [slot for slot in self._free if slot.nbytes >= self._sizes[index]]
        return min(fitting, key=lambda slot: slot.nbytes, default=None)

