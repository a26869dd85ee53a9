"""Settings of Llama 3.1's rotary embedding, found again in its factors; what are no such factors is refused."""

import contextlib
import math

import numpy as np
import pytest
from tiny_gguf import llama3_factors

from airllm_nb.compat import gguf_exact, gguf_files, versions
from airllm_nb.compat.gguf_rotary import FREQS, LONG, SHORT, _frequencies, rope_parameters
from airllm_nb.errors import AirLLMError, CheckpointError, UnsupportedError

pytestmark = pytest.mark.skipif(versions.installed() < gguf_files.SINCE, reason="refused by this version of transformers")
NAMES = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
PUBLISHED = [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192)]
OTHERS = [(8.1, 1.0, 4.0, 8192), (16.0, 1.0, 8.0, 4096), (4.0, 1.0, 3.5, 10000), (64.0, 1.0, 16.0, 131072)]
ONES = np.ones(64, np.float32)
BOTH = {LONG: 4 * ONES, SHORT: ONES}


def found(factors, base=500000.0, head=128):
    return rope_parameters("a.gguf", "llama", {"rope.freq_base": base}, head, {FREQS: factors})


def in_double(base, head, factor, low, high, original):
    """Return what a converter makes that computes in float64."""
    turns = [original / (2 * math.pi * base ** (number / head)) for number in range(0, head, 2)]
    smooth = [min(max((turn - low) / (high - low), 0), 1) for turn in turns]
    return np.array([1 / ((1 - part) / factor + part) for part in smooth], np.float32)


@pytest.mark.parametrize("make", [llama3_factors, in_double])
@pytest.mark.parametrize("head", [64, 96, 128, 256])
@pytest.mark.parametrize("base", [10000.0, 500000.0, 1e6])
@pytest.mark.parametrize("settings", PUBLISHED)
def test_published_settings_are_found_again(make, head, base, settings):
    expected = {"rope_type": "llama3", **dict(zip(NAMES, settings, strict=True))}
    assert found(make(base, head, *settings), base, head) == expected


@pytest.mark.parametrize("settings", OTHERS)
def test_other_settings_are_found_again(settings):
    expected = {"rope_type": "llama3", **dict(zip(NAMES, settings, strict=True))}
    assert found(llama3_factors(500000.0, 128, *settings)) == expected


def test_settings_that_mean_the_same_count_as_one():
    """What counts is the original context over each of the two."""
    assert found(llama3_factors(500000.0, 128, 8.0, 2.0, 8.0, 16384)) == found(llama3_factors(500000.0, 128, *PUBLISHED[0]))


def test_factors_of_one_scale_nothing():
    assert found(np.ones(64, np.float32)) == {}


@pytest.mark.parametrize("place", [0, 28, 31, 32, 33, 63])
@pytest.mark.parametrize("change", [1e-5, -1e-5, 1e-2, 1.0])
def test_one_factor_off(place, change):
    factors = llama3_factors(500000.0, 128, *PUBLISHED[1])
    factors[place] = max(factors[place] * (1 + change), 1 + abs(change))
    with pytest.raises(UnsupportedError, match="by numbers .* that no settings of Llama 3.1 give"):
        found(factors)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -1.0, 0.5])
def test_what_divides_nothing(value):
    factors = llama3_factors(500000.0, 128, *PUBLISHED[0])
    factors[40] = value
    with pytest.raises(CheckpointError, match=f"a.gguf is damaged: {FREQS} holds {value:g}, by which no frequency is divided"):
        found(factors)


@pytest.mark.parametrize("length", [0, 1, 63, 65, 128])
def test_another_number_of_factors(length):
    with pytest.raises(CheckpointError, match=f"holds {length} numbers, not one for each of the 64 frequencies"):
        found(np.ones(length, np.float32))


def test_the_base_counts():
    with pytest.raises(UnsupportedError, match="no settings"):
        found(llama3_factors(500000.0, 128, *PUBLISHED[0]), 10000.0)


@pytest.mark.parametrize("base", [math.nan, math.inf, 0.0, -5.0, 1.0, 1e300, "500000"])
def test_a_base_that_is_none(base):
    with pytest.raises(CheckpointError, match="the base of its rotary embedding is"):
        found(llama3_factors(500000.0, 128, *PUBLISHED[0]), base)


@pytest.mark.parametrize("base", [math.nan, math.inf, 0.0, -5.0, 1.0, 0.5, True])
@pytest.mark.parametrize("architecture", ["gemma3", "llama", "phi3"])
def test_a_base_that_is_none_where_nothing_is_scaled(architecture, base):
    with pytest.raises(CheckpointError, match="the base of its rotary embedding is"):
        rope_parameters("a.gguf", architecture, {"rope.freq_base": base}, 128, {})


def test_a_base_that_is_not_said():
    """llama.cpp takes 10,000 for each, and transformers a million for Gemma 3."""
    assert gguf_exact.settings("a.gguf", "gemma3", {"gemma3.attention.key_length": 64}, {})["rope_parameters"] == {
        "rope_theta": 10000.0
    }


