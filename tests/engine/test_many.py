"""Many prompts share their passes and get the texts that each would get alone; what is complete survives whatever happens."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from tiny import make_checkpoint

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import dynamic, padding, versions
from airllm_nb.engine import batch_sizes, memory
from airllm_nb.engine.prompts import encode
from airllm_nb.engine.results import ResultsError
from airllm_nb.errors import AirLLMError, PromptError
from airllm_nb.events import BatchBegin, BatchEnd, ComputeBegin, LayerRead, LayerReady, PassBegin

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


def alone(model, prompt):
    """What generate gives for one prompt, to a model that has not seen another one."""
    dynamic.forget(model)
    ids = torch.tensor([encode(model, prompt, None, raw=True)])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 257}
    new = model.generate(ids, **options)[0, ids.shape[1] :]
    return model.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def not_read(events):
    """All but what comes from the reading thread, which may still be at work for the pass before."""
    return [event for event in events if type(event) not in (LayerRead, LayerReady)]


def passes(events):
    return sum(type(event) is PassBegin for event in events)


def batches(events):
    return [event.rows for event in events if type(event) is BatchBegin]


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
        (["a"], {"batch": "all"}, "batch is 'all'"),
        (["a"], {"top_p": 0.5}, "top-p has no effect"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_computed(model, told, prompts, options, cause):
    with pytest.raises(PromptError, match=cause):
        model.map(prompts, raw=True, **{"max_new_tokens": 2} | options)
    assert not not_read(told)


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


# The file of results


@pytest.fixture
def file(tmp_path):
    return tmp_path / "results.jsonl"


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_what_is_in_the_file_is_not_computed_again(model, told, file):
    options = {"max_new_tokens": NEW, "raw": True, "results": file}
    expected = model.map(PROMPTS, max_new_tokens=NEW, raw=True)
    told.clear()
    assert model.map(PROMPTS[:3], **options) == expected[:3]
    assert sorted(line["index"] for line in lines(file)) == [0, 1, 2]
    told.clear()
    assert model.map(PROMPTS, **options) == expected
    assert batches(told) == [3]  # the fourth is the second once more
    assert {line["index"]: line["text"] for line in lines(file)} == dict(enumerate(expected))
    told.clear()
    assert model.map(PROMPTS, **options) == expected
    assert not passes(told)
    (found,) = not_read(told)
    assert found.texts == dict(enumerate(expected))


def test_a_line_that_was_not_written_to_its_end(model, file):
    options = {"max_new_tokens": NEW, "raw": True, "results": file, "batch": 2}
    expected = model.map(PROMPTS, **options)
    whole = file.read_bytes()
    for cut in (1, 10, len(whole.splitlines()[-1]), len(whole) - 3):
        file.write_bytes(whole[:-cut])
        assert model.map(PROMPTS, **options) == expected
        assert {line["index"]: line["text"] for line in lines(file)} == dict(enumerate(expected))


def test_a_file_of_something_else_is_refused_and_not_touched(model, families, file):
    options = {"max_new_tokens": 2, "raw": True, "results": file}
    model.map(PROMPTS, **options)
    before = file.read_bytes()
    for prompts, changed, cause in (
        (PROMPTS[::-1], {}, "another prompt"),
        (PROMPTS[:2], {}, "there are 2 prompts"),
        (PROMPTS, {"raw": False}, "another prompt"),
        (PROMPTS, {"max_new_tokens": 3}, "other settings"),
        (PROMPTS, {"stop": ["x"]}, "other settings"),
    ):
        with pytest.raises(ResultsError, match=cause) as refusal:
            model.map(prompts, **options | changed)
        assert "another file" in refusal.value.remedy
        assert file.read_bytes() == before
    with pytest.raises(ResultsError, match="another model"):
        families("mistral").map(PROMPTS, **options)
    for text in (
        "hello\n",
        '{"index": 0}\n',
        '{"index": "0", "key": "a-b-c", "text": ""}\n',
        "[]\n",
        "\n",
        "\xff\n",
        "my notes",
        '{"a": 1}',
    ):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(ResultsError, match="Line 1 .* is no result"):
            model.map(PROMPTS, **options)
        assert file.read_bytes() == text.encode("latin-1")


def test_other_weights_of_the_same_shape_are_another_model(families, file):
    options = {"max_new_tokens": 2, "raw": True, "results": file}
    model = families("llama", "copy")
    model.map(["a"], **options)
    weights = next(model.path.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with LayeredModel.from_pretrained(model.path, device="cpu", dtype="float32") as trained, pytest.raises(ResultsError):
        trained.map(["a"], **options)


@pytest.mark.parametrize("where", ["missing/results.jsonl", "."])
def test_a_file_that_cannot_be_written(model, told, tmp_path, where):
    with pytest.raises(ResultsError, match="cannot be kept") as refusal:
        model.map(PROMPTS, max_new_tokens=2, raw=True, results=tmp_path / where)
    assert "folder that exists" in refusal.value.remedy
    assert not passes(told)


class InterruptAt:
    """Presses stop at the n-th layer that computes."""

    def __init__(self, count):
        self.left = count
        self.thread = threading.get_ident()

    def __call__(self, event):
        if type(event) is ComputeBegin and threading.get_ident() == self.thread:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def test_an_interrupt_keeps_what_is_complete(model, file):
    options = {"max_new_tokens": 4, "raw": True, "results": file, "batch": 2}
    expected = model.map(PROMPTS, max_new_tokens=4, raw=True)
    layers, kept = len(model.layers), []
    for _ in range(10):
        try:
            texts = model.map(PROMPTS, progress=InterruptAt(4 * layers + 3), **options)
            break
        except KeyboardInterrupt:
            kept.append(len(lines(file)))
            assert model.progress is None
            assert torch.is_grad_enabled()
    assert texts == expected
    assert kept == [2, 4]  # the third call had less to do than what comes before the interrupt
    assert model.map(PROMPTS, max_new_tokens=4, raw=True) == expected


def test_rows_that_have_ended_survive_the_others(model, file, monkeypatch):
    whole = model.map(PROMPTS, max_new_tokens=NEW, raw=True)
    end = next(text[3] for text in whole if text[3].isascii() and not all(text[3] in other for other in whole))
    monkeypatch.setattr(model.generation_config, "eos_token_id", [257, ord(end)])
    expected = model.map(PROMPTS, max_new_tokens=NEW, raw=True)
    with pytest.raises(KeyboardInterrupt):
        model.map(PROMPTS, max_new_tokens=NEW, raw=True, results=file, progress=InterruptAt((NEW - 1) * len(model.layers)))
    kept = {line["index"]: line["text"] for line in lines(file)}
    assert 0 < len(kept) < len(PROMPTS)
    assert all(expected[index] == text for index, text in kept.items())
    assert model.map(PROMPTS, max_new_tokens=NEW, raw=True, results=file) == expected


@pytest.mark.skipif(versions.installed() < (4, 45), reason="an older transformers does not take the option")
def test_what_transformers_refuses_is_one_line(model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "min_p", 7.0)
    with pytest.raises(AirLLMError, match="refuses to generate"):
        model.map(["a"], max_new_tokens=2, raw=True, temperature=1.0)
