"""Which weights of a model are kept in few bits, and the model whose layers have them so."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from airllm_nb.compat import experts
from airllm_nb.compat.keys import Recipe
from airllm_nb.engine.head import PACKING, packed_head
from airllm_nb.engine.packed import Int4, Int8, Packing, layout
from airllm_nb.engine.packed_weight import Meant
from airllm_nb.engine.skeleton import Layer, Skeleton
from airllm_nb.engine.weights import SMALL, Parameter, Weight, WeightGroup
from airllm_nb.errors import AirLLMError, UnsupportedError

ROUTER = re.compile(r"\.(gate|classifier|\w*router\w*)\.")
HEAD = "+head"
GROUPS = (32, 64, 128, 256)  # that PyTorch's kernel takes


@dataclass(frozen=True)
class Quantized:
    """A model without weights whose layers have packed ones, and what they are made from.

    Attributes
    ----------
    skeleton : Skeleton
        Its packed layers read everything but large weights that cannot be packed from tensors named `stored` (a name).
    original : Skeleton
        The same model, whose layers read the checkpoint as it is published.
    packing : Packing
        How the layers' weights are packed.
    head : WeightGroup or None
        The head's weight as published, if it is packed, too.
    left : dict of str to str
        Matrices of the layers that are left as they are, and why.
    """

    skeleton: Skeleton
    original: Skeleton
    packing: Packing
    head: WeightGroup | None
    left: dict[str, str]

    @property
    def name(self) -> str:
        """What a user calls it."""
        return f"{self.packing}{HEAD if self.head else ''}"


def asked(quantize: str) -> tuple[Packing, bool]:
    """Return how the layers are to be packed, and whether the head is, too: ``"int4+head"``.

    Raises
    ------
    AirLLMError
        If there is no such quantization.
    """
    layers = str(quantize).removesuffix(HEAD)
    return packing_of(layers, quantize), layers != str(quantize)


def packing_of(name: str, asked_for: str | None = None) -> Packing:
    """Return the packing that a user names: ``"int8"``, ``"int4"`` (groups of 64 weights), or ``"int4-32"`` and so on.

    With ``-gptq`` at its end, 4-bit weights are rounded with compensated errors. Errors show what was `asked_for`.

    Raises
    ------
    AirLLMError
        If there is none of that name.
    """
    if name == "int8":
        return Int8()
    if found := re.fullmatch(r"int4(?:-(\d{1,4}))?(-gptq)?", str(name)):
        group = int(found[1] or 64)
        if group in GROUPS:
            return Int4(group, "gptq" if found[2] else "nearest")
    groups = ", ".join(f"int4-{group}" for group in GROUPS)
    raise AirLLMError(
        f"There is no quantization {name if asked_for is None else asked_for!r}.",
        f'Use "int8", "int4", or with groups of another size: {groups}; "int4-gptq" rounds better, "int4{HEAD}" packs the head.',
    )


def quantized(skeleton: Skeleton, packing: Packing, *, head: bool = False) -> Quantized:
    """Let the linear layers of each decoder layer have packed weights, and its stacks of experts, and perhaps the head.

    Left as they are: what is no plain linear layer's own (it would be unpacked at every use), what computes in another dtype than
    its layer, and shapes that no kernel takes. Embeddings and norms stay.

    Raises
    ------
    UnsupportedError
        If nothing can be packed, or the model changes its own weights.
    """
    if skeleton.model.config.model_type == "rwkv":
        raise UnsupportedError(
            "This model rescales its own weights, which packed ones cannot follow.", "Load it without quantize."
        )
    if isinstance(packing, Int4):
        layout()  # whether there is a kernel
    left: dict[str, str] = {}
    choice = _choice(skeleton, packing)
    layers = tuple(Layer(layer.module, _packed(layer, choice, left)) for layer in skeleton.layers)
    if not any(weight.meant for layer in layers for weight in layer.group.weights.values()):
        name, why = next(iter(left.items()), ("its layers", "they have no matrices"))
        raise UnsupportedError(f"Nothing of this model can be quantized: {name}: {why}.", "Load it without quantize.")
    smaller, source = replace(skeleton, layers=layers), None
    if head:
        smaller, source = packed_head(smaller, stored(PACKING, "head"))
    return Quantized(smaller, skeleton, packing, source, left)


def stored(packing: Packing, name: str, *_others: str) -> str:
    """Return the name under which a checkpoint has a layer's weight as it was stored by us."""
    return f"{packing}:{name}"


