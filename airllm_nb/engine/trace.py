"""What happens inside the layers while a text goes through them once: ``model.trace(prompt)``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from airllm_nb.compat import logits
from airllm_nb.compat.config import quiet
from airllm_nb.engine import trace_pictures
from airllm_nb.engine.attention import AttentionWatch
from airllm_nb.engine.data_frame import data_frame
from airllm_nb.engine.lens import Lens
from airllm_nb.engine.prompts import TextOrIds, text_or_ids
from airllm_nb.engine.taps import LayerVisit, Tap
from airllm_nb.errors import AirLLMError, CheckpointError, UnsupportedError
from airllm_nb.events import LayerInfo

if TYPE_CHECKING:
    from airllm_nb.engine.model import LayeredModel
    from airllm_nb.engine.trace_pictures import Picture


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
    tokens : tuple of str
        Their texts.
    prompt_tokens : int
        How many of them are the prompt's.
    first : int
        The first token of which is kept what follows; 0 unless `last` was given. There are ``seen = len(ids) - first`` of them.
    norms : torch.Tensor
        Euclidean norm of the hidden state, shape (layers + 1, seen), float32: row 0 is what enters the first layer, row ``i + 1``
        what leaves layer ``i`` (the last row before the final norm).
    top_ids, top_probabilities : torch.Tensor
        The logit lens, each of shape (layers, seen, top_k), likeliest first: the ids that would come next if a layer were the
        last one, and their probabilities, float32.
    attention : dict of (int, int) to torch.Tensor
        Of each layer and head that was asked for how much each token looks at each, shape (seen, tokens), float32.
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
        """The texts of the tokens."""
        return tuple(self.texts[number] for number in self.ids)

    def guesses(self, layer: int, token: int = -1) -> list[tuple[str, float]]:
        """Return what would come after a token if a layer were the last one: texts and probabilities, likeliest first.

        Parameters
        ----------
        layer, token : int
            Counted from 0; negative ones from the end.
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
        pictures += [self.norm_picture(), *(self.attention_picture(layer, head) for layer, head in self.attention)]
        return "".join(picture._repr_html_() for picture in pictures)


def trace(
    model: LayeredModel,
    prompt: TextOrIds,
    *,
    max_new_tokens: int = 0,
    top_k: int = 5,
    heads: Iterable[tuple[int, int]] = (),
    last: int | None = None,
) -> Trace:
    """Run over a text once, and note what happens inside.

    Works with any budget. It takes one pass, the head once more for each layer, and memory for nothing that is as large as
    layers x tokens x vocabulary. What functions given to `on_layer` put in place of hidden states is what is seen.

    Parameters
    ----------
    prompt : str, tensor, sequence of int, or a tokenizer's output
        The text, taken as it is (without chat template), or its ids.
    max_new_tokens : int
        Let the model add so many tokens first, the likeliest each time; they are traced too.
    top_k : int
        Guesses that are kept for each layer and token; 0 for none, which saves the heads.
    heads : iterable of (int, int)
        Layers and heads whose attention is kept.
    last : int, optional
        Keep what is seen of the last so many tokens only.

    Returns
    -------
    Trace
        Tensors, and pictures: shown in a notebook, it is its pictures.

    Raises
    ------
    PromptError
        If the prompt is none, holds ids that the model does not have, or does not fit the context.
    UnsupportedError
        If the model's layers are no simple stack, it has no logit lens, or the attention cannot be seen.
    AirLLMError
        If there is no such layer or head, or a number makes no sense.
    """
    heads = _checked(heads, model.layers)
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("top_k", top_k, 0), ("last", last, 1)):
        if value is not None and value < least:
            raise AirLLMError(f"{name} is {value}.", f"It is a number from {least} on.")
    with model._runtime.lock:  # noqa: SLF001
        with quiet():
            ids = given = text_or_ids(model, prompt)
            if max_new_tokens:
                ids = _generate(model, given, max_new_tokens)
        first = max(len(ids) - last, 0) if last is not None else 0
        lens = Lens(model._hf, model.layers) if top_k else None  # noqa: SLF001
        seen = _Seen(len(ids), first, len(model.layers), lens, top_k, AttentionWatch(heads, first) if heads else None)
        tap = Tap(model._runtime, seen)  # noqa: SLF001
        try:
            tap.add()
            with seen.watch or contextlib.nullcontext():
                output = model(torch.tensor([ids]), **logits.last_only(model._hf))  # noqa: SLF001
        finally:
            tap.remove()
    seen.check(output.logits[0, -1])
    shape = (len(model.layers), len(ids) - first, 0)
    top_ids = torch.stack(seen.top_ids) if lens else torch.zeros(shape, dtype=torch.long)
    return Trace(
        model=model.name, layers=tuple(layer.name for layer in model.layers), ids=tuple(ids), prompt_tokens=len(given),
        first=first, norms=torch.stack(seen.norms), top_ids=top_ids,
        top_probabilities=torch.stack(seen.top_probabilities) if lens else torch.zeros(shape),
        attention={one: seen.watch.found[one] for one in heads} if seen.watch else {},
        texts=_texts(model, {*ids, *top_ids.flatten().tolist()}),
    )  # fmt: skip


