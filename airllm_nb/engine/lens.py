"""The logit lens: what the model would say if a layer were its last one.

The final norm and the head are applied to the hidden state that leaves a layer (nostalgebraist, "interpreting GPT: the logit
lens", 2020, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from airllm_nb.compat.config import text_config
from airllm_nb.engine.packed_weight import PackedWeight
from airllm_nb.errors import UnsupportedError
from airllm_nb.events import LayerInfo

CHUNK = 16 * 2**20
"""Bytes that logits may take at once: of a long text and a large vocabulary they would not fit in memory."""

ROUNDED, LEAST_TOLERANCE = 4, 1e-4
"""How far the lens may be from the model's own logits, as a share of the largest: so many times what the model's dtype rounds
by, and at least so much. The one row of its own logits is summed up in another order; what a model does to its logits beside
what is known here (a factor of 1.05, a cap) makes more of a difference."""

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configs call the number that logits do not exceed."""

FINAL_NORMS = ("norm", "final_norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "out_norm")
"""What models call the norm behind their last layer, where they have several."""


class Lens:
    """Turns hidden states into guesses of the next token.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model.
    layers : sequence of LayerInfo
        Its decoder layers.

    Raises
    ------
    UnsupportedError
        If it has no head, or one that does not take what its layers give.
    """

    def __init__(self, model: Any, layers: tuple[LayerInfo, ...]) -> None:
        self._name = type(model).__name__
        self._norm = _final_norm(model, layers[-1].name)
        self._head = model.get_output_embeddings()
        if self._head is None:
            raise self._refusal("it has no head that gives logits")
        text = text_config(model.config)
        self._rows = max(CHUNK // (4 * text.vocab_size), 1)
        self._factor = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
        coarse = isinstance(getattr(self._head, "weight", None), PackedWeight)  # its kernel computes in bfloat16
        self._tolerance = max(ROUNDED * torch.finfo(torch.bfloat16 if coarse else model.dtype).eps, LEAST_TOLERANCE)
        self._cap = next((cap for name in CAPS if (cap := getattr(text, name, None))), None)
        try:
            self.logits(torch.zeros(1, text.hidden_size, dtype=model.dtype, device=model.device))
        except RuntimeError as error:
            raise self._refusal("its head does not take what its layers give") from error

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits, shape (tokens, vocabulary), float32, for hidden states of shape (tokens, width)."""
        logits: torch.Tensor = self._head(self._norm(hidden)).float() * self._factor
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def top(self, hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the likeliest next tokens: ids and probabilities, each of shape (tokens, count), on the CPU."""
        found = []
        for part in torch.split(hidden, self._rows):
            logits = self.logits(part)
            found.append(torch.softmax(logits, dim=-1).topk(min(count, logits.shape[-1])))
        return torch.cat([top.indices for top in found]).cpu(), torch.cat([top.values for top in found]).cpu()

    def check(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Compare with the model's own logits, shape (vocabulary,), what the last layer's hidden state gives, shape (width,).

        Raises
        ------
        UnsupportedError
            If they differ: the model does something else between its last layer and its logits. Or if they are no numbers.
        """
        own, seen = logits.float(), self.logits(hidden[None])[0]
        if own.isnan().any():
            raise UnsupportedError(
                f"{self._name} gives no numbers for this text: by a function of on_layer, damaged weights, or a small dtype.",
                "In Python, model.trace(prompt, top_k=0).norms says from which layer on.",
            )
        if own.shape != seen.shape or not (own - seen).abs().max() <= self._tolerance * own.abs().max():
            raise self._refusal("its logits are not those of final norm and head")

    def _refusal(self, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self._name} has no logit lens: {why}.", "In Python, model.trace(prompt, top_k=0) goes without guesses."
        )


def _final_norm(model: Any, last: str) -> nn.Module:
    """Return the norm behind the last layer, called `last`: of the norms beside the list of layers, if there are any."""
    holder = model.get_submodule(last.rsplit(".", 2)[0]) if last.count(".") > 1 else model
    norms = {
        name: child
        for name, child in holder.named_children()
        if ("norm" in name or name == "ln_f") and not isinstance(child, nn.ModuleList)
    }
    found = next((norms[name] for name in FINAL_NORMS if name in norms), None)
    return found or next(reversed(norms.values()), nn.Identity())
