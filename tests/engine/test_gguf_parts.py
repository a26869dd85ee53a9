"""GGUF models in several files: one model, or a refusal that says which part is wrong."""

import shutil

import gguf
import pytest
import torch
from tiny_gguf import LAYERS, WIDE, llama3_factors, make_gguf

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import gguf_files, versions
from airllm_nb.errors import CheckpointError

pytestmark = pytest.mark.skipif(versions.installed() < gguf_files.SINCE, reason="refused by this version of transformers")
IDS = torch.arange(4, 40)[None]
FACTORS = {"rope_freqs.weight": llama3_factors(10000.0, WIDE // 4, 8.0, 1.0, 4.0, 8192)}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AIRLLM_NB_HOME", str(tmp_path / "home"))


def load(path, **options):
    return LayeredModel.from_pretrained(path, **({"device": "cpu", "dtype": "float32"} | options))


def split(folder, architecture="llama", **options):
    """Return the parts of a model, and its whole."""
    folder.mkdir()
    options = {"width": WIDE, "inner": WIDE, "context": 131072} | options
    whole = make_gguf(folder / "whole.gguf", architecture, "Q4_0", **options)
    make_gguf(folder / "model.gguf", architecture, "Q4_0", split=8, **options)
    parts = sorted(folder.glob("model-*"))
    assert len(parts) > 3
    return parts, whole


@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("llama", True), ("gemma3", True)])
def test_parts_are_the_whole(tmp_path, architecture, tied):
    parts, whole = split(tmp_path / "m", architecture, tied=tied, factors=FACTORS if architecture == "llama" else None)
    with torch.no_grad(), load(whole) as model:
        expected = model(IDS).logits
        assert model.config.tie_word_embeddings == tied
    told, planned = plan(whole, device="cpu", dtype="float32"), plan(parts[1], device="cpu", dtype="float32")
    assert (planned.total_nbytes, planned.least) == (told.total_nbytes, told.least)
    for named, memory in ((parts[0], "1GB"), (parts[-1], planned.least)):
        with torch.no_grad(), load(named, memory=memory) as model:
            assert sum(layer.resident for layer in model.layers) == (LAYERS if memory == "1GB" else 0)
            assert torch.equal(model(IDS).logits, expected)
            assert model.config.tie_word_embeddings == tied


def test_quantized(tmp_path):
    parts, whole = split(tmp_path / "m")
    with torch.no_grad(), load(whole, quantize="int4-32") as model:
        expected = model(IDS).logits
    with torch.no_grad(), load(parts[0], quantize="int4-32") as model:
        assert torch.equal(model(IDS).logits, expected)


def test_a_part_that_changes_is_noticed(tmp_path):
    parts, _ = split(tmp_path / "m")
    with load(parts[0], memory=plan(parts[0], device="cpu", dtype="float32").least) as model:
        model(IDS)
        parts[1].write_bytes(parts[1].read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=rf"{parts[1].name} was (replaced|truncated)"):
            for _ in range(3):
                model(IDS)


def refusal(path):
    with pytest.raises(CheckpointError) as planned:
        plan(path, device="cpu")
    with pytest.raises(CheckpointError) as loaded:
        load(path)
    assert str(planned.value) == str(loaded.value)
    assert "Fetch" in planned.value.remedy
    return planned.value.cause


def test_missing_parts(tmp_path):
    parts, _ = split(tmp_path / "m")
    for part in parts[1:3]:
        part.unlink()
    for named in (parts[0], parts[3]):
        assert refusal(named) == f"2 of the {len(parts)} parts of the model are missing: {parts[1].name}, {parts[2].name}."


def test_parts_that_are_none(tmp_path):
    """Nor is another one loaded instead, or are all the names told."""
    parts, whole = split(tmp_path / "m")
    for number in (0, len(parts) + 1):
        shutil.copy(whole, other := parts[0].with_name(f"model-{number:05}-of-{len(parts):05}.gguf"))
        assert refusal(other) == f"{other.name} is by its name part {number} of {len(parts)}."
    shutil.copy(whole, other := tmp_path / "a-00001-of-99999.gguf")
    assert refusal(other).endswith("a-00005-of-99999.gguf, a-00006-of-99999.gguf and 99993 more.")


def test_parts_under_each_others_names(tmp_path):
    parts, whole = split(tmp_path / "m")
    parts[1].rename(tmp_path / "aside")
    parts[2].rename(parts[1])
    (tmp_path / "aside").rename(parts[2])
    assert refusal(parts[0]) == f"{parts[1].name} says split.no 2 and split.count 4, and its name 2 of 4."
    shutil.copy(whole, parts[1])
    assert refusal(parts[0]) == f"{parts[0].name} is of a model with 30 tensors, and the parts here hold 52."


def test_a_part_under_another_name(tmp_path):
    parts, _ = split(tmp_path / "m")
    shutil.copy(parts[0], alone := tmp_path / "model.gguf")
    assert refusal(alone) == "model.gguf says split.no 0 and split.count 4, and its name 1 of 1."


def test_a_part_of_another_model(tmp_path):
    parts, _ = split(tmp_path / "m")
    others, _ = split(tmp_path / "other", factors=FACTORS)
    shutil.copy(others[0], parts[0])
    assert refusal(parts[0]) == f"{parts[0].name} is of a model with 31 tensors, and the parts here hold 30."


def test_a_truncated_part(tmp_path):
    parts, _ = split(tmp_path / "m")
    parts[2].write_bytes(parts[2].read_bytes()[:-100])
    assert refusal(parts[0]).startswith(f"{parts[2].name} is truncated: ")


def write_part(path, number, count, fields, tensors):
    writer = gguf.GGUFWriter(path, "llama")
    writer.kv_data[0].clear()
    for name, value in {"split.no": number, "split.count": count, **fields}.items():
        writer.add_uint32(name, value)
    for name in tensors:
        writer.add_tensor(name, torch.zeros(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("fields", "tensors", "words"), [
    ({"llama.context_length": 5}, ["a"], "m-00002-of-00002.gguf says llama.context_length (5), and the first part"),
    ({"split.tensors.count": 7}, ["a"], "m-00002-of-00002.gguf is of a model with 7 tensors, and the parts here hold 2"),
    ({}, ["b"], "Two parts hold one tensor: b"),
])  # fmt: skip
def test_parts_that_contradict_the_first(tmp_path, fields, tensors, words):
    write_part(tmp_path / "m-00001-of-00002.gguf", 0, 2, {"llama.context_length": 4}, ["b"])
    write_part(tmp_path / "m-00002-of-00002.gguf", 1, 2, fields, tensors)
    assert words in refusal(tmp_path / "m-00001-of-00002.gguf")
