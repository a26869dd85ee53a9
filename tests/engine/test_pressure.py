"""Memory that becomes short while a model is loaded: it gets slower, tells so, and goes on giving exactly the same."""

import gc
import json
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import Counter

import pytest
import torch
import transformers
from tiny import CONFIGS, budgets
from tiny_any import make_any
from waiting import wait_for

from airllm_nb import LayeredModel, plan
from airllm_nb.bench import machine
from airllm_nb.engine import memory, pressure, release, residency, runtime, stream, weights
from airllm_nb.events import ComputeBegin, ComputeEnd, MemoryShort, PassBegin, PassEnd

DTYPE = "dtype" if transformers.__version__ >= "5" else "torch_dtype"
IDS = torch.arange(1, 10)[None]
OPTIONS = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 257}
MANY = 10**15


class Machine:
    """Memory as the test says: `missing` bytes are missing at the next look."""

    def __init__(self, monkeypatch):
        self.missing = 0
        monkeypatch.setattr(memory, "limits", self.limits)
        monkeypatch.setattr(pressure, "ENOUGH", MANY)
        monkeypatch.setattr(pressure, "SHORT", MANY)
        monkeypatch.setattr(pressure, "INTERVAL", 0.0)

    def limits(self, **_):
        missing, self.missing = self.missing, 0
        return {"available memory": MANY - missing}


@pytest.fixture
def short(monkeypatch):
    return Machine(monkeypatch)


def load(folder, keep="all", dtype="float32", **options):
    budget = budgets(plan(folder, device="cpu", dtype=dtype, memory="1TB"))[keep]
    return LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory=budget, **options)


def resident(model):
    return [layer.index for layer in model.layers if layer.resident]


def once(short, nbytes):
    """A listener: in mid-generation, `nbytes` bytes are missing."""
    seen = []

    def listen(event):
        seen.append(event)
        if isinstance(event, PassEnd) and event.index == 3:
            short.missing = nbytes

    return seen, listen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keep", ["all", "half", "none"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_as_transformers_across_a_release(checkpoint, short, kind, keep, dtype):
    folder = checkpoint(kind)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, **{DTYPE: getattr(torch, dtype)}).eval()
    with load(folder, keep, dtype) as model:
        stayed = resident(model)
        seen, model.progress = once(short, model.layers[0].nbytes)
        assert torch.equal(model.generate(IDS, **OPTIONS), reference.generate(IDS, **OPTIONS))
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, reference(IDS).logits)
        told = [event for event in seen if isinstance(event, MemoryShort)]
        assert len(told) == 1
        assert told[0].layers == model.layers
        assert len(resident(model)) < len(stayed) or not stayed
        assert model.plan.used_nbytes <= model.plan.budget or not stayed


def storages(model, index):
    """Weak references to all memory that a layer's weights lie in."""
    module = model.model.layers[index]
    return {weakref.ref(tensor.untyped_storage()) for tensor in (*module.parameters(), *module.buffers())}


def test_a_buffer_of_the_checkpoint_does_not_hold_its_layer(short, tmp_path):
    """A router's bias is a buffer, which stays when its layer goes."""
    ids = torch.arange(3, 12)[None]
    with load(make_any(tmp_path / "model", "glm4_moe")) as model:
        expected = model(ids).logits
        assert any(name.endswith("e_score_correction_bias") for name, _ in model.named_buffers())
        short.missing = MANY
        with pytest.warns(RuntimeWarning, match="Memory is short"):
            assert torch.equal(model(ids).logits, expected)
        assert not resident(model)
        for layer in model.model.layers:
            for buffer in layer.buffers():
                assert buffer.untyped_storage().nbytes() < model.layers[0].nbytes / 2
        assert torch.equal(model(ids).logits, expected)


