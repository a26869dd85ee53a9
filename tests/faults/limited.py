"""Cases of `fork_server`: a session within a memory limit (cgroup) of little more than nothing, up to more than it needs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tiny import make_checkpoint

from airllm_nb.bench.machine import limited
from airllm_nb.engine.cgroups import CGROUP

LOAD = {"device": "cpu", "dtype": "float32"}
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "shards": "1GB"}  # 142 MB in float32
PROMPT = "What is this?"
KINDS = ["all_that_is_there", "a_budget_beyond_it"]
_state: dict = {}


def warm(folder: Path) -> None:
    """Make the checkpoint, and its answer without a limit."""
    _state["folder"] = make_checkpoint(folder / "llama", "llama", tokenizer=True, **SHAPE)
    _state["answer"] = _answer("auto")


def case(name: str, seed: int, _place: Path) -> str:
    """Load and answer, twice, within a limit that `seed` says; what was there before the fork does not count."""
    limit = (100 + 40 * seed) * 1_000_000
    memory = "1GB" if name == "a_budget_beyond_it" else "auto"
    with _within(limit if name else None):
        assert _answer(memory) == _state["answer"], "another text"
    return "right"


def _answer(memory: str) -> tuple[str, str]:
    from airllm_nb.notebook.renderers import SilentRenderer
    from airllm_nb.notebook.session import Session

    session = Session(SilentRenderer, lambda _: None)
    try:
        session.load(str(_state["folder"]), **LOAD, memory=memory)
        first = session.ask(PROMPT, max_new_tokens=2, temperature=0).text
        return first, session.ask(PROMPT, max_new_tokens=4, temperature=0).text
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
