"""Weights that a checkpoint has in few bits already, on a grid that packed ones have too: they are packed without rounding."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch

from airllm_nb.engine.checkpoint import Checkpoint, TensorEntry
from airllm_nb.engine.packed import Int4, Packing
from airllm_nb.engine.reader import Reader
from airllm_nb.engine.weights import WeightGroup, as_bytes


@runtime_checkable
class Repack(Protocol):
    """What some tensors are unpacked by (`TensorEntry.unpack`): it may also keep their codes."""

    def lies_on(self, packing: Packing) -> bool:
        """Tell whether the weight need not be rounded to be packed so."""

    def repack(self, raw: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the packed weight of a tensor's bytes, which are uint8 and flat, as it is."""


def on_grid(checkpoint: Checkpoint, group: WeightGroup, packing: Packing) -> dict[str, TensorEntry]:
    """Return for each weight of a group that need not be rounded where it lies."""
    found: dict[str, TensorEntry] = {}
    for recipe in group.recipes:
        if recipe.convert is None and len(recipe.sources) == 1:
            entry = checkpoint[recipe.sources[0]]
            matrix = len(entry.shape) == 2  # noqa: PLR2004  # and no stack of them
            if matrix and isinstance(entry.unpack, Repack) and entry.unpack.lies_on(packing):
                found[next(iter(recipe.targets))] = entry
    return found


def hint(checkpoint: Checkpoint) -> str:
    """Say how a model would stream faster whose layers are unpacked each time they are read; empty if they are not."""
    packed = [
        entry for entry in checkpoint.values() if isinstance(entry.unpack, Repack) and entry.nbytes < 2 * math.prod(entry.shape)
    ]  # not vectors and the like, in 16 or 32 bits
    kept = sum(entry.nbytes for entry in packed if isinstance(entry.unpack, Repack) and entry.unpack.lies_on(Int4(32)))
    name = "int4-32" if 2 * kept > sum(entry.nbytes for entry in packed) else "int8"
    if not packed:
        return ""
    return f'each read unpacks a layer; --quantize {name} (quantize="{name}") writes the layers once so that they need not be'


def repacked(entry: TensorEntry, reader: Reader) -> torch.Tensor:
    """Read a weight that need not be rounded, and pack it.

    Raises
    ------
    ValueError
        If a scale is not finite.
    """
    raw = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
    reader.read(entry.file, entry.offset, as_bytes(raw), keep_cached=False)
    assert isinstance(entry.unpack, Repack)
    return entry.unpack.repack(raw, entry.shape)
