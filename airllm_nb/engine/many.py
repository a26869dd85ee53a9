"""Many prompts at once: each pass over the layers serves a whole batch, so that a layer is read once for all its rows."""

from __future__ import annotations

import operator
import os
import reprlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from airllm_nb.compat.config import quiet
from airllm_nb.engine import fingerprint
from airllm_nb.engine.batch import Batch
from airllm_nb.engine.batch_sizes import batches
from airllm_nb.engine.context import require_fit
from airllm_nb.engine.decoding import Sampling
from airllm_nb.engine.prompts import encode
from airllm_nb.engine.results import Results
from airllm_nb.errors import PromptError
from airllm_nb.events import BatchBegin, BatchEnd, Event, Listener

if TYPE_CHECKING:
    from airllm_nb.engine.model import LayeredModel


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
    that are nearly equally likely. Where padding would change more, only prompts of one length share a batch. What a checkpoint's
    generation config demands beyond `airllm_nb.engine.decoding.OF_THE_CHECKPOINT` does not count, as with Bart's forced last
    token: ``generate`` itself would obey it.

    Parameters
    ----------
    prompts : iterable of str
        A list, a column of a DataFrame, ...; each goes through the chat template where the tokenizer has one. Equal ones are
        computed once, unless they are sampled.
    max_new_tokens : int
        The largest length of an answer, in tokens.
    batch : int or "auto"
        Most prompts that share a pass; ``"auto"`` takes as many as their KV caches leave room for, up to
        `airllm_nb.engine.batch_sizes.MOST_ROWS`.
    results : path, optional
        A file to which each batch's texts are appended, one JSON object a line, and from which a later call takes them, so that
        it goes on where an earlier one was stopped. Several processes may share one. What is computed for another model, other
        prompts or settings is told apart as `airllm_nb.engine.fingerprint` says.
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
        If the file belongs to other prompts, settings or another model, or cannot be written; or if functions on the layers or
        weights changed in memory make the model another one than its files are.
    KeyboardInterrupt
        If the user interrupts. What is complete, rows of an unfinished batch among it, is in the file.
    """
    model._runtime.require_open()  # noqa: SLF001
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, stop)  # type: ignore[arg-type]  # makes it a tuple
    most = _most_rows(batch)
    _check_options(system, raw, progress)
    texts, rows = [], []
    with quiet():
        for index, text in enumerate(each_text(prompts)):
            texts.append(text)
            rows.append(_encode(model, index, text, system, sampling.max_new_tokens, raw=raw))
        file = None if results is None else Results.open(results, fingerprint.keys(model, texts, system, sampling, raw=raw))
        return _answer(model, rows, sampling, most, file, progress)


def _answer(
    model: LayeredModel,
    rows: Sequence[list[int]],
    sampling: Sampling,
    most: int | None,
    file: Results | None,
    listener: Listener | None,
) -> list[str]:
    """Answer rows of ids, the longest first: if memory is short, it is seen at once."""
    groups = _equal(rows, apart=sampling.temperature > 0)
    answers = _Answers(len(rows), file, listener or model._runtime.emit)  # noqa: SLF001
    answers.find(groups)
    left = [group for group in groups if group[0] not in answers.texts]
    left.sort(key=lambda group: -len(rows[group[0]]))
    if left and file is not None:
        file.require_writable()
    for part in batches(model, [len(rows[group[0]]) for group in left], sampling.max_new_tokens, most):
        firsts = [group[0] for group in left[part]]
        batch = Batch(model, [rows[index] for index in firsts], sampling)
        answers.begin(len(firsts), sampling.max_new_tokens)
        try:
            batch.generate(None if sampling.seed is None else fingerprint.seed_of(sampling.seed, firsts[0]), listener)
        finally:
            complete = zip(left[part], batch.texts(), strict=True)
            answers.end({index: text for group, text in complete if text is not None for index in group})
    return [answers.texts[index] for index in range(len(rows))]


def _equal(rows: Sequence[list[int]], *, apart: bool) -> list[list[int]]:
    """Return the indices of rows, those of equal rows together unless they are to be kept apart."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, ids in enumerate(rows):
        groups.setdefault((*ids, -index) if apart else tuple(ids), []).append(index)
    return list(groups.values())


