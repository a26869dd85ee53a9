"""Cases of `fork_server`: a checkpoint that is damaged before it is loaded; then a session loads it and answers."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import damage
import damaged_files  # noqa: F401  # registers its kinds
import damaged_settings  # noqa: F401
import damaged_weights  # noqa: F401
import torch
from tiny import make_checkpoint

from airllm_nb.compat import versions

PROMPT = "What is this?"
LOAD = {"device": "cpu", "dtype": "float32"}
NEW = 4
_state: dict = {}


def warm(folder: Path) -> None:
    """Make the checkpoints, and what transformers itself answers with them."""
    for kind in ("llama", "gpt2"):
        _state[kind] = make_checkpoint(folder / kind, kind, tokenizer=True)
        _state[kind, "answer"] = _transformers(_state[kind])
        assert case("", 0, folder / "first" / kind, kind) == "right"


def case(name: str, seed: int, place: Path, kind: str | None = None) -> str:
    """Damage a copy, and answer with it; with an empty name without damage."""
    kind = kind or ("gpt2" if seed % 2 and name.startswith("config") else "llama")
    folder = Path(shutil.copytree(_state[kind], place / "checkpoint"))
    if name:
        damage.KINDS[name](folder, random.Random(f"{name} {seed}"), seed)
    memory = {"memory": _least(folder)} if seed % 3 == 1 else {}
    answer = _engine(folder, memory)
    assert name not in damage.NEVER_RIGHT
    if _same(answer, _state[kind, "answer"]):
        return "right"
    if name in damage.OTHER_MODELS and _same(answer, _transformers(folder)):
        return "right"
    raise AssertionError(f"answered {answer[1]!r} instead of {_state[kind, 'answer'][1]!r}")


def _least(folder: Path) -> int:
    from airllm_nb import plan

    return plan(folder, **LOAD, memory="1TB").least


def _engine(folder: Path, memory: dict) -> tuple[torch.Tensor, str]:
    from airllm_nb.notebook.renderers import SilentRenderer
    from airllm_nb.notebook.session import Session

    session = Session(SilentRenderer, lambda _: None)
    try:
        model = session.load(str(folder), **LOAD, **memory)
        logits = model(torch.arange(1, 6)[None]).logits
        return logits, session.ask(PROMPT, max_new_tokens=NEW, temperature=0).text
    finally:
        session.unload()


def _transformers(folder: Path) -> tuple[torch.Tensor, str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = {"dtype" if versions.installed() >= (5,) else "torch_dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, **dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits = model(torch.arange(1, 6)[None]).logits.detach()
    text = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True)
    given = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=NEW, do_sample=False)
    return logits, tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def _same(one: tuple[torch.Tensor, str], other: tuple[torch.Tensor, str]) -> bool:
    return (
        one[0].shape == other[0].shape and torch.equal(one[0].nan_to_num(1e30), other[0].nan_to_num(1e30)) and one[1] == other[1]
    )
