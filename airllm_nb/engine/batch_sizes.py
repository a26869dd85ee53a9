"""Which prompts of many share their passes: as many as memory has room for, and only what padding does not change."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from airllm_nb.compat import padding
from airllm_nb.compat.config import field, text_config
from airllm_nb.engine import memory
from airllm_nb.engine.planning import cache_nbytes

if TYPE_CHECKING:
    from airllm_nb.engine.model import LayeredModel

MOST_ROWS = 32
"""Largest batch that ``"auto"`` takes: by then computing takes longer than reading, and more rows gain little."""
SHARE = 0.5
"""Of the memory that is left, how much a batch may take by our estimate."""
WIDTH = 4096
"""What is taken for a width that a config does not name: that of a model with 7 billion parameters."""


def batches(model: LayeredModel, lengths: Sequence[int], new: int, asked: int | None) -> Iterator[slice]:
    """Yield the parts of prompts that share passes.

    Parameters
    ----------
    model : LayeredModel
        The model.
    lengths : sequence of int
        The prompts' tokens, the longest first.
    new : int
        The largest length of an answer, in tokens.
    asked : int or None
        Most prompts of a part; None for as many as fit.
    """
    begin = 0
    while begin < len(lengths):
        most = _rows_that_fit(model, lengths[begin], new) if asked is None else asked
        end = min(begin + padding.rows(model, most), len(lengths))
        if not padding.exact(model, lengths[begin] + new):
            end = next((at for at in range(begin, end) if lengths[at] != lengths[begin]), end)
        yield slice(begin, end)
        begin = end


def _rows_that_fit(model: LayeredModel, prompt: int, new: int) -> int:
    """Return how many rows the memory that is left has room for: their KV caches, and what computes the prompt's pass.

    Of that pass, an upper bound in float32 of what lives at the same time for a token: four states (before and after attention,
    and their norms), three of the feed-forward part (gate, up and their product), one row of each head's attention, and where
    the model scores them, the logits and a copy.
    """
    text = text_config(model.config)
    width, inner = (_largest(field(text, name)) or WIDTH for name in ("hidden_size", "intermediate_size"))
    forward = inspect.signature(type(model._hf).forward).parameters  # noqa: SLF001
    scored = 1 if {"logits_to_keep", "num_logits_to_keep"} & set(forward) else prompt  # positions
    heads, words = (_largest(field(text, name)) or 1 for name in ("num_attention_heads", "vocab_size"))
    floats = prompt * (4 * width + 3 * inner + heads * prompt) + 2 * scored * words
    each = cache_nbytes(model.config, len(model.layers), model.dtype, prompt + new) + 4 * floats
    left = memory.available(model.device)[0] - memory.ACTIVATIONS
    return max(1, min(MOST_ROWS, int(left * SHARE) // each))


def _largest(said: Any) -> int:
    """Return a number of a config, which may be one for each layer; 0 if it names none."""
    return max(said, default=0) if isinstance(said, list | tuple) else said or 0
