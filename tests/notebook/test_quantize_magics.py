"""%airllm load --quantize, and %airllm cache, which shows and clears what that has written."""

import pytest
from tiny_gguf import make_gguf

from airllm_nb import plan
from airllm_nb.compat import gguf_files, versions


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRLLM_NB_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "quantized"


def test_quantized_layers_are_listed_and_cleared(shell, chat, home):
    assert "Nothing is kept in" in shell.run("%airllm cache")
    for bits in ("int4", "int8"):
        assert "layers, all resident" in shell.run(f"%airllm load {chat} --device cpu --quantize {bits}")
    assert "int8: 24 matrices of the layers" in shell.run("%airllm status")
    listed = shell.run("%airllm cache")
    assert f"{chat.name}, int4-64, from {chat}" in listed
    assert f"{chat.name}, int8, from {chat}" in listed
    assert "Nothing of that name" in shell.run("%airllm cache --clear elsewhere")
    assert "Removed: " in shell.run("%airllm cache --clear int8")
    assert [path.name.split("-")[-3] for path in home.iterdir()] == ["int4"]
    assert "Removed: " in shell.run("%airllm cache --clear")
    assert not list(home.iterdir())
    shell.run("%%airllm --max-new-tokens 3\nHello")  # it stays in memory


@pytest.mark.skipif(versions.installed() < gguf_files.SINCE, reason="GGUF files are refused by this version of transformers")
def test_what_a_gguf_file_left_is_listed_and_cleared(shell, tmp_path, home):
    path = make_gguf(tmp_path / "model.gguf", "qwen2", "Q4_0")
    own = home.parent / "gguf" / "mine.gguf"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"GGUF")
    shell.run(f"%airllm plan {path}")
    assert f"model, config and tokenizer, from {path}" in shell.run("%airllm cache")
    assert "Removed: model, config and tokenizer" in shell.run("%airllm cache --clear")
    assert list(own.parent.iterdir()) == [own]
    shell.run(f"%airllm plan {path}")  # they are made again


def test_a_streaming_model_says_that_its_layers_are_gone(shell, chat):
    least = plan(chat, device="cpu", dtype="float32", quantize="int4").least
    shell.run(f"%airllm load {chat} --device cpu --dtype float32 --quantize int4 --memory {least}")
    shell.run("%%airllm --max-new-tokens 3\nHello")
    shell.run("%airllm cache --clear")
    assert "was removed" in shell.fail("%%airllm --max-new-tokens 20\nHello")


@pytest.mark.skipif(versions.installed() < gguf_files.SINCE, reason="GGUF files are refused by this version of transformers")
@pytest.mark.parametrize(("kind", "advised"), [("Q4_0", "int4-32"), ("Q8_0", "int8"), ("F16", None)])
def test_a_gguf_file_that_streams_says_what_would_be_faster(shell, tmp_path, kind, advised):
    path = make_gguf(tmp_path / "model.gguf", "qwen2", kind)
    least = plan(path, device="cpu", dtype="float32").least
    assert "--quantize" not in shell.run(f"%airllm load {path} --device cpu --dtype float32")
    said = shell.run(f"%airllm load {path} --device cpu --dtype float32 --memory {least}")
    assert said.count("\n") == (2 if advised else 1)
    assert f"--quantize {advised} " in said or not advised
    assert ("hint " in shell.run("%airllm status")) == bool(advised)
    if advised:
        least = plan(path, device="cpu", dtype="float32", quantize=advised).least
        assert (
            shell.run(f"%airllm load {path} --device cpu --dtype float32 --memory {least} --quantize {advised}").count("\n") == 1
        )


def test_what_is_no_quantization_is_one_line(shell, chat):
    assert "There is no quantization 'int5'" in shell.fail(f"%airllm load {chat} --quantize int5")


def test_what_is_not_ours_is_neither_listed_nor_cleared(shell, chat, home):
    """The folder may be one that holds the user's own models."""
    shell.run(f"%airllm load {chat} --device cpu --quantize int8")
    own = [home.parent / "my-model", home / "my-model"]
    for folder in own:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    assert "my-model" not in shell.run("%airllm cache")
    shell.run(f"%airllm cache --clear {chat.parent.name}")  # a part of where it comes from is no name
    assert len(list(home.iterdir())) == 2
    shell.run("%airllm cache --clear")
    assert all((folder / "config.json").is_file() for folder in own)
    assert list(home.iterdir()) == own[1:]