def test_one_after_the_other_until_the_least(checkpoint, short):
    events = []
    with load(checkpoint("llama", num_hidden_layers=8), progress=events.append) as model:
        expected = model(IDS).logits
        counts, used = [], []
        size = model.layers[0].nbytes
        for _ in range(8):
            short.missing = size
            assert torch.equal(model(IDS).logits, expected)
            counts.append(len(resident(model)))
            used.append(model.plan.used_nbytes)
            assert model._runtime.stream.slots == 2
        assert counts == [5, 4, 3, 2, 1, 0, 0, 0]
        assert used[0] == model.plan.total_nbytes - size
        assert used[-1] == model.plan.always_nbytes + 2 * size  # the embedding stays, too
        assert model.plan.streamed_nbytes == sum(model.plan.work.read) > 0
        assert str(model.plan).count("lowered when memory became short") == 1
        told = [event.text for event in events if isinstance(event, MemoryShort)]
        assert len(told) == 7
        assert "3 more layers stream now, 5 still stay" in told[0]
        assert "1 more layer streams now, 4 still stay" in told[1]
        assert f"this model needs at least {memory.format_size(model.plan.least)}" in told[-1]
        assert torch.equal(model(IDS).logits, expected)
        assert model.plan.predict() is not None


def test_at_even_distances():
    released, slots = residency.release([10] * 12, [True] * 12, [], 20)
    assert (released, slots) == ([1, 4, 7, 10], [10, 10])
    assert residency.release([10] * 12, [index not in released for index in range(12)], slots, 20) == ([3, 9], [])


@pytest.mark.parametrize(
    ("layers", "releasable", "slots"),
    [([10, 10], [True, True], []), ([10], [True], []), ([10, 10, 30], [False, False, True], [10, 10]), ([], [], [])],
)
def test_nothing_is_released_where_it_frees_nothing(layers, releasable, slots):
    assert residency.release(layers, releasable, slots, 10**9) == ([], [])


@pytest.mark.parametrize("slots", [[], [20], [20, 20]])
def test_every_released_layer_fits_into_a_buffer(slots):
    layers = [10, 20, 30, 10, 20, 30, 10, 20]
    for nbytes in range(1, 200, 7):
        released, own = residency.release(layers, [True] * 8, slots, nbytes)
        if released:
            assert max(layers[index] for index in released) <= max([*slots, *own])
            assert len(slots) + len(own) >= 2
            assert sum(layers[index] for index in released) > sum(own)


def test_in_the_middle_of_a_pass_where_layers_stream(checkpoint, short):
    """A pass that reads from the disk can take long: it is looked at before each layer that streams."""
    events = []
    with load(checkpoint("llama", num_hidden_layers=8), "half") as model:
        expected = model(IDS).logits

        def listen(event):
            events.append(event)
            if isinstance(event, ComputeBegin) and event.index == 3:
                short.missing = MANY

        assert resident(model)
        model.progress = listen
        assert torch.equal(model(IDS).logits, expected)
        kinds = [type(event) for event in events]
        told = kinds.index(MemoryShort)
        assert kinds.index(PassBegin) < kinds.index(ComputeBegin) < told < kinds.index(PassEnd)
        assert not resident(model)
        assert sum(kind is ComputeEnd for kind in kinds) == 8
        assert torch.equal(model(IDS).logits, expected)


def test_who_does_not_listen_is_warned(checkpoint, short):
    with load(checkpoint()) as model:
        expected = model(IDS).logits
        short.missing = model.layers[0].nbytes
        with pytest.warns(RuntimeWarning, match="3 more layers stream now, 1 still stay"):
            assert torch.equal(model(IDS).logits, expected)
        short.missing = MANY
        with pytest.warns(RuntimeWarning, match="1 more layer streams now, 0 still stay"):
            model(IDS)
        short.missing = MANY
        with pytest.warns(RuntimeWarning, match="nothing more can be released: this model needs at least"):
            model(IDS)
        short.missing = MANY
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(model(IDS).logits, expected)


def test_layers_that_stay_have_hooks_only_while_someone_listens(checkpoint, short):
    with load(checkpoint("llama", num_hidden_layers=8)) as model:
        short.missing = model.layers[0].nbytes
        for listener in (lambda _: None, None, lambda _: None, None):
            model.progress = listener
            model(IDS)
            for info, layer in zip(model.layers, model.model.layers, strict=True):
                expected = int(listener is not None or not info.resident)
                assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == expected


def test_it_looks_once_a_second(checkpoint, monkeypatch):
    looks = []
    with load(checkpoint()) as model:
        monkeypatch.setattr(memory, "limits", lambda **_: looks.append(1) or {"available memory": MANY})
        begin = time.monotonic()
        for _ in range(20):
            model(IDS)
        assert len(looks) <= 2 + time.monotonic() - begin


