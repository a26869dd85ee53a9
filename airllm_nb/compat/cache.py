"""KV caches in all the forms that transformers has given them: how much they hold, and how to undo an aborted pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

# These grow by making new tensors, so that keeping a reference to the old ones is enough. All others write into theirs.
GROWING = frozenset(("DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer"))


def length(cache: Any) -> int:
    """Return how many positions a KV cache holds."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    keys = cache[0][0] if cache and cache[0] else None  # the tuples of old
    return 0 if keys is None else int(keys.shape[-2])


def snapshot(cache: Any) -> Callable[[], None]:
    """Return a function that puts a KV cache back to what it is now.

    ``crop`` cannot do that: a pass that is aborted in layer 2 has lengthened only two layers, and sliding windows have dropped
    positions already.
    """
    saved = [(part, _copy(vars(part), share=type(part).__name__ in GROWING)) for part in _parts(cache)]

    def restore() -> None:
        for part, state in saved:
            vars(part).clear()
            vars(part).update(state)

    return restore


def _parts(cache: Any) -> Iterator[Any]:
    """Yield the objects that hold a cache's state: itself, its layers, and caches within it."""
    if cache is None or isinstance(cache, tuple) or not hasattr(cache, "__dict__"):
        return
    yield cache
    yield from getattr(cache, "layers", None) or ()
    for inner in ("self_attention_cache", "cross_attention_cache"):
        yield from _parts(getattr(cache, inner, None))


def _copy(value: Any, *, share: bool) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item, share=share) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item, share=share) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) and not share else value
