"""Tiny GGUF files, made on the spot: random weights under the names and with the metadata of an architecture."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf.quants import quantize

LAYERS, WIDTH, INNER, HEADS, KV_HEADS, WORDS = 3, 64, 128, 4, 2, 300
CONFIG = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
TYPES = {"gemma3": "gemma3_text"}
SENTENCEPIECE = ("gemma2", "gemma3", "phi3")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def make_gguf(path: Path, architecture: str, kind: str = "Q8_0", *, extra: str | None = None, tied: bool = False) -> Path:
    """Write a file whose matrices are quantized as `kind`; with a tensor named `extra` that belongs nowhere."""
    width = 128 if architecture == "qwen3" else WIDTH // HEADS  # transformers takes its default there, whatever the file says
    config = transformers.AutoConfig.for_model(
        TYPES.get(architecture, architecture), **CONFIG, head_dim=width, tie_word_embeddings=tied
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, LAYERS)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(WORDS)
    _add_tokenizer(writer, architecture)
    rng = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if stem == "lm_head" and (tied or names.get_name(stem) is None):
            continue
        weight = rng.standard_normal(tuple(tensor.shape)).astype(np.float32) * 0.2
        _add(writer, f"{names.get_name(stem)}.{suffix}", weight, kind)
    if extra:
        _add(writer, extra, rng.standard_normal(WIDTH).astype(np.float32), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: str) -> None:
    if weight.ndim == 1 or kind == "F32":
        writer.add_tensor(name, weight)
    else:
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(weight, number), raw_dtype=number)


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
        writer.add_token_merges([f"{alphabet[0]} {alphabet[1]}"])
    for name, number in (("pad", 0), ("bos", 1), ("eos", 2), ("unk", 3)):
        getattr(writer, f"add_{name}_token_id")(number)