def test_a_layer_that_was_changed_stays(checkpoint, short):
    """The checkpoint does not have what the user has made of it."""
    with load(checkpoint("llama", num_hidden_layers=8)) as model:
        with torch.no_grad():
            model.model.layers[3].mlp.down_proj.weight.mul_(2)
        model.model.layers[5].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros_like(model.model.layers[5].mlp.up_proj.weight))
        model.model.layers[6].self_attn.q_proj.weight.data += 0.01  # as peft merges an adapter
        expected = model(IDS).logits
        short.missing = MANY
        with pytest.warns(RuntimeWarning, match="5 more layers"):
            assert torch.equal(model(IDS).logits, expected)
        assert resident(model) == [3, 5, 6]


def test_a_large_weight_that_was_changed_through_data(checkpoint, short):
    with load(checkpoint("llama", hidden_size=512, intermediate_size=1024, num_attention_heads=8)) as model:
        model.model.layers[1].mlp.up_proj.weight.data += 0.01
        assert model.model.layers[1].mlp.up_proj.weight.nbytes > weights.SMALL
        expected = model(IDS).logits
        short.missing = MANY
        with pytest.warns(RuntimeWarning, match="3 more layers"):
            assert torch.equal(model(IDS).logits, expected)
        assert resident(model) == [1]


def test_loading_in_inference_mode(checkpoint, short):
    with torch.inference_mode(), load(checkpoint()) as model:
        expected = model(IDS).logits
        short.missing = MANY
        with pytest.warns(RuntimeWarning, match="4 more layers"):
            assert torch.equal(model(IDS).logits, expected)


def test_what_is_mapped_stays(checkpoint, short):
    with load(checkpoint(), dtype="bfloat16", shared="insist") as model:
        short.missing = MANY
        with pytest.warns(RuntimeWarning, match="nothing more can be released"):
            model(IDS)
        assert len(resident(model)) == 4


@pytest.mark.parametrize("shared", [False, "insist"])
def test_its_own_mapped_pages_are_no_want(checkpoint, monkeypatch, shared):
    """What is left is asked as it was for the budget: active file pages may be the model's own."""
    looks = []
    with load(checkpoint(), dtype="bfloat16", shared=shared) as model:
        monkeypatch.setattr(memory, "limits", lambda *, mapped=False: looks.append(mapped) or {"available memory": MANY})
        monkeypatch.setattr(pressure, "INTERVAL", 0.0)
        model(IDS)
    assert set(looks) == {bool(shared)}


def test_a_forgotten_model_is_freed(checkpoint, short):
    folder = checkpoint()  # writing one may start a thread of its own
    threads = threading.active_count()
    model = load(folder)
    short.missing = MANY
    with pytest.warns(RuntimeWarning, match="Memory is short"):
        model(IDS)
    assert threading.active_count() == threads + 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    wait_for(lambda: threading.active_count() == threads)


def test_unloading_and_an_error_afterwards(checkpoint, short):
    threads = threading.active_count()
    with load(checkpoint()) as model:
        expected = model(IDS).logits
        short.missing = MANY
        model.progress = lambda event: 1 / 0 if isinstance(event, ComputeBegin) and event.index == 2 else None
        with pytest.raises(ZeroDivisionError):
            model(IDS)
        model.progress = None
        assert torch.equal(model(IDS).logits, expected)
    assert threading.active_count() == threads


WATCHED = {module.__file__ for module in (pressure, release, residency, runtime, stream, weights)}


class InterruptAtStep:
    """Presses stop at the n-th step of a release: a line of our code that the computing thread comes to for the first time."""

    def __init__(self, count):
        self.left = count
        self.inside = 0
        self.seen = Counter()

    def __call__(self, frame, _event, _arg):
        if frame.f_code.co_name == "relieve":
            self.inside += 1
            return self.line
        return self.line if self.inside and frame.f_code.co_filename in WATCHED else None

    def line(self, frame, event, _arg):
        if event == "return" and frame.f_code.co_name == "relieve":
            self.inside -= 1
        elif event == "line" and self.inside:
            where = frame.f_code.co_filename, frame.f_lineno
            self.seen[where] += 1
            self.left -= self.seen[where] == 1
            if self.left == 0:
                self.left = -1
                raise KeyboardInterrupt
        return self.line