class _Answers:
    """The prompts of one map that have an answer: kept in the file, and told of.

    Attributes
    ----------
    texts : dict of int to str
        The answers by the prompt's index.
    """

    def __init__(self, total: int, file: Results | None, emit: Callable[[Event], object]) -> None:
        self.texts: dict[int, str] = {}
        self._total = total
        self._file = file
        self._emit = emit
        self._computed = 0
        self._began = 0.0

    def find(self, groups: Iterable[Sequence[int]]) -> None:
        """Take what is in the file, also for prompts that equal one of those there."""
        found = {} if self._file is None else self._file.found
        self.texts |= found
        for group in groups:
            known = next((found[index] for index in group if index in found), None)
            if known is not None:
                self._keep({index: known for index in group if index not in found})
        if self.texts:
            self._emit(BatchEnd(0.0, dict(self.texts), **self._counts()))

    def begin(self, rows: int, tokens: int) -> None:
        """Tell that the next batch begins."""
        self._emit(BatchBegin(rows, tokens, **self._counts()))
        self._began = time.perf_counter()

    def end(self, texts: dict[int, str]) -> None:
        """Keep what a batch has made, and tell of it."""
        seconds = time.perf_counter() - self._began
        self._keep(texts)
        self._computed += len(texts)
        self._emit(BatchEnd(seconds, texts, **self._counts()))

    def _keep(self, texts: dict[int, str]) -> None:
        if self._file is not None and texts:
            self._file.add(texts)
        self.texts |= texts

    def _counts(self) -> dict[str, int]:
        return {"done": len(self.texts), "computed": self._computed, "total": self._total}


def each_text(prompts: Iterable[str]) -> Iterator[str]:
    """Go through prompts.

    Raises
    ------
    PromptError
        If they are something else: one text, a whole table, or with a number among them.
    """
    if isinstance(prompts, str):
        raise PromptError("The prompts are one text.", "Put it into a list, or take its lines with .splitlines().")
    if isinstance(prompts, Mapping) or hasattr(prompts, "columns") or not hasattr(prompts, "__iter__"):
        raise _no_prompts(prompts)
    try:
        texts = iter(prompts)
    except TypeError as error:  # an array without axes
        raise _no_prompts(prompts) from error
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            cause = f"Prompt {index} (from 0 on) is no text, but {type(text).__name__}: {reprlib.repr(text)}."
            raise PromptError(cause, "Leave it out, or say it in words.")
        yield text


def _no_prompts(value: Any) -> PromptError:
    return PromptError(f"The prompts are a {type(value).__name__}.", "Give a list of texts, or one column of a table.")


def _encode(model: LayeredModel, index: int, text: str, system: str | None, new: int, *, raw: bool) -> list[int]:
    """Turn a prompt into ids; an error says which of them it is."""
    try:
        ids = encode(model, text, system, raw=raw)
        require_fit(model.name, model.context_length, len(ids), new)
    except PromptError as error:
        raise PromptError(f"Prompt {index} (from 0 on): {error.cause}", error.remedy) from error
    return ids


def _most_rows(batch: Any) -> int | None:
    """Return the largest batch that is asked for, None for ``"auto"``."""
    if isinstance(batch, str) and batch == "auto":
        return None
    try:
        most = operator.index(batch)
    except TypeError:
        most = 0
    if most < 1 or isinstance(batch, bool):
        raise PromptError(f"The batch is {batch!r}.", 'Use "auto", or a whole number from 1 up.')
    return most


def _check_options(system: Any, raw: Any, progress: Any) -> None:
    if not (system is None or isinstance(system, str)):
        raise PromptError(f"The system prompt is no text, but {type(system).__name__}.", "Say it in words, or leave it out.")
    if not isinstance(raw, bool):
        raise PromptError(f"raw is {reprlib.repr(raw)}.", "Use True for prompts as they are, False for the chat template.")
    if not (progress is None or callable(progress)):
        raise PromptError(f"progress is {reprlib.repr(progress)}.", "Give a function that takes an event, or leave it out.")
