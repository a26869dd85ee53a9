"""Where the prompts of %airllm map come from: a variable, a column of one, or a file."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from airllm_nb.errors import PromptError

COLUMN = re.compile(r"(\w+)(?:\.(\w+)|\[(.+)\])")
FIELDS = ("prompt", "text", "question")
"""What a JSON object may call its prompt; the first that it has."""


def prompts(word: str, names: Mapping[str, Any]) -> Iterable[str]:
    """Return the prompts that a word on the line stands for.

    Parameters
    ----------
    word : str
        A variable's name; ``df.column``, ``df["column"]`` or ``df[0]``; or a file with a prompt on each line. Where its name ends
        in ``.jsonl`` or ``.ndjson``, each line is JSON (a string, or an object with one of `FIELDS`); where it ends in ``.json``,
        the file is a JSON list of those.
    names : mapping
        The user's variables.

    Raises
    ------
    PromptError
        If there is no such thing, or it holds no prompts.
    """
    if word in names:
        return _of_variable(word, names[word])
    if (found := COLUMN.fullmatch(word)) and found[1] in names:
        return _of_column(word, names[found[1]], found[2] or found[3].strip("\"'"))
    path = _file(word)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{word} cannot be read as text: {error}.", "Save it as UTF-8, a prompt on each line.") from error
    said = list(_of_text(word, text, path.suffix.lower()))
    if not said:
        raise PromptError(f"{word} holds no prompts.", "Write one on each line.")
    return said


def _file(word: str) -> Path:
    try:
        path = Path(word).expanduser()
        if path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):  # too long, with NUL in it, the folder of nobody
        pass
    raise PromptError(
        f"There is neither a variable nor a file {reprlib.repr(word)}.",
        "Name a list (without braces), a column such as df.question, or a file with a prompt on each line.",
    )


def _is_table(value: Any) -> bool:
    return hasattr(value, "columns") and not callable(value.columns)


def _of_variable(word: str, value: Any) -> Iterable[str]:
    if _is_table(value):
        column = next(iter(value.columns), "column")
        said = f'"{column}"' if isinstance(column, str) else column
        raise PromptError(f"{word} is a table.", f"Name one of its columns: {word}[{said}].")
    return value  # type: ignore[no-any-return]  # the engine looks at what it holds


def _of_column(word: str, table: Any, name: str) -> Iterable[str]:
    keys: list[Any] = [name]
    if name.isdecimal() and (_is_table(table) or isinstance(table, Mapping)):
        keys.append(int(name))
    for key in keys:
        try:
            column = table[key]
        except (KeyError, TypeError, IndexError, ValueError):
            continue
        if _is_table(column):
            raise PromptError(f"There are several columns {word}.", "Rename them, or put the one you mean into a variable.")
        return column  # type: ignore[no-any-return]  # as above
    raise PromptError(f"There is no {word}: {name!r} names no column.", "Look at what the variable holds.")


def _of_text(word: str, text: str, suffix: str) -> Iterable[str]:
    if suffix == ".json":
        said = _parsed(text)
        if not isinstance(said, list):
            raise PromptError(
                f"{word} is no JSON list.", "Write a list of prompts, or name it .jsonl and write one on each line."
            )
        return (_prompt(f"Item {number} (from 0 on) of {word}", item) for number, item in enumerate(said))
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    if suffix in (".jsonl", ".ndjson"):
        return (_prompt(f"Line {number} of {word}", _parsed(line)) for number, line in lines)
    return (line.removesuffix("\r") for _, line in lines)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _prompt(where: str, said: Any) -> str:
    if isinstance(said, dict):
        said = next((said[name] for name in FIELDS if name in said), None)
    if not isinstance(said, str):
        one_of = ", ".join(f'"{name}"' for name in FIELDS)
        raise PromptError(f"{where} has no prompt.", f"Write a JSON string, or an object with one of {one_of}.")
    return said
