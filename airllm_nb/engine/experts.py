"""Reads the experts that are hit, when they are hit, and keeps those that are hit most often.

Which experts a layer needs is known only inside of it. Those that are in memory compute first; meanwhile the others are read, and
after them what the same experts need next. What has to make room is what was hit least often, where old hits count less and those
of the pass under way do not count yet: they would only say which layers have computed. Of several, the one that came last goes:
then of what is hit equally often (by a prompt, everything) a part stays, and is not dropped just before it is needed again.

As in `stream`, the computing thread is the one that an interrupt can hit between any two bytecodes: it waits in no
``threading.Condition``, and what it leaves half done the next visit begins anew. What is held is changed by the reading threads.
"""

from __future__ import annotations

import heapq
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from airllm_nb.engine.expert_stacks import ExpertStack
from airllm_nb.engine.patience import LAST, Unanswered, require_here, wait
from airllm_nb.engine.weights import ALIGN
from airllm_nb.errors import AirLLMError

Key = tuple[int, int]
"""A matrix: the number of its stack, and of its expert."""

THREADS = 2  # that read: a disk is at its full rate only with several requests
AHEAD = 2 * THREADS
"""How many matrices that nothing has computed with yet may have taken the place of others."""
MEMORY = 8
"""Hits for each matrix, on average, after which a hit counts half: long enough to know the popular ones, short enough to forget
those of the last conversation."""
MANY = 1e100


