"""The file of results: what is complete survives whatever happens, and nothing is taken that something else has computed."""

import errno
import fcntl
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from seen import batches, not_read, passes
from tiny import budgets

from airllm_nb import LayeredModel, plan
from airllm_nb.engine import results
from airllm_nb.engine.results import Results, ResultsError
from airllm_nb.errors import CheckpointError
from airllm_nb.events import BatchEnd, ComputeBegin

PROMPTS = ["Why is the sky blue?", "Hi", "Tell me of the sea.", "Hi", "One, two, three, four, five", "abcdefgh", "xy"]
NEW = 10
KEYS = ["a-b-c", "a-b-d"]


def load(folder, keep="none"):
    memory = budgets(plan(folder, device="cpu", dtype="float32"))[keep]
    return LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory=memory)


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("llama", tokenizer=True)


@pytest.fixture(scope="module")
def loaded(folder):
    with load(folder) as model:
        yield model


@pytest.fixture
def model(loaded):
    loaded.progress = None
    return loaded


@pytest.fixture
def told(model):
    """All events of the model from now on."""
    events = []
    model.progress = events.append
    return events


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


def test_a_file_of_something_else_is_refused_and_not_touched(model, checkpoint, file):
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
    with load(checkpoint("qwen2", tokenizer=True)) as other, pytest.raises(ResultsError, match="another model"):
        other.map(PROMPTS, **options)
    for text in (
        "hello\n",
        '{"index": 0}\n',
        '{"index": "0", "key": "a-b-c", "text": ""}\n',
        "[]\n",
        "\n",
        "\xff\n",
        "my notes",
        '{"a": 1}',
        "[" * 100_000 + "\n",
        '{"index": 0, "key": "a-b-c", "text": "\\ud800"}\n',
    ):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(ResultsError, match="Line 1 .* is no result"):
            model.map(PROMPTS, **options)
        assert file.read_bytes() == text.encode("latin-1")


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


# What a result depends on


def overwrite(folder, tensors):
    """Negate some tensors of a checkpoint in its file."""
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        found = load_file(path)
        save_file({name: -tensor if tensors(name) else tensor for name, tensor in found.items()}, path, {"format": "pt"})


def test_any_tensor_tells_models_apart(folder, model, file, tmp_path):
    """As an adapter that was merged into some of them."""
    options = {"max_new_tokens": 2, "raw": True, "results": file}
    model.map(["a"], **options)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    with load(copy) as same:
        same.map(["a"], **options)
    overwrite(copy, lambda name: name == "model.layers.2.self_attn.v_proj.weight")
    with load(copy) as other, pytest.raises(ResultsError, match="another model"):
        other.map(["a"], **options)


def test_files_that_were_overwritten_after_loading(folder, file, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    with load(copy, "all") as model:
        overwrite(copy, lambda _: True)
        with pytest.raises(CheckpointError, match="after the model was loaded"):
            model.map(["a"], max_new_tokens=2, raw=True, results=file)
    assert not file.exists()


def test_functions_on_the_layers_are_in_no_key(model, told, file):
    with model.on_layer(lambda layer, _: layer.before), pytest.raises(ResultsError, match="Functions on the layers"):
        model.map(["a"], max_new_tokens=2, raw=True, results=file)
    assert not passes(told)
    assert model.map(["a"], max_new_tokens=2, raw=True, results=file) == model.map(["a"], max_new_tokens=2, raw=True)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_were_changed_in_memory(folder, file, name):
    with load(folder, "all") as model:
        model.map(["a"], max_new_tokens=2, raw=True, results=file)
        model.get_parameter(name).data.neg_()
        with pytest.raises(ResultsError, match="changed in memory"):
            model.map(["a"], max_new_tokens=2, raw=True, results=file)
        model.map(["a"], max_new_tokens=2, raw=True)


def test_a_template_with_the_time_is_gone_on_with(model, file, monkeypatch):
    times = iter("abcdefgh")
    real = model.tokenizer.apply_chat_template

    def at_another_time(messages, **options):
        return real([{"role": "user", "content": next(times) + messages[0]["content"]}], **options)

    monkeypatch.setattr(model.tokenizer, "apply_chat_template", at_another_time)
    first = model.map(["Hello"], max_new_tokens=3, results=file)
    assert model.map(["Hello"], max_new_tokens=3, results=file) == first
    with pytest.raises(ResultsError, match="another prompt"):
        model.map(["Hello"], max_new_tokens=3, system="Be brief.", results=file)
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ messages[0].content }}")
    with pytest.raises(ResultsError, match="another prompt"):
        model.map(["Hello"], max_new_tokens=3, results=file)


# The file itself


def test_a_relative_file_stays_where_it_is(model, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def move(event):
        if type(event) is BatchEnd:
            os.chdir(tmp_path / "elsewhere")

    model.map(["abc", "d"], max_new_tokens=2, raw=True, results="kept.jsonl", batch=1, progress=move)
    assert len(lines(tmp_path / "kept.jsonl")) == 2
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_users_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Results.open("~/kept.jsonl", KEYS).add({0: "x"})
    assert len(lines(tmp_path / "kept.jsonl")) == 1


@pytest.mark.parametrize("path", [5, b"kept", "a\0b", "a\ud800", "~nobody-of-this-name/x", "a" * 300, "/dev/full", "/dev/null"])
def test_what_is_no_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResultsError):
        Results.open(path, KEYS)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ResultsError, match="no regular file"):
        Results.open(tmp_path / "pipe", KEYS)


def test_a_line_that_another_process_is_just_writing_is_not_cut(file, monkeypatch):
    line = json.dumps({"index": 0, "key": KEYS[0], "text": "x" * 50}).encode() + b"\n"
    other = json.dumps({"index": 1, "key": KEYS[1], "text": "y"}).encode() + b"\n"
    file.write_bytes(line + other[:20])
    parse = Results._parse

    def write_the_rest(self, number, of_line):
        with file.open("ab") as writing:
            writing.write(other[20:])
        return parse(self, number, of_line)

    monkeypatch.setattr(Results, "_parse", write_the_rest)
    Results.open(file, KEYS)
    assert file.read_bytes() == line + other


def test_processes_take_turns(file, monkeypatch):
    """While one writes or reads, another one could not."""
    excluded = []

    def look(*_):
        with file.open("rb") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                excluded.append(True)
            else:
                excluded.append(False)

    monkeypatch.setattr(results.os, "fsync", look)
    Results.open(file, KEYS).add({0: "x"})
    parse = Results._parse
    monkeypatch.setattr(Results, "_parse", lambda *args: (look(), parse(*args))[1])
    assert Results.open(file, KEYS).found == {0: "x"}
    assert excluded == [True, True]
    look()
    assert not excluded[-1]


def test_answers_that_are_all_there_need_no_writing(model, told, file, monkeypatch):
    options = {"max_new_tokens": 2, "raw": True, "results": file}
    expected = model.map(PROMPTS[:2], **options)
    told.clear()
    opened = Path.open

    def read_only(path, mode="r", *args, **kwargs):
        if path == file and "r" not in mode:
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)
    assert model.map(PROMPTS[:2], **options) == expected
    with pytest.raises(ResultsError, match="Read-only"):
        model.map(PROMPTS[:3], **options)
    assert not passes(told)
