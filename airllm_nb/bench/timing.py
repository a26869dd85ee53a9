"""What is the same on both sides of a comparison: how a model generates, and how that is timed.

Also imported by `peers.py`, in a Python that need not have airllm_nb: nothing of ours may be imported at the top.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import torch

PROMPT = 8
"""Tokens of the prompt. Any will do: the weights are random."""


class Stamps:
    """A logits processor that only notes when it is called: once after each pass."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, _ids: Any, scores: Any) -> Any:
        """Note the time."""
        self.times.append(time.perf_counter())
        return scores

    @property
    def seconds(self) -> list[float]:
        """From each token to the next."""
        return [after - before for before, after in itertools.pairwise(self.times)]


def prompt_ids(prompt: int = PROMPT) -> list[int]:
    """Return the prompt that all sides get."""
    return list(range(5, 5 + prompt))


def generate(model: Any, tokens: int, batch: int = 1, prompt: int = PROMPT, **options: Any) -> list[float]:
    """Generate `tokens` and one more, and return the seconds of each but the first."""
    stamps = Stamps()
    ids = torch.tensor([prompt_ids(prompt)]).repeat(batch, 1)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens + 1, min_new_tokens=tokens + 1, do_sample=False,
        pad_token_id=0, logits_processor=[stamps], **options,
    )  # fmt: skip
    return stamps.seconds


def read_bytes() -> int:
    """Return how many bytes this process has made the disk deliver."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def plain(folder: str, dtype: str = "bfloat16", **options: Any) -> Any:
    """Load a model as transformers itself does."""
    import transformers

    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"  # noqa: PLR2004  # as in 4
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{name: getattr(torch, dtype)}, **options).eval()
