"""Importing the engine so that the user may press stop at any moment."""

from __future__ import annotations

from airllm_nb.engine.interrupts import interrupt_later
from airllm_nb.errors import AirLLMError


def import_engine() -> None:
    """Import torch, transformers and the engine; takes seconds the first time.

    A torch whose import was interrupted cannot be imported again in the same process (it raises, or crashes it), so an
    interrupt takes effect when the import is over.

    Raises
    ------
    AirLLMError
        If a package that the engine needs is not installed.
    """
    with interrupt_later():
        try:
            import airllm_nb.engine.model  # noqa: F401
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("airllm_nb"):
                raise
            raise AirLLMError(
                f"The package {error.name} is not installed, and nothing can be computed without it.",
                f"Run  %pip install {error.name}  and restart the kernel.",
            ) from error
