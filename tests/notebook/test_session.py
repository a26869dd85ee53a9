"""Asking: greedy or sampled, repeatable, within the context, and able to stop."""

import logging
import signal
import threading
import traceback

import pytest
import torch

from airllm_nb import LayeredModel
from airllm_nb.errors import PromptError
from airllm_nb.notebook.one_at_a_time import SessionError
from airllm_nb.notebook.renderers import SilentRenderer
from airllm_nb.notebook.session import Session
from airllm_nb.notebook.summary import Interrupted


@pytest.fixture
def chatting(session, chat):
    session.load(str(chat), device="cpu", dtype="float32")
    return session


def test_greedy_is_what_transformers_gives(chatting, chat, recwarn):
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(chat).float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = reference.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=257)
    answer = chatting.ask("Hello", max_new_tokens=20)
    assert list(answer.token_ids) == expected[0, prompt["input_ids"].shape[1] :].tolist()
    assert not [warning for warning in recwarn if "airllm" in str(warning.filename)]


def test_nothing_of_transformers_advice_is_shown(chatting, capfd):
    chatting.model.generation_config.temperature = 0.6  # as Llama 3 and Qwen publish it
    chatting.model.generation_config.top_p = 0.9
    chatting.model.generation_config.pad_token_id = None
    chatting.ask("Hello", max_new_tokens=2)
    chatting.ask("Hello", max_new_tokens=2, temperature=0.5, top_p=0.5)
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_with_unusual_defaults(chatting):
    expected = chatting.ask("Hello", max_new_tokens=6)
    chatting.model.generation_config.num_beams = 3  # cannot be streamed
    chatting.model.generation_config.use_cache = False
    chatting.model.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    for raw in (True, False):
        answer = chatting.ask("Hello", max_new_tokens=6, raw=raw)
        assert len(answer.token_ids) == 6
    assert answer.token_ids == expected.token_ids


def test_a_seed_repeats_and_disturbs_nothing(chatting):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    texts = [chatting.ask("Hello", max_new_tokens=12, temperature=1.0, seed=seed).text for seed in (3, 3, 4)]
    assert torch.equal(torch.rand(3), expected)
    assert texts[0] == texts[1] != texts[2]
    without = [chatting.ask("Hello", max_new_tokens=12, temperature=1.0).text for _ in range(2)]
    assert without[0] != without[1]


def test_stop_text_ends_the_run(chatting, written):
    whole = chatting.ask("Hello", max_new_tokens=40).text
    stop = whole[10:13]
    before = whole[: whole.index(stop)]
    written.clear()
    answer = chatting.ask("Hello", max_new_tokens=40, stop=("never in there", stop))
    assert answer.stopped == "stop"
    assert answer.text == before
    assert written.text.removesuffix("\n") == before.removesuffix("\n")
    assert len(answer.token_ids) < 40


def test_an_end_token_ends_the_run(chatting):
    ids = chatting.ask("Hello", max_new_tokens=40).token_ids
    chatting.model.generation_config.eos_token_id = [ids[8], 257]
    answer = chatting.ask("Hello", max_new_tokens=40)
    assert answer.token_ids == ids[: ids.index(ids[8]) + 1]
    assert answer.stopped == "end"
    assert chatting.ask("Hello", max_new_tokens=len(answer.token_ids)).stopped == "end"


def test_raw_and_system(chatting):
    assert chatting.ask("Hello", raw=True, max_new_tokens=1).prompt_tokens == 5
    assert chatting.ask(" Hello ", max_new_tokens=1).prompt_tokens == len("<user>Hello\n<assistant>")
    system = chatting.ask("Hello", system="Be kind", max_new_tokens=1)
    assert system.prompt_tokens == len("<system>Be kind\n<user>Hello\n<assistant>")
    chatting.model.tokenizer.chat_template = "{{ raise_exception('no system prompts') }}"
    with pytest.raises(PromptError, match="no system prompts"):
        chatting.ask("Hello", system="Be kind")


def test_the_context_limits_the_answer_and_says_so(session, plain, written):
    session.load(str(plain), device="cpu", dtype="float32")
    answer = session.ask("x" * 30)
    assert written.text.startswith("(The context of 40 tokens leaves room for 10, not 256.)\n")
    assert len(answer.token_ids) <= 10
    with pytest.raises(PromptError, match="40 tokens, and plain has a context of 40"):
        session.ask("x" * 40)


def test_one_run_at_a_time(chatting, written):
    """A second call, from another thread, is refused with a word; the first goes on."""
    refused = []

    def second():
        for call in (lambda: chatting.ask("Hi"), lambda: chatting.load("demo"), chatting.unload):
            try:
                call()
            except SessionError as error:
                refused.append(error)

    def write(text):
        written.append(text)
        if len(written) == 3:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    answer = chatting.ask("Hello", max_new_tokens=12, write=write)
    assert len(answer.token_ids) == 12
    assert [error.cause for error in refused] == ["The model is busy with another run."] * 3
    assert chatting.loaded


def test_a_listener_of_the_users_stays(chatting):
    heard = []
    chatting.model.progress = heard.append
    chatting.ask("Hello", max_new_tokens=2)
    assert chatting.model.progress == heard.append
    chatting.trace()
    assert chatting.model.progress == heard.append
    chatting.map(["a"], max_new_tokens=1)
    assert chatting.model.progress == heard.append


def test_a_listener_that_an_interrupt_has_left_behind_goes(chatting):
    def stale(_event):
        raise AssertionError

    stale.__module__ = "airllm_nb.notebook.generation"
    for call in (lambda: chatting.ask("Hello", max_new_tokens=2), chatting.trace):
        chatting.model.progress = stale
        call()
        assert chatting.model.progress is None