class _Seen:
    """The function on every layer: keeps of each hidden state what is small."""

    def __init__(self, tokens: int, first: int, layers: int, lens: Lens | None, top_k: int, watch: AttentionWatch | None) -> None:
        self.norms: list[torch.Tensor] = []
        self.top_ids: list[torch.Tensor] = []
        self.top_probabilities: list[torch.Tensor] = []
        self.watch = watch
        self._tokens = tokens
        self._first = first
        self._layers = layers
        self._lens = lens
        self._top_k = top_k
        self._last: torch.Tensor | None = None  # hidden state of the last token

    def __call__(self, layer: LayerVisit, hidden: torch.Tensor) -> None:
        if layer.index != max(len(self.norms) - 1, 0) or hidden.shape[:-1] != (1, self._tokens):
            raise self._refusal(layer)
        if not self.norms:
            self.norms.append(self._norm(layer.before))
        self.norms.append(self._norm(hidden))
        if self._lens is not None:
            ids, probabilities = self._lens.top(hidden[0, self._first :], self._top_k)
            self.top_ids.append(ids)
            self.top_probabilities.append(probabilities)
        if self.watch is not None:
            self.watch.leave(layer)
        self._last = hidden[0, -1].clone() if layer.index == self._layers - 1 else None

    def check(self, own: torch.Tensor) -> None:
        """See after the pass, which gave the last token the logits `own`, that all layers were seen, and seen right."""
        if self._last is None:
            raise UnsupportedError("Some layers of this model did not compute for this text.", "Use model.on_layer(function).")
        if self._lens is not None:
            self._lens.check(self._last, own)

    def _norm(self, hidden: torch.Tensor) -> torch.Tensor:
        norms: torch.Tensor = torch.linalg.vector_norm(hidden[0, self._first :].float(), dim=-1)
        return norms.cpu()

    @staticmethod
    def _refusal(layer: LayerInfo) -> UnsupportedError:
        return UnsupportedError(
            f"The layers of this model do not compute once each, one after another: {layer.name} came out of its turn.",
            "Use model.on_layer(function) to see what leaves each.",
        )


def _checked(heads: Iterable[tuple[int, int]], layers: Sequence[LayerInfo]) -> list[tuple[int, int]]:
    heads = [(int(layer), int(head)) for layer, head in heads]
    for layer, _ in heads:
        if not 0 <= layer < len(layers):
            raise AirLLMError(f"There is no layer {layer}.", f"The model has {len(layers)}: 0 to {len(layers) - 1}.")
    return heads


def _generate(model: LayeredModel, ids: list[int], count: int) -> list[int]:
    """Return the ids with those that the model adds, the likeliest each time."""
    prompt = torch.tensor([ids])
    end = model.generation_config.eos_token_id
    pad = end[0] if isinstance(end, list) else end
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": count, "do_sample": False, "pad_token_id": pad or 0}
    numbers: list[int] = model.generate(prompt, **options)[0].tolist()
    return numbers


def _texts(model: LayeredModel, ids: Iterable[int]) -> dict[int, str]:
    """Return the text of each id; its number where the checkpoint has no tokenizer."""
    try:
        tokenizer = model.tokenizer
    except CheckpointError:
        return {number: str(number) for number in ids}
    texts = {number: tokenizer.decode([number], clean_up_tokenization_spaces=False) for number in ids}
    for number, text in texts.items():  # sentencepiece drops the space of a first word
        if str(tokenizer.convert_ids_to_tokens(number)).startswith("▁") and not text.startswith(" "):
            texts[number] = f" {text}"
    return texts
