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

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        match args:
            case (rows, PackedWeight() as weight, *bias) if func is linear and not options:
                return packed.multiply(weight.meant.packing, rows, weight.memory, weight.meant.shape, *bias)
        if (known := answer(func, args, options)) is not NO_QUESTION:
            return known
        if in_place(func) and args and isinstance(args[0], PackedWeight):
            return super().__torch_function__(func, types, args, kwargs)  # refuses
        return func(*map(_dense, args), **{name: _dense(value) for name, value in options.items()})


def packed_weight(name: str, memory: torch.Tensor, meant: Meant) -> PackedWeight:
    """Return the parameter whose packed weight lies in `memory`, uint8 and flat."""
    parameter = PackedWeight(torch.empty(meant.shape, dtype=meant.dtype, device="meta"), requires_grad=False)
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
