"""How the next token is chosen, what of that a checkpoint may say, and what to say when it cannot be done."""

from __future__ import annotations

import contextlib
import numbers
import operator
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from airllm_nb.errors import PromptError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from airllm_nb import LayeredModel

OF_THE_CHECKPOINT = frozenset((
    "bos_token_id", "eos_token_id", "pad_token_id", "stop_strings", "use_cache",
    "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size", "sequence_bias", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "renormalize_logits", "remove_invalid_values",
))  # fmt: skip
"""What a checkpoint's generation config decides. All else in it (beams, other caches, other methods, lengths) is ours: a
prompt has one text, which is taken token by token as it comes."""

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 1e3
"""Beyond these, scores divided by it leave the range of float32, or of any use."""

WORDS = 200


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when the text ends.

    What is not named here, such as ``top_k`` or a repetition penalty, is as the model's own generation config has it.

    Parameters
    ----------
    max_new_tokens : int
        The text's largest length in tokens, from 1 up.
    temperature : float
        What the logits are divided by, from `LEAST_TEMPERATURE` to `MOST_TEMPERATURE`; 0 takes the most likely token every time.
    top_p : float, optional
        Sample from the most likely tokens that have this probability together: above 0 and up to 1.
    seed : int, optional
        Makes sampling repeatable: from 0 up to 2^63 - 1.
    stop : sequence of str
        The text ends before the first of these. Kept as a tuple.

    Raises
    ------
    PromptError
        If a value makes no sense.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_types()
        if self.max_new_tokens < 1:
            raise PromptError(f"max-new-tokens is {self.max_new_tokens}.", "Ask for 1 token or more.")
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE:
            raise PromptError(
                f"The temperature is {self.temperature}.",
                f"Use 0 (no sampling), or {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}, such as 0.7.",
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise PromptError(f"top-p is {self.top_p}.", "Use a share above 0 and up to 1, such as 0.9.")
        if self.top_p is not None and not self.temperature:
            raise PromptError("top-p has no effect without sampling.", "Give a temperature above 0 as well.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise PromptError(f"The seed is {self.seed}.", "Use a whole number from 0 up.")
        if "" in self.stop:
            raise PromptError("A stop text is empty.", "Write the text at which to stop, or leave it out.")

    def _check_types(self) -> None:
        """Make numbers of any library Python's own; refuse what only looks like one, and a text in place of several."""
        kinds = {"max_new_tokens": _whole, "seed": _whole, "temperature": _real, "top_p": _real}
        for name, number in kinds.items():
            value = getattr(self, name)
            if value is None and name in ("seed", "top_p"):
                continue
            try:
                object.__setattr__(self, name, number(value))  # frozen
            except TypeError:
                kind = "number" if number is _real else "whole number"
                cause = f"{name.replace('_', '-')} is {reprlib.repr(value)}, which is no {kind}."
                raise PromptError(cause, f"Give a {kind}.") from None
        said: Any = self.stop
        texts = tuple(said) if isinstance(said, Iterable) and not isinstance(said, str) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise PromptError(f"stop is {reprlib.repr(said)}.", 'Give a list of texts, such as stop=["\\n"].')
        object.__setattr__(self, "stop", texts)

    def options(self, model: LayeredModel) -> dict[str, Any]:
        """Return what ``generate`` takes; whatever the checkpoint says beyond `OF_THE_CHECKPOINT` is put back to its default."""
        checkpoint, default = model.generation_config, transformers.GenerationConfig()
        options = {
            name: getattr(default, name, None)
            for name in vars(checkpoint)
            if not name.startswith("_") and name not in OF_THE_CHECKPOINT
        }
        # transformers 4 runs Gemma 2 and 3 with this cache only; 5 knows by itself.
        cache = "hybrid" if getattr(checkpoint, "cache_implementation", None) == "hybrid" else None
        options |= {"num_beams": 1, "num_return_sequences": 1, "cache_implementation": cache, "tokenizer": model.tokenizer}
        options["do_sample"] = self.temperature > 0
        options["temperature"] = self.temperature or None
        if not self.temperature:
            options |= {"top_p": None, "top_k": None}  # transformers would advise against them
        elif self.top_p is not None:
            options["top_p"] = self.top_p
        options["logits_processor"] = [_Finite(model)]
        return options


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


@contextlib.contextmanager
def refusals(model: LayeredModel, begun: Callable[[], object]) -> Iterator[None]:
    """Turn what transformers raises before the first pass has `begun`, when it checks its options, into one line.

    Raises
    ------
    UnsupportedError
        If transformers refuses to generate as the checkpoint wants it.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        if begun():
            raise
        raise UnsupportedError(
            f"transformers refuses to generate with {model.name}: {in_words(error)}.",
            f"Correct generation_config.json (or what config.json says of generating) in {model.path}, and load it again.",
        ) from error


def in_words(error: BaseException) -> str:
    """Return an exception's kind and message on one line, without a full stop."""
    text = " ".join(str(error).split())
    text = text if len(text) <= WORDS else text[:WORDS] + "…"
    return f"{type(error).__name__}: {text}".rstrip(" :.")


def as_set(ids: int | list[int] | None) -> set[int]:
    """Return the ids that a config names: none, one or several."""
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def end_ids(model: LayeredModel) -> set[int]:
    """Return the ids that end a text: the generation config's where it names some, else the tokenizer's."""
    found = model.generation_config.eos_token_id
    return as_set(model.tokenizer.eos_token_id if found is None else found)


def pad_id(model: LayeredModel) -> int | None:
    """Return the padding id; one sequence needs none, but transformers warns if it is not given."""
    pad: int | None = model.tokenizer.pad_token_id
    return min(end_ids(model), default=None) if pad is None else pad


class _Finite:
    """A logits processor for ``generate`` that looks whether the model's scores are numbers."""

    def __init__(self, model: LayeredModel) -> None:
        self._model = model

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(scores.max()):  # NaN wins over all numbers
            if self._model._runtime.taps:  # noqa: SLF001
                raise UnsupportedError(
                    f"What {self._model.name} computes is not a number, with functions of yours on its layers.",
                    "See what they return; without them it should be one.",
                )
            dtype = str(self._model.dtype).removeprefix("torch.")
            raise UnsupportedError(
                f"What {self._model.name} computes is not a number: its weights are damaged, or {dtype} overflows.",
                "Load it with --dtype float32; if that does not help, fetch its files again.",
            )
        return scores.float()  # dividing by a small temperature overflows float16
