"""A parameter in few bits: linear layers multiply by it as it is, everything else sees the weight that is meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from airllm_nb.engine import packed
from airllm_nb.engine.away import NO_QUESTION, Away, answer, in_place
from airllm_nb.engine.packed import Packing


class Meant(NamedTuple):
    """What the bytes of a packed weight mean: a matrix of a shape, in the dtype that its layer computes in."""

    packing: Packing
    shape: tuple[int, ...]
    dtype: torch.dtype


class PackedWeight(Away):
    """A parameter on meta, which says shape and dtype of the weight that is meant, and holds it packed.

    So a model needs no modules of ours: ``linear`` takes the kernel, and where a model's own code does anything else with a
    weight, it gets that unpacked. Changes in place are refused.
    """

    meant: Meant
    memory: torch.Tensor
    misuse = "in a way that a quantized weight cannot follow"
    remedy = "Load it without quantize."
    notes = False

    def dense(self) -> torch.Tensor:
        """Return the weight that is meant, in full."""
        return self.meant.packing.dense(self.memory, self.meant.shape, self.meant.dtype)

    def __deepcopy__(self, _memo: dict[int, Any]) -> PackedWeight:
        return packed_weight(self.label, self.memory.clone(), self.meant, type(self))

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return packed_weight, (self.label, self.memory, self.meant, type(self))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        match args:
            case (rows, PackedWeight() as weight, *bias) if func is linear and not options:
                return packed.multiply(weight.meant.packing, rows, weight.memory, weight.meant.shape, *bias)
        if _changes(func, args, options):
            return super().__torch_function__(func, types, args, kwargs)  # refuses
        if (known := answer(func, args, options)) is not NO_QUESTION:
            return known
        result = func(*map(_dense, args), **{name: _dense(value) for name, value in options.items()})
        return result.as_subclass(Unpacked) if _aliases(func, args) else result


class Unpacked(torch.Tensor):
    """What a packed weight means, in memory of its own: a change of it would be lost, and so is refused."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], _types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _changes(func, args, kwargs or {}):
            raise PackedWeight.refusal(args)
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            result = func(*map(_dense, args), **{name: _dense(value) for name, value in (kwargs or {}).items()})
        return result.as_subclass(Unpacked) if _aliases(func, args) else _plain(result)


ALIASES = frozenset((
    "__getitem__", "detach", "expand", "flatten", "narrow", "permute", "reshape", "select", "squeeze", "t", "transpose",
    "unsqueeze", "view", "view_as",
))  # fmt: skip
"""Functions whose result shares memory with what they are given."""
GETTERS = tuple(getattr(torch.Tensor, name).__get__ for name in ("data", "T", "mT"))


def _aliases(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    ours = args and isinstance(args[0], (PackedWeight, Unpacked))
    return bool(ours) and (func.__name__ in ALIASES or func in GETTERS)


def _changes(func: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """Tell whether a function would change a packed weight, or what it means."""
    ours = (PackedWeight, Unpacked)
    if isinstance(options.get("out"), ours):
        return True
    if not (args and isinstance(args[0], ours)):
        return False
    name = func.__name__
    if name in {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}:
        return True
    return in_place(func) and name != "requires_grad_"


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, Unpacked) else value


def packed_weight(name: str, memory: torch.Tensor, meant: Meant, kind: type[PackedWeight] = PackedWeight) -> PackedWeight:
    """Return the parameter whose packed weight lies in `memory`, uint8 and flat."""
    parameter = kind(torch.empty(meant.shape, dtype=meant.dtype, device="meta"), requires_grad=False)
    parameter.label, parameter.home, parameter.changes = name, memory.device, []
    parameter.meant, parameter.memory = meant, memory
    return parameter


def memory_of(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return the tensor that holds a parameter's bytes: of a packed weight another one than the parameter."""
    return tensor.memory if isinstance(tensor, PackedWeight) else tensor


def _dense(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_dense, value))
    return value.dense() if isinstance(value, PackedWeight) else value
