"""A conversation: what was said. Imports nothing heavy: there is one before there is a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airllm_nb import LayeredModel
    from airllm_nb.engine.decoding import Sampling
    from airllm_nb.notebook.turns import Turn


class Conversation:
    """Turns of a user and a model, each of which computes only what the KV cache does not hold already.

    Attributes
    ----------
    messages : list of dict
        ``{"role": "system" | "user" | "assistant", "content": text}``; may be edited: the next turn reads them again.
    reused : int
        How many tokens of the last turn's prompt were in the KV cache already.
    note : str
        Why the last turn had to read the whole conversation again; empty if it did not.
    last : Turn or None
        The turn whose KV cache is kept.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []
        self.reused = 0
        self.note = ""
        self.last: Turn | None = None

    def turn(self, model: LayeredModel, prompt: str, system: str | None, sampling: Sampling) -> Turn:
        """Return the next turn, which is part of the conversation when it has begun to compute.

        Raises
        ------
        PromptError
            If there is no prompt, or `system` is given and there is no place for it.
        """
        from airllm_nb.notebook.turns import Turn

        return Turn(model, self, prompt, system, sampling)

    def close(self) -> None:
        """Let the KV cache go, whoever still holds the turn."""
        if self.last is not None:
            self.last.release()
        self.last = None
