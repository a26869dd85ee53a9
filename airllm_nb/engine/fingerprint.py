"""What a result depends on, as short hashes: the model, the settings, the prompt. Where that cannot be told, it is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import transformers

from airllm_nb.compat.config import text_config
from airllm_nb.engine import decoding
from airllm_nb.engine.prompts import ids_of
from airllm_nb.engine.results import ResultsError

if TYPE_CHECKING:
    from airllm_nb.engine.decoding import Sampling
    from airllm_nb.engine.model import LayeredModel

PAGE = 4096
DIGITS = 16  # hexadecimal, of each hash: 64 bits
NOT_COMPUTED_BY = ("_name_or_path", "transformers_version")
"""What a config says of where it comes from."""
RESCALED = frozenset(("rwkv",))
"""Types of models that change their own weights when they first compute."""


def hash_of(value: Any) -> str:
    """Return a short hash of anything that JSON can say; what it cannot say counts by its ``str``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:DIGITS]


def seed_of(*numbers: int) -> int:
    """Return a seed from 0 to 2^63 - 1 that belongs to some numbers, and that no neighbour of theirs gives."""
    return int(hash_of(numbers), 16) >> 1


def keys(model: LayeredModel, texts: Sequence[str], system: str | None, sampling: Sampling, *, raw: bool) -> list[str]:
    """Return what tells each prompt's result from any other.

    The prompt counts as it was given, and so do system prompt and chat template: what a template makes of them can hold the date.

    Raises
    ------
    ResultsError
        If the model computes something else than its files say.
    CheckpointError
        If the files have changed since the model was loaded.
    """
    template = None if raw else model.tokenizer.chat_template
    common = f"{hash_of_model(model)}-{hash_of_settings(model, sampling)}"
    return [f"{common}-{hash_of([ids_of(model.tokenizer(text)), system, template])}" for text in texts]


def hash_of_model(model: LayeredModel) -> str:
    """Return a short hash of what a model computes with: its config, and a page from the middle of each of its tensors.

    They are read from the files as they were when the model was loaded. A checkpoint that differs in other places only (some rows
    of a large tensor) has the same hash; so has one with other code of its own.

    Raises
    ------
    ResultsError
        If functions stand between the layers, or weights that stay on the CPU were changed in memory. What is *not* noticed: a
        change of weights on another device, of those that are shared, or through ``.data`` within a few numbers; a layer that
        was replaced; a config that was changed and has no effect any more.
    CheckpointError
        If a file has changed since the model was loaded.
    """
    runtime = model._runtime  # noqa: SLF001
    if runtime.taps:
        raise ResultsError(
            "Functions on the layers change what the model computes, and a file of results does not know them.",
            "Remove them first (each has .remove()), or leave results out.",
        )
    own = text_config(model.config).model_type in RESCALED
    if runtime.watch is not None and runtime.watch.changed(model.plan) and not own:
        raise ResultsError(
            "The model's weights were changed in memory, and a file of results does not know how.",
            "Save the model and load it from there, or leave results out.",
        )
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_COMPUTED_BY}
    found = hashlib.sha256(hash_of(config).encode())
    checkpoint = model.plan.work.checkpoint
    for name, entry in sorted((part.name, part) for whole in checkpoint.values() for part in whole.stored):
        page = memoryview(bytearray(min(PAGE, entry.nbytes)))
        model._reader.read(entry.file, entry.offset + (entry.nbytes - len(page)) // 2, page, keep_cached=True)  # noqa: SLF001
        found.update(f"{name} {entry.dtype} {entry.shape}\n".encode() + page)
    return found.hexdigest()[:DIGITS]


def hash_of_settings(model: LayeredModel, sampling: Sampling) -> str:
    """Return a short hash of how the model computes and how a text is made; versions and the machine do not count."""
    checkpoint, default = model.generation_config, transformers.GenerationConfig()
    own = {
        name: repr(getattr(checkpoint, name, None))
        for name in sorted(decoding.OF_THE_CHECKPOINT)
        if getattr(checkpoint, name, None) != getattr(default, name, None)
    }
    return hash_of([asdict(sampling), str(model.dtype), bool(model.plan.kernels), own])
