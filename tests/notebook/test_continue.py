"""Stop and go on: what comes out is the text of an uninterrupted run, wherever the interrupt hits."""

import _thread
import dataclasses
import gc
import os
import signal
import sys
import time
import weakref

import pytest
import torch
from runs import Written
from tiny import budgets

from airllm_nb import plan
from airllm_nb.compat import cache
from airllm_nb.errors import PromptError
from airllm_nb.events import ComputeBegin, PassBegin, PassEnd
from airllm_nb.notebook.last_run import LastRun
from airllm_nb.notebook.one_at_a_time import SessionError
from airllm_nb.notebook.summary import Interrupted

OTHERS = [*range(32), *range(127, 259)]  # all but ASCII: each token is a character, which is shown at once
GREEDY = {"max_new_tokens": 10}
SEEDED = {"max_new_tokens": 10, "temperature": 1.0, "seed": 7}
UNSEEDED = {"max_new_tokens": 10, "temperature": 1.0, "top_p": 0.9}

MOMENTS = int(os.environ.get("AIRLLM_NB_MOMENTS", "8"))
"""At how many moments of a run an interrupt hits. Of 40, about one in 2,000 still found a run that went on otherwise: see "Next"
in CONTRIBUTING.md."""


def load(session, folder, keep="all"):
    memory = budgets(plan(folder, device="cpu", dtype="float32"))[keep]
    session.load(str(folder), device="cpu", dtype="float32", memory=memory)
    session.model.generation_config.suppress_tokens = OTHERS


@pytest.fixture
def chatting(session, chat):
    load(session, chat)
    return session


class StopAt:
    """Takes the text, and stops the session after some pieces."""

    def __init__(self, session, pieces):
        self.session, self.left, self.text = session, pieces, ""

    def __call__(self, text):
        self.text += text
        self.left -= 1
        if self.left == 0:
            self.session.stop()


def same(answer, expected):
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert answer.stopped == expected.stopped
    assert answer.prompt_tokens == expected.prompt_tokens


def run(session, how, ask="ask", prompt="Hello"):
    torch.manual_seed(3)
    return getattr(session, ask)(prompt, **how)


def proceed(session, how):
    return session.proceed(**how)


@pytest.mark.parametrize("keep", ["all", "none"])
@pytest.mark.parametrize("ask", ["ask", "chat"])
@pytest.mark.parametrize("how", [GREEDY, SEEDED, UNSEEDED], ids=["greedy", "seeded", "unseeded"])
def test_stopped_and_continued(session, chat, how, ask, keep):
    load(session, chat, keep)
    expected = run(session, how, ask)
    for pieces in (1, 4, 9):
        session.forget()
        part = StopAt(session, pieces)
        with pytest.raises(Interrupted) as stopped:
            run(session, how | {"write": part}, ask)
        first = stopped.value.answer
        assert (first.stopped, len(first.token_ids)) == ("interrupted", pieces)
        assert session.can_proceed
        torch.rand(5)  # the user's own random numbers go on
        before = torch.get_rng_state()
        rest = Written()
        answer = session.proceed(write=rest.append)
        same(answer, expected)
        assert part.text.removesuffix("\n") + rest.text == expected.text + "\n"  # only what is new is written
        assert torch.equal(torch.get_rng_state(), before)
        assert answer.seconds > first.seconds
        assert [layer.passes for layer in answer.layers] == [10] * 4
        if ask == "chat":
            assert session.conversation.messages[-1] == {"role": "assistant", "content": expected.text}


