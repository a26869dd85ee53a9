"""From a raw ``config.json`` to transformers' config object, or a refusal, on whatever transformers is installed.

transformers does not refuse what it does not understand: it warns at best, and computes something else. So the file is first
rewritten in words that the installed version understands (`airllm_nb.compat.classic`), and what that version would still compute
wrongly is refused by the table in `airllm_nb.compat.versions`.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from airllm_nb.compat import quantization, versions
from airllm_nb.compat.classic import classic, fit_to, inexpressible
from airllm_nb.compat.versions import Raw, Version, rope_type
from airllm_nb.compat.wellformed import faults
from airllm_nb.errors import UnsupportedError

SOFTCAP_EXACT = (5, 23)  # before, only eager attention applies `attn_logit_softcapping` in every version
CLASSIC_IN_5: tuple[tuple[Version, Callable[[Raw], bool]], ...] = (
    ((5, 2), lambda raw: raw.get("model_type") == "qwen3_moe"),  # did not know its own num_local_experts
    ((5, 8), lambda raw: raw.get("model_type") == "cohere2"),  # ignored sliding_window_pattern
    ((5, 18), lambda raw: raw.get("model_type") == "gemma" and raw.get("hidden_act") == "gelu"),  # took that by its word
    ((5, 14), lambda raw: raw.get("model_type") == "gpt_neox"),  # ignored its partial_rotary_factor
    ((5, 14), lambda raw: raw.get("model_type") == "olmo3"),  # did not know rope_parameters of each layer type
    ((5, 23), lambda raw: "partial_rotary_factor" in (raw.get("rope_scaling") or {})),  # preferred its own default
    ((5, 20), lambda raw: _stretched_in_part(raw.get("rope_parameters"))),  # the same
)
"""Before which versions of transformers 5 a config.json is read exactly with the names of version 4 only."""
CHANGED_THETA = ("cohere", "falcon_h1", "olmo3", "persimmon")
"""Types whose ``rope_theta`` has another default in version 5 than in 4."""
OLD_ROPE_TYPES = ("default", "su", "mrope")
"""Names beside those in transformers' own table: no scaling, Phi-3's first name for longrope, and Qwen-VL's sections."""


def _stretched_in_part(parameters: Any) -> bool:
    """Tell whether a scaled rotary embedding turns only a part of each head."""
    return rope_type(parameters) is not None and parameters.get("partial_rotary_factor") is not None


def load_config(folder: Path, raw: Raw, *, trust_remote_code: bool = False) -> Any:
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
    versions.require_supported()
    from transformers import CONFIG_MAPPING

    own_code = bool(trust_remote_code and raw.get("auto_map"))  # which reads its own words, at the user's own risk
    refuse({key: value for key, value in raw.items() if key == "quantization_config"} if own_code else raw)
    if own_code and quantization.config_of(raw):
        raise UnsupportedError(
            "This checkpoint brings its own code, and weights that are quantized: they are unpacked for transformers' code only.",
            f"Leave out trust_remote_code if transformers knows the model. {quantization.PLAIN}",
        )
    try:
        config = _read(folder, raw, own_code=own_code)
    except Exception as error:
        raise _explain(error, raw, CONFIG_MAPPING, trust_remote_code=trust_remote_code) from error
    quantization.forget(config)
    return config


def _read(folder: Path, raw: Raw, *, own_code: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if own_code:
        return AutoConfig.from_pretrained(folder, trust_remote_code=True)
    understood, model_type = in_words_of(raw, versions.installed()), raw.get("model_type")
    if understood is raw or model_type not in CONFIG_MAPPING:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)  # unless told so, it asks, and runs code at a "y"
    with quiet():  # it would warn of what was rewritten
        return CONFIG_MAPPING[model_type].from_dict(understood)


def in_words_of(raw: Raw, version: Version) -> Raw:
    """Return a config.json as a version of transformers understands it: `raw` itself if it does so already."""
    if version >= (5,) and not any(version < exact and concerns(raw) for exact, concerns in CLASSIC_IN_5):
        return raw
    rewritten = _fit(classic(raw), version)
    return raw if rewritten == raw else rewritten


def _fit(raw: Raw, version: Version) -> Raw:
    """Fit the config and each part of it to a version of transformers 4."""
    from transformers import CONFIG_MAPPING

    model_type = raw.get("model_type")
    strict = model_type in CONFIG_MAPPING and hasattr(CONFIG_MAPPING[model_type], "_rope_scaling_validation")
    fitted = fit_to(raw, version, strict=strict) if version < (5,) else raw
    return {
        key: _fit(value, version) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in fitted.items()
    }


def refuse(raw: Raw, version: Version | None = None) -> None:
    """Refuse what a version of transformers would compute wrongly, or what this engine cannot read.

    Raises
    ------
    UnsupportedError
        The first of `refusals`.
    """
    for refusal in refusals(raw, version):
        raise refusal


