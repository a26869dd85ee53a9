"""Holding back the interrupt where it would do harm."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def interrupt_later() -> Iterator[None]:
    """Let an interrupt take effect at the end of a block."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is ever interrupted
        yield
        return
    came = False

    def remember(*_: Any) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def free_locks() -> None:
    """Give back the locks of Python's logging and of tqdm that this thread has: to be called after an interrupt, outside of both.

    An interrupt between taking and giving one (logging's before Python 3.13) leaves it with the thread for ever, and all others
    that log, or draw a bar, wait.
    """
    tqdm: Any = sys.modules.get("tqdm")
    both = getattr(getattr(getattr(tqdm, "tqdm", None), "_lock", None), "locks", ())  # a thread's, and one of all processes
    lock: Any
    for lock in (getattr(logging, "_lock", None), *both):
        owned = getattr(lock, "_is_owned", None) or getattr(getattr(lock, "_semlock", None), "_is_mine", None)
        while owned is not None and owned():
            lock.release()
