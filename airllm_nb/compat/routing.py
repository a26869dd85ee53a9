"""Mixtures of experts that choose groups first: what older versions do with experts of the groups that are left out."""

from __future__ import annotations

import itertools
from typing import Any

from airllm_nb.compat import versions
from airllm_nb.compat.config import field, text_config
from airllm_nb.errors import UnsupportedError

EXACT: versions.Version = (5, 6)


def refuse_negative_bias(model: Any) -> None:
    """Refuse a loaded model whose router would choose other experts than the newest version does.

    DeepSeek-V3's router (and those made after it) adds a bias from the checkpoint to each expert's score, and leaves out whole
    groups. Before 5.6 an expert of those counts 0, later minus infinity, which is the same as long as all others count more.

    Raises
    ------
    UnsupportedError
        If one may count less: its bias is negative.
    """
    text = text_config(model.config)
    if versions.installed() >= EXACT or (field(text, "n_group") or 1) <= (field(text, "topk_group") or 1):
        return
    for name, bias in itertools.chain(model.named_buffers(), model.named_parameters()):
        if name.endswith("e_score_correction_bias") and not bias.is_meta and bool((bias < 0).any()):
            raise UnsupportedError(
                f"{versions.installed_text()} would silently choose other experts in this model ({name} is negative in part).",
                versions.upgrade(versions.dotted(EXACT)),
            )
