"""Kernels for one row: none of them touched in exact mode; measured, their errors are no larger than those of transformers."""

import pytest
import torch
import transformers
from tiny import CONFIGS, budgets
from torch import nn
from torch.nn.functional import linear

from airllm_nb import LayeredModel, plan
from airllm_nb.engine import kernels
from airllm_nb.errors import AirLLMError, DeviceError

DTYPE = "dtype" if transformers.__version__ >= "5" else "torch_dtype"
IDS = torch.arange(9)[None]
OPTIONS = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 257}
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
NAMES = [name for name in kernels.kernels() if name != "linear"]


@pytest.fixture
def always(monkeypatch):
    """Return a function that lets one kernel be the fastest, so that it is used whatever this machine would choose."""

    def prefer(name):
        def measured(shape, pool):
            found = measure(shape, pool)
            return {other: value._replace(ratio=0.5 if other == name else 1.0) for other, value in found.items()}

        measure = kernels.measure
        monkeypatch.setattr(kernels, "measure", measured)
        monkeypatch.setattr(kernels, "_known", {})

    return prefer


def replaced(model):
    return [module for module in model.modules() if isinstance(module, kernels.MeasuredLinear)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_exact_replaces_nothing(checkpoint, kind):
    with LayeredModel.from_pretrained(checkpoint(kind), device="cpu", dtype="bfloat16") as model:
        assert not replaced(model)
        assert not any("forward" in vars(module) for module in model.modules())
        assert model.plan.kernels == ""
        assert "kernels" not in str(model.plan)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("outputs", [1, 7, 64, 1000])
def test_what_may_be_chosen_is_as_good_as_linear(outputs, dtype, bias):
    shape = kernels.Shape(outputs, 48, dtype, bias)
    measured = kernels.measure(shape, torch.empty(1 << 20, dtype=torch.uint8))
    assert {"linear", "mv", "bmm", "mm"} <= set(measured)
    assert measured["linear"].error < {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert measured["linear"].ratio == 1
    torch.manual_seed(0)
    weight, row = torch.randn(outputs, 48).to(dtype), torch.randn(1, 1, 48).to(dtype)
    offset = torch.randn(outputs).to(dtype) if bias else None
    expected = linear(row.double(), weight.double(), None if offset is None else offset.double())
    for name in measured:
        output = kernels.kernels()[name](row, weight, offset)
        assert (output.shape, output.dtype) == (expected.shape, dtype)
        assert (output.double() - expected).norm() <= torch.finfo(dtype).eps * weight.norm() * row.norm(), name


def test_best():
    linear_ = kernels.Measured(1.0, 1e-3)
    assert kernels.best({"linear": linear_}) == ("linear", 1.0)
    assert kernels.best({"linear": linear_, "a": kernels.Measured(0.7, 1e-3), "b": kernels.Measured(0.8, 1e-4)}) == ("a", 0.7)
    assert kernels.best({"linear": linear_, "a": kernels.Measured(0.5, 2e-3), "b": kernels.Measured(0.8, 1e-4)}) == ("b", 0.8)
    assert kernels.best({"linear": linear_, "a": kernels.Measured(0.99, 1e-3)}) == ("linear", 1.0)  # not worth other bits
    assert kernels.best({"linear": linear_, "a": kernels.Measured(0.5, float("nan"))}) == ("linear", 1.0)


@pytest.mark.parametrize("keep", ["all", "half", "none"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["llama-tied", "qwen2"])
def test_logits_are_within_the_error_of_transformers(checkpoint, always, kind, dtype, name, keep):
    """Against float64, one row after a prompt: another order of adding up must not show beside the dtype's own error."""
    always(name)
    folder = checkpoint(kind)
    memory = budgets(plan(folder, device="cpu", dtype=dtype))[keep]
    exact = decode(reference(folder, torch.float64))
    usual = decode(reference(folder, dtype))
    with LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory=memory, kernels="measured") as model:
        if not replaced(model):  # this CPU does not have it for this dtype, or not as exact
            assert name == "onednn" or dtype == torch.float16
            pytest.skip(f"{name} computes no {dtype} here")
        assert f"by {name} in 0.50 of linear's time" in model.plan.kernels
        prompt, row = decode(model)
        assert torch.equal(prompt, usual[0])  # many rows are computed as ever
        assert (row - exact[1]).norm() <= 1.5 * (usual[1] - exact[1]).norm()
        tokens = model.generate(IDS, **OPTIONS)
        assert tokens.shape == (1, IDS.shape[1] + 8)
        if dtype == torch.float32:
            assert torch.equal(tokens, reference(folder, dtype).generate(IDS, **OPTIONS))
        assert torch.equal(model.generate(IDS, **OPTIONS), tokens)


def reference(folder, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{DTYPE: dtype}).eval()


def decode(model):
    """Logits of a prompt, and of a token after it, as float64."""
    with torch.no_grad():
        prompt = model(IDS, use_cache=True)
        row = model(torch.tensor([[65]]), past_key_values=prompt.past_key_values, use_cache=True)
    return prompt.logits.double(), row.logits.double()


def test_only_plain_linear_layers(always):
    always("mv")

    class Scaled(nn.Linear):
        def forward(self, row):
            return 2 * super().forward(row)

    patched = nn.Linear(8, 8)
    patched.forward = lambda row: row
    model = nn.ModuleList([nn.Linear(8, 8), Scaled(8, 8), patched])
    assert kernels.shapes(model) == {kernels.Shape(8, 8, torch.float32, bias=True): 1}
    assert "by mv" in kernels.use(model, "measured", 10**6)
    assert [type(module) for module in model] == [kernels.MeasuredLinear, Scaled, nn.Linear]


def test_gradients_and_other_dtypes_go_the_usual_way(always):
    always("mv")
    model = nn.ModuleList([nn.Linear(8, 8)])
    kernels.use(model, "measured", 10**6)
    (layer,), calls = model, []
    vars(layer)["kernel"] = lambda row, weight, bias: calls.append(row.shape) or linear(row, weight, bias)
    layer(torch.ones(1, 1, 8)).sum().backward()
    assert not calls
    with torch.no_grad():
        layer(torch.ones(2, 8))
        assert not calls
        layer(torch.ones(8))
    assert calls == [(8,)]


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_away_refuses(checkpoint, always, name):
    always(name)
    folder = checkpoint()
    least = plan(folder, device="cpu", dtype="float32").least
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory=least, kernels="measured") as model:
        layer = model.model.layers[1].mlp.down_proj
        with torch.no_grad(), pytest.raises(AirLLMError, match=r"model.layers.1.mlp.down_proj.weight outside"):
            layer(torch.ones(1, 1, layer.in_features))


def test_an_interrupt_leaves_nothing(checkpoint, monkeypatch):
    monkeypatch.setattr(kernels, "_known", {})
    measure, count = kernels.measure, [0]

    def interrupted(shape, pool):
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return measure(shape, pool)

    monkeypatch.setattr(kernels, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LayeredModel.from_pretrained(checkpoint(), device="cpu", dtype="float32", kernels="measured")
    assert torch.is_grad_enabled()
    assert len(kernels._known) == 1  # and it is not measured again
    LayeredModel.from_pretrained(checkpoint(), device="cpu", dtype="float32", kernels="measured").close()
    again = count[0]
    LayeredModel.from_pretrained(checkpoint(), device="cpu", dtype="float32", kernels="measured").close()
    assert count[0] == again


def test_what_cannot_be_is_refused(checkpoint):
    with pytest.raises(AirLLMError, match="no 'fast' kernels"):
        plan(checkpoint(), device="cpu", kernels="fast")
    with pytest.raises(DeviceError, match="on the CPU only"):
        kernels.require_mode("measured", torch.device("cuda", 0))
    kernels.require_mode("exact", torch.device("cuda", 0))


def test_plan_tells_what_loading_would_choose(checkpoint, always):
    always("bmm")
    told = plan(checkpoint(), device="cpu", dtype="float32", kernels="measured")
    assert "measured: one row in 0.50 of linear's time: 64x96 by bmm" in told.kernels or "96x64 by bmm" in told.kernels
    assert f"kernels   {told.kernels}" in str(told)
    with LayeredModel.from_pretrained(checkpoint(), device="cpu", dtype="float32", kernels="measured") as model:
        assert model.plan.kernels == told.kernels


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_row_is_refused_as_by_linear(name):
    layer = nn.Linear(64, 8)
    kernels.attach(layer, (kernels.Choice(kernels._shape(layer), 1, name, 0.5),))
    assert isinstance(layer, kernels.MeasuredLinear)
    narrow = nn.Linear(1, 8)
    kernels.attach(narrow, (kernels.Choice(kernels._shape(narrow), 1, name, 0.5),))
    with torch.no_grad():
        assert layer(torch.ones(64)).shape == (8,)
        for module, shape in [(layer, (2, 32)), (layer, (4, 16)), (layer, (64, 1)), (narrow, ())]:
            with pytest.raises(RuntimeError):
                module(torch.ones(shape))
