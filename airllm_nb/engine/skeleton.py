"""The real transformers model with its parameters on meta, its decoder layers, and what each needs from the checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from airllm_nb.compat import config as compat_config
from airllm_nb.compat import keys, multimodal, versions
from airllm_nb.engine import decoder_layers, published
from airllm_nb.engine.checkpoint import Checkpoint, TensorEntry, read_config
from airllm_nb.engine.meta import empty_model
from airllm_nb.engine.readable import AGAIN, reading
from airllm_nb.engine.reader import CHUNK
from airllm_nb.engine.weights import ALIGN, Parameter, Place, WeightGroup
from airllm_nb.errors import CheckpointError

# Buffers that old checkpoints carry and that the model computes itself.
COMPUTED = re.compile(r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$|attention\.(masked_)?bias$")

EMBEDDING = "embedding"


@dataclass(frozen=True)
class Layer:
    """A decoder layer: its module, and the weights that it needs to compute."""

    module: nn.Module
    group: WeightGroup


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        Parameters on meta, buffers real.
    layers : tuple of Layer
        In the order of computation.
    always : WeightGroup
        What stays whatever the budget: final norm, head, and an embedding that is more than a table to look rows up in.
    embedding : WeightGroup or None
        The input embedding, if it can be read row by row: one tensor as published, and no other part of the model uses it.
    unused : list of str
        Tensors of the checkpoint that the model has no use for.
    """

    model: Any
    layers: tuple[Layer, ...]
    always: WeightGroup
    embedding: WeightGroup | None
    unused: list[str]


