"""What a process holds: threads of ours, file descriptors, memory. For tests that it is the same afterwards as before."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from waiting import wait_for

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in /proc")
SLACK = 8 << 20
"""Bytes that caches of Python and of PyTorch may grow by."""
BLOCK = 64
"""Bytes of a small object of Python's, about: those lie in memory of its own, unless PYTHONMALLOC is malloc."""


@dataclass(frozen=True)
class Held:
    """Names of threads, the number of file descriptors, bytes of memory that somebody has asked for and not given back.

    What the system counts (RSS) is no measure of that: it moves by 10 to 40 MB with what happens to lie at the end of each of the
    C library's arenas, of which every thread has one.
    """

    threads: tuple[str, ...]
    descriptors: int
    memory: int

    @classmethod
    def now(cls) -> Held:
        """Count, after everything that can be freed is freed."""
        for name in ("last_value", "last_traceback", "last_exc"):  # the last error that IPython showed, and what its frames hold
            vars(sys).pop(name, None)
        gc.collect()
        names = tuple(sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("airllm_nb")))
        return cls(names, sum(1 for _ in Path("/proc/self/fd").iterdir()), in_use())


class _Mallinfo2(ctypes.Structure):
    """What the C library says of all its arenas (glibc from 2.33 on): of those in use, `uordblks` bytes, and `hblkhd` mapped."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def in_use() -> int:
    """Return the bytes of this process that are allocated: by C in small and in large pieces, and by Python."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd + BLOCK * sys.getallocatedblocks()


def assert_same(before: Held) -> None:
    """Wait until there are no more threads and descriptors than before, and look at the memory."""

    def none_is_left() -> bool:
        now = Held.now()
        return len(now.threads) <= len(before.threads) and now.descriptors <= before.descriptors

    try:
        wait_for(none_is_left, 5)  # a thread that reads ahead has one more at times
    except AssertionError:
        raise AssertionError(f"{Held.now()} after {before}") from None
    grown = Held.now().memory - before.memory
    assert grown < SLACK, f"{grown / 1e6:.1f} MB more"