@pytest.mark.parametrize("keep", ["all", "half"])
def test_an_interrupt_at_every_step_of_a_release(checkpoint, short, keep):
    folder = checkpoint("llama", num_hidden_layers=6)
    budget = budgets(plan(folder, device="cpu", dtype="float32", memory="1TB"))[keep]
    threads = threading.active_count()
    interrupted = 0
    trace = sys.gettrace()
    while True:
        with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory=budget, progress=lambda _: None) as model:
            expected = model(IDS).logits
            short.missing = model.layers[0].nbytes
            stayed = len(resident(model))
            stop = InterruptAtStep(interrupted + 1)
            sys.settrace(stop)
            try:
                model(IDS)
                done = True
            except KeyboardInterrupt:
                interrupted += 1
                done = False
            finally:
                sys.settrace(trace)
            assert torch.equal(model(IDS).logits, expected)
            short.missing = model.layers[0].nbytes
            assert torch.equal(model(IDS).logits, expected)
            assert len(resident(model)) < stayed
            assert model._runtime.stream.slots == 2
            assert threading.active_count() == threads + 1
        if done:
            break
    assert interrupted > 60
    assert threading.active_count() == threads


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
LARGE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24, "shards": "1GB"}


@LINUX
def test_memory_goes_back_to_the_system(checkpoint, short):
    with load(checkpoint("llama", **LARGE)) as model:
        expected = model(IDS).logits
        before, used = machine.anonymous(), model.plan.used_nbytes
        short.missing = MANY
        with pytest.warns(RuntimeWarning, match="Memory is short"):
            assert torch.equal(model(IDS).logits, expected)
        freed = used - model.plan.used_nbytes
        assert freed > 200_000_000
        assert before - machine.anonymous() > 0.95 * freed


CHILD = """
import json, sys, torch
from airllm_nb import LayeredModel
from airllm_nb.events import MemoryShort

IDS = torch.arange(1, 10)[None]
told = []

def listen(event):
    if isinstance(event, MemoryShort):
        told.append(event.text)

with LayeredModel.from_pretrained(sys.argv[1], device="cpu", dtype="float32", progress=listen) as model:
    first = model(IDS).logits
    for _ in sys.stdin:
        same = torch.equal(model(IDS).logits, first)
        stay = sum(layer.resident for layer in model.layers)
        print(json.dumps({"stay": stay, "same": same, "told": told}), flush=True)
"""
TAKER = """
import sys
taken = []
for line in sys.stdin:
    taken.append(b"x" * int(line))
    print(flush=True)
"""


@LINUX
def test_another_process_takes_memory_of_a_container(checkpoint):
    """Under a real limit that both are in: the model makes room before the kernel would kill one of them."""
    folder = checkpoint("llama", **LARGE)
    weights = plan(folder, device="cpu", dtype="float32", memory="1TB").total_nbytes
    command = "import torch; from airllm_nb.bench.machine import anonymous; from transformers import pipeline; print(anonymous())"
    base = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    limit = int(base) + weights + 2 * pressure.ENOUGH
    try:
        with machine.limited(limit) as enter:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1, "preexec_fn": enter}
            with (
                subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], **pipes) as child,
                subprocess.Popen([sys.executable, "-c", TAKER], **pipes) as taker,
            ):

                def ask(process, line):
                    process.stdin.write(f"{line}\n")
                    return process.stdout.readline()

                try:
                    found = [json.loads(ask(child, ""))]
                    for _ in range(9):
                        ask(taker, 50_000_000)
                        time.sleep(pressure.INTERVAL)
                        found.append(json.loads(ask(child, "")))
                finally:
                    child.stdin.close()
                    taker.stdin.close()
                assert child.wait() == taker.wait() == 0
    except machine.BenchError as error:
        pytest.skip(str(error))
    stay = [answer["stay"] for answer in found]
    assert stay[0] == 24
    assert stay == sorted(stay, reverse=True)
    assert stay[-1] < 24
    assert all(answer["same"] for answer in found)
    assert "container limit" in found[-1]["told"][0]
