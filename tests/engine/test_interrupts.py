"""An interrupt that is held back takes effect afterwards, and nothing is lost by it."""

import gc
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from torch.overrides import _len_torch_function_stack

from airllm_nb import LayeredModel, plan
from airllm_nb.engine import readable
from airllm_nb.engine.interrupts import free_locks, interrupt_later
from airllm_nb.engine.readable import opened


def pressing_stop(function):
    def pressed(*args, **kwargs):
        result = function(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)
        return result

    return pressed


def test_it_comes_at_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt_later():
        signal.raise_signal(signal.SIGINT)
        done.append("all of it")
    assert done == ["all of it"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in /proc")
def test_a_file_that_was_just_opened_is_closed(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"some")
    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(readable.os, "open", pressing_stop(os.open))
    with pytest.warns(ResourceWarning), pytest.raises(KeyboardInterrupt):
        opened(path)
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_building_a_model_leaves_torch_as_it_was(checkpoint, monkeypatch):
    folder = checkpoint()
    register = torch.nn.Module.register_parameter
    initialise = transformers.PreTrainedModel.init_weights
    with monkeypatch.context() as patch:
        patch.setattr(
            transformers.AutoModelForCausalLM, "from_config", pressing_stop(transformers.AutoModelForCausalLM.from_config)
        )
        with pytest.raises(KeyboardInterrupt):
            plan(folder, device="cpu")
    assert torch.nn.Module.register_parameter is register
    assert transformers.PreTrainedModel.init_weights is initialise
    assert _len_torch_function_stack() == 0
    with LayeredModel.from_pretrained(folder, device="cpu") as model:
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_locks_that_an_interrupt_left_with_this_thread_are_given_back():
    import tqdm

    locks = [logging._lock, *tqdm.tqdm.get_lock().locks]
    for lock in locks:
        lock.acquire()
        lock.acquire()
    free_locks()
    for lock in locks:
        taken = []
        other = threading.Thread(target=lambda lock=lock, taken=taken: taken.append(lock.acquire(timeout=5)) or lock.release())
        other.start()
        other.join()
        assert taken == [True]
