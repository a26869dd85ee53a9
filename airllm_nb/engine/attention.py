"""Attention of single heads, seen in passing: nothing of the model is switched, so that nothing of its results changes.

Every version of transformers computes attention by PyTorch's ``scaled_dot_product_attention``, which does not tell the weights,
or by a ``softmax`` over them. Both calls can be seen; from the arguments of the first, the weights of the few heads that are
asked for are computed once more. (``output_attentions=True`` would need another attention for the whole model, which has other
last bits, and in later versions another way of loading it.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from airllm_nb.errors import AirLLMError, UnsupportedError
from airllm_nb.events import LayerInfo

SOFTMAX = (functional.softmax, torch.softmax, torch.Tensor.softmax)
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
AXES = 4  # batch, heads, tokens that look, tokens that are looked at

Weights = Callable[[int], torch.Tensor]
"""Gives the weights of one head, shape (tokens, tokens)."""


class AttentionWatch(TorchFunctionMode):
    """While it is entered, sees the attention that this thread computes.

    Parameters
    ----------
    heads : iterable of (int, int)
        Layer and head of those that are wanted.
    first : int
        The first of the tokens whose view is kept.

    Attributes
    ----------
    found : dict of (int, int) to torch.Tensor
        Of each, shape (tokens from `first` on, tokens), float32, on the CPU; row `i` says where token ``first + i`` looks, and
        sums up to 1.
    """

    def __init__(self, heads: Iterable[tuple[int, int]], first: int) -> None:
        super().__init__()
        self.found: dict[tuple[int, int], torch.Tensor] = {}
        self._heads = list(heads)
        self._first = first
        self._seen: list[tuple[int, Weights]] = []  # since the layer before: how many heads, and their weights

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            self._seen.append((result.shape[1], functools.partial(_weights, args, kwargs)))
        elif func in SOFTMAX and result.dim() == AXES:
            self._seen.append((result.shape[1], functools.partial(_softmaxed, result)))
        return result

    def leave(self, layer: LayerInfo) -> None:
        """Keep the wanted heads of the layer that has just computed.

        Raises
        ------
        UnsupportedError
            If what was computed is not one attention of all tokens to all.
        AirLLMError
            If it has no such head.
        """
        seen, self._seen = self._seen, []
        for index, head in self._heads:
            if index != layer.index:
                continue
            if len(seen) != 1:
                raise _refusal(layer)
            count, weights = seen[0]
            if not 0 <= head < count:
                raise AirLLMError(f"{layer.name} has no head {head}.", f"It has {count}: 0 to {count - 1}.")
            found = weights(head)
            if found.dim() != 2 or found.shape[0] != found.shape[1]:  # noqa: PLR2004  # a matrix
                raise _refusal(layer)
            self.found[index, head] = found[self._first :].float().cpu()


def _weights(arguments: tuple[Any, ...], options: Mapping[str, Any], head: int) -> torch.Tensor:
    """Return a head's weights as the documentation of ``scaled_dot_product_attention`` defines them, given its arguments."""
    given = dict(zip(ARGUMENTS, arguments, strict=False)) | dict(options)
    query, key, mask, scale = (given.get(name) for name in ("query", "key", "attn_mask", "scale"))
    assert query is not None
    assert key is not None
    heads = query.shape[1]
    shared = heads // key.shape[1]  # query heads that share a key: grouped-query attention
    scores = query[0, head].float() @ key[0, head // shared].float().T * (query.shape[-1] ** -0.5 if scale is None else scale)
    if given.get("is_causal"):
        mask = torch.ones(scores.shape, dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        mask = torch.broadcast_to(mask, (query.shape[0], heads, *scores.shape))[0, head]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, dim=-1)


def _softmaxed(weights: torch.Tensor, head: int) -> torch.Tensor:
    return weights[0, head]


def _refusal(layer: LayerInfo) -> UnsupportedError:
    return UnsupportedError(
        f"{layer.name} has no attention that could be seen: it computes it in a way of its own, or none.",
        "Choose heads of another layer, or leave heads= out.",
    )
