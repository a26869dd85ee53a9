"""Turns that keep the KV cache answer as a fresh run over the whole conversation does."""

import gc
import weakref

import pytest
import torch
import transformers
from tiny import CONFIGS, LAYERS, budgets, make_checkpoint

from airllm_nb import plan
from airllm_nb.compat import cache, versions
from airllm_nb.errors import PromptError, UnsupportedError
from airllm_nb.events import PassBegin
from airllm_nb.notebook.one_at_a_time import SessionError
from airllm_nb.notebook.renderers import SilentRenderer
from airllm_nb.notebook.session import Session
from airllm_nb.notebook.summary import Interrupted

OTHERS = [*range(32), *range(127, 259)]  # all but ASCII: each token is a character, and a character is a token
WINDOW = 6
LONG = {"max_position_embeddings": 512}
KINDS = ["llama", "mistral", "qwen2", "mixtral"]
if versions.installed() >= (4, 56):
    KINDS.append("gemma3_text")
GEMMA = CONFIGS["llama"] | {
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": 16, "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2), "query_pre_attn_scalar": 16,
    "cache_implementation": "hybrid",
}  # fmt: skip
MARKS_THE_LAST = (
    "{% for message in messages %}{{ '<last>' if loop.last else '<early>' }}{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def session():
    session = Session(SilentRenderer, lambda _: None)
    yield session
    session.unload()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("gemma") / "gemma", raw=GEMMA, tokenizer=True, **LONG)


@pytest.fixture
def folder(checkpoint, request):
    """Return a function that gives a checkpoint of a kind that can talk."""

    def get(kind):
        return request.getfixturevalue("gemma") if kind == "gemma3_text" else checkpoint(kind, tokenizer=True, **LONG)

    return get


def load(session, path, keep="all"):
    memory = budgets(plan(path, device="cpu", dtype="float32"))[keep]
    session.load(str(path), device="cpu", dtype="float32", memory=memory)
    session.model.generation_config.suppress_tokens = OTHERS