def refusals(raw: Raw, version: Version | None = None) -> Iterator[UnsupportedError]:
    """Yield every reason to refuse a config.json, with the version that computes it exactly, where there is one.

    Parameters
    ----------
    raw : dict
        ``config.json``.
    version : Version, optional
        The installed one, unless told otherwise.
    """
    if wrong := [*faults(raw)]:  # whoever reads on would stumble over the first one
        remedy = "Fetch the checkpoint again, or correct the field by the model's page on the hub."
        yield from (UnsupportedError(f"config.json has {fault}.", remedy) for fault in wrong)
        return
    version = version or versions.installed()
    for part in language_parts(raw):
        yield from quantization.refusals(part)
        plain = classic(part)
        for need in versions.unmet(plain, version):
            yield need.error(version)
        if in_words_of(part, version) is not part and (what := inexpressible(part)):
            understood = "5.0" if version < (5,) else "5.14"
            yield UnsupportedError(f"transformers {versions.dotted(version)} does not have {what}.", versions.upgrade(understood))
        if version < (5,) and str(plain.get("model_type")) in CHANGED_THETA and "rope_theta" not in plain:
            yield UnsupportedError(
                "config.json does not give rope_theta, for which versions 4 and 5 of transformers take different values.",
                "Write into it the one that the model was trained with (its page on the hub may tell).",
            )
        if version == versions.installed():
            yield from _rope_refusals(part, plain, version)


def text_config(config: Any) -> Any:
    """Return the part of transformers' config that describes the language model; itself unless the model is multimodal."""
    if hasattr(config, "get_text_config"):  # from 4.45 on
        return config.get_text_config(decoder=True)
    return getattr(config, "text_config", config)


def field(config: Any, name: str) -> Any:
    """Return a field of a config, None where it has none; of one that differs between layers, the value for all others."""
    return getattr(config, name, None) if name not in vars(config) else vars(config)[name]


def attention(config: Any) -> dict[str, str]:
    """Return the ``attn_implementation`` argument that the config needs to be exact, if it needs one."""
    if field(text_config(config), "attn_logit_softcapping") and versions.installed() < SOFTCAP_EXACT:
        return {"attn_implementation": "eager"}
    return {}


_asking: set[object] = set()
_verbosity = 0
_quiet_guard = threading.Lock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' advice to programmers from standing on stderr, in the middle of a text.

    Several threads may ask for it at once: what was before comes back when the last of them has finished.
    """
    global _verbosity  # noqa: PLW0603  # transformers has one for all threads, too
    from transformers.utils import logging

    me = object()
    try:
        with _quiet_guard:
            if not _asking:
                _verbosity = logging.get_verbosity()
            _asking.add(me)
            logging.set_verbosity_error()
        yield
    finally:
        with _quiet_guard:
            if me in _asking:  # or an interrupt came before
                _asking.remove(me)
                if not _asking:
                    logging.set_verbosity(_verbosity)


def first_line(error: Exception) -> str:
    """Return what an error of transformers says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def language_parts(raw: Raw) -> Iterator[Raw]:
    """Yield the config, and its text part in a multimodal one."""
    yield raw
    if isinstance(text := raw.get("text_config"), dict):
        yield text


def _rope_refusals(part: Raw, plain: Raw, version: Version) -> Iterator[UnsupportedError]:
    """Yield the refusal of a rotary embedding that the installed version does not have, or not for this model."""
    own = part.get("rope_parameters") or {}
    scalings = (plain.get("rope_scaling"), *own.values())  # version 5 may have one for each type of layer
    if not (kinds := sorted({kind for kind in map(rope_type, scalings) if kind is not None})):
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = sorted({*ROPE_INIT_FUNCTIONS, *OLD_ROPE_TYPES})
    model_type, installed = plain.get("model_type"), versions.installed_text()
    if unknown := [kind for kind in kinds if kind not in known]:
        yield UnsupportedError(
            f"config.json asks for a rotary embedding of type {unknown[0]!r}, which {installed} does not have.",
            f"Write one of {', '.join(known)} there, or run  %pip install -U transformers  and restart the kernel.",
        )
    elif version < (5,) and not _reads_rope_scaling(str(model_type)):
        yield UnsupportedError(
            f"{installed} would silently ignore the {kinds[0]} rotary embedding of {model_type!r}.", versions.upgrade("5.0")
        )


def _reads_rope_scaling(model_type: str) -> bool:
    """Tell whether the code of a model of transformers 4 knows of ``rope_scaling``: if it never names it, it ignores it."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    if model_type not in CONFIG_MAPPING:
        return True  # refused by name elsewhere
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[model_type], None)
    model = model[0] if isinstance(model, tuple) else model
    return model is None or "rope_scaling" in inspect.getsource(sys.modules[model.__module__])


def _explain(error: Exception, raw: Raw, known: Any, *, trust_remote_code: bool) -> UnsupportedError:
    """Say in one line why a config.json cannot be read, and what to do."""
    model_type, installed = raw.get("model_type"), versions.installed_text()
    if trust_remote_code and raw.get("auto_map"):
        return UnsupportedError(
            f"The code that this checkpoint brings cannot be used: {first_line(error)}",
            "Install what it names, or ask its authors.",
        )
    if "trust_remote_code" in str(error):
        return UnsupportedError(
            f"{installed} has no model {model_type!r}: it brings its own code, which is not run unasked.",
            "If you trust its authors, pass trust_remote_code=True (--trust-remote-code).",
        )
    if model_type is None:
        return UnsupportedError(
            "config.json does not say what kind of model this is: it has no model_type.",
            "Name the folder of a model that transformers can load.",
        )
    if model_type not in known:
        return UnsupportedError(
            f"{installed} does not know the architecture {model_type!r}.",
            "Run  %pip install -U transformers  and restart the kernel; if that is the newest, choose another model.",
        )
    return UnsupportedError(
        f"{installed} cannot read this model's config.json: {first_line(error)}",
        "Compare it with the model's page on the hub, or try  %pip install -U transformers.",
    )
