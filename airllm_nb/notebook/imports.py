"""Importing the engine so that the user may press stop at any moment."""

from __future__ import annotations

from airllm_nb.notebook.interrupts import interrupt_later


def import_engine() -> None:
    """Import torch, transformers and the engine; takes seconds the first time.

    A torch whose import was interrupted cannot be imported again in the same process (it raises, or crashes it), so an
    interrupt takes effect when the import is over.
    """
    with interrupt_later():
        import airllm_nb.engine.model  # noqa: F401
