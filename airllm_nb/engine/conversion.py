"""Converts what was read to the dtype that computes, on a thread of its own: meanwhile the disk goes on reading.

For the reading thread, which no interrupt reaches: the thread that computes must not wait for another one by these means.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

BUFFER = 8 << 20
"""Bytes of each buffer: with half of it, float32 from bfloat16 took 1.31 times as long as bfloat16; with this 1.10 to 1.23."""
BUFFERS = 2  # one is read into while the other is converted
SERIAL = 32_767
"""Elements that PyTorch copies on the calling thread alone: more threads would take cores from the layer that computes."""


class Converter:
    """Buffers to read into, in turn, and the thread that empties them; for one reading thread.

    Within `converting`, take a `buffer`, read into it, `convert` it.
    """

    def __init__(self) -> None:
        self._buffers = [torch.empty(BUFFER, dtype=torch.uint8, device="cpu") for _ in range(BUFFERS)]
        self._turn = 0
        self._pending: deque[Future[None]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    @contextlib.contextmanager
    def converting(self) -> Iterator[None]:
        """At the end, whatever happens, wait for what is being converted; raise what went wrong first."""
        try:
            yield
        finally:
            # The thread lives only as long: it starts in a tenth of a millisecond, and so nobody has to end it.
            thread, self._thread = self._thread, None
            if thread is not None:
                thread.shutdown()
            done, self._pending = self._pending, deque()
        for future in done:
            future.result()

    def buffer(self) -> torch.Tensor:
        """Return `BUFFER` bytes to read into, once they are converted that were in them before."""
        while len(self._pending) >= BUFFERS:
            self._pending.popleft().result()
        self._turn = (self._turn + 1) % BUFFERS
        return self._buffers[self._turn]

    def convert(self, source: torch.Tensor, into: torch.Tensor) -> None:
        """Begin to convert a flat tensor in the buffer into another one of as many elements."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="airllm_nb-convert")
        self._pending.append(self._thread.submit(convert, source, into))


class Unaided:
    """As a `Converter`, but without a thread, and with memory only for one buffer, which goes with it."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def buffer(self) -> torch.Tensor:
        """Return `BUFFER` bytes to read into."""
        if self._buffer is None:
            self._buffer = torch.empty(BUFFER, dtype=torch.uint8, device="cpu")
        return self._buffer

    def convert(self, source: torch.Tensor, into: torch.Tensor) -> None:
        """Convert a flat tensor in the buffer into another one of as many elements."""
        convert(source, into)


def convert(source: torch.Tensor, into: torch.Tensor) -> None:
    """Convert a flat tensor into another one of as many elements, on the calling thread."""
    for begin in range(0, source.numel(), SERIAL):
        into[begin : begin + SERIAL].copy_(source[begin : begin + SERIAL])
