"""A padded batch beyond the original context of Phi-3's longrope is refused before 5.20, and only that."""

import families
import pytest
import torch
from tiny import make_checkpoint

from airllm_nb import LayeredModel
from airllm_nb.compat import longrope, versions
from airllm_nb.errors import UnsupportedError

IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(3))
PADDED = torch.ones_like(IDS)
PADDED[0, :5] = 0


def load(tmp_path):
    folder = make_checkpoint(tmp_path, raw=families.FAMILIES["phi3-longrope"], dtype=torch.float32)
    return LayeredModel.from_pretrained(folder, device="cpu", dtype="float32")


def generate(model, mask, tokens):
    return model.generate(
        IDS, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=257
    )


def test_a_padded_batch_beyond_the_original_context(tmp_path):
    with load(tmp_path) as model:
        assert generate(model, PADDED, 4).shape == (2, 16)  # within it
        assert generate(model, torch.ones_like(IDS), 10).shape == (2, 22)  # not padded
        if versions.installed() >= longrope.EXACT:
            assert generate(model, PADDED, 10).shape == (2, 22)
            return
        with pytest.raises(
            UnsupportedError, match=r'padded batch grows beyond 16 tokens.*one prompt at a time.*"transformers>=5.20"'
        ):
            generate(model, PADDED, 10)
