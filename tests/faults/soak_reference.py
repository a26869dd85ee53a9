"""What the soak compares with: transformers' own models."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

CONTEXT = 4096
LONGEST = 24
"""Tokens of an answer that is gone on with as long as it can be."""
TEMPERATURE = 0.9
DTYPE = "dtype" if transformers.__version__ >= "5" else "torch_dtype"
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 256, "intermediate_size": 704, "shards": "2MB"},  # 12 MB in float32: seen where it stays behind
    "gpt2": {"n_positions": CONTEXT},
    "mistral": {},  # with a sliding window
    "mixtral": {},
    "qwen2": {},
}


class Reference:
    """A checkpoint, and what transformers says with it.

    Parameters
    ----------
    folder : Path
        Where to make it.
    kind : str
        One of SHAPES.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        context = {} if kind == "gpt2" else {"max_position_embeddings": CONTEXT}
        self.kind = kind
        self.folder = make_checkpoint(folder / kind, kind, tokenizer=True, **context | SHAPES[kind])
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self._models = {dtype: self._load(dtype) for dtype in ("float32", "bfloat16")}
        self.ids = functools.lru_cache(200)(self._ids)

    def _load(self, dtype: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, **{DTYPE: getattr(torch, dtype)}).eval()

    def logits(self, ids: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Return the logits of each position, shape (1, tokens, vocabulary)."""
        with torch.no_grad():
            return self._models[dtype](torch.tensor([ids])).logits

    def _ids(self, messages: tuple[str, ...], dtype: str, seed: int | None) -> list[int]:
        """Return the LONGEST tokens that follow a conversation of user and assistant in turn, greedily if `seed` is None."""
        turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(messages)]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        given = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        how = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": TEMPERATURE}
        with torch.random.fork_rng(()):
            torch.manual_seed(seed or 0)
            made = self._models[dtype].generate(**given, **how, max_new_tokens=LONGEST, pad_token_id=257)
        return made[0, given["input_ids"].shape[1] :].tolist()

    def text(self, ids: list[int]) -> str:
        """Return the text of the tokens of an answer."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