class ExpertStore:
    """Hands out experts' matrices, one at a time.

    Parameters
    ----------
    stacks : sequence of ExpertStack
        Where they come from.
    slots : dict of int to int
        How many matrices of each size in bytes may be in memory; at least two of each (or all).
    read : callable(stack, expert, into)
        Reads a matrix into a contiguous CPU tensor. Runs on the reading threads; what it raises is raised by `visit`.
    unanswered : callable()
        See `patience`.
    """

    def __init__(
        self,
        stacks: Sequence[ExpertStack],
        slots: dict[int, int],
        read: Callable[[ExpertStack, int, torch.Tensor], object],
        unanswered: Unanswered,
    ) -> None:
        self.stacks = stacks
        self.hits = self.misses = 0
        """Matrices that were in memory when they were hit, and those that had to be read."""
        self._read = read
        self._unanswered = unanswered
        self._unused = dict(slots)  # how many more buffers of each size may be made
        self._free: dict[int, list[torch.Tensor]] = {size: [] for size in slots}
        self._held: dict[Key, tuple[torch.Tensor, torch.Tensor]] = {}  # the buffer, and the matrix in it
        self._ranks: dict[int, list[tuple[float, int, Key]]] = {size: [] for size in slots}  # heaps of what is held: old scores
        self._arrivals = 0
        self._reading: set[Key] = set()
        self._failed: dict[Key, BaseException] = {}
        self._jobs: deque[Key] = deque()
        self._wanted: set[Key] = set()  # not to be dropped: for the visit under way, and for the next one if there is room
        self._needed: set[Key] = set()  # for the visit under way
        self._ahead: set[Key] = set()  # read for the visit under way, and not used yet
        self._scores: dict[Key, float] = {}
        self._now: set[Key] = set()  # hit in this pass
        self._last = 0  # the stack that computed last
        self._weight = 1.0  # of a hit in this pass
        self._growth = 2.0 ** (1 / (MEMORY * max(1, sum(len(stack.sources) for stack in stacks))))
        self._closed = False
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._arrival: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"airllm_nb-experts-{n}", daemon=True) for n in range(THREADS)]

    def start(self) -> None:
        """Let the threads run that read."""
        for thread in self._threads:
            thread.start()

    def visit(self, number: int, experts: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield each expert with its matrix of one stack, in whatever order they come. A matrix is valid until the next step.

        Parameters
        ----------
        number : int
            Of the stack.
        experts : sequence of int
            Each once.

        Raises
        ------
        AirLLMError
            If reading one failed, or the model was unloaded. The next visit tries again.
        """
        require_here(self._process)
        left = {(number, expert): None for expert in experts}
        self._begin(number, left)
        while left:
            with self._lock:
                if self._closed:
                    raise AirLLMError("The model was unloaded while it was computing.", "Load it again.")
                key = next((key for key in left if key in self._held or key in self._failed), None)
                arrival = self._arrival = queue.SimpleQueue()
            if key is None:
                wait(arrival, self._unanswered)
                continue
            if key in self._failed:
                raise self._failed.pop(key)
            yield key[1], self._held[key][1]
            del left[key]
            with self._lock:
                self._wanted.discard(key)
                self._needed.discard(key)
                self._ahead.discard(key)
                waiting = bool(self._jobs)
            if waiting:
                self._wake()

    def close(self) -> None:
        """Stop the threads and let the memory go."""
        with self._lock:
            self._closed = True
            self._arrival.put(None)
        self._wake()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(LAST)  # as in `stream`
        with self._lock:
            self._held.clear()
            self._free.clear()
            self._ranks.clear()

    def _begin(self, number: int, keys: dict[Key, None]) -> None:
        """Count the hits, and let what is missing be read."""
        partner = self.stacks[number].partner
        later = [] if partner is None else [(partner, expert) for _, expert in keys]
        with self._lock:
            self._failed.clear()
            if number < self._last - 1 or not self._now.isdisjoint(keys):
                self._score()
            self._last = number
            self._now.update(keys)
            new = [key for key in (*keys, *later) if key not in self._wanted]
            missing = [key for key in (*keys, *later) if key not in self._held and key not in self._reading]
            self.misses += sum(key not in self._held for key in new)
            self.hits += sum(key in self._held for key in new)
            self._wanted, self._needed, self._ahead = {*keys, *later}, set(keys), set()
            self._jobs = deque(missing)
        if missing:
            self._wake()

    def _score(self) -> None:
        """Count the hits of the pass that is over. Later ones weigh more, which is as if all earlier ones were made less."""
        for key in self._now:
            self._scores[key] = self._scores.get(key, 0.0) + self._weight
        self._weight *= self._growth ** len(self._now)
        self._now = set()
        if self._weight > MANY:
            self._scores = {key: score / self._weight for key, score in self._scores.items()}
            self._ranks = {size: [(rank / self._weight, n, key) for rank, n, key in heap] for size, heap in self._ranks.items()}
            self._weight = 1.0

    def _wake(self) -> None:
        for _ in self._threads:
            self._work.put(None)

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                job = self._job()
            if job is None:
                self._work.get()
                continue
            (number, expert), buffer = job
            stack = self.stacks[number]
            failure: BaseException | None = None
            try:
                if buffer is None:
                    buffer = torch.empty(stack.nbytes + ALIGN, dtype=torch.uint8, device="cpu")
                matrix = _matrix(buffer, stack, expert)
                self._read(stack, expert, matrix)
            except BaseException as error:  # noqa: BLE001  # it is raised again where the expert is waited for
                failure = error
            with self._lock:
                if self._closed:
                    return
                key = number, expert
                self._reading.discard(key)
                if failure is not None:
                    self._failed[key] = failure
                if buffer is None:  # there is no memory for it, now
                    self._unused[stack.nbytes] += 1
                elif failure is not None:
                    self._free[stack.nbytes].append(buffer)
                else:
                    self._held[key] = buffer, matrix
                    self._arrivals += 1
                    heapq.heappush(self._ranks[stack.nbytes], (self._scores.get(key, 0.0), -self._arrivals, key))
                self._arrival.put(None)

    def _job(self) -> tuple[Key, torch.Tensor | None] | None:
        """Choose what to read now, and into which buffer (None: a new one); None if there is nothing to read or no room."""
        if not self._jobs:
            return None
        key = self._jobs[0]
        size = self.stacks[key[0]].nbytes
        buffer = None
        if self._unused[size] and not self._free[size]:
            self._unused[size] -= 1  # made outside of the lock, and where a failure is told
        elif (buffer := self._room(size, urgent=key in self._needed)) is None:
            return None
        self._jobs.popleft()
        self._reading.add(key)
        self._ahead.add(key)
        return key, buffer

    def _room(self, size: int, *, urgent: bool) -> torch.Tensor | None:
        """Return a buffer that is free, or that of what is needed least; None if all is needed."""
        if self._free[size]:
            return self._free[size].pop()
        if len(self._ahead) >= AHEAD:
            return None
        heap, aside = self._ranks[size], []
        buffer = None
        while heap and buffer is None:
            rank, arrival, key = heapq.heappop(heap)
            if key in self._wanted:
                aside.append((rank, arrival, key))
            elif rank < (score := self._scores.get(key, 0.0)):  # it was hit since
                heapq.heappush(heap, (score, arrival, key))
            else:
                buffer = self._held.pop(key)[0]
        if buffer is None and urgent:  # what the next visit wants may fill all the room that this one needs
            for entry in aside:
                if entry[2] not in self._needed:
                    aside.remove(entry)
                    buffer = self._held.pop(entry[2])[0]
                    break
        for entry in aside:
            heapq.heappush(heap, entry)
        return buffer


def _matrix(buffer: torch.Tensor, stack: ExpertStack, expert: int) -> torch.Tensor:
    """Return one expert's matrix in a buffer that is `ALIGN` bytes larger, where in a line it belongs."""
    begin = (stack.phase_of(expert) - buffer.data_ptr()) % ALIGN
    return buffer[begin : begin + stack.nbytes].view(stack.dtype).view(stack.shape)


def matrix_like(stack: ExpertStack, expert: int) -> torch.Tensor:
    """Return memory for one expert's matrix, as it would lie in the whole stack."""
    return _matrix(torch.empty(stack.nbytes + ALIGN, dtype=torch.uint8, device="cpu"), stack, expert)
