"""Many prompts share their passes and get the texts that each would get alone; what is complete survives whatever happens."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES
from seen import batches, not_read, passes
from tiny import make_checkpoint

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import dynamic, padding, versions
from airllm_nb.engine import batch_sizes, memory
from airllm_nb.engine.prompts import encode
from airllm_nb.errors import AirLLMError, PromptError
from airllm_nb.events import BatchBegin, BatchEnd, PassBegin

PROMPTS = ["Why is the sky blue?", "Hi", "Tell me of the sea.", "Hi", "One, two, three, four, five", "abcdefgh", "xy"]
NEW = 10
KINDS = ["llama", "llama-dynamic", "qwen2", "qwen2-window", "mistral", "mixtral", "gemma2", "gemma3", "cohere2", "phi3-longrope",
         "gpt2", "gpt-neox", "falcon-rw", "qwen3-next"]  # fmt: skip


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Return a function that gives a model of a family, all of whose layers stream, or skips where it cannot be had."""
    folder = tmp_path_factory.mktemp("families")
    models = {}

    def get(kind, name="", **changes):
        if (kind, name) not in models:
            try:
                made = make_checkpoint(
                    folder / (name or kind), raw=FAMILIES[kind], dtype=torch.float32, tokenizer=True, **changes
                )
                least = plan(made, device="cpu", dtype="float32").least
                models[kind, name] = LayeredModel.from_pretrained(made, device="cpu", dtype="float32", memory=least)
            except (AirLLMError, ValueError) as error:
                pytest.skip(f"not on this version: {error}")
        models[kind, name].progress = None
        return models[kind, name]

    yield get
    for model in models.values():
        model.close()


@pytest.fixture
def model(families):
    return families("llama")


@pytest.fixture
def told(model):
    """All events of the model from now on."""
    events = []
    model.progress = events.append
    return events


def alone(model, prompt, **more):
    """What generate gives for one prompt, to a model that has not seen another one."""
    dynamic.forget(model)
    ids = torch.tensor([encode(model, prompt, None, raw=True)])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 257} | more
    new = model.generate(ids, **options)[0, ids.shape[1] :]
    return model.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_each_prompt_alone(families, kind):
    model = families(kind)
    texts = model.map(PROMPTS, max_new_tokens=NEW, raw=True)
    assert texts == [alone(model, prompt) for prompt in PROMPTS]
    assert texts == model.map(PROMPTS, max_new_tokens=NEW, raw=True, batch=1)
    assert len(set(texts)) > 2 or kind == "falcon-rw"  # or nothing would be told by their being equal


def test_a_dynamic_rotary_embedding_forgets_longer_texts(families):
    model = families("llama-dynamic")
    with LayeredModel.from_pretrained(model.path, device="cpu", dtype="float32") as fresh:
        expected = fresh.map(["Why is the sky blue?"], max_new_tokens=NEW, raw=True)
    texts = model.map(["One, two, three, four, five", "Why is the sky blue?"], max_new_tokens=NEW, raw=True)
    assert texts[1:] == expected


def measured():
    """One family for each type that is padded: the one with a sliding window, if there is one."""
    slides = sorted(FAMILIES, key=lambda name: bool(FAMILIES[name].get("sliding_window")))
    plain = [name for name in slides if name not in ("phi3-longrope", "phi4", "llama-dynamic", "internlm", "stablelm-dynamic")]
    return {FAMILIES[name]["model_type"]: name for name in plain}


