"""The CUDA path: pinned staging, a copy stream, events. Needs a GPU."""

import pytest
import torch
from tiny import CONFIGS, budgets

from airllm_nb import LayeredModel, plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("keep", ["all", "half", "none"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_the_resident_model(checkpoint, kind, keep):
    folder = checkpoint(kind)
    ids = torch.arange(11)[None]
    memory = budgets(plan(folder, device="cuda", dtype="float32"))
    with LayeredModel.from_pretrained(folder, device="cuda", dtype="float32", memory=memory["all"]) as model:
        expected = model(ids).logits.cpu()
    with LayeredModel.from_pretrained(folder, device="cuda", dtype="float32", memory=memory[keep]) as model:
        for _ in range(20):  # a buffer that is reused before its consumer is done would show
            assert torch.equal(model(ids).logits.cpu(), expected)
