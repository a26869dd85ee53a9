"""Which tensors of a checkpoint make which parameters of the model, for each generation of transformers.

Names differ between the files and the model (a missing prefix, renamed modules), and from transformers 5 on parameters can be
fused from several tensors (one per expert). transformers' own tables decide; this module only asks them, for one layer at a time.
"""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from airllm_nb.compat import versions

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How some tensors of the checkpoint become some parameters.

    Attributes
    ----------
    sources : tuple of str
        Names in the checkpoint, in the order that `convert` expects.
    targets : dict of str to tuple of int
        Names of the model's parameters (or persistent buffers) that come out, with their shapes.
    convert : callable or None
        From the sources' tensors by name to the targets' tensors by name; None where the one source *is* the one target.
    joined : bool
        True where `convert` only puts the sources' elements one after the other, in their order: then they may be read right to
        where they belong, all of them or some.
    """

    sources: tuple[str, ...]
    targets: dict[str, tuple[int, ...]]
    convert: Callable[[Tensors], Tensors] | None = None
    joined: bool = False


def recipes(
    model: Any, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str] | None = None
) -> tuple[list[Recipe], list[str]]:
    """Plan the loading of a checkpoint into a model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With parameters on meta.
    shapes : mapping of str to tuple of int
        The checkpoint's tensors and their shapes.
    names : mapping of str to str, optional
        For a part of a checkpoint: which of its tensors count, and what they are called in a checkpoint of that part alone.

    Returns
    -------
    list of Recipe, list of str
        The recipes, and the names of tensors that the model has no use for.
    """
    if names is not None:
        found, unused = recipes(model, {alone: shapes[name] for name, alone in names.items()})
        stored = {alone: name for name, alone in names.items()}
        return [_from_part(recipe, stored) for recipe in found], [stored[name] for name in unused]
    wanted = model.state_dict()
    if versions.installed() < (5,):
        return _renamed(shapes, wanted, _version_4_name(model, wanted))
    return _version_5(model, shapes, wanted)


def _from_part(recipe: Recipe, stored: Mapping[str, str]) -> Recipe:
    """Return a recipe for a part of a checkpoint with the names that the tensors have in the whole."""
    sources, convert = tuple(stored[name] for name in recipe.sources), recipe.convert
    if convert is None:
        return Recipe(sources, recipe.targets)
    return Recipe(
        sources, recipe.targets, lambda tensors: convert({name: tensors[stored[name]] for name in recipe.sources}), recipe.joined
    )


def float32_names(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Return which parameters transformers keeps in float32 although the model is loaded in `dtype`."""
    modules: set[str] = set()
    if dtype == torch.float16:
        modules |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype in (torch.float16, torch.bfloat16):
        modules |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    patterns = [re.compile(rf"(^|\.){module}($|\.)") for module in modules]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _renamed(
    shapes: Mapping[str, tuple[int, ...]], wanted: Tensors, rename: Callable[[str], str]
) -> tuple[list[Recipe], list[str]]:
    found, unused = [], []
    for source, shape in shapes.items():
        target = rename(source)
        if target in wanted:
            found.append(Recipe((source,), {target: shape}))
        else:
            unused.append(source)
    return found, unused


def _version_4_name(model: Any, wanted: Tensors) -> Callable[[str], str]:
    prefix = f"{model.base_model_prefix}."
    mapping: dict[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}

    def rename(key: str) -> str:
        key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key)
        key = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)
        for pattern, replacement in mapping.items():
            key, count = re.subn(pattern, replacement, key)
            if count:
                break
        if key in wanted:
            return key
        return prefix + key if prefix + key in wanted else key.removeprefix(prefix)

    return rename


def _version_5(model: Any, shapes: Mapping[str, tuple[int, ...]], wanted: Tensors) -> tuple[list[Recipe], list[str]]:
    """Follow ``transformers.core_model_loading.convert_and_load_state_dict_in_model``."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: list[Recipe] = []
    unused: list[str] = []
    fused: dict[str, list[tuple[str, str]]] = {}  # first target -> its sources, each with the pattern it matched
    for source in sorted(shapes, key=_natural):
        target, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and source in wanted:
            target, pattern = source, None
        if target not in wanted:
            unused.append(source)
        elif pattern is None:
            found.append(Recipe((source,), {target: shapes[source]}))
        else:
            fused.setdefault(target, []).append((source, pattern))
    for target, members in fused.items():
        convert = _converter(model, by_pattern[members[0][1]], target, members)
        # On meta tensors the conversion costs nothing and tells names and shapes.
        sources = tuple(name for name, _ in members)
        made = convert({name: torch.empty(shapes[name], device="meta") for name in sources})
        order = _joined(convert, {name: len(shapes[name]) for name in sources}) if len(made) == 1 else None
        found.append(Recipe(order or sources, {n: tuple(t.shape) for n, t in made.items()}, convert, joined=bool(order)))
    return found, unused


PROBES = ((8, 12, 16, 20), (12, 8, 20, 16))
"""Sizes of the tensors that a conversion is tried with. One set would not do: some permutations move nothing of two rows, or
where each head has two."""


def _joined(convert: Callable[[Tensors], Tensors], dimensions: Mapping[str, int]) -> tuple[str, ...] | None:
    """Return the order in which a conversion to one tensor puts its sources' elements; None if it does anything else to them.

    The conversion is asked, not its description: it gets numbers, in tensors as many as the sources and otherwise small.
    """
    orders = {_order(convert, {name: sizes[:count] for name, count in dimensions.items()}) for sizes in PROBES}
    return orders.pop() if len(orders) == 1 else None


def _order(convert: Callable[[Tensors], Tensors], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...] | None:
    numbers, begin = {}, 0
    for name, shape in shapes.items():
        numbers[name] = torch.arange(begin, begin + math.prod(shape), device="cpu").view(shape)
        begin += math.prod(shape)
    firsts = {int(tensor.view(-1)[0]): name for name, tensor in numbers.items()}
    pieces = {name: tensor.view(-1) for name, tensor in numbers.items()}
    try:
        (made,) = convert(numbers).values()
    except Exception:  # noqa: BLE001  # a conversion that goes by the sizes of this model
        return None
    flat, order, done = made.reshape(-1), [], 0
    while done < flat.numel():
        name = firsts.pop(int(flat[done]), "")
        if not name or not torch.equal(flat[done : done + pieces[name].numel()], pieces[name]):
            return None
        order.append(name)
        done += pieces[name].numel()
    return None if firsts else tuple(order)


def _converter(model: Any, converter: Any, target: str, members: Iterable[tuple[str, str]]) -> Callable[[Tensors], Tensors]:
    config, weak = model.config, weakref.ref(model)  # the reading thread holds recipes, and must not keep the model alive

    def convert(tensors: Tensors) -> Tensors:
        fresh = copy.deepcopy(converter)  # it collects tensors: one use each
        for name, pattern in members:
            fresh.add_tensor(target, name, pattern, tensors[name])
        made = fresh.convert(target, model=weak(), config=config)
        made = made[0] if isinstance(made, tuple) else made  # 5.0 returns (tensors, errors)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    return convert


def _natural(key: str) -> list[tuple[int, int | str]]:
    """Sort experts by number: 2 before 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]
