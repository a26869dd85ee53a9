"""Row i: several tokens a pass, because the next ones are guessed, from the prompt or by a draft model, and only checked."""

from __future__ import annotations

import time
from typing import Any

import torch

from airllm_nb import LayeredModel, plan
from airllm_nb.bench.machine import BenchError
from airllm_nb.bench.timing import plain, prompt_ids
from airllm_nb.compat.tokenizer import TOKENIZER_FILES
from airllm_nb.events import PassEnd

TEXT = (
    "The ferry leaves the harbour at seven, calls at the lighthouse, the old fort and the fishing village, waits there for an "
    "hour while the mail is sorted, and is back before the museum closes at five. "
)
LOOKUP = 10
"""Tokens that prompt lookup may guess at once, as in transformers' documentation."""


def guesses(folder: str, tokens: int) -> dict[str, Any]:
    """Stream with the least budget, and let tokens be guessed in two ways: from the prompt, and by a model that stays in memory.

    The draft is the same model: how good a draft guesses is not the engine's business, what is done with the guesses is.
    """
    return {dtype: _both_ways(folder, dtype, tokens) for dtype in ("float32", "bfloat16")}


def _both_ways(folder: str, dtype: str, tokens: int) -> dict[str, Any]:
    least = plan(folder, device="cpu", dtype=dtype, memory="1000TB").least
    resident, resident_draft = plain(folder, dtype), plain(folder, dtype)
    with (
        LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory=least) as ours,
        LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory="1000TB") as draft,
    ):
        ids = _repeated(ours)
        ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "lookup": ({"prompt_lookup_num_tokens": LOOKUP}, {"prompt_lookup_num_tokens": LOOKUP}),
            "draft": ({"assistant_model": draft}, {"assistant_model": resident_draft}),
        }
        found: dict[str, Any] = {}
        for way, (options, resident_options) in ways.items():
            passes = 0

            def count(event: Any) -> None:
                nonlocal passes
                passes += isinstance(event, PassEnd)

            ours.progress = count
            begin = time.perf_counter()
            text = _generate(ours, ids, tokens, options)
            seconds = time.perf_counter() - begin
            ours.progress = None
            # float32 is exact, and so guessing changes nothing; bfloat16 rounds by how many rows are computed together.
            expected = _generate(resident, ids, tokens, {} if dtype == "float32" else resident_options)
            if text != expected:
                raise BenchError(f"In {dtype}, {way} gives other tokens.", "This is a fault of the engine: please report it.")
            found[way] = {"tokens per pass": len(text) / passes, "tokens": len(text), "passes": passes, "seconds": seconds}
    return found


def _repeated(model: LayeredModel) -> torch.Tensor:
    """Return a prompt that says the same three times; a checkpoint without a tokenizer gets numbers."""
    if any((model.path / file).is_file() for file in TOKENIZER_FILES):
        ids: torch.Tensor = model.tokenizer(TEXT * 3, return_tensors="pt").input_ids
        return ids
    return torch.tensor([prompt_ids() * 3])


def _generate(model: Any, ids: torch.Tensor, tokens: int, options: dict[str, Any]) -> list[int]:
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options)
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found
