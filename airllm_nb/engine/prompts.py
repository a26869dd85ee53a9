"""What the user says becomes ids: through the tokenizer's chat template where it has one."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from airllm_nb.engine.decoding import in_words
from airllm_nb.errors import PromptError

if TYPE_CHECKING:
    from airllm_nb import LayeredModel

Message = dict[str, str]
"""One turn's part: ``{"role": "system" | "user" | "assistant", "content": text}``."""


TextOrIds = str | torch.Tensor | Sequence[int] | Mapping[str, Any]
"""A text, the ids of its tokens, or what a tokenizer has made of it."""


def check(prompt: str, system: str | None) -> None:
    """Refuse what is no prompt.

    Raises
    ------
    PromptError
        If there is none, or a text holds half of a character.
    """
    if not prompt.strip():
        raise PromptError("There is no prompt.", "Write one: below the line with %%airllm, or into the panel's box.")
    for text in (prompt, system or ""):
        _require_characters(text)


def encode(model: LayeredModel, prompt: str, system: str | None, *, raw: bool) -> list[int]:
    """Turn a single prompt into ids; `raw` leaves the chat template out.

    Raises
    ------
    PromptError
        If there is no prompt, `system` is given and there is no place for it, or the chat template fails.
    """
    check(prompt, system)
    if raw or not model.tokenizer.chat_template:
        if system is not None:
            why = "is not used with --raw" if raw else f"of {model.name} does not exist"
            raise PromptError(f"A system prompt needs a chat template, which {why}.", "Write it into the prompt itself.")
        return ids_of(model.tokenizer(prompt))
    messages = [{"role": "user", "content": prompt.strip()}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return encode_chat(model, messages, "Leave --system out, or use --raw." if system is not None else "Use --raw.")


def encode_chat(model: LayeredModel, messages: Sequence[Message], remedy: str) -> list[int]:
    """Turn messages into ids by the chat template.

    Raises
    ------
    PromptError
        If it fails; `remedy` is what to do then.
    """
    try:
        encoded = model.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # a template is a program of the checkpoint, and can fail in any way
        raise PromptError(f"The chat template of {model.name} fails with {in_words(error)}.", remedy) from error
    return ids_of(encoded)


def ids_of(encoded: Any) -> list[int]:
    """Return the ids of the one text that a tokenizer has encoded."""
    (ids,) = _rows(encoded["input_ids"])
    return ids


def text_or_ids(model: LayeredModel, prompt: TextOrIds) -> list[int]:
    """Return the ids of one text, taken as it is; padding that an attention mask hides is left out.

    Raises
    ------
    PromptError
        If it is something else, empty, more than one text, or holds ids that the model does not have.
    """
    if isinstance(prompt, str):
        _require_characters(prompt)
        prompt = model.tokenizer(prompt)
    try:
        rows = _rows(prompt["input_ids"] if isinstance(prompt, Mapping) else prompt)
        mask = prompt.get("attention_mask") if isinstance(prompt, Mapping) else None
        shown = None if mask is None else _rows(mask, bool)[0]
    except (TypeError, KeyError) as error:
        raise PromptError(
            f"The prompt is neither a text nor the ids of one: it is a {type(prompt).__name__}.",
            "Give a text, a list or tensor of whole numbers, or what the tokenizer returns.",
        ) from error
    if len(rows) > 1:
        raise PromptError(f"There are {len(rows)} prompts.", "Give one at a time.")
    ids = rows[0] if shown is None else _without_padding(rows[0], shown)
    if not ids:
        raise PromptError("The prompt is empty.", "Write something for the model to go on from.")
    known = model.get_input_embeddings().weight.shape[0]
    if wrong := [number for number in ids if not 0 <= number < known]:
        raise PromptError(f"The model has no token {wrong[0]}.", f"Its tokens are 0 to {known - 1}.")
    return ids


def _require_characters(text: str) -> None:
    if lone := re.search("[\ud800-\udfff]", text):
        raise PromptError(f"The prompt holds {lone[0]!r}, half of a character.", "Remove it, or write the whole character.")


def _rows(ids: Any, kind: Callable[[Any], int] = operator.index) -> list[list[int]]:
    """Return numbers of a kind, of shape (tokens,) or (texts, tokens), as rows; whatever else raises TypeError."""
    if isinstance(ids, (str, bytes, Mapping)):
        raise TypeError
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not isinstance(values, list):
        raise TypeError
    if not any(isinstance(value, (list, tuple)) for value in values):
        values = [values]
    if kind is not bool and any(isinstance(value, bool) for row in values for value in row):
        raise TypeError
    return [list(map(kind, row)) for row in values]


def _without_padding(ids: list[int], shown: list[int]) -> list[int]:
    """Return the ids that a mask leaves; it may hide some at the sides."""
    places = [place for place, seen in enumerate(shown) if seen]
    if len(shown) != len(ids) or (places and len(places) != places[-1] - places[0] + 1):
        raise PromptError("The attention mask hides tokens within the text.", "Leave them out of the ids, too.")
    return ids[places[0] : places[-1] + 1] if places else []
