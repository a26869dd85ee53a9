"""Cases of `fork_server`: a session within a memory limit (cgroup) of little more than nothing, up to more than it needs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tiny import make_checkpoint

from airllm_nb.bench.machine import limited
from airllm_nb.engine.cgroups import CGROUP

LOAD = {"device": "cpu", "dtype": "float32"}
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24, "shards": "1GB"}  # 283 MB in float32
PROMPT = "What is this?"
KINDS = ["all_that_is_there", "a_budget_beyond_it", "another_process_takes_it"]
STEP = 10_000_000
FEW, LONG = 2, 24
"""Tokens; as many as it takes until the other process has what it wants."""
_state: dict = {}


def warm(folder: Path) -> None:
    """Make the checkpoint, and its answer without a limit."""
    _state["folder"] = make_checkpoint(folder / "llama", "llama", tokenizer=True, **SHAPE)
    _state["answers"] = {tokens: _answer("auto", tokens) for tokens in (FEW, LONG)}


def case(name: str, seed: int, _place: Path) -> str:
    """Load and answer, twice, within a limit that `seed` says; what was there before the fork does not count."""
    limit = (100 + 60 * seed) * 1_000_000
    memory = "1GB" if name == "a_budget_beyond_it" else "auto"
    taken = limit // 2 if name == "another_process_takes_it" else 0
    with _within(limit if name else None), _taken(taken):
        tokens = LONG if taken else FEW
        assert _answer(memory, tokens) == _state["answers"][tokens], "another text"
    return "right"


def _answer(memory: str, tokens: int) -> tuple[str, str]:
    from airllm_nb.notebook.renderers import SilentRenderer
    from airllm_nb.notebook.session import Session

    session = Session(SilentRenderer, lambda _: None)
    try:
        session.load(str(_state["folder"]), **LOAD, memory=memory)
        first = session.ask(PROMPT, max_new_tokens=2, temperature=0).text
        return first, session.ask(PROMPT, max_new_tokens=tokens, temperature=0).text
    finally:
        session.unload()


@contextlib.contextmanager
def _within(limit: int | None) -> Iterator[None]:
    with limited(limit) as enter:
        enter()
        try:
            yield
        finally:
            root = CGROUP / "memory" if (CGROUP / "memory").is_dir() else CGROUP
            (root / "cgroup.procs").write_text(str(os.getpid()))


@contextlib.contextmanager
def _taken(nbytes: int) -> Iterator[None]:
    """Have another process in the group take so much, 100 MB a second."""
    child = os.fork()
    if child == 0:
        taken = []
        while len(taken) * STEP < nbytes:
            taken.append(b"x" * STEP)
            time.sleep(0.1)
        time.sleep(60)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
