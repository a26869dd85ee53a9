"""What stands in for a stack of experts' matrices: transformers' own functions compute with it, and only hit experts are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from airllm_nb.compat.experts import GROUPED
from airllm_nb.engine.away import Away
from airllm_nb.engine.experts import ExpertStore, matrix_like


class Stacked(Away):
    """A parameter on meta of which single matrices are at hand: by index, or for the groups of a grouped multiplication.

    Whatever implementation of experts transformers has chosen runs as it is, and so computes what it would with the whole stack.
    Everything else is refused, as by any parameter that is away.
    """

    store: ExpertStore
    number: int
    turned: bool
    notes = False

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = {name: value for name, value in (kwargs or {}).items() if value is not None}
        match func.__name__, args:
            case name, (rows, Stacked() as stack) if name in GROUPED and options.keys() == {"offs"}:
                return _grouped(func, rows, stack, options["offs"])
            case "__getitem__", (Stacked(turned=False) as stack, index) if (experts := _index(index)) is not None:
                return _pick(stack, experts)
            case "transpose", (Stacked() as stack, *axes) if sorted(axes) in ([-2, -1], [1, 2]):
                return _turned(stack)
            case "data_ptr", (Stacked() as stack,):  # older versions of PyTorch need to know how it is aligned
                return stack.store.stacks[stack.number].phase
        return super().__torch_function__(func, types, args, kwargs)


def stacked(store: ExpertStore, number: int, device: torch.device) -> Stacked:
    """Return the stand-in for one of a store's stacks."""
    stack = store.stacks[number]
    shape = (len(stack.sources), *stack.shape)
    parameter = Stacked(torch.empty(shape, dtype=stack.dtype, device="meta"), requires_grad=stack.dtype.is_floating_point)
    parameter.label, parameter.home, parameter.changes = stack.name, device, []
    parameter.store, parameter.number, parameter.turned = store, number, False
    return parameter


def _turned(stack: Stacked) -> Stacked:
    count, rows, columns = stack.shape
    other = Stacked(torch.empty((count, columns, rows), dtype=stack.dtype, device="meta"), requires_grad=stack.requires_grad)
    vars(other).update(vars(stack) | {"turned": not stack.turned})
    return other


def _grouped(func: Callable[..., Any], rows: torch.Tensor, stack: Stacked, ends: torch.Tensor) -> torch.Tensor:
    """Multiply each group of rows with its expert's matrix, by the same function that would do it with all of them."""
    groups, begin = {}, 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            groups[expert] = slice(begin, end)
        begin = max(begin, end)
    result = None
    for expert, matrix in stack.store.visit(stack.number, list(groups)):
        group = groups[expert]
        one = (matrix.transpose(-2, -1) if stack.turned else matrix)[None]
        part = func(rows[group], one, offs=ends.new_tensor([group.stop - group.start]))
        if result is None:  # rows may be apart: what follows takes other ways for one piece of memory
            result = torch.empty_strided((len(rows), part.shape[1]), part.stride(), dtype=part.dtype, device=part.device)
        result[group] = part
    return rows.new_empty((len(rows), stack.shape[2])) if result is None else result


def _index(index: Any) -> int | list[int] | None:
    """Return which experts an index means; None if it means anything else."""
    if isinstance(index, torch.Tensor) and index.dim() <= 1 and not (index.is_floating_point() or index.dtype == torch.bool):
        index = index.tolist()
    return index if isinstance(index, (int, list)) and not isinstance(index, bool) else None


def _pick(stack: Stacked, index: int | list[int]) -> torch.Tensor:
    """Return copies: whoever asks may keep them."""
    count = len(stack)
    asked = [index] if isinstance(index, int) else index
    if any(not -count <= expert < count for expert in asked):
        raise IndexError(f"{stack.label} has {count} experts, and expert {max(asked, key=abs)} was asked for.")
    asked = [expert % count for expert in asked]
    source = stack.store.stacks[stack.number]
    if isinstance(index, int):
        result = matrix_like(source, asked[0])[None]
    else:
        result = torch.empty((len(asked), *source.shape), dtype=source.dtype, device="cpu")
    for expert, matrix in stack.store.visit(stack.number, list(dict.fromkeys(asked))):
        for row, wanted in enumerate(asked):
            if wanted == expert:
                result[row] = matrix
    return result[0] if isinstance(index, int) else result
