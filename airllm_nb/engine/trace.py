"""What was seen inside the layers while a text went through them: what ``model.trace(prompt)`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from airllm_nb.engine import trace_pictures
from airllm_nb.engine.data_frame import data_frame
from airllm_nb.errors import AirLLMError

if TYPE_CHECKING:
    from airllm_nb.engine.trace_pictures import Picture


HEADS_SHOWN = 8
"""Most heads that a notebook shows by itself: a picture of one takes 120 kB there, and stays in the file."""


@dataclass(frozen=True, repr=False, eq=False)
class Trace:
    """What was seen while a text of tokens went through the layers. Shown in a notebook, it is its pictures.

    Attributes
    ----------
    model : str
        The model's short name.
    layers : tuple of str
        Names of the layers.
    ids : tuple of int
        The tokens: those of the prompt, then those that were generated.
    prompt_tokens : int
        How many of them are the prompt's.
    first : int
        The first token of which is kept what follows; 0 unless `last` was given. There are ``seen = len(ids) - first`` of them.
    norms : torch.Tensor
        Euclidean norm of the hidden state, shape (layers + 1, seen), float32: row 0 is what enters the first layer, row ``i + 1``
        what leaves layer ``i`` (the last row before the final norm).
    top_ids, top_probabilities : torch.Tensor
        The logit lens, each of shape (layers, seen, top_k), or as many as there are in the vocabulary, likeliest first: the
        ids that would come next if a layer were the last one, int64, and their probabilities, float32.
    attention : dict of (int, int) to torch.Tensor
        Of each layer and head that was asked for how much each token looks at each, shape (seen, len(ids)), float32.
    texts : dict of int to str
        The text of every id that occurs above.
    """

    model: str
    layers: tuple[str, ...]
    ids: tuple[int, ...]
    prompt_tokens: int
    first: int
    norms: torch.Tensor
    top_ids: torch.Tensor
    top_probabilities: torch.Tensor
    attention: dict[tuple[int, int], torch.Tensor]
    texts: dict[int, str]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The texts of all tokens in `ids`."""
        return tuple(self.texts[number] for number in self.ids)

    def guesses(self, layer: int, token: int = -1) -> list[tuple[str, float]]:
        """Return what would come after a token if a layer were the last one: texts and probabilities, likeliest first.

        Parameters
        ----------
        layer, token : int
            Counted from 0; negative ones from the end.

        Raises
        ------
        IndexError
            If there is no such layer, or the token was not kept.
        """
        column = token if token < 0 else token - self.first
        if column >= len(self.ids) - self.first or column < (self.first - len(self.ids) if token < 0 else 0):
            raise IndexError(f"token {token} is not among those that were kept: {self.first} to {len(self.ids) - 1}")
        pairs = zip(self.top_ids[layer, column].tolist(), self.top_probabilities[layer, column].tolist(), strict=True)
        return [(self.texts[number], probability) for number, probability in pairs]

    def lens_picture(self, *, tokens: int = 12, layers: int = 40) -> Picture:
        """Return the logit lens as a table: a row for each layer, a column for each token, darker where the layer is surer.

        Parameters
        ----------
        tokens, layers : int
            The most that are shown: the last tokens, and layers at even distances.
        """
        return trace_pictures.lens(self, tokens, layers)

    def lens_text(self) -> str:
        """Return the logit lens in words, for a terminal: what would come after the last token, layer by layer."""
        return trace_pictures.lens_words(self)

    def norm_picture(self) -> Picture:
        """Return how long the hidden state is after each layer: the first token, the last one, and the median of the others."""
        return trace_pictures.norms(self)

    def attention_picture(self, layer: int, head: int, *, tokens: int = 32) -> Picture:
        """Return where each token looks in one head, for the last `tokens` tokens.

        Raises
        ------
        AirLLMError
            If that head was not traced.
        """
        if (layer, head) not in self.attention:
            raise AirLLMError(
                f"Head {head} of layer {layer} was not traced.", f"Ask for it: model.trace(prompt, heads=[({layer}, {head})])."
            )
        return trace_pictures.attention(self, layer, head, tokens)

    def columns(self) -> dict[str, list[Any]]:
        """Return the logit lens as columns of one length: a row for each layer, token and rank."""
        rows = [
            (layer, self.first + column, self.texts[self.ids[self.first + column]], norm, rank, *guess)
            for layer, states in enumerate(self.norms[1:].tolist())
            for column, norm in enumerate(states)
            for rank, guess in enumerate(self.guesses(layer, self.first + column))
        ]
        names = ("layer", "position", "token", "norm", "rank", "guess", "probability")
        return {name: [row[place] for row in rows] for place, name in enumerate(names)}

    def to_pandas(self) -> Any:
        """Return `columns` as a ``pandas.DataFrame``.

        Raises
        ------
        AirLLMError
            If pandas is not installed.
        """
        return data_frame(self.columns(), "trace.columns()")

    def __repr__(self) -> str:  # without numbers that depend on the machine's last bits
        heads = f", {len(self.attention)} heads" if self.attention else ""
        return f"Trace({self.model}: {len(self.ids)} tokens, {len(self.layers)} layers{heads})"

    def _repr_html_(self) -> str:
        pictures = [self.lens_picture()] if self.top_ids.numel() else []
        pictures.append(self.norm_picture())
        shown = list(self.attention)[:HEADS_SHOWN]
        pictures += [self.attention_picture(layer, head) for layer, head in shown]
        html = "".join(picture._repr_html_() for picture in pictures)
        if more := len(self.attention) - len(shown):
            html += trace_pictures.line(f"{more} more heads: trace.attention_picture(layer, head) shows one of them.")
        return html
