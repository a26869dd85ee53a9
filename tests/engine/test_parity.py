"""The main evidence: the layered engine gives exactly what transformers gives, whatever stays in memory."""

import pytest
import torch
import transformers
from tiny import CONFIGS, budgets

from airllm_nb import LayeredModel, plan
from airllm_nb.demo import demo_path

DTYPE = "dtype" if transformers.__version__ >= "5" else "torch_dtype"


def reference(folder, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{DTYPE: dtype}).eval()


def residents(model):
    return sum(layer.resident for layer in model.layers)


@pytest.mark.parametrize("keep", ["all", "half", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_and_tokens_are_those_of_transformers(checkpoint, kind, dtype, keep):
    folder = checkpoint(kind)
    ids = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(1))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 257}
    expected = reference(folder, dtype)
    memory = budgets(plan(folder, device="cpu", dtype=dtype))[keep]
    with LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory=memory) as model:
        stay = residents(model)
        half = stay == len(model.layers) if model.plan.experts else 0 < stay < len(model.layers)  # all but experts
        assert {"all": stay == len(model.layers), "half": half, "none": stay == 0}[keep]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected(ids).logits)
        assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))
        assert torch.equal(model(ids).logits, expected(ids).logits)  # and again, after generating


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_published_dtypes_are_converted_exactly(checkpoint, dtype):
    folder = checkpoint("llama", dtype=torch.float16)
    ids = torch.arange(9)[None]
    with LayeredModel.from_pretrained(
        folder, device="cpu", dtype=dtype, memory=plan(folder, device="cpu", dtype=dtype).least
    ) as model:
        assert torch.equal(model(ids).logits, reference(folder, dtype)(ids).logits)


def test_single_file_checkpoint(checkpoint):
    folder = checkpoint("llama", shards="1GB")
    assert (folder / "model.safetensors").is_file()
    ids = torch.arange(9)[None]
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        assert torch.equal(model(ids).logits, reference(folder, torch.float32)(ids).logits)


def test_head_stored_beside_a_tied_embedding(damaged):
    """Some files hold a tied matrix twice; if the copies differ they are not tied, as in transformers from 5.0 on."""
    from safetensors.torch import load_file, save_file

    folder = damaged("llama-tied", shards="1GB")
    tensors = load_file(folder / "model.safetensors")
    ids = torch.arange(9)[None]
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        tied = model(ids).logits
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors", {"format": "pt"}
    )
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        assert torch.equal(model(ids).logits, tied)
        assert model.plan.always_nbytes < model.plan.checkpoint_nbytes  # loaded once
    save_file(
        tensors | {"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}, folder / "model.safetensors", {"format": "pt"}
    )
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        assert torch.allclose(model(ids).logits, 2 * tied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_demo_model(dtype):
    folder = demo_path()
    expected = reference(folder, dtype)
    plan_ = plan("demo", device="cpu", dtype=dtype)
    for keep, memory in budgets(plan_).items():
        with LayeredModel.from_pretrained("demo", device="cpu", dtype=dtype, memory=memory) as model:
            inputs = model.tokenizer("The capital of France is", return_tensors="pt")
            with torch.no_grad():
                assert torch.equal(model(**inputs).logits, expected(**inputs).logits), keep
            options = {"max_new_tokens": 4, "do_sample": False}
            assert torch.equal(model.generate(**inputs, **options), expected.generate(**inputs, **options)), keep
