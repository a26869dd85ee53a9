"""The file that `LayeredModel.map` leaves results in as they come, and finds them in when it goes on: one JSON object a line.

A line is ``{"index": 3, "key": "5f1c…-90ab…-77e0…", "text": "…"}``. The three parts of the key are hashes of the model, of the
settings, and of the prompt (see `airllm_nb.engine.fingerprint`): what was computed for anything else is refused, never taken.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from airllm_nb.errors import AirLLMError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

START = b'{"index": '
PARTS = ("model", "settings", "prompt")


class ResultsError(AirLLMError):
    """A file of results cannot be used: it belongs to something else, or to nobody."""


class Results:
    """What is in a file already, and what is added to it; several processes may add to one. Made by `open`.

    Attributes
    ----------
    found : dict of int to str
        The texts that were there, by index.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self._path = path
        self._keys = keys
        self._unwritable: OSError | None = None
        self.found: dict[int, str] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], keys: Sequence[str]) -> Results:
        """Read a file of results, or make it where there is none. A last line that was not written to its end is dropped.

        Parameters
        ----------
        path : str or path
            The file; ``~`` is the user's own folder, and where it is does not change when the working directory does.
        keys : sequence of str
            What line ``index`` must have as its key, see above.

        Raises
        ------
        ResultsError
            If the file cannot be read, or holds anything but results of these keys.
        """
        try:
            where = Path(path).expanduser().absolute()
            with contextlib.suppress(OSError):
                where.stat()
        except (TypeError, ValueError, RuntimeError) as error:  # no path, one with NUL in it, the folder of nobody
            raise ResultsError(f"There can be no file {str(path)!r}.", "Name a file in a folder that exists.") from error
        results = cls(where, keys)
        results._read()
        return results

    def require_writable(self) -> None:
        """Refuse to go on if nothing can be added: before it is computed, rather than after.

        Raises
        ------
        ResultsError
            If the file can only be read.
        """
        if self._unwritable is not None:
            raise self._failed(self._unwritable)

    def add(self, texts: Mapping[int, str]) -> None:
        """Append results, and return when they are on the disk.

        Raises
        ------
        ResultsError
            If they cannot be written.
        """
        self.require_writable()
        lines = (
            json.dumps({"index": index, "key": self._keys[index], "text": text}, ensure_ascii=False)
            for index, text in texts.items()
        )
        try:
            with self._path.open("ab") as file, _locked(file):
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def _read(self) -> None:
        try:
            with self._open() as file, _locked(file):
                file.seek(0)
                lines = file.read().split(b"\n")
                unfinished = lines.pop()
                for number, line in enumerate(lines, 1):
                    index, text = self._parse(number, line)
                    self.found.setdefault(index, text)
                if not unfinished.startswith(START[: len(unfinished)]):  # a file of somebody else's, which is not to be cut
                    self._parse(len(lines) + 1, b"")
                end = file.tell()
                if unfinished and self._unwritable is None and file.seek(0, os.SEEK_END) == end:  # or it is being written now
                    file.truncate(end - len(unfinished))
        except OSError as error:
            raise self._failed(error) from error

    def _open(self) -> IO[bytes]:
        if self._path.exists() and not (self._path.is_file() or self._path.is_dir()):  # opening a pipe would wait
            raise OSError(errno.EINVAL, "it is no regular file")
        try:
            return self._path.open("a+b")
        except OSError as error:
            if not self._path.is_file():
                raise
            self._unwritable = error  # what it holds may be all that is asked for
            return self._path.open("rb")

    def _parse(self, number: int, line: bytes) -> tuple[int, str]:
        """Return index and text of a line, if it answers one of our prompts."""
        try:
            result = json.loads(line)
            index, key, text = result["index"], result["key"], result["text"]
            of_these = type(index) is int and type(text) is str and len(key.split("-")) == len(PARTS)
            of_these &= len(text.encode()) >= 0  # half of a character could not be written again
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
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


@contextlib.contextmanager
def _locked(file: IO[Any]) -> Iterator[None]:
    """Keep other processes out meanwhile, where the file system can; closing the file lets them in at the latest."""
    if fcntl is None:
        yield
        return
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
