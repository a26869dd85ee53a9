"""Rounding: scales that are searched for, errors that make up for each other, and what a calibration pass leaves on disk."""

import itertools

import pytest
import torch
from tiny import LAYERS, VOCABULARY
from transformers import AutoModelForCausalLM

from airllm_nb import LayeredModel, plan
from airllm_nb.engine import calibration
from airllm_nb.engine.gptq import compensated, factor
from airllm_nb.engine.packed import SCALES, Int4
from airllm_nb.engine.packed_weight import PackedWeight
from airllm_nb.engine.rounding import nearest
from airllm_nb.errors import AirLLMError, CheckpointError

PACKINGS = [Int4(32), Int4(64), Int4(128)]
IDS = torch.arange(5, 15)[None]
LONG = (torch.arange(100) * 7 % VOCABULARY)[None]
NAME = "int4-32-gptq"


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def meant(packing, packed, shape):
    return packing.dense(packed, shape, torch.float32)


def plain_grid(weight, group):
    """Return a weight rounded on the grid from the least number of each group to the greatest."""
    numbers = weight.view(len(weight), -1, group)
    low, high = numbers.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).to(SCALES).float()
    zero = (low + 8 * scale).to(SCALES).float()
    return (((numbers - zero) / scale).round().clamp(-8, 7) * scale + zero).view_as(weight)


# The scale


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_a_scale_is_never_worse_than_the_range_and_mostly_better(packing):
    weight = random(64, 256) * 0.02
    weight[::3, 5] *= 6  # outliers
    weight[::7] += 0.1  # and groups that do not lie around zero
    found = meant(packing, nearest(weight, packing), weight.shape)
    ours, plain = (
        (made - weight).square().view(64, -1, packing.group).sum(dim=-1) for made in (found, plain_grid(weight, packing.group))
    )
    assert (ours <= plain * (1 + 1e-4)).all()
    assert ours.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_numbers_on_a_grid_of_16_levels_are_found_again(packing):
    """As those of GGUF's Q4_1 are, whose scales are numbers of float16."""
    groups = 256 // packing.group
    codes = torch.randint(0, 16, (64, groups, packing.group), generator=torch.Generator().manual_seed(1))
    codes[..., 0], codes[..., 1] = 0, 15
    scales, least = random(64, groups, 1, seed=2).abs().half().float() * 0.01, random(64, groups, 1, seed=3).half().float() * 0.05
    weight = (codes * scales + least).view(64, 256)
    error = (meant(packing, nearest(weight, packing), weight.shape) - weight).view(64, groups, -1)
    bound = scales.abs() * 15 / 256 + weight.view(64, groups, -1).abs().amax(dim=-1, keepdim=True) / 256
    assert (error.abs() <= bound).all()  # what a scale and a zero lose in bfloat16
    exact = (codes - 8) * scales.to(SCALES).float() + least.to(SCALES).float()
    assert torch.equal(meant(packing, nearest(exact.view(64, 256), packing), weight.shape), exact.view(64, 256))


# Compensated errors


def layer(tokens=512, inputs=256):
    """Inputs that depend on each other and differ in size, as those of a real layer, and a weight for them."""
    mixed = random(tokens, 32) @ random(32, inputs, seed=1) + random(tokens, inputs, seed=2) * 0.3
    return mixed * random(inputs, seed=3).exp(), random(96, inputs, seed=4) * 0.02


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_compensated_errors_are_smaller_where_inputs_correlate(packing):
    inputs, weight = layer()
    found = factor(inputs)
    gram = inputs.T @ inputs
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    assert torch.allclose(found.lower * found.variances @ found.lower.T, gram, rtol=1e-3, atol=1e-3 * gram.abs().max())
    errors = [
        float(((meant(packing, packed, weight.shape) - weight) @ inputs.T).norm())
        for packed in (compensated(weight, packing, found), nearest(weight, packing))
    ]
    assert errors[0] < 0.6 * errors[1]


def test_each_column_makes_up_for_those_after_it():
    """By the definition, a column at a time and without groups of columns."""
    inputs, weight = layer()
    packing, found = Int4(256), factor(inputs)
    packed = compensated(weight, packing, found)
    made = meant(packing, packed, weight.shape).double()
    scale, zero = packing._scales(packed, weight.shape)[0].double().unbind(-1)
    lower, exact = found.lower.double(), weight.double()
    different = 0
    for column in range(255, -1, -1):
        aim = exact[:, column] + (exact[:, column + 1 :] - made[:, column + 1 :]) @ lower[column + 1 :, column]
        wanted = ((aim - zero) / scale).round().clamp(-8, 7) * scale + zero
        different += int(((made[:, column] - wanted).abs() > 1e-6).sum())
    assert different < 0.002 * weight.numel()  # where a number lies between two codes, but for the last bits


