"""Importing the engine so that the user may press stop at any moment."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def import_engine() -> None:
    """Import torch, transformers and the engine; takes seconds the first time.

    A torch whose import was interrupted cannot be imported again in the same process (it raises, or crashes it), so an
    interrupt takes effect when the import is over.
    """
    with _interrupt_later():
        import airllm_nb.engine.model  # noqa: F401


@contextlib.contextmanager
def _interrupt_later() -> Iterator[None]:
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
