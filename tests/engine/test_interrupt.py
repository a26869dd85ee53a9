"""An interrupt at any moment leaves a model that gives exactly the reference text afterwards."""

import _thread
import signal
import sys
import threading
import time

import pytest
import torch
from tiny import budgets

from airllm_nb import LayeredModel, plan
from airllm_nb.engine import attention, runtime, taps, tracing
from airllm_nb.events import LoadEnd, PassEnd

IDS = torch.tensor([[10, 20, 30, 40, 50]])
OPTIONS = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 257}


class InterruptAt:
    """Presses stop when the computing thread tells its n-th event."""

    def __init__(self, count):
        self.left = count
        self.thread = threading.get_ident()

    def __call__(self, _event):
        if threading.get_ident() == self.thread:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize("keep", ["all", "half", "none"])
def test_at_every_event_of_a_run(checkpoint, keep):
    folder = checkpoint()
    memory = budgets(plan(folder, device="cpu", dtype="float32"))[keep]
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory=memory) as model:
        expected = model.generate(IDS, **OPTIONS)
        interrupted = 0
        while True:
            model.progress = InterruptAt(interrupted + 1)
            try:
                assert torch.equal(model.generate(IDS, **OPTIONS), expected)
                break
            except KeyboardInterrupt:
                interrupted += 1
            model.progress = None
            if interrupted % 7 == 0:  # after each would be slow, and the next interrupted run shows most of it
                assert torch.equal(model.generate(IDS, **OPTIONS), expected)
        assert interrupted == 6 * (2 + 2 * len(model.layers))
        model.progress = None
        assert torch.equal(model.generate(IDS, **OPTIONS), expected)


def test_at_every_event_of_loading(checkpoint):
    folder = checkpoint()
    threads = threading.active_count()
    for count in range(1, 100):
        try:
            model = LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", progress=InterruptAt(count))
        except KeyboardInterrupt:
            assert threading.active_count() == threads
        else:
            break
    assert count == 2 + 2 * len(model.layers) + 1
    model.close()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_at_random_moments(checkpoint):
    """A real signal, wherever it hits: in the middle of Python code, in a kernel, while waiting for the disk."""
    folder = checkpoint()
    events = []
    with LayeredModel.from_pretrained(
        folder, device="cpu", dtype="float32", memory=plan(folder, device="cpu", dtype="float32").least, progress=events.append
    ) as model:
        expected = model.generate(IDS, **OPTIONS)
        begin = time.perf_counter()
        model.generate(IDS, **OPTIONS)
        whole = time.perf_counter() - begin
        signal.signal(signal.SIGALRM, lambda *_: _thread.interrupt_main())
        interrupted = 0
        for step in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + whole * step / 60)
                model.generate(IDS, **OPTIONS)
                signal.setitimer(signal.ITIMER_REAL, 0)
                time.sleep(0)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert torch.is_grad_enabled()
            if step % 5 == 0:
                assert torch.equal(model.generate(IDS, **OPTIONS), expected)
        assert interrupted > 20
        assert torch.equal(model.generate(IDS, **OPTIONS), expected)
    assert {event.completed for event in events if isinstance(event, PassEnd)} == {True, False}
    assert [event.completed for event in events if isinstance(event, LoadEnd)] == [True]


@pytest.mark.parametrize("call", [lambda model: model.generate(IDS, **OPTIONS), lambda model: model(IDS)], ids=["all", "one"])
@pytest.mark.parametrize("moment", range(3))
def test_on_the_way_out_of_no_grad(checkpoint, monkeypatch, call, moment):
    """An interrupt there, before PyTorch has taken it back, would leave the whole session without gradients."""
    leave, left = torch.no_grad.__exit__, []

    def interrupted(context, *error):
        left.append(context)
        if len(left) == moment + 1:
            raise KeyboardInterrupt
        leave(context, *error)

    with LayeredModel.from_pretrained(checkpoint(), device="cpu", dtype="float32") as model:
        with monkeypatch.context() as patch:
            patch.setattr(torch.no_grad, "__exit__", interrupted)
            try:
                call(model)
            except KeyboardInterrupt:
                assert len(left) > moment
        assert torch.is_grad_enabled()
        assert left


