"""How others store quantized weights: which tensors belong together, what they must be, and what unpacks them.

A weight is read only if every tensor beside it is there, with just the dtype and shape that its config.json asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from airllm_nb.compat import compressed, quantization
from airllm_nb.engine.checkpoint import TensorEntry
from airllm_nb.engine.readable import AGAIN
from airllm_nb.engine.unpacking import WORD, Blocks, Codes, Float8, Gptq, MxFp4, OfShape, Outputs, Packed
from airllm_nb.errors import CheckpointError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Read = Callable[[TensorEntry], torch.Tensor]
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
        What quantized numbers are stored as. Others are plain weights, and so is what has nothing beside it in a dtype that
        weights have.
    read : callable or None
        Returns the bytes of a tensor. There is none where a model is planned from headers alone.
    """

    numbers = ".weight"
    becomes = ".weight"
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    def __init__(self, config: Mapping[str, Any], read: Read | None = None) -> None:
        self.config = dict(config)
        self.read = read

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


def made(
    name: str, shape: tuple[int, ...], numbers: TensorEntry, unpack: Callable[..., None], *companions: TensorEntry
) -> TensorEntry:
    """Return the entry of a weight that is unpacked from its numbers and their companions."""
    return replace(numbers, name=name, dtype=torch.uint8, shape=shape, unpack=unpack, companions=companions)


def require(entry: TensorEntry, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...], by: str = "config.json") -> None:
    """Refuse a tensor of another dtype or shape; `by` names what asks for it."""
    if entry.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(f"Tensor {entry.name} is {str(entry.dtype).removeprefix('torch.')} and should be {wanted}.", APART)
    if entry.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise CheckpointError(f"Tensor {entry.name} has shape {entry.shape}, and {by} asks for {wanted}.", APART)


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
        # In float32, and rounded once: as `Fp8Dequantize` of transformers 5.23 does.
        unpack = Blocks(Float8(numbers.dtype), (high, wide), factors.dtype, torch.float32)
        return made(name, (rows, columns), numbers, unpack, factors)


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
        return made(name, (experts, 2 * half * groups, rows), numbers, MxFp4(), exponents)


