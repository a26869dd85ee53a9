"""Finds the decoder layers of a transformers model: the modules whose weights may come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from airllm_nb.errors import UnsupportedError


def find(model: Any) -> dict[str, nn.Module]:
    """Return the decoder layers of a transformers model by module path, in the order of computation.

    They are what transformers itself never splits between devices (``_no_split_modules``) and counts with numbers. Where a model
    does not say, they are the members of its lists of composite modules: a list of norms or of embeddings is none.

    Raises
    ------
    UnsupportedError
        If there are none.
    """
    classes = set(getattr(model, "_no_split_modules", None) or ())
    layers = _outermost(model, lambda module, _: type(module).__name__ in classes) or _outermost(model, _in_list)
    if not layers:
        raise UnsupportedError(
            f"{type(model).__name__} has no decoder layers that could be read one by one.", "Load it with transformers itself."
        )
    return layers


def _outermost(model: nn.Module, is_layer: Callable[[nn.Module, nn.Module], bool]) -> dict[str, nn.Module]:
    """Return the numbered modules that `is_layer` accepts, seen with their parents, and that lie in no other such module."""
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        inside = any(path.startswith(f"{outer}.") for outer in layers)
        if name.isdigit() and not inside and is_layer(module, model.get_submodule(parent)):
            layers[path] = module
    return layers


def _in_list(module: nn.Module, parent: nn.Module) -> bool:
    same = isinstance(parent, nn.ModuleList) and all(type(other) is type(module) for other in parent)
    return same and any(True for _ in module.children()) and any(True for _ in module.parameters())
