"""Tab completion of what stands on a line with %airllm or %%airllm."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from airllm_nb.notebook.options import CELL, VERBS


def complete(shell: Any, event: Any) -> list[str]:
    """Return what could stand at the cursor: IPython's ``complete_command`` hook.

    `event.symbol` is what IPython will replace; it may be only the end of a word (``:`` and ``=`` separate).
    """
    *before, word = event.text_until_cursor.split(" ")
    candidates = _candidates([text for text in before if text], word, shell.user_ns)
    kept = len(word) - len(event.symbol)
    return [text[kept:] for text in candidates if text.startswith(word)]


def _candidates(before: list[str], word: str, names: Mapping[str, Any]) -> list[str]:
    magic, *arguments = before
    parser = CELL
    if not magic.startswith("%%"):
        if not arguments or arguments[0] not in VERBS:
            return [] if arguments else list(VERBS)
        parser = VERBS[arguments[0]]
    option, equals, _ = word.partition("=")
    if equals:
        return [f"{option}={value}" for value in _values(option)]
    last = arguments[-1] if arguments else ""
    values = _values(last)
    if values:
        return values
    if word.startswith("-") or parser is CELL:
        return parser.words
    if not parser.words or any(text for text in arguments[1:] if not text.startswith("-")):
        return parser.words
    return [*(_prompts(names) if parser is VERBS["map"] else ["demo", *_cached(), *_folders(word)]), *parser.words]


def models() -> list[str]:
    """Name the models that can be loaded without a download: the demo, those in the hub's cache, and folders near this one."""
    nearby = sorted(str(file.parent) for pattern in ("*/config.json", "*/*/config.json") for file in Path().glob(pattern))
    return ["demo", *_cached(), *(folder for folder in nearby if any(Path(folder).glob("*.safetensors")))]


def _cached() -> list[str]:
    """Name the models whose weights are in the hub's cache."""
    from huggingface_hub import constants

    files = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/*.safetensors")
    folders = {file.parents[2].name for file in files if (file.parent / "config.json").exists()}
    return sorted(name.removeprefix("models--").replace("--", "/") for name in folders)


def _prompts(names: Mapping[str, Any]) -> list[str]:
    """Name the variables that may hold prompts: lists, tuples, and columns of tables; and the files beside the notebook."""
    held = [
        name if isinstance(value, (list, tuple)) else f"{name}.{column}"
        for name, value in names.items()
        if not name.startswith("_")
        for column in ([""] if isinstance(value, (list, tuple)) else getattr(value, "columns", ()))
        if not column or str(column).isidentifier()
    ]
    files = [path.name for suffix in ("txt", "jsonl") for path in Path().glob(f"*.{suffix}") if " " not in path.name]
    return [*sorted(held), *sorted(files)]


def _values(option: str) -> list[str]:
    if option == "--device":
        return ["auto", *_devices()]
    if option == "--dtype":
        return ["auto", "float32", "bfloat16", "float16"]
    if option == "--quantize":
        return ["int8", "int4", "int4-gptq", "int8+head", "int4+head"]
    return []


def _devices() -> list[str]:
    """Name the devices that can be used; without torch in memory, all there may be: importing it takes seconds."""
    if "torch" not in sys.modules:
        return ["cpu", "cuda", "mps", "xpu"]
    from airllm_nb.engine.devices import devices

    return [device.name for device in devices() if device.usable]


def _folders(word: str) -> list[str]:
    """Name the folders that begin with `word`, as it is written."""
    head, slash, tail = word.rpartition("/")
    try:
        found = [
            entry.name
            for entry in Path(head + slash or ".").expanduser().iterdir()
            if entry.is_dir() and entry.name.startswith(tail) and (tail or not entry.name.startswith("."))
        ]
    except OSError:
        return []
    return [f"{head}{slash}{name}/" for name in sorted(found) if " " not in name]
