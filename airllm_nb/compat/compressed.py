"""What the config of the package compressed-tensors says of the weights: one way for all of them, and only those that are read.

The fields are those of its version 0.20 (``quantization/quant_config.py``, ``quant_scheme.py`` and ``quant_args.py``).
"""

from __future__ import annotations

from typing import Any

from airllm_nb.compat.fields import Check, anything, block, group_size, known, names, one_of
from airllm_nb.compat.versions import Raw

PACKED, FLOAT, NAIVE = "pack-quantized", "float-quantized", "naive-quantized"
FORMATS = (FLOAT, "int-quantized", NAIVE, PACKED)
PACKED_BITS = (4, 8)
WEIGHTS: dict[str, Check] = {
    "num_bits": one_of(*range(1, 9)), "type": one_of("int", "float"), "symmetric": one_of(True, False), "group_size": group_size,
    "strategy": one_of("tensor", "channel", "group", "block"), "block_structure": block, "dynamic": one_of(False),
    "actorder": one_of(False, "weight", "static"), "observer": anything, "observer_kwargs": anything, "scale_dtype": anything,
    "zp_dtype": anything,
}  # fmt: skip
"""``actorder="group"`` would permute the columns."""
SCHEME: dict[str, Check] = {
    "targets": names, "weights": lambda value: known(value, WEIGHTS), "format": one_of(*FORMATS),
    "input_activations": lambda value: isinstance(value, dict),
}  # fmt: skip
STORED = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure")
"""The fields that decide what a weight's tensors mean."""


def well_formed(value: Any) -> bool:
    """Tell whether the groups of layers have only fields that are known."""
    return isinstance(value, dict) and all(known(group, SCHEME) for group in value.values())


def is_dense(value: Any) -> bool:
    """Tell whether a ``sparsity_config`` leaves the weights as they are."""
    return isinstance(value, dict) and value.get("format", "dense") == "dense"


def odd(config: Raw) -> str | None:
    """Name what is not read in a well-formed config; None if all of it is."""
    groups = list((config.get("config_groups") or {}).values())
    if not groups or not all(group.get("weights") for group in groups):
        return "config_groups that do not say how weights are stored"
    ways = [{name: group["weights"].get(name) for name in STORED} | {"format": stored_as(group, config)} for group in groups]
    if any(way != ways[0] for way in ways):
        return "config_groups that store weights in different ways"
    way = ways[0]
    stored, kind, bits, strategy = way["format"], way["type"], way["num_bits"], way["strategy"]
    symmetric = way["symmetric"] is not False
    if (
        None in (stored, kind, bits, strategy)
        or (kind == "float") != (stored == FLOAT or (stored == NAIVE and kind == "float"))
        or (kind == "float" and (bits, symmetric) != (8, True))
        or (stored == PACKED and bits not in PACKED_BITS)
        or (stored == PACKED and not symmetric and strategy not in ("group", "channel"))
        or (strategy == "group") != ((way["group_size"] or -1) > 0)
        or (strategy == "block") != (way["block_structure"] is not None)
    ):
        return "weights of " + ", ".join(f"{name} {value}" for name, value in way.items() if value is not None)
    return None


def stored_as(group: Raw, config: Raw) -> str | None:
    """Return the format of a group of layers."""
    found: str | None = group.get("format") or config.get("format")
    return found
