"""A GGUF model in several files, as llama.cpp writes and names them: all are there, and belong to each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from airllm_nb.engine.gguf_header import Header
from airllm_nb.errors import CheckpointError

NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
OF_A_FILE = (NUMBER, COUNT, TENSORS, "general.alignment")
"""Fields that a part may have for itself. All others stand in the first one."""
SHOWN = 5
WHOLE = "Fetch all parts of the model again, into one folder, under their own names."


def part_paths(path: Path) -> tuple[Path, ...]:
    """Return all files of the model that a file belongs to, in their order: itself if its name says no more.

    Raises
    ------
    CheckpointError
        If one is missing, or there is no such part.
    """
    found = NAME.fullmatch(path.name)
    if found is None or int(found[3]) == 0:
        return (path,)
    stem, number, count, suffix = found.groups()
    if not 0 < int(number) <= int(count):
        raise CheckpointError(f"{path.name} is by its name part {int(number)} of {int(count)}.", WHOLE)
    paths = tuple(path.with_name(f"{stem}-{number:05}-of-{count}{suffix}") for number in range(1, int(count) + 1))
    if missing := [part.name for part in paths if not part.is_file()]:
        shown = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
        raise CheckpointError(f"{len(missing)} of the {len(paths)} parts of the model are missing: {shown}.", WHOLE)
    return paths


def require_whole(headers: Mapping[Path, Header]) -> None:
    """Refuse parts that do not belong to each other.

    Parameters
    ----------
    headers : mapping of Path to Header
        Of all parts, in their order.

    Raises
    ------
    CheckpointError
        With what is wrong.
    """
    first, names = next(iter(headers.values())), [tensor.name for header in headers.values() for tensor in header.tensors]
    for number, (path, header) in enumerate(headers.items()):
        said = header.fields.get(NUMBER) or 0, header.fields.get(COUNT) or 1
        if said != (number, len(headers)):
            raise CheckpointError(
                f"{path.name} says {NUMBER} {said[0]} and {COUNT} {said[1]}, and its name {number + 1} of {len(headers)}.", WHOLE
            )
        if header.fields.get(TENSORS, len(names)) != len(names):
            raise CheckpointError(
                f"{path.name} is of a model with {header.fields[TENSORS]} tensors, and the parts here hold {len(names)}.", WHOLE
            )
        for key, value in header.fields.items():
            if header is not first and key not in OF_A_FILE and (key not in first.fields or first.fields[key] != value):
                raise CheckpointError(f"{path.name} says {key} ({value}), and the first part of the model does not.", WHOLE)
    if len(set(names)) < len(names):
        raise CheckpointError(f"Two parts hold one tensor: {next(name for name in names if names.count(name) > 1)}.", WHOLE)
