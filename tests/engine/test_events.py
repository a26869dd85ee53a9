"""The order and content of events: what any display relies on."""

import dataclasses

import pytest
import torch
from tiny import LAYERS, budgets

from airllm_nb import LayeredModel, plan
from airllm_nb.errors import AirLLMError
from airllm_nb.events import ComputeBegin, ComputeEnd, LayerRead, LayerReady, LoadBegin, LoadEnd, PassBegin, PassEnd

IDS = torch.tensor([[1, 2, 3, 4, 5]])


def run(folder, keep, dtype="float32"):
    memory = budgets(plan(folder, device="cpu", dtype=dtype))[keep]
    events = []
    with LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory=memory, progress=events.append) as model:
        model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=257
        )
        return events, model.layers


@pytest.mark.parametrize("keep", ["all", "half", "none"])
def test_order(checkpoint, keep):
    events, layers = run(checkpoint(), keep)
    kinds = [type(event) for event in events if not isinstance(event, (LayerRead, LayerReady))]
    one_pass = [PassBegin, *[ComputeBegin, ComputeEnd] * LAYERS, PassEnd]
    assert kinds == [LoadBegin, LoadEnd, *one_pass * 3]
    passes = [event for event in events if isinstance(event, PassBegin)]
    assert [(event.index, event.tokens, event.kind) for event in passes] == [
        (0, 5, "prefill"),
        (1, 1, "decode"),
        (2, 1, "decode"),
    ]
    computed = [event for event in events if isinstance(event, ComputeBegin)]
    assert [event.index for event in computed] == [0, 1, 2, 3] * 3
    for event in computed:
        layer = layers[event.index]
        assert (event.name, event.nbytes) == (layer.name, layer.nbytes)
        assert (event.source == "resident") == layer.resident
        assert event.waited >= 0


@pytest.mark.parametrize("keep", ["half", "none"])
def test_every_layer_is_ready_before_it_computes(checkpoint, keep):
    events, layers = run(checkpoint(), keep)
    ready = {layer.index: 0 for layer in layers}
    for event in events:
        if isinstance(event, LayerReady):
            ready[event.index] += 1
            assert event.source in ("cache", "disk")
            assert event.seconds >= 0
        if isinstance(event, ComputeBegin):
            assert ready[event.index] > 0
    reads = [event for event in events if isinstance(event, LayerRead)]
    for layer in layers:
        count = sum(event.index == layer.index for event in reads)
        assert count == 1 if layer.resident else count >= 3


def test_events_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoadEnd(1.0, completed=True).seconds = 2


def test_no_listener_no_hooks_where_all_stay(checkpoint):
    with LayeredModel.from_pretrained(checkpoint(), device="cpu", dtype="float32") as model:
        layers = model.model.layers
        for listener in (None, lambda _: None, None):
            model.progress = listener
            model(IDS)  # takes effect with the next pass
            assert all(bool(layer._forward_hooks) == bool(layer._forward_pre_hooks) == bool(listener) for layer in layers)


@pytest.mark.parametrize("keep", ["all", "none"])
def test_a_listener_may_leave_or_be_replaced_at_any_event(checkpoint, keep):
    memory = budgets(plan(checkpoint(), device="cpu", dtype="float32"))[keep]
    with LayeredModel.from_pretrained(checkpoint(), device="cpu", dtype="float32", memory=memory) as model:
        expected = model(IDS).logits
        for kind in (PassBegin, LayerRead, LayerReady, ComputeBegin, ComputeEnd, PassEnd):
            for successor in (None, lambda _: None):

                def leave(event, kind=kind, successor=successor):
                    if isinstance(event, kind):
                        model.progress = successor

                model.progress = leave
                for _ in range(2):
                    assert torch.equal(model(IDS).logits, expected)


def test_hidden_states_of_the_inner_model_are_a_pass_too(checkpoint):
    """`model.model(ids)` is a usual way to get them: it is told, cleaned up after an abort, and refused after closing."""
    memory = plan(checkpoint(), device="cpu", dtype="float32").least
    events = []
    with LayeredModel.from_pretrained(checkpoint(), device="cpu", dtype="float32", memory=memory) as model:
        expected = model.model(IDS).last_hidden_state
        model.progress = events.append
        model(IDS)
        assert sum(isinstance(event, PassBegin) for event in events) == 1  # not a second one for the inner model

        def fail(event):
            if isinstance(event, ComputeBegin) and event.index == 1:
                raise RuntimeError("on purpose")

        model.progress = fail
        for _ in range(3):
            with pytest.raises(RuntimeError, match="on purpose"):
                model.model(IDS)
        with pytest.raises(RuntimeError, match="on purpose"):  # and one layer called on its own
            model.model.layers[1](torch.zeros(1, 5, 64))
        model.progress = None
        assert torch.equal(model.model(IDS).last_hidden_state, expected)
    with pytest.raises(AirLLMError, match="unloaded"):
        model.model(IDS)
