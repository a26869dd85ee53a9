"""Whether rows of different lengths, padded to one, give what each of them gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from airllm_nb.compat.config import field, text_config
from airllm_nb.compat.versions import rope_type

PADDED = frozenset((
    "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe",
    "gpt2", "gpt_neox", "gpt_oss", "granite", "internlm3", "llama", "llama4_text", "mistral", "mixtral", "olmo2", "olmo3", "phi",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
))  # fmt: skip
"""Types of models whose padded rows were compared with the rows alone: logits and texts, on every version in `TESTED`.

Others may do as well, but a recurrent state, for one, takes padding for text. Without padding, rows of one length are always
what they are alone: that was compared for all types.
"""

ROPE_OF_THE_LONGEST = frozenset(("dynamic", "longrope"))
"""Rotary embeddings that turn by another angle in all rows when the longest gets longer than the original context."""

COUNTS_PADDING = ("no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "stop_strings")
"""What a generation config may demand that looks at sequences of the prompt's tokens, those of its padding among them."""


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
    if text.model_type not in PADDED or any(getattr(model.generation_config, name, None) for name in COUNTS_PADDING):
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
