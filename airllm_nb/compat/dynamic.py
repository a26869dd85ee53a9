"""Dynamic rotary embeddings: they keep the angles of the longest text so far, by which the next one would be read."""

from __future__ import annotations

from typing import Any


def forget(model: Any) -> None:
    """Make a model's dynamic rotary embeddings what they were when it was loaded; others are left alone.

    transformers puts them back itself, but only before a text that is shorter than the original context.
    """
    for module in model.modules():
        for name in [name for name in module._buffers if name.endswith("inv_freq")]:  # noqa: SLF001
            prefix = name.removesuffix("inv_freq")  # of a type of layer, in models where they differ
            original = getattr(module, f"{prefix}original_inv_freq", None)
            length = getattr(module, f"{prefix}original_max_seq_len", getattr(module, "original_max_seq_len", None))
            kind = getattr(module, "rope_type", "")
            kind = kind.get(prefix.removesuffix("_"), "") if isinstance(kind, dict) else kind
            if original is None or length is None or "dynamic" not in str(kind):
                continue
            module._buffers[name] = original.clone()  # noqa: SLF001
            setattr(module, f"{prefix}max_seq_len_cached", length)
