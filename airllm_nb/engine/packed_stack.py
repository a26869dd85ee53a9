"""A parameter that stacks packed matrices, one for each expert: transformers' own functions get those that are hit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from airllm_nb.engine.packed_weight import Meant, PackedWeight, packed_weight
from airllm_nb.engine.stack import Stack


class PackedStack(Stack, PackedWeight):
    """Holds all its matrices, shape (experts, bytes). Functions that do not ask for single ones get all of them unpacked."""

    turned = False

    def matrices(self, experts: Sequence[int]) -> Iterator[tuple[int, PackedWeight]]:
        """Yield each expert with its matrix, packed."""
        for expert in experts:
            yield expert, packed_weight(self.label, self.memory[expert], self.meant._replace(shape=self.meant.shape[1:]))

    def kept(self, _expert: int, matrix: torch.Tensor) -> torch.Tensor:
        """Return the matrix itself, which stays as it is."""
        return matrix

    def dense(self) -> torch.Tensor:
        """Return all of the weights that are meant."""
        whole = torch.stack([matrix.dense() for _, matrix in self.matrices(range(len(self.memory)))])
        return whole.transpose(1, 2) if self.turned else whole


def packed_parameter(name: str, memory: torch.Tensor, meant: Meant) -> PackedWeight:
    """Return the parameter for a packed matrix, or a stack of them."""
    return packed_weight(name, memory, meant, PackedStack if memory.dim() > 1 else PackedWeight)
