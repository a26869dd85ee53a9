"""A router's negative bias: other experts were chosen before 5.6, so that those versions refuse the checkpoint."""

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint

from airllm_nb import LayeredModel
from airllm_nb.compat import routing, versions
from airllm_nb.errors import UnsupportedError

pytestmark = pytest.mark.skipif(versions.installed() < (4, 51), reason="DeepSeek-V3 came with 4.51")
IDS = families.prompt("long")


@pytest.fixture
def folder(tmp_path):
    return make_checkpoint(tmp_path / "deepseek", raw=families.FAMILIES["deepseek-v3"], dtype=torch.float32, shards="1GB")


def shift_bias(folder, by):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] += by
    save_file(tensors, file, {"format": "pt"})


def load(folder):
    return LayeredModel.from_pretrained(folder, device="cpu", dtype="float32")


def test_exact_or_refused(folder):
    with load(folder) as model:
        positive = model(IDS).logits
    shift_bias(folder, 5.0)  # the order of the experts is the same
    with load(folder) as model:
        assert torch.allclose(model(IDS).logits, positive, atol=1e-4)
    shift_bias(folder, -10.0)  # again the same, if experts of other groups count minus infinity, and not 0
    if versions.installed() < routing.EXACT:
        with pytest.raises(UnsupportedError, match=r'negative in part.*%pip install -U "transformers>=5.6"'):
            load(folder)
        return
    with load(folder) as model:
        negative = model(IDS).logits
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(negative, theirs(IDS).logits)
    assert torch.allclose(negative, positive, atol=1e-4)
