"""Mapped weights: the same numbers, one copy for all processes, and nothing left behind."""

import gc
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from tiny import CONFIGS, budgets, make_checkpoint
from tiny_any import make_any

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import versions
from airllm_nb.engine import mapped as mapped_module
from airllm_nb.engine.checkpoint import Checkpoint
from airllm_nb.engine.mapped import SharingReader
from airllm_nb.engine.reader import Reader
from airllm_nb.errors import CheckpointError
from airllm_nb.events import LayerReady, LoadBegin

DTYPE = "dtype" if transformers.__version__ >= "5" else "torch_dtype"
IDS = torch.arange(1, 10)[None]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


def load(folder, **options):
    return LayeredModel.from_pretrained(folder, **({"device": "cpu", "shared": "insist"} | options))


def mappings(folder, process="self", key="Rss"):
    """Bytes of a process's memory that lie in a folder's files."""
    total, inside = 0, False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        first = line.split(" ", 1)[0]
        if "-" in first:
            inside = f" {folder}/" in line
        elif inside and first == f"{key}:":
            total += int(line.split()[1]) * 1024
    return total


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("keep", ["all", "half", "none"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_as_transformers_bit_for_bit(checkpoint, kind, keep, recwarn):
    folder = checkpoint(kind)
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, **{DTYPE: torch.bfloat16}).eval()
    memory = budgets(plan(folder, device="cpu", dtype="bfloat16"))[keep]
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 257}
    with load(folder, memory=memory) as model:
        assert model.dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, expected(IDS).logits)
        assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))
    assert not [warning for warning in recwarn if "airllm" in str(warning.filename) or "writable" in str(warning.message)]


def test_what_is_shared_and_what_is_owned(checkpoint):
    folder = checkpoint("llama")
    whole = plan(folder, device="cpu", shared="insist")
    if versions.installed() >= versions.MAPS_FILES:
        assert whole.shared_nbytes == whole.checkpoint_nbytes
    assert "the checkpoint's own, so that its weights can be shared" in str(whole)
    assert f"shared    {whole.sharing}\n" in str(whole)
    least = plan(folder, device="cpu", shared="insist", memory=whole.least)
    assert 0 < least.shared_nbytes <= least.always_nbytes
    converted = plan(folder, device="cpu", shared="insist", dtype="float32")
    assert converted.shared_nbytes == 0
    assert "nothing, because" in converted.sharing
    assert plan(folder, device="cpu").sharing == ""


def test_fused_experts_are_owned(checkpoint):
    found = plan(checkpoint("mixtral"), device="cpu", shared="insist")
    fused = versions.installed() >= (5,)
    assert found.shared_nbytes > 0
    assert (found.shared_nbytes < found.checkpoint_nbytes / 2) == fused


@pytest.mark.parametrize("spaces", [1, 2])
def test_weights_that_begin_anywhere(damaged, spaces):
    """Other writers of the format do not align what follows the header."""
    folder = damaged("llama", shards="1GB")
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    file.write_bytes((length + spaces).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * spaces + raw[8 + length :])
    with load(folder) as model, load(folder, shared=False, dtype="bfloat16") as own:
        assert (model.plan.shared_nbytes > 0) == (spaces == 2)
        assert torch.equal(model(IDS).logits, own(IDS).logits)


@LINUX
def test_the_weights_lie_in_the_files(checkpoint):
    folder = checkpoint("llama", shards="1GB")
    with load(folder) as model:
        runs = len(model.layers) + 3  # each layer, embedding, norm and head, at both ends rounded to pages
        rounding = 2 * os.sysconf("SC_PAGE_SIZE") * runs
        assert model.plan.shared_nbytes <= mappings(folder) < model.plan.shared_nbytes + rounding
        assert mappings(folder, key="Anonymous") == 0
        for _ in range(2):
            model(IDS)
        assert mappings(folder, key="Anonymous") == 0


@LINUX
@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_nothing_is_left_mapped(checkpoint, how):
    folder = checkpoint("llama")
    model = load(folder)
    model(IDS)
    assert mappings(folder) > 0
    if how == "closed":
        model.close()
    else:
        del model
    gc.collect()
    assert mappings(folder) == 0