class Fresh:
    """Plain transformers, which reads everything every time."""

    def __init__(self, path):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path).float()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def answer(self, messages, tokens=8):
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids, mask = prompt["input_ids"], prompt["attention_mask"]
        made = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=257, suppress_tokens=OTHERS
        )
        return made[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("keep", ["all", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_turn_is_a_fresh_run(session, folder, kind, keep):
    """Sliding windows are passed in the first turn."""
    load(session, folder(kind), keep)
    fresh, messages, total = Fresh(folder(kind)), [], 0
    conversation = session.conversation
    for turn, prompt in enumerate((" Hello ", "And then?", "Why?")):
        messages.append({"role": "user", "content": prompt.strip()})
        answer = session.chat(prompt, max_new_tokens=8)
        assert list(answer.token_ids) == fresh.answer(messages)
        messages.append({"role": "assistant", "content": answer.text})
        assert conversation.messages == messages
        assert conversation.reused == (total + 7 if turn else 0)  # all but the last id of the answer
        assert conversation.note == ""
        total = answer.prompt_tokens
        assert cache.length(conversation.last.cache) == total + 7


def passes(session, *how, **options):
    """Return the answer of a turn, and how many tokens each pass computed."""
    from airllm_nb.notebook import progress

    seen, call = [], progress.Progress.__call__

    def listen(self, event):
        if type(event) is PassBegin:
            seen.append(event.tokens)
        call(self, event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.Progress, "__call__", listen)
        return session.chat(*how, **options), seen


def test_only_what_is_new_is_computed(session, folder):
    load(session, folder("llama"))
    first, seen = passes(session, "Hello", max_new_tokens=8)
    assert seen == [first.prompt_tokens] + 7 * [1]
    second, seen = passes(session, "Hello", max_new_tokens=8)
    assert seen == [second.prompt_tokens - session.conversation.reused] + 7 * [1]
    assert session.conversation.reused == first.prompt_tokens + 7


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_an_edited_message(session, folder, kind):
    """What both begin with is reused, unless a sliding window has passed it; the note says so."""
    load(session, folder(kind))
    fresh, conversation = Fresh(folder(kind)), session.conversation
    session.chat("What is it?", max_new_tokens=8)
    session.chat("Who is it?", max_new_tokens=8)
    conversation.messages[0]["content"] = "What was it?"
    answer = session.chat("Where?", max_new_tokens=8)
    assert list(answer.token_ids) == fresh.answer(conversation.messages[:-1])
    windowed = kind == "mistral" and "config" in transformers.DynamicCache.__init__.__code__.co_varnames
    assert conversation.reused == (0 if windowed else len("<user>What "))
    assert ("begins with the first 11, and the state" in conversation.note) == windowed
    answer = session.chat("When?", max_new_tokens=8)
    assert list(answer.token_ids) == fresh.answer(conversation.messages[:-1])
    assert conversation.note == ""
    conversation.messages.clear()
    assert list(session.chat("Where?", max_new_tokens=8).token_ids) == fresh.answer(conversation.messages[:-1])


def test_a_short_text_in_a_sliding_window_is_rolled_back(session, checkpoint):
    path = checkpoint("mistral", tokenizer=True, sliding_window=60, **LONG)
    load(session, path)
    fresh, conversation = Fresh(path), session.conversation
    session.chat("What?", max_new_tokens=8)
    conversation.messages[1]["content"] = "No."
    answer = session.chat("Who was it that came by, and what did they say?", max_new_tokens=8)
    assert list(answer.token_ids) == fresh.answer(conversation.messages[:-1])
    assert conversation.reused == len("<user>What?\n<assistant>")
    assert conversation.note == ""


def test_a_template_that_rewrites_earlier_turns(session, folder):
    load(session, folder("llama"))
    fresh, conversation = Fresh(folder("llama")), session.conversation
    fresh.tokenizer.chat_template = session.model.tokenizer.chat_template = MARKS_THE_LAST
    for prompt in ("What is it?", "Who?", "Why?"):
        answer = session.chat(prompt, max_new_tokens=8)
        assert list(answer.token_ids) == fresh.answer(conversation.messages[:-1])
    assert 0 < conversation.reused < answer.prompt_tokens // 2
    assert conversation.note == ""


def test_a_system_prompt_stays_until_another_comes(session, folder):
    load(session, folder("llama"))
    fresh, conversation = Fresh(folder("llama")), session.conversation
    session.chat("Hello", system="Be kind.", max_new_tokens=4)
    session.chat("Hello", max_new_tokens=4)
    assert [message["role"] for message in conversation.messages] == ["system"] + 2 * ["user", "assistant"]
    answer = session.chat("Hello", system="Be brief.", max_new_tokens=8)
    assert [message["role"] for message in conversation.messages] == ["system"] + 3 * ["user", "assistant"]
    assert conversation.messages[0]["content"] == "Be brief."
    assert list(answer.token_ids) == fresh.answer(conversation.messages[:-1])
    assert conversation.reused == len("<system>Be ")


def test_without_a_chat_template_the_turns_are_one_text(session, plain):
    load(session, plain)
    first = session.chat("Once upon ", max_new_tokens=5)
    second = session.chat(" a time", max_new_tokens=5)
    assert session.conversation.reused == len("Once upon ") + 4
    assert second.token_ids == session.ask("Once upon " + first.text + " a time", max_new_tokens=5).token_ids
    with pytest.raises(PromptError, match="needs a chat template"):
        session.chat("Hello", system="Be kind.")


def test_a_full_context(session, plain):
    load(session, plain)
    session.chat("x" * 20, max_new_tokens=10)
    messages = list(session.conversation.messages)
    with pytest.raises(PromptError, match=r"has 50 tokens with this turn, and plain has a context of 40.*new conversation"):
        session.chat("x" * 20)
    assert session.conversation.messages == messages
    assert session.can_proceed
    session.forget()
    assert session.conversation.messages == []
    assert not session.can_proceed
    session.chat("x" * 20, max_new_tokens=10)


def test_a_turn_that_fails_is_no_part_of_it(session, folder, monkeypatch):
    from airllm_nb.engine import decoding

    load(session, folder("llama"))
    fresh, conversation = Fresh(folder("llama")), session.conversation
    session.chat("Hello", max_new_tokens=8)
    messages = [dict(message) for message in conversation.messages]

    class Broken:
        def __init__(self, _model):
            self.left = 3

        def __call__(self, _ids, scores):
            self.left -= 1
            if not self.left:
                raise UnsupportedError("What it computes is not a number.", "Load another.")
            return scores

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_Finite", Broken)
        with pytest.raises(UnsupportedError):
            session.chat("What?", max_new_tokens=8)
    assert conversation.messages == messages
    for prompt in ("", "half \ud800"):
        with pytest.raises(PromptError):
            session.chat(prompt)
    with pytest.raises(PromptError):
        session.chat("What?", max_new_tokens=0)
    assert conversation.messages == messages
    assert not session.can_proceed
    answer = session.chat("Who?", max_new_tokens=8)
    assert list(answer.token_ids) == fresh.answer(conversation.messages[:-1])
    assert conversation.reused == len("<user>Hello\n<assistant>") + 8 + len("\n<user>Wh")


def stopped_after(session, tokens, prompt):
    def write(_text):
        stopped_after.left -= 1
        if not stopped_after.left:
            session.stop()

    stopped_after.left = tokens
    with pytest.raises(Interrupted) as stopped:
        session.chat(prompt, max_new_tokens=8, write=write)
    return stopped.value.answer


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_stopped_turn_is_part_of_it_and_the_next_turn_goes_on(session, folder, kind):
    load(session, folder(kind))
    fresh, conversation = Fresh(folder(kind)), session.conversation
    session.chat("Hello", max_new_tokens=8)
    part = stopped_after(session, 3, "What?")
    assert conversation.messages[-2:] == [
        {"role": "user", "content": "What?"}, {"role": "assistant", "content": part.text}
    ]  # fmt: skip
    assert len(part.text) == 3
    answer = session.chat("Who?", max_new_tokens=8)
    assert list(answer.token_ids) == fresh.answer(conversation.messages[:-1])
    assert conversation.reused == part.prompt_tokens + 2
    assert [message["role"] for message in conversation.messages] == 3 * ["user", "assistant"]
    stopped_after(session, 3, "Why?")
    session.ask("Something else", max_new_tokens=3)  # has a cache of its own
    answer = session.chat("Hm?", max_new_tokens=8)
    assert list(answer.token_ids) == fresh.answer(conversation.messages[:-1])
    assert conversation.note == ""


def test_another_model_is_another_conversation(session, folder):
    load(session, folder("llama"))
    session.chat("Hello", max_new_tokens=3)
    kept = weakref.ref(session.conversation.last.cache)
    load(session, folder("llama"))
    gc.collect()
    assert kept() is None
    assert session.conversation.messages == []
    session.chat("Hello", max_new_tokens=3)
    kept = weakref.ref(session.conversation.last.cache)
    session.forget()
    assert kept() is None  # at once
    session.chat("Hello", max_new_tokens=3)
    kept = weakref.ref(session.conversation.last.cache)
    session.unload()
    assert kept() is None
    with pytest.raises(SessionError, match="No model is loaded"):
        session.chat("Hello")


def test_a_cache_that_cannot_be_kept(session, folder, monkeypatch):
    """As on versions whose GPT-2 knows only tuples: everything is read again, and the note says so."""
    monkeypatch.setattr(cache, "new", lambda _: None)
    load(session, folder("llama"))
    fresh, conversation = Fresh(folder("llama")), session.conversation
    session.chat("Hello", max_new_tokens=8)
    assert conversation.note == ""
    answer = session.chat("What?", max_new_tokens=8)
    assert list(answer.token_ids) == fresh.answer(conversation.messages[:-1])
    assert conversation.reused == 0
    assert "does not let llama0 keep its state" in conversation.note.replace(session.model.name, "llama0")
    part = stopped_after(session, 3, "Who?")
    answer = session.proceed()
    assert list(answer.token_ids) == fresh.answer(conversation.messages[:-1])
    assert answer.text.startswith(part.text)


def test_the_random_state_is_not_touched_by_a_greedy_turn(session, folder):
    load(session, folder("llama"))
    before = torch.get_rng_state()
    session.chat("Hello", max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cache_that_counts_otherwise_is_not_reused(session, folder, monkeypatch):
    """As CPM-Ant's, which begins with positions of its own."""
    load(session, folder("llama"))
    fresh, conversation = Fresh(folder("llama")), session.conversation
    session.chat("Hello", max_new_tokens=8)
    length = cache.length
    with monkeypatch.context() as patch:
        patch.setattr(cache, "length", lambda kept: length(kept) and length(kept) + 32)
        assert conversation.last.held() == []
        answer = session.chat("What?", max_new_tokens=8)
    assert list(answer.token_ids) == fresh.answer(conversation.messages[:-1])
    assert conversation.reused == 0
    assert conversation.note == "Nothing of it is in memory: the whole conversation is read again."
