"""What a ``quantization_config`` says of the weights, as far as all of it is understood.

Checkpoints that others have quantized are read where their weights can be unpacked to just what transformers makes of them when
it dequantizes. A field that is not known here may change what the numbers mean: then the checkpoint is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from airllm_nb.compat.versions import Raw
from airllm_nb.errors import UnsupportedError

PLAIN = "Use the checkpoint with bfloat16, float16 or float32 weights."


def _any(_: Any) -> bool:
    return True


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(known) and value == known for known in values)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)  # noqa: PLR2004


FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    # transformers/utils/quantization_config.py: FineGrainedFP8Config; `fmt` is DeepSeek's, `ignored_layers` MiniMax's.
    "fp8": {
        "activation_scheme": _one_of("dynamic", "static"), "dequantize": _any, "expert_dtype": _one_of("fp8"),
        "fmt": _one_of("e4m3"), "ignored_layers": _names, "modules_to_convert": _one_of([]), "modules_to_not_convert": _names,
        "scale_fmt": _one_of("float", "ue8m0"), "weight_block_size": _block,
    },
    # Mxfp4Config
    "mxfp4": {"dequantize": _any, "modules_to_not_convert": _names},
}  # fmt: skip
"""The methods that are read, their fields, and which values of them. Each may also be absent or null, and others may be null."""


def config_of(raw: Raw) -> Raw | None:
    """Return the ``quantization_config`` of a config.json, be it that of its text part; None where the weights are plain.

    Raises
    ------
    UnsupportedError
        If weights of this kind are not read.
    """
    for part in _parts(raw):
        if found := part.get("quantization_config"):
            for refusal in refusals(part):
                raise refusal
            config: Raw = found
            return config
    return None


def _parts(raw: Raw) -> Iterator[Raw]:
    yield raw
    if isinstance(text := raw.get("text_config"), dict):
        yield text


def refusals(part: Raw) -> Iterator[UnsupportedError]:
    """Yield every reason not to read the quantized weights of a config.json, or of its text part."""
    config = part.get("quantization_config")
    if not config:
        return
    method = config.get("quant_method", "?") if isinstance(config, dict) else config
    said = f"The weights of this checkpoint are quantized ({method})"
    if not isinstance(method, str) or method not in FIELDS:
        yield UnsupportedError(f"{said}, which this engine does not read.", PLAIN)
        return
    for name, value in config.items():
        known = FIELDS[method].get(name)
        if name == "quant_method" or value is None or (known and known(value)):
            continue
        shown = json.dumps(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."  # noqa: PLR2004  # to read
        yield UnsupportedError(f"{said} with {name} {shown}, which this engine does not read.", PLAIN)
    if method == "mxfp4" and part.get("model_type") != "gpt_oss":
        yield UnsupportedError(f"{said}, which is read of gpt_oss, and this is {part.get('model_type')!r}.", PLAIN)


def forget(config: Any) -> None:
    """Let transformers' config object say nothing of quantized weights: the model gets unpacked ones."""
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and "quantization_config" in vars(part):
            del part.quantization_config