def test_few_inputs_and_inputs_that_are_always_zero_do_no_harm():
    inputs, weight = layer(tokens=3)
    inputs[:, 10:20] = 0
    packed = compensated(weight, Int4(64), factor(inputs))
    assert (meant(Int4(64), packed, weight.shape) - weight).norm() < 0.2 * weight.norm()
    assert meant(Int4(64), compensated(weight, Int4(64), factor(inputs * 0)), weight.shape).isfinite().all()


def test_what_is_not_finite_is_not_compensated():
    inputs, weight = layer()
    found = factor(inputs)
    weight[3, 7] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        compensated(weight, Int4(64), found)
    inputs[5, 7] = torch.inf
    assert factor(inputs) is None


# The pass


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRLLM_NB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(calibration, "TOKENS", 1024)  # the tiny models' tokens are bytes
    return tmp_path / "home" / "quantized"


@pytest.fixture
def folder(checkpoint):
    return checkpoint("llama", tokenizer=True)


def load(folder, quantize=NAME, **options):
    return LayeredModel.from_pretrained(folder, **({"device": "cpu", "dtype": "float32"} | options), quantize=quantize)


def files(home):
    return {path.name: path.read_bytes() for path in home.glob("*gptq*/*.safetensors")}


def with_weights_of(model, folder):
    """Return transformers' own model with what the packed weights of another one mean."""
    twin = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    for (name, weight), own in zip(model.named_parameters(), twin.parameters(), strict=True):
        if isinstance(weight, PackedWeight):
            assert tuple(weight.shape) == tuple(own.shape), name
            own.data = weight.dense()
    return twin


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "mistral"])
def test_logits_are_those_of_the_weights_that_are_meant(checkpoint, kind):
    folder = checkpoint(kind, tokenizer=True)
    with torch.no_grad(), load(folder) as model:
        assert sum(isinstance(weight, PackedWeight) for weight in model.parameters()) >= LAYERS
        twin = with_weights_of(model, folder)
        assert torch.equal(model(LONG).logits, twin(LONG).logits)
        assert (model(IDS).logits - twin(IDS).logits).norm() < 0.04 * twin(IDS).logits.norm()
        expected = model(LONG).logits
    least = plan(folder, device="cpu", dtype="float32", quantize=NAME).least
    with torch.no_grad(), load(folder, memory=least) as model:  # streamed from the same files
        assert torch.equal(model(LONG).logits, expected)


def test_the_pass_makes_the_outputs_of_layers_come_nearer(folder):
    """On text, compensated errors cost less than the nearest codes, through the whole model."""
    ids = torch.tensor([list(calibration.TEXT.read_bytes()[5000:5100])])
    found = {}
    for name in (None, "int4-32", NAME):
        with torch.no_grad(), load(folder, name) as model:
            found[name] = model(ids).logits.log_softmax(dim=-1)
    away = {
        name: float((found[None].exp() * (found[None] - logits)).sum(dim=-1).mean()) for name, logits in found.items() if name
    }
    assert away[NAME] < 0.9 * away["int4-32"]


def test_layers_are_written_once_and_the_same_each_time(folder, home):
    told = []
    load(folder, progress=told.append).close()
    first = files(home)
    assert len(first) == LAYERS
    assert [event.file for event in told if type(event).__name__ == "Fetching"] == [
        *(f"model.layers.{index}" for index in range(LAYERS)), "",
    ]  # fmt: skip
    for path in home.glob("*gptq*/*.safetensors"):
        path.unlink()
    load(folder).close()
    assert files(home) == first
    told.clear()
    assert "rounded to the nearest" not in str(plan(folder, device="cpu", dtype="float32", quantize=NAME))
    load(folder, progress=told.append).close()
    assert not [event for event in told if type(event).__name__ == "Fetching"]