@LINUX
def test_nothing_is_left_mapped_after_an_interrupt(checkpoint):
    folder = checkpoint("llama")

    def interrupt(event):
        if isinstance(event, LayerReady) and event.index == 2:
            assert mappings(folder) > 0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(folder, progress=interrupt)
    gc.collect()
    assert mappings(folder) == 0


@pytest.mark.parametrize("keep", ["all", "none"])
def test_a_model_that_rescales_its_weights(tmp_path, keep):
    folder = make_any(tmp_path / "rwkv", "rwkv")
    before = digest(folder)
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, **{DTYPE: torch.float32}).eval()
    memory = budgets(plan(folder, device="cpu", dtype="float32"))[keep]
    with load(folder, memory=memory) as model, load(folder, memory=memory) as other:
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(model(IDS).logits, expected(IDS).logits)
        assert torch.equal(other(IDS).logits, expected(IDS).logits)
    assert digest(folder) == before


def test_a_user_who_changes_weights_changes_only_this_model(checkpoint):
    folder = checkpoint("llama")
    before = digest(folder)
    with load(folder) as model, load(folder) as other:
        expected = other(IDS).logits
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        assert torch.equal(model(IDS).logits, 2 * expected)
        assert torch.equal(other(IDS).logits, expected)
    assert digest(folder) == before


@pytest.mark.parametrize(
    ("hurt", "said"),
    [
        (lambda file: file.unlink(), "was removed"),
        (lambda file: os.truncate(file, file.stat().st_size // 2), "changed|rewritten|mapped|truncated"),
        (lambda file: os.truncate(file, 100), "changed|rewritten|mapped|truncated"),
        (lambda file: file.write_bytes(file.read_bytes()), "rewritten"),
    ],
    ids=["removed", "halved", "emptied", "rewritten"],
)
def test_a_file_that_changes_before_it_is_mapped(damaged, hurt, said):
    folder = damaged("llama")

    def listener(event):
        if isinstance(event, LoadBegin):
            time.sleep(0.02)  # or the times of the file may be the same
            hurt(min(folder.glob("*.safetensors")))

    with pytest.raises(CheckpointError, match=said):
        load(folder, progress=listener)


@pytest.mark.skipif(mapped_module.POPULATE_READ is None, reason="only Linux maps pages in without touching them")
def test_a_file_that_is_truncated_just_after_it_was_read(damaged):
    folder = damaged("llama", shards="1GB")

    class Truncating(Reader):
        def read(self, path, *args, **options):
            missed = super().read(path, *args, **options)
            os.truncate(path, 100)
            return missed

    checkpoint = Checkpoint(folder)
    reader = Truncating(checkpoint)
    with pytest.raises(CheckpointError, match="was truncated"):
        SharingReader(checkpoint, reader)._map(sorted(checkpoint.values(), key=lambda entry: entry.offset))
    reader.close()


SHARE = """
import sys, torch
from airllm_nb import LayeredModel
model = LayeredModel.from_pretrained(sys.argv[1], device="cpu", shared="insist")
model(torch.arange(9)[None])
print("ready", flush=True)
sys.stdin.read()
"""


@LINUX
def test_many_processes_hold_one_copy(tmp_path):
    wide = {"hidden_size": 512, "intermediate_size": 1024}
    folder = make_checkpoint(tmp_path / "wide", "llama", shards="1GB", **wide)
    kernels = []

    def start():
        kernel = subprocess.Popen(
            [sys.executable, "-c", SHARE, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        kernels.append(kernel)
        assert kernel.stdout.readline() == "ready\n"

    def held(key):
        return [mappings(folder, kernel.pid, key) for kernel in kernels]

    try:
        start()
        (one,) = held("Pss")
        assert one >= 0.95 * plan(folder, device="cpu", shared="insist").shared_nbytes
        start()
        start()
        assert min(held("Rss")) >= one  # each sees all of it,
        assert sum(held("Pss")) <= 1.1 * one  # and together they hold it once
        assert sum(held("Anonymous")) == 0
    finally:
        for kernel in kernels:
            kernel.stdin.close()
            kernel.wait()
            kernel.stdout.close()
