"""From a raw ``config.json`` to transformers' config object, or a refusal, on whatever transformers is installed.

transformers does not refuse what it does not understand: it warns at best, and computes something else. The cases below were
found by comparing the logits of 12 versions; each is refused here with the version that computes it exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airllm_nb.compat import versions
from airllm_nb.errors import UnsupportedError

Raw = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """Something that versions before `exact` compute wrongly without a word, for the configs that `concerns` picks."""

    what: str
    exact: tuple[int, int]
    concerns: Callable[[Raw], Any]


FAULTS = (
    Fault("yarn's rotary embedding", (4, 51), lambda raw: _rope_kind(raw) == "yarn"),
    Fault("Gemma 2's cache", (4, 51), lambda raw: raw.get("model_type") == "gemma2"),
    Fault("Phi-3's sliding window", (4, 48), lambda raw: raw.get("model_type") == "phi3" and _slides(raw)),
    Fault("Phi-4's partial rotary embedding", (4, 51), lambda raw: raw.get("model_type") == "phi3" and _partial(raw)),
    Fault("StarCoder 2's sliding window", (4, 48), lambda raw: raw.get("model_type") == "starcoder2" and _slides(raw)),
    Fault("any config.json that transformers 5 wrote (its rotary embedding)", (5, 0), lambda raw: _find(raw, "rope_parameters")),
    Fault(
        "a GPT-NeoX config.json that a later transformers 5 wrote",
        (5, 23),
        lambda raw: raw.get("model_type") == "gpt_neox" and "rotary_pct" not in raw and _find(raw, "rope_parameters"),
    ),
)
SOFTCAP_EXACT = (5, 23)  # before, only eager attention applies `attn_logit_softcapping` in every version


def load_config(folder: Path, raw: dict[str, Any], *, trust_remote_code: bool = False) -> Any:
    """Return transformers' config of a checkpoint folder.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    raw : dict
        Its ``config.json``.
    trust_remote_code : bool
        The user's own word that code from the checkpoint may run.

    Raises
    ------
    UnsupportedError
        If the installed transformers does not know the architecture, or would compute it wrongly.
    """
    versions.require_floor()
    from transformers import CONFIG_MAPPING, AutoConfig

    _refuse_wrong(raw)
    model_type = raw.get("model_type")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if trust_remote_code and raw.get("auto_map"):
            raise UnsupportedError(
                f"The code that this checkpoint brings cannot be used: {first_line(error)}",
                "Install what it names, or ask its authors.",
            ) from error
        if "trust_remote_code" in str(error):
            raise UnsupportedError(
                f"{versions.installed_text()} has no model {model_type!r}: it brings its own code, which is not run unasked.",
                "If you trust its authors, pass trust_remote_code=True (--trust-remote-code).",
            ) from error
        if model_type is None:
            raise UnsupportedError(
                "config.json does not say what kind of model this is: it has no model_type.",
                "Name the folder of a model that transformers can load.",
            ) from error
        if model_type not in CONFIG_MAPPING:
            raise UnsupportedError(
                f"{versions.installed_text()} does not know the architecture {model_type!r}.",
                "Run  %pip install -U transformers  and restart the kernel; if that is the newest, choose another model.",
            ) from error
        raise UnsupportedError(
            f"{versions.installed_text()} cannot read this model's config.json: {first_line(error)}",
            "Compare it with the model's page on the hub, or try  %pip install -U transformers.",
        ) from error


def text_config(config: Any) -> Any:
    """Return the part of transformers' config that describes the language model; itself unless the model is multimodal."""
    if hasattr(config, "get_text_config"):  # from 4.45 on
        return config.get_text_config(decoder=True)
    return getattr(config, "text_config", config)


def causal_config(config: Any) -> Any:
    """Return what ``from_pretrained`` builds a causal language model from: the text part, where the model takes no more."""
    from transformers import AutoModelForCausalLM

    models = AutoModelForCausalLM._model_mapping  # noqa: SLF001
    wanted = getattr(models[type(config)], "config_class", None) if type(config) in models else None
    part = getattr(config, "sub_configs", {}).get("text_config")
    return config.get_text_config() if part is wanted and part in models else config


def field(config: Any, name: str) -> Any:
    """Return a field of a config, None where it has none; of one that differs between layers, the value for all others."""
    return getattr(config, name, None) if name not in vars(config) else vars(config)[name]


def attention(config: Any) -> dict[str, str]:
    """Return the ``attn_implementation`` argument that the config needs to be exact, if it needs one."""
    if field(text_config(config), "attn_logit_softcapping") and versions.installed() < SOFTCAP_EXACT:
        return {"attn_implementation": "eager"}
    return {}


def _refuse_wrong(raw: dict[str, Any]) -> None:
    """Refuse what the installed version would compute wrongly, or what this engine cannot read."""
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else quantization
        raise UnsupportedError(
            f"The weights of this checkpoint are quantized ({method}), which this engine does not read.",
            "Use the checkpoint with bfloat16, float16 or float32 weights.",
        )
    for fault in FAULTS:
        if versions.installed() < fault.exact and fault.concerns(raw):
            raise UnsupportedError(
                f"{versions.installed_text()} would silently compute {fault.what} wrongly.",
                versions.upgrade(".".join(map(str, fault.exact))),
            )


def _rope_kind(raw: Raw) -> Any:
    scaling = _find(raw, "rope_scaling")
    return scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else None


def _slides(raw: Raw) -> bool:
    window, context = raw.get("sliding_window"), raw.get("max_position_embeddings")
    return isinstance(window, int) and not (isinstance(context, int) and window >= context)


def _partial(raw: Raw) -> bool:
    return raw.get("partial_rotary_factor", 1) not in (1, 1.0, None)


def _find(raw: dict[str, Any], key: str) -> Any:
    """Return `key` of the config, or of its text part in a multimodal one."""
    text = raw.get("text_config")
    return raw.get(key) or (text.get(key) if isinstance(text, dict) else None)


def first_line(error: Exception) -> str:
    """Return what an error of transformers says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
