"""KV caches: an aborted pass never happened, one that is rolled back is as if it had never been longer."""

import pytest
import torch
import transformers
from tiny import budgets

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import cache as caches_of
from airllm_nb.compat import versions
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


def kinds(cache):
    """Return what a cache is made of, of any version."""
    return [type(part).__name__ for part in caches_of._parts(cache)]


def loaded(folder):
    return LayeredModel.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "mixtral"])
def test_a_new_cache_is_the_one_that_generate_makes(checkpoint, kind):
    with loaded(checkpoint(kind)) as model:
        cache = caches_of.new(model)
        options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 257}
        expected = model.generate(IDS, return_dict_in_generate=True, **options)
        if cache is None:
            assert (kind, isinstance(expected.past_key_values, tuple)) == ("gpt2", True)
            return
        assert caches_of.length(cache) == 0
        found = model.generate(IDS, past_key_values=cache, return_dict_in_generate=True, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert found.past_key_values is cache
        assert caches_of.length(cache) == found.sequences.shape[1] - 1
        if not isinstance(expected.past_key_values, tuple):  # version 4.43 hands it out in its old form
            assert kinds(cache) == kinds(expected.past_key_values)


def test_where_a_cache_cannot_be_kept(checkpoint):
    with loaded(checkpoint("llama")) as model:
        model.generation_config.use_cache = False
        assert caches_of.new(model) is None
        model.generation_config.use_cache = True
        model.generation_config.cache_implementation = "hybrid"
        assert (caches_of.new(model) is None) == (versions.installed() < (4, 56))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("length", [1, 4, 10, 11])
@pytest.mark.parametrize("total", [5, 11])
def test_rolled_back(checkpoint, kind, length, total):
    """Logits are those of a cache that has never been longer, unless a window of 6 has passed: then nothing changes."""
    length = min(length, total)
    with loaded(checkpoint(kind)) as model:
        if (cache := caches_of.new(model)) is None:
            pytest.skip("no cache that could be rolled back")
        passed = total >= 6 and "DynamicSlidingWindowLayer" in kinds(cache)
        fresh = caches_of.new(model)
        forward(model, IDS[:, :length], cache)
        forward(model, IDS[:, :length], fresh)
        if length < total:
            forward(model, IDS[:, length:total], cache, length)
        assert caches_of.roll_back(cache, length) == (length == total or not passed)
        held = caches_of.length(cache)
        assert held == (total if passed else length)
        if passed and length < total:
            forward(model, IDS[:, length:total], fresh, length)
        for ids in (NEXT, NEXT[:, :1], NEXT):
            assert torch.equal(forward(model, ids, cache, held).logits, forward(model, ids, fresh, held).logits)
            held += ids.shape[1]
        assert not caches_of.roll_back(cache, held + 1)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_rolled_back_to_nothing(checkpoint, kind):
    with loaded(checkpoint(kind)) as model:
        cache = caches_of.new(model)
        forward(model, IDS[:, :5], cache)
        assert caches_of.roll_back(cache, 0)
        assert caches_of.length(cache) == 0
        assert torch.equal(forward(model, IDS, cache).logits, forward(model, IDS, caches_of.new(model)).logits)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_it_can_be_put_back_again_and_again(checkpoint, kind):
    """Also an empty one whose list of layers grows."""
    with loaded(checkpoint(kind)) as model:
        cache = transformers.DynamicCache()
        restore = caches_of.snapshot(cache)
        for _ in range(2):
            forward(model, IDS[:, :3], cache)
            assert caches_of.length(cache) == 3
            restore()
            assert caches_of.length(cache) == 0


def test_a_recurrent_state_is_not_rolled_back():
    class State(transformers.DynamicCache):
        pass

    cache = State()
    assert not caches_of.roll_back(cache, 0)
    assert not caches_of.roll_back(None, 0)
    assert not caches_of.roll_back((), 0)
