"""The scaled rotary embedding of a GGUF file, in the words of transformers' config: with the file's frequencies, or refused.

What the fields mean is what llama.cpp takes them for (``llama-model.cpp`` and ``llama-context.cpp``). Of Llama 3.1's scaling a
file has no fields, but a tensor of what each frequency is divided by (https://github.com/ggml-org/llama.cpp,
``conversion/llama.py``). The settings that it was made from are found again, and taken if transformers makes the file's
frequencies of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from airllm_nb.compat.config import quiet
from airllm_nb.errors import CheckpointError, UnsupportedError

FREQS, LONG, SHORT = TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of factors, by which frequencies are divided: always, and in contexts longer and not longer than the original one."""
BASE = 10000.0
"""What llama.cpp takes where a file does not say it."""
USUAL = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Meta's own models, 3.1 to 3.3: they differ in ``factor`` alone."""
STEP = 2.0**-24
"""How far a number may be from the nearest float32, relative to it."""
ALIKE = 4 * STEP
"""How far a frequency may be from the file's, relative to it. Of factors made in float32, as llama.cpp does it, it was up to 2.2
steps (bases of 10,000 to 1,000,000, heads of 64 to 256, six settings): transformers multiplies where they divide."""
BETWEEN = 8 * STEP
"""And relative to the unscaled one, where a frequency is scaled in part: its part is a difference of numbers near 1, which
float32 does not know better. Of factors made in float64 with the usual settings, it was up to 5.1 steps."""
LARGEST = float(np.finfo(np.float32).max)
AGAIN, OTHER = "Fetch the file again, or use the model's safetensors files.", "Use the model's safetensors files."
Values = NDArray[np.float32]
Floats = NDArray[np.float64]


class Way(NamedTuple):
    """How files say it: of which architectures, by which types of scaling (None: by none), with which tensors."""

    architectures: tuple[str, ...]
    types: tuple[str | None, ...]
    tensors: tuple[str, ...] = ()


UNSTATED = (None, "none", "linear")
WAYS = {
    "default": Way(("gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen3"), UNSTATED),
    "linear": Way(("gemma2", "gemma3", "llama", "qwen2", "qwen3"), (None, "linear")),
    "yarn": Way(("llama", "qwen2", "qwen3"), ("yarn",)),
    "llama3": Way(("llama",), UNSTATED, (FREQS,)),
    "longrope": Way(("phi3",), (None, "longrope"), (LONG, SHORT)),
}
"""Each by its name in transformers."""
BY_FACTOR = ("linear", "yarn")


def rope_parameters(
    name: str, architecture: str, own: Mapping[str, Any], head: int, factors: Mapping[str, Values]
) -> dict[str, Any]:
    """Return what transformers' ``rope_parameters`` are to say beside the base: nothing where the embedding is not scaled.

    Parameters
    ----------
    name, architecture : str
        The file's name, and what it calls its architecture.
    own : mapping of str to object
        Its fields of that architecture.
    head : int
        Numbers of a head, all of which are turned.
    factors : mapping of str to numpy.ndarray
        Those of the `TENSORS` that it has.

    Raises
    ------
    CheckpointError
        If a tensor holds no such factors, or the base is none.
    UnsupportedError
        If the scaling is unknown, or contradicts itself, or transformers has other frequencies.
    """
    base = own.get("rope.freq_base", BASE)
    if not isinstance(base, int | float) or not 1 < base <= LARGEST:
        raise CheckpointError(f"{name} is damaged: the base of its rotary embedding is {base}.", AGAIN)
    for tensor, values in factors.items():
        _require_factors(name, tensor, values, head)
    stated, by, attention = own.get("rope.scaling.type"), _factor(own), _number(own, "rope.scaling.attn_factor", 1.0)
    for kind, way in WAYS.items():
        if architecture not in way.architectures or stated not in way.types or tuple(sorted(factors)) != way.tensors:
            continue
        if (by > 1 if kind in BY_FACTOR else by == 1) and (attention > 0 if kind == "longrope" else attention == 1):
            return _parameters(name, kind, own, head, factors)
    shown, tensors = str(stated or "linear")[:20], f", with {' and '.join(sorted(factors))}" if factors else ""
    raise UnsupportedError(
        f"{name} has a rotary embedding that is scaled ({shown}, by {by:g}{tensors}) in a way that transformers "
        f"does not have, or not for {architecture}.",
        OTHER,
    )


