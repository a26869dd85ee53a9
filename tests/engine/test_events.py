"""The order and content of events: what any display relies on."""

import dataclasses

import pytest
import torch
from tiny import LAYERS, budgets

from airllm_nb import LayeredModel, plan
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
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
        model.progress = lambda _: None
        assert all(layer._forward_hooks and layer._forward_pre_hooks for layer in layers)
        model.progress = None
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
