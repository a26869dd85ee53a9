"""Converts what was read to the dtype that computes, on a thread of its own: meanwhile the disk goes on reading.

The thread lives for one read of many pieces (it takes a tenth of a millisecond to start): so nobody has to end it.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from airllm_nb.engine.reader import CHUNK

BUFFERS = 2  # one is read into while the other is converted
SERIAL = 32_767
"""Elements that PyTorch copies on the calling thread alone: more threads would take cores from the layer that computes."""


class Converter:
    """Buffers to read into, in turn, and the thread that empties them; for one reading thread.

    Take a `buffer`, read into it, `convert` it. Whatever happens, `finish` before what is converted to is used or reused.
    """

    def __init__(self) -> None:
        self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, device="cpu") for _ in range(BUFFERS)]
        self._turn = 0
        self._pending: deque[Future[None]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def buffer(self) -> torch.Tensor:
        """Return `CHUNK` bytes to read into, once they are converted that were in them before."""
        while len(self._pending) >= BUFFERS:
            self._pending.popleft().result()
        self._turn = (self._turn + 1) % BUFFERS
        return self._buffers[self._turn]

    def convert(self, source: torch.Tensor, into: torch.Tensor) -> None:
        """Begin to convert a flat tensor in the buffer into another one of as many elements."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="airllm_nb-convert")
        self._pending.append(self._thread.submit(convert, source, into))

    def finish(self) -> None:
        """Wait until everything is converted."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()
        while self._pending:
            self._pending.popleft().result()


def convert(source: torch.Tensor, into: torch.Tensor) -> None:
    """Convert a flat tensor into another one of as many elements, on the calling thread."""
    for begin in range(0, source.numel(), SERIAL):
        into[begin : begin + SERIAL].copy_(source[begin : begin + SERIAL])
