"""Cases of `fork_server`: the files are hurt while the layers stream from them, in the middle of a run, before its n-th layer."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import torch
from tiny import LAYERS, budgets, make_checkpoint

LOAD = {"device": "cpu", "dtype": "float32"}
TOKENS = 5
IDS = torch.tensor([[10, 20, 30, 40, 50]])
OPTIONS = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
KINDS = {}
_state: dict = {}


def kind(function):
    KINDS[function.__name__] = function
    return function


def warm(folder: Path) -> None:
    """Make the checkpoint, and what transformers itself generates with it."""
    from transformers import AutoModelForCausalLM

    _state["folder"] = make_checkpoint(folder / "llama", tokenizer=True)
    _state["expected"] = AutoModelForCausalLM.from_pretrained(_state["folder"]).float().generate(IDS, **OPTIONS, pad_token_id=257)
    assert case("", 0, folder / "first") == "right"


def case(name: str, seed: int, place: Path) -> str:
    """Generate with the least memory, and hurt the files before the layer that `seed` says."""
    from airllm_nb import LayeredModel, plan
    from airllm_nb.events import ComputeBegin

    folder = Path(shutil.copytree(_state["folder"], place / "checkpoint"))
    rng = random.Random(f"{name} {seed}")
    moment, passed = 1 + seed * (TOKENS * LAYERS - 2) // 9, 0

    def listen(event: object) -> None:
        nonlocal passed
        passed += isinstance(event, ComputeBegin)
        if name and passed == moment and isinstance(event, ComputeBegin):
            shards = sorted(folder.glob("*.safetensors"))
            for path in shards if seed % 2 else rng.sample(shards, 1):
                KINDS[name](path, rng)

    memory = budgets(plan(folder, **LOAD, memory="1TB"))["none"]
    with LayeredModel.from_pretrained(folder, **LOAD, memory=memory, progress=listen) as model:
        made = model.generate(IDS, **OPTIONS, pad_token_id=257)
    assert passed == TOKENS * LAYERS
    assert torch.equal(made, _state["expected"]), "other tokens"
    return "right"


def other_bytes(path: Path, rng: random.Random) -> bytes:
    """Return the file with another last half: its header stays, its weights do not."""
    data = path.read_bytes()
    return data[: len(data) // 2] + rng.randbytes(len(data) - len(data) // 2)


def put(path: Path, data: bytes) -> None:
    """Write into the file that is there, as an editor or a sync client may: without a new name."""
    with path.open("r+b") as file:
        file.write(data)


@kind
def truncated(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


@kind
def emptied(path, _rng):
    os.truncate(path, 0)


@kind
def grown(path, rng):
    with path.open("ab") as file:
        file.write(rng.randbytes(1000))


@kind
def rewritten(path, rng):
    put(path, other_bytes(path, rng))


@kind
def rewritten_in_secret(path, rng):
    times = path.stat()
    put(path, other_bytes(path, rng))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@kind
def rewritten_and_back(path, rng):
    data = path.read_bytes()
    put(path, other_bytes(path, rng))
    put(path, data)


@kind
def header_rewritten(path, rng):
    put(path, rng.randbytes(200))


@kind
def replaced(path, rng):
    new = path.with_suffix(".new")
    new.write_bytes(other_bytes(path, rng))
    new.replace(path)


@kind
def replaced_by_a_copy(path, _rng):
    new = path.with_suffix(".new")
    shutil.copy2(path, new)
    new.replace(path)


@kind
def removed(path, _rng):
    path.unlink()


@kind
def renamed(path, _rng):
    path.rename(path.with_suffix(".old"))


@kind
def folder_removed(path, _rng):
    shutil.rmtree(path.parent, ignore_errors=True)


@kind
def folder_renamed(path, _rng):
    if path.parent.exists():
        path.parent.rename(path.parent.with_name("elsewhere"))


@kind
def folder_replaced(path, rng):
    """As when a model is downloaded again, in another version."""
    if path.parent.with_name("before").exists():
        return
    other = path.parent.with_name("elsewhere")
    shutil.copytree(path.parent, other)
    for copy in other.glob("*.safetensors"):
        put(copy, other_bytes(copy, rng))
    path.parent.rename(path.parent.with_name("before"))
    other.rename(path.parent)


@kind
def swapped(path, _rng):
    other = min(path.parent.glob("*.safetensors"))
    if other != path:
        path.rename(path.with_suffix(".new"))
        other.rename(path)
        path.with_suffix(".new").rename(other)


@kind
def made_a_folder(path, _rng):
    path.unlink()
    path.mkdir()


@kind
def made_a_pipe(path, _rng):
    path.unlink()
    os.mkfifo(path)


@kind
def made_a_loop(path, _rng):
    path.unlink()
    path.symlink_to(path)


@kind
def made_a_file_of_zeros(path, _rng):
    path.unlink()
    path.symlink_to("/dev/zero")


@kind
def settings_removed(path, _rng):
    """What was read while loading is not asked for again."""
    for file in path.parent.glob("*.json"):
        file.unlink()


@kind
def made_unreadable(path, _rng):
    path.chmod(0)