def _packed(layer: Layer, choice: _Choice, left: dict[str, str]) -> WeightGroup:
    """Return a layer's weights, packed where that can be; adds to `left` what is not."""
    group = layer.group
    alone = {name: recipe for recipe in group.recipes if len(recipe.targets) == 1 for name in recipe.targets}
    kept = [recipe for name, recipe in alone.items() if _stays(group.weights[name], choice)]
    stays = {name for recipe in kept for name in recipe.targets}
    parameters, recipes = [], []
    for weight in group.weights.values():
        if weight.name in stays:
            parameters.append(Parameter(weight.name, weight.dtype, weight.shape, weight.places))
        else:
            parameters.append(parameter := _parameter(weight, choice))
            recipes.append(Recipe((stored(choice.packing, weight.name),), {weight.name: parameter.shape}))
        if len(weight.shape) > 1 and (why := choice.refusal(weight)):
            left[weight.name] = why
    return WeightGroup(group.name, parameters, [*recipes, *kept], group.device)


def _parameter(weight: Weight, choice: _Choice) -> Parameter:
    if choice.refusal(weight):
        return Parameter(weight.name, weight.dtype, weight.shape, weight.places)
    *stack, outputs, inputs = weight.shape
    shape = (*stack, choice.packing.nbytes((outputs, inputs)))
    return Parameter(weight.name, torch.uint8, shape, weight.places, meant=Meant(choice.packing, weight.shape, weight.dtype))


def _stays(weight: Weight, choice: _Choice) -> bool:
    """Tell whether a weight is read from where it is published: it would take much of the disk a second time."""
    return weight.nbytes > SMALL and choice.refusal(weight) is not None


class _Choice(NamedTuple):
    """By what it is decided which weights are packed.

    The packing, the dtype that layers compute in, the tables of plain linear layers, and the names of stacks of experts: of all,
    and of those whose matrices lie turned round.
    """

    packing: Packing
    dtype: torch.dtype
    linear: frozenset[int]
    stacks: frozenset[str]
    turned: frozenset[str]

    def refusal(self, weight: Weight) -> str | None:
        """Return why a weight is left as it is; None if it is packed."""
        if weight.dtype != self.dtype:
            return f"it computes in {str(weight.dtype).removeprefix('torch.')}"
        if ROUTER.search(weight.name):
            return "it chooses experts, and a small error would choose others"
        if weight.name in self.turned:
            return "its experts' matrices lie turned round"
        alone = len(weight.places) == 1
        if alone and weight.name in self.stacks:
            return self.packing.refusal(weight.shape[1:])
        if not alone or id(weight.places[0].table) not in self.linear or weight.places[0].attribute != "weight":
            return "it is not the weight of one linear layer alone"
        return self.packing.refusal(weight.shape)


def _choice(skeleton: Skeleton, packing: Packing) -> _Choice:
    modules = skeleton.model.modules()
    linear = frozenset(id(module._parameters) for module in modules if _is_plain(module))  # noqa: SLF001
    stacks = frozenset(name for names in experts.stacks(skeleton.model) for name in names)
    return _Choice(packing, skeleton.model.dtype, linear, stacks, experts.turned(skeleton.model))


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and "forward" not in vars(module)


def stored_weights(group: WeightGroup, packing: Packing) -> list[Weight]:
    """Return the weights of a layer that are stored by us, in their order."""
    own = {name for recipe in group.recipes if recipe.sources[0] == stored(packing, *recipe.targets) for name in recipe.targets}
    return [weight for weight in group.weights.values() if weight.name in own]


def describe(quantized: Quantized) -> str:
    """Say in words what is packed and what is not."""
    weights = [weight for layer in quantized.skeleton.layers for weight in layer.group.weights.values()]
    packed = [weight for weight in weights if weight.meant]
    shapes = [weight.meant.shape for weight in packed if weight.meant]
    bits = sum(weight.nbytes for weight in packed) * 8 / max(sum(map(math.prod, shapes)), 1)
    count = sum(math.prod(shape[:-2]) for shape in shapes)
    text = f"{quantized.packing}: {count} matrices of the layers, {bits:.2f} bits a weight"
    text += "; the head in int8" if quantized.head else ""
    if not quantized.left:
        return text
    stays = {weight.name: weight.nbytes for weight in weights if weight.name in quantized.left}
    name = max(stays, key=stays.__getitem__)  # the first of the largest
    share = sum(stays.values()) / sum(
        weight.nbytes for layer in quantized.original.layers for weight in layer.group.weights.values()
    )
    return f"{text}; {len(stays)} stay as they are, {share:.0%} of the layers' bytes ({name}: {quantized.left[name]})"