@pytest.mark.parametrize("model_type", padding.PADDED)
def test_scores_of_padded_rows_are_those_of_each_alone(tmp_path, model_type):
    """The evidence for the table: texts may be equal by chance where scores are not."""
    raw = FAMILIES[measured()[model_type]]
    rows = [list(prompt.encode()) for prompt in PROMPTS]

    def scores(rows):
        width = max(map(len, rows))
        ids = torch.tensor([ids[:1] * (width - len(ids)) + ids for ids in rows])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=257,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(out.scores, 1).clamp(-100, 100)

    try:
        model = LayeredModel.from_pretrained(
            make_checkpoint(tmp_path / "model", raw=raw, dtype=torch.float32), device="cpu", dtype="float32"
        )
    except (AirLLMError, ValueError) as error:
        pytest.skip(f"not on this version: {error}")
    with model:
        if not padding.exact(model, max(map(len, rows)) + NEW):
            pytest.skip("is not padded on this version")
        assert torch.allclose(scores(rows), torch.cat([scores([ids]) for ids in rows]), rtol=0, atol=1e-3)


def test_some_types_are_always_alone():
    def kind(name):
        return SimpleNamespace(config=SimpleNamespace(model_type=name))

    assert padding.rows(kind("llama"), 8) == 8
    assert padding.rows(kind("rwkv"), 8) == 1


def test_one_pass_serves_all(model, told):
    texts = model.map(PROMPTS, max_new_tokens=NEW, raw=True)
    assert passes(told) <= NEW
    assert batches(told) == [6]  # one of the seven comes twice
    begin, end = (event for event in told if type(event) in (BatchBegin, BatchEnd))
    assert (begin.done, begin.computed, begin.total, begin.tokens) == (0, 0, 7, NEW)
    assert (end.done, end.computed, end.total) == (7, 7, 7)
    assert end.texts == dict(enumerate(texts))
    told.clear()
    model.map(PROMPTS, max_new_tokens=NEW, raw=True, batch=4)
    assert batches(told) == [4, 2]
    assert told  # and the listener is still there
    assert model.progress == told.append


def test_a_listener_of_its_own(model, told):
    heard = []
    model.map(["a"], max_new_tokens=1, raw=True, progress=heard.append)
    assert heard
    assert not not_read(told)
    assert model.progress == told.append


def test_without_padding_rows_of_one_length_share(model, told, monkeypatch):
    expected = model.map(PROMPTS, max_new_tokens=NEW, raw=True)
    told.clear()
    monkeypatch.setattr(padding, "PADDED", {})
    assert model.map([*PROMPTS, "ab"], max_new_tokens=NEW, raw=True)[:-1] == expected
    assert batches(told) == [1, 1, 1, 1, 3]  # "Hi", "xy", "ab"


@pytest.mark.parametrize("rule", [{"no_repeat_ngram_size": 2}, {"bad_words_ids": [[104, 105]]}])
def test_what_would_count_padding_goes_without(model, told, monkeypatch, rule):
    for name, value in rule.items():
        monkeypatch.setattr(model.generation_config, name, value)
    texts = model.map(PROMPTS, max_new_tokens=NEW, raw=True)
    assert max(batches(told)) == 2
    assert texts == [alone(model, prompt) for prompt in PROMPTS]


def test_a_repetition_penalty_counts_no_padding(model, told, monkeypatch):
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 3.0)
    texts = model.map(PROMPTS, max_new_tokens=NEW, raw=True)
    assert batches(told) == [6]
    assert texts == [alone(model, prompt) for prompt in PROMPTS]


def test_a_row_that_ends_does_not_cut_the_others(model, monkeypatch):
    whole = model.map(PROMPTS, max_new_tokens=NEW, raw=True)
    end = next(text[3] for text in whole if text[3].isascii() and not all(text[3] in other for other in whole))
    monkeypatch.setattr(model.generation_config, "eos_token_id", [257, ord(end)])
    ended = model.map(PROMPTS, max_new_tokens=NEW, raw=True)
    assert ended == [alone(model, prompt) for prompt in PROMPTS]
    assert len({len(text) for text in ended}) > 1
    monkeypatch.setattr(model.generation_config, "eos_token_id", 257)
    assert model.map(PROMPTS, max_new_tokens=NEW, raw=True, stop=[end]) == [text.partition(end)[0] for text in whole]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], ["Hello", "Worl!", "abcde"]])