def test_a_thread_that_an_interrupt_has_kept_from_leaving_is_let_in_again(chatting):
    chatting._turns.enter()
    chatting.ask("Hello", max_new_tokens=1)
    assert not chatting.busy
    chatting._turns.enter()
    chatting.end()
    assert not chatting.loaded


def test_an_interrupt_keeps_the_text_so_far(chatting, written):
    whole = chatting.ask("Hello", max_new_tokens=20)
    written.clear()

    def write(text):
        written.append(text)
        if len(written) == 4:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        chatting.ask("Hello", max_new_tokens=20, write=write)
    answer = caught.value.answer
    assert chatting.answer is answer
    assert answer.stopped == "interrupted"
    assert 4 <= len(answer.token_ids) < 20
    assert whole.text.startswith(answer.text)
    assert answer.layers[0].passes >= 4
    assert chatting.ask("Hello", max_new_tokens=20).token_ids == whole.token_ids


def test_an_interrupt_while_loading_leaves_no_model(session, chat):
    class StopAtOnce(SilentRenderer):
        def draw(self, state):
            if state.kind == "load" and not state.ended:
                raise KeyboardInterrupt

    quiet, session._new_renderer = session._new_renderer, StopAtOnce
    with pytest.raises(Interrupted, match="no model is loaded"):
        session.load(str(chat), device="cpu", dtype="float32")
    assert not session.loaded
    session._new_renderer = quiet
    session.load(str(chat), device="cpu", dtype="float32")
    session.ask("Hello", max_new_tokens=2)


def test_an_interrupt_while_freeing_takes_effect_right_after(chatting):
    model = chatting.model
    closed = []

    def close():
        signal.raise_signal(signal.SIGINT)
        LayeredModel.close(model)
        closed.append(model)

    object.__setattr__(model, "close", close)
    with pytest.raises(Interrupted, match="stopped; no model is loaded"):
        chatting.unload()
    assert closed
    assert not chatting.loaded
    chatting.unload()


def test_an_interrupt_while_checking_keeps_the_model(chatting, chat, monkeypatch):
    from airllm_nb.engine import planning

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(planning, "choose", stop)
    with pytest.raises(Interrupted, match=f"stopped; {chat.name} is loaded"):
        chatting.load(str(chat))
    assert chatting.loaded


def test_a_checkpoint_without_tokenizer_says_so(session, checkpoint):
    session.load(str(checkpoint("llama")), device="cpu", dtype="float32")
    with pytest.raises(Exception, match="no tokenizer files"):
        session.ask("Hello")


def test_answers_have_a_short_constant_form(chatting):
    answer = chatting.ask("Hello", max_new_tokens=2)
    assert str(answer) == answer.text
    assert repr(answer) == f"Answer({answer.text!r}, tokens=2, stopped='length')"
    assert answer.tokens_per_second > 0


def test_stop_ends_a_run_before_the_next_layer(chatting, written):
    model = chatting.model
    expected = chatting.ask("Hello", max_new_tokens=8).text

    def write(text):
        written.append(text)
        chatting.stop()

    written.clear()
    with pytest.raises(Interrupted) as stopped:
        chatting.ask("Hello", max_new_tokens=8, write=write)
    text = stopped.value.answer.text
    assert written.text == text + "\n"  # the line is ended
    assert 0 < len(text) < len(expected)
    assert expected.startswith(text)
    assert not chatting.busy
    assert chatting.model is model
    assert chatting.ask("Hello", max_new_tokens=8).text == expected


def test_stop_ends_a_load_and_a_late_one_stops_nothing(session, chat):
    class Stopping(SilentRenderer):
        def draw(self, state):
            if state.kind == "load":
                session.stop()

    with pytest.raises(Interrupted, match="no model is loaded"):
        session.load(str(chat), device="cpu", dtype="float32", renderer=Stopping())
    assert not session.loaded
    session.stop()
    assert session.load(str(chat), device="cpu", dtype="float32") is session.model


class Interrupts(threading.Event):
    """An event at which the interrupt hits."""

    def clear(self):
        self.clear = super().clear
        raise KeyboardInterrupt


def test_an_interrupt_at_the_very_beginning_leaves_it_free():
    session = Session(SilentRenderer)
    session._turns.stop = session._last._stop = Interrupts()
    with pytest.raises(Interrupted):
        session.unload()
    assert not session.busy


def test_a_load_that_was_stopped_is_not_kept_by_its_traceback(chat):
    session = Session(SilentRenderer)

    class Stops(SilentRenderer):
        def draw(self, state):
            if state.kind == "load":
                session.stop()

    with pytest.raises(Interrupted) as stopped:
        session.load(str(chat), device="cpu", dtype="float32", renderer=Stops())
    frames = [frame for frame, _ in traceback.walk_tb(stopped.value.__context__.__traceback__)]
    loading = [frame for frame in frames if frame.f_code.co_name == "from_pretrained"]
    assert loading
    assert not any(frame.f_locals for frame in loading)


def test_an_interrupt_within_logging_leaves_it_free(chatting):
    class Interrupting(SilentRenderer):
        def draw(self, state):
            if state.passes_begun and not state.ended:
                logging._lock.acquire()  # as Python's logging does before 3.13
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        chatting.ask("Hello", max_new_tokens=8, renderer=Interrupting())
    other = threading.Thread(target=logging.getLogger("airllm_nb.test").setLevel, args=[logging.INFO], daemon=True)
    other.start()
    other.join(10)
    assert not other.is_alive()
