"""A mixture's experts lie in stacks, one matrix for each: where each is in the checkpoint, and the layers without them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from airllm_nb.compat import experts as compat_experts
from airllm_nb.compat.keys import Recipe
from airllm_nb.engine.checkpoint import Checkpoint, TensorEntry
from airllm_nb.engine.packed_weight import Meant
from airllm_nb.engine.skeleton import Layer, Skeleton
from airllm_nb.engine.weights import ALIGN, Place, WeightGroup

FEW = 2
"""Matrices of each size that must fit at once: one computes while the next one is read."""


@dataclass(frozen=True)
class ExpertStack:
    """A parameter that stacks one matrix for each expert of a layer.

    Attributes
    ----------
    name : str
        Of the parameter.
    dtype : torch.dtype
        What it computes in.
    shape : tuple of int
        Of one expert's matrix.
    phase : int
        Where in a line of `ALIGN` bytes the whole stack would begin.
    places : tuple of Place
        Where the model has it.
    sources : tuple of tuple of TensorEntry
        For each expert what its matrix consists of, one after the other.
    partner : int or None
        Number of the stack that the same experts need next.
    meant : Meant or None
        What the bytes of one matrix mean that is packed: dtype and shape are then those of its bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    phase: int
    places: tuple[Place, ...]
    sources: tuple[tuple[TensorEntry, ...], ...]
    partner: int | None
    meant: Meant | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's matrix."""
        return math.prod(self.shape) * self.dtype.itemsize

    def phase_of(self, expert: int) -> int:
        """Return where in a line one expert's matrix begins: last bits depend on it, see `skeleton`."""
        return (self.phase + expert * self.nbytes) % ALIGN


def split(skeleton: Skeleton, checkpoint: Checkpoint) -> tuple[Skeleton, tuple[ExpertStack, ...]]:
    """Take the experts' stacks out of the layers.

    A module's stacks are taken together or not at all: only where each expert's matrices are read as they are.

    Returns
    -------
    Skeleton, tuple of ExpertStack
        The model whose layers do not read experts, and the stacks; the same model and none if it has no such experts.
    """
    modules = compat_experts.stacks(skeleton.model)
    stacks: list[ExpertStack] = []
    layers = []
    for layer in skeleton.layers:
        recipes = {next(iter(recipe.targets)): recipe for recipe in layer.group.recipes if len(recipe.targets) == 1}
        taken: list[str] = []
        for names in modules:
            found = list(_stacks(names, layer.group, recipes, checkpoint, len(stacks)))
            if len(found) == len(names):
                stacks += found
                taken += names
        layers.append(Layer(layer.module, layer.group.without(taken)) if taken else layer)
    return (replace(skeleton, layers=tuple(layers)), tuple(stacks)) if stacks else (skeleton, ())


def _stacks(
    names: Sequence[str], group: WeightGroup, recipes: dict[str, Recipe], checkpoint: Checkpoint, begin: int
) -> Iterator[ExpertStack]:
    for number, name in enumerate(names, begin + 1):
        if name in recipes and (sources := _sources(recipes[name], group.weights[name].shape, checkpoint)):
            weight = group.weights[name]
            partner = number if number < begin + len(names) else None
            phase = weight.offset % ALIGN
            meant = weight.meant and weight.meant._replace(shape=weight.meant.shape[1:])
            yield ExpertStack(name, weight.dtype, weight.shape[1:], phase, weight.places, sources, partner, meant)


def _sources(recipe: Recipe, shape: tuple[int, ...], checkpoint: Checkpoint) -> tuple[tuple[TensorEntry, ...], ...] | None:
    """Return what each expert's matrix consists of: tensors of its own, or its part of one; None where it must be computed."""
    if recipe.convert is not None and not recipe.joined:
        return None
    count, numel = shape[0], math.prod(shape[1:])
    entries = [checkpoint[source] for source in recipe.sources]
    if len(entries) == 1:
        (entry,) = entries
        return tuple((replace(entry.rows(n, 1), shape=shape[1:]),) for n in range(count))
    each = len(entries) // count
    parted = tuple(tuple(entries[n * each : (n + 1) * each]) for n in range(count))
    fits = len(entries) == each * count and all(sum(math.prod(e.shape) for e in part) == numel for part in parted)
    return parted if fits else None


def slots(stacks: Sequence[ExpertStack], budget: int) -> dict[int, int]:
    """Return how many matrices of each size in bytes a budget in bytes holds: of all sizes the same share, at least a few."""
    counts: dict[int, int] = {}
    for stack in stacks:
        counts[stack.nbytes] = counts.get(stack.nbytes, 0) + len(stack.sources)
    few = {size: min(FEW, count) for size, count in counts.items()}
    least, most = occupied(few), occupied(counts)
    share = max(budget - least, 0) / max(most - least, 1)
    return {size: min(counts[size], few[size] + int(share * (counts[size] - few[size]))) for size in counts}


def occupied(slots: dict[int, int]) -> int:
    """Return the bytes of buffers for so many matrices of each size."""
    return sum((size + ALIGN) * count for size, count in slots.items())


def least(stacks: Sequence[ExpertStack]) -> int:
    """Return the bytes that the fewest matrices occupy with which experts can compute."""
    return occupied(slots(stacks, 0))
