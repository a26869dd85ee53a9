"""Language models, layer by layer, in a notebook: ``%load_ext airllm_nb``.

Importing this package imports neither torch nor transformers; the first use of `LayeredModel` or `plan` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from airllm_nb.engine.model import LayeredModel
    from airllm_nb.engine.planning import plan

__version__ = "0.1.0"
__all__ = ["LayeredModel", "__version__", "load_ipython_extension", "plan", "unload_ipython_extension"]


def __getattr__(name: str) -> Any:
    """Import the engine on first use (PEP 562)."""
    if name in ("LayeredModel", "plan"):
        from airllm_nb.engine import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the ``%airllm`` magics: what ``%load_ext airllm_nb`` calls."""
    from airllm_nb.notebook import magics

    magics.load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Free the model and remove the magics: what ``%unload_ext airllm_nb`` calls."""
    from airllm_nb.notebook import magics

    magics.unload(shell)
