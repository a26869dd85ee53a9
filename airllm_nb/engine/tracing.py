"""Runs over a text once, and notes what happens inside the layers: ``model.trace(prompt)``."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from airllm_nb.compat import dynamic, logits
from airllm_nb.compat.config import quiet
from airllm_nb.engine import context, decoding
from airllm_nb.engine.attention import AttentionWatch
from airllm_nb.engine.lens import Lens
from airllm_nb.engine.prompts import TextOrIds, text_or_ids
from airllm_nb.engine.taps import LayerVisit, Tap
from airllm_nb.engine.trace import Trace
from airllm_nb.errors import AirLLMError, CheckpointError, UnsupportedError
from airllm_nb.events import LayerInfo

if TYPE_CHECKING:
    from airllm_nb.engine.model import LayeredModel


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

    Works with any budget. It takes one pass (and those that generate, if any), the head once more for each layer, and memory for
    nothing that is as large as layers x tokens x vocabulary; of each head that is asked for, seen x tokens. What functions given
    to `on_layer` put in place of hidden states is what is seen.

    Parameters
    ----------
    prompt : str, tensor, sequence of int, or a tokenizer's output
        The text, taken as it is (without chat template), or its ids. Padding that an attention mask hides is left out.
    max_new_tokens : int
        Let the model add so many tokens first, as `map` does it at temperature 0; they are traced too.
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
    CheckpointError
        If the checkpoint has no tokenizer, and a text was given or tokens are to be added.
    AirLLMError
        If there is no such layer or head, a number makes no sense, or the model was closed.
    """
    wanted = _heads(heads, model.layers)
    new, top_k = _number("max_new_tokens", max_new_tokens, 0), _number("top_k", top_k, 0)
    kept = None if last is None else _number("last", last, 1)
    runtime = model._runtime  # noqa: SLF001
    with runtime.lock:
        runtime.require_open()
        with quiet():
            ids = given = text_or_ids(model, prompt)
            context.require_fit(model.name, model.context_length, len(given), new)
            dynamic.forget(model)
            if new:
                ids = _generate(model, given, new)
                dynamic.forget(model)
        first = max(len(ids) - kept, 0) if kept is not None else 0
        lens = Lens(model._hf, model.layers) if top_k else None  # noqa: SLF001
        watch = AttentionWatch(wanted, first) if wanted else None
        seen = _Seen(len(ids), first, len(model.layers), lens, top_k, watch)

        def look() -> Any:
            return model(torch.tensor([ids]), **logits.one_pass(model._hf))  # noqa: SLF001

        output = runtime.run(lambda: watch.during(look) if watch else look(), len(ids), None, Tap(runtime, seen))
        seen.check(output.logits[0, -1])
    shape = (len(model.layers), len(ids) - first, 0)
    top_ids = torch.stack(seen.top_ids) if lens else torch.zeros(shape, dtype=torch.long)
    return Trace(
        model=model.name, layers=tuple(layer.name for layer in model.layers), ids=tuple(ids), prompt_tokens=len(given),
        first=first, norms=torch.stack(seen.norms), top_ids=top_ids,
        top_probabilities=torch.stack(seen.top_probabilities) if lens else torch.zeros(shape),
        attention={one: watch.found[one] for one in wanted} if watch else {},
        texts=_texts(model, {*ids, *top_ids.flatten().tolist()}),
    )  # fmt: skip


class _Seen:
    """The function on every layer: keeps of each hidden state what is small."""

    def __init__(self, tokens: int, first: int, layers: int, lens: Lens | None, top_k: int, watch: AttentionWatch | None) -> None:
        self.norms: list[torch.Tensor] = []
        self.top_ids: list[torch.Tensor] = []
        self.top_probabilities: list[torch.Tensor] = []
        self._tokens = tokens
        self._first = first
        self._layers = layers
        self._lens = lens
        self._top_k = top_k
        self._watch = watch
        self._turn = 0  # the layer that comes next
        self._last: torch.Tensor | None = None  # hidden state of the last token

    def __call__(self, layer: LayerVisit, hidden: torch.Tensor) -> None:
        if layer.index != self._turn:
            raise _refusal(f"do not compute once each, one after another: {layer.name} came out of its turn")
        if hidden.shape[:-1] != (1, self._tokens):
            shape = tuple(hidden.shape)
            raise _refusal(f"do not hand on one state for each of {self._tokens} tokens: {layer.name} gives {shape}")
        self._turn += 1
        if not self.norms:
            self.norms.append(self._norm(layer.before))
        self.norms.append(self._norm(hidden))
        if self._lens is not None:
            ids, probabilities = self._lens.top(hidden[0, self._first :], self._top_k)
            self.top_ids.append(ids)
            self.top_probabilities.append(probabilities)
        if self._watch is not None:
            self._watch.leave(layer)
        self._last = hidden[0, -1].clone() if self._turn == self._layers else None

    def check(self, own: torch.Tensor) -> None:
        """See after the pass, which gave the last token the logits `own`, that all layers were seen, and seen right."""
        if self._last is None:
            raise _refusal("did not all compute for this text")
        if self._lens is not None:
            self._lens.check(self._last, own)

    def _norm(self, hidden: torch.Tensor) -> torch.Tensor:
        norms: torch.Tensor = torch.linalg.vector_norm(hidden[0, self._first :].float(), dim=-1)
        return norms.cpu()


def _refusal(what: str) -> UnsupportedError:
    return UnsupportedError(f"The layers of this model {what}.", "Use model.on_layer(function) to see what leaves each.")


def _number(name: str, value: Any, least: int) -> int:
    """Return a whole number that is not too small."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise AirLLMError(f"{name} is {value!r}.", f"It is a whole number from {least} on.")
    return number


def _heads(heads: Any, layers: Sequence[LayerInfo]) -> list[tuple[int, int]]:
    try:
        pairs = [(operator.index(layer), operator.index(head)) for layer, head in heads]
    except (TypeError, ValueError) as error:
        raise AirLLMError(f"heads is {heads!r}.", "It is a list of layers and heads: [(0, 1)] is head 1 of layer 0.") from error
    for layer, _ in pairs:
        if not 0 <= layer < len(layers):
            raise AirLLMError(f"There is no layer {layer}.", f"The model has {len(layers)}: 0 to {len(layers) - 1}.")
    return pairs


def _generate(model: LayeredModel, ids: list[int], count: int) -> list[int]:
    """Return the ids with those that the model adds."""
    prompt = torch.tensor([ids])
    options = decoding.Sampling(max_new_tokens=count).options(model) | {
        "attention_mask": torch.ones_like(prompt), "max_new_tokens": count, "pad_token_id": decoding.pad_id(model),
    }  # fmt: skip
    runtime = model._runtime  # noqa: SLF001
    before = runtime.passes
    with decoding.refusals(model, lambda: runtime.passes > before):
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
