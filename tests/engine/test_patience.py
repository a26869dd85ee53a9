"""A disk that stops answering: told in words, and when it answers again, everything is as it was."""

import threading
import time

import pytest
import torch
import transformers

from airllm_nb import LayeredModel
from airllm_nb.engine import experts, patience, reader, stream
from airllm_nb.engine.expert_stacks import ExpertStack
from airllm_nb.engine.experts import ExpertStore
from airllm_nb.errors import CheckpointError

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture
def disk(monkeypatch):
    """Return an event: while it is not set, the disk does not answer the reading threads."""
    answers, read = threading.Event(), reader._read
    answers.set()

    def slow(*args):
        if threading.current_thread() is not threading.main_thread():
            assert answers.wait(60)
        return read(*args)

    monkeypatch.setattr(reader, "_read", slow)
    monkeypatch.setattr(patience, "PATIENCE", 0.3)
    yield answers
    answers.set()


def load(folder):
    model = LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory="330kB")
    assert not all(layer.resident for layer in model.layers)
    return model


def test_it_is_told_and_then_goes_on(checkpoint, disk):
    expected = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(), torch_dtype=torch.float32)(IDS).logits
    with load(checkpoint()) as model:
        model(IDS)
        disk.clear()
        with pytest.raises(CheckpointError, match="has not answered for"):
            model(IDS)
        disk.set()
        assert torch.equal(model(IDS).logits, expected)


def test_closing_does_not_wait_for_ever(checkpoint, disk, monkeypatch):
    monkeypatch.setattr(stream, "LAST", 0.2)
    disk.clear()
    model = load(checkpoint())
    begin = time.monotonic()
    model.close()
    assert time.monotonic() - begin < 30


def test_closing_does_not_wait_for_ever_for_an_expert(monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 0.3)
    monkeypatch.setattr(experts, "LAST", 0.2)
    answers = threading.Event()
    stack = ExpertStack("experts", torch.uint8, (64,), 0, (), ((), ()), None)
    store = ExpertStore([stack], {64: 2}, lambda *_: answers.wait(60), lambda: 99.0)
    store.start()
    with pytest.raises(CheckpointError, match="has not answered for"):
        next(store.visit(0, [0]))
    begin = time.monotonic()
    store.close()
    assert time.monotonic() - begin < 30
    answers.set()
    for thread in store._threads:
        thread.join(20)
        assert not thread.is_alive()
