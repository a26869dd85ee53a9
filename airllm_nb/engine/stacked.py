"""What stands in for a stack of experts' matrices that are read when they are hit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch

from airllm_nb.engine.experts import ExpertStore, matrix_like
from airllm_nb.engine.packed_weight import packed_weight
from airllm_nb.engine.stack import Stack


class Stacked(Stack):
    """A parameter on meta whose single matrices a store has. Everything else is refused, as by any parameter that is away."""

    store: ExpertStore
    number: int
    notes = False

    def matrices(self, experts: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield each expert with its matrix, in whatever order they come."""
        meant = self.store.stacks[self.number].meant
        for expert, matrix in self.store.visit(self.number, experts):
            yield expert, packed_weight(self.label, matrix, meant) if meant else matrix

    def kept(self, expert: int, matrix: torch.Tensor) -> torch.Tensor:
        """Return a copy: the store's memory is used again."""
        stack = self.store.stacks[self.number]
        return copy.deepcopy(matrix) if stack.meant else matrix_like(stack, expert).copy_(matrix)


def stacked(store: ExpertStore, number: int, device: torch.device) -> Stacked:
    """Return the stand-in for one of a store's stacks."""
    stack = store.stacks[number]
    shape, dtype = (stack.meant.shape, stack.meant.dtype) if stack.meant else (stack.shape, stack.dtype)
    whole = torch.empty((len(stack.sources), *shape), dtype=dtype, device="meta")
    parameter = Stacked(whole, requires_grad=dtype.is_floating_point and not stack.meant)
    parameter.label, parameter.home, parameter.changes = stack.name, device, []
    parameter.store, parameter.number, parameter.turned, parameter.phase = store, number, False, stack.phase
    return parameter