def test_a_row_ends_at_a_stop_string_of_the_checkpoint(families, monkeypatch, prompts):
    model = families("llama", "padded-with-text")
    model.tokenizer.pad_token = "!"  # an ordinary token, with which transformers fills rows that have ended
    whole = model.map(prompts, max_new_tokens=NEW, raw=True)
    end = next(character for character in whole[0][2:] if character.isascii())
    monkeypatch.setattr(model.generation_config, "stop_strings", [end])
    ended = model.map(prompts, max_new_tokens=NEW, raw=True)
    assert ended == [alone(model, prompt, tokenizer=model.tokenizer) for prompt in prompts]
    assert len(ended[0]) < len(whole[0])


def test_widths_that_differ_by_layer(model, monkeypatch):
    monkeypatch.setitem(vars(model.config), "intermediate_size", [16, 32, 16, 32])  # as Gemma 3n's
    assert len(model.map(["a"], max_new_tokens=1, raw=True)) == 1


def test_nothing_comes_between_forgetting_and_generating(model, monkeypatch):
    held = []
    monkeypatch.setattr(dynamic, "forget", lambda model: held.append(model._runtime.lock._is_owned()))
    model.map(["a"], max_new_tokens=1, raw=True)
    assert held == [True]


def test_two_maps_at_once_leave_no_listener(model):
    inside = threading.Event()

    def prompts():
        inside.set()
        yield "a"

    second = threading.Thread(target=lambda: model.map(prompts(), max_new_tokens=2, raw=True))

    def listen(event):
        if type(event) is PassBegin and not inside.is_set():
            second.start()
            assert inside.wait(30)

    model.map(["b"], max_new_tokens=2, raw=True, progress=listen)
    second.join()
    assert model.progress is None


def test_a_closed_model_says_so_first(families):
    with LayeredModel.from_pretrained(families("llama").path, device="cpu", dtype="float32") as model:
        pass
    with pytest.raises(AirLLMError, match="was unloaded"):
        model.map(["a" * 1000])


def test_a_model_without_padding_token(families):
    model = families("gpt2", "no-padding", pad_token_id=None)
    tokenizer = model.tokenizer
    tokenizer.pad_token = None
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    texts = model.map(PROMPTS, max_new_tokens=NEW, raw=True)
    assert texts == [alone(model, prompt) for prompt in PROMPTS]


def test_the_chat_template(model):
    ids = encode(model, "Hi", "Be brief.", raw=False)
    asked = [model.tokenizer.decode(ids)]
    assert model.map(["Hi"], system="Be brief.", max_new_tokens=NEW) == model.map(asked, raw=True, max_new_tokens=NEW)


def test_sampling(model):
    options = {"max_new_tokens": NEW, "raw": True, "temperature": 1.0}
    state = torch.get_rng_state()
    first = model.map(["Hi"] * 4, seed=1, **options)
    assert first == model.map(["Hi"] * 4, seed=1, **options)
    assert first != model.map(["Hi"] * 4, seed=2, **options)
    assert len(set(first)) > 1  # equal prompts are not equal texts
    neighbour = [model.map(["Hi"] * 4, seed=seed, batch=1, **options) for seed in (1, 2)]
    assert not set(neighbour[0]) & set(neighbour[1])
    assert torch.equal(torch.get_rng_state(), state)
    model.map(["Hi"], **options)
    assert not torch.equal(torch.get_rng_state(), state)


def test_prompts_of_any_kind(model):
    class Column(list):
        """As a pandas Series is: it can be gone through, and has no columns."""

    expected = model.map(["a", "bc"], max_new_tokens=2, raw=True)
    for prompts in (("a", "bc"), Column(["a", "bc"]), (text for text in ("a", "bc"))):
        assert model.map(prompts, max_new_tokens=2, raw=True) == expected
    assert model.map([]) == []


class Table(list):
    columns = ("question",)


