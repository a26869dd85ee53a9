"""What we keep on this machine's disk: quantized layers, small files of GGUF models, the converted demo; how it is cleared."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from airllm_nb.engine.home import ABOUT, DEMO_FOLDER, GGUF_FOLDER, QUANTIZED_FOLDER, cache_home
from airllm_nb.engine.packed_cache import LOCK
from airllm_nb.errors import AirLLMError


@dataclass(frozen=True)
class Kept:
    """One folder that we have written.

    Attributes
    ----------
    name : str
        The model, and how it is quantized.
    text : str
        The same, and where it comes from.
    folder : Path
        Where it is.
    nbytes : int
        Bytes of its files.
    """

    name: str
    text: str
    folder: Path
    nbytes: int


def kept() -> list[Kept]:
    """Return what is there, the largest first: nothing but what we know as ours, for others may use the folder as well."""
    home = cache_home()
    folders = [path.parent for kind in (QUANTIZED_FOLDER, GGUF_FOLDER) for path in home.glob(f"{kind}/*/{ABOUT}")]
    found = [Kept(*_described(folder), folder, _nbytes(folder)) for folder in folders]
    if (home / DEMO_FOLDER / "config.json").is_file():
        found.append(Kept("demo", "the demo model, converted", home / DEMO_FOLDER, _nbytes(home / DEMO_FOLDER)))
    return sorted(found, key=lambda one: -one.nbytes)


def clear(entries: Iterable[Kept]) -> None:
    """Remove it from the disk. A model that is loaded and reads from it fails at its next token, with a word why.

    Raises
    ------
    AirLLMError
        If something is being written, or cannot be removed.
    """
    try:
        for entry in entries:
            with FileLock(entry.folder / LOCK, timeout=0):
                shutil.rmtree(entry.folder)
    except Timeout as error:
        raise AirLLMError("Another process writes to it at this moment.", "Wait until it is done, or stop it.") from error
    except OSError as error:
        raise AirLLMError(
            f"{error.filename or 'It'} cannot be removed: {error.strerror or error}.", "Remove it by hand, as whoever owns it."
        ) from error


def _described(folder: Path) -> tuple[str, str]:
    """Return name and description of a folder, by its own word."""
    try:
        about = json.loads((folder / ABOUT).read_bytes())
        name = f"{about['model']}, {about.get('what') or about['quantization']}"
        return name, f"{name}, from {about['source']}"
    except (OSError, ValueError, KeyError, TypeError):
        return folder.name, folder.name


def _nbytes(folder: Path) -> int:
    return sum(_occupied(path.stat()) for path in folder.rglob("*") if path.is_file())


def _occupied(stat: os.stat_result) -> int:
    """Return the bytes of a file, or fewer where it has holes: of a header's file all but the header is one."""
    blocks: int | None = getattr(stat, "st_blocks", None)  # which Windows does not tell
    return stat.st_size if blocks is None else min(stat.st_size, blocks * 512)
