"""A checkpoint's tensors, where they lie in its published safetensors files. Nothing is split, copied or mapped.

The format is 8 bytes (little endian: the header's length), a JSON header, then the tensors' bytes:
https://github.com/huggingface/safetensors#format. The header is parsed here, and not through the safetensors package, because
the engine needs what that does not tell (each tensor's offset) and must not do what it does: map the file. A mapped file that
is truncated underneath kills the process with SIGBUS.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from airllm_nb.engine.hub import INDEX, MAX_HEADER, SINGLE
from airllm_nb.engine.readable import AGAIN, opened, reading, require_readable
from airllm_nb.errors import CheckpointError

MOST_DIMENSIONS = 64
"""PyTorch's own limit. The number of elements of a shape with a million dimensions takes minutes to calculate."""

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes from `offset` of `file`, in C order.

    Those of a tensor that is to be unpacked (its `dtype` is uint8 then) become numbers by ``unpack(bytes, into)``, and if other
    tensors are needed for that, the `companions`, by ``unpack(bytes, into, bytes of each of them)``.

    Where its shape stands in a companion that was not read, for planning from headers alone, it is `shapeless`: of its `shape`
    only the number of elements counts, which may be one too large.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    unpack: Callable[..., None] | None = field(default=None, compare=False)
    companions: tuple[TensorEntry, ...] = ()
    shapeless: bool = False

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        """All that must be read for it."""
        return (self, *self.companions)

    def rows(self, first: int, count: int) -> TensorEntry:
        """Return `count` of its rows (of a stack: its matrices) from `first` on; companions must have as many as itself."""
        assert all(companion.shape[0] == self.shape[0] for companion in self.companions)
        size = self.nbytes // self.shape[0]
        return replace(
            self, shape=(count, *self.shape[1:]), offset=self.offset + first * size, nbytes=count * size,
            companions=tuple(companion.rows(first, count) for companion in self.companions),
        )  # fmt: skip


@dataclass(frozen=True)
class FileState:
    """What a file must still be when it is read: size in bytes, times in ns, inode, device.

    The time of change (of its metadata; on Windows of its creation) shows a rewrite that put the modification time back.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileState:
        """Take the state from a ``stat`` result."""
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)


class Checkpoint(Mapping[str, TensorEntry]):
    """The tensors of a checkpoint folder by name.

    Parameters
    ----------
    folder : Path
        Holds ``config.json`` and either ``model.safetensors`` or an index with the shards it names.
    headers : mapping of str to (int, bytes), optional
        For planning without the weights: size and first bytes (length and header) of every safetensors file.

    Raises
    ------
    CheckpointError
        If a file is missing, damaged, inconsistent with the index, or only a pickle.
    """

    def __init__(self, folder: Path, headers: Mapping[str, tuple[int, bytes]] | None = None) -> None:
        self.folder = folder
        self.states: dict[Path, FileState] = {}
        self._entries: dict[str, TensorEntry] = {}
        require_readable(folder)
        # Where a folder has both, transformers takes the single file.
        names, index = _files(folder, single=(folder / SINGLE).is_file() if headers is None else SINGLE in headers)
        for name in names:
            path = folder / name
            if headers is None:
                raw, state = _read_header(path)
                self.states[path] = state
                size = state.size
            else:
                size, raw = headers[name]
            for entry in parse_header(raw, size, path):
                if entry.name in self._entries:
                    other = self._entries[entry.name].file.name
                    raise CheckpointError(f"{path.name} and {other} both hold tensor {entry.name}.", AGAIN)
                self._entries[entry.name] = entry
        for tensor, name in index.items():
            if tensor not in self._entries or self._entries[tensor].file != folder / name:
                raise CheckpointError(f"{INDEX} says that {tensor} is in {name}, which does not hold it.", AGAIN)

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def joined(self, entries: Iterable[TensorEntry], states: Mapping[Path, FileState]) -> Checkpoint:
        """Return a checkpoint that has tensors of other files too, which are in these states (if they are there already)."""
        other = copy.copy(self)
        other.states = {**self.states, **states}
        other._entries = {**self._entries, **{entry.name: entry for entry in entries}}  # noqa: SLF001  # our own
        return other

    def holding(self, entries: Iterable[TensorEntry]) -> Checkpoint:
        """Return a checkpoint of the same files that has these tensors and no others."""
        other = copy.copy(self)
        other._entries = {entry.name: entry for entry in entries}  # noqa: SLF001  # our own
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(part.nbytes for entry in self.values() for part in entry.stored)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that holds most of the bytes."""
        total: dict[torch.dtype, int] = {}
        for entry in self.values():
            if entry.dtype.is_floating_point:
                total[entry.dtype] = total.get(entry.dtype, 0) + entry.nbytes
        return max(total, key=total.__getitem__) if total else torch.float32


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a checkpoint folder.

    Raises
    ------
    CheckpointError
        If there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}.", "Check the path, or name a model of the hub as org/name.")
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json.", "Name the folder that holds config.json and the .safetensors files of a model."
        )
    with reading(path):
        raw = path.read_bytes()
    return json_object(raw, path.name)