@pytest.mark.parametrize(
    ("prompts", "options", "cause"),
    [
        ("one text", {}, "are one text"),
        ({"a": 1}, {}, "are a dict"),
        (Table(["question"]), {}, "are a Table"),
        (3, {}, "are a int"),
        (["a", 3.5], {}, "Prompt 1 .* is no text, but float"),
        (["a", " "], {}, "Prompt 1 .*no prompt"),
        (["a", "b" * 200], {}, "Prompt 1 .*200 tokens"),
        (["a"], {"max_new_tokens": 500}, "Prompt 0 .*500 new ones"),
        (["a"], {"max_new_tokens": 0}, "max-new-tokens is 0"),
        (["a"], {"batch": 0}, "batch is 0"),
        (["a"], {"batch": True}, "batch is True"),
        (["a"], {"batch": 1.5}, "batch is 1.5"),
        (["a"], {"stop": "abc"}, "stop is 'abc'"),
        (["a"], {"stop": None}, "stop is None"),
        (["a"], {"stop": [5]}, r"stop is \[5\]"),
        (["a"], {"max_new_tokens": 1.5}, "max-new-tokens is 1.5, which is no whole number"),
        (["a"], {"max_new_tokens": True}, "max-new-tokens is True"),
        (["a"], {"max_new_tokens": None}, "max-new-tokens is None"),
        (["a"], {"temperature": "0.7"}, "temperature is '0.7', which is no number"),
        (["a"], {"temperature": None}, "temperature is None"),
        (["a"], {"temperature": float("nan")}, "temperature is nan"),
        (["a"], {"temperature": 1.0, "top_p": "1"}, "top-p is '1'"),
        (["a"], {"temperature": 1.0, "seed": 1.5}, "seed is 1.5"),
        (["a"], {"system": 5}, "system prompt is no text, but int"),
        (["a"], {"raw": "no"}, "raw is 'no'"),
        (["a"], {"progress": 5}, "progress is 5"),
        (np.array("a"), {}, "are a ndarray"),
        (["a"], {"batch": "all"}, "batch is 'all'"),
        (["a"], {"top_p": 0.5}, "top-p has no effect"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_computed(model, told, prompts, options, cause):
    with pytest.raises(PromptError, match=cause):
        model.map(prompts, **{"max_new_tokens": 2, "raw": True} | options)
    assert not not_read(told)


def test_numbers_of_any_library(model):
    expected = model.map(["a", "bc"], max_new_tokens=2, raw=True, temperature=0.5, seed=1, batch=2)
    numbers = {"max_new_tokens": np.int64(2), "temperature": np.float32(0.5), "seed": np.int32(1), "batch": np.int64(2)}
    assert model.map(["a", "bc"], raw=True, **numbers) == expected


def test_the_batch_is_as_large_as_memory_allows(model, told, monkeypatch):
    prompts = [f"{number:02}" for number in range(50)]
    model.map(prompts, max_new_tokens=2, raw=True)
    assert batches(told) == [batch_sizes.MOST_ROWS, 50 - batch_sizes.MOST_ROWS]
    told.clear()
    each = 2 * 4 * 2 * 16 * 4 * 4  # keys and values, layers, heads, width, tokens, bytes: of the KV caches alone
    monkeypatch.setattr(memory, "available", lambda *_, **__: (memory.ACTIVATIONS + each * 40, "available memory"))
    model.map(prompts, max_new_tokens=2, raw=True)
    assert 1 <= max(batches(told)) < 20
    told.clear()
    monkeypatch.setattr(memory, "available", lambda *_, **__: (0, "available memory"))
    model.map(prompts[:3], max_new_tokens=2, raw=True)
    assert batches(told) == [1, 1, 1]


@pytest.mark.skipif(versions.installed() < (4, 45), reason="an older transformers does not take the option")
def test_what_transformers_refuses_is_one_line(model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "min_p", 7.0)
    with pytest.raises(AirLLMError, match="refuses to generate"):
        model.map(["a"], max_new_tokens=2, raw=True, temperature=1.0)
