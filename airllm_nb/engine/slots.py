"""Buffers that streamed layers are read into and computed from, in turn.

On the CPU a slot is plain memory. On CUDA it is GPU memory beside a pinned host buffer: the copy runs on a stream of its own, and
events order it against the computation, so that copying overlaps computing. Nothing of CUDA is touched for any other device.
"""

from __future__ import annotations

import torch


class Slot:
    """A recycled buffer on the CPU: a layer is read right into the memory that it computes from.

    The life of a slot is fill `host` -> `upload` (both on the reading thread) -> `begin_use` -> compute from `buffer` ->
    `end_use` (on the computing thread), and again.

    Parameters
    ----------
    nbytes : int
        Its size.
    buffer : torch.Tensor, optional
        Memory of that size to use; new memory otherwise.
    """

    def __init__(self, nbytes: int, buffer: torch.Tensor | None = None) -> None:
        self.nbytes = nbytes
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu") if buffer is None else buffer
        self.host = self.buffer

    def upload(self) -> None:
        """Bring what `host` holds into `buffer`."""

    def begin_use(self) -> None:
        """Make the computation that follows wait for the upload."""

    def end_use(self) -> None:
        """Make the next upload wait for the computation so far."""


class BlockingSlot(Slot):
    """For accelerators without a path of their own here (MPS, XPU): a host buffer and a plain copy."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        super().__init__(nbytes)
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def upload(self) -> None:
        """Copy and wait."""
        self.buffer.copy_(self.host)

    def end_use(self) -> None:
        """Wait for the computation: `upload` knows no order against it."""
        getattr(torch, self.buffer.device.type).synchronize()


class CudaSlot(Slot):
    """GPU memory, a pinned host buffer, and the events that order their use."""

    def __init__(self, nbytes: int, device: torch.device, stream: torch.cuda.Stream) -> None:
        self.nbytes = nbytes
        self.device = device
        self.stream = stream
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.host = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._consumed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # The buffer's memory may still be in use by kernels that were queued before it was allocated.
        self.end_use()

    def upload(self) -> None:
        """Copy on the copy stream once the last user of the buffer is done; return when `host` may be filled again."""
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self._consumed)
            self.buffer.copy_(self.host, non_blocking=True)
            self._copied.record(self.stream)
        self._copied.synchronize()  # blocks only the reading thread; the slot is handed over complete

    def begin_use(self) -> None:
        """Order the current stream after the copy."""
        torch.cuda.current_stream(self.device).wait_event(self._copied)

    def end_use(self) -> None:
        """Mark where the current stream has finished with the buffer."""
        self._consumed.record(torch.cuda.current_stream(self.device))


def make_slots(sizes: list[int], device: torch.device) -> list[Slot]:
    """Return a slot of each size in bytes for a device."""
    if device.type == "cpu":
        return [Slot(size) for size in sizes]
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return [CudaSlot(size, device, stream) for size in sizes]
    return [BlockingSlot(size, device) for size in sizes]
