"""The embedding read by rows: its matrix stays on disk, and of it only the rows that are looked up are read, each time anew."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional

from airllm_nb.engine.away import QUESTIONS, Away
from airllm_nb.engine.runtime import Runtime, unloaded
from airllm_nb.engine.weights import GroupReader, WeightGroup


class Rows(Away):
    """A matrix that is away for good: ``torch.nn.functional.embedding`` finds its rows, and nothing else may use it."""

    misuse = "otherwise than to look up rows, and only those are read from it"
    look_up: Callable[[torch.Tensor, int | None], torch.Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        # embedding itself sorts its arguments: ids and weight by position, the rest by name. max_norm changes the matrix.
        if func is functional.embedding and isinstance(args[1], Rows) and options.get("max_norm") is None:
            return args[1].look_up(args[0], options.get("padding_idx"))
        if func.__name__ in QUESTIONS:
            return super().__torch_function__(func, types, args, kwargs)
        raise cls.refusal((*args, *options.values()))


def attach(group: WeightGroup, groups: GroupReader, runtime: Runtime, device: torch.device) -> None:
    """Let the model look its embedding up on disk.

    Parameters
    ----------
    group : WeightGroup
        Holds the embedding's weight, of shape (ids, width), and nothing else.
    groups : GroupReader
        Reads its rows.
    runtime : Runtime
        Whose lock they are read under.
    device : torch.device
        Where they are needed.
    """
    (weight,) = group.weights.values()
    rows = Rows(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=True)
    rows.label, rows.home, rows.look_up = weight.name, device, _LookUp(group, groups, runtime, device)
    for place in weight.places:
        place.table[place.attribute] = rows


class _LookUp:
    """Reads rows. The group refers to it, and what frees a forgotten model to the group: so it must not hold the runtime."""

    def __init__(self, group: WeightGroup, groups: GroupReader, runtime: Runtime, device: torch.device) -> None:
        self._group = group
        self._groups = groups
        self._runtime = weakref.ref(runtime)
        self._device = device
        (weight,) = group.weights.values()
        self._shape, self._dtype = weight.shape, weight.dtype

    def __call__(self, ids: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
        """Return what the whole matrix would give for `ids`, of any shape: with one more axis, of the matrix' width.

        Raises
        ------
        IndexError
            If an id is outside of the matrix.
        CheckpointError
            If the file has changed or cannot be read.
        AirLLMError
            If the model was unloaded.
        """
        runtime = self._runtime()
        if runtime is None:
            raise unloaded()
        count, width = self._shape
        ids = ids.to("cpu")
        functional.embedding(ids, torch.empty((1, 1), device="cpu").expand(count, 1), padding_idx)  # refuses as it always does
        numbers, inverse = torch.unique(ids, return_inverse=True)
        rows = torch.empty((len(numbers), width), dtype=self._dtype, device="cpu")
        with runtime.lock:
            runtime.before_layer()
            self._read(numbers.tolist(), rows)
        rows = rows.to(self._device).requires_grad_()  # as the matrix, where gradients are on
        return functional.embedding(inverse.to(self._device), rows)

    def _read(self, numbers: list[int], into: torch.Tensor) -> None:
        """Read rows by their sorted numbers, neighbours at once."""
        begin = 0
        for end in range(1, len(numbers) + 1):
            if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
                self._groups.fill_rows(self._group, numbers[begin], into[begin:end])
                begin = end
