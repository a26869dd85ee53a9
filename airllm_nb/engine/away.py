"""What stands in for a parameter while its layer is not in memory: it answers questions, notes changes, refuses to compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from airllm_nb.errors import UnsupportedError

# What may be asked of a tensor without its values.
QUESTIONS = frozenset((
    "__get__", "__set__", "__hash__", "__repr__", "__len__", "dim", "element_size", "is_complex", "is_contiguous",
    "is_floating_point", "ndimension", "nelement", "numel", "requires_grad_", "size", "stride",
))  # fmt: skip

NO_QUESTION = object()

Change = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""A function that changes a tensor in place, and its further arguments."""


class Away(nn.Parameter):
    """A parameter on meta. A change in place by numbers (RWKV rescales its layers) is noted in `changes`, to be made later.

    PyTorch itself would not do: a linear layer whose weight is on meta returns memory that nobody has written to. And some models
    ask a layer's weight where it is, to make their caches there.
    """

    label: str
    home: torch.device
    misuse = "outside of the layer it belongs to, while that is not in memory"
    remedy = "Load it with memory= large enough for all weights to stay."
    changes: list[Change]
    notes = True
    """Whether changes in place are noted, or refused."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where its layer computes."""
        return self.home

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], _types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (known := answer(func, args, kwargs or {})) is not NO_QUESTION:
            return known
        values = (*args[1:], *(kwargs or {}).values())
        numbers = not any(isinstance(value, torch.Tensor) for value in values)
        if in_place(func) and isinstance(args[0], Away) and args[0].notes and numbers:
            args[0].changes.append((func, args[1:], dict(kwargs or {})))
            return args[0]
        raise cls.refusal((*args[:1], *values))

    @classmethod
    def refusal(cls, values: Iterable[Any]) -> UnsupportedError:
        """Return the error that names those of a function's arguments that are away."""
        names = [value.label for value in values if isinstance(value, Away)]
        return UnsupportedError(
            f"This model uses {', '.join(names) or 'a weight'} {cls.misuse}.",
            cls.remedy,
        )


def answer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the answer to a question that needs no values; `NO_QUESTION` if `func` is none."""
    if func.__name__ in QUESTIONS:
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            known = func(*args, **kwargs)
        if func.__name__ != "__get__" or not isinstance(known, torch.Tensor):
            return known
    return NO_QUESTION


def in_place(func: Callable[..., Any]) -> bool:
    """Tell whether a function of PyTorch's changes its first argument, by its name."""
    return func.__name__.endswith("_") and not func.__name__.endswith("__")


def away(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, changes: list[Change], *, notes: bool = True
) -> Away:
    """Return the stand-in for a parameter that computes on `device`; notes what should be changed in `changes`, or refuses it."""
    parameter = Away(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=dtype.is_floating_point)
    parameter.label, parameter.home, parameter.changes, parameter.notes = name, device, changes, notes
    return parameter
