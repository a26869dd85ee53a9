"""Packed layers on disk: one safetensors file for each, in our cache, written once and then read as any checkpoint."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from airllm_nb.compat.keys import Tensors
from airllm_nb.engine import calibration, packed_key, threads
from airllm_nb.engine.checkpoint import Checkpoint, TensorEntry
from airllm_nb.engine.head import PACKING, packed_rows
from airllm_nb.engine.home import ABOUT, QUANTIZED_FOLDER, cache_home
from airllm_nb.engine.memory import format_size
from airllm_nb.engine.packed import Int4, Packing
from airllm_nb.engine.packed_file import TEMPORARY, PackedFile, packed_file
from airllm_nb.engine.quantize import Quantized, describe, stored, stored_weights
from airllm_nb.engine.reader import Reader
from airllm_nb.engine.repack import on_grid, repacked
from airllm_nb.engine.rounding import nearest
from airllm_nb.engine.sharing import Shared
from airllm_nb.engine.skeleton import Skeleton
from airllm_nb.engine.weights import GroupReader, Weight, WeightGroup
from airllm_nb.errors import AirLLMError, CheckpointError, SharingError
from airllm_nb.events import Fetching, Listener

LOCK = ".lock"
WAITING = "Waiting for another process that quantizes this model"


class PackedCache:
    """The packed layers of one model, on disk.

    What a layer's file is called, how large it is and where each tensor lies in it follows from the model alone: so it can be
    planned with before it exists, and a file that is another one, or incomplete, is known by its header and size.

    Parameters
    ----------
    quantized : Quantized
        The model.
    checkpoint : Checkpoint
        What it is made from.
    name : str
        The model's short name.
    trust_remote_code : bool
        The user's own word that the tokenizer may be code from the checkpoint.
    """

    def __init__(self, quantized: Quantized, checkpoint: Checkpoint, name: str, *, trust_remote_code: bool = False) -> None:
        self._quantized = quantized
        self._checkpoint = checkpoint
        self._name = name
        self._trust = trust_remote_code
        if isinstance(quantized.packing, Int4) and quantized.packing.rounding == "gptq":
            self._refuse_on_grid(Int4(quantized.packing.group))
        key = packed_key.key(quantized, checkpoint)
        self.folder = cache_home() / QUANTIZED_FOLDER / f"{name.strip('.') or 'model'}-{quantized.name}-{key}"
        layers = [self._layer(index, layer.group, key) for index, layer in enumerate(quantized.skeleton.layers)]
        self.files = (*layers, *self._head(key))

    @property
    def skeleton(self) -> Skeleton:
        """The model whose layers are packed."""
        return self._quantized.skeleton

    @property
    def original(self) -> Skeleton:
        """The same model with its layers as published."""
        return self._quantized.original

    def __str__(self) -> str:
        missing = self.missing()
        folder = self.folder if self._checkpoint.states else self.folder.parent  # its name is known once the weights are here
        where = f"{format_size(self.nbytes)} in {folder}"
        left = self._about().get("nearest", [])
        unreached = (
            f"; {len(left)} rounded to the nearest, as stacks of experts and what the calibration text does not reach ({left[0]})"
            if left
            else ""
        )
        return f"{describe(self._quantized)}{unreached}; {where}{', to be written first' if missing else ''}"

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def joined(self) -> Checkpoint:
        """Return the model's checkpoint with the packed layers in it, as far as they are there."""
        states = {file.path: state for file in self.files if (state := file.state())}
        return self._checkpoint.joined((entry for file in self.files for entry in file.entries), states)

    def missing(self) -> list[int]:
        """Return the numbers of the files that are not there yet; the head's is the last."""
        return [index for index, file in enumerate(self.files) if file.state() is None]

    def require_shareable(self, shared: Shared) -> None:
        """Refuse to share what this user is about to write, and could change."""
        if shared is True and self.missing():
            raise SharingError(
                f"The quantized layers of {self._name} cannot be shared: they are not here yet, and would be files of yours.",
                "Have another user load the model once, with AIRLLM_NB_HOME set to a folder that you can read and not write to; "
                'shared="insist" (--shared-insist) shares them at your own risk.',
            )

    def fill(self, progress: Listener | None = None) -> None:
        """Write the layers that are not there yet, each in one step: what an interrupt leaves undone, the next call does.

        Raises
        ------
        AirLLMError
            If they cannot be written; nothing half-written stays.
        CheckpointError
            If a weight is not finite, or the checkpoint cannot be read.
        """
        if not self.missing():
            return
        tell = progress or (lambda _event: None)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _alone(self.folder, tell):
                self._fill(tell)
        except OSError as error:
            raise self._refusal(error.strerror or str(error)) from error

    def _fill(self, tell: Listener) -> None:
        for leftover in self.folder.glob(f"*{TEMPORARY}"):
            leftover.unlink()
        missing = self.missing()  # another process may have been quicker
        needed = sum(self.files[index].size for index in missing)
        if shutil.disk_usage(self.folder).free < needed:
            raise self._refusal(os.strerror(errno.ENOSPC))
        about = {"model": self._name, "source": str(self._checkpoint.folder), "quantization": self._quantized.name}
        self._write_about(self._about() | about)
        text = f"Quantizing {self._name} to {self._quantized.name}, once: {format_size(self.nbytes)} in {self.folder}"
        layers = self.skeleton.layers

        def begin(index: int) -> None:
            written = self.nbytes - sum(self.files[index].size for index in self.missing())
            tell(Fetching(text, layers[index].group.name if index < len(layers) else "head", written, self.nbytes))

        if isinstance(self._quantized.packing, Int4) and self._quantized.packing.rounding == "gptq":
            self._calibrate({index for index in missing if index < len(layers)}, begin)
            for index in self.missing():  # those that no text passes through, as of a vision tower
                self._note_nearest(index, {})
        self._write_nearest(begin)
        tell(Fetching(text, "", self.nbytes, self.nbytes))

    def _calibrate(self, missing: set[int], begin: Callable[[int], None]) -> None:
        """Write the layers that are missing with compensated errors."""
        if not missing:
            return
        ids = calibration.token_ids(self._checkpoint.folder, self.skeleton.model, trust_remote_code=self._trust)

        def write(index: int, views: Tensors, packed: Tensors) -> None:
            self._note_nearest(index, packed)
            self.files[index].write(self._packed(index, views, packed))

        calibration.Calibration(self._quantized, self.joined, missing, begin, write).run(ids)

    def _write_nearest(self, begin: Callable[[int], None]) -> None:
        """Write what is missing."""
        missing = self.missing()
        sources = {index: self._source(index) for index in missing if index < len(self.skeleton.layers)}
        buffer = torch.empty(max((group.nbytes for group in sources.values()), default=0), dtype=torch.uint8, device="cpu")
        with threads.one(), contextlib.closing(Reader(self._checkpoint)) as reader:
            groups = GroupReader(self._checkpoint, reader)
            for index in missing:
                begin(index)
                if index in sources:
                    groups.fill(sources[index], buffer, keep_cached=False)
                    self.files[index].write(self._packed(index, sources[index].views(buffer), {}, reader))
                else:
                    self.files[index].write(self._packed_head(groups))

    def _about(self) -> dict[str, Any]:
        try:
            about = json.loads((self.folder / ABOUT).read_bytes())
        except (OSError, ValueError):
            return {}
        return about if isinstance(about, dict) else {}

    def _write_about(self, about: dict[str, Any]) -> None:
        (self.folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def _note_nearest(self, index: int, packed: Tensors) -> None:
        """Note which weights of a layer do not get compensated errors."""
        layers, about = self.skeleton.layers, self._about()
        weights = stored_weights(layers[index].group, self._quantized.packing) if index < len(layers) else []
        if names := {weight.name for weight in weights if weight.meant} - packed.keys():
            self._write_about(about | {"nearest": sorted(names.union(about.get("nearest", [])))})

    def _source(self, index: int) -> WeightGroup:
        """Return what a layer's file is made from: not what stays in the checkpoint, nor what is on its grid already."""
        own = self._quantized.skeleton.layers[index].group
        group = self._quantized.original.layers[index].group
        made = {weight.name for weight in stored_weights(own, self._quantized.packing)} - self._on_grid(index).keys()
        return group.without(group.weights.keys() - made)

    def _on_grid(self, index: int) -> dict[str, TensorEntry]:
        """Return where those of a layer's packed weights lie that need not be rounded."""
        meant = {weight.name for weight in self.skeleton.layers[index].group.weights.values() if weight.meant}
        found = on_grid(self._checkpoint, self._quantized.original.layers[index].group, self._quantized.packing)
        return {name: entry for name, entry in found.items() if name in meant}

    def _refuse_on_grid(self, plain: Int4) -> None:
        """Refuse to round anew what `plain` keeps as it is, by compensating errors that there are not."""
        if any(self._on_grid(index) for index in range(len(self.skeleton.layers))):
            raise AirLLMError(
                f"Layers of {self._name} are in 4 bits already, with the very groups of {plain}: gptq would only move them.",
                f'Load it with quantize="{plain}", which keeps their codes.',
            )

    def _packed(self, index: int, views: Tensors, packed: Tensors, reader: Reader | None = None) -> Iterator[torch.Tensor]:
        """Return the tensors of a layer's file, in their order; what is packed already, here or there, need not be."""
        there = self._on_grid(index) if reader else {}
        for weight in stored_weights(self.skeleton.layers[index].group, self._quantized.packing):
            if weight.name in packed:
                yield packed[weight.name]
            elif reader and weight.name in there:
                yield _finite(repacked, there[weight.name], reader, name=weight.name)
            else:
                yield from _packed(views[weight.name], weight)

    def _packed_head(self, groups: GroupReader) -> Iterator[torch.Tensor]:
        """Return those of the head's file."""
        source = self._quantized.head
        assert source is not None
        return packed_rows(source, groups, functools.partial(_nearest, packing=PACKING, name=next(iter(source.weights))))

    def _layer(self, index: int, group: WeightGroup, key: str) -> PackedFile:
        packing = self._quantized.packing
        tensors = {stored(packing, weight.name): weight for weight in stored_weights(group, packing)}
        return packed_file(self.folder / f"layer-{index:03}.safetensors", tensors, key)

    def _head(self, key: str) -> Iterator[PackedFile]:
        if self._quantized.head:
            name = stored(PACKING, "head")
            always = self.skeleton.always
            recipe = next(recipe for recipe in always.recipes if recipe.sources == (name,))
            yield packed_file(self.folder / "head.safetensors", {name: always.weights[next(iter(recipe.targets))]}, key)

    def _refusal(self, why: str) -> AirLLMError:
        return AirLLMError(
            f"The quantized layers of {self._name}, {format_size(self.nbytes)}, cannot be written to {self.folder}: {why}.",
            "Free room there, set AIRLLM_NB_HOME to a folder that has it, or load the model without quantize.",
        )


def _packed(tensor: torch.Tensor, weight: Weight) -> Iterator[torch.Tensor]:
    """Return a weight as it is stored; of a stack one matrix after the other, so that only one is in memory beside it."""
    if not weight.meant:
        yield tensor
        return
    for matrix in tensor.view(-1, *tensor.shape[-2:]):
        yield _nearest(matrix, weight.meant.packing, weight.name)


def _nearest(tensor: torch.Tensor, packing: Packing, name: str) -> torch.Tensor:
    return _finite(nearest, tensor, packing, name=name)


def _finite(pack: Callable[..., torch.Tensor], *weight: object, name: str) -> torch.Tensor:
    try:
        return pack(*weight)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be quantized: {error}.", "Load the model without quantize.") from error


@contextlib.contextmanager
def _alone(folder: Path, tell: Listener) -> Iterator[None]:
    """Let one process at a time write to a folder."""
    lock = FileLock(folder / LOCK)
    try:
        while True:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0.5)
                break
            tell(Fetching(WAITING))  # often: who listens may want to stop it
        yield
    finally:
        lock.release()  # also if an interrupt came right after it was taken
