"""A forgotten model: the garbage collector may free it on any thread, also on one of its own and in the middle of its work."""

import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from tiny import budgets, make_checkpoint
from waiting import wait_for

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import versions
from airllm_nb.engine import conversion, weights
from airllm_nb.engine.experts import ExpertStore
from airllm_nb.engine.stream import WeightStream

IDS = torch.tensor([[1, 2, 3]])


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def load(folder):
    memory = budgets(plan(folder, device="cpu", dtype="float32"))["none"]
    model = LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory=memory)
    model(IDS)
    return model


def python(code):
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, check=False)


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("airllm_nb-")]


class Collecting:
    """Calls the garbage collector once it is armed, and then what it stands for."""

    def __init__(self, function):
        self.function = function
        self.armed, self.done = threading.Event(), threading.Event()

    def __call__(self, *args):
        if self.armed.is_set():
            self.armed.clear()
            gc.collect()
            self.done.set()
        return self.function(*args)

    def __get__(self, instance, _owner):
        return lambda *args: self(instance, *args)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("llama", WeightStream),
        pytest.param(
            "mixtral", ExpertStore, marks=pytest.mark.skipif(versions.installed() < (5,), reason="a module for each expert")
        ),
    ],
)
def test_freed_by_a_reading_thread_that_holds_its_lock(tmp_path, monkeypatch, kind, what):
    collecting = Collecting(what._job)
    model = load(make_checkpoint(tmp_path, kind))
    monkeypatch.setattr(what, "_job", collecting)
    stream = next(stream for stream in model._streams if isinstance(stream, what))
    gone, work = weakref.ref(model), stream._work
    del model, stream
    collecting.armed.set()
    work.put(None)
    assert collecting.done.wait(20)
    assert gone() is None
    wait_for(lambda: not own_threads())


@pytest.mark.usefixtures("no_collector")
def test_freed_by_the_thread_that_converts(checkpoint, monkeypatch):
    """The reading thread waits for it, and whoever closes the model for the reading thread."""
    collecting = Collecting(conversion.convert)
    monkeypatch.setattr(conversion, "convert", collecting)
    monkeypatch.setattr(weights, "SMALL", 0)
    model = load(checkpoint())
    (stream,) = model._streams
    wait_for(lambda stream=stream: all(state == "ready" for state, _ in stream._states))
    gone, work = weakref.ref(model), stream._work
    with stream._lock:
        stream._states = [("free", -1) for _ in stream._states]
    del model, stream
    collecting.armed.set()
    work.put(None)
    assert collecting.done.wait(5)  # less than closing waits for a thread
    assert gone() is None
    wait_for(lambda: not own_threads())


@pytest.mark.parametrize("end", ["", "model.close()", "model = None"])
def test_nothing_hangs_when_python_exits(checkpoint, end):
    """Whether the model lives until then, is closed or forgotten."""
    run = python(
        f"""
import torch
from airllm_nb import LayeredModel, plan
folder = {str(checkpoint())!r}
memory = plan(folder, device="cpu", dtype="float32").least
model = LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory=memory)
model(torch.tensor([[1, 2, 3]]))
{end}
"""
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_forked_process_says_so_and_can_close(checkpoint, kind):
    """Where the reading threads are not, and where they may have left their locks locked."""
    run = python(
        f"""
import os, signal
import torch
from airllm_nb import LayeredModel, plan
from airllm_nb.errors import AirLLMError
folder = {str(checkpoint(kind))!r}
memory = plan(folder, device="cpu", dtype="float32").least
model = LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory=memory)
ids = torch.tensor([[1, 2, 3]])
model(ids)
locks = [model._reader._lock, *(stream._lock for stream in model._streams)]
for lock in locks:
    lock.acquire()
child = os.fork()
if child == 0:
    signal.alarm(30)
    try:
        model(ids)
    except AirLLMError as error:
        print(error, flush=True)
    model.close()
else:
    for lock in locks:
        lock.release()
    status = os.waitpid(child, 0)[1]
    assert status == 0, status
    model(ids)
    print("and here it computes")
"""
    )
    assert run.returncode == 0, run.stderr
    told, here = run.stdout.splitlines()
    assert told.endswith("Load the model in this process.")
    assert here == "and here it computes"
