"""What a GGUF file says of its model that transformers does not read, and would compute otherwise without a word.

Some of it can be said in the words of transformers' config; the rest is refused.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from airllm_nb.compat.gguf_files import ARCHITECTURES, foreign_fields, splits
from airllm_nb.compat.gguf_rotary import AGAIN, BASE, OTHER, Values, rope_parameters
from airllm_nb.errors import CheckpointError, UnsupportedError

WINDOWED = ("gemma2", "gemma3")
"""Of these transformers reads the sliding window."""
DEFAULTS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
"""What transformers takes for Gemma 2, whatever the file says."""
OWN_SCALE = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models: they scale the attention as if heads were as wide as the embedding over their number.

It stands in no field. llama.cpp, too, knows them by their layers, and takes the width of a head for all others."""
MISTRAL = {"embedding_length": 4096, "feed_forward_length": 14336, "attention.head_count_kv": 8}
"""Mistral 7B. The first version has a window of 4,096 tokens, which no field tells, and a base of 10,000; later ones neither."""
WINDOW = 4096


COUNTS = frozenset((
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
    "rope.scaling.original_context_length", "attention.sliding_window", "expert_count",
))  # fmt: skip
NUMBERS = frozenset((
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor",
    "attn_logit_softcapping", "final_logit_softcapping", "attention.scale", "logit_scale", "residual_scale", "embedding_scale",
))  # fmt: skip
READ = COUNTS | NUMBERS | {"rope.scaling.type", "rope.scaling.finetuned"}
"""Fields of an architecture that transformers reads, or that are looked at here."""
REQUIRED = ("context_length", "embedding_length", "block_count", "attention.layer_norm_rms_epsilon")
"""Without which llama.cpp loads none. transformers takes those of another model of the architecture."""
HARMLESS: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "expert_used_count": (0,), "pooling_type": (0,),
    "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,), "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",), "rope.freq_base_swa": (10000.0,),
}  # fmt: skip
"""Others, and the values with which they change nothing."""
GEMMA = ("gemma2", "gemma3")
MOST_SHOWN = 200
"""Characters of what is refused: a field may have a text of megabytes."""


def require_exact(name: str, architecture: str, fields: Mapping[str, Any]) -> None:
    """Refuse a file that transformers reads otherwise than it was meant, or that was not compared.

    Parameters
    ----------
    name : str
        The file's.
    architecture : str
        As the file names it.
    fields : mapping of str to object
        What the file says.

    Raises
    ------
    UnsupportedError
        With what it is.
    CheckpointError
        If a field is missing, or is none of its kind.
    """
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{name} holds a model of the architecture {architecture}; GGUF files are read of {', '.join(ARCHITECTURES)}.",
            OTHER,
        )
    own = _own(architecture, fields)
    for key in sorted(fields.keys() & foreign_fields(architecture)):
        raise UnsupportedError(
            f"{name} is of the architecture {architecture}, and transformers would obey its field {key}, too.", OTHER
        )
    for what in _lists(architecture, own, fields):
        raise UnsupportedError(f"{name} has a list of {what}, which transformers does not read from GGUF files.", OTHER)
    for what in _faults(architecture, own):
        raise CheckpointError(f"{name} is damaged: {what}.", AGAIN)
    for what in (*_tokenizer(architecture, fields), *_unread(architecture, own, str(fields.get("general.name")))):
        shown = what if len(what) <= MOST_SHOWN else f"{what[:MOST_SHOWN]}..."
        raise UnsupportedError(f"{name} has {shown}, which transformers does not read from GGUF files.", OTHER)


def settings(name: str, architecture: str, fields: Mapping[str, Any], factors: Mapping[str, Values]) -> dict[str, Any]:
    """Return what transformers' config is to say beside what it reads of the file itself.

    Parameters
    ----------
    name, architecture, fields
        Of a file that `require_exact` lets pass.
    factors : mapping of str to numpy.ndarray
        Those of `gguf_rotary.TENSORS` that it has; float32, flat.

    Returns
    -------
    dict
        ``rope_parameters``, to be added to those of the layers without a sliding window; ``query_pre_attn_scalar`` of Gemma.

    Raises
    ------
    CheckpointError, UnsupportedError
        As `gguf_rotary.rope_parameters`.
    """
    own = _own(architecture, fields)
    rotary = rope_parameters(name, architecture, own, _head(own), factors)
    if "rope.freq_base" not in own:  # of Gemma 3 transformers takes another base than llama.cpp
        rotary["rope_theta"] = BASE
    found: dict[str, Any] = {"rope_parameters": rotary}
    if architecture in GEMMA:  # of which transformers would take 256, whatever the file says
        found["query_pre_attn_scalar"] = _even(own) if own.get("block_count") == OWN_SCALE[architecture] else _head(own)
    return found