class CompressedTensors(Form):
    """The formats of the package compressed-tensors that store whole or float8 numbers: plainly, or packed into words."""

    dropped = (".input_scale", ".input_zero_point")

    def __init__(self, config: Mapping[str, Any], read: Read | None = None) -> None:
        super().__init__(config, read)
        group = next(iter(config["config_groups"].values()))
        self._weights = group["weights"]
        self._packed = compressed.stored_as(group, self.config) == compressed.PACKED
        symmetric = self._weights.get("symmetric") is not False
        zeros = () if symmetric else (".weight_zero_point",)
        self.optional = (".weight_zero_point",) if symmetric else ()  # which then are refused
        if self._packed:
            self.numbers, self.needed, self.dtypes = ".weight_packed", (".weight_shape", ".weight_scale", *zeros), (torch.int32,)
        else:
            self.needed = (".weight_scale", *zeros)
            self.dtypes = (torch.float8_e4m3fn if self._weights["type"] == "float" else torch.int8,)

    def weight(self, name: str, numbers: TensorEntry, beside: Mapping[str, TensorEntry]) -> TensorEntry:
        """See `Form.weight`."""
        if extra := [beside[ending].name for ending in self.optional if ending in beside]:
            raise CheckpointError(f"{extra[0]} is a zero point, and config.json says that there are none (symmetric).", APART)
        rows, columns = require_matrix(numbers)
        bits = self._weights["num_bits"]
        if self._packed:
            columns = columns * 32 // bits
        block, *shapes = self._block(rows, columns)
        grid = (-(-rows // block[0]), -(-columns // block[1])) if rows and columns else (0, 0)
        factors = beside[".weight_scale"]
        require(factors, FLOATS, *shapes)
        packed, zeros = Packed(bits, 1 << (bits - 1)), None
        if ".weight_zero_point" in self.needed:
            stored = beside[".weight_zero_point"]
            if self._packed:
                require(stored, (torch.int32,), (-(-grid[0] * bits // 32), grid[1]))
                zeros = packed.zeros_of_rows
            else:
                require(stored, (torch.int8,), *shapes)
                zeros = Codes(torch.int8).zeros
        # In the factors' own dtype: as `_dequantize` of compressed-tensors 0.20 does.
        codes = packed if self._packed else Codes(numbers.dtype) if numbers.dtype == torch.int8 else Float8(numbers.dtype)
        unpack: Callable[..., None] = Blocks(codes, block, factors.dtype, factors.dtype, zeros)
        if self._packed:
            shape = beside[".weight_shape"]
            require(shape, (torch.int64, torch.int32), (2,))
            unpack = OfShape(shape.name, shape.dtype, unpack)
        return made(name, (rows, columns), numbers, unpack, *(beside[ending] for ending in self.needed))

    def _block(self, rows: int, columns: int) -> tuple[Any, ...]:
        """Return how many rows and columns share a factor, and the shapes that the factors' tensor may have."""
        strategy, size = self._weights["strategy"], self._weights.get("group_size")
        if strategy == "tensor":
            return (max(rows, 1), max(columns, 1)), (), (1,), (1, 1)
        if strategy == "channel":
            return (1, max(columns, 1)), (rows, 1)
        if strategy == "group":
            if columns % size:
                raise CheckpointError(f"{columns} columns of a weight are no whole groups of {size}.", APART)
            return (1, size), (rows, columns // size)
        high, wide = self._weights["block_structure"]
        return (high, wide), (-(-rows // high), -(-columns // wide))


class Words(Form):
    """What GPTQ and AWQ have in common: words of eight numbers (or four), by inputs and outputs of a layer."""

    numbers = ".qweight"
    needed: tuple[str, ...] = (".scales", ".qzeros")
    dtypes = (torch.int32,)

    def __init__(self, config: Mapping[str, Any], read: Read | None = None) -> None:
        super().__init__(config, read)
        self._each = WORD // config["bits"]

    def _shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return how many inputs and outputs a matrix of words has."""
        raise NotImplementedError

    def _unpack(self, name: str, size: int, factor: torch.dtype) -> Blocks:
        raise NotImplementedError

    def weight(self, name: str, numbers: TensorEntry, beside: Mapping[str, TensorEntry]) -> TensorEntry:
        """See `Form.weight`."""
        inputs, outputs = self._shape(require_matrix(numbers))
        size = self.config["group_size"]
        size = max(inputs, 1) if size == -1 else size
        if inputs % size or outputs % self._each:
            raise CheckpointError(f"{numbers.name}: {inputs} inputs in groups of {size}, and {outputs} outputs.", APART)
        require(beside[".qzeros"], self.dtypes, (inputs // size, outputs // self._each))
        require(beside[".scales"], (torch.float16, torch.bfloat16), (inputs // size, outputs))
        if ".g_idx" in self.needed:
            require(beside[".g_idx"], (torch.int32,), (inputs,))
        unpack = self._unpack(numbers.name, size, beside[".scales"].dtype)
        return made(name, (outputs, inputs), numbers, unpack, *(beside[ending] for ending in self.needed))


class AutoGptq(Words):
    """GPTQ in 4 or 8 bits."""

    needed = (".scales", ".qzeros", ".g_idx")

    def _shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0] * self._each, shape[1]

    def _unpack(self, name: str, size: int, factor: torch.dtype) -> Blocks:
        second = quantization.GPTQ_V2 in (self.config.get("checkpoint_format"), self.config.get("format"))
        return Gptq(name, size, factor, self.config["bits"], any_order=self.config["desc_act"], less=0 if second else 1)


class AutoAwq(Words):
    """AWQ in 4 bits, with zero points."""

    def _shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0], shape[1] * self._each

    def _unpack(self, _name: str, size: int, factor: torch.dtype) -> Blocks:
        codes = Outputs()
        return Blocks(codes, (1, size), factor, factor, codes.zeros, by_column=True)
