"""%airllm map: where prompts come from, what is left of a map, what is seen meanwhile."""

import json
import sys
from collections.abc import Sequence

import pytest

from airllm_nb.errors import AirLLMError, PromptError
from airllm_nb.events import BatchBegin, BatchEnd, ComputeBegin, ComputeEnd, LayerInfo, PassBegin, PassEnd
from airllm_nb.notebook import sources, strip
from airllm_nb.notebook.answers import MOST_ROWS, Answers, MapInterrupted
from airllm_nb.notebook.one_at_a_time import SessionError
from airllm_nb.notebook.renderers import SilentRenderer
from airllm_nb.notebook.run_state import RunState
from airllm_nb.notebook.summary import Interrupted, Settings
from airllm_nb.notebook.verdict import time_left

PROMPTS = ["Hello", "How are you?", "Hi"]
SETTINGS = Settings("name", "cpu", "float32", 1, 2, 1, 3, 10, 0.0, None, None, (), None)


class Series(list):
    """What of a pandas Series matters here."""


class Frame(dict):
    """What of a pandas DataFrame matters here."""

    @property
    def columns(self):
        return list(self)


@pytest.fixture
def loaded(shell, chat):
    shell.run(f"%airllm load {chat} --device cpu --dtype float32")
    shell.ip.user_ns["questions"] = list(PROMPTS)
    return shell


# Where prompts come from


def test_variables_and_columns():
    names = {
        "questions": PROMPTS,
        "df": Frame(question=Series(PROMPTS), **{"the question": Series(["a"])}),
        "table": {"x": ["b"]},
    }
    assert sources.prompts("questions", names) is PROMPTS
    assert sources.prompts("df.question", names) == PROMPTS
    assert sources.prompts("df[question]", names) == PROMPTS  # what is left of df["question"] when the line is split
    assert sources.prompts('df["the question"]', names) == ["a"]
    assert sources.prompts("table.x", names) == ["b"]
    with pytest.raises(PromptError, match="is a table") as refusal:
        sources.prompts("df", names)
    assert 'df["question"]' in refusal.value.remedy
    for word in ("df.answer", "df[0]", "questions.x"):
        with pytest.raises(PromptError, match="names no column"):
            sources.prompts(word, names)
    with pytest.raises(PromptError, match="neither a variable nor a file"):
        sources.prompts("nothing", names)


