"""Tiny GGUF files, made on the spot: random weights under the names and with the metadata of an architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf.quants import dequantize, quantize

LAYERS, HEADS, KV_HEADS, WORDS = 3, 4, 2, 300
WIDTH, INNER = 64, 128
WINDOW = 96
WIDE = 256
"""Numbers in a row for all quantizations: K-quants and others have blocks of 256."""
TYPES = {"gemma3": "gemma3_text"}
SENTENCEPIECE = ("gemma2", "gemma3", "phi3")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CANDIDATES = 4096


def make_gguf(
    path: Path,
    architecture: str,
    kind: str = "Q8_0",
    *,
    extra: str | None = None,
    tied: bool = False,
    width: int = WIDTH,
    inner: int = INNER,
    head: int | None = None,
    kinds: Mapping[str, str] | None = None,
    fields: Mapping[str, Any] | None = None,
    factors: Mapping[str, np.ndarray] | None = None,
    context: int = 128,
    layers: int = LAYERS,
    split: int = 0,
) -> Path:
    """Write a file whose matrices are quantized as `kind`.

    Parameters
    ----------
    path, architecture, kind
        Where, and of what.
    extra : str, optional
        The name of a tensor that belongs nowhere.
    tied : bool
        Whether the head is the embedding.
    width, inner : int
        Numbers in a row.
    head : int, optional
        Numbers of a head, if not `width` over their number.
    kinds : dict of str to str, optional
        For tensors in whose name a word occurs another kind.
    fields : dict of str to str, int, float, list or None, optional
        What else the file says; None for what it does not say.
    factors : dict of str to numpy.ndarray, optional
        Tensors with factors of the rotary embedding.
    context, layers : int
        Tokens of the longest text, and layers.
    split : int
        Most tensors of a file; the parts have other names. 0 for all in one.
    """
    # Of Qwen3 transformers takes its default, whatever the file says.
    head = 128 if architecture == "qwen3" else head or width // HEADS
    config = transformers.AutoConfig.for_model(
        TYPES.get(architecture, architecture), vocab_size=WORDS, hidden_size=width, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=context,
        pad_token_id=0, head_dim=head, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, layers)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(WORDS)
    if architecture == "gemma3":
        writer.add_sliding_window(WINDOW)
    _add_tokenizer(writer, architecture)
    adders = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    for name, value in (fields or {}).items():
        if value is None:
            del writer.kv_data[0][name]
        else:
            adders[type(value)](name, value)
    for name, values in (factors or {}).items():  # llama.cpp's converter, too, writes them first
        writer.add_tensor(name, values)
    rng = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if stem == "lm_head" and (tied or names.get_name(stem) is None):
            continue
        weight = rng.standard_normal(tuple(tensor.shape)).astype(np.float32) * 0.2
        own = f"{names.get_name(stem)}.{suffix}"
        _add(writer, own, weight, next((other for word, other in (kinds or {}).items() if word in own), kind))
    if extra:
        _add(writer, extra, rng.standard_normal(width).astype(np.float32), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def unpackable() -> list[str]:
    """Return the names of all quantizations that the package ``gguf`` turns into numbers."""
    found = []
    for kind, (_, nbytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind.name)
    return found


def _add(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: str) -> None:
    if weight.ndim == 1 or kind == "F32":
        writer.add_tensor(name, weight)
        return
    number = gguf.GGMLQuantizationType[kind]
    try:
        packed = quantize(weight, number)
    except NotImplementedError:
        packed = _random_blocks(weight.shape, number)
    writer.add_tensor(name, packed, raw_dtype=number)


def _random_blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return bytes that mean weights of a usual size: of those made at random, the blocks that do."""
    rng = np.random.default_rng(int(kind))
    numbers, nbytes = gguf.GGML_QUANT_SIZES[kind]
    candidates = rng.integers(0, 256, (CANDIDATES, nbytes), np.uint8)
    with np.errstate(all="ignore"):
        largest = np.abs(dequantize(candidates, kind)).max(axis=-1)
    good = candidates[(largest > 0.1) & (largest < 1)]  # not where it is no number
    assert len(good) > 10
    return good[rng.integers(0, len(good), shape[0] * shape[1] // numbers)].reshape(shape[0], -1)


def _add_tokenizer(writer: gguf.GGUFWriter, architecture: str) -> None:
    alphabet = [chr(number) for number in range(256, 256 + WORDS - len(SPECIAL))]
    alphabet[-1] = alphabet[0] + alphabet[1]
    writer.add_token_list([*SPECIAL, *alphabet])
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(alphabet))
    if architecture in SENTENCEPIECE:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([0.0] * WORDS)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([f"{alphabet[0]} {alphabet[1]}"])
    for name, number in (("pad", 0), ("bos", 1), ("eos", 2), ("unk", 3)):
        getattr(writer, f"add_{name}_token_id")(number)


def llama3_factors(base: float, head: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """Return by what Llama 3.1's scaling divides each frequency, in float32, as llama.cpp's converter writes it.

    Source: https://arxiv.org/abs/2407.21783 and the formula of its ``rope_type`` in transformers; here each step in float32.
    """
    frequency = 1.0 / base ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    turns = original / (2 * math.pi / frequency)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    divided = 1 / ((1 - smooth) / factor + smooth)
    return torch.where(turns < low, factor, torch.where(turns > high, 1.0, divided)).numpy()