def test_what_transformers_gives_in_several_goes(chatting, chat):
    """The same bits, not only the same text: each token is the most likely one of a model without any notebook."""
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(chat).float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat)
    prompt = tokenizer("Hello", return_tensors="pt")
    expected = reference.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=257, suppress_tokens=OTHERS)
    for _ in range(6):
        with pytest.raises(Interrupted):
            if chatting.can_proceed:
                chatting.proceed(write=StopAt(chatting, 3))
            else:
                chatting.ask("Hello", raw=True, max_new_tokens=20, write=StopAt(chatting, 3))
    assert list(chatting.proceed().token_ids) == expected[0, prompt["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("how", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "mixtral"])
def test_kinds_of_models(session, checkpoint, kind, how):
    load(session, checkpoint(kind, tokenizer=True), "half")
    expected = run(session, how)
    with pytest.raises(Interrupted):
        run(session, how | {"write": StopAt(session, 7)})
    same(session.proceed(), expected)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("ask", ["ask", "chat"])
def test_a_stop_between_the_last_token_and_who_asked(chatting, monkeypatch, ask, after):
    """Who asked gets the text, and not the one before it can be gone on with."""
    expected = run(chatting, GREEDY, ask)
    chatting.forget()
    with pytest.raises(Interrupted):
        run(chatting, GREEDY | {"write": StopAt(chatting, 3)}, ask, "another")
    chatting.forget()
    give = LastRun.give

    def press(self, one):
        if after:
            give(self, one)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LastRun, "give", press)
        with pytest.raises(Interrupted) as stopped:
            run(chatting, GREEDY, ask)
    assert stopped.value.answer.token_ids == expected.token_ids
    assert stopped.value.answer.stopped == "interrupted"
    same(chatting.proceed(), expected)


@pytest.fixture
def interrupt(monkeypatch):
    """Return a function that has the n-th event of a kind interrupted."""
    from airllm_nb.notebook import progress

    state = {"kind": None, "left": 0}
    call = progress.Progress.__call__

    def listen(self, event):
        call(self, event)
        if type(event) is state["kind"]:
            state["left"] -= 1
            if state["left"] == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(progress.Progress, "__call__", listen)
    return lambda kind, count: state.update(kind=kind, left=count)


@pytest.mark.parametrize("kind", [PassBegin, ComputeBegin, PassEnd])
def test_after_a_stop_all_is_as_before_the_aborted_pass(chatting, interrupt, kind):
    """The KV cache and the random state, which nothing else may have moved."""
    expected = run(chatting, UNSEEDED)
    torch.manual_seed(3)
    states = [torch.get_rng_state()]
    for made in range(1, 10):
        torch.manual_seed(3)
        run(chatting, UNSEEDED | {"max_new_tokens": made})
        states.append(torch.get_rng_state())
    for made in (0, 1, 5, 9):
        interrupt(kind, 4 * made + 3 if kind is ComputeBegin else made + 1)
        with pytest.raises(Interrupted) as stopped:
            run(chatting, UNSEEDED)
        assert len(stopped.value.answer.token_ids) == made
        assert torch.equal(torch.get_rng_state(), states[made])
        kept = chatting._last.run
        assert cache.length(kept.cache) == (len(kept.prompt) + made - 1 if made else 0)
        interrupt(None, 0)
        same(chatting.proceed(), expected)


def test_an_error_in_the_middle_can_be_gone_on_from(chatting, monkeypatch):
    from airllm_nb.errors import CheckpointError

    expected = run(chatting, SEEDED)
    with pytest.raises(Interrupted):
        run(chatting, SEEDED | {"write": StopAt(chatting, 3)})
    forward, model = type(chatting.model._hf).forward, chatting.model._hf

    def fail(*_, **__):
        raise CheckpointError("The disk fails.", "Repair it.")

    monkeypatch.setattr(type(model), "forward", fail)
    before = torch.get_rng_state()
    with pytest.raises(CheckpointError):
        chatting.proceed()
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(type(model), "forward", forward)
    same(chatting.proceed(), expected)


def seconds_of(call, *arguments):
    begin = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begin


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.parametrize("keep", ["all", "none"])
@pytest.mark.parametrize("ask", ["ask", "chat"])
@pytest.mark.parametrize("how", [GREEDY, SEEDED, UNSEEDED], ids=["greedy", "seeded", "unseeded"])
def test_at_random_moments(session, chat, how, ask, keep):
    """A real signal, wherever it hits; and again while it goes on."""
    load(session, chat, keep)
    expected = run(session, how, ask)
    whole = min(seconds_of(run, session, how, ask) for _ in range(3))  # on a busy machine the interrupts would come too late
    before = signal.signal(signal.SIGALRM, lambda *_: _thread.interrupt_main())
    outside = torch.get_rng_state()
    interrupted = 0

    def within(seconds, call, *how):
        nonlocal interrupted
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            answer = call(*how)
            signal.setitimer(signal.ITIMER_REAL, 0)
            time.sleep(0)
        except Interrupted:
            interrupted += 1
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return answer

    def late(seconds, call, *how):
        """The interrupt may come before the run or after it, where it is none of the session's business."""
        before = session.answer
        try:
            return within(seconds, call, *how)
        except KeyboardInterrupt:
            return call(*how) if session.answer is before else session.answer

    try:
        for step in range(MOMENTS):
            session.forget()
            written = Written()
            first, again = how | {"write": written.append}, {"write": written.append}
            answer = late(1e-4 + whole * step / MOMENTS, run, session, first, ask)
            if answer is None and not session.can_proceed:  # it came before anything was asked
                answer = run(session, first, ask)
            while answer is None:
                assert session.can_proceed
                torch.manual_seed(step)
                outside = torch.get_rng_state()
                answer = late(whole / 3 + 1e-3, proceed, session, again)
                assert torch.equal(torch.get_rng_state(), outside)
            same(answer, expected)
            assert written.text.replace("\n", "") == expected.text.replace("\n", "")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > MOMENTS // 4


def test_what_was_cut_goes_on_for_as_many_tokens_again(chatting):
    for how in (GREEDY, SEEDED):
        expected = run(chatting, how | {"max_new_tokens": 30})
        assert len(run(chatting, how).token_ids) == 10
        assert chatting.can_proceed
        answers = [chatting.proceed(), chatting.proceed()]
        assert [len(answer.token_ids) for answer in answers] == [20, 30]
        assert [answer.settings.max_new_tokens for answer in answers] == [20, 30]
        same(answers[1], expected)


def test_up_to_the_end_of_the_context(session, plain):
    load(session, plain)
    assert len(session.ask("x" * 25, max_new_tokens=10).token_ids) == 10
    rest = Written()
    assert len(session.proceed(write=rest.append).token_ids) == 15
    assert rest.text.startswith("(The context of 40 tokens leaves room for 5, not 10.)\n")
    for _ in range(2):
        with pytest.raises(PromptError, match="The text has 40 tokens, and plain has a context of 40"):
            session.proceed()
    assert len(session.answer.token_ids) == 15


def test_nothing_to_go_on_with(session, chat):
    with pytest.raises(SessionError, match="No model is loaded"):
        session.proceed()
    load(session, chat)
    assert not session.can_proceed
    with pytest.raises(SessionError, match="nothing to go on with"):
        session.proceed()
    session.model.generation_config.suppress_tokens = None
    ids = session.ask("Hello", max_new_tokens=12).token_ids
    session.model.generation_config.eos_token_id = ids[8]
    assert session.ask("Hello", max_new_tokens=12).stopped == "end"
    assert not session.can_proceed
    with pytest.raises(SessionError, match="nothing to go on with"):
        session.proceed()
    session.model.generation_config.eos_token_id = 257
    session.ask("Hello", max_new_tokens=3)
    assert session.can_proceed
    load(session, chat)
    assert not session.can_proceed


def test_a_refused_prompt_keeps_what_could_be_gone_on_with(chatting):
    expected = chatting.ask("Hello", max_new_tokens=20)
    chatting.ask("Hello", max_new_tokens=10)
    for prompt in ("", "x" * 5000):
        with pytest.raises(PromptError):
            chatting.ask(prompt)
        with pytest.raises(PromptError):
            chatting.chat(prompt)
    same(chatting.proceed(), expected)


def test_what_acts_at_the_beginning_does_so_once(chatting):
    first, *_, eighth, _, _ = run(chatting, GREEDY).token_ids
    chatting.model.generation_config.begin_suppress_tokens = [first, eighth, *range(0, 256, 2)]
    chatting.model.generation_config.repetition_penalty = 1.3
    expected = run(chatting, GREEDY)
    assert expected.token_ids[0] % 2
    assert not all(number % 2 for number in expected.token_ids)
    at = next(n for n, number in enumerate(expected.token_ids) if number % 2 == 0)
    with pytest.raises(Interrupted):
        run(chatting, GREEDY | {"write": StopAt(chatting, at)})
    same(chatting.proceed(), expected)


def test_stop_text_in_two_halves(chatting):
    """One half before the break, one after it: shown as what it seemed to be, and no part of the answer."""
    whole = chatting.ask("Hello", max_new_tokens=40).text
    stop = whole[10:13]
    expected = chatting.ask("Hello", max_new_tokens=40, stop=(stop,))
    assert expected.stopped == "stop"
    for cut in range(1, len(expected.token_ids)):
        part, rest = Written(), Written()
        answer = chatting.ask("Hello", max_new_tokens=cut, stop=(stop,), write=part.append)
        assert answer.stopped == "length"
        chatting._last.run._sampling = dataclasses.replace(chatting._last.run._sampling, max_new_tokens=40 - cut)
        same(chatting.proceed(write=rest.append), expected)
        assert (part.text.removesuffix("\n") + rest.text).startswith(expected.text)


def test_half_a_character_before_the_break(chatting, monkeypatch):
    """What is shown in its place is no part of the answer."""
    from airllm_nb.engine import decoding

    text = "né€😀!"

    class Dictated:
        """A logits processor that has a text written."""

        def __init__(self, _model):
            pass

        def __call__(self, ids, scores):
            scores[:] = 0
            scores[0, text.encode()[ids.shape[1] - 5]] = 1
            return scores

    monkeypatch.setattr(decoding, "_Finite", Dictated)
    total = len(text.encode())
    for cut in range(1, total):
        part, rest = Written(), Written()
        chatting.ask("Hello", raw=True, max_new_tokens=cut, write=part.append)
        chatting._last.run._sampling = dataclasses.replace(chatting._last.run._sampling, max_new_tokens=total - cut)
        assert chatting.proceed(write=rest.append).text == text
        assert part.text.removesuffix("\n").rstrip("\ufffd") + rest.text.removesuffix("\n") == text


def test_an_ask_that_has_ended_keeps_nothing(chatting):
    ids = chatting.ask("Hello", max_new_tokens=12).token_ids
    chatting.model.generation_config.eos_token_id = ids[8]
    chatting.ask("Hello", max_new_tokens=12)
    assert chatting._last.run is None
    assert chatting.conversation.last is None


def test_a_stop_before_the_prompt_is_read_begins_anew(chatting, monkeypatch):
    expected = run(chatting, SEEDED)
    from airllm_nb.engine import prompts

    with monkeypatch.context() as patch:
        patch.setattr(prompts, "encode", lambda *_, **__: _thread.interrupt_main() or time.sleep(1))
        with pytest.raises(Interrupted, match="before the first token") as stopped:
            run(chatting, SEEDED)
    assert stopped.value.answer.token_ids == ()
    same(chatting.proceed(), expected)


def test_the_magic(shell, chat):
    shell.run(f"%airllm load {chat} --device cpu --dtype float32")
    assert "nothing to go on with" in shell.fail("%airllm continue")
    shown = shell.run("%%airllm --max-new-tokens 20\nHello")
    text = shell["_airllm"].text
    assert shown == text + "\n"
    part = shell.run("%%airllm --max-new-tokens 10 -o answer\nHello")
    assert len(shell["answer"].token_ids) == 10
    shell.fail("%%airllm -o other\n \n")
    rest = shell.run("%airllm continue")
    assert part.removesuffix("\n") + rest == shown
    assert shell["answer"] is shell["_airllm"]
    assert shell["answer"].text == text
    assert "other" not in shell.ip.user_ns
    shell.magics.session.chat("Hello", max_new_tokens=5, write=lambda _: None)
    answer = shell["answer"]
    shell.run("%airllm continue")
    assert shell["answer"] is answer  # it is of the cell, which this was not
    assert len(shell["_airllm"].token_ids) == 10
    assert "unrecognized arguments" in shell.fail("%airllm continue now")


def test_what_was_stopped_is_not_kept_by_its_traceback(shell, chat):
    """IPython keeps that of the last exception, with all frames."""
    shell.run(f"%airllm load {chat} --device cpu --dtype float32")
    session = shell.magics.session
    session._last._write = lambda _text: session.stop()
    for after in ("%airllm unload", f"%airllm load {chat} --device cpu --dtype float32", "%%airllm --max-new-tokens 1\nHello"):
        if not session.loaded:
            shell.run(f"%airllm load {chat} --device cpu --dtype float32")
        shell.fail("%%airllm --max-new-tokens 20\nHello")
        keys = weakref.ref(next(tensors(session._last.run.cache)))
        shell.run(after)
        gc.collect()
        assert sys.last_value is not None
        assert keys() is None, after


def tensors(kept):
    for part in cache._parts(kept):
        yield from cache._tensors(vars(part))
