"""An interrupt at every hook of a run, each time it is passed: afterwards the exact text, and nothing is left behind."""

import pytest
import torch
from counting import LINUX, Held, assert_same
from outcomes import Tally
from tiny import LAYERS, budgets

from airllm_nb import plan
from airllm_nb.engine.runtime import Runtime, _LayerHooks
from airllm_nb.engine.stream import WeightStream
from airllm_nb.notebook.renderers import SilentRenderer
from airllm_nb.notebook.session import Session
from airllm_nb.notebook.summary import Interrupted

LOAD = {"device": "cpu", "dtype": "float32"}
PROMPT = "What is this?"
NEW = 2
MOST = 2 * NEW * LAYERS


class Presser:
    """Presses stop when a function is called for the n-th time, before it does its work or after."""

    def __init__(self):
        self.left = 0
        self.after = False

    def wrap(self, function):
        def wrapped(*args, **kwargs):
            self.left -= 1
            pressed = self.left == 0
            if pressed and not self.after:
                raise KeyboardInterrupt
            result = function(*args, **kwargs)
            if pressed:
                raise KeyboardInterrupt
            return result

        return wrapped


def positions():
    from transformers.generation.logits_process import LogitsProcessorList
    from transformers.models.llama.modeling_llama import LlamaMLP

    return {
        "pass": (Runtime, "run"), "pre": (_LayerHooks, "before"), "read": (WeightStream, "take"),
        "compute": (LlamaMLP, "forward"), "post": (_LayerHooks, "after"), "release": (WeightStream, "give_back"),
        "sampling": (LogitsProcessorList, "__call__"),
    }  # fmt: skip


@LINUX
@pytest.mark.parametrize("keep", ["half", "none"])
@pytest.mark.parametrize("position", ["pass", "pre", "read", "compute", "post", "release", "sampling"])
def test_interrupted_at_every_hook(checkpoint, monkeypatch, record_property, position, keep):
    folder = checkpoint("llama", tokenizer=True)
    presser, tally = Presser(), Tally("interrupted at a hook", f"{position}, {keep} stay")
    owner, name = positions()[position]
    monkeypatch.setattr(owner, name, presser.wrap(getattr(owner, name)))
    session = Session(SilentRenderer, lambda _: None)
    try:
        session.load(str(folder), memory=budgets(plan(folder, **LOAD))[keep], **LOAD)
        expected = session.ask(PROMPT, max_new_tokens=NEW, temperature=0).text
        before, pressed = None, 0
        for count in range(1, MOST):
            presser.left, presser.after = (count + 1) // 2, count % 2 == 0
            try:
                session.ask(PROMPT, max_new_tokens=NEW, temperature=0)
            except Interrupted:
                pressed += 1
            else:
                break  # it is not passed as often
            presser.left = 0
            stream = session.model._runtime.stream
            assert stream is None or not stream.in_use, "a layer is still attached: the next run would wait for it"
            assert torch.is_grad_enabled()
            text = session.ask(PROMPT, max_new_tokens=NEW, temperature=0).text
            tally.add("right" if text == expected else "lost", repr(text), count)
            before = before or Held.now()
        assert_same(before)
        assert pressed >= NEW
    finally:
        session.unload()
    tally.close(record_property)
