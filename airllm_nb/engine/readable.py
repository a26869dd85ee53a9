"""What the small files of a checkpoint's folder must be before anybody opens them: this package, transformers or tokenizers.

A pipe would be waited for, a file of many gigabytes fills the memory, and what cannot be opened is taken by transformers for
absent: without its tokenizer_config.json a model gets other prompts, without a word.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from airllm_nb.engine.interrupts import interrupt_later
from airllm_nb.errors import CheckpointError

AGAIN = "Fetch or copy the checkpoint again, then load it again."
SUFFIXES = frozenset((".json", ".jinja", ".model", ".txt"))
MOST = 64 << 20
"""Bytes of a small file. The largest that are known, tokenizers of 262,144 tokens, have 35 MB."""


def require_readable(folder: Path) -> None:
    """Look at the small files of a folder, and open none.

    Parameters
    ----------
    folder : Path
        The checkpoint's folder; one that is not there is left to whoever reads its config.json.

    Raises
    ------
    CheckpointError
        If one of them is a broken link, a pipe or anything else that is no file, or too large.
    """
    if not folder.is_dir():
        return
    for path in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES):
        with reading(path):
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path.name} is no file.", AGAIN)
        if status.st_size > MOST:
            raise CheckpointError(
                f"{path.name} has {status.st_size} bytes, more than any such file needs ({MOST}): it is damaged.", AGAIN
            )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of an error of the disk which file it is, and what to do.

    Raises
    ------
    CheckpointError
        In place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror}).", AGAIN) from error


def opened(path: Path) -> io.FileIO:
    """Open a file for reading, and never wait for who would write into a pipe of that name."""
    with interrupt_later():  # between a number from ``os.open`` and who closes it
        return io.FileIO(path, opener=_without_waiting)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
