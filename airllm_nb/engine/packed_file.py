"""A file of packed weights: what it is called, how large it is and where each weight lies is known before it exists."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from airllm_nb.engine.checkpoint import DTYPES, FileState, TensorEntry, parse_header
from airllm_nb.engine.packed_key import VERSION
from airllm_nb.engine.weights import ALIGN, Weight, as_bytes

TEMPORARY = ".part"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PackedFile:
    """The file of a layer, or of the head: where it is (or will be), its header, and its tensors."""

    path: Path
    header: bytes
    entries: tuple[TensorEntry, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(entry.nbytes for entry in self.entries)

    def state(self) -> FileState | None:
        """Return the state of the file; None if it is not there, or not whole."""
        try:
            with self.path.open("rb") as file:
                state = FileState.of(self.path.stat())
                return state if state.size == self.size and file.read(len(self.header)) == self.header else None
        except OSError:
            return None

    def write(self, tensors: Iterable[torch.Tensor]) -> None:
        """Put it in place, as a whole."""
        temporary = self.path.with_suffix(TEMPORARY)
        try:
            with temporary.open("wb") as out:
                out.write(self.header)
                for tensor in tensors:
                    out.write(as_bytes(tensor))
                out.flush()
                os.fsync(out.fileno())  # or a power failure could leave the name without the content
            temporary.replace(self.path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def packed_file(path: Path, tensors: Mapping[str, Weight], key: str) -> PackedFile:
    """Return the file that holds weights by the names that it gives them, of a model of this key."""
    header: dict[str, object] = {"__metadata__": {"airllm_nb": str(VERSION), "model": key}}
    begin = 0
    for name, weight in tensors.items():
        end = begin + weight.nbytes
        header[name] = {"dtype": NAMES[weight.dtype], "shape": weight.shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)  # so that weights can be mapped where they lie
    raw = len(text).to_bytes(8, "little") + text
    return PackedFile(path, raw, tuple(parse_header(raw, len(raw) + begin, path)))
