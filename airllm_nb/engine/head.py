"""A model's head in 8 bits, which often is a third of what is left once the layers are packed.

Of a head that is tied to the embedding only the head is packed: the embedding is looked up as published, and can stay on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from airllm_nb.compat.keys import Recipe
from airllm_nb.engine.packed import Int8
from airllm_nb.engine.packed_weight import Meant
from airllm_nb.engine.skeleton import EMBEDDING, Skeleton
from airllm_nb.engine.weights import ALIGN, GroupReader, Parameter, Place, Weight, WeightGroup
from airllm_nb.errors import UnsupportedError

PACKING = Int8()
"""Fewer bits would cost more than they save: the head decides between tokens itself."""
PIECES = 32 << 20
"""Bytes that are packed at once."""


def packed_head(skeleton: Skeleton, stored: str) -> tuple[Skeleton, WeightGroup]:
    """Let the head have packed weights.

    Parameters
    ----------
    skeleton : Skeleton
        The model.
    stored : str
        What the packed weight is called in the checkpoint that it will be read from.

    Returns
    -------
    tuple of Skeleton and WeightGroup
        The model with a packed head, and the head's weight as published: that alone, shape (ids, width).

    Raises
    ------
    UnsupportedError
        If it cannot be packed.
    """
    always, embedding = skeleton.always, skeleton.embedding
    weight, recipe, here, elsewhere = _find(skeleton)
    meant = Meant(PACKING, weight.shape, weight.dtype)
    packed = Parameter(weight.name, torch.uint8, (PACKING.nbytes(weight.shape),), (here,), meant=meant)
    others = [_parameter(other, other.places) for other in always.weights.values() if other is not weight]
    recipes = [Recipe((stored,), {weight.name: packed.shape}), *(other for other in always.recipes if other is not recipe)]
    if elsewhere:
        embedding = WeightGroup(EMBEDDING, [_parameter(weight, elsewhere)], [recipe], always.device)
    source = WeightGroup("head", [_parameter(weight, weight.places)], [recipe], always.device)
    always = WeightGroup(always.name, [*others, packed], recipes, always.device)
    return replace(skeleton, always=always, embedding=embedding), source


def packed_rows(source: WeightGroup, groups: GroupReader, pack: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
    """Read a head some rows at a time, for it is many times as large as a layer's weights, and return what it is packed to.

    Parameters
    ----------
    source : WeightGroup
        The head's weight as published.
    groups : GroupReader
        Reads it.
    pack : callable(rows)
        Packs some rows by `PACKING`.
    """
    (weight,) = source.weights.values()
    count, width = weight.shape
    step, scales = max(PIECES // (width * weight.dtype.itemsize), 1), []
    for begin in range(0, count, step):
        rows = torch.empty((min(step, count - begin), width), dtype=weight.dtype, device="cpu")
        groups.fill_rows(source, begin, rows, keep_cached=False)
        codes, scale = PACKING.parts(pack(rows), tuple(rows.shape))
        scales.append(scale)
        yield codes
    yield torch.cat(scales)


def _find(skeleton: Skeleton) -> tuple[Weight, Recipe, Place, tuple[Place, ...]]:
    """Return the head's weight, what makes it, its place in the head, and that in an embedding that it is tied to."""
    model, group = skeleton.model, skeleton.always
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head):
        raise _refusal("it is no linear layer of its own")
    weight = next(weight for weight in group.weights.values() if _at(weight, head))
    recipe = next(recipe for recipe in group.recipes if weight.name in recipe.targets)
    (here,) = _at(weight, head)
    elsewhere = tuple(place for place in weight.places if place is not here)
    if elsewhere and (not isinstance(embedding, nn.Embedding) or elsewhere != _at(weight, embedding)):
        raise _refusal("other parts of the model use its weight")
    if recipe.convert is not None:
        raise _refusal("it is put together from several tensors")
    if weight.dtype != model.dtype:
        raise _refusal(f"it computes in {str(weight.dtype).removeprefix('torch.')}")
    if why := PACKING.refusal(weight.shape):
        raise _refusal(why)
    return weight, recipe, here, elsewhere


def _at(weight: Weight, module: nn.Module) -> tuple[Place, ...]:
    table = module._parameters  # noqa: SLF001  # where the weight would be put
    return tuple(place for place in weight.places if place.table is table and place.attribute == "weight")


def _parameter(weight: Weight, places: tuple[Place, ...]) -> Parameter:
    return Parameter(weight.name, weight.dtype, weight.shape, places, weight.offset % ALIGN)


def _refusal(why: str) -> UnsupportedError:
    return UnsupportedError(f"The head of this model cannot be quantized: {why}.", "Leave out +head.")
