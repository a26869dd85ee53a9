"""Waiting for what another thread reads, but not for ever: a disk may stop answering, and a forked process has no such thread.

What the computing thread reads by itself (rows of an embedding, what stays while it is loaded) it waits for as any program does.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable

from airllm_nb.errors import AirLLMError, CheckpointError

PATIENCE = 60.0
"""Seconds without an answer to a single read of a few MB after which a disk counts as gone: network drives may pause for some."""

LAST = 10.0
"""Seconds that closing a model waits for a read that is under way."""

Unanswered = Callable[[], float]
"""Tells for how many seconds the disk has left a read unanswered; 0 if none is under way."""


def wait(arrival: queue.SimpleQueue[None], unanswered: Unanswered) -> None:
    """Wait for something to be put into a queue.

    Raises
    ------
    CheckpointError
        If the disk has not answered for `PATIENCE` seconds. Whoever tries again waits again.
    """
    while not _came(arrival):
        if (seconds := unanswered()) >= PATIENCE:
            raise CheckpointError(
                f"The disk has not answered for {seconds:.0f} seconds, so the weights cannot be read.",
                "Check the disk, or the network drive, and try again.",
            )


def require_here(threads: Iterable[threading.Thread], closed: Callable[[], bool]) -> None:
    """Refuse to wait for threads that do not exist in this process. To be called before any lock: they may have held it.

    Raises
    ------
    AirLLMError
        If none of them is alive, though nobody has `closed` what they read for.
    """
    if not any(thread.is_alive() for thread in threads) and not closed():  # in this order: they end once it is closed
        raise AirLLMError(
            "This process was forked from the one that loaded the model, where the threads that read its weights stayed.",
            "Load the model in this process.",
        )


def _came(arrival: queue.SimpleQueue[None]) -> bool:
    try:
        arrival.get(timeout=min(PATIENCE, 1.0))
    except queue.Empty:
        return False
    return True
