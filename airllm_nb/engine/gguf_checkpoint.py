"""A GGUF file as a checkpoint: its tensors are unpacked as they are read; its config and tokenizer are written out once."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from airllm_nb.compat import config as compat_config
from airllm_nb.compat import gguf_files
from airllm_nb.compat.gguf_exact import require_exact, settings
from airllm_nb.compat.gguf_rotary import Values
from airllm_nb.engine import gguf_blocks, gguf_grid
from airllm_nb.engine.checkpoint import Checkpoint, FileState, TensorEntry, read_config
from airllm_nb.engine.conversion import convert
from airllm_nb.engine.gguf_header import GGUFTensor, Header, read_factors, read_header
from airllm_nb.engine.gguf_parts import part_paths, require_whole
from airllm_nb.engine.home import GGUF_FOLDER, cache_home, describe
from airllm_nb.engine.meta import empty_model
from airllm_nb.engine.packed import Packing
from airllm_nb.engine.published import unpacked
from airllm_nb.engine.readable import AGAIN, opened, reading
from airllm_nb.errors import AirLLMError, CheckpointError, UnsupportedError

HEAD = "output.weight"
VERSION = "3"  # counted up when the same file gives other ones
DIGITS = 12
PIECE = 1 << 18
"""Numbers that are unpacked at once: between them lie several copies, which should stay in the processor's cache."""
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GGUFCheckpoint(Checkpoint):
    """The tensors of a GGUF file under the names that transformers gives them.

    Parameters
    ----------
    path : Path
        The file, or one of a model in parts. Its ``config.json`` and tokenizer are written to our cache, and `folder` is where.
    here : bool
        False for planning with a file that has only its header.

    Raises
    ------
    AirLLMError
        If the file is damaged, its architecture is unknown, or the package ``gguf`` is missing.
    """

    def __init__(self, path: Path, *, here: bool = True) -> None:
        gguf_files.require_supported()
        paths = part_paths(path)
        states = {part: FileState.of(part.stat()) for part in paths}
        headers, factors, digest = _read(paths)
        header = headers[paths[0]]
        tied = not any(tensor.name == HEAD for each in headers.values() for tensor in each.tensors)
        self.folder = _small_files(paths[0], states[paths[0]], header, factors, digest, tied=tied)
        self.states = states if here else {}
        self._entries = {}
        config = compat_config.load_config(self.folder, read_config(self.folder), trust_remote_code=False)
        model = empty_model(config, torch.float32, self.folder, trust_remote_code=False)
        names, processor = gguf_files.parameters(model, header.architecture), gguf_files.processor(model, header.architecture)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        for part, tensor in ((part, tensor) for part, each in headers.items() for tensor in each.tensors):
            if tensor.name in factors:
                continue  # they are in the config
            if tensor.name not in names:
                # transformers drops it without a word
                raise UnsupportedError(
                    f"{part.name} holds {tensor.name}, which transformers does not read from GGUF files.",
                    "Use the model's safetensors files.",
                )
            if tensor.shape != (shape := shapes[names[tensor.name]]):
                raise CheckpointError(f"{part.name} holds {tensor.name} with shape {tensor.shape}, not {shape}.", AGAIN)
            self._entries[names[tensor.name]] = _entry(names[tensor.name], tensor, part, processor)

    @property
    def dtype(self) -> torch.dtype:
        """What is as exact as most of the file's bytes: bfloat16 for those in few bits."""
        return torch.bfloat16 if any(entry.unpack for entry in self.values()) else super().dtype