@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_interrupted_and_resumed_makes_the_same_files(folder, home, layer):
    load(folder).close()
    expected = files(home)
    for path in home.glob("*gptq*/*.safetensors"):
        path.unlink()

    def stop(event):
        if getattr(event, "file", "").endswith(f"layers.{layer}"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(folder, progress=stop)
    assert len(files(home)) == layer
    load(folder).close()
    assert files(home) == expected


def test_a_layer_in_the_middle_is_made_again_as_it_was(folder, home):
    load(folder).close()
    expected = files(home)
    sorted(home.glob("*gptq*/*.safetensors"))[2].unlink()
    told = []
    load(folder, progress=told.append).close()
    assert files(home) == expected
    assert [event.file for event in told if type(event).__name__ == "Fetching"] == ["model.layers.2", ""]


def test_compensated_and_nearest_lie_beside_each_other(folder, home):
    for name in (NAME, "int4-32"):
        load(folder, name).close()
    assert len(list(home.iterdir())) == 2
    with load(folder) as one, load(folder, "int4-32") as other:
        assert not torch.equal(one(IDS).logits, other(IDS).logits)


def test_experts_that_no_token_hits_get_the_nearest_codes(checkpoint, monkeypatch):
    """On transformers 4 each expert is three linear layers; of their stacks all codes are the nearest."""
    folder = checkpoint("mixtral", tokenizer=True)
    monkeypatch.setattr(calibration, "TOKENS", 1)  # which hits two experts of four
    monkeypatch.setattr(calibration, "LENGTH", 1)
    monkeypatch.setattr(Int4, "most_rows", 0)  # few tokens for each would take the kernel, and choose other experts
    with torch.no_grad(), load(folder) as model:
        assert torch.equal(model(LONG).logits, with_weights_of(model, folder)(LONG).logits)
        names = [name for name, weight in model.named_parameters() if isinstance(weight, PackedWeight) and "experts" in name]
        assert ("rounded to the nearest" in str(model.plan)) == bool(names)


def test_matrices_that_the_pass_does_not_reach_get_the_nearest_codes(folder, home, monkeypatch):
    monkeypatch.setattr(calibration, "factor", lambda _inputs: None)
    load(folder).close()
    load(folder, "int4-32").close()
    one, other = ([path.read_bytes()[-1000:] for path in sorted(home.glob(f"*int4-32-{key}*/*.s*"))] for key in ("gptq", "[!g]"))
    assert len(one) == LAYERS
    assert one == other
    text = str(plan(folder, device="cpu", dtype="float32", quantize=NAME))
    assert (
        "; 24 rounded to the nearest, as stacks of experts and what the calibration text does not reach "
        "(model.layers.0.mlp.gate_proj.weight)" in text
    )


def test_a_model_without_a_tokenizer_is_refused(checkpoint, home):
    with pytest.raises(AirLLMError, match="no tokenizer files, and gptq needs a text in tokens.*Leave out -gptq"):
        load(checkpoint("llama"))
    assert not list(home.glob("*/*.safetensors"))


def test_a_model_that_cannot_take_the_text_is_refused(folder, home, monkeypatch):
    monkeypatch.setattr(calibration, "token_ids", lambda *_, **__: torch.full((1, 8), VOCABULARY + 5))
    with pytest.raises(AirLLMError, match=r"cannot pass through this model: .*Leave out -gptq"):
        load(folder)
    assert not list(home.glob("*/*.safetensors"))


def test_weights_that_are_no_numbers_are_refused(damaged):
    folder = damaged("llama", shards="1GB", tokenizer=True)
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    for begin in itertools.count(len(raw) // 2 & ~1, 2048):
        raw[begin : begin + 2] = b"\xc0\x7f"  # NaN in bfloat16, in many weights
        if begin > len(raw) - 4096:
            break
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="cannot be quantized: a weight is not finite"):
        load(folder)


def test_the_text_is_cut_to_the_context(checkpoint):
    folder = checkpoint("llama", tokenizer=True, max_position_embeddings=40)
    with load(folder, None) as model:
        ids = calibration.token_ids(folder, model._hf, trust_remote_code=False)
    assert ids.shape == (1024 // 40, 40)
    assert bytes(ids[0].tolist()) == calibration.TEXT.read_bytes()[:40]


@pytest.mark.parametrize("name", ["int8-gptq", "int4gptq", "int4-48-gptq", "gptq"])
def test_other_names_are_refused(folder, name):
    with pytest.raises(AirLLMError, match=r"There is no quantization.*-gptq"):
        plan(folder, quantize=name)
