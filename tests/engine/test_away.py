"""A weight that is not in memory answers questions, and never takes part in a computation."""

import pytest
import torch
from tiny import budgets
from torch.nn import functional

from airllm_nb import LayeredModel, plan
from airllm_nb.engine.away import away
from airllm_nb.errors import UnsupportedError

CHANGES = []
WEIGHT = away("layers.0.weight", (4, 4), torch.float32, torch.device("cpu"), CHANGES)


def test_questions():
    assert WEIGHT.is_meta
    assert WEIGHT.device == torch.device("cpu")
    assert (WEIGHT.shape, WEIGHT.dtype, WEIGHT.numel(), WEIGHT.size(0)) == ((4, 4), torch.float32, 16, 4)
    assert hash(WEIGHT) == id(WEIGHT)
    assert isinstance(WEIGHT, torch.nn.Parameter)
    assert "4, 4" in repr(WEIGHT)


def test_changes_are_noted():
    CHANGES.clear()
    assert WEIGHT.div_(2) is WEIGHT
    WEIGHT.clamp_(min=-1)
    changed = torch.tensor([4.0, -4.0])
    for function, args, kwargs in CHANGES:
        function(changed, *args, **kwargs)
    assert changed.tolist() == [2, -1]


@pytest.mark.parametrize(
    "use",
    [
        lambda: functional.linear(torch.ones(4), WEIGHT),
        lambda: torch.ones(4, 4) @ WEIGHT,
        lambda: functional.linear(torch.ones(4), weight=WEIGHT),
        lambda: torch.ones(4, 4).add_(WEIGHT),
        lambda: functional.embedding(torch.arange(3), WEIGHT),
        lambda: WEIGHT.copy_(torch.ones(4, 4)),
        lambda: WEIGHT.T,
        lambda: WEIGHT.data,
        lambda: WEIGHT[0],
        lambda: torch.cat([torch.ones(4, 4), WEIGHT]),
        lambda: WEIGHT.split(2),
        lambda: WEIGHT.to(WEIGHT.device),
    ],
)
def test_computations_are_refused(use):
    with pytest.raises(UnsupportedError, match="outside of the layer"):
        use()


@pytest.mark.parametrize("keep", ["all", "none"])
def test_layer_that_is_not_called_as_a_module(checkpoint, keep):
    """PyTorch alone would compute with memory that nobody has written to."""
    folder = checkpoint("llama")
    memory = budgets(plan(folder, device="cpu", dtype="float32"))[keep]
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory=memory) as model:
        expected = model(torch.arange(5)[None]).logits
        for layer in model.model.layers:
            layer.__class__ = type("Bypassed", (type(layer),), {"__call__": lambda self, *a, **k: self.forward(*a, **k)})
        if keep == "all":
            assert torch.equal(model(torch.arange(5)[None]).logits, expected)
        else:
            with pytest.raises(UnsupportedError, match="memory="):
                model(torch.arange(5)[None])
