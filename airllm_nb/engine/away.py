"""What stands in for a parameter while its layer is not in memory: it answers questions, and refuses to compute."""

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


class Away(nn.Parameter):
    """A parameter on meta.

    PyTorch itself would not do: a linear layer whose weight is on meta returns memory that nobody has written to. And some models
    ask a layer's weight where it is, to make their caches there.
    """

    label: str
    home: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where its layer computes."""
        return self.home

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], _types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.__name__ in QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
                answer = func(*args, **(kwargs or {}))
            if func.__name__ != "__get__" or not isinstance(answer, torch.Tensor):
                return answer
        names = [value.label for value in (*args, *(kwargs or {}).values()) if isinstance(value, Away)]
        raise UnsupportedError(
            f"This model uses {', '.join(names) or 'a weight'} outside of the layer it belongs to, while that is not in memory.",
            "Load it with memory= large enough for all layers to stay.",
        )


def away(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Away:
    """Return the stand-in for a parameter that computes on `device`."""
    parameter = Away(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=dtype.is_floating_point)
    parameter.label, parameter.home = name, device
    return parameter
