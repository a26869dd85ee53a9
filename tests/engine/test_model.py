"""What from_pretrained does beside weights, and what is left in memory."""

import gc
import json
import threading
import weakref

import pytest
import torch
import transformers
from tiny import CONFIGS, budgets, make_checkpoint
from waiting import wait_for

from airllm_nb import LayeredModel, plan

DTYPE = "dtype" if transformers.__version__ >= "5" else "torch_dtype"
IDS = torch.arange(1, 8)[None]


def load(folder, **options):
    return LayeredModel.from_pretrained(folder, **({"device": "cpu", "dtype": "float32"} | options))


def weight_bytes(model):
    """Bytes of memory that parameters and slots hold, each once."""
    tensors = [*model._hf.parameters(), *(slot.buffer for stream in model._streams for slot in stream._slots)]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors if not tensor.is_meta
    }
    return sum(storages.values())


@pytest.mark.parametrize("keep", ["all", "half", "none"])
def test_the_budget_is_kept_and_closing_frees_everything(checkpoint, keep):
    decided = plan(checkpoint(), device="cpu", dtype="float32")
    assert repr(decided).startswith(f"Plan({decided.name}: 4 of 4 layers stay, ")
    budget = budgets(decided)[keep]
    model = load(checkpoint(), memory=budget)
    for _ in range(2):
        model(IDS)
        assert model.plan.always_nbytes < weight_bytes(model) <= budget
        streamed = [index for index, layer in enumerate(model.layers) if not layer.resident]
        assert all(parameter.is_meta for index in streamed for parameter in model.model.layers[index].parameters())
    model.close()
    assert weight_bytes(model) == 0
    assert repr(model) == f"LayeredModel({model.name}: closed)"


def test_the_least_budget_is_head_and_norm_and_two_layers(checkpoint):
    """To the byte, but for the gaps between weights; the embedding is read by rows."""
    with load(checkpoint(), memory=plan(checkpoint(), device="cpu", dtype="float32").least) as model:
        tensors = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(), **{DTYPE: torch.float32})
        layer = sum(parameter.nbytes for parameter in tensors.model.layers[0].parameters())
        always = tensors.lm_head.weight.nbytes + tensors.model.norm.weight.nbytes
        model(IDS)
        assert 0 <= weight_bytes(model) - (always + 2 * layer) < 64 * 40


@pytest.mark.parametrize("keep", ["all", "none"])
def test_a_forgotten_model_goes_even_if_its_listener_knows_it(checkpoint, keep):
    budget = budgets(plan(checkpoint(), device="cpu", dtype="float32"))[keep]
    threads = threading.active_count()
    model = load(checkpoint(), memory=budget)
    model.progress = lambda event, model=model: model.layers[0] and event
    model(IDS)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    wait_for(lambda: threading.active_count() == threads)


def test_whoever_holds_only_the_inner_model_keeps_its_weights(checkpoint):
    inner = load(checkpoint(), memory=plan(checkpoint(), device="cpu", dtype="float32").least)._hf
    gc.collect()
    assert torch.isfinite(inner(IDS).logits).all()


def test_generation_config_and_name_are_those_of_the_checkpoint(damaged):
    folder = damaged()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "max_new_tokens": 3, "pad_token_id": 7}))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, **{DTYPE: torch.float32})
    with load(folder) as model:
        assert model.generation_config.eos_token_id == 7
        assert model.generate(IDS, attention_mask=torch.ones_like(IDS)).shape == (1, 10)
        assert model.config._name_or_path == reference.config._name_or_path
        assert model.name_or_path == reference.name_or_path


def test_loading_and_computing_leave_no_trace_in_the_session(checkpoint):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with load(checkpoint(), memory=plan(checkpoint(), device="cpu", dtype="float32").least) as model:
        assert not model(IDS).logits.requires_grad
        assert not model(inputs_embeds=torch.rand(1, 3, 64, requires_grad=True, generator=torch.Generator())).logits.requires_grad
    assert torch.equal(torch.rand(3), expected)
    assert torch.is_grad_enabled()


def test_where_and_what_it_is_may_be_said_in_any_way(checkpoint):
    with load(checkpoint()) as model:
        assert model.to("cpu", torch.float32) is model
        assert model.float() is not None
        assert model.cpu() is not None
        with pytest.raises(AttributeError):
            model.name = "other"


def test_weights_that_the_model_declares_unneeded_are_left(tmp_path):
    """DeepSeek-V3's file carries a layer for speculation that transformers does not build."""
    from safetensors.torch import load_file, save_file

    declared = getattr(transformers, "DeepseekV3ForCausalLM", None)
    if not getattr(declared, "_keys_to_ignore_on_load_unexpected", None):
        pytest.skip("this transformers has no model that declares any")
    small = CONFIGS["llama"] | {
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": 4, "q_lora_rank": 24,
        "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4,
        "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "num_hidden_layers": 2,
    }  # fmt: skip
    folder = make_checkpoint(tmp_path / "mtp", "llama", shards="1GB", **small)
    with load(folder) as model:
        expected = model(IDS).logits
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.61.eh_proj.weight": torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    with load(folder) as model:
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_temporary_buffers_are_computed_in_their_own_dtype(tmp_path, dtype):
    raw = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64, "num_hidden_layers": 2}
    folder = make_checkpoint(tmp_path, "gpt2", model_type="gptj", architectures=["GPTJForCausalLM"], **raw)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, **{DTYPE: dtype}).eval()
    with load(folder, dtype=dtype) as model:
        assert torch.equal(model(IDS).logits, reference(IDS).logits)


def test_more_than_ten_experts_are_in_order(tmp_path):
    folder = make_checkpoint(tmp_path, "mixtral", num_local_experts=12, num_hidden_layers=2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, **{DTYPE: torch.float32}).eval()
    with load(folder) as model:
        assert torch.equal(model(IDS).logits, reference(IDS).logits)


def test_a_context_that_scaling_stretches():
    from types import SimpleNamespace

    from airllm_nb.engine import context

    for scaling, expected in (
        (None, 128),
        ({"type": "linear", "factor": 2.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, 128),
    ):
        assert context.length(SimpleNamespace(max_position_embeddings=128, rope_scaling=scaling)) == expected
