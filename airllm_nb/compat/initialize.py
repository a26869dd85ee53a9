"""What ``from_pretrained`` computes beside what it reads: version 5 initialises a loaded model once more, version 4 does not."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from airllm_nb.compat import versions


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """Build models without initialising their parameters, as version 4's ``from_pretrained`` does; for this thread alone."""
    from transformers import PreTrainedModel

    initialise, builder = PreTrainedModel.init_weights, threading.get_ident()

    def only_tie(model: Any) -> None:
        if threading.get_ident() == builder:
            model.tie_weights()
        else:
            initialise(model)

    if versions.installed() < (5,):
        PreTrainedModel.init_weights = only_tie
    try:
        yield
    finally:
        PreTrainedModel.init_weights = initialise


def compute_buffers(model: Any) -> None:
    """Compute temporary buffers as transformers 5's ``from_pretrained`` does: in their own dtype, not in the model's."""
    if versions.installed() >= (5,):
        with torch.no_grad():
            for owner, module in _initialized(model):
                if module._non_persistent_buffers_set:  # noqa: SLF001
                    owner._init_weights(module)  # noqa: SLF001


def rewrite_buffers(model: Any) -> None:
    """Change loaded buffers as transformers 5's ``from_pretrained`` does.

    It initialises modules whose tensors it has loaded, and trusts a mark on each tensor to keep what came from the checkpoint. A
    few modules set an element of a buffer all the same.
    """
    if versions.installed() < (5,) or not type(model).__module__.startswith("transformers."):  # other code keeps no such marks
        return
    with torch.no_grad():
        for owner, module in _initialized(model):
            if module._buffers.keys() - module._non_persistent_buffers_set:  # noqa: SLF001
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # noqa: SLF001
                owner._init_weights(module)  # noqa: SLF001


def _initialized(model: Any, owner: Any = None) -> Iterator[tuple[Any, nn.Module]]:
    """Yield each module, innermost first, with the model that knows how to initialise it: its nearest ``PreTrainedModel``."""
    owner = model if hasattr(model, "_init_weights") else owner
    for child in model.children():
        yield from _initialized(child, owner)
    yield owner, model
