"""Waiting for what another thread reads, but not for ever: a disk may stop answering, and a forked process has no such thread.

What the computing thread reads by itself (rows of an embedding, what stays while it is loaded) it waits for as any program does.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable

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


def require_here(process: int) -> None:
    """Refuse to wait for threads that do not exist in this process. To be called before any lock: they may have held it.

    The threads themselves are not asked: before Python 3.13 an interrupt within ``Thread.is_alive`` makes it take a thread that
    runs for one that has ended, for ever.

    Parameters
    ----------
    process : int
        The one where they run.

    Raises
    ------
    AirLLMError
        If this is another one.
    """
    if os.getpid() != process:
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
