"""Reads bytes of a checkpoint's files into memory that the caller owns, and tells what came from the disk.

Three promises: a file that changed since the checkpoint was opened raises (it never gives other weights without a word); nothing
is mapped, so a truncated file cannot kill the process; and what a streaming read brought into the page cache is dropped again,
but not what was there before, because other processes may share it.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path

from airllm_nb.engine.checkpoint import Checkpoint, FileState
from airllm_nb.errors import AirLLMError, CheckpointError

CHUNK = 8 << 20
"""Bytes per system call: large enough for the disk's full rate, small enough to stop quickly in between."""

PAGE = mmap.PAGESIZE

_NOWAIT = getattr(os, "RWF_NOWAIT", None)  # Linux: read only what is in the page cache


class Reader:
    """Positional reads from the files of one checkpoint; safe to use from several threads.

    Parameters
    ----------
    checkpoint : Checkpoint
        Names the files, and what each of them was when it was opened.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._states = checkpoint.states
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
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
            How many of the bytes were not in the page cache.

        Raises
        ------
        CheckpointError
            If the file was removed, replaced, truncated or rewritten, or the disk gives an error.
        """
        done = missed = 0
        try:
            descriptor = self._open(path)
            while done < len(into):
                if self.stopped:
                    raise AirLLMError("The model was unloaded while its weights were read.", "Load it again.")
                cached, size = _alike(descriptor, min(CHUNK, len(into) - done), offset + done)
                part = into[done : done + size]
                count = _read_cached(descriptor, part, offset + done) if cached else 0
                if count == 0:
                    count = _read_disk(descriptor, part, offset + done)
                    missed += count
                    if count and not keep_cached and hasattr(os, "posix_fadvise"):
                        # Whole pages only are dropped; one that stays at an edge would make the piece look cached next time.
                        begin, end = (offset + done) // PAGE * PAGE, -(-(offset + done + count) // PAGE) * PAGE
                        os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)
                if count == 0:
                    raise _changed(path, "was truncated")
                done += count
            self._check(path)
        except FileNotFoundError as error:
            raise _changed(path, "was removed") from error
        except OSError as error:
            raise CheckpointError(
                f"Reading {path.name} failed: {error.strerror}.", "Check the disk, then load the model again."
            ) from error
        return missed

    def is_cached(self, path: Path, offset: int) -> bool:
        """Tell whether the page cache is known to hold the byte at `offset` of a file; reads nothing from the disk."""
        return _read_cached(self._open(path), memoryview(bytearray(1)), offset) == 1

    def close(self) -> None:
        """Close the files. Reading again opens them again."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
                if hasattr(os, "posix_fadvise"):  # the kernel's own read-ahead would hide what was cached before
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                self._descriptors[path] = descriptor
            return self._descriptors[path]

    def _check(self, path: Path) -> None:
        """Check by name *after* reading: then what was read is what the checkpoint described."""
        if FileState.of(os.stat(path)) != self._states[path]:  # noqa: PTH116  # half the time of Path.stat, at every tensor
            raise _changed(path, "was replaced or rewritten")


def _alike(descriptor: int, size: int, offset: int) -> tuple[bool, int]:
    """Return whether the page cache holds what lies at `offset`, and how much there, `size` or less, begins and ends alike.

    Looked at byte by byte: Linux 6 starts to read all that a larger look does not find, and what has arrived by the next look
    would pass for what was there before.
    """

    def look(at: int) -> bool:
        return _read_cached(descriptor, memoryview(bytearray(1)), at) == 1

    cached = look(offset)
    while size > PAGE and look(offset + size - 1) != cached:
        size //= 2
    return cached, size


def can_tell_cached() -> bool:
    """Tell whether this system says what is in the page cache and what is not."""
    return _NOWAIT is not None


def _read_cached(descriptor: int, into: memoryview, offset: int) -> int:
    """Read what lies in the page cache, up to the first page that does not; 0 if nothing or unknown."""
    if _NOWAIT is None:
        return 0
    try:
        return os.preadv(descriptor, [into], offset, _NOWAIT)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return 0
        raise


_seeking = threading.Lock()


def _read_disk(descriptor: int, into: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [into], offset)
    with _seeking:  # Windows has no positional read
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(into))
    into[: len(data)] = data
    return len(data)


def _changed(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name} {how} after the model was loaded, so its weights can no longer be trusted.", "Load the model again."
    )