def _files(folder: Path, *, single: bool) -> tuple[list[str], dict[str, str]]:
    """Return the names of the safetensors files, and the index (tensor name -> file name; empty for a single file)."""
    if (folder / INDEX).is_file() and not single:
        with reading(folder / INDEX):
            raw = (folder / INDEX).read_bytes()
        index = json_object(raw, INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            raise CheckpointError(f"{INDEX} has no usable weight_map.", AGAIN)
        names = sorted(set(index.values()))
        for name in names:
            if Path(name).name != name or "\0" in name:  # "../elsewhere" or an absolute path
                raise CheckpointError(f"{INDEX} names a file outside the checkpoint: {name!r}.", AGAIN)
        return names, index
    pickles = [] if single else sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:2])}), and loading a pickle can run any code.",
            "Convert it once where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder).",
        )
    return [SINGLE], {}


def _read_header(path: Path) -> tuple[bytes, FileState]:
    """Read the length and the header of a file, and what the file is now."""
    try:
        with io.BufferedReader(opened(path)) as file:
            state = FileState.of(path.stat())  # by name, as it is checked later
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(MAX_HEADER, state.size - 8):  # noqa: PLR2004  # the format's 8 bytes
                raise CheckpointError(f"{path.name} is truncated, or no safetensors file: its header does not fit.", AGAIN)
            return start + file.read(length), state
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is missing in {path.parent}.", AGAIN) from error
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror}).", AGAIN) from error


def parse_header(raw: bytes, size: int, path: Path) -> list[TensorEntry]:
    """Parse the first bytes of a safetensors file.

    Parameters
    ----------
    raw : bytes
        The 8 bytes of the length, and the header.
    size : int
        Size of the whole file in bytes.
    path : Path
        The file: kept in the entries, and named in errors.

    Returns
    -------
    list of TensorEntry
        In file order. Together they cover the file's data exactly once.
    """
    start = len(raw)
    header = json_object(raw[8:], path.name)
    header.pop("__metadata__", None)
    entries = []
    for name, info in header.items():
        try:
            dtype, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
            whole = len(shape) <= MOST_DIMENSIONS and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise CheckpointError(f"{path.name} describes tensor {name!r} in a way that makes no sense.", AGAIN)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(
                f"{path.name} holds {name} as {dtype}, which this engine does not know.",
                "Use a checkpoint of this model in bfloat16, float16 or float32.",
            )
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise CheckpointError(f"{path.name} gives {name} {end - begin} bytes, which is not its shape {shape}.", AGAIN)
        entries.append(TensorEntry(name, DTYPES[dtype], shape, path, start + begin, end - begin))
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    position = start
    for entry in entries:
        if entry.offset != position:
            raise CheckpointError(f"{path.name} has a gap or an overlap before tensor {entry.name}.", AGAIN)
        position += entry.nbytes
    if position != size:
        raise CheckpointError(
            f"{path.name} has {size} bytes and its header describes {position}: it is truncated or not what it says.", AGAIN
        )
    return entries


def json_object(raw: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys; `name` is for errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Refuse duplicate keys: two readers could take different ones."""
        if len(found := dict(pairs)) != len(pairs):
            raise ValueError("duplicate keys")
        return found

    try:
        value = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is damaged: its JSON cannot be read ({error}).", AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is damaged: it is no JSON object.", AGAIN)
    return value
