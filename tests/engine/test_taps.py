"""`model.on_layer`: hidden states read and replaced between layers, on every version, and nothing left behind."""

import dataclasses
import gc
import weakref

import pytest
import torch
import transformers
from tiny import CONFIGS, LAYERS, budgets

from airllm_nb import LayeredModel, plan
from airllm_nb.engine import taps
from airllm_nb.errors import AirLLMError
from airllm_nb.events import ComputeBegin, LayerInfo, PassEnd

IDS = torch.tensor([[10, 20, 30, 40, 50]])
OPTIONS = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 257}


def load(folder, keep="all", dtype="float32"):
    memory = budgets(plan(folder, device="cpu", dtype=dtype))[keep]
    return LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory=memory)


@pytest.fixture(params=["all", "none"])
def model(checkpoint, request):
    with load(checkpoint(), request.param) as model:
        yield model


def hidden_states(model):
    """What transformers itself gives: the first enters the first layer, the last is normed."""
    return model(IDS, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("keep", ["all", "none"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_it_sees_what_passes_between_layers(checkpoint, kind, keep):
    seen = []
    with load(checkpoint(kind), keep) as model:
        expected = hidden_states(model)
        logits = model(IDS).logits
        with model.on_layer(lambda layer, hidden: seen.append((layer, layer.before, hidden))):
            assert torch.equal(model(IDS).logits, logits)
        assert [layer.index for layer, *_ in seen] == list(range(LAYERS))
        for index, (layer, before, hidden) in enumerate(seen):
            assert isinstance(layer, LayerInfo)
            assert (layer.name, layer.nbytes, layer.resident) == dataclasses.astuple(model.layers[index])[1:]
            assert torch.equal(before, expected[index])
            assert index == LAYERS - 1 or torch.equal(hidden, expected[index + 1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_layer_that_is_skipped_might_as_well_not_be_there(checkpoint, kind):
    with load(checkpoint(kind)) as model:
        with model.on_layer(lambda layer, _: layer.before if layer.index == 2 else None):
            skipped = model(IDS).logits
        layers = next(part for part in (getattr(model.base_model, name, None) for name in ("layers", "h")) if part is not None)
        del layers[2]
        model.config.num_hidden_layers = LAYERS - 1
        assert torch.equal(model(IDS, use_cache=False).logits, skipped)


@pytest.mark.parametrize("keep", ["all", "none"])
def test_a_layer_that_is_repeated_is_there_twice(checkpoint, keep):
    with load(checkpoint()) as model:
        layers = model.base_model.layers
        layers.insert(2, layers[1])
        model.config.num_hidden_layers = LAYERS + 1
        expected = model(IDS, use_cache=False).logits
    with (
        load(checkpoint(), keep) as model,
        model.on_layer(lambda layer, hidden: layer.again(hidden) if layer.index == 1 else None),
    ):
        assert torch.equal(model(IDS, use_cache=False).logits, expected)


def test_repeating_is_refused_where_it_would_be_wrong(model):
    expected = model(IDS).logits
    kept = []
    with model.on_layer(lambda layer, hidden: kept.append(layer) or layer.again(hidden)):
        for call in (lambda: model(IDS), lambda: model.generate(IDS, **OPTIONS)):
            with pytest.raises(AirLLMError, match="has one place in the KV cache.*use_cache=False"):
                call()
        if transformers.__version__ >= "5":  # 4.43 hands its layers a cache all the same
            model.generate(IDS, use_cache=False, **OPTIONS)
    with pytest.raises(AirLLMError, match="cannot compute again: the function .* has returned"):
        kept[0].again(torch.zeros(1, 5, 64))
    assert torch.equal(model(IDS).logits, expected)


def test_several_are_called_in_order_and_each_sees_what_the_one_before_made(model):
    expected = model(IDS).logits
    seen = []
    first = model.on_layer(lambda layer, hidden: hidden + 1 if layer.index == 0 else None)
    second = model.on_layer(lambda layer, hidden: seen.append(hidden) or (hidden - 1 if layer.index == 0 else None))
    third = model.on_layer(lambda _, hidden: seen.append(hidden))
    model(IDS)
    assert torch.equal(seen[0] - 1, seen[1])
    first.remove()
    first.remove()
    second.remove()
    third.remove()
    assert torch.equal(model(IDS).logits, expected)
    assert len(seen) == 2 * LAYERS


def test_what_is_generated_follows_from_what_was_put_in(model):
    """The tap stands in every pass, and the keys and values of the layers behind it come from what it put in."""
    plain = model.generate(IDS, **OPTIONS)
    shift = torch.randn(64, generator=torch.Generator().manual_seed(0))
    tokens = []

    def push(layer, hidden):
        if layer.index == 1:
            tokens.append(hidden.shape[1])
            return hidden + 2 * shift
        return None

    with model.on_layer(push):
        pushed = model.generate(IDS, **OPTIONS)
        assert torch.equal(model.generate(IDS, use_cache=False, **OPTIONS), pushed)
    assert tokens[:5] == [5, 1, 1, 1, 1]
    assert not torch.equal(pushed, plain)
    assert torch.equal(model.generate(IDS, **OPTIONS), plain)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (torch.zeros(1, 4, 64), r"returned \(1, 4, 64\) torch.float32 cpu, and the hidden state is \(1, 5, 64\)"),
        (torch.zeros(1, 5, 64, dtype=torch.float64), "torch.float64"),
        (torch.zeros(1, 5, 64, device="meta"), "meta"),
        ("text", "returned str"),
        ((torch.zeros(1, 5, 64),), "returned tuple"),
    ],
)
def test_what_cannot_take_its_place_is_refused(model, made, said):
    expected = model(IDS).logits
    with model.on_layer(lambda *_: made), pytest.raises(AirLLMError, match=said):
        model(IDS)
    assert torch.equal(model(IDS).logits, expected)


def test_what_is_no_function_is_refused(model):
    with pytest.raises(AirLLMError, match="cannot be called"):
        model.on_layer("function")


@pytest.mark.parametrize("raised", [ZeroDivisionError, KeyboardInterrupt])
def test_what_it_raises_reaches_the_caller_and_leaves_nothing(model, raised):
    expected = model.generate(IDS, **OPTIONS)
    passes = []

    def fail_in_layer_2(layer, _hidden):
        if layer.index == 2:
            raise raised

    with pytest.raises(raised) as caught, model.on_layer(fail_in_layer_2):
        model.generate(IDS, **OPTIONS)
    assert "fail_in_layer_2" in [entry.name for entry in caught.traceback]
    assert torch.equal(model.generate(IDS, **OPTIONS), expected)
    model.progress = lambda event: passes.append(event) if isinstance(event, PassEnd) else None
    with pytest.raises(raised), model.on_layer(fail_in_layer_2):
        model(IDS)
    assert [event.completed for event in passes] == [False]
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_it_may_remove_itself(model):
    calls = []

    def once(layer, _hidden):
        calls.append(layer.index)
        tap.remove()

    tap = model.on_layer(once)
    model(IDS)
    assert calls == [0]


def test_one_that_is_added_within_a_pass_sees_the_next_one(model):
    calls = []

    def add(layer, _hidden):
        if layer.index == 1 and not calls:
            calls.append("added")
            model.on_layer(lambda layer, _: calls.append(layer.index))

    model.on_layer(add)
    model(IDS)
    assert calls == ["added"]
    model(IDS)
    assert calls == ["added", *range(LAYERS)]


def test_one_that_is_removed_by_another_is_called_no_more(model):
    calls = []
    model.on_layer(lambda layer, _: second.remove() if layer.index == 1 else None)
    second = model.on_layer(lambda layer, _: calls.append(layer.index))
    model(IDS)
    assert calls == [0]
    with pytest.raises(AirLLMError, match="was removed"), second:
        pass


@pytest.mark.parametrize(
    "made", [None, 3, torch.zeros(1, 3, 64), torch.zeros(1, 5, 8), torch.zeros(1, 5, 64, dtype=torch.float64)], ids=str
)
def test_a_layer_computes_again_on_what_entered_it_or_the_like(model, made):
    with (
        model.on_layer(lambda layer, _: layer.again(made)),
        pytest.raises(AirLLMError, match=r"layer.again of model.layers.0 was"),
    ):
        model(IDS, use_cache=False)


def test_a_layer_whose_weights_went_away_meanwhile_says_so(checkpoint):
    def run_the_model_first(layer, hidden):
        if layer.index == 1 and not entered:
            entered.append(layer)
            entered.append(model(IDS, use_cache=False))
            layer.again(hidden)

    entered = []
    with load(checkpoint(), "none") as model:
        with model.on_layer(run_the_model_first), pytest.raises(AirLLMError, match="Call layer.again before what else runs"):
            model(IDS, use_cache=False)
        assert torch.equal(model(IDS).logits, entered[1].logits)


def test_a_model_that_calls_itself_without_end_is_refused(checkpoint):
    """Rather than to wait for memory that only this thread could give back."""
    with load(checkpoint(), "none") as model:
        expected = model(IDS).logits
        with model.on_layer(lambda *_: model(IDS) and None), pytest.raises(AirLLMError, match="within itself too often"):
            model(IDS)
        assert torch.equal(model(IDS).logits, expected)


def test_layers_that_return_lists_are_tapped_too():
    """As those of the first GPT."""
    hidden = torch.zeros(1, 2, 3)
    tap = taps.Tap(None, lambda layer, state: state + 1 + layer.before)
    changed = taps.visit([tap], LayerInfo(0, "h.0", 0, resident=True), torch.nn.Identity(), (hidden,), {}, [hidden, "attention"])
    assert type(changed) is list
    assert torch.equal(changed[0], hidden + 1)
    assert changed[1] == "attention"


def test_a_closed_model_that_was_used_is_freed(checkpoint):
    model = load(checkpoint())
    model.close()
    kept = weakref.ref(model._hf)

    def use(model, argument):
        with pytest.raises(AirLLMError, match="unloaded"):
            model(IDS)
        return weakref.ref(argument)

    argument = use(model, torch.zeros(1))
    del model
    gc.collect()
    assert kept() is None
    assert argument() is None


def test_without_any_there_are_no_hooks_where_all_stay(checkpoint):
    with load(checkpoint()) as model:
        layers = model.base_model.layers
        for count in (0, 2, 0):
            handles = [model.on_layer(lambda *_: None) for _ in range(count)]
            model(IDS)  # takes effect with the next pass
            for layer in layers:
                tables = (layer._forward_hooks, layer._forward_pre_hooks, layer._forward_hooks_with_kwargs)
                assert [len(table) for table in tables] == [bool(count)] * 3
            for handle in handles:
                handle.remove()


def test_a_closed_model_lets_them_go(checkpoint):
    model = load(checkpoint())
    tap = model.on_layer(lambda *_: None)
    model.close()
    assert not model._runtime.taps
    tap.remove()
    with pytest.raises(AirLLMError, match="unloaded"):
        model.on_layer(lambda *_: None)


def test_events_go_on(model):
    events = []
    model.progress = events.append
    with model.on_layer(lambda layer, hidden: hidden * 1 if layer.index == 1 else None):
        model(IDS)
    assert sum(isinstance(event, ComputeBegin) for event in events) == LAYERS