class Unpack:
    """Turns the bytes of a quantized tensor, or of some of its rows, into numbers.

    Parameters
    ----------
    kind : gguf.GGMLQuantizationType
        How they are quantized.
    order : torch.Tensor or None
        For each row of the parameter which row of the file it is.
    change : callable or None
        What is done to a vector afterwards.
    """

    def __init__(self, kind: Any, order: torch.Tensor | None, change: gguf_files.Fix | None) -> None:
        self._kind = kind
        self._order = order
        self._change = change

    def lies_on(self, packing: Packing) -> bool:
        """Tell whether the weight need not be rounded to be packed so."""
        return gguf_grid.lies_on(self._kind, packing)

    def repack(self, raw: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the packed weight of a tensor's bytes, with the codes that it has."""
        return gguf_grid.repack(raw, self._kind, shape, self._order)

    def __call__(self, raw: torch.Tensor, into: torch.Tensor) -> None:
        """Unpack `raw`, uint8 and flat, into a tensor of the parameter's shape and any floating dtype."""
        if into.dim() == 1:
            numbers = torch.from_numpy(self._numbers(raw))
            into.copy_(self._change(numbers) if self._change else numbers)
            return
        rows = raw.view(into.shape[0], -1)
        step = max(PIECE // into.shape[1], 1)
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step]
            if self._order is not None:
                part = rows[self._order[begin : begin + step]]
            convert(torch.from_numpy(self._numbers(part)), into[begin : begin + step].view(-1))

    def _numbers(self, raw: torch.Tensor) -> np.ndarray[Any, Any]:
        """Return what bytes mean, float32 and flat."""
        if self._kind.name in gguf_blocks.BYTES:
            return gguf_blocks.unpack(raw.numpy(), self._kind.name)
        from gguf.quants import dequantize

        return np.ascontiguousarray(dequantize(raw.numpy(), self._kind)).reshape(-1)


def _entry(name: str, tensor: GGUFTensor, path: Path, processor: Any) -> TensorEntry:
    shape, place = tensor.shape, (path, tensor.offset, tensor.nbytes)
    if len(shape) > 2:  # noqa: PLR2004  # stacks of experts
        raise UnsupportedError(
            f"{path.name} holds {tensor.name}, a stack of matrices, which is not read yet.", "Use the model's safetensors files."
        )
    order = gguf_files.order_of_rows(processor, tensor.name, shape[0]) if len(shape) > 1 else None
    change = gguf_files.change_of_vector(processor, tensor.name) if len(shape) == 1 else None
    if tensor.kind.name in PLAIN and order is None and change is None:
        return TensorEntry(name, PLAIN[tensor.kind.name], shape, *place)
    return TensorEntry(name, torch.uint8, shape, *place, Unpack(tensor.kind, order, change))


def _read(paths: tuple[Path, ...]) -> tuple[dict[Path, Header], dict[str, Values], str]:
    """Return the headers of all parts, the factors of the rotary embedding, and what tells the bytes of both from all others."""
    headers: dict[Path, Header] = {}
    factors: dict[str, Values] = {}
    digest = hashlib.sha256()
    for path in paths:
        with reading(path), io.BufferedReader(opened(path)) as file:
            headers[path] = read_header(file, path.name, os.fstat(file.fileno()).st_size)
            end = file.tell()
            digest.update(_part(file, 0, end))
            factors |= read_factors(headers[path], path.name, partial(_part, file))
    require_whole(headers)
    require_exact(paths[0].name, headers[paths[0]].architecture, headers[paths[0]].fields)
    for values in factors.values():
        digest.update(values.tobytes())
    return headers, factors, digest.hexdigest()


def _part(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def _small_files(path: Path, state: FileState, header: Header, factors: Mapping[str, Values], digest: str, *, tied: bool) -> Path:
    """Return the folder with config and tokenizer of a file, made once by each version of the packages that make them."""
    makers = [f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "tokenizers", "gguf")]
    key = hashlib.sha256(" ".join((VERSION, digest, *makers)).encode()).hexdigest()[:DIGITS]
    folder = cache_home() / GGUF_FOLDER / f"{path.stem}-{key}"
    if all((folder / name).is_file() for name in gguf_files.SMALL_FILES):
        return folder
    split = header.fields.get("tokenizer.ggml.pre")
    also = settings(path.name, header.architecture, header.fields, factors)
    also["tie_word_embeddings"] = tied  # transformers looks for the head in the first part only
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder.parent) as temporary:
            whole = Path(temporary) / folder.name
            whole.mkdir()
            gguf_files.write_small_files(_alone(path, Path(temporary)), whole, None if split is None else str(split), also)
            describe(whole, path.stem, "config and tokenizer", str(path))
            with reading(path):
                if FileState.of(path.stat()) != state:
                    raise CheckpointError(f"{path.name} was replaced or rewritten while it was read.", AGAIN)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(whole, folder)  # noqa: PTH105
    except OSError as error:
        raise AirLLMError(
            f"The config and tokenizer of {path.name} cannot be written to {folder}: {error.strerror or error}.",
            "Set AIRLLM_NB_HOME to a folder that you can write to.",
        ) from error
    return folder


def _alone(path: Path, folder: Path) -> Path:
    """Return a link to a file that has no neighbours: transformers would obey a ``tokenizer_config.json`` among them."""
    link = folder / "alone" / path.name
    link.parent.mkdir()
    try:
        link.symlink_to(path.absolute())
    except OSError:  # on Windows only some users may
        link.hardlink_to(path.absolute())
    return link


def open_checkpoint(path: Path, headers: Mapping[str, tuple[int, bytes]] | None = None) -> Checkpoint:
    """Return the checkpoint of a folder, or of a GGUF file; `headers` are for planning, as `hub.locate_headers` returns them."""
    if path.suffix.lower() == ".gguf":
        return GGUFCheckpoint(path, here=headers is None)
    return unpacked(Checkpoint(path, headers))
