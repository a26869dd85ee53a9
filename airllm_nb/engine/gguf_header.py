"""The header of a GGUF file: what the model is, and where each tensor lies; every length is checked before it is believed.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package ``gguf`` maps the file to read it (which a
truncation meanwhile makes a SIGBUS), and takes lists of many billions for what they say.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from airllm_nb.compat.gguf_rotary import TENSORS, Values
from airllm_nb.engine.readable import AGAIN, MOST
from airllm_nb.errors import CheckpointError, UnsupportedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32
MOST_TEXT = 16 << 20
"""Bytes of one string. The longest known, chat templates, have some 20,000."""
MOST_DIMENSIONS = 4
MOST_FACTORS = 1 << 12
"""Numbers of a rotary embedding's factors. The largest heads that are known have 256, and half of that."""
Value = str | int | float | None


class HeaderEndsError(CheckpointError):
    """There is less of a header than it says."""


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies: `nbytes` bytes from `offset` of the file, quantized as `kind`, a ``gguf.GGMLQuantizationType``."""

    name: str
    kind: Any
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself: its fields by name (None for lists, which only the tokenizer has), and its tensors."""

    fields: dict[str, Value]
    tensors: tuple[GGUFTensor, ...]

    @property
    def architecture(self) -> str:
        """The model's, as the file names it."""
        return str(self.fields.get("general.architecture"))


def read_factors(header: Header, name: str, read: Callable[[int, int], bytes]) -> dict[str, Values]:
    """Read the tensors that belong to no parameter, but into the config: factors of the rotary embedding.

    Parameters
    ----------
    header : Header
        The file's.
    name : str
        How errors call it.
    read : callable
        Returns the file's bytes from an offset on, so many as asked for.

    Returns
    -------
    dict of str to numpy.ndarray
        By name; float32, flat.

    Raises
    ------
    CheckpointError
        If one is not of that kind, or not there.
    """
    found = {}
    for tensor in header.tensors:
        if tensor.name not in TENSORS:
            continue
        if tensor.kind.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > MOST_FACTORS:
            raise CheckpointError(
                f"{name} is damaged: it holds {tensor.name} as {tensor.kind.name} of shape {tensor.shape}, not as factors.",
                AGAIN,
            )
        if len(raw := read(tensor.offset, tensor.nbytes)) != tensor.nbytes:
            raise CheckpointError(f"{name} is truncated: it ends within {tensor.name}.", AGAIN)
        found[tensor.name] = np.frombuffer(raw, np.dtype("<f4"))
    return found


def read_header(file: BinaryIO, name: str, size: int) -> Header:
    """Read the header of a GGUF file.

    Parameters
    ----------
    file : binary file
        At its beginning.
    name : str
        How errors call it.
    size : int
        Bytes of the whole file, of which there may be less here.

    Raises
    ------
    CheckpointError
        If it is no GGUF file, truncated, or makes no sense.
    UnsupportedError
        If a tensor is quantized in a way that the installed ``gguf`` does not unpack.
    """
    return _Parser(file, name, size).header()


class _Parser:
    def __init__(self, file: BinaryIO, name: str, size: int) -> None:
        self._file = file
        self._name = name
        self._size = size

    def header(self) -> Header:
        if self._file.read(4) != MAGIC:
            raise CheckpointError(f"{self._name} is no GGUF file.", AGAIN)
        version = self._number("<I")
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise UnsupportedError(
                f"{self._name} was written for computers with another order of bytes.", "Use the usual file of this model."
            )
        if version not in VERSIONS:
            raise CheckpointError(f"{self._name} is a GGUF file of version {version}; known are 2 and 3.", AGAIN)
        tensors, fields = self._number("<Q"), self._number("<Q")
        found: dict[str, Value] = {}
        for _ in range(fields):
            key = self._text()
            if key in found:
                raise self._damaged(f"it says {key} twice")
            found[key] = self._value(self._number("<I"))
        infos = [self._info() for _ in range(tensors)]
        alignment = found.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self._damaged(f"its alignment is {alignment}")
        start = -(-self._file.tell() // alignment) * alignment
        described = tuple(self._tensor(*info, start) for info in infos)
        if len({tensor.name for tensor in described}) < len(described):
            raise self._damaged("it holds two tensors of one name")
        expected = start
        for tensor in described:  # as llama.cpp demands it: an offset that is damaged would be another tensor's
            if tensor.offset != expected:
                raise self._damaged(f"{tensor.name} begins at byte {tensor.offset}, and the one before it ends at {expected}")
            expected += -(-tensor.nbytes // alignment) * alignment
        return Header(found, described)

    def _number(self, form: str) -> int:
        number: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return number

    def _text(self) -> str:
        if (length := self._number("<Q")) > MOST_TEXT:
            raise self._damaged(f"one of its texts has {length} bytes")
        text = self._take(length).decode(errors="replace")
        self._require_short()  # each field and each tensor has a name
        return text

    def _value(self, kind: int) -> Value:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            self._skip_list(self._number("<I"), self._number("<Q"))
            return None
        return self._number(self._form(kind))

    def _skip_list(self, kind: int, length: int) -> None:
        if kind == STRING:
            for _ in range(length):  # each takes 8 bytes at least: no more of them than the file has room for
                self._skip(self._number("<Q"))
        else:
            self._skip(length * struct.calcsize(self._form(kind)))

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._text(), self._number("<I")
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise self._damaged(f"{name} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))
        return name, shape[::-1], self._number("<I"), self._number("<Q")

    def _tensor(self, name: str, shape: tuple[int, ...], number: int, offset: int, start: int) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES

        kind = self._kind(name, number)
        numbers, nbytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % numbers or not all(shape):
            raise self._damaged(f"{name} has rows of {shape[-1]} numbers, and {kind.name} blocks of {numbers}")
        size = math.prod(shape) // numbers * nbytes
        if start + offset + size > self._size:
            raise CheckpointError(f"{self._name} is truncated: {name} lies beyond its end.", AGAIN)
        return GGUFTensor(name, kind, shape, start + offset, size)

    def _kind(self, name: str, number: int) -> Any:
        """Return the quantization of a number that the installed package can unpack."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        kind: Any = None
        try:
            kind = GGMLQuantizationType(number)
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise UnsupportedError(
                f"{self._name} holds {name} as {kind.name if kind else f'quantization {number}'}, which the package gguf "
                f"{importlib.metadata.version('gguf')} does not unpack.",
                "%pip install -U gguf  and restart the kernel, or use another file of this model.",
            ) from error
        return kind

    def _form(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self._damaged(f"it has a field of the unknown type {kind}")
        return SCALARS[kind]

    def _take(self, count: int) -> bytes:
        if len(taken := self._file.read(count)) < count:
            raise self._truncated()
        return taken

    def _skip(self, count: int) -> None:
        if self._file.tell() + count > self._size:
            raise self._truncated()
        self._file.seek(count, os.SEEK_CUR)
        self._require_short()

    def _require_short(self) -> None:
        """Refuse what nobody has memory or time for: a list in a file with a hole takes no room on the disk."""
        if self._file.tell() > MOST:
            raise self._damaged(f"its header has more than {MOST} bytes, which none needs")

    def _truncated(self) -> CheckpointError:
        return HeaderEndsError(f"{self._name} is truncated: it ends within its header.", AGAIN)

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._name} is damaged: {why}.", AGAIN)
