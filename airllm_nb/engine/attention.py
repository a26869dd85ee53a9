"""Attention of single heads, seen in passing: nothing of the model is switched, so that nothing of its results changes.

Every version of transformers computes attention by PyTorch's ``scaled_dot_product_attention``, which does not tell the weights,
or by a ``softmax`` over them. Both calls can be seen; from the arguments of the first, the weights of the few heads that are
asked for are computed once more. (``output_attentions=True`` would need another attention for the whole model, which has other
last bits, and in later versions another way of loading it.)
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch._C import _get_function_stack_at, _len_torch_function_stack, _pop_torch_function_stack, _push_on_torch_function_stack
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from airllm_nb.errors import AirLLMError, UnsupportedError
from airllm_nb.events import LayerInfo

SOFTMAX = (functional.softmax, torch.softmax, torch.Tensor.softmax)
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
AXES = 4  # batch, heads, tokens that look, tokens that are looked at

T = TypeVar("T")


class _Attention(NamedTuple):
    """One attention: how many heads, how many tokens look and are looked at, and what gives one head's rows from one on."""

    heads: int
    looking: int
    looked_at: int
    weights: Callable[[int, int], torch.Tensor]


class AttentionWatch(TorchFunctionMode):
    """Sees the attention that this thread computes while `during` calls something.

    It is not entered by ``with``: PyTorch takes a mode off its stack around many functions, an interrupt can keep it from putting
    it back, and the mode's own exit would then take off another one, or fail in place of the interrupt.

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
        self._seen: list[_Attention] = []  # since the layer before
        self._on = False

    def during(self, call: Callable[[], T]) -> T:
        """Return what `call` returns, and see what is computed meanwhile."""
        depth = _len_torch_function_stack()
        try:
            self._on = True
            _push_on_torch_function_stack(self)  # what entering a mode does
            return call()
        except KeyboardInterrupt as interrupt:
            traceback.clear_frames(interrupt.__traceback__)  # a generator of PyTorch's there would put it back later
            raise
        finally:
            try:
                self._end(depth)
            finally:
                self._end(depth)  # an interrupt may have hit the first; twice does no harm

    def _end(self, depth: int) -> None:
        self._on = False
        self._seen = []  # queries, keys and values
        while _len_torch_function_stack() > depth:  # what an interrupt keeps others from leaving, too
            _pop_torch_function_stack()
        _take_off(lambda mode: mode is self)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._on:
            return result
        if func is functional.scaled_dot_product_attention and result.dim() == AXES:
            keys = (args[1] if len(args) > 1 else kwargs["key"]).shape[2]
            _, heads, looking, _ = result.shape
            self._seen.append(_Attention(heads, looking, keys, functools.partial(_weights, args, kwargs)))
        elif func in SOFTMAX and result.dim() == AXES:
            _, heads, looking, looked_at = result.shape
            self._seen.append(_Attention(heads, looking, looked_at, functools.partial(_softmaxed, result)))
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
            if not seen:
                raise _refusal(layer, "has no attention that could be seen: it computes it in a way of its own, or none")
            if len(seen) > 1:
                raise _refusal(layer, f"computed attention {len(seen)} times: by itself, or for a function of on_layer")
            (one,) = seen
            if not 0 <= head < one.heads:
                raise AirLLMError(f"{layer.name} has no head {head}.", f"It has {one.heads}: 0 to {one.heads - 1}.")
            if one.looking != one.looked_at:
                raise _refusal(layer, f"let {one.looking} tokens look at {one.looked_at}")
            self.found[index, head] = one.weights(head, self._first).float().cpu()


def forget_watches() -> None:
    """Take off this thread's stack of modes the watches that interrupts have left there: they see nothing, but cost time."""
    _take_off(lambda mode: isinstance(mode, AttentionWatch))


def _take_off(unwanted: Callable[[Any], bool]) -> None:
    """Take modes off this thread's stack, wherever they are in it."""
    modes = [_get_function_stack_at(place) for place in range(_len_torch_function_stack())]
    lowest = next((place for place, mode in enumerate(modes) if unwanted(mode)), len(modes))
    for _ in modes[lowest:]:
        _pop_torch_function_stack()
    for mode in modes[lowest:]:
        if not unwanted(mode):
            _push_on_torch_function_stack(mode)


def _weights(arguments: tuple[Any, ...], options: Mapping[str, Any], head: int, first: int) -> torch.Tensor:
    """Return a head's weights, as the documentation of ``scaled_dot_product_attention`` defines them, given its arguments.

    Only the rows from `first` on are computed: all of a long text would be tokens x tokens.
    """
    given = dict(zip(ARGUMENTS, arguments, strict=False)) | dict(options)
    query, key, mask, scale = (given.get(name) for name in ("query", "key", "attn_mask", "scale"))
    assert query is not None
    assert key is not None
    heads = query.shape[1]
    shared = heads // key.shape[1]  # query heads that share a key: grouped-query attention
    scores = query[0, head, first:].float() @ key[0, head // shared].float().T
    scores *= query.shape[-1] ** -0.5 if scale is None else scale
    if given.get("is_causal"):
        mask = torch.ones(scores.shape, dtype=torch.bool, device=scores.device).tril(diagonal=first)
    elif mask is not None:
        mask = torch.broadcast_to(mask, (query.shape[0], heads, *query.shape[-2:-1], key.shape[-2]))[0, head, first:]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, dim=-1)


def _softmaxed(weights: torch.Tensor, head: int, first: int) -> torch.Tensor:
    return weights[0, head, first:].clone()  # a view would keep all heads


def _refusal(layer: LayerInfo, what: str) -> UnsupportedError:
    return UnsupportedError(f"{layer.name} {what}.", "Choose heads of another layer, or leave heads= out.")
