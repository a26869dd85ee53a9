"""What bitsandbytes writes beside a weight of four bits, as JSON in a tensor of bytes: shape, dtype, size of a block.

Those bytes come with a file that anybody may have written: they are read to the last field, or refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from airllm_nb.compat.fields import Check, one_of
from airllm_nb.engine.checkpoint import json_object
from airllm_nb.engine.readable import AGAIN
from airllm_nb.errors import CheckpointError

MOST = 4096
"""Bytes that such a tensor may have. bitsandbytes writes less than 200."""
SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The sizes of a block that it knows."""
NESTED = 256
"""How many blocks share a factor where their factors are quantized, too: it writes no other size, and one of its kernels asks for
none."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class QuantState:
    """What a weight of four bits was.

    Attributes
    ----------
    shape : tuple of int
        Rows and columns.
    dtype : torch.dtype
        What its numbers are rounded to when they are dequantized.
    size : int
        How many numbers share a factor, counted through all rows.
    offset : float or None
        What is added to each factor, where the factors are quantized, too.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    size: int
    offset: float | None

    @classmethod
    def of(cls, raw: bytes, name: str, kind: str, *, nested: bool) -> QuantState:
        """Parse the bytes of a tensor.

        Parameters
        ----------
        raw : bytes
            JSON, as ``pack_dict_to_tensor`` of bitsandbytes writes it.
        name : str
            Of the tensor, for errors.
        kind : {"nf4", "fp4"}
            What the numbers must stand for.
        nested : bool
            Whether the factors must be quantized, too.

        Raises
        ------
        CheckpointError
            If a field is missing, unknown, or has a value that makes no sense.
        """
        said = json_object(raw, name)
        checks = _checks(kind) | (NESTED_CHECKS if nested else {})
        for field in (*checks, *said):
            if field not in said:
                raise CheckpointError(f"{name} does not say {field}.", AGAIN)
            if field not in checks or not checks[field](said[field]):
                raise CheckpointError(f"{name} says {field} {str(said[field])[:60]!r}, which this engine does not read.", AGAIN)
        rows, columns = said["shape"]
        return cls((rows, columns), DTYPES[said["dtype"]], said["blocksize"], said["nested_offset"] if nested else None)

    @property
    def blocks(self) -> int:
        """How many factors there are; the last block may be smaller."""
        return -(-math.prod(self.shape) // self.size)


def _shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)  # noqa: PLR2004


def _number(value: Any) -> bool:
    """Allow what float32 holds."""
    return type(value) is float and abs(value) <= torch.finfo(torch.float32).max


def _checks(kind: str) -> dict[str, Check]:
    return {"quant_type": one_of(kind), "blocksize": one_of(*SIZES), "dtype": one_of(*DTYPES), "shape": _shape}


NESTED_CHECKS: dict[str, Check] = {
    "nested_blocksize": one_of(NESTED), "nested_dtype": one_of("float32"), "nested_offset": _number,
}  # fmt: skip
