"""One batch of prompts: computed together, each row until its own end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers  # not its names: below the floor they are missing, and importing must go well until that is said

from airllm_nb.compat import dynamic
from airllm_nb.engine import decoding
from airllm_nb.engine.decoding import Sampling

if TYPE_CHECKING:
    from airllm_nb.engine.model import LayeredModel
    from airllm_nb.events import Listener


class Batch:
    """Rows of ids: also a stopping criterion for ``generate``, by which the new ids come and a row's end is seen.

    Parameters
    ----------
    model : LayeredModel
        Computes them.
    rows : sequence of list of int
        The prompts.
    sampling : Sampling
        How the next token is chosen, and when a row ends.
    """

    def __init__(self, model: LayeredModel, rows: Sequence[list[int]], sampling: Sampling) -> None:
        self._model = model
        self._rows = rows
        self._sampling = sampling
        self._ids: list[list[int]] = [[] for _ in rows]
        self._ended = [False] * len(rows)
        self._ends = decoding.as_set(model.generation_config.eos_token_id)
        stop_strings = model.generation_config.stop_strings  # transformers ends a row at these, and says so to nobody
        self._stops = transformers.StopStringCriteria(model.tokenizer, stop_strings) if stop_strings else None

    def generate(self, seed: int | None, listener: Listener | None) -> None:
        """Compute until all rows have ended, and tell `listener` of it.

        They are padded at the left, each with its own first token: the mask hides it, and a repetition penalty counts nothing
        that the prompt does not hold.
        """
        width = max(map(len, self._rows))
        missing = [width - len(ids) for ids in self._rows]
        options = self._sampling.options(self._model) | {
            "input_ids": torch.tensor([ids[:1] * pad + ids for ids, pad in zip(self._rows, missing, strict=True)]),
            "attention_mask": torch.tensor([[0] * pad + [1] * (width - pad) for pad in missing]),
            "max_new_tokens": self._sampling.max_new_tokens,
            "pad_token_id": decoding.pad_id(self._model),
            "stopping_criteria": [self],
        }
        runtime = self._model._runtime  # noqa: SLF001
        # One lock around it all: another thread's longer text could come between, or its listener.
        with runtime.lock, _listening(self._model, listener), _seeded(seed):
            dynamic.forget(self._model)
            before = runtime.passes
            with decoding.refusals(self._model, lambda: runtime.passes > before):
                self._model.generate(**options)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Take the newest id of each row that has not ended; tell which have."""
        stopped = [False] * len(self._rows) if self._stops is None else self._stops(input_ids, scores).tolist()
        for row, number in enumerate(input_ids[:, -1].tolist()):
            if not self._ended[row]:
                ids = self._ids[row]
                ids.append(number)
                ended = stopped[row] or number in self._ends or len(ids) >= self._sampling.max_new_tokens
                self._ended[row] = ended or any(stop in self._text(ids) for stop in self._sampling.stop)
        return torch.tensor(self._ended, device=input_ids.device)

    def texts(self) -> list[str | None]:
        """Return each row's text, without special tokens and what comes from a stop text on; None if it has not ended."""
        return [self._cut(self._text(ids)) if ended else None for ids, ended in zip(self._ids, self._ended, strict=True)]

    def _text(self, ids: list[int]) -> str:
        text: str = self._model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _cut(self, text: str) -> str:
        return text[: min((text.find(stop) for stop in self._sampling.stop if stop in text), default=len(text))]


@contextlib.contextmanager
def _listening(model: LayeredModel, listener: Listener | None) -> Iterator[None]:
    """Let a listener be told in place of the model's own; whoever is put there meanwhile stays."""
    if listener is None:
        yield
        return
    before = model.progress
    try:
        model.progress = listener
        yield
    finally:
        if model.progress == listener:
            model.progress = before


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed PyTorch's random numbers for a while, if a seed is given."""
    if seed is None:
        yield
        return
    on_gpus = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpus else ()):
        torch.manual_seed(seed)
        yield
