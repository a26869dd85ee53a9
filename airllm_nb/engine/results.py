"""The file that `LayeredModel.map` leaves results in as they come, and finds them in when it goes on: one JSON object a line.

A line is ``{"index": 3, "key": "5f1c…-90ab…-77e0…", "text": "…"}``. The three parts of the key are hashes of the model's files,
of the settings, and of the prompt as the model gets it: what was computed for anything else is refused, never taken.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from airllm_nb.errors import AirLLMError

PAGE = 4096
DIGITS = 16  # hexadecimal, of each hash
START = b'{"index": '
PARTS = ("model", "settings", "prompt")


class ResultsError(AirLLMError):
    """A file of results cannot be used: it belongs to something else, or to nobody."""


def hash_of(value: Any) -> str:
    """Return a short hash of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]


def hash_of_model(folder: Path, files: Iterable[Path]) -> str:
    """Return a short hash of a checkpoint: its ``config.json``, and of each file the size and a page from the middle.

    Training changes nearly every weight, so that page tells a model from the one that it was trained from.
    """
    found = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(files):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size // 2)
            found.update(f"{path.name} {size}\n".encode() + file.read(PAGE))
    return found.hexdigest()[:DIGITS]


class Results:
    """What is in a file already, and what is added to it.

    Parameters
    ----------
    path : str or path
        The file; it is made where there is none. A last line that was not written to its end is dropped.
    keys : sequence of str
        What line ``index`` must have as its key, see above.

    Attributes
    ----------
    found : dict of int to str
        The texts that were there, by index.

    Raises
    ------
    ResultsError
        If the file cannot be read or written, or holds anything but results of these keys.
    """

    def __init__(self, path: str | os.PathLike[str], keys: Sequence[str]) -> None:
        self._path = Path(path)
        self._keys = keys
        self.found: dict[int, str] = {}
        try:
            with self._path.open("a+b") as file:
                file.seek(0)
                lines = file.read().split(b"\n")
                unfinished = lines.pop()
                for number, line in enumerate(lines, 1):
                    index, text = self._parse(number, line)
                    self.found.setdefault(index, text)
                if not unfinished.startswith(START[: len(unfinished)]):  # a file of somebody else's, which is not to be cut
                    self._parse(len(lines) + 1, b"")
                if unfinished:
                    file.truncate(file.tell() - len(unfinished))
        except OSError as error:
            raise self._failed(error) from error

    def add(self, texts: Mapping[int, str]) -> None:
        """Append results, and return when they are on the disk.

        Raises
        ------
        ResultsError
            If they cannot be written.
        """
        lines = (
            json.dumps({"index": index, "key": self._keys[index], "text": text}, ensure_ascii=False)
            for index, text in texts.items()
        )
        try:
            with self._path.open("ab") as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def _parse(self, number: int, line: bytes) -> tuple[int, str]:
        """Return index and text of a line, if it answers one of our prompts."""
        try:
            result = json.loads(line)
            index, key, text = result["index"], result["key"], result["text"]
            of_these = type(index) is int and type(text) is str and len(key.split("-")) == len(PARTS)
        except (ValueError, KeyError, TypeError, AttributeError):
            of_these = False
        if not of_these:
            raise ResultsError(
                f"Line {number} of {self._path} is no result of map.", "Name another file: this one is not touched."
            )
        if not 0 <= index < len(self._keys):
            raise self._refused(f"has a result for prompt {index}, and there are {len(self._keys)} prompts (from 0 on)")
        parts = zip(PARTS, key.split("-"), self._keys[index].split("-"), strict=True)
        differing = [part for part, theirs, ours in parts if theirs != ours]
        if differing:
            another = {"model": "another model", "settings": "other settings", "prompt": f"another prompt {index}"}
            raise self._refused(f"was made with {' and '.join(another[part] for part in differing)} (line {number})")
        return index, text

    def _refused(self, why: str) -> ResultsError:
        return ResultsError(
            f"{self._path} {why}.", "Name another file, or go on with what made it: results are added, never replaced."
        )

    def _failed(self, error: OSError) -> ResultsError:
        return ResultsError(
            f"The results cannot be kept in {self._path}: {error.strerror or error}.",
            "Name a file in a folder that exists, that you may write to and that has room; what is complete in it is kept.",
        )
