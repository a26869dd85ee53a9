"""GGUF files whose rotary embedding is scaled: the logits of the published model, for a text that is long enough to tell."""

import math
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
import transformers
from tiny_gguf import LAYERS, WIDE, llama3_factors, make_gguf
from torch.nn.functional import log_softmax

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import gguf_exact, gguf_files, versions
from airllm_nb.compat.gguf_rotary import FREQS, LONG, SHORT
from airllm_nb.errors import AirLLMError, CheckpointError, UnsupportedError

pytestmark = pytest.mark.skipif(versions.installed() < gguf_files.SINCE, reason="refused by this version of transformers")
TOKENS, CONTEXT, BASE, HEAD = 400, 131072, 500000.0, 64
IDS = torch.from_numpy(np.random.default_rng(0).integers(4, 290, (1, TOKENS)))


class Scaled(NamedTuple):
    """A file's fields and tensors, and what the published config.json has as ``rope_scaling``."""

    architecture: str
    fields: dict[str, Any]
    factors: dict[str, np.ndarray]
    published: dict[str, Any]
    beside: dict[str, Any] = {}  # noqa: RUF012  # never changed


def llama3(factor):
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return Scaled("llama", {}, {FREQS: llama3_factors(BASE, HEAD, *scaling.values())}, {"rope_type": "llama3"} | scaling)


def linear(architecture, factor):
    said = {f"{architecture}.rope.scaling.type": "linear", f"{architecture}.rope.scaling.factor": factor}
    return Scaled(architecture, said, {}, {"rope_type": "linear", "factor": factor})


def yarn(architecture):
    said = {"type": "yarn", "factor": 4.0, "original_context_length": 256}
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    return Scaled(architecture, {f"{architecture}.rope.scaling.{key}": value for key, value in said.items()}, {}, scaling)


