"""A ``config.json`` that transformers 5 wrote, in the words of transformers 4, which does not know the new ones and never warns.

What version 5 renamed was found by comparing what its config classes write with what those of 4.43 to 4.57 read, for all types of
causal language models. What a rotary embedding's parameters mean is as in ``transformers/modeling_rope_utils.py`` of 5.23.
"""

from __future__ import annotations

import math
from typing import Any

from airllm_nb.compat.versions import PATTERNED, Version, one_in, rope_type

Raw = dict[str, Any]

RENAMED: dict[str, dict[str, str]] = {
    "gpt_neox": {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
    "gpt_neox_japanese": {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "xlm": {"bos_token_id": "bos_index", "eos_token_id": "eos_index", "pad_token_id": "pad_index"},
}
"""Model type -> name in version 5 -> name in version 4, beside the names that all types share."""
OWN_LOCAL_THETA = ("gemma3_text", "gemma3n_text")
"""Types of version 4 with a rope_theta of its own for the layers with a sliding window."""
GELU = "gelu_pytorch_tanh"
"""What Gemma was trained with, whatever its first config.json said."""
ORIGINAL_OUTSIDE = ("llama3", "yarn")
"""Rotary embeddings whose original context version 5 takes from beside ``rope_scaling`` first, and version 4 only from within."""
SWITCHED = ("qwen2", "qwen3")
"""Types whose ``use_sliding_window`` is off unless told otherwise."""
IGNORE_SWITCH = ((4, 49), (4, 52))
"""From and below which version their masks obey ``sliding_window`` all the same."""
NO_HEAD_DIM = ("mistral", "mixtral", "ministral")
"""Types whose scaled rotary embedding asks for a ``head_dim`` that their config.json need not have."""
SCALING_KEYS = {"linear": ("factor",), "dynamic": ("factor",), "longrope": ("short_factor", "long_factor")}
"""What the oldest classes accept in ``rope_scaling`` beside ``type``, and nothing else."""


def classic(raw: Raw) -> Raw:
    """Return a config.json with the names of transformers 4 beside those of 5; what is classic already stays as it is.

    Parameters
    ----------
    raw : dict
        The parsed file; not changed. Parts such as ``text_config`` are rewritten too.

    Returns
    -------
    dict
        ``rope_theta``, ``rope_scaling``, ``partial_rotary_factor`` and the like in place of ``rope_parameters``; ``torch_dtype``
        in place of ``dtype``; the names in `RENAMED`.
    """
    result = {key: classic(value) if key.endswith("_config") and isinstance(value, dict) else value for key, value in raw.items()}
    for key, value in result.items():
        if isinstance(value, list):
            result[key] = [_number(item) for item in value]
    if "dtype" in result:
        result.setdefault("torch_dtype", result.pop("dtype"))
    model_type = result.get("model_type")
    decided = _settle_rope(result)
    if model_type == "gemma":
        _settle_activation(result)
    for new, old in RENAMED.get(str(model_type), {}).items():
        if result.get(new) is not None and (new in decided or result.get(old) is None):
            result[old] = result[new]
    if model_type in PATTERNED:
        _name_layer_types(result)
    if model_type == "gemma2":  # its layers take turns; but one version's cache would read this
        result.pop("sliding_window_pattern", None)
    return result


def inexpressible(raw: Raw) -> str | None:
    """Name what version 4 has no words for in a config.json, such as two scaled rotary embeddings; None if it has for all."""
    parameters = raw.get("rope_parameters")
    if not isinstance(parameters, dict):
        return None
    if not (nested := _nested(parameters)):
        return None
    if set(nested) - {"full_attention", "sliding_attention"}:
        return "rotary embeddings for " + " and ".join(nested)
    full, sliding = nested.get("full_attention", {}), nested.get("sliding_attention", {})
    if sliding and rope_type(sliding):
        return "a scaled rotary embedding for the layers with a sliding window"
    own_theta = raw.get("model_type") in OWN_LOCAL_THETA
    if full and sliding and full.get("rope_theta") != sliding.get("rope_theta") and not own_theta:
        return "another rope_theta for the layers with a sliding window"
    return None


def fit_to(raw: Raw, version: Version, *, strict: bool) -> Raw:
    """Return a classic config.json that means on a version of transformers 4 what it means on the newest.

    Parameters
    ----------
    raw : dict
        Written with the names of transformers 4.
    version : Version
        The one that will read it.
    strict : bool
        Whether its config class accepts in ``rope_scaling`` just what was there in the beginning (Phi-3's does in all versions).

    Notes
    -----
    yarn before 4.51 took the original context from ``max_position_embeddings``, and later versions up to 5 derive ``factor`` from
    the two. Without ``original_max_position_embeddings``, and with that as the context and ``attention_factor`` given, all agree.
    """
    if IGNORE_SWITCH[0] <= version < IGNORE_SWITCH[1] and raw.get("model_type") in SWITCHED and not raw.get("use_sliding_window"):
        raw = raw | {"sliding_window": None}
    scaling = raw.get("rope_scaling")
    kind = rope_type(scaling)
    if isinstance(scaling, dict) and kind is None and scaling.keys() <= {"type", "rope_type"}:
        return raw | {"rope_scaling": None}  # "default", which not all of them know
    if kind and raw.get("model_type") in NO_HEAD_DIM and not raw.get("head_dim"):
        raw = raw | {"head_dim": raw.get("hidden_size", 4096) // raw.get("num_attention_heads", 32)}
    if strict and kind in SCALING_KEYS and isinstance(scaling, dict):
        return raw | {"rope_scaling": {"type": kind} | {key: scaling[key] for key in SCALING_KEYS[kind] if key in scaling}}
    if kind and isinstance(scaling, dict) and "rope_type" not in scaling and version >= (4, 48):
        scaling = scaling | {"rope_type": kind}  # some of the classes then read nothing else
        raw = raw | {"rope_scaling": scaling}
    if kind != "yarn" or not isinstance(scaling, dict):
        return raw
    context, original = raw.get("max_position_embeddings"), scaling.get("original_max_position_embeddings")
    if not context or not original or not scaling.get("factor"):
        return raw
    if version >= (4, 51) and scaling["factor"] == context / original:
        return raw
    rest = {key: value for key, value in scaling.items() if key != "original_max_position_embeddings"}
    return raw | {
        "rope_scaling": rest | {"attention_factor": scaling.get("attention_factor") or _yarn_attention_factor(scaling)},
        "max_position_embeddings": original,
    }


def _settle_rope(raw: Raw) -> Raw:
    """Put the rotary embedding into fields of version 4; returns those that were decided by more than their own name."""
    beside = raw.get("original_max_position_embeddings")
    decided = _decided(raw.pop("rope_parameters", None), raw.get("rope_scaling"))
    raw.update(decided)
    scaling = raw.get("rope_scaling")
    if not isinstance(scaling, dict):
        return decided
    if not beside and raw.get("model_type") != "phi3":  # which has a default of its own, and that counts more
        raw.update(_original(scaling))
    if beside:
        raw["original_max_position_embeddings"] = beside
        if rope_type(scaling) in ORIGINAL_OUTSIDE:
            raw["rope_scaling"] = scaling | {"original_max_position_embeddings": beside}
    return decided


def _decided(parameters: Any, scaling: Any) -> Raw:
    """Return the fields that ``rope_parameters`` and ``rope_scaling`` decide: version 5 lets them outweigh what stands beside."""
    fields: Raw = {}
    if isinstance(parameters, dict) and (not scaling or _nested(parameters)):
        fields = _rope(parameters)
    if not isinstance(scaling, dict):
        return fields
    if scaling:
        fields["rope_scaling"] = scaling
        fields |= {key: scaling[key] for key in ("rope_theta", "partial_rotary_factor") if scaling.get(key) is not None}
    elif "rope_scaling" not in fields:
        fields["rope_scaling"] = None
    if scaling.get("rope_type") and scaling.get("type", scaling["rope_type"]) != scaling["rope_type"]:
        fields["rope_scaling"] = {key: value for key, value in scaling.items() if key != "type"}
    return fields


def _settle_activation(raw: Raw) -> None:
    """Obey Gemma's ``hidden_act``, where ``"gelu"`` means the approximation; 4.43's name for it counts for nothing later."""
    given = raw.get("hidden_act") or GELU
    for name in ("hidden_act", "hidden_activation"):
        if name in raw or "hidden_act" in raw:
            raw[name] = GELU if given == "gelu" else given


def _number(item: Any) -> Any:
    """Return the number that version 5 wraps because JSON has no infinity: ``{"__float__": "Infinity"}``."""
    return float(item["__float__"]) if isinstance(item, dict) and set(item) == {"__float__"} else item


def _rope(parameters: Raw) -> Raw:
    """Return ``rope_parameters`` as the fields of version 4."""
    nested = _nested(parameters)
    if not nested:
        fields = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if parameters.get(key) is not None}
        return fields | {"rope_scaling": _scaling(parameters)} | _original(parameters)
    fields = _rope(nested.get("full_attention") or next(iter(nested.values())))
    if (theta := nested.get("sliding_attention", {}).get("rope_theta")) is not None:
        fields["rope_local_base_freq"] = theta
    return fields


def _nested(parameters: Raw) -> dict[str, Raw]:
    """Return the parameters of each layer type, if they are given so."""
    return {key: value for key, value in parameters.items() if isinstance(value, dict)}


def _scaling(parameters: Raw) -> Raw | None:
    kind = rope_type(parameters)
    rest = {
        key: value
        for key, value in parameters.items()
        if key not in ("rope_type", "type", "rope_theta", "partial_rotary_factor") and value is not None
    }
    if kind is None and not rest:
        return None
    return {"rope_type": kind or "default", **rest}


def _original(parameters: Raw) -> Raw:
    """Return the original context of longrope, which stands beside ``rope_scaling`` in version 4, not in it."""
    original = parameters.get("original_max_position_embeddings")
    return {"original_max_position_embeddings": original} if original and rope_type(parameters) == "longrope" else {}


def _name_layer_types(raw: Raw) -> None:
    """Give ``sliding_window_pattern`` (before 4.53) and ``layer_types`` (later), whichever of the two is missing."""
    types, period, count = raw.get("layer_types"), raw.get("sliding_window_pattern"), raw.get("num_hidden_layers")
    if types is None and isinstance(period, int) and isinstance(count, int) and period > 0:
        raw["layer_types"] = one_in(count, period)
    elif isinstance(types, list) and period is None:
        for period in range(1, len(types) + 2):
            if types == one_in(len(types), period):
                raw["sliding_window_pattern"] = period
                return


def _yarn_attention_factor(scaling: Raw) -> float:
    """YaRN's attention factor, by default 0.1 ln(factor) + 1 (https://arxiv.org/abs/2309.00071, section 3.4)."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)
