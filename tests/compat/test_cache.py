"""An aborted pass never happened: the KV cache is what it was before, and the retry gives the exact logits."""

import pytest
import torch
import transformers
from tiny import budgets

from airllm_nb import LayeredModel, plan
from airllm_nb.events import ComputeBegin

IDS = torch.arange(1, 12)[None]
NEXT = torch.tensor([[40, 41]])


def caches(config):
    """The kinds of cache that a caller may pass, as far as this transformers has them."""
    yield "default", None
    if config.model_type == "gpt2" and transformers.__version__ < "4.52":
        return  # GPT-2 took only tuples then
    yield "dynamic", transformers.DynamicCache()
    try:
        yield "static", transformers.StaticCache(config=config, max_cache_len=32)
    except TypeError:  # older ones want the batch and the device as well
        yield "static", transformers.StaticCache(config, 1, 32, "cpu", torch.float32)


def forward(model, ids, cache, past=0):
    positions = torch.arange(past, past + ids.shape[1])
    extra = {"cache_position": positions} if "Static" in type(cache).__name__ else {}
    return model(ids, past_key_values=cache, use_cache=True, **extra)


@pytest.mark.parametrize("keep", ["all", "none"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_the_retry_after_an_abort_is_exact(checkpoint, kind, keep):
    folder = checkpoint(kind)
    memory = budgets(plan(folder, device="cpu", dtype="float32"))[keep]
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory=memory) as model:
        for name, empty in caches(model.config):
            cache = forward(model, IDS, empty).past_key_values
            for layer in (0, 2, 3):

                def abort(event, layer=layer):
                    if isinstance(event, ComputeBegin) and event.index == layer:
                        raise KeyboardInterrupt

                model.progress = abort
                with pytest.raises(KeyboardInterrupt):
                    forward(model, NEXT, cache, 11)
                model.progress = None
            again = forward(model, NEXT, cache, 11).logits
            fresh = next(fresh for other, fresh in caches(model.config) if other == name)
            fresh = forward(model, IDS, fresh).past_key_values
            assert torch.equal(again, forward(model, NEXT, fresh, 11).logits), name
