"""Measures this machine for a prediction, in about two seconds: computing with one row, reading, and both at the same time.

Nothing is assumed about how computing and reading share cores and memory: how far each slows the other down is measured. What was
measured is remembered for the process, so that a second prediction is instant.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from airllm_nb.engine import memory, threads
from airllm_nb.engine.checkpoint import DTYPES, Checkpoint, TensorEntry
from airllm_nb.engine.hub import SINGLE
from airllm_nb.engine.reader import CHUNK, Reader
from airllm_nb.engine.weights import GroupReader
from airllm_nb.errors import AirLLMError

WEIGHTS = 256_000_000
"""Bytes of weights that the measured matrices hold together: more than a processor's caches."""
INTO = 128_000_000
"""Bytes that are read into, in turn: more than the caches as well, or reading would look faster than it is."""
FEWEST = 32_000_000
FILE = 256_000_000
"""Bytes of the temporary file that stands for a checkpoint which is not here yet, or all in the page cache."""
HEADER = 4096
LITTLE = 0.15
"""A share of what is read that makes no difference."""
SECONDS = 0.3
"""Of measuring how fast is computed; reading, and both at once, take twice as long, because disks are less even."""

Shapes = tuple[tuple[int, int], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Speed:
    """A rate in bytes per second when nothing else happens (`alone`), and while the other one of reading and computing does."""

    alone: float
    meanwhile: float

    @property
    def share(self) -> float:
        """How much of its speed is left meanwhile, from 0 to 1."""
        return min(self.meanwhile / self.alone, 1.0)


class Unmeasurable(Exception):  # noqa: N818  # a fact to be told, not an error of anybody
    """Says in words why there is no number."""


class Linears:
    """Linear layers of given shapes, computed with one row again and again.

    Parameters
    ----------
    shapes : sequence of (int, int)
        Rows and columns of the weights; those that are too large together get fewer rows.
    dtype : torch.dtype
        Of weights and input.

    Raises
    ------
    Unmeasurable
        If there is no memory for weights that exceed the caches.
    """

    def __init__(self, shapes: Shapes, dtype: torch.dtype) -> None:
        allowed = _allowed(WEIGHTS, 4)
        part = min(1.0, allowed / (sum(rows * columns for rows, columns in shapes) * dtype.itemsize))
        cut = [(max(int(rows * part), 1), columns) for rows, columns in shapes]
        once = sum(rows * columns for rows, columns in cut) * dtype.itemsize
        self._pairs = [
            (
                torch.full((1, columns), 0.01, dtype=dtype, device="cpu"),
                torch.full((rows, columns), 0.01, dtype=dtype, device="cpu"),
            )
            for _ in range(max(allowed // once, 1))
            for rows, columns in cut
        ]
        self._nbytes = sum(weight.nbytes for _, weight in self._pairs)
        self._sweep()  # the first time also prepares the kernels

    def rate(self, busy: Callable[[], bool]) -> float:
        """Return bytes of weights per second: the median of sweeps over all of them while `busy()`, at least one."""
        seconds = [self._sweep()]
        while busy():
            seconds.append(self._sweep())
        return self._nbytes / sorted(seconds)[len(seconds) // 2]

    def _sweep(self) -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            for row, weight in self._pairs:
                torch.nn.functional.linear(row, weight)
        return time.perf_counter() - begin


class Sample:
    """Tensors of a checkpoint, read as the engine reads layers: one after the other, from wherever they are.

    How much of it the page cache holds is asked apart: while reading, the disk's own read-ahead makes it look like more.

    Parameters
    ----------
    checkpoint : Checkpoint
        Whose files are here.
    entries : sequence of TensorEntry
        The tensors to read from.
    dtype : torch.dtype
        What they are converted to: that is part of reading.
    """

    def __init__(self, checkpoint: Checkpoint, entries: Sequence[TensorEntry], dtype: torch.dtype) -> None:
        self._reader = Reader(checkpoint)
        self._groups = GroupReader(checkpoint, self._reader)
        self._entries = entries
        self._dtype = dtype
        self._random = random.Random()  # noqa: S311  # anew each time: what was looked at may be cached afterwards
        self._pieces = self._in_order()

    def __enter__(self) -> Sample:  # noqa: PYI034  # typing.Self is new in Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def cached(self, count: int = 128) -> float:
        """Return the share of `count` places, drawn at random, that the page cache holds."""
        found = 0
        for entry in self._random.choices(self._entries, [entry.nbytes for entry in self._entries], k=count):
            held = self._reader.is_cached(entry.file, entry.offset + self._random.randrange(entry.nbytes))
            if held is None:
                raise Unmeasurable("this system does not tell what it reads from the disk and what from memory")
            found += held
        return found / count

    def rate(self, seconds: float) -> float:
        """Return bytes of the files per second, conversion included, after reading for some seconds.

        Raises
        ------
        Unmeasurable
            If the files cannot be read.
        """
        room = torch.empty(_allowed(INTO, 8) // self._dtype.itemsize, dtype=self._dtype, device="cpu")
        filled = total = 0
        self.missed = 0
        begin = now = time.perf_counter()
        try:
            while now < begin + seconds:
                piece = next(self._pieces)
                filled = filled if filled + piece.shape[0] <= room.numel() else 0
                into = room[filled : filled + piece.shape[0]]
                filled += piece.shape[0]
                self.missed += self._groups.read([piece], into, keep_cached=False)
                total += piece.nbytes
                now = time.perf_counter()
        except (AirLLMError, OSError) as error:
            raise Unmeasurable(str(error)) from error
        return total / (now - begin)

    def _in_order(self) -> Iterator[TensorEntry]:
        """Yield pieces of the tensors in the order in which the engine reads them, from a random one on and round again."""
        start = self._random.randrange(len(self._entries))
        for entry in itertools.cycle((*self._entries[start:], *self._entries[:start])):
            for offset in range(0, entry.nbytes, CHUNK):
                yield _part(entry, offset, min(CHUNK, entry.nbytes - offset))


def _part(entry: TensorEntry, offset: int, nbytes: int) -> TensorEntry:
    count = nbytes // entry.dtype.itemsize
    return TensorEntry(entry.name, entry.dtype, (count,), entry.file, entry.offset + offset, nbytes)


def computing(shapes: Shapes, dtype: torch.dtype) -> float:
    """Return how fast linear layers of these shapes compute with one row, in bytes of weights per second.

    Raises
    ------
    Unmeasurable
        If too little memory is free to tell.
    """
    with threads.applied() as (number, _):

        def measure() -> float:
            linears = Linears(shapes, dtype)
            end = time.perf_counter() + SECONDS
            return linears.rate(lambda: time.perf_counter() < end)

        return _remembered((shapes, dtype, number), measure)


def streaming(
    checkpoint: Checkpoint, entries: Sequence[TensorEntry], shapes: Shapes, dtype: torch.dtype, cached: float = 0.0
) -> tuple[Speed, Speed]:
    """Return how fast tensors are read and how fast is computed: alone, and both at once.

    Parameters
    ----------
    checkpoint, entries : Checkpoint, sequence of TensorEntry
        What is read. It may not be here yet.
    shapes, dtype : sequence of (int, int), torch.dtype
        What computes, and in what.
    cached : float
        The share of `entries` that the page cache holds, by `cached_share`, and goes on holding. Where it holds more than that,
        and where the files are not here yet, a temporary file beside them tells the disk's speed: written, dropped from the
        page cache, read and deleted.

    Raises
    ------
    Unmeasurable
        With the reason.
    """
    published = entries[0].dtype

    def measure() -> tuple[Speed, Speed]:
        if checkpoint.states and cached_share(checkpoint, entries) <= cached + LITTLE:
            with Sample(checkpoint, entries, dtype) as sample:
                return _both(sample, shapes, dtype)
        with _temporary(checkpoint.folder, published) as other, Sample(other, list(other.values()), dtype) as sample:
            found = _both(sample, shapes, dtype)
            if sample.missed == 0:
                raise Unmeasurable("the disk cannot be measured: what is written to it stays in memory")
            return found

    with threads.applied() as (number, _):
        try:
            device = checkpoint.folder.stat().st_dev
        except OSError as error:
            raise Unmeasurable(f"the folder cannot be read: {error.strerror}") from error
        return _remembered((device, round(4 * cached), published, shapes, dtype, number), measure)


def cached_share(checkpoint: Checkpoint, entries: Sequence[TensorEntry]) -> float:
    """Return the share of some tensors that the page cache holds now, from 0 to 1; 0 for files that are not here yet."""
    if not checkpoint.states:
        return 0.0
    try:
        with Sample(checkpoint, entries, entries[0].dtype) as sample:
            return sample.cached()
    except OSError as error:
        raise Unmeasurable(f"the files cannot be read: {error.strerror}") from error


def layer_overhead() -> float:
    """Return the seconds that one decoder layer of transformers takes for one token beside its weights: a tiny Llama's."""

    def measure() -> float:
        from transformers import LlamaConfig, LlamaForCausalLM

        layers = 8
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4,
        )  # fmt: skip
        state = torch.random.get_rng_state()
        try:
            with torch.device("cpu"), torch.no_grad():
                model = LlamaForCausalLM(config).eval()
                token, cache, seconds = torch.ones(1, 1, dtype=torch.long), None, []
                for _ in range(12):
                    begin = time.perf_counter()
                    cache = model(token, past_key_values=cache, use_cache=True).past_key_values
                    seconds.append(time.perf_counter() - begin)
        finally:
            torch.random.set_rng_state(state)
        return sorted(seconds)[len(seconds) // 2] / layers

    with threads.applied() as (number, _):
        return _remembered(("overhead", number), measure)


def in_memory(folder: Path) -> bool:
    """Tell whether a folder lies in memory (a tmpfs) and not on a disk."""
    path = os.path.realpath(folder)
    mounts = [mount for mount in psutil.disk_partitions(all=True) if Path(path).is_relative_to(mount.mountpoint)]
    return bool(mounts) and max(mounts, key=lambda mount: len(mount.mountpoint)).fstype in ("tmpfs", "ramfs")


def _allowed(wanted: int, part: int) -> int:
    """Return how many bytes a measurement may use: what it wants, or a part of what is free."""
    allowed = min(wanted, memory.available(torch.device("cpu"))[0] // part)
    if allowed < FEWEST:
        raise Unmeasurable("too little memory is free to measure")
    return allowed


_memory: dict[tuple[Any, ...], Any] = {}


def _remembered(key: tuple[Any, ...], measure: Callable[[], T]) -> T:
    if key not in _memory:
        _memory[key] = measure()
    found: T = _memory[key]
    return found


def _both(sample: Sample, shapes: Shapes, dtype: torch.dtype) -> tuple[Speed, Speed]:
    alone = sample.rate(2 * SECONDS)
    compute = computing(shapes, dtype)
    results: list[float | Unmeasurable] = []

    def read() -> None:
        try:
            results.append(sample.rate(2 * SECONDS))
        except Unmeasurable as error:
            results.append(error)

    linears = Linears(shapes, dtype)
    thread = threading.Thread(target=read, name="airllm_nb-probe", daemon=True)
    thread.start()
    try:
        meanwhile = linears.rate(thread.is_alive)
    finally:
        thread.join()
    if isinstance(results[0], Unmeasurable):
        raise results[0]
    return Speed(alone, results[0]), Speed(compute, meanwhile)


@contextlib.contextmanager
def _temporary(folder: Path, dtype: torch.dtype) -> Iterator[Checkpoint]:
    """Make a checkpoint of one tensor of random bytes in a folder, on the disk and not in the page cache."""
    name = next(name for name, known in DTYPES.items() if known == dtype)
    try:
        if psutil.disk_usage(str(folder)).free < 4 * FILE:
            raise Unmeasurable("the disk cannot be measured: it is nearly full")
        with tempfile.TemporaryDirectory(prefix=".airllm_nb-", dir=folder) as made:
            block, size, end = os.urandom(CHUNK), 0, time.perf_counter() + 2 * SECONDS
            with Path(made, SINGLE).open("wb", buffering=0) as file:
                file.seek(HEADER)
                while size < FILE and time.perf_counter() < end:
                    size += file.write(block)
                header = {"x": {"dtype": name, "shape": [size // dtype.itemsize], "data_offsets": [0, size]}}
                file.seek(0)
                file.write((HEADER - 8).to_bytes(8, "little") + json.dumps(header).encode().ljust(HEADER - 8))
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            yield Checkpoint(Path(made))
    except OSError as error:
        raise Unmeasurable(f"the disk cannot be measured: {error.strerror}") from error
