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

from airllm_nb.bench.machine import anonymous

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in /proc")
SLACK = 16 << 20
"""Bytes that caches of Python and of PyTorch may grow by."""


@dataclass(frozen=True)
class Held:
    """Names of threads, the number of file descriptors, bytes of memory."""

    threads: tuple[str, ...]
    descriptors: int
    memory: int

    @classmethod
    def now(cls) -> Held:
        """Count, after everything that can be freed is freed."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        names = tuple(sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("airllm_nb")))
        return cls(names, sum(1 for _ in Path("/proc/self/fd").iterdir()), anonymous())


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
    assert grown < SLACK, f"{grown / 1e6:.0f} MB more"
