"""The folder where we keep what was made once."""

from __future__ import annotations

import os
from pathlib import Path

DEMO_FOLDER = "SmolLM2-135M-Instruct-v1"  # counted up when the conversion changes


def cache_home() -> Path:
    """Return our cache folder: ``AIRLLM_NB_HOME``, or ``airllm_nb`` in the user's cache folder."""
    if home := os.environ.get("AIRLLM_NB_HOME"):
        return Path(home).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "airllm_nb"
