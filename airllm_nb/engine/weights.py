"""The weights of one layer as one flat buffer: how they lie in it, how it is filled from the checkpoint, how modules see it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from airllm_nb.compat.keys import Recipe, Tensors
from airllm_nb.engine.away import Away, Change, away
from airllm_nb.engine.checkpoint import Checkpoint, TensorEntry
from airllm_nb.engine.conversion import Converter, Unaided, convert
from airllm_nb.engine.packed_stack import packed_parameter
from airllm_nb.engine.packed_weight import Meant, memory_of
from airllm_nb.engine.page_cache import PAGE
from airllm_nb.engine.reader import Reader

ALIGN = 64  # bytes: a cache line, and the widest vector register
SMALL = 1 << 20
"""Bytes that are not worth another thread's work: norms, biases, rows of an embedding."""
SAMPLED = 16  # bytes of each page


class Place(NamedTuple):
    """Where a module keeps a parameter or buffer: its own table of them, and the attribute's name."""

    table: dict[str, torch.Tensor | None]
    attribute: str
    is_buffer: bool


class Parameter(NamedTuple):
    """What a group must hold: a parameter by name, and where in a line of `ALIGN` bytes it has to begin (`phase`).

    Of a quantized one (`meant`), dtype and shape are those of its packed bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    places: tuple[Place, ...]
    phase: int = 0
    meant: Meant | None = None


@dataclass(frozen=True)
class Weight:
    """One parameter in a flat buffer: `nbytes` from `offset`. A tied one has several places in the model.

    Of a quantized one (`meant`), dtype and shape are those of its packed bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    places: tuple[Place, ...]
    meant: Meant | None = None

    def stand_in(self, device: torch.device, changes: list[Change]) -> Away:
        """Return what stands for it while it is away."""
        shape, dtype = (self.meant.shape, self.meant.dtype) if self.meant else (self.shape, self.dtype)
        return away(self.name, shape, dtype, device, changes, notes=self.meant is None)


class WeightGroup:
    """Parameters that come and go together: those of one decoder layer, the embedding, or what always stays.

    Parameters
    ----------
    name : str
        Module path of the layer.
    parameters : iterable of Parameter
        What the buffer holds. Persistent buffers count too, but stay when the group is detached.
    recipes : sequence of Recipe
        Where it comes from; together they make each parameter exactly once.
    device : torch.device
        Where the layer computes.
    """

    def __init__(
        self,
        name: str,
        parameters: Iterable[Parameter],
        recipes: Sequence[Recipe],
        device: torch.device,
    ) -> None:
        self.name = name
        self.recipes = recipes
        self.device = device
        self.weights: dict[str, Weight] = {}
        offset = 0
        for parameter in parameters:
            nbytes = math.prod(parameter.shape) * parameter.dtype.itemsize
            offset += (parameter.phase - offset) % ALIGN
            self.weights[parameter.name] = Weight(
                parameter.name, parameter.dtype, parameter.shape, offset, nbytes, parameter.places, parameter.meant
            )
            offset += nbytes
        self.nbytes = -(-offset // ALIGN) * ALIGN
        self._changes: dict[str, list[Change]] = {name: [] for name in self.weights}
        self._away = [
            (place, weight.stand_in(device, self._changes[weight.name]))
            for weight in self.weights.values()
            for place in weight.places
            if not place.is_buffer
        ]

    def without(self, names: Iterable[str]) -> WeightGroup:
        """Return a group that has all but some parameters, which have recipes of their own."""
        left = self.weights.keys() - set(names)
        parameters = (
            Parameter(weight.name, weight.dtype, weight.shape, weight.places, weight.offset % ALIGN, weight.meant)
            for weight in self.weights.values()
            if weight.name in left
        )
        return WeightGroup(
            self.name, parameters, [recipe for recipe in self.recipes if left & recipe.targets.keys()], self.device
        )

    def views(self, buffer: torch.Tensor) -> Tensors:
        """Return each parameter as a view of a flat uint8 buffer of at least `nbytes` bytes."""
        return {
            weight.name: buffer[weight.offset : weight.offset + weight.nbytes].view(weight.dtype).view(weight.shape)
            for weight in self.weights.values()
        }

    def attach(self, buffer: torch.Tensor) -> None:
        """Let the model's modules use the weights in `buffer`, which has just been filled."""
        self.put(self.views(buffer))

    def put(self, tensors: Tensors) -> None:
        """Let the model's modules use these weights, fresh from the checkpoint."""
        for name, view in tensors.items():
            with torch.no_grad():
                for function, args, kwargs in self._changes[name]:
                    function(view, *args, **kwargs)
            weight = self.weights[name]
            parameter = packed_parameter(name, view, weight.meant) if weight.meant else _parameter(view)
            for place in weight.places:
                place.table[place.attribute] = view if place.is_buffer else parameter

    def detach(self) -> None:
        """Let the parameters be away: the modules hold no memory. May be called at any time."""
        for place, parameter in self._away:
            place.table[place.attribute] = parameter

    def let_go(self) -> torch.Tensor | None:
        """Detach what stayed; returns the memory, all of it and flat, unless the weights were away already.

        Buffers, which are not detached, get memory of their own: views would hold all of it.
        """
        memory = None
        for weight in self.weights.values():
            for place in weight.places:
                tensor = memory_of(place.table[place.attribute])
                if place.is_buffer and tensor is not None:
                    place.table[place.attribute] = tensor.clone()
                elif tensor is not None and not tensor.is_meta:
                    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self.detach()
        return memory

    def state(self) -> tuple[tuple[int, int, int], ...]:
        """Return what changes when someone else puts other weights in their place, or changes them there.

        PyTorch counts changes in place, but not those that go through ``.data`` (as peft merges adapters): these are noticed
        where they reach one of the bytes that are sampled, some of each page.
        """
        tensors = (memory_of(place.table[place.attribute]) for weight in self.weights.values() for place in weight.places)
        return tuple(
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, _checksum(tensor))  # noqa: SLF001  # no other way
            for tensor in tensors
            if tensor is not None
        )


