"""Whether rows of different lengths, padded to one, give what each of them gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from airllm_nb.compat import versions
from airllm_nb.compat.config import field, text_config
from airllm_nb.compat.versions import Version, rope_type

PADDED: dict[str, Version] = dict.fromkeys((
    "cohere", "deepseek_v2", "deepseek_v3", "falcon", "gemma", "glm", "glm4", "glm4_moe", "gpt2", "gpt_neox", "gpt_oss",
    "granite", "internlm3", "llama", "llama4_text", "mistral", "mixtral", "olmo2", "olmo3", "phi", "phi3", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
), (0,)) | dict.fromkeys(("cohere2", "gemma2", "gemma3_text"), (4, 57))  # fmt: skip
"""From which version on padded rows of a model type are what each row is alone.

Measured: logits and texts, on every version in `TESTED`, with the families of the tests. Before 4.57 the static cache of models
with some sliding windows took padding for text. Of all other types, about 30 of 150 differ on 5.23: a recurrent state, absolute
positions, sparse attention. So what is not in the table is not padded.
"""

ALONE = frozenset(("reformer", "rwkv"))
"""Types that give other texts in a batch even where all rows have one length; all other types of 5.23 were compared."""

ROPE_OF_THE_LONGEST = frozenset(("dynamic", "longrope"))
"""Rotary embeddings that turn by another angle in all rows when the longest gets longer than the original context."""

COUNTS_PADDING = ("no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "stop_strings")
"""What a generation config may demand that looks at sequences of the prompt's tokens, those of its padding among them."""


def rows(model: Any, asked: int) -> int:
    """Return how many rows of one length may share a pass, up to `asked`."""
    return 1 if text_config(model.config).model_type in ALONE else asked


def exact(model: Any, tokens: int) -> bool:
    """Tell whether a model gives for padded rows what it gives for each alone.

    Parameters
    ----------
    model : LayeredModel
        The model.
    tokens : int
        How long a row may get, prompt and answer together.
    """
    text = text_config(model.config)
    since = PADDED.get(text.model_type)
    counts = any(getattr(model.generation_config, name, None) for name in COUNTS_PADDING)
    if since is None or versions.installed() < since or counts:
        return False
    stretched = any(rope_type(scaling) in ROPE_OF_THE_LONGEST for scaling in _scalings(text))
    original = field(text, "original_max_position_embeddings") or field(text, "max_position_embeddings") or 0
    return not stretched or tokens <= original


def _scalings(text: Any) -> Iterator[dict[str, Any]]:
    """Yield what a config says of its rotary embedding, and where that differs by the type of a layer, of each."""
    for name in ("rope_parameters", "rope_scaling"):
        said = field(text, name)
        if isinstance(said, dict):
            yield said
            yield from (part for part in said.values() if isinstance(part, dict))