def test_files(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_bytes("Hello\r\n\r\n  \nDas ist schön.\u2028Ja.\n".encode())
    assert sources.prompts(str(text), {}) == ["Hello", "Das ist schön.\u2028Ja."]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('"one\\ntwo"\n{"id": 3, "prompt": "three"}\n\n{"text": "four"}', encoding="utf-8")
    assert sources.prompts(str(lines), {}) == ["one\ntwo", "three", "four"]
    for line in ("{}", "3", "no json", '{"prompt": 3}'):
        lines.write_text(f'"one"\n{line}\n', encoding="utf-8")
        with pytest.raises(PromptError, match="Line 2 .* has no prompt"):
            sources.prompts(str(lines), {})
    lines.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(PromptError, match="Line 1 .* has no prompt"):
        sources.prompts(str(lines), {})
    text.write_bytes(b"\xff\xfe\n")
    with pytest.raises(PromptError, match="cannot be read as text"):
        sources.prompts(str(text), {})


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, said in (("prompts.txt", "Hello"), ("prompts.jsonl", '"Hello"'), ("UPPER.JSONL", '{"prompt": "Hello"}')):
        (tmp_path / name).write_text(said, encoding="utf-8-sig")
        assert sources.prompts(str(tmp_path / name), {}) == ["Hello"]


def test_a_json_file_is_a_list(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text('["one", {"text": "two"}]')
    assert sources.prompts(str(file), {}) == ["one", "two"]
    for text, cause in (
        ('{"prompt": "one"}', "is no JSON list"),
        ('["one", 2]', "Item 1 .* has no prompt"),
        ("[]", "no prompts"),
    ):
        file.write_text(text)
        with pytest.raises(PromptError, match=cause):
            sources.prompts(str(file), {})


def test_an_empty_file_says_so(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(PromptError, match="holds no prompts"):
        sources.prompts(str(tmp_path / "empty.txt"), {})


@pytest.mark.parametrize(
    "word", ["a" * 300, "['Why is the sky blue?', 'Hi']" * 20, "~nobody-of-this-name/x", "a\0b", "a\ud800", ""]
)
def test_what_can_be_no_file(word):
    with pytest.raises(PromptError, match="neither a variable nor a file") as refusal:
        sources.prompts(word, {})
    assert len(refusal.value.cause) < 100


def test_columns_by_number():
    names = {"df": Frame({0: ["a"], "1": ["b"]}), "table": {2: ["c"]}, "some": ["x", "y"]}
    assert sources.prompts("df[0]", names) == ["a"]
    assert sources.prompts("df[1]", names) == ["b"]
    assert sources.prompts("table[2]", names) == ["c"]
    with pytest.raises(PromptError, match="is a table") as refusal:
        sources.prompts("df", names)
    assert "df[0]" in refusal.value.remedy
    with pytest.raises(PromptError, match="names no column"):
        sources.prompts("some[0]", names)  # one prompt, of which each character would be one


def test_columns_of_one_name():
    with pytest.raises(PromptError, match="several columns") as refusal:
        sources.prompts("df.q", {"df": Frame(q=Frame(q=["a"]))})
    assert "Rename" in refusal.value.remedy


def test_what_has_columns_but_is_no_table():
    class Trace:
        def columns(self):
            return {}

    trace = Trace()
    assert sources.prompts("trace", {"trace": trace}) is trace  # the engine says what it is


# The magic


def test_the_answers(loaded, tmp_path):
    text = loaded.run("%airllm map questions --max-new-tokens 8 -o answers")
    answers = loaded["answers"]
    assert "3 of 3 prompts answered" in text
    assert "s per prompt" in text
    assert repr(answers) in text  # it is the value of the line
    assert loaded["_airllm"] is answers
    assert answers.prompts == tuple(PROMPTS)
    assert list(answers) == [answers[0], answers[1], answers[2]]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        loaded.run(f"%%airllm --max-new-tokens 8 -o alone\n{prompt}")
        assert answer == loaded["alone"].text
    assert loaded.run("again = %airllm map questions --max-new-tokens 8 --batch 1") is not None
    assert loaded["again"].texts == answers.texts
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(PROMPTS))
    loaded.run(f"%airllm map {file} --max-new-tokens 8 -o of_file")
    assert loaded["of_file"].texts == answers.texts


def test_options_reach_the_model(loaded):
    loaded.run('%airllm map questions --max-new-tokens 8 --system "Be brief." -o brief')
    loaded.run('%%airllm --max-new-tokens 8 --system "Be brief." -o alone\nHello')
    assert loaded["brief"][0] == loaded["alone"].text
    assert loaded["brief"].settings.system == "Be brief."
    loaded.run("%airllm map questions --max-new-tokens 8 --raw --temperature 1 --top-p 0.9 --seed 3 -o one")
    loaded.run("%airllm map questions --max-new-tokens 8 --raw --temperature 1 --top-p 0.9 --seed 3 -o two")
    assert loaded["one"].texts == loaded["two"].texts


def test_results_are_gone_on_with(loaded, tmp_path):
    file = tmp_path / "out.jsonl"
    loaded.ip.user_ns["some"] = PROMPTS[:1]
    loaded.run(f"%airllm map some --max-new-tokens 8 --results {file}")
    text = loaded.run(f"%airllm map questions --max-new-tokens 8 --results {file} -o answers")
    assert "3 of 3 prompts answered, 1 of them before" in text
    assert "all of them before" in loaded.run(f"%airllm map questions --max-new-tokens 8 --results {file}")
    assert {line["index"]: line["text"] for line in map(json.loads, file.read_text().splitlines())} == dict(
        enumerate(loaded["answers"])
    )
    assert "ResultsError: " in loaded.fail(f"%airllm map questions --max-new-tokens 9 --results {file}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("map", "the following arguments are required: PROMPTS"),
        ("map nothing", "neither a variable nor a file 'nothing'"),
        ("map questions --batch 0", "'0' is neither auto nor a number"),
        ("map questions --batch some", "'some' is neither auto nor a number"),
        ("map questions --max-new-tokens 0", "max-new-tokens is 0"),
        ("map questions --max-new-tokens 5000", "exceed"),
        ("map text", "The prompts are one text"),
        ("map numbers", "Prompt 0 (from 0 on) is no text, but int"),
    ],
)
def test_what_makes_no_sense_is_one_line(loaded, line, said):
    loaded.ip.user_ns |= {"text": "one", "numbers": [1]}
    assert said in loaded.fail(f"%airllm {line}")


def test_no_prompts_are_no_riddle(loaded):
    loaded.ip.user_ns["none"] = []
    assert "There were no prompts to answer" in loaded.run("%airllm map none")


def test_without_a_model(shell):
    shell.ip.user_ns["questions"] = PROMPTS
    assert "No model is loaded" in shell.fail("%airllm map questions")


def test_help_and_completion(shell):
    assert "--results FILE" in shell.run("%airllm map --help")
    assert "%airllm map PROMPTS" in shell.run("%airllm --help")
    shell.ip.user_ns |= {"questions": PROMPTS, "df": Frame(question=PROMPTS), "number": 3}
    found = shell.ip.complete(None, "%airllm map ", 12)[1]
    assert {"questions", "df.question", "--results", "--batch"} <= set(found)
    assert not {"number", "demo"} & set(found)
    assert shell.ip.complete(None, "%airllm map questions --res", 26)[1] == ["--results"]


# An interrupt


class InterruptAt(SilentRenderer):
    """Presses stop at the n-th picture."""

    def __init__(self, session, count):
        super().__init__()
        self.session, self.left = session, count

    def draw(self, state):
        self.left -= bool(state.batches and state.batches.done)
        if self.left <= 0:
            self.session.stop()


def test_stop_leaves_what_is_complete(session, chat, tmp_path):
    session.load(str(chat), device="cpu", dtype="float32")
    options = {"max_new_tokens": 60, "batch": 1, "results": tmp_path / "out.jsonl"}
    expected = session.map(PROMPTS, max_new_tokens=60)
    with pytest.raises(MapInterrupted, match="the same again goes on") as stopped:
        session.map(PROMPTS, renderer=InterruptAt(session, 1), **options)
    answers = stopped.value.answers
    assert 0 < answers.done < 3
    assert all(text in (None, whole) for text, whole in zip(answers, expected, strict=True))
    assert not session.busy
    assert session.model.progress is None
    rest = session.map(PROMPTS, **options)
    assert rest.texts == expected.texts
    assert rest.computed == 3 - answers.done
    with pytest.raises(MapInterrupted, match="with results in a file"):
        session.map(PROMPTS, renderer=InterruptAt(session, 1), max_new_tokens=60, batch=1)


def test_stop_while_prompts_are_encoded(session, chat, monkeypatch):
    from airllm_nb.engine import many

    encoded = []
    encode = many.encode

    def stop(*args, **options):
        encoded.append(args)
        session.stop()
        return encode(*args, **options)

    session.load(str(chat), device="cpu", dtype="float32")
    monkeypatch.setattr(many, "encode", stop)
    with pytest.raises(MapInterrupted, match="stopped after 0 of 3"):
        session.map(PROMPTS)
    assert len(encoded) == 1


def test_stop_while_prompts_are_gone_through(session, chat):
    def prompts():
        session.stop()
        while True:
            yield "a"

    session.load(str(chat), device="cpu", dtype="float32")
    with pytest.raises(Interrupted):
        session.map(prompts())
    assert not session.busy


def test_a_run_within_a_run_is_refused(session, chat):
    refused, busy = [], []

    def prompts():
        yield "a"
        for call in (lambda: session.ask("Hi"), session.unload):
            with pytest.raises(SessionError, match="from within a run") as refusal:
                call()
            refused.append(refusal)
            busy.append(session.busy)
        yield "b"

    session.load(str(chat), device="cpu", dtype="float32")
    assert len(session.map(prompts(), max_new_tokens=1)) == 2
    assert len(refused) == 2
    assert busy == [True, True]
    assert not session.busy
    session.ask("Hi", max_new_tokens=1)


def test_stopped_in_a_cell(loaded, monkeypatch):
    answers = Answers(("a", "b"), ("x", None), 1, 1.0, SETTINGS)

    def stopped(*_, **__):
        raise MapInterrupted("stopped after 1 of 2 prompts", answers)

    monkeypatch.setattr(loaded.magics.session, "map", stopped)
    assert "MapInterrupted: stopped after 1 of 2 prompts" in loaded.fail("%airllm map questions -o kept")
    assert loaded["kept"] is answers


# What is left


def test_answers_are_a_sequence_of_texts():
    answers = Answers(("a", "b", "c"), ("x", None, "y"), 2, 1.0, SETTINGS)
    assert isinstance(answers, Sequence)
    assert answers[1:] == (None, "y")
    assert answers.index("y") == 2
    assert list(reversed(answers)) == ["y", None, "x"]


def test_the_table_is_escaped():
    hostile = "<script>alert(1)</script>"
    answers = Answers((hostile, "b"), (hostile, None), 1, 2.0, SETTINGS, results='"><b>.jsonl')
    html = answers._repr_html_()
    assert "<script" not in html
    assert '"><b>' not in html
    assert html.count("&lt;script&gt;") == 2
    assert "(no answer yet)" in html
    assert "2 s per prompt" in html
    assert repr(answers) == "Answers(1 of 2 prompts)"  # no times: nbval compares it


def test_a_long_table_ends():
    answers = Answers(("a",) * 300, ("b" * 10_000,) * 300, 300, 1.0, SETTINGS)
    html = answers._repr_html_()
    assert html.count("<tr") == 1 + MOST_ROWS
    assert "and 100 more" in html
    assert len(html) < MOST_ROWS * 2500


def test_as_a_data_frame(monkeypatch):
    class Pandas:
        DataFrame = staticmethod(dict)

    answers = Answers(("a",), ("b",), 1, 1.0, SETTINGS)
    monkeypatch.setitem(sys.modules, "pandas", Pandas)
    assert answers.to_pandas() == {"prompt": ("a",), "answer": ("b",)}
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(AirLLMError, match="not installed"):
        answers.to_pandas()


# What is seen meanwhile


def test_the_headline_counts_prompts():
    layers = tuple(LayerInfo(index, f"model.layers.{index}", 10, resident=True) for index in range(2))
    state = RunState("name", layers, 4)

    def run(at, rows, done, computed):
        state.apply(BatchBegin(rows, 4, done=done, computed=computed, total=6, at=at))
        for index in range(4):
            state.apply(PassBegin(index, 5, "prefill" if index == 0 else "decode", at=at + index))
            for layer in layers:
                state.apply(ComputeBegin(layer.index, layer.name, 10, "resident", 0.0, at=at + index))
                if index == 2 and layer.index == 1:
                    yield
                state.apply(ComputeEnd(layer.index, layer.name, 10, 0.1, "resident", at=at + index + 0.5))
            state.apply(PassEnd(index, 5, 1.0, completed=True, at=at + index + 1))

    for _ in run(100.0, 4, 0, 0):
        assert strip.headline(state) == "0/6 prompts · next 4: token 3/4 · layer 2/2 · model.layers.1"
        assert state.batches.fraction(state.fraction) == pytest.approx(4 / 6 * 2.5 / 4)
        assert time_left(state) == "about 3 s left at most"
    state.apply(BatchEnd(4.0, {}, done=4, computed=4, total=6, at=104.0))
    assert strip.headline(state) == "4/6 prompts · 1 s each"
    for _ in run(104.0, 2, 4, 4):
        assert strip.headline(state) == "4/6 prompts · 1 s each · next 2: token 3/4 · layer 2/2 · model.layers.1"
        assert "prompts" in strip.render(state)
    state.apply(BatchEnd(4.0, {}, done=6, computed=6, total=6, at=108.0))
    state.end("done")
    assert strip.headline(state) == "6/6 prompts · 1.33 s each · 8.0 s"
    assert "prompts" in strip.render(state)
    assert time_left(state) == ""
