"""Reads bytes of a checkpoint's files into memory that the caller owns, and tells what came from the disk.

Three promises: a file that changed since the checkpoint was opened raises (it never gives other weights without a word); nothing
is read through a mapping, so a truncated file cannot kill the process; and what a streaming read brought into the page cache is
dropped again, but not what was there before, because other processes may share it.
"""

from __future__ import annotations

import io
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

from airllm_nb.engine.checkpoint import Checkpoint, FileState
from airllm_nb.engine.page_cache import Residue
from airllm_nb.engine.readable import opened
from airllm_nb.errors import AirLLMError, CheckpointError

CHUNK = 8 << 20
"""Bytes per system call: large enough for the disk's full rate, small enough to stop quickly in between."""


class _File(NamedTuple):
    file: io.FileIO
    residue: Residue
    lock: threading.Lock


class Reader:
    """Positional reads from the files of one checkpoint; safe to use from several threads.

    Parameters
    ----------
    checkpoint : Checkpoint
        Names the files, and what each of them was when it was opened.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._states = checkpoint.states
        self._files: dict[Path, _File] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._left: dict[Path, _File] = {}  # files of the process that this one was forked from
        self._asked: dict[int, float] = {}  # by thread: since when it waits for the disk
        self.stopped = False
        """Set it to end a read that is under way."""

    def read(self, path: Path, offset: int, into: memoryview, *, keep_cached: bool) -> int:
        """Fill `into` from `offset` of a file.

        Parameters
        ----------
        path : Path
            One of the checkpoint's files.
        offset : int
            In bytes.
        into : memoryview
            Writable bytes; all of them are filled.
        keep_cached : bool
            False drops the pages that this read brought into the page cache.

        Returns
        -------
        int
            How many of the bytes were not in the page cache, as far as can be known (`Residue.known`).

        Raises
        ------
        CheckpointError
            If the file was removed, replaced, truncated or rewritten, or the disk gives an error.
        AirLLMError
            If it is `stopped`.
        """
        try:
            file = self._open(path)
            missed = self._fill(file, path, offset, into, keep_cached=keep_cached)
            self._check(path)
        except FileNotFoundError as error:
            raise changed(path, "was removed") from error
        except OSError as error:
            raise CheckpointError(
                f"Reading {path.name} failed: {error.strerror}.", "Check the disk, then load the model again."
            ) from error
        return missed

    def is_cached(self, path: Path, offset: int) -> bool | None:
        """Tell whether the page cache holds the byte at `offset` of a file, reading nothing; None if that cannot be known."""
        file = self._open(path)
        with file.lock:
            return file.residue.holds(offset)

    def unanswered(self) -> float:
        """Return for how many seconds the disk has left a read unanswered; 0 if none is under way."""
        return time.monotonic() - min(self._asked.copy().values(), default=time.monotonic())

    def close(self) -> None:
        """Close the files. Reading again opens them again."""
        with self._lock:
            while self._files:
                _, file = self._files.popitem()
                with file.lock:
                    file.residue.drop_all()
                file.file.close()

    def _open(self, path: Path) -> _File:
        if os.getpid() != self._process:  # forked: any lock may be held for ever by a thread that stayed there
            self._lock, self._left, self._files = threading.Lock(), self._files, {}
            self._process = os.getpid()
        with self._lock:
            if path not in self._files:
                file = opened(path)
                self._files[path] = _File(file, Residue(file.fileno()), threading.Lock())
            return self._files[path]

    def _fill(self, file: _File, path: Path, offset: int, into: memoryview, *, keep_cached: bool) -> int:
        end = offset + len(into)
        with file.lock:
            missed = file.residue.missing(offset, end, keep=keep_cached)
        done = 0
        while done < len(into):
            if self.stopped:
                raise AirLLMError("The model was unloaded while its weights were read.", "Load it again.")
            try:
                self._asked[threading.get_ident()] = time.monotonic()
                count = _read(file.file.fileno(), into[done : done + CHUNK], offset + done)
            finally:
                self._asked.pop(threading.get_ident(), None)
            if count == 0:
                raise changed(path, "was truncated")
            if not keep_cached:
                with file.lock:
                    file.residue.drop(offset + done, offset + done + count)
            done += count
        return missed

    def _check(self, path: Path) -> None:
        """Check by name *after* reading: then what was read is what the checkpoint described."""
        if FileState.of(os.stat(path)) != self._states[path]:  # noqa: PTH116  # half the time of Path.stat, at every tensor
            raise changed(path, "was replaced or rewritten")


_seeking = threading.Lock()


def _read(descriptor: int, into: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [into], offset)
    with _seeking:  # Windows has no positional read
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(into))
    into[: len(data)] = data
    return len(data)


def changed(path: Path, how: str) -> CheckpointError:
    """Return the error of a file that is no longer what the checkpoint described."""
    return CheckpointError(
        f"{path.name} {how} after the model was loaded, so its weights can no longer be trusted.", "Load the model again."
    )
