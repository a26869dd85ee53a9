"""Work that a click starts: on a thread of its own, so that the kernel stays free and Stop can be pressed."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

RESTS = 0.25
"""Seconds for which nothing must change before what was asked last is worked on: a slider that moves asks again and again."""


def threads_show() -> bool:
    """Tell whether what a thread changes is shown while it works. Colab shows it only when the kernel is idle again."""
    return "google.colab" not in sys.modules


def run(work: Callable[[], object]) -> None:
    """Do some work on a thread of its own; where that would show nothing, here and now."""
    if threads_show():
        threading.Thread(target=work, name="airllm_nb-panel", daemon=True).start()
    else:
        work()


class Latest:
    """Does some work after every change, but only for the last one of those that follow each other quickly.

    Parameters
    ----------
    work : callable(is_latest)
        Is told how to ask whether it still is wanted. Never runs twice at the same time.
    """

    def __init__(self, work: Callable[[Callable[[], bool]], object]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._asked = 0
        self._timer: threading.Timer | None = None

    def ask(self) -> None:
        """Have the work done, soon."""
        self._asked += 1
        number = self._asked
        if not threads_show():
            self._work(lambda: True)
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(RESTS, self._run, [number])
        self._timer.name = "airllm_nb-plan"
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """Do nothing more."""
        self._asked += 1
        if self._timer is not None:
            self._timer.cancel()

    def _run(self, number: int) -> None:
        with self._lock:
            if number == self._asked:
                self._work(lambda: number == self._asked)
