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
from airllm_nb.engine import runtime
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
