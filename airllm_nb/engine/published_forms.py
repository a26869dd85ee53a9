"""How others store quantized weights: which tensors belong together, what they must be, and what unpacks them.

A weight is read only if every tensor beside it is there, with just the dtype and shape that its config.json asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from airllm_nb.engine.checkpoint import TensorEntry
from airllm_nb.engine.readable import AGAIN
from airllm_nb.engine.unpacking import Blocks, MxFp4
from airllm_nb.errors import CheckpointError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
APART = "The weights and config.json do not belong together. " + AGAIN


class Form:
    """A way of storing weights.

    Attributes
    ----------
    numbers : str
        How the name of the tensor ends that holds the numbers.
    becomes : str
        How the name of the weight ends that it becomes.
    needed, optional : tuple of str
        How the names of those end that it is unpacked with.
    dropped : tuple of str
        How the names of those end that serve quantized activations: transformers drops them where it dequantizes.
    dtypes : tuple of torch.dtype
        What quantized numbers are stored as. Others are plain weights.
    """

    numbers = ".weight"
    becomes = ".weight"
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def weight(self, name: str, numbers: TensorEntry, beside: Mapping[str, TensorEntry]) -> TensorEntry:
        """Return the weight that some tensors become.

        Parameters
        ----------
        name : str
            Of the weight.
        numbers : TensorEntry
            The tensor that holds its numbers.
        beside : mapping of str to TensorEntry
            Those that belong to it, by how their names end.

        Raises
        ------
        CheckpointError
            If they do not fit.
        """
        raise NotImplementedError


def _made(
    name: str, shape: tuple[int, ...], numbers: TensorEntry, unpack: Callable[..., None], *companions: TensorEntry
) -> TensorEntry:
    return replace(numbers, name=name, dtype=torch.uint8, shape=shape, unpack=unpack, companions=companions)


def require(entry: TensorEntry, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]) -> None:
    """Refuse a tensor of another dtype or shape."""
    if entry.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(f"Tensor {entry.name} is {str(entry.dtype).removeprefix('torch.')} and should be {wanted}.", APART)
    if entry.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise CheckpointError(f"Tensor {entry.name} has shape {entry.shape}, and config.json asks for {wanted}.", APART)


def require_matrix(entry: TensorEntry) -> tuple[int, int]:
    """Return the shape of a matrix; refuse what is none."""
    if len(entry.shape) != 2:  # noqa: PLR2004
        raise CheckpointError(f"Tensor {entry.name} has shape {entry.shape} and should be a matrix.", APART)
    rows, columns = entry.shape
    return rows, columns


class Fp8(Form):
    """float8 weights, with one factor for each block of them, or for all."""

    needed = (".weight_scale_inv",)
    dropped = (".activation_scale",)
    dtypes = (torch.float8_e4m3fn,)
    BLOCK = (128, 128)
    """Where config.json does not say."""

    def weight(self, name: str, numbers: TensorEntry, beside: Mapping[str, TensorEntry]) -> TensorEntry:
        """See `Form.weight`."""
        rows, columns = require_matrix(numbers)
        (factors,) = (beside[ending] for ending in self.needed)
        block = self.config.get("weight_block_size", self.BLOCK)
        if block is None:
            require(factors, FLOATS, (), (1,), (1, 1))
            high, wide = max(rows, 1), max(columns, 1)
        else:
            high, wide = block
            require(factors, FLOATS, (-(-rows // high), -(-columns // wide)))
        return _made(name, (rows, columns), numbers, Blocks(numbers.dtype, factors.dtype, (high, wide)), factors)


class GptOss(Form):
    """mxfp4: the experts' stacks of gpt-oss."""

    numbers = "_blocks"
    becomes = ""
    needed = ("_scales",)
    dtypes = (torch.uint8,)

    def weight(self, name: str, numbers: TensorEntry, beside: Mapping[str, TensorEntry]) -> TensorEntry:
        """See `Form.weight`."""
        exponents = beside["_scales"]
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")) or len(numbers.shape) != 4:  # noqa: PLR2004
            raise CheckpointError(f"Tensor {numbers.name} of shape {numbers.shape} is no stack of experts of gpt-oss.", APART)
        experts, rows, groups, half = numbers.shape
        require(numbers, self.dtypes, (experts, rows, groups, MxFp4.GROUP // 2))
        require(exponents, self.dtypes, (experts, rows, groups))
        return _made(name, (experts, 2 * half * groups, rows), numbers, MxFp4(), exponents)


FORMS: dict[str, type[Form]] = {"fp8": Fp8, "mxfp4": GptOss}
"""By the ``quant_method`` of config.json."""
