"""A turn of a conversation: encodes it as a whole, and computes what the KV cache of the turn before does not hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airllm_nb.compat import cache
from airllm_nb.engine import prompts
from airllm_nb.engine.interrupts import interrupt_later
from airllm_nb.errors import PromptError
from airllm_nb.notebook.generation import Run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airllm_nb import LayeredModel
    from airllm_nb.engine.decoding import Sampling
    from airllm_nb.engine.prompts import Message
    from airllm_nb.notebook.conversation import Conversation
    from airllm_nb.notebook.summary import Answer


class Turn(Run):
    """A run that goes on with a conversation.

    Parameters
    ----------
    model : LayeredModel
        The model.
    conversation : Conversation
        Gets the messages, when the turn has begun.
    prompt : str
        What the user says.
    system : str or None
        The system prompt from now on; None leaves the one there is, an empty one takes it away.
    sampling : Sampling
        How the next token is chosen, and when the text ends.

    Raises
    ------
    PromptError
        If there is no prompt, or `system` is given and there is no place for it.
    """

    def __init__(
        self, model: LayeredModel, conversation: Conversation, prompt: str, system: str | None, sampling: Sampling
    ) -> None:
        super().__init__(model, lambda: _encode(model, messages), sampling)
        prompts.check(prompt, system)
        messages = list(conversation.messages)
        if model.tokenizer.chat_template:
            prompt = prompt.strip()
        elif system:
            raise PromptError(
                f"A system prompt needs a chat template, which {model.name} does not have.", "Write it into the prompt itself."
            )
        if system is not None:
            begins = bool(messages) and messages[0]["role"] == "system"
            messages[: int(begins)] = [{"role": "system", "content": system}] if system else []
        if messages and messages[0]["role"] == "system":
            self.system = messages[0]["content"]
        messages.append({"role": "user", "content": prompt})
        self.conversation = self._conversation = conversation
        self._messages = messages
        self._reply: Message = {"role": "assistant", "content": ""}

    def prepare(self) -> None:
        """Encode the conversation, and take over the last turn's KV cache, rolled back to what both begin with, or a new one."""
        self.prompt = self._encode()
        conversation, last = self._conversation, self._conversation.last
        held = last.held() if last else []
        shared = min(_shared(held, self.prompt), len(self.prompt) - 1)  # one token has to be computed, to know the next
        with interrupt_later():  # between a cache and who knows what it holds
            if last and last.cache is not None and shared and cache.roll_back(last.cache, shared):
                self.cache, conversation.reused, conversation.note = last.release(), shared, ""
            else:
                if last:
                    last.release()
                self.cache, conversation.reused = cache.new(self.model), 0
                conversation.note = _why(self.model, self.cache, held, shared) if last else ""
            conversation.last = self

    def keep(self, answer: Answer) -> None:
        """Put the answer into the conversation; one that was stopped before it began is no part of it."""
        if self._conversation.last is not self:
            return
        self._reply["content"] = answer.text
        if not any(message is self._reply for message in self._conversation.messages):
            self._conversation.messages[:] = [*self._messages, self._reply]

    def held(self) -> list[int]:
        """Return the ids whose keys and values the cache holds."""
        self.rewind()
        ids, length = self.prompt + self.ids, cache.length(self.cache)
        return ids[:length] if length < len(ids) else []  # CPM-Ant puts positions of its own before them


def _encode(model: LayeredModel, messages: Sequence[Message]) -> list[int]:
    if model.tokenizer.chat_template:
        ids = prompts.encode_chat(model, messages, "Begin a new conversation, or ask without a system prompt.")
    else:
        ids = prompts.ids_of(model.tokenizer("".join(message["content"] for message in messages)))
    if model.context_length is not None and len(ids) >= model.context_length:
        raise PromptError(
            f"The conversation has {len(ids)} tokens with this turn, and {model.name} has a context of {model.context_length}.",
            "Begin a new conversation, or say less.",
        )
    return ids


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two sequences have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _why(model: LayeredModel, kept: Any, held: Sequence[int], shared: int) -> str:
    """Say why a turn reads the whole conversation again."""
    again = "the whole conversation is read again"
    if kept is None:
        return f"This version of transformers does not let {model.name} keep its state between turns: {again}."
    if not held:
        return f"Nothing of it is in memory: {again}."
    if not shared:
        return f"The conversation begins otherwise than before: {again}."
    return (
        f"Of the {len(held)} tokens in memory, this turn begins with the first {shared}, and the state of {model.name} cannot be "
        f"rolled back to there (a sliding window has passed, or it is a recurrent state): {again}."
    )
