"""Many prompts at once: each pass over the layers serves a whole batch, so that a layer is read once for all its rows."""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers

from airllm_nb.compat import dynamic, padding
from airllm_nb.compat.config import field, quiet, text_config
from airllm_nb.engine import decoding, memory, prompts
from airllm_nb.engine.checkpoint import Checkpoint
from airllm_nb.engine.context import require_fit
from airllm_nb.engine.decoding import Sampling
from airllm_nb.engine.planning import cache_nbytes
from airllm_nb.engine.results import Results, hash_of, hash_of_model
from airllm_nb.errors import PromptError
from airllm_nb.events import BatchBegin, BatchEnd, Listener

if TYPE_CHECKING:
    from airllm_nb.engine.model import LayeredModel

MOST_ROWS = 32
"""Largest batch that ``"auto"`` takes: by then computing takes longer than reading, and more rows gain little."""
SHARE = 0.5
"""Of the memory that is left, how much a batch may take by our estimate."""


def map_prompts(
    model: LayeredModel,
    prompts: Iterable[str],
    *,
    max_new_tokens: int = 256,
    batch: int | Literal["auto"] = "auto",
    results: str | os.PathLike[str] | None = None,
    system: str | None = None,
    raw: bool = False,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    progress: Listener | None = None,
) -> list[str]:
    """Answer many prompts: one pass over the layers serves a whole batch of them.

    The texts are those that each prompt would get alone, but for last bits of the logits, which can decide between two tokens
    that are nearly equally likely. Where padding would change more, only prompts of one length share a batch.

    Parameters
    ----------
    prompts : iterable of str
        A list, a column of a DataFrame, ...; each goes through the chat template where the tokenizer has one. Equal ones are
        computed once, unless they are sampled.
    max_new_tokens : int
        The largest length of an answer, in tokens.
    batch : int or "auto"
        Most prompts that share a pass; ``"auto"`` takes as many as their KV caches leave room for, up to `MOST_ROWS`.
    results : path, optional
        A file to which each batch's texts are appended, one JSON object a line, and from which a later call takes them, so that
        it goes on where an earlier one was stopped.
    system, raw
        A system prompt for the chat template; True gives the prompts to the model as they are.
    temperature, top_p, seed, stop
        See `airllm_nb.engine.decoding.Sampling`. A seed repeats the texts if the batches are the same, too.
    progress : callable(event), optional
        Told of all events meanwhile, in place of ``model.progress``: `BatchBegin` and `BatchEnd` say how far it is.

    Returns
    -------
    list of str
        The texts, in the order of the prompts.

    Raises
    ------
    PromptError
        If a prompt or an option makes no sense, or a prompt and its answer do not fit the context; nothing is computed then.
    ResultsError
        If the file belongs to other prompts, settings or another model, or cannot be written.
    KeyboardInterrupt
        If the user interrupts. What is complete, rows of an unfinished batch among it, is in the file.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, tuple(stop))
    if batch != "auto" and not (type(batch) is int and batch > 0):
        raise PromptError(f"The batch is {batch!r}.", 'Use "auto", or a number from 1 up.')
    with quiet(), _listening(model, progress):
        texts = enumerate(as_texts(prompts))
        rows = [_encode(model, index, text, system, max_new_tokens, raw=raw) for index, text in texts]
        file = None if results is None else Results(results, _keys(model, rows, sampling))
        return _answer(model, rows, sampling, batch, file)


def _answer(
    model: LayeredModel, rows: Sequence[list[int]], sampling: Sampling, batch: int | str, file: Results | None
) -> list[str]:
    """Answer rows of ids, the longest first: if memory is short, it is seen at once."""
    texts = dict(file.found) if file else {}
    equal: dict[tuple[int, ...], list[int]] = {}
    for index, ids in enumerate(rows):
        equal.setdefault((*ids, -index) if sampling.temperature else tuple(ids), []).append(index)
    for group in equal.values():
        found = next((texts[index] for index in group if index in texts), None)
        if found is not None:
            again = {index: found for index in group if index not in texts}
            _keep(file, again)
            texts |= again
    if texts:
        model._runtime.emit(BatchEnd(0.0, dict(texts), done=len(texts), computed=0, total=len(rows)))  # noqa: SLF001
    groups = [group for group in equal.values() if group[0] not in texts]
    groups.sort(key=lambda group: -len(rows[group[0]]))
    computed = 0
    for part in _batches(model, [len(rows[group[0]]) for group in groups], sampling.max_new_tokens, batch):
        made = _Rows(model, [rows[group[0]] for group in groups[part]], sampling)
        told = {"done": len(texts), "computed": computed, "total": len(rows)}
        model._runtime.emit(BatchBegin(len(groups[part]), sampling.max_new_tokens, **told))  # noqa: SLF001
        began = time.perf_counter()
        try:
            made.generate(None if sampling.seed is None else sampling.seed + groups[part][0][0])
        finally:
            pairs = zip(groups[part], made.texts(), strict=True)
            fresh = {index: text for group, text in pairs if text is not None for index in group}
            _keep(file, fresh)
            texts |= fresh
            computed += len(fresh)
            told = {"done": len(texts), "computed": computed, "total": len(rows)}
            model._runtime.emit(BatchEnd(time.perf_counter() - began, fresh, **told))  # noqa: SLF001
    return [texts[index] for index in range(len(rows))]


def _keep(file: Results | None, texts: dict[int, str]) -> None:
    if file and texts:
        file.add(texts)


class _Rows:
    """The rows of one batch: a stopping criterion for ``generate``, by which the new ids come and a row's end is seen."""

    def __init__(self, model: LayeredModel, rows: Sequence[list[int]], sampling: Sampling) -> None:
        self._model = model
        self._rows = rows
        self._sampling = sampling
        self._ids: list[list[int]] = [[] for _ in rows]
        self._ended = [False] * len(rows)
        self._ends = decoding.as_set(model.generation_config.eos_token_id)

    def generate(self, seed: int | None) -> None:
        """Compute until all rows have ended.

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
        dynamic.forget(self._model)
        runtime = self._model._runtime  # noqa: SLF001
        before = runtime.passes
        with _seeded(seed), decoding.refusals(self._model, lambda: runtime.passes > before):
            self._model.generate(**options)

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """Take the newest id of each row that has not ended; tell which have."""
        for row, number in enumerate(input_ids[:, -1].tolist()):
            if not self._ended[row]:
                ids = self._ids[row]
                ids.append(number)
                full = len(ids) >= self._sampling.max_new_tokens
                self._ended[row] = full or number in self._ends or any(stop in self._text(ids) for stop in self._sampling.stop)
        return torch.tensor(self._ended, device=input_ids.device)

    def texts(self) -> list[str | None]:
        """Return each row's text, without special tokens and what comes from a stop text on; None if it has not ended."""
        return [self._cut(self._text(ids)) if ended else None for ids, ended in zip(self._ids, self._ended, strict=True)]

    def _text(self, ids: list[int]) -> str:
        text: str = self._model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _cut(self, text: str) -> str:
        return text[: min((text.find(stop) for stop in self._sampling.stop if stop in text), default=len(text))]


