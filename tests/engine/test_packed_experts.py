"""Stacks of experts in few bits: the logits of transformers with the weights that are meant, read whole or when they are hit."""

import copy

import pytest
import torch
from tiny import SHAPE, budgets, make_checkpoint
from transformers import AutoModelForCausalLM

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import versions
from airllm_nb.engine.experts import ExpertStore
from airllm_nb.engine.packed_stack import PackedStack
from airllm_nb.engine.packed_weight import PackedWeight
from airllm_nb.engine.quantize import packing_of
from airllm_nb.engine.rounding import nearest

pytestmark = pytest.mark.skipif(versions.installed() < (5,), reason="transformers 4 has a module for each expert")

EXPERTS = 8
WIDE = SHAPE | {"max_position_embeddings": 512, "intermediate_size": 128}
KINDS = {
    "mixtral": WIDE | {"model_type": "mixtral", "num_local_experts": EXPERTS},
    "all hit": WIDE | {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": EXPERTS},
    "qwen3_moe": WIDE | {
        "model_type": "qwen3_moe", "head_dim": 32, "norm_topk_prob": True, "num_experts": EXPERTS, "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
    },
}  # fmt: skip
ONE = torch.tensor([[42]])
FEW = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(1))
MANY = torch.randint(0, 256, (4, 500), generator=torch.Generator().manual_seed(2))
NAMES = ["int8", "int4", "int4-32"]


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("AIRLLM_NB_HOME", str(folder))
        yield folder / "quantized"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = make_checkpoint(tmp_path_factory.mktemp(kind), raw=KINDS[kind])
        return made[kind]

    return get


def load(folder, name="int4", keep="all", dtype="float32"):
    memory = budgets(plan(folder, device="cpu", dtype=dtype, quantize=name))[keep]
    return LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, quantize=name, memory=memory)


def meant(folder, name):
    """Return transformers' own model with the weights that the packed ones mean, stacks of experts among them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    packing, stacks = packing_of(name), 0
    for layer in model.base_model.layers:
        for path, weight in layer.named_parameters():
            matrices = weight.data.view(-1, *weight.shape[-2:]) if weight.dim() > 1 else []
            if ".gate." in path or any(packing.refusal(tuple(matrix.shape)) for matrix in matrices):
                continue
            stacks += weight.dim() > 2
            for matrix in matrices:
                matrix.copy_(packing.dense(nearest(matrix, packing), tuple(matrix.shape), torch.float32))
    assert stacks == 2 * len(model.base_model.layers)
    return model


@pytest.mark.parametrize("keep", ["all", "half", "none"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_weights_that_are_meant(mixture, monkeypatch, kind, name, keep):
    """Without the kernels, for they compute in bfloat16: another rounding can choose another expert."""
    monkeypatch.setattr(type(packing_of(name)), "most_rows", 0)
    compare(mixture(kind), name, keep, lambda found, expected: torch.allclose(found, expected, atol=1e-5, rtol=0))


@pytest.mark.parametrize("keep", ["all", "half", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_come_near_them(mixture, name, keep):
    """Where all experts compute, so that none is chosen."""
    compare(mixture("all hit"), name, keep, lambda found, expected: (found - expected).norm() < 0.04 * expected.norm())


def compare(folder, name, keep, near):
    expected = meant(folder, name)
    with torch.no_grad(), load(folder, name, keep) as model:
        assert (model.plan.experts is None) == (keep == "all")
        for implementation in (None, "eager", "batched_mm"):
            if implementation is not None:
                expected.set_experts_implementation(implementation)
                model.set_experts_implementation(implementation)
            for ids in (ONE, FEW, FEW):
                assert near(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("keep", ["all", "none"])
def test_so_many_rows_do_not_take_the_kernels(mixture, keep):
    folder = mixture("mixtral")
    expected = meant(folder, "int8")
    with torch.no_grad(), load(folder, "int8", keep) as model:
        assert torch.allclose(model(MANY).logits, expected(MANY).logits, atol=1e-5, rtol=0)


def test_experts_are_smaller_in_memory_and_on_disk(mixture, home):
    folder = mixture("mixtral")
    whole, small = (plan(folder, device="cpu", dtype="bfloat16", quantize=name) for name in (None, "int4"))
    assert sum(layer.nbytes for layer in small.layers) < 0.31 * sum(layer.nbytes for layer in whole.layers)
    assert f"{len(small.layers)} stay as they are, 0% of the layers' bytes" in small.quantized  # routers
    each = 4 + 2 * EXPERTS
    assert f"int4-64: {each * len(small.layers)} matrices of the layers, 4.50 bits a weight" in small.quantized
    with load(folder, "int4", "none", "bfloat16") as model:
        assert model.plan.experts.total_nbytes < 0.3 * 2 * sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    files = list(home.glob("*-int4-64-*/layer-*.safetensors"))
    assert len(files) >= len(small.layers)


def test_only_what_is_hit_is_read(mixture):
    folder = mixture("qwen3_moe")
    with torch.no_grad(), load(folder, "int4", "none", "bfloat16") as model:
        store = next(stream for stream in model._streams if isinstance(stream, ExpertStore))
        assert all(stack.meant for stack in store.stacks)
        model(ONE)
        assert store.hits + store.misses == 2 * 3 * len(model.layers)


def test_a_stack_shows_its_matrices(mixture):
    """What a model's own code may ask of it."""
    with torch.no_grad(), load(mixture("mixtral")) as model:
        stack = next(weight for name, weight in model.named_parameters() if ".experts." in name)
        assert isinstance(stack, PackedStack)
        whole = stack + 0
        assert whole.shape == stack.shape
        assert isinstance(stack[3], PackedWeight)
        rows = torch.randn(200, stack.shape[2])
        assert torch.equal(torch.nn.functional.linear(rows, stack[3]), torch.nn.functional.linear(rows, whole[3]))
        assert torch.equal(stack[torch.tensor([5, 0, 5])], whole[[5, 0, 5]])
        assert torch.equal(stack[1:3], whole[1:3])
        assert torch.equal(stack.transpose(1, 2) + 0, whole.transpose(1, 2))
        assert torch.equal(stack.transpose(1, 2)[2], whole[2].T)
        assert stack.transpose(1, 2).shape == whole.transpose(1, 2).shape
        mask = [False, True] * 4
        assert torch.equal(stack[mask], whole[mask])  # and not the experts 0 and 1, again and again
        assert torch.equal(copy.deepcopy(stack)[-1] + 0, whole[-1])
        with pytest.raises(IndexError, match="has 8 experts, and expert 8 was asked for"):
            stack[8]


@pytest.mark.parametrize("kind", ["gpt_oss"])
def test_matrices_that_lie_turned_round_are_left_as_they_are(tmp_path, kind):
    raw = WIDE | {"model_type": kind, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    folder = make_checkpoint(tmp_path, raw=raw)
    assert "its experts' matrices lie turned round" in plan(folder, device="cpu", quantize="int8").quantized
    with torch.no_grad(), load(folder, "int8") as model:
        assert model(ONE).logits.isfinite().all()
