"""What a ``config.json`` must be before anybody reads it, whatever transformers is installed.

Some versions check some fields and others none. Then the user gets a TypeError from deep within, a model of 10^9 layers is built
until memory ends, or a field that is no object is taken for one that is absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from airllm_nb.compat.versions import Raw

OBJECTS = ("text_config", "rope_scaling", "rope_parameters", "quantization_config", "auto_map")
IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
"""Which code computes a part. transformers fetches one of the name org/name from the hub, and runs it."""
MOST = 10_000
"""More layers or heads than any model has."""
COUNTED = ((re.compile(r"\w*(layers?|blocks)"), MOST), (re.compile(r"\w*experts?"), 100_000))
"""Names of what is built one by one, and more than any model has of it; Doge has 16,384 experts."""
SIZES = {
    "num_hidden_layers": MOST, "n_layer": MOST, "n_layers": MOST, "num_layers": MOST,
    "num_attention_heads": MOST, "n_head": MOST, "n_heads": MOST,
    "hidden_size": 10**6, "n_embd": 10**6, "vocab_size": 10**8,
}  # fmt: skip
"""What a language model has at least one of, and far fewer than this."""
NUMBERS = ("head_dim", "max_position_embeddings")
ROPE_NUMBERS = ("factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim")
"""What is calculated with before transformers reads it."""


def faults(raw: Raw) -> Iterator[str]:
    """Yield what is wrong with a config.json, in words: ``"model_type 5, which must be a name"``.

    Parameters
    ----------
    raw : dict
        ``config.json``.
    """
    yield from _wrong_types(raw)
    text = raw.get("text_config")
    yield from _wrong_sizes(text if isinstance(text, dict) else raw)


def _wrong_types(raw: Raw) -> Iterator[str]:
    """Look at what says what the model is, and its parts are."""
    if not isinstance(raw.get("model_type"), str | None):
        yield _fault("model_type", raw["model_type"], "a name")
    for name in OBJECTS:
        if not isinstance(raw.get(name), dict | None):
            yield _fault(name, raw[name], "an object or null")
    for name, value in raw.items():
        if IMPLEMENTATIONS.fullmatch(name) and "/" in json.dumps(value):
            yield _fault(name, value, "one that transformers has: code from the hub is not run unasked")
        if name in ("rope_scaling", "rope_parameters") and isinstance(value, dict):
            yield from _wrong_rope(name, value)
        if name.endswith("_config") and isinstance(value, dict):
            yield from _wrong_types(value)


def _wrong_sizes(raw: Raw) -> Iterator[str]:
    for name, most in SIZES.items():
        if name in raw and not (type(raw[name]) is int and 0 < raw[name] <= most):
            yield _fault(name, raw[name], f"a whole number from 1 to {most}")
    for name, value in raw.items():
        for pattern, most in COUNTED:
            if name not in SIZES and pattern.fullmatch(name) and isinstance(value, int) and value > most:
                yield _fault(name, value, f"at most {most}")
    for name in NUMBERS:
        if not _number(raw.get(name)):
            yield _fault(name, raw[name], "a number")


def _wrong_rope(path: str, rope: Raw) -> Iterator[str]:
    """Look at a rotary embedding's parameters, and at those that it has for each type of layer."""
    for name in ("rope_type", "type"):
        if not isinstance(rope.get(name), str | None):
            yield _fault(f"{path}.{name}", rope[name], "a name")
    for name in ROPE_NUMBERS:
        if not _number(rope.get(name)):
            yield _fault(f"{path}.{name}", rope[name], "a number")
    for name, value in rope.items():
        if isinstance(value, dict):
            yield from _wrong_rope(f"{path}.{name}", value)


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _fault(name: str, value: Any, must: str) -> str:
    shown = json.dumps(value)
    return f"{name} {shown if len(shown) <= 40 else shown[:37] + '...'}, which must be {must}"  # noqa: PLR2004  # to read
