"""Reads from a checkpoint, or from a temporary file on the same disk, as the engine does: to measure how fast that goes here."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants

from airllm_nb.engine import memory
from airllm_nb.engine.checkpoint import DTYPES, Checkpoint, TensorEntry
from airllm_nb.engine.hub import SINGLE
from airllm_nb.engine.page_cache import Residue
from airllm_nb.engine.reader import CHUNK, Reader
from airllm_nb.engine.weights import GroupReader
from airllm_nb.errors import AirLLMError

INTO = 128_000_000
"""Bytes that are read into, in turn: more than the caches as well, or reading would look faster than it is."""
FEWEST = 32_000_000
FILE = 256_000_000
"""Bytes of the temporary file that stands for a checkpoint which is not here yet, or all in the page cache."""
HEADER = 4096
WRITING = 0.6
"""Seconds that writing it may take."""
PREFIX = "airllm_nb-probe-"
FORGOTTEN = 3600
"""Seconds after which what begins with it was left by a process that was killed: measuring takes a few."""
LITTLE = 0.15
"""A share of what is read that makes no difference."""
UNTOLD = "this system does not tell what it reads from the disk and what from memory"


class Unmeasurable(Exception):  # noqa: N818  # a fact to be told, not an error of anybody
    """Says in words why there is no number."""


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
                raise Unmeasurable(UNTOLD)
            found += held
        return found / count

    def rate(self, seconds: float) -> float:
        """Return bytes of the files per second, conversion included, after reading for some seconds.

        Raises
        ------
        Unmeasurable
            If the files cannot be read.
        """
        room = torch.empty(room_for(INTO, 8) // self._dtype.itemsize, dtype=self._dtype, device="cpu")
        room.zero_()  # memory that is used for the first time is slow, and the engine's buffers are recycled
        filled = total = skipped = 0
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
                if skipped == 0 and now > begin + seconds / 3:  # until then, the read-ahead and the page cache get going
                    begin, seconds, skipped, total = now, seconds * 2 / 3, total, 0
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


def cached_share(checkpoint: Checkpoint, entries: Sequence[TensorEntry]) -> float:
    """Return the share of some tensors that the page cache holds now, from 0 to 1; 0 for files that are not here yet."""
    if not checkpoint.states:
        return 0.0
    try:
        with Sample(checkpoint, entries, entries[0].dtype) as sample:
            return sample.cached()
    except OSError as error:
        raise Unmeasurable(f"the files cannot be read: {error.strerror}") from error


def in_memory(folder: Path) -> bool:
    """Tell whether a folder lies in memory (a tmpfs) and not on a disk."""
    path = os.path.realpath(folder)
    mounts = [mount for mount in psutil.disk_partitions(all=True) if Path(path).is_relative_to(mount.mountpoint)]
    return bool(mounts) and max(mounts, key=lambda mount: len(mount.mountpoint)).fstype in ("tmpfs", "ramfs")


def room_for(wanted: int, part: int) -> int:
    """Return how many bytes a measurement may use: what it wants, or a part of what is free."""
    allowed = min(wanted, memory.available(torch.device("cpu"))[0] // part)
    if allowed < FEWEST:
        raise Unmeasurable("too little memory is free to measure")
    return allowed


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Raise `Unmeasurable` if memory runs out: what is free when a measurement begins may be gone a moment later."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has no type of its own for it on the CPU, only words
        if isinstance(error, RuntimeError) and not re.search("allocate memory|not enough memory", str(error)):
            raise
        raise Unmeasurable("too little memory is free to measure") from error


def scratch(folder: Path) -> Path:
    """Return a folder for temporary files that lies on the same disk as a checkpoint's, which may be everybody's.

    Raises
    ------
    Unmeasurable
        If there is none.
    """
    device = folder.stat().st_dev
    for place in map(Path, (tempfile.gettempdir(), constants.HF_HOME)):
        inside = Path(os.path.realpath(place)).is_relative_to(os.path.realpath(folder))
        if place.is_dir() and os.access(place, os.W_OK) and place.stat().st_dev == device and not (inside or in_memory(place)):
            return place
    raise Unmeasurable("the disk cannot be measured: the folder for temporary files is not on it")


def _remove_forgotten(place: Path) -> None:
    for left in place.glob(f"{PREFIX}*/"):
        with contextlib.suppress(OSError):  # another process may be about the same
            if time.time() - left.stat().st_mtime > FORGOTTEN:
                shutil.rmtree(left)


@contextlib.contextmanager
def temporary(folder: Path, dtype: torch.dtype) -> Iterator[Checkpoint]:
    """Make a checkpoint of one tensor of random bytes on a folder's disk but elsewhere, and not in the page cache."""
    if not hasattr(os, "posix_fadvise"):  # macOS and Windows
        raise Unmeasurable(UNTOLD)
    name = next(name for name, known in DTYPES.items() if known == dtype)
    try:
        place = scratch(folder)
        _remove_forgotten(place)
        if psutil.disk_usage(str(place)).free < 4 * FILE:
            raise Unmeasurable("the disk cannot be measured: it is nearly full")
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=place) as made:
            block, size, end = os.urandom(CHUNK), 0, time.perf_counter() + WRITING
            with Path(made, SINGLE).open("wb", buffering=0) as file:
                if not Residue(file.fileno()).known:
                    raise Unmeasurable(UNTOLD)
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
