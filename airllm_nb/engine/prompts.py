"""What the user says becomes ids: through the tokenizer's chat template where it has one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
        if lone := re.search("[\ud800-\udfff]", text):
            raise PromptError(f"The prompt holds {lone[0]!r}, half of a character.", "Remove it, or write the whole character.")


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
    ids = encoded["input_ids"]
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return list(ids[0] if ids and isinstance(ids[0], list) else ids)


def text_or_ids(model: LayeredModel, prompt: TextOrIds) -> list[int]:
    """Return the ids of one text, taken as it is.

    Raises
    ------
    PromptError
        If there are none, more than one text, or ids that the model does not have.
    """
    if isinstance(prompt, str):
        prompt = model.tokenizer(prompt)
    ids = prompt["input_ids"] if isinstance(prompt, Mapping) else prompt
    numbers: Any = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
    if numbers and isinstance(numbers[0], list):
        if len(numbers) > 1:
            raise PromptError(f"There are {len(numbers)} prompts.", "Trace them one by one.")
        (numbers,) = numbers
    if not numbers:
        raise PromptError("The prompt is empty.", "Write something for the model to go on from.")
    known = model.get_input_embeddings().weight.shape[0]
    if wrong := [number for number in numbers if not 0 <= number < known]:
        raise PromptError(f"The model has no token {wrong[0]}.", f"Its tokens are 0 to {known - 1}.")
    return list(map(int, numbers))