@pytest.mark.parametrize(("original", "base", "refused"), [
    (1, 1e4, True), (4, 1e4, True),
    (6, 1e4, False), (4096, 1e4, False), (4096, 1e6, False), (4096, 1.001, True), (4096, 3.0, True),
])  # fmt: skip
def test_a_yarn_that_llama_cpp_computes_otherwise(original, base, refused):
    """The part of each frequency that stays is ``1 - clamp((i - low) / max(0.001, high - low), 0, 1)``, in its words."""
    own = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": original,
           "rope.freq_base": base}  # fmt: skip
    turns = [128 * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(base)) for beta in (32, 1)]
    low, high = max(0, math.floor(turns[0])), min(127, math.ceil(turns[1]))
    plain = base ** (-np.arange(0, 128, 2) / 128)
    stays = 1 - np.clip((np.arange(64) - low) / max(0.001, high - low), 0, 1)
    found = _frequencies({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original}, base, 128)
    assert np.allclose(found, plain * (stays + (1 - stays) / 4), rtol=1e-4) != refused
    with pytest.raises(UnsupportedError, match="other frequencies than llama.cpp") if refused else contextlib.nullcontext():
        rope_parameters("a.gguf", "llama", own, 128, {})


def test_odd_heads():
    with pytest.raises(CheckpointError, match="holds 64 numbers"):
        found(ONES, head=129)


@pytest.mark.parametrize("factors", [np.full(64, 3, np.float32), np.linspace(1, 8, 64, dtype=np.float32), np.r_[np.ones(63), 2]])
def test_scalings_of_another_kind(factors):
    with pytest.raises(UnsupportedError, match="no settings"):
        found(factors.astype(np.float32))


@pytest.mark.parametrize(
    ("architecture", "own", "factors"),
    [
        ("llama", {"rope.scaling.type": "su"}, {}),
        ("llama", {"rope.scaling.type": 3, "rope.scaling.factor": 2.0}, {}),
        ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, {}),
        ("llama", {"rope.scaling.type": "longrope"}, {}),
        ("llama", {"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, {}),
        ("llama", {"rope.scaling.factor": 0.5}, {}),
        ("llama", {"rope.scaling.factor": -2.0}, {}),
        ("llama", {"rope.scaling.factor": math.nan}, {}),
        ("llama", {"rope.scaling.factor": math.inf}, {}),
        ("llama", {"rope.scaling.factor": 1e300}, {}),
        ("llama", {"rope.scaling.factor": "2"}, {}),
        ("llama", {"rope.scaling.attn_factor": 1.2}, {}),
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, {FREQS: ONES}),
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, {FREQS: ONES}),
        ("llama", {"rope.scaling.attn_factor": 1.2}, {FREQS: ONES}),
        ("llama", {}, BOTH),
        ("llama", {}, {FREQS: ONES} | BOTH),
        ("qwen2", {}, {FREQS: ONES}),
        ("gemma3", {}, {FREQS: ONES}),
        ("phi3", {}, {FREQS: ONES}),
        ("phi3", {"rope.scaling.original_context_length": 4096}, {LONG: ONES}),
        ("phi3", {"rope.scaling.original_context_length": 4096, "rope.scaling.type": "none"}, BOTH),
        ("phi3", {"rope.scaling.original_context_length": 4096, "rope.scaling.factor": 2.0}, BOTH),
        ("phi3", {}, BOTH),
        ("phi3", {"rope.scaling.original_context_length": 0}, BOTH),
        ("phi3", {"rope.scaling.original_context_length": 4096, "rope.scaling.attn_factor": math.nan}, BOTH),
        ("phi3", {"rope.scaling.original_context_length": 4096, "rope.scaling.attn_factor": "1"}, BOTH),
        ("phi3", {"rope.scaling.original_context_length": "4096"}, BOTH),
        ("phi3", {"rope.scaling.factor": 2.0}, {}),
        ("gemma3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 64}, {}),
        ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, {}),
        ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0, "rope.scaling.original_context_length": 64}, {}),
    ],
)  # fmt: skip
def test_what_is_not_read(architecture, own, factors):
    with pytest.raises(AirLLMError, match="has a rotary embedding") as refused:
        rope_parameters("a.gguf", architecture, own, 128, factors)
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("architecture", "own", "expected"),
    [
        ("llama", {}, {}),
        ("llama", {"rope.scaling.factor": 0.0}, {}),
        ("llama", {"rope.scaling.factor": 1.0, "rope.scale_linear": 1.0}, {}),
        ("phi3", {"rope.scaling.original_context_length": 4096}, {}),
        ("llama", {"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ("gemma3", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        ("qwen2", {"rope.scaling.factor": float(np.float32(2.3))}, {"rope_type": "linear", "factor": 2.3}),
    ],
)
def test_what_is_read(architecture, own, expected):
    assert rope_parameters("a.gguf", architecture, own, 128, {}) == expected