def _own(architecture: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key.partition(".")[2]: value for key, value in fields.items() if key.startswith(f"{architecture}.")}


def _lists(architecture: str, own: Mapping[str, Any], fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield which fields are lists that are to be one value, as of layers that differ."""
    yield from (f"{architecture}.{key}" for key, value in own.items() if key in READ and value is None)
    if "general.name" in fields and fields["general.name"] is None:
        yield "general.name"


def _faults(architecture: str, own: Mapping[str, Any]) -> Iterator[str]:
    """Yield which fields are missing, or none of their kind."""
    yield from (f"it does not say {architecture}.{key}" for key in REQUIRED if key not in own)
    for key, value in own.items():
        count = type(value) is int and value >= 0
        number = type(value) in (int, float) and math.isfinite(value)
        if (key in COUNTS and not count) or (key in NUMBERS and not number):
            yield f"{architecture}.{key} is {reprlib.repr(value)}"


def _even(own: Mapping[str, Any]) -> int:
    """Return the embedding's numbers over the heads; 0 if the file does not say."""
    width, heads = own.get("embedding_length"), own.get("attention.head_count")
    return width // heads if width and heads else 0


def _head(own: Mapping[str, Any]) -> int:
    """Return the numbers of a head; 0 if the file does not say."""
    head = own.get("attention.key_length") or _even(own)
    return head if isinstance(head, int) else 0


def _unread(architecture: str, own: dict[str, Any], name: str) -> Iterator[str]:
    yield from _heads(own)
    yield from _attention(architecture, own)
    if own.get("expert_count"):
        yield f"{own['expert_count']} experts in each layer"
    if architecture == "llama":
        yield from _mistral(own, name)
    for key, value in own.items():
        if key not in READ and (key not in HARMLESS or value not in HARMLESS[key]):
            yield f"the field {architecture}.{key}" + ("" if value is None else f" ({value})")


def _tokenizer(architecture: str, fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield what transformers takes no notice of where it makes the tokenizer."""
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    kind, before = own.get("model"), own.get("pre")
    if kind not in ("gpt2", "llama"):
        yield f"a tokenizer of the kind {kind}"
    if kind == "gpt2" and before not in splits():
        yield (
            "a tokenizer that does not say how it splits words"
            if before is None
            else f"a tokenizer that splits words as {before}"
        )
    if kind == "llama":
        prefixed = architecture not in GEMMA
        if bool(own.get("add_space_prefix", prefixed)) != prefixed:
            yield f"a tokenizer that {'puts no' if prefixed else 'puts a'} space before a text"
        for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
            if own.get(key, False) is not False:
                yield f"a tokenizer with {key}"


def _heads(own: dict[str, Any]) -> Iterator[str]:
    if head := _head(own):
        if (turned := own.get("rope.dimension_count", head)) != head:
            yield f"a rotary embedding of {turned} of the {head} numbers of a head"
        if (length := own.get("attention.value_length", head)) != head:
            yield f"values of {length} numbers beside keys of {head}"


def _attention(architecture: str, own: dict[str, Any]) -> Iterator[str]:
    window = own.get("attention.sliding_window") or 0
    if architecture not in WINDOWED and 0 < window < own.get("context_length", 0):
        yield f"a sliding window of {window} tokens"
    if architecture == "gemma3" and not window:
        yield "layers without a sliding window only"
    for key, default in DEFAULTS.items():
        if own.get(key, expected := default if architecture == "gemma2" else None) != expected:
            yield f"{key} {own[key]}"
    for key in ("attention.scale", "logit_scale", "residual_scale", "embedding_scale"):
        if own.get(key):
            yield f"{key} {own[key]}"


def _mistral(own: dict[str, Any], name: str) -> Iterator[str]:
    """Mistral's models go by the name of llama, which computes the same but for the window."""
    if name == "mistral":
        yield 'the very name "mistral", by which that takes it for an architecture'
    mistral = re.search("mistral", name, re.IGNORECASE) or MISTRAL.items() <= own.items()
    if mistral and own.get("rope.freq_base", BASE) == BASE and own.get("context_length", 0) > WINDOW:
        yield f"the marks of Mistral 7B v0.1, and so a sliding window of {WINDOW} tokens that it does not name"
