"""Who has the model: one thread at a time, which others may stop, and who watches."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Protocol

from airllm_nb.engine.interrupts import free_locks
from airllm_nb.errors import AirLLMError

PAUSE = 0.01


class SessionError(AirLLMError):
    """No model is loaded, or the one that is loaded is busy."""


class Watcher(Protocol):
    """Who wants to know when something about the session has changed."""

    def refresh(self) -> None:
        """Look at the session again."""

    def close(self) -> None:
        """Go away: the session is not used any more."""


class OneAtATime:
    """Lets one thread at a time have the model.

    Attributes
    ----------
    stop : threading.Event
        Once it is set, by any thread, what is under way ends before its next layer.
    watchers : set of Watcher
        Told when somebody has come or gone; does not keep them.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
        self._guard = threading.Lock()
        self._owner: int | None = None

    @property
    def busy(self) -> bool:
        """Whether a thread has it."""
        return self._owner is not None

    def enter(self) -> None:
        """Take it.

        Raises
        ------
        SessionError
            If another thread has it. A thread does one thing at a time: should an interrupt have kept it from leaving, it is let
            in again.
        """
        me = threading.get_ident()
        with self._guard:
            if self._owner not in {None, me}:
                raise SessionError("The model is busy with another run.", "Wait until it ends, or stop it.")
            self._owner = me
            self.stop.clear()
        self._tell()

    def leave(self) -> None:
        """Give it back; nothing happens if this thread does not have it."""
        free_locks()
        if self._owner == threading.get_ident():
            self._owner = None
            self._tell()

    def end(self) -> None:
        """Close whoever watches, stop what is under way on another thread, and wait for it."""
        for watcher in list(self.watchers):
            watcher.close()
        while self._owner not in {None, threading.get_ident()}:
            self.stop.set()  # again and again: what has just begun takes a stop for one of what was before
            time.sleep(PAUSE)

    def _tell(self) -> None:
        for watcher in list(self.watchers):
            watcher.refresh()