def as_texts(prompts: Iterable[str]) -> list[str]:
    """Return prompts as a list.

    Raises
    ------
    PromptError
        If they are something else: one text, a whole table, or with a number among them.
    """
    if isinstance(prompts, str):
        raise PromptError("The prompts are one text.", "Put it into a list, or take its lines with .splitlines().")
    if isinstance(prompts, Mapping) or hasattr(prompts, "columns") or not hasattr(prompts, "__iter__"):
        raise PromptError(f"The prompts are a {type(prompts).__name__}.", "Give a list of texts, or one column of a table.")
    texts = list(prompts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            cause = f"Prompt {index} (from 0 on) is no text, but {type(text).__name__}: {text!r}."
            raise PromptError(cause, "Leave it out, or say it in words.")
    return texts


def _encode(model: LayeredModel, index: int, text: str, system: str | None, new: int, *, raw: bool) -> list[int]:
    """Turn a prompt into ids; an error says which of them it is."""
    try:
        ids = prompts.encode(model, text, system, raw=raw)
        require_fit(model.name, model.context_length, len(ids), new)
    except PromptError as error:
        raise PromptError(f"Prompt {index} (from 0 on): {error.cause}", error.remedy) from error
    return ids


def _keys(model: LayeredModel, rows: Sequence[list[int]], sampling: Sampling) -> list[str]:
    """Return what tells each prompt's result from any other."""
    checkpoint, default = model.generation_config, transformers.GenerationConfig()
    own = {
        name: repr(getattr(checkpoint, name, None))
        for name in sorted(decoding.OF_THE_CHECKPOINT)
        if getattr(checkpoint, name, None) != getattr(default, name, None)
    }
    made_by = hash_of_model(model.path, Checkpoint(model.path).states)
    settings = hash_of([asdict(sampling), str(model.dtype), own])
    return [f"{made_by}-{settings}-{hash_of(ids)}" for ids in rows]


def _batches(model: LayeredModel, lengths: Sequence[int], new: int, asked: int | str) -> Iterator[slice]:
    """Yield the parts of prompts (the longest come first) that share passes."""
    begin = 0
    while begin < len(lengths):
        most = asked if isinstance(asked, int) else _rows_that_fit(model, lengths[begin], new)
        end = min(begin + padding.rows(model, most), len(lengths))
        if not padding.exact(model, lengths[begin] + new):
            end = next((at for at in range(begin, end) if lengths[at] != lengths[begin]), end)
        yield slice(begin, end)
        begin = end


def _rows_that_fit(model: LayeredModel, prompt: int, new: int) -> int:
    """Return how many rows the memory that is left has room for: their KV caches, and what computes the prompt's pass."""
    text = text_config(model.config)
    width, inner = (field(text, name) or 4096 for name in ("hidden_size", "intermediate_size"))
    forward = inspect.signature(type(model._hf).forward).parameters  # noqa: SLF001
    scored = 1 if {"logits_to_keep", "num_logits_to_keep"} & set(forward) else prompt  # positions
    heads, words = (field(text, name) or 1 for name in ("num_attention_heads", "vocab_size"))
    floats = prompt * (4 * width + 3 * inner + heads * prompt) + 2 * scored * words
    each = cache_nbytes(model.config, len(model.layers), model.dtype, prompt + new) + 4 * floats
    left = memory.available(model.device)[0] - memory.ACTIVATIONS
    return max(1, min(MOST_ROWS, int(left * SHARE) // each))


@contextlib.contextmanager
def _listening(model: LayeredModel, listener: Listener | None) -> Iterator[None]:
    before = model.progress
    try:
        model.progress = listener or before
        yield
    finally:
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