def _checksum(tensor: torch.Tensor) -> int:
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        return 0
    flat = tensor.detach().view(-1).view(torch.uint8)
    if flat.numel() > SMALL:
        flat = flat[: flat.numel() // PAGE * PAGE].view(-1, PAGE)[:, :SAMPLED].contiguous()
    return zlib.crc32(as_bytes(flat))


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    """Make a parameter as ``from_pretrained`` does: ``matmul`` chooses its way by `requires_grad` even where none is recorded."""
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


class GroupReader:
    """Fills buffers with the weights of a group, converted to the dtype they compute in.

    Parameters
    ----------
    checkpoint : Checkpoint
        Where the tensors lie.
    reader : Reader
        Reads their bytes.
    """

    def __init__(self, checkpoint: Checkpoint, reader: Reader) -> None:
        self._checkpoint = checkpoint
        self._reader = reader
        self.unanswered = reader.unanswered

    def load(self, group: WeightGroup, device: torch.device) -> bool:
        """Bring a group's weights in, to stay, and attach them; True if any of it had to come from the disk."""
        host = torch.empty(group.nbytes, dtype=torch.uint8, device="cpu")
        from_disk = self.fill(group, host, keep_cached=True)
        group.attach(host.to(device))
        return from_disk

    def fill(self, group: WeightGroup, buffer: torch.Tensor, *, keep_cached: bool, converter: Converter | None = None) -> bool:
        """Read a group's weights into a flat uint8 buffer on the CPU.

        Parameters
        ----------
        group : WeightGroup
            What to read.
        buffer : torch.Tensor
            Of at least its size.
        keep_cached : bool
            See `Reader.read`.
        converter : Converter, optional
            That of a reading thread, to convert meanwhile.

        Returns
        -------
        bool
            True if any of it had to come from the disk, False if the page cache held it all.
        """
        if converter is None:
            return self._fill(group, buffer, Unaided(), keep_cached=keep_cached)
        with converter.converting():
            return self._fill(group, buffer, converter, keep_cached=keep_cached)

    def _fill(self, group: WeightGroup, buffer: torch.Tensor, converter: Converter | Unaided, *, keep_cached: bool) -> bool:
        views = group.views(buffer)
        missed = 0
        for recipe in sorted(group.recipes, key=self._position):  # in one sweep, for the disk's own read-ahead
            if recipe.convert is None or recipe.joined:
                (target,) = recipe.targets
                entries = [self._checkpoint[source] for source in recipe.sources]
                missed += self._read(entries, views[target], converter, keep_cached=keep_cached)
                continue
            dtype = views[next(iter(recipe.targets))].dtype
            tensors = {}
            for source in recipe.sources:
                entry = self._checkpoint[source]
                tensors[source] = torch.empty(entry.shape, dtype=dtype, device="cpu")
                missed += self.read([entry], tensors[source], keep_cached=keep_cached)
            for target, tensor in recipe.convert(tensors).items():
                views[target].copy_(tensor)
        return missed > 0

    def _position(self, recipe: Recipe) -> tuple[Path, int]:
        entry = self._checkpoint[recipe.sources[0]]
        return entry.file, entry.offset

    def fill_rows(self, group: WeightGroup, first: int, into: torch.Tensor, *, keep_cached: bool = True) -> None:
        """Read neighbouring rows of a group's only weight, which one tensor is: as many as `into` has, from row `first` on."""
        entry = self._checkpoint[group.recipes[0].sources[0]]
        rows = entry.rows(first, len(into))
        self.read([rows], into, keep_cached=keep_cached)  # of an embedding, the common ones come again

    def read(self, entries: Iterable[TensorEntry], into: torch.Tensor, *, keep_cached: bool) -> int:
        """Read tensors into a contiguous one, one after the other; returns the bytes that the page cache did not hold."""
        return self._read(entries, into, Unaided(), keep_cached=keep_cached)

    def _read(
        self, entries: Iterable[TensorEntry], into: torch.Tensor, converter: Converter | Unaided, *, keep_cached: bool
    ) -> int:
        flat, begin, missed = into.view(-1), 0, 0
        for entry in entries:
            end = begin + math.prod(entry.shape)
            if entry.unpack is not None:
                missed += self._unpack(entry, flat[begin:end].view(entry.shape), keep_cached=keep_cached)
            elif entry.dtype == into.dtype:
                missed += self._reader.read(entry.file, entry.offset, as_bytes(flat[begin:end]), keep_cached=keep_cached)
            else:
                missed += self._read_and_convert(entry, flat[begin:end], converter, keep_cached=keep_cached)
            begin = end
        return missed

    def _unpack(self, entry: TensorEntry, into: torch.Tensor, *, keep_cached: bool) -> int:
        if len(entry.shape) > 2:  # noqa: PLR2004  # a stack: one matrix after the other, and only its bytes are there meanwhile
            parts = (replace(part, shape=part.shape[1:]) for part in (entry.rows(n, 1) for n in range(entry.shape[0])))
            return sum(self._unpack(part, into[n], keep_cached=keep_cached) for n, part in enumerate(parts))
        missed, read = 0, []
        for part in entry.stored:
            read.append(torch.empty(part.nbytes, dtype=torch.uint8, device="cpu"))
            missed += self._reader.read(part.file, part.offset, as_bytes(read[-1]), keep_cached=keep_cached)
        numbers, *others = read
        assert entry.unpack is not None
        entry.unpack(numbers, into, *others)
        return missed

    def _read_and_convert(
        self, entry: TensorEntry, flat: torch.Tensor, converter: Converter | Unaided, *, keep_cached: bool
    ) -> int:
        if entry.nbytes <= SMALL:
            part = torch.empty(flat.shape, dtype=entry.dtype, device="cpu")
            missed = self._reader.read(entry.file, entry.offset, as_bytes(part), keep_cached=keep_cached)
            convert(part, flat)
            return missed
        missed = done = 0
        while done < flat.numel():
            part = converter.buffer().view(entry.dtype)[: flat.numel() - done]
            start = entry.offset + done * entry.dtype.itemsize
            missed += self._reader.read(entry.file, start, as_bytes(part), keep_cached=keep_cached)
            converter.convert(part, flat[done : done + part.numel()])
            done += part.numel()
        return missed


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous CPU tensor's own memory, writable."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
