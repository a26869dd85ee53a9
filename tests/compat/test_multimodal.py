"""The text part of a multimodal checkpoint gives what the whole gives for text; what has no such part is refused by name."""

import json

import pytest
import torch
import transformers
from tiny_any import make_any

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import versions
from airllm_nb.compat.multimodal import TEXT_PARTS
from airllm_nb.errors import CheckpointError, UnsupportedError

IDS = torch.randint(3, 150, (2, 11), generator=torch.Generator().manual_seed(0))
newest = pytest.mark.skipif(
    transformers.__version__ != versions.TESTED[-1], reason="tiny configs are made for the newest version"
)


@newest
@pytest.mark.parametrize("kind", sorted(TEXT_PARTS))
def test_the_text_part_gives_what_the_whole_gives(kind, tmp_path):
    make_any(tmp_path, kind)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(input_ids=IDS).logits
    for memory in ("auto", plan(tmp_path, device="cpu", dtype="float32").least):
        with LayeredModel.from_pretrained(tmp_path, device="cpu", dtype="float32", memory=memory) as model:
            assert type(model.config) is type(whole.config.text_config)
            assert torch.equal(model(IDS).logits, expected)
            assert not any("vision" in name or "audio" in name for name, _ in model.named_parameters())


@newest
@pytest.mark.parametrize("kind", ["aya_vision", "kimi_k25", "paligemma", "qwen2_vl"])
def test_others_are_refused_by_name(kind, tmp_path):
    make_any(tmp_path, kind)
    with pytest.raises(UnsupportedError, match=f"'{kind}' is a multimodal model"):
        LayeredModel.from_pretrained(tmp_path, device="cpu", dtype="float32")


def test_a_surplus_layer_of_the_text_part_is_found(tmp_path):
    if versions.installed() < (4, 51, 3):
        pytest.skip("Gemma 3 came with 4.50 and is exact from 4.51.3 on")
    make_any(tmp_path, "gemma3")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["text_config"]["num_hidden_layers"] -= 1
    raw["text_config"].pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="no place for"):
        LayeredModel.from_pretrained(tmp_path, device="cpu", dtype="float32")
