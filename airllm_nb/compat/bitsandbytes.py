"""What the config of a checkpoint that bitsandbytes has quantized says of the weights.

The fields are those of ``BitsAndBytesConfig`` in ``transformers/utils/quantization_config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airllm_nb.compat.fields import Check, anything, names, one_of
from airllm_nb.compat.versions import Raw

FOUR, EIGHT = 4, 8
FIELDS: dict[str, Check] = {
    "load_in_4bit": one_of(True, False), "load_in_8bit": one_of(True, False), "_load_in_4bit": one_of(True, False),
    "_load_in_8bit": one_of(True, False), "bnb_4bit_compute_dtype": anything, "bnb_4bit_quant_type": one_of("nf4", "fp4"),
    "bnb_4bit_quant_storage": one_of("uint8", "int8", "float16", "bfloat16", "float32", "float64"),
    "bnb_4bit_use_double_quant": one_of(True, False), "llm_int8_enable_fp32_cpu_offload": anything,
    "llm_int8_has_fp16_weight": one_of(False), "llm_int8_skip_modules": names, "llm_int8_threshold": anything,
}  # fmt: skip


def bits(config: Mapping[str, Any]) -> int | None:
    """Return in how many bits the weights are; None if the config contradicts itself, or does not say."""
    found = [number for number in (FOUR, EIGHT) if config.get(f"load_in_{number}bit")]
    agree = all(config.get(f"_load_in_{number}bit") in (None, number in found) for number in (FOUR, EIGHT))
    return found[0] if len(found) == 1 and agree else None


def stated(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields that must have a value."""
    return ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant") if bits(config) == FOUR else ()


def odd(config: Raw) -> str | None:
    """Name what is not read in a config whose fields are known; None if all of it is."""
    if bits(config):
        return None
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "load_in_4bit and load_in_8bit that contradict each other"
    return "neither load_in_4bit nor load_in_8bit"
