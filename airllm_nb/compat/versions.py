"""Which transformers is installed, what each feature needs of it, and the message when it is too old."""

from __future__ import annotations

import importlib.metadata

from airllm_nb.errors import UnsupportedError

FLOOR = (4, 43)
"""The oldest version that reads Llama-3.1's rope_scaling."""


def installed() -> tuple[int, ...]:
    """Return the installed version of transformers, for example ``(4, 57, 6)``, without importing it."""
    text = importlib.metadata.version("transformers")
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def installed_text() -> str:
    """Return ``"transformers 4.57.6"``."""
    return f"transformers {importlib.metadata.version('transformers')}"


def upgrade(minimum: str) -> str:
    """Return the remedy that installs at least `minimum`, for example ``"4.51"``."""
    return f'Run  %pip install -U "transformers>={minimum}"  and restart the kernel.'


def require_floor() -> None:
    """Refuse a transformers below the floor.

    Raises
    ------
    UnsupportedError
        Names the installed version, the one needed, and the command that installs it.
    """
    if installed() < FLOOR:
        floor = ".".join(map(str, FLOOR))
        raise UnsupportedError(f"{installed_text()} is too old: airllm_nb needs {floor} or newer.", upgrade(floor))
