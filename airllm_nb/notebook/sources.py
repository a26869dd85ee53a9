"""Where the prompts of %airllm map come from: a variable, a column of one, or a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airllm_nb.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

COLUMN = re.compile(r"(\w+)(?:\.(\w+)|\[(.+)\])")
FIELDS = ("prompt", "text", "question")
"""What a JSON object of a line may call its prompt; the first that it has."""


def prompts(word: str, names: Mapping[str, Any]) -> Iterable[str]:
    """Return the prompts that a word on the line stands for.

    Parameters
    ----------
    word : str
        A variable's name; ``df.column`` or ``df["column"]``; or a file with a prompt on each line, which is JSON (a string, or an
        object with one of `FIELDS`) where its name ends in ``.jsonl``.
    names : mapping
        The user's variables.

    Raises
    ------
    PromptError
        If there is no such thing, or it holds no prompts.
    """
    if word in names:
        return _checked(word, names[word])
    if (found := COLUMN.fullmatch(word)) and found[1] in names:
        return _checked(word, _column(word, names[found[1]], found[2] or found[3].strip("\"'")))
    path = Path(word).expanduser()
    if not path.is_file():
        raise PromptError(
            f"There is neither a variable nor a file {word!r}.",
            "Name a list, a column such as df.question, or a file with a prompt on each line.",
        )
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{word} cannot be read as text: {error}.", "Save it as UTF-8, a prompt on each line.") from error
    read = _read_json if path.suffix in (".jsonl", ".ndjson") else _read_text
    return [read(word, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _checked(word: str, value: Any) -> Iterable[str]:
    if hasattr(value, "columns"):
        raise PromptError(f"{word} is a table.", f'Name one of its columns: {word}["{next(iter(value.columns), "column")}"].')
    return value  # type: ignore[no-any-return]  # the engine looks at what it holds


def _column(word: str, table: Any, name: str) -> Any:
    try:
        return table[name]
    except (KeyError, TypeError, IndexError, ValueError):
        raise PromptError(f"There is no {word}: {name!r} names no column.", "Look at what the variable holds.") from None


def _read_text(_word: str, _number: int, line: str) -> str:
    return line.removesuffix("\r")


def _read_json(word: str, number: int, line: str) -> str:
    try:
        said = json.loads(line)
    except ValueError:
        said = None
    if isinstance(said, dict):
        said = next((said[name] for name in FIELDS if name in said), None)
    if not isinstance(said, str):
        one_of = ", ".join(f'"{name}"' for name in FIELDS)
        raise PromptError(f"Line {number} of {word} has no prompt.", f"Write a JSON string, or an object with one of {one_of}.")
    return said
