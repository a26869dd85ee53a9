"""Which parameters stack one matrix for each expert, and are only ever used for the experts that are hit.

From transformers 5.0 on a mixture of experts keeps its experts in a module whose class is marked with
``use_experts_implementation``: its parameters are used expert by expert (``eager``), in groups of tokens (``grouped_mm``, the
default) or gathered for each token (``batched_mm``). Before, and in classes without the mark, nothing can be told.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from airllm_nb.compat import config as compat_config
from airllm_nb.compat import versions

MARKS = ("has_bias", "is_transposed", "_apply_gate")
"""What the decorator adds to a module on every version."""
GROUPED = frozenset(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"))
"""The functions by which transformers multiplies groups of rows with a stack of matrices: ``f(rows, stack, offs=ends)``."""
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
PER_LAYER = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def stacks(model: Any) -> list[tuple[str, ...]]:
    """Return the names of such parameters, module by module, in the order in which they compute.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With parameters on meta.
    """
    return [names for _, names in _modules(model)]


def turned(model: Any) -> frozenset[str]:
    """Return the names of those stacks whose matrices lie as (inputs, outputs), and not as those of linear layers."""
    return frozenset(name for module, names in _modules(model) if module.is_transposed for name in names)


def _modules(model: Any) -> Iterator[tuple[Any, tuple[str, ...]]]:
    if versions.installed() < (5,):
        return
    for path, module in model.named_modules():
        if all(hasattr(module, mark) for mark in MARKS):
            shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
            stacked = [name for name, shape in shapes.items() if len(shape) == 3]  # noqa: PLR2004  # experts, rows, columns
            if stacked and len({shapes[name][0] for name in stacked}) == 1:
                yield module, tuple(f"{path}.{name}" for name in stacked)


def per_token(config: Any) -> int | None:
    """Return how many experts of a layer one token hits; None if the config does not say."""
    return _number(config, PER_TOKEN)


def chosen_share(config: Any) -> float:
    """Return which share of a layer's experts one token hits; 1 if the config does not say."""
    chosen, experts = per_token(config), _number(config, PER_LAYER)
    return min(chosen / experts, 1.0) if chosen and experts else 1.0


def _number(config: Any, names: tuple[str, ...]) -> int | None:
    text = compat_config.text_config(config)
    return next((value for name in names if isinstance(value := compat_config.field(text, name), int)), None)
