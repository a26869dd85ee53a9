"""Whether a prompt and its answer fit into a model's context: refused before minutes are spent on it."""

from __future__ import annotations

from typing import Any

import torch

from airllm_nb.compat.config import text_config
from airllm_nb.errors import PromptError


def length(config: Any) -> int | None:
    """Return how many tokens a model has positions for, prompt and answer together; None if it sets no limit."""
    text = text_config(config)
    limit: int | None = getattr(text, "max_position_embeddings", None)
    if limit is not None and limit <= 0:  # XLNet's way to say that it sets none
        return None
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if limit is None or not isinstance(scaling, dict):
        return limit
    # Scaling stretches the context beyond what config.json may say.
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor") or 1
    if kind in ("dynamic", "linear"):
        return int(limit * factor)
    if kind == "yarn":
        return max(limit, int((scaling.get("original_max_position_embeddings") or limit) * factor))
    return limit


def count_tokens(ids: Any) -> int | None:
    """Return the length of token ids, shape (batch, tokens); None if they are not a tensor of ids."""
    return ids.shape[-1] if isinstance(ids, torch.Tensor) and ids.dim() > 0 else None


def new_tokens(kwargs: dict[str, Any], default: Any, prompt: int) -> int:
    """Return how many tokens ``generate`` may add: by its arguments, else by the generation config."""
    config = kwargs.get("generation_config") or default
    asked = (kwargs.get("max_new_tokens"), kwargs.get("max_length"))
    for new, total in (asked, (config.max_new_tokens, config.max_length)):
        if new:
            return int(new)
        if total:
            return max(int(total) - prompt, 1)
    return 1


def require_fit(name: str, limit: int | None, tokens: int | None, new: int) -> None:
    """Refuse what does not fit.

    Parameters
    ----------
    name : str
        The model's, for the message.
    limit : int or None
        Its context.
    tokens : int or None
        Length of the prompt (with what the KV cache holds); None if it is not known.
    new : int
        How many tokens may be added; 0 for a single pass.

    Raises
    ------
    PromptError
        Says how much would fit.
    """
    if limit is None or tokens is None:
        return
    if tokens == 0:
        raise PromptError("The prompt is empty.", "Write something for the model to go on from.")
    if tokens + min(new, 1) > limit:
        raise PromptError(
            f"The prompt has {tokens} tokens, and {name} has a context of {limit}.",
            f"Shorten it to {limit - min(new, 1)} tokens or fewer.",
        )
    if tokens + new > limit:
        raise PromptError(
            f"{tokens} tokens of prompt and {new} new ones exceed {name}'s context of {limit}.",
            f"Ask for at most {limit - tokens} new tokens.",
        )