def build(
    folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool = False
) -> Skeleton:
    """Build the model of a checkpoint and plan where each weight comes from.

    Raises
    ------
    CheckpointError
        If a tensor is missing, has the wrong shape, or belongs nowhere.
    UnsupportedError
        If the installed transformers does not have the model, or the engine finds no decoder layers in it.
    """
    raw = read_config(folder)
    config = compat_config.load_config(folder, raw, trust_remote_code=trust_remote_code)
    own = multimodal.language_model(config, raw)
    model = empty_model(own, dtype, folder, trust_remote_code=trust_remote_code)
    places = _places(model)
    shapes = {name: entry.shape for name, entry in checkpoint.items()}
    names = multimodal.language_names(model, shapes) if type(model.config) is not type(config) else None
    recipes, unused = keys.recipes(model, shapes, names)
    ignored = [COMPUTED, *map(re.compile, getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    unused = [name for name in unused if not any(pattern.search(name) for pattern in ignored)]
    wanted = model.state_dict()
    recipes = [_as_asked(recipe, wanted, checkpoint) for recipe in recipes]
    unused = published.meaningful(checkpoint, unused)
    _check_shapes(recipes, wanted, unused)
    recipes, owners = _untied(recipes, places, checkpoint)
    _check_complete(owners, places, folder)

    layers = decoder_layers.find(model)
    embedding = _embedding(model, recipes, owners, places, checkpoint)
    members: dict[str | None, list[keys.Recipe]] = {path: [] for path in (None, EMBEDDING, *layers)}
    for recipe in recipes:
        homes = {_home(name, layers, places) for target in recipe.targets for name in owners[target]}
        home = homes.pop() if len(homes) == 1 else None
        members[EMBEDDING if home is None and recipe is embedding else home].append(recipe)
    keeps_float32 = keys.float32_names(model, dtype)
    mapped = device.type == "cpu" and _is_mapped(recipes, next(iter(wanted)), checkpoint, dtype)

    def group(path: str | None) -> WeightGroup:
        parameters = (
            Parameter(
                target,
                number := torch.float32 if keeps_float32(target) else wanted[target].dtype,
                shape,
                tuple(places[name] for name in owners[target]),
                _phase(recipe, checkpoint, number) if mapped else 0,
            )
            for recipe in members[path]
            for target, shape in recipe.targets.items()
        )
        return WeightGroup(path or "norm and head", parameters, members[path], device)

    return Skeleton(
        model=model, layers=tuple(Layer(module, group(path)) for path, module in layers.items()), always=group(None),
        embedding=group(EMBEDDING) if members[EMBEDDING] else None, unused=unused,
    )  # fmt: skip


def _places(model: nn.Module) -> dict[str, Place]:
    """Return the place of every parameter and persistent buffer, by name; tied ones under each of their names."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        temporary = module._non_persistent_buffers_set  # noqa: SLF001
        for table, is_buffer in ((module._parameters, False), (module._buffers, True)):  # noqa: SLF001
            for attribute, tensor in table.items():
                if tensor is not None and not (is_buffer and attribute in temporary):
                    found[prefix + attribute] = Place(table, attribute, is_buffer)
    return found


def _phase(recipe: keys.Recipe, checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Return where in a cache line a tensor begins that ``from_pretrained`` would map from its file rather than copy.

    Some CPU kernels (a matrix with few rows times a vector) add up in an order that depends on it.
    """
    entry = checkpoint[recipe.sources[0]]
    mapped = recipe.convert is None and entry.dtype == dtype and entry.offset % dtype.itemsize == 0
    return entry.offset % ALIGN if mapped else 0


def _is_mapped(recipes: Sequence[keys.Recipe], first: str, checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Tell whether ``from_pretrained`` computes with weights in the mapped file, and not with copies.

    Before 4.51 it does so if the model's first weight lies in the first file, in the dtype that it computes in.
    """
    if versions.installed() >= versions.MAPS_FILES:
        return True
    entry = next((checkpoint[recipe.sources[0]] for recipe in recipes if first in recipe.targets), None)
    files = sorted(entry.file for entry in checkpoint.values())
    return entry is not None and entry.file == files[0] and entry.dtype == dtype


def _as_asked(recipe: keys.Recipe, wanted: keys.Tensors, checkpoint: Checkpoint) -> keys.Recipe:
    """Give what is made of tensors whose shape is not known the shapes that the model asks for, if they have as many elements."""
    shapeless = sum(checkpoint[name].shapeless for name in recipe.sources)
    if not shapeless or not recipe.targets.keys() <= wanted.keys():
        return recipe
    asked = {name: tuple(wanted[name].shape) for name in recipe.targets}
    surplus = sum(map(math.prod, recipe.targets.values())) - sum(map(math.prod, asked.values()))
    return replace(recipe, targets=asked) if 0 <= surplus <= shapeless else recipe


def _check_shapes(recipes: Sequence[keys.Recipe], wanted: keys.Tensors, unused: Sequence[str]) -> None:
    for recipe in recipes:
        for target, shape in recipe.targets.items():
            if target not in wanted or tuple(wanted[target].shape) != shape:
                expected = tuple(wanted[target].shape) if target in wanted else "nothing"
                raise CheckpointError(
                    f"Tensor {recipe.sources[0]} has shape {shape}, and config.json asks for {expected}.",
                    "The weights and config.json do not belong together. " + AGAIN,
                )
    if unused:
        raise CheckpointError(
            f"The checkpoint holds tensors that its model has no place for: {', '.join(unused[:3])}"
            f"{f' and {len(unused) - 3} more' if len(unused) > 3 else ''}.",  # noqa: PLR2004  # name three
            "The weights and config.json do not belong together. " + AGAIN,
        )


def _untied(
    recipes: Sequence[keys.Recipe], places: dict[str, Place], checkpoint: Checkpoint
) -> tuple[list[keys.Recipe], dict[str, list[str]]]:
    """Decide which names each loaded tensor serves.

    A tied parameter is stored under one of its names, or under several with the same bytes, and is then loaded once. Where the
    bytes differ it is not tied after all, as in transformers from 5.0 on.

    Returns
    -------
    list of Recipe, dict of str to list of str
        The recipes that are left, and for each of their targets the names that it serves.
    """
    aliases: dict[int, list[str]] = {}
    for name, place in places.items():
        aliases.setdefault(id(place.table[place.attribute]), []).append(name)
    by_target = {target: recipe for recipe in recipes for target in recipe.targets}
    owners: dict[str, list[str]] = {}
    dropped: set[int] = set()
    for names in aliases.values():
        stored = [name for name in names if name in by_target]
        for name in stored:
            first = by_target[stored[0]]
            if name == stored[0]:
                owners[name] = [name, *(other for other in names if other not in by_target)]
            elif _same_bytes(checkpoint, first, by_target[name]):
                owners[stored[0]].append(name)
                dropped.add(id(by_target[name]))
            else:
                owners[name] = [name]
    return [recipe for recipe in recipes if id(recipe) not in dropped], owners


def _same_bytes(checkpoint: Checkpoint, one: keys.Recipe, other: keys.Recipe) -> bool:
    if one.convert or other.convert:
        return False
    first, second = checkpoint[one.sources[0]].stored, checkpoint[other.sources[0]].stored
    if [(part.dtype, part.shape) for part in first] != [(part.dtype, part.shape) for part in second]:
        return False
    return not checkpoint.states or all(map(_equal, first, second))  # without states: planning from headers alone


def _equal(first: TensorEntry, second: TensorEntry) -> bool:
    with reading(first.file), first.file.open("rb") as left, second.file.open("rb") as right:
        left.seek(first.offset)
        right.seek(second.offset)
        return all(
            left.read(size) == right.read(size)
            for start in range(0, first.nbytes, CHUNK)
            if (size := min(CHUNK, first.nbytes - start))
        )


def _check_complete(owners: dict[str, list[str]], places: dict[str, Place], folder: Path) -> None:
    served = {name for names in owners.values() for name in names}
    missing = [name for name, place in places.items() if name not in served and not place.is_buffer]
    if missing:
        raise CheckpointError(
            f"{folder.name} lacks weights that its config.json asks for: {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}.",  # noqa: PLR2004  # name three
            AGAIN,
        )


def _embedding(
    model: Any, recipes: Sequence[keys.Recipe], owners: dict[str, list[str]], places: dict[str, Place], checkpoint: Checkpoint
) -> keys.Recipe | None:
    """Return what makes the weight of the input embedding, if that is one tensor as published and has one place in the model."""
    try:
        module, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # not every model tells
        return None
    if not isinstance(module, nn.Embedding) or head is None:  # without a head of its own (OpenLlama) it is the head
        return None
    for recipe in recipes:
        held = [(id(places[name].table), places[name].attribute) for target in recipe.targets for name in owners[target]]
        if held == [(id(module._parameters), "weight")]:  # noqa: SLF001
            # The rows of what is unpacked with other tensors' help need not be rows of those.
            return recipe if recipe.convert is None and not checkpoint[recipe.sources[0]].companions else None
    return None


def _home(name: str, layers: dict[str, nn.Module], places: dict[str, Place]) -> str | None:
    """Return the decoder layer that comes and goes with a parameter; None if it belongs to none."""
    if places[name].is_buffer:
        return None
    return next((path for path in layers if name.startswith(f"{path}.")), None)
