"""Phi-3's longrope: what older versions do when a padded batch grows beyond the original context."""

from __future__ import annotations

from typing import Any

import torch

from airllm_nb.compat import versions
from airllm_nb.compat.config import field, text_config
from airllm_nb.errors import UnsupportedError

EXACT: versions.Version = (5, 20)


def refuse_padded_growth(config: Any, mask: Any, tokens: int) -> None:
    """Refuse to generate where the installed version would switch factors at another token than the newest one.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        The model's.
    mask : torch.Tensor or None
        ``attention_mask`` of the prompts, shape (batch, tokens); 0 marks padding.
    tokens : int
        How long a row may get, prompt and answer together.

    Raises
    ------
    UnsupportedError
        If rows are padded and may get longer than the original context.
    """
    text = text_config(config)
    scaling = field(text, "rope_parameters") or field(text, "rope_scaling")
    original = field(text, "original_max_position_embeddings")
    if versions.installed() >= EXACT or versions.rope_type(scaling) != "longrope" or not original or tokens <= original:
        return
    if isinstance(mask, torch.Tensor) and not bool(mask.all()):
        raise UnsupportedError(
            f"{versions.installed_text()} would silently generate otherwise where a padded batch grows beyond {original} tokens.",
            f"Generate for one prompt at a time, or: {versions.upgrade(versions.dotted(EXACT))}",
        )
