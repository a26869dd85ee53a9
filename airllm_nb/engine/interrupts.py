"""Holding back the interrupt where it would do harm."""

from __future__ import annotations

import contextlib
import logging
import signal
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


def free_logging() -> None:
    """Give back the lock of Python's logging, if this thread has it: to be called after an interrupt, outside of all logging.

    Before Python 3.13 an interrupt between taking and giving it leaves it with the thread for ever, and all others that log wait.
    """
    lock: Any = getattr(logging, "_lock", None)
    while lock is not None and lock._is_owned():  # noqa: SLF001  # logging has no other name for it
        lock.release()