def _parameters(name: str, kind: str, own: Mapping[str, Any], head: int, factors: Mapping[str, Values]) -> dict[str, Any]:
    if kind == "default":
        return {}
    if kind == "llama3":
        return _llama3(name, factors[FREQS], own.get("rope.freq_base", BASE), head)
    found: dict[str, Any] = {"rope_type": kind}
    if kind in BY_FACTOR:
        found["factor"] = _factor(own)
    if kind == "longrope":
        found |= {"long_factor": _numbers(factors[LONG]), "short_factor": _numbers(factors[SHORT])}
        found["attention_factor"] = _number(own, "rope.scaling.attn_factor", 1.0)
    if kind != "linear":
        original = own.get("rope.scaling.original_context_length")
        if not isinstance(original, int) or original <= 0:
            raise UnsupportedError(f"{name} has a rotary embedding of type {kind}, but not the original context of it.", OTHER)
        if kind == "yarn" and not _falls(original, own.get("rope.freq_base", BASE), head):
            raise UnsupportedError(
                f"{name} has a rotary embedding of type yarn with an original context of {original}, where transformers scales "
                "other frequencies than llama.cpp.",
                OTHER,
            )
        found["original_max_position_embeddings"] = original
    return found


def _falls(original: int, base: float, head: int) -> bool:
    """Tell whether yarn's ramp goes from high frequencies to low ones: if not, the two divide by it with another sign.

    It goes from the pair of numbers that turns 32 times in the original context to the one that turns once.
    """
    first, last = (head * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
    return max(math.floor(first), 0) <= min(math.ceil(last), head - 1)


def _llama3(name: str, factors: Values, base: float, head: int) -> dict[str, Any]:
    """Return the settings from which the factors were made."""
    if (factors == 1).all():
        return {}
    plain, divided = _frequencies({"rope_type": "linear", "factor": 1.0}, base, head), factors.astype(np.float64)
    for settings in (USUAL, *_solved(plain, divided)):
        found = {"rope_type": "llama3", "factor": _shortest(factors.max()), **settings}
        turns = settings["original_max_position_embeddings"] * plain / (2 * math.pi)
        between = (turns > settings["low_freq_factor"]) & (turns < settings["high_freq_factor"])
        wrong = np.abs(_frequencies(found, base, head) - plain / divided)
        if (wrong <= ALIKE * plain / divided + BETWEEN * plain * between).all():
            return found
    raise UnsupportedError(
        f"{name} divides the frequencies of its rotary embedding by numbers ({FREQS}) that no settings of Llama 3.1 give.",
        AGAIN,
    )


def _solved(plain: Floats, divided: Floats) -> Iterator[dict[str, float]]:
    """Yield the settings of those frequencies that are scaled in part, if there are enough.

    A frequency f is multiplied by ``(1 - s) / factor + s``, where ``s = (original * f / 2 pi - low) / (high - low)`` is a
    straight line. Both ``original`` and ``high`` count in ``low`` only, so that it may be 1.
    """
    between = (divided > 1) & (divided < divided.max())
    if between.sum() < 2:  # noqa: PLR2004  # of a line
        return
    least = 1 / divided.max()
    part = (1 / divided - least) / (1 - least)
    slope, start = np.polyfit(plain[between] / (2 * math.pi), part[between], 1)
    if start < 0 < slope:
        high, original = round(float(1 - 1 / start), 3), round(float(-slope / start))
        yield {"low_freq_factor": 1.0, "high_freq_factor": high, "original_max_position_embeddings": original}


def _frequencies(parameters: dict[str, Any], base: float, head: int) -> Floats:
    """Return the frequencies that transformers makes of the parameters, shape (head / 2)."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    with quiet():  # it finds the original context too long for a config that has no other
        config = LlamaConfig(hidden_size=head, num_attention_heads=1, rope_parameters=parameters | {"rope_theta": base})
        frequencies, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    found: Floats = frequencies.numpy().astype(np.float64)
    return found


def _require_factors(name: str, tensor: str, values: Values, head: int) -> None:
    least = 1 if tensor == FREQS else 0
    if 2 * values.size != head:
        wrong = f"{values.size} numbers, not one for each of the {head // 2} frequencies"
    elif (none := ~np.isfinite(values) | (values < least) | (values == 0)).any():
        wrong = f"{values[none][0]:g}, by which no frequency is divided"
    else:
        return
    raise CheckpointError(f"{name} is damaged: {tensor} holds {wrong}.", AGAIN)


def _factor(own: Mapping[str, Any]) -> float:
    """Return by what the positions are divided; no number where the file contradicts itself."""
    new, old = (_number(own, key, 1.0) for key in ("rope.scaling.factor", "rope.scale_linear"))
    if "rope.scaling.factor" in own and "rope.scale_linear" in own and new != old:
        return math.nan
    return (new if "rope.scaling.factor" in own else old) or 1.0  # 0 is as if it were not there


def _number(own: Mapping[str, Any], key: str, default: float) -> float:
    value = own.get(key, default)
    return _shortest(value) if isinstance(value, int | float) and abs(value) <= LARGEST else math.nan


def _numbers(values: Values) -> list[float]:
    return [_shortest(value) for value in values]


def _shortest(value: Any) -> float:
    """Return the number of fewest digits that is the same in float32: the one of the published config, of 8.1 as of 8."""
    return float(str(np.float32(value)))