def longrope(original):
    long, short = [1 + 0.3 * number for number in range(HEAD // 2)], [1 + 0.02 * number for number in range(HEAD // 2)]
    said = {"original_context_length": original, "attn_factor": math.sqrt(1 + math.log(CONTEXT / original) / math.log(original))}
    factors = {LONG: np.array(long, np.float32), SHORT: np.array(short, np.float32)}
    scaling = {"type": "longrope", "long_factor": long, "short_factor": short}
    beside = {"original_max_position_embeddings": original}
    return Scaled("phi3", {f"phi3.rope.scaling.{key}": value for key, value in said.items()}, factors, scaling, beside)


ALL = {
    "llama3.1": llama3(8.0), "llama3.2": llama3(32.0), "yarn llama": yarn("llama"), "yarn qwen2": yarn("qwen2"),
    "yarn qwen3": yarn("qwen3"), "longrope short": longrope(4096), "longrope long": longrope(256),
    "gemma3": linear("gemma3", 8.0), **{f"linear {name}": linear(name, 2.5) for name in ("gemma2", "llama", "qwen2", "qwen3")},
}  # fmt: skip
EACH = pytest.mark.parametrize("scaled", ALL.values(), ids=ALL)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRLLM_NB_HOME", str(tmp_path / "home"))


def make(path, scaled, kind="Q8_0", **more):
    base = {f"{scaled.architecture}.rope.freq_base": BASE}
    # The sixth layer is the first that Gemma 3 gives no window.
    layers = 6 if scaled.architecture == "gemma3" else LAYERS
    return make_gguf(
        path, scaled.architecture, kind, width=WIDE, fields=base | scaled.fields, factors=scaled.factors, context=CONTEXT,
        layers=layers, **more,
    )  # fmt: skip


def published(path, scaled, folder, **more):
    """Return transformers' model of the file's weights as a published folder, with the config.json of such models."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    said = {key: value for key, value in config.to_dict().items() if key != "rope_parameters"}
    if "query_pre_attn_scalar" in said:
        said["query_pre_attn_scalar"] = config.head_dim
    rotary = {"rope_theta": BASE, "rope_scaling": scaled.published and dict(scaled.published)}
    model = transformers.AutoModelForCausalLM.from_config(type(config)(**said | rotary | scaled.beside | more)).eval()
    missing, _ = model.load_state_dict(load_gguf_checkpoint(str(path), True, model)["tensors"], strict=False)
    if missing:
        model.tie_weights()
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load(path, **options):
    return LayeredModel.from_pretrained(path, **({"device": "cpu", "dtype": "float32"} | options))


@EACH
def test_logits_are_those_of_the_published_model(tmp_path, scaled):
    path = make(tmp_path / "model.gguf", scaled)
    expected = published(path, scaled, tmp_path / "published")
    least = plan(path, device="cpu", dtype="float32").least
    with torch.no_grad():
        logits = expected(IDS).logits
        unscaled = published(path, scaled._replace(published=None), tmp_path / "unscaled")(IDS).logits
        assert (logits - unscaled).abs().max() > 1e-4  # one of six layers of Gemma 3, whose queries are normed
        for memory in ("1GB", least):
            with load(path, memory=memory) as model:
                assert any(layer.resident for layer in model.layers) == (memory == "1GB")
                assert torch.equal(model(IDS).logits, logits)
                answer = model.generate(IDS, max_new_tokens=8, do_sample=False)
                assert torch.equal(answer, expected.generate(IDS, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("name", ["llama3.1", "gemma3", "longrope long"])
def test_quantized(tmp_path, name):
    path = make(tmp_path / "model.gguf", ALL[name], "Q4_0", inner=WIDE)
    with torch.no_grad():
        expected = log_softmax(published(path, ALL[name], tmp_path / "published")(IDS).logits[0], dim=-1)
        for memory in ("1GB", plan(path, device="cpu", dtype="float32", quantize="int4-32").least):
            with load(path, quantize="int4-32", memory=memory) as model:
                found = log_softmax(model(IDS).logits[0], dim=-1)
                assert float((expected.exp() * (expected - found)).sum(dim=-1).mean()) < 1e-4
        with load(path, quantize="int4") as model:
            assert model(IDS).logits.isfinite().all()


def test_the_config_is_the_published_one(tmp_path):
    with load(make(tmp_path / "model.gguf", ALL["llama3.1"])) as model:
        assert model.config.rope_parameters == ALL["llama3.1"].published | {"rope_theta": BASE}
    with load(make(tmp_path / "other.gguf", ALL["gemma3"])) as model:
        assert model.config.rope_parameters == {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": BASE},
        }


def test_factors_are_no_weight(tmp_path):
    scaled = ALL["llama3.1"]
    plain = make(tmp_path / "plain.gguf", scaled._replace(factors={}))
    told, without = (plan(path, device="cpu") for path in (make(tmp_path / "model.gguf", scaled), plain))
    assert (told.total_nbytes, told.least) == (without.total_nbytes, without.least)


def test_other_factors_under_the_same_header_are_seen(tmp_path):
    path = make(tmp_path / "model.gguf", ALL["llama3.1"])
    with load(path) as model:
        assert model.config.rope_parameters["factor"] == 8.0
    write(path, FREQS, ALL["llama3.2"].factors[FREQS])
    with load(path) as model:
        assert model.config.rope_parameters["factor"] == 32.0


def write(path, name, values):
    (tensor,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(np.asarray(values).tobytes())


def refusal(path, kind):
    with pytest.raises(AirLLMError) as planned:
        plan(path, device="cpu")
    with pytest.raises(AirLLMError) as loaded:
        load(path)
    assert type(planned.value) is type(loaded.value) is kind
    assert str(planned.value) == str(loaded.value)
    return planned.value.cause


@pytest.mark.parametrize(("place", "value", "kind", "words"), [
    (3, np.nan, CheckpointError, "is damaged: rope_freqs.weight holds nan, by which no frequency is divided"),
    (0, 0.0, CheckpointError, "is damaged: rope_freqs.weight holds 0, by which no frequency is divided"),
    (20, 7.9, UnsupportedError, "(rope_freqs.weight) that no settings of Llama 3.1 give"),
    (31, 8.0001, UnsupportedError, "(rope_freqs.weight) that no settings of Llama 3.1 give"),
])  # fmt: skip
def test_damaged_factors(tmp_path, place, value, kind, words):
    factors = ALL["llama3.1"].factors[FREQS].copy()
    factors[place] = value
    path = make(tmp_path / "model.gguf", ALL["llama3.1"])
    with load(path):  # whose config is kept
        write(path, FREQS, factors)
    assert words in refusal(path, kind)


@pytest.mark.parametrize(("factors", "kind", "words"), [
    ({FREQS: np.ones(63, np.float32)}, CheckpointError, "holds 63 numbers, not one for each of the 32 frequencies"),
    ({FREQS: np.ones(32, np.float16)}, CheckpointError, "it holds rope_freqs.weight as F16 of shape (32,), not as factors"),
    ({FREQS: np.ones((2, 32), np.float32)}, CheckpointError, "it holds rope_freqs.weight as F32 of shape (2, 32), not"),
    ({FREQS: np.ones(5000, np.float32)}, CheckpointError, "it holds rope_freqs.weight as F32 of shape (5000,), not as factors"),
    ({LONG: np.ones(32, np.float32)}, UnsupportedError, "(linear, by 1, with rope_factors_long.weight)"),
])  # fmt: skip
def test_tensors_of_another_kind(tmp_path, factors, kind, words):
    assert words in refusal(make(tmp_path / "model.gguf", ALL["llama3.1"]._replace(factors=factors)), kind)


@pytest.mark.parametrize(("architecture", "layers"), gguf_exact.OWN_SCALE.items())
def test_the_scale_of_gemmas_attention(tmp_path, monkeypatch, architecture, layers):
    """That of a head, but for the 27B models."""
    path = make_gguf(tmp_path / "model.gguf", architecture, head=32, context=CONTEXT)
    unscaled = Scaled(architecture, {}, {}, None)
    assert layers > LAYERS
    with torch.no_grad():
        usual, largest, default = (
            published(path, unscaled, tmp_path / str(scale), query_pre_attn_scalar=scale, rope_theta=10000.0)(IDS).logits
            for scale in (32, 16, 256)
        )
        assert not torch.allclose(usual, largest, atol=1e-2)
        assert not torch.allclose(usual, default, atol=1e-2)
        with load(path) as model:
            assert torch.equal(model(IDS).logits, usual)
        monkeypatch.setitem(gguf_exact.OWN_SCALE, architecture, LAYERS)
        monkeypatch.setenv("AIRLLM_NB_HOME", str(tmp_path / "other"))
        with load(path) as model:
            assert torch.equal(model(IDS).logits, largest)
