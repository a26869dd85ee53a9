"""The folder where we keep what was made once."""

from __future__ import annotations

import json
import os
from pathlib import Path

from airllm_nb.errors import AirLLMError

ABOUT = "about.json"
"""In each folder that we make but the demo's: what it is. By that we know it as ours."""
GGUF_FOLDER = "gguf"
QUANTIZED_FOLDER = "quantized"
DEMO_FOLDER = "SmolLM2-135M-Instruct-v1"  # counted up when the conversion changes


def cache_home() -> Path:
    """Return our cache folder: ``AIRLLM_NB_HOME``, or ``airllm_nb`` in the user's cache folder.

    Raises
    ------
    AirLLMError
        If it is in the home of somebody who has none.
    """
    home = os.environ.get("AIRLLM_NB_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/airllm_nb"
    try:
        return Path(home).expanduser().absolute()
    except RuntimeError as error:
        raise AirLLMError(f"There is no folder {home}: {error}", "Set AIRLLM_NB_HOME to a folder that can be written.") from error


def describe(folder: Path, model: str, what: str, source: str) -> None:
    """Write into a folder of ours what it is."""
    about = {"model": model, "what": what, "source": source}
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
