"""KV caches in all the forms that transformers has given them: making, measuring and shortening them, undoing an aborted pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers

# These grow by making new tensors, so that keeping a reference to the old ones is enough. All others write into theirs.
GROWING = frozenset(("DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer"))
EMPTY = "DummyLayer"  # of a layer that keeps nothing, or uses another one's keys

LAYER_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "state")
"""What layers call it."""

KNOWS_LAYERS = "config" in inspect.signature(transformers.DynamicCache.__init__).parameters
"""Whether ``DynamicCache`` learns from the config which layers have a sliding window; before, it kept all positions of all."""


def new(model: Any) -> Any:
    """Return the empty KV cache that ``generate`` would make for a model.

    None where that cannot be handed over from one call to the next: a recurrent state or tuples that the model makes itself, the
    static cache of Gemma 2 and 3 before `KNOWS_LAYERS`, or no cache at all.
    """
    kind, config = type(getattr(model, "_hf", model)), model.generation_config
    own = any(name in kind.__name__.lower() for name in ("mamba", "falconh1", "recurrentgemma"))
    static = not KNOWS_LAYERS and getattr(config, "cache_implementation", None) == "hybrid"
    if (
        own or static or config.use_cache is False or model.config.is_encoder_decoder
        or not model._supports_default_dynamic_cache()  # noqa: SLF001  # what generate asks
        or "past_key_values" not in inspect.signature(kind.forward).parameters
    ):  # fmt: skip
        return None
    return (
        transformers.DynamicCache(config=model.config.get_text_config(decoder=True))
        if KNOWS_LAYERS
        else transformers.DynamicCache()
    )


def roll_back(cache: Any, length: int) -> bool:
    """Shorten a KV cache to its first `length` positions.

    Returns
    -------
    bool
        False, with nothing changed, where those are not there any more (a sliding window has passed them) or cannot be told
        from the later ones (a recurrent state).
    """
    parts = [part for part in _parts(cache) if type(part).__name__ != EMPTY]
    if not parts or not all(type(part).__name__ in GROWING for part in parts):
        return False
    states = [vars(part) for part in parts]
    held = max((_positions(state) for state in states), default=0)
    if length == held:
        return True
    shortened = [_shortened(state, held, length) for state in states]
    if length > held or None in shortened:
        return False
    for state, change in zip(states, shortened, strict=True):
        state.update(change or {})
    return True


def length(cache: Any) -> int:
    """Return how many positions a KV cache holds."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    keys = cache[0][0] if cache and cache[0] else None  # the tuples of old
    return 0 if keys is None else int(keys.shape[-2])


def within(args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a KV cache, a layer's part of one, or a recurrent state is among the arguments of a layer."""
    named = any(kwargs.get(name) is not None for name in LAYER_CACHES)
    return named or any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values()))


def snapshot(cache: Any) -> Callable[[], None]:
    """Return a function that puts a KV cache back to what it is now; it may be called again.

    ``crop`` cannot do that: a pass that is aborted in layer 2 has lengthened only two layers, and sliding windows have dropped
    positions already.
    """
    saved = [(part, _copy(vars(part), share=type(part).__name__ in GROWING)) for part in _parts(cache)]

    def restore() -> None:
        for part, state in saved:
            vars(part).clear()
            vars(part).update(_copy(state, share=type(part).__name__ in GROWING))

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


def _positions(state: dict[str, Any]) -> int:
    """Return how many positions a part of a cache has seen."""
    counted = state.get("cumulative_length")
    keys = next((tensor for tensor in _tensors(state) if tensor.numel()), None)
    return int(counted if counted is not None else 0 if keys is None else keys.shape[-2])


def _tensors(state: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the keys and values of a part: a layer's own, or those of all layers in a cache of old."""
    for name in ("keys", "values"):
        if isinstance(state.get(name), torch.Tensor):
            yield state[name]
    for name in ("key_cache", "value_cache"):
        yield from (tensor for tensor in state.get(name, ()) if isinstance(tensor, torch.Tensor))


def _shortened(state: dict[str, Any], held: int, length: int) -> dict[str, Any] | None:
    """Return what changes in a part that loses its last positions; None if it does not hold all of them."""
    if any(tensor.numel() and tensor.shape[-2] != held for tensor in _tensors(state)):
        return None

    def cut(value: Any) -> Any:
        return value[..., :length, :] if isinstance(value, torch.Tensor) and value.numel() else value

    change: dict[str, Any] = {name: cut(state[name]) for name in ("keys", "values") if name in state}
    change |= {name: [cut(tensor) for tensor in state[name]] for name in ("key_cache", "value_cache") if name in state}
    return change | {name: length for name in ("cumulative_length", "_seen_tokens") if name in state}