class InterruptAtLine:
    """Presses stop at the n-th line of the runtime that the computing thread comes to."""

    def __init__(self, count):
        self.left = count

    def __call__(self, frame, event, _arg):
        if frame.f_code.co_filename != runtime.__file__:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def test_at_every_line_of_a_pass(checkpoint):
    """Also on the way out: what has to be taken back then must not hang on a flag that was left behind."""
    folder = checkpoint()
    least = budgets(plan(folder, device="cpu", dtype="float32"))["none"]
    trace = sys.gettrace()
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory=least) as model:
        expected = model(IDS).logits
        interrupted, stop = 0, None
        while stop is None or stop.left <= 0:
            stop = InterruptAtLine(interrupted + 1)
            sys.settrace(stop)
            try:
                model(IDS)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                sys.settrace(trace)
                torch.set_grad_enabled(True)  # the line that does it may be the one
            model.progress = InterruptAt(4)  # a layer is out
            with pytest.raises(KeyboardInterrupt):
                model(IDS)
            model.progress = None
            assert torch.equal(model(IDS).logits, expected)
    assert interrupted > 60


class InterruptAtVisit:
    """Presses stop when the computing thread comes to a line for the n-th time; notes which lines of some files it comes to."""

    def __init__(self, files, line=None, times=1):
        self.files = files
        self.line = line
        self.left = times
        self.lines = {}

    def __call__(self, frame, event, _arg):
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            self.lines[line] = self.lines.get(line, 0) + 1
            self.left -= line == self.line
            if line == self.line and self.left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("keep", ["all", "none"])
def test_at_every_line_of_a_trace(checkpoint, keep):
    """Also of PyTorch's that takes modes off its stack: no function and no mode stays for longer than until the next pass."""
    folder = checkpoint()
    memory = budgets(plan(folder, device="cpu", dtype="float32"))[keep]
    files = {part.__file__ for part in (attention, runtime, taps, tracing, torch.overrides)}
    before = sys.gettrace()
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory=memory) as model:

        def traced(stop):
            sys.settrace(stop)
            try:
                return model.trace(IDS, heads=[(1, 1)], top_k=0)
            finally:
                sys.settrace(before)
                torch.set_grad_enabled(True)  # as above

        logits = model(IDS).logits
        expected = traced(stop := InterruptAtVisit(files))
        ends = {1, -1} if keep == "all" else {1}  # the first time that it is come to, and the last
        moments = [(line, times % (count + 1)) for line, count in stop.lines.items() for times in sorted(ends)]
        for line, times in moments:
            with pytest.raises(KeyboardInterrupt):
                traced(InterruptAtVisit(files, line, times))
            assert torch.equal(model(IDS).logits, logits), line
            assert torch.overrides._len_torch_function_stack() == 0, line
            assert not model._runtime.taps
            assert not model._runtime.present
            for layer in model.base_model.layers:
                on = [len(table) for table in (layer._forward_hooks, layer._forward_pre_hooks, layer._forward_hooks_with_kwargs)]
                assert on == [keep == "none"] * 3, line
        again = traced(None)
        assert torch.equal(again.norms, expected.norms)
        assert torch.equal(again.attention[1, 1], expected.attention[1, 1])
    assert len(moments) > 150


def test_a_layer_alone_can_compute_after_an_interrupt_while_its_hooks_are_put_on(checkpoint):
    """A hook that takes keyword arguments would fail without them, in every later pass."""
    with LayeredModel.from_pretrained(checkpoint(), device="cpu", dtype="float32") as model:
        expected = model(IDS).logits
        stop = InterruptAtVisit({runtime.__file__})
        model.progress = lambda _: None
        before = sys.gettrace()
        sys.settrace(stop)
        model(IDS)
        sys.settrace(before)
        begin = runtime._LayerHooks.put.__code__.co_firstlineno
        lines = [line for line in stop.lines if begin < line[1] < begin + 30]
        assert len(lines) > 8
        for line in lines:
            model.progress = None
            model(IDS)  # without hooks
            model.progress = lambda _: None
            sys.settrace(InterruptAtVisit({runtime.__file__}, line))
            with pytest.raises(KeyboardInterrupt):
                model(IDS)
            sys.settrace(before)
            hidden = model.get_input_embeddings()(IDS)
            positions = model.base_model.rotary_emb(hidden, torch.arange(IDS.shape[1])[None])
            model.base_model.layers[0](hidden, position_ids=torch.arange(IDS.shape[1])[None], position_embeddings=positions)
            assert torch.equal(model(IDS).logits, expected)
