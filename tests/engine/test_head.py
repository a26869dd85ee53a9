"""A packed head: the logits of transformers with the head that is meant, tied to the embedding or not."""

import pytest
import torch
from test_quantize import IDS, LONG, load, meant
from tiny import LAYERS, budgets, make_checkpoint

from airllm_nb import plan
from airllm_nb.engine.head import PACKING
from airllm_nb.engine.packed_weight import PackedWeight
from airllm_nb.engine.rounding import nearest
from airllm_nb.errors import AirLLMError, CheckpointError, UnsupportedError

VOCABULARY = 272  # a multiple of 16


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRLLM_NB_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "quantized"


def with_head(folder, name):
    """Return transformers' own model with the weights that are meant; its embedding is as published."""
    model = meant(folder, name)
    model.config.tie_word_embeddings = False
    published = model.lm_head.weight.detach()
    dense = PACKING.dense(nearest(published, PACKING), tuple(published.shape), torch.float32)
    model.lm_head.weight = torch.nn.Parameter(dense)
    return model


@pytest.mark.parametrize("keep", ["all", "half", "none"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2"])
def test_logits_are_those_of_the_head_that_is_meant(checkpoint, kind, keep):
    folder = checkpoint(kind, vocab_size=VOCABULARY)
    expected = with_head(folder, "int8")
    memory = budgets(plan(folder, device="cpu", dtype="float32", quantize="int8+head"))[keep]
    with torch.no_grad(), load(folder, "int8+head", memory=memory) as model:
        assert isinstance(model._hf.lm_head.weight, PackedWeight)
        assert not isinstance(model._hf.get_input_embeddings().weight, PackedWeight)
        assert model.plan.by_rows == (keep != "all")
        few, reference = model(IDS).logits, expected(IDS).logits
        assert (few - reference).norm() < 0.02 * reference.norm()  # the kernels compute in bfloat16
        assert torch.equal(model(LONG).logits, expected(LONG).logits)  # so many rows do not take them


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_it_takes_less_and_is_written_once(checkpoint, home, kind):
    folder = checkpoint(kind, vocab_size=VOCABULARY)
    without, small = (plan(folder, device="cpu", dtype="bfloat16", quantize=name) for name in ("int4", "int4+head"))
    assert "the head in int8" in str(small)
    assert small.least < without.least
    with load(folder, "int4+head") as model:
        first = model(IDS).logits
    (path,) = home.glob("*int4-64+head-*/head.safetensors")
    before = path.stat().st_mtime_ns
    with load(folder, "int4+head") as model:
        assert torch.equal(model(IDS).logits, first)
    assert path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:-1])
    with load(folder, "int4+head") as model:
        assert torch.equal(model(IDS).logits, first)
    assert len(list(path.parent.glob("*.safetensors"))) == LAYERS + 1


def test_a_head_in_pieces_is_the_same(checkpoint, home, monkeypatch):
    folder = checkpoint("llama", vocab_size=VOCABULARY)
    with load(folder, "int8+head"):
        pass
    (path,) = home.glob("*/head.safetensors")
    whole = path.read_bytes()
    path.unlink()
    monkeypatch.setattr("airllm_nb.engine.head.PIECES", 5000)
    with load(folder, "int8+head"):
        pass
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_the_lens_and_generating(checkpoint, kind):
    folder = checkpoint(kind, tokenizer=True, vocab_size=VOCABULARY)
    with load(folder, "int8+head") as model:
        assert len(model.trace("What is this?").top_ids) == LAYERS
        assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 8)


def test_what_cannot_be_packed_is_refused(tmp_path):
    odd = make_checkpoint(tmp_path, "llama")
    with pytest.raises(UnsupportedError, match=r"The head of this model cannot be quantized: .* are no multiples of .*\+head"):
        load(odd, "int8+head")
    with pytest.raises(AirLLMError, match="There is no quantization 'int4\\+tail'"):
        load(odd, "int4+tail")
    with pytest.raises(AirLLMError, match="There is no quantization '\\+head'"):
        load(odd, "+head")


def test_a_head_that_is_not_finite_is_refused(damaged):
    from safetensors.torch import load_file, save_file

    folder = damaged("llama", vocab_size=VOCABULARY)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][3, 4] = float("nan")
            save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="lm_head.weight cannot be quantized: a weight is not finite"):
        load(folder, "int8+head")
