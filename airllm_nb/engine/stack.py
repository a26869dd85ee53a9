"""Stands for a stack of experts' matrices: transformers' own functions compute with it, and only get those that are hit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from airllm_nb.compat.experts import GROUPED
from airllm_nb.engine.away import NO_QUESTION, Away
from airllm_nb.engine.packed_weight import PackedWeight


class Stack(Away):
    """A parameter on meta of which single matrices are at hand: by index, or for the groups of a grouped multiplication."""

    turned: bool
    """Whether rows and columns have changed places."""
    phase = 0
    """Where in a line of `weights.ALIGN` bytes the whole stack would begin."""

    def matrices(self, experts: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield each of some experts, once, with its matrix (never turned), which is valid until the next step."""
        raise NotImplementedError

    def kept(self, expert: int, matrix: torch.Tensor) -> torch.Tensor:
        """Return such a matrix so that it stays valid."""
        raise NotImplementedError

    def other_way(self) -> Stack:
        """Return the stack with rows and columns changed."""
        count, rows, columns = self.shape
        whole = torch.empty((count, columns, rows), dtype=self.dtype, device="meta")
        other = type(self)(whole, requires_grad=self.requires_grad)
        vars(other).update(vars(self) | {"turned": not self.turned})
        return other

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (found := _at_hand(func, args, kwargs or {})) is not NO_QUESTION:
            return found
        return super().__torch_function__(func, types, args, kwargs)


def _at_hand(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what `func` gives, if it needs no more than single matrices; otherwise `NO_QUESTION`.

    Whatever implementation of experts transformers has chosen runs as it is, and so computes what it would with the whole stack.
    """
    options = {name: value for name, value in kwargs.items() if value is not None}
    match func.__name__, args:
        case name, (rows, Stack() as stack) if name in GROUPED and options.keys() == {"offs"}:
            return _grouped(func, rows, stack, options["offs"])
        case "__getitem__", (Stack(turned=False) as stack, index) if (experts := _index(index)) is not None:
            return _pick(stack, experts)
        case "transpose", (Stack() as stack, *axes) if sorted(axes) in ([-2, -1], [1, 2]):
            return stack.other_way()
        case "data_ptr", (Stack() as stack,):  # older versions of PyTorch need to know how it is aligned
            return stack.phase
    return NO_QUESTION


def _grouped(func: Callable[..., Any], rows: torch.Tensor, stack: Stack, ends: torch.Tensor) -> torch.Tensor:
    """Multiply each group of rows with its expert's matrix, by the same function that would do it with all of them."""
    groups, begin = {}, 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            groups[expert] = slice(begin, end)
        begin = max(begin, end)
    result = None
    for expert, matrix in stack.matrices(list(groups)):
        group = groups[expert]
        part = _product(func, rows[group], matrix, ends, turned=stack.turned)
        if result is None:  # rows may be apart: what follows takes other ways for one piece of memory
            result = torch.empty_strided((len(rows), part.shape[1]), part.stride(), dtype=part.dtype, device=part.device)
        result[group] = part
    return rows.new_empty((len(rows), stack.shape[2])) if result is None else result


def _product(
    func: Callable[..., Any], rows: torch.Tensor, matrix: torch.Tensor, ends: torch.Tensor, *, turned: bool
) -> torch.Tensor:
    if isinstance(matrix, PackedWeight) and turned:  # as a linear layer has it: there is a kernel
        return linear(rows, matrix)
    one = matrix.transpose(-2, -1) if turned else matrix
    product: torch.Tensor = func(rows, one[None], offs=ends.new_tensor([len(rows)]))
    return product


def _index(index: Any) -> int | list[int] | None:
    """Return which experts an index means; None if it means anything else."""
    if isinstance(index, torch.Tensor) and index.dtype in (torch.int32, torch.int64):  # of others, some are masks
        index = index.tolist()
    numbers = index if isinstance(index, list) else [index]
    return index if all(type(number) is int for number in numbers) else None


def _pick(stack: Stack, index: int | list[int]) -> torch.Tensor:
    """Return what whoever asks may keep."""
    count = len(stack)
    asked = [index] if isinstance(index, int) else index
    if any(not -count <= expert < count for expert in asked):
        raise IndexError(f"{stack.label} has {count} experts, and expert {max(asked, key=abs)} was asked for.")
    asked = [expert % count for expert in asked]
    if isinstance(index, int):
        (one,) = [stack.kept(expert, matrix) for expert, matrix in stack.matrices(asked)]
        return one
    result = torch.empty((len(asked), *stack.shape[1:]), dtype=stack.dtype, device=stack.device)
    for expert, matrix in stack.matrices(list(dict.fromkeys(asked))):
        for row, wanted in enumerate(asked):
            if wanted == expert:
                result[row] = matrix
    return result
