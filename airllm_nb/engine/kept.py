"""What we keep on this machine's disk: quantized layers, and the converted demo; and how it is cleared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from airllm_nb.engine.home import cache_home
from airllm_nb.engine.packed_cache import ABOUT, FOLDER
from airllm_nb.errors import AirLLMError


@dataclass(frozen=True)
class Kept:
    """One folder that we have written.

    Attributes
    ----------
    name : str
        What it is of, in words.
    folder : Path
        Where it is.
    nbytes : int
        Bytes of its files.
    """

    name: str
    folder: Path
    nbytes: int


def kept() -> list[Kept]:
    """Return what is there, the largest first."""
    home = cache_home()
    found = [Kept(_name(folder), folder, _nbytes(folder)) for folder in _folders(home / FOLDER)]
    found += [Kept(folder.name, folder, _nbytes(folder)) for folder in _folders(home) if (folder / "config.json").is_file()]
    return sorted(found, key=lambda one: -one.nbytes)


def clear(entries: Iterable[Kept]) -> None:
    """Remove it from the disk. A model that is loaded and reads from it fails at its next token, with a word why.

    Raises
    ------
    AirLLMError
        If something cannot be removed.
    """
    try:
        for entry in entries:
            shutil.rmtree(entry.folder)
    except OSError as error:
        raise AirLLMError(
            f"{error.filename or 'It'} cannot be removed: {error.strerror or error}.", "Remove it by hand, as whoever owns it."
        ) from error


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.glob("[!.]*") if path.is_dir())


def _name(folder: Path) -> str:
    """Return what a folder of quantized layers is of, by its own word."""
    try:
        about = json.loads((folder / ABOUT).read_bytes())
        return f"{about['model']}, {about['quantization']}, from {about['source']}"
    except (OSError, ValueError, KeyError, TypeError):
        return folder.name


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
