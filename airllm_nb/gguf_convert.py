"""The demo's GGUF file as the folder that its authors would have published: safetensors, config and tokenizer.

All files are written in the style of transformers 4: every version from 4.43 on reads that style, and the result
does not depend on the versions of transformers and tokenizers that happen to be installed.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from gguf import GGUFReader, GGUFValueType, TokenType
from gguf.quants import dequantize
from safetensors import SafetensorError
from safetensors.torch import save_file

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

    from gguf import ReaderField

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: pathlib.Path, folder: pathlib.Path, told: Callable[[int, int], object]) -> None:
    """Write a llama checkpoint with tied embeddings and SmolLM's tokenizer as bfloat16 safetensors.

    Parameters
    ----------
    source : pathlib.Path
        The GGUF file.
    folder : pathlib.Path
        Where the files go: an existing folder without any of them.
    told : callable(done, total)
        Called after each tensor: how many bytes of the weights are converted, and how many there are. It may raise.

    Raises
    ------
    OSError
        The files cannot be written.
    """
    reader = GGUFReader(source)
    metadata = {name: _value(field) for name, field in reader.fields.items()}
    for name, content in {
        "config.json": _config(metadata),
        "generation_config.json": _special_ids(metadata),
        "tokenizer.json": _tokenizer(metadata),
        "tokenizer_config.json": _tokenizer_config(metadata),
    }.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}
    weights: dict[str, torch.Tensor] = {}
    done, total = 0, sum(int(tensor.n_elements) for tensor in reader.tensors) * torch.bfloat16.itemsize
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16)
        part = tensor.name.split(".")[-2]
        weights[_key(tensor.name)] = _unpermute(weight, heads[part]) if part in heads else weight
        done += weight.nbytes
        told(done, total)
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else its owner alone can read it


def _value(field: ReaderField) -> Any:
    """One metadata entry: a string, a number, or a list of them."""
    kind, parts = field.types[-1], [field.parts[index] for index in field.data]
    if kind == GGUFValueType.STRING:
        values: list[Any] = [bytes(part).decode() for part in parts]
    elif kind == GGUFValueType.FLOAT32:
        values = [float(str(part[0])) for part in parts]  # 1e-05, not the 9.999999747378752e-06 of a cast
    else:
        values = [part[0].item() for part in parts]
    return values if field.types[0] == GGUFValueType.ARRAY else values[0]


def _key(name: str) -> str:
    """Return the checkpoint key of a GGUF tensor: ``blk.3.attn_q.weight`` is layer 3's ``q_proj``."""
    if not name.startswith("blk."):
        return f"{_MODEL[name.removesuffix('.weight')]}.weight"
    _, index, part, _ = name.split(".")
    return f"model.layers.{index}.{_LAYER[part]}.weight"


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Bring the rows of a query or key projection into transformers' order.

    Rotary embedding turns rows in pairs: GGUF has the two of a pair side by side, transformers half a head apart.
    """
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: metadata[f"tokenizer.ggml.{kind}_token_id"] for name, kind in names.items()}


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    llama = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **_special_ids(metadata),
        "hidden_act": "silu",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "max_position_embeddings": llama["context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": llama["attention.head_count"],
        "num_hidden_layers": llama["block_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "rms_norm_eps": llama["attention.layer_norm_rms_epsilon"],
        "rope_scaling": None,
        "rope_theta": llama["rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": llama["vocab_size"],
    }


def _tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    """Byte-level BPE on single digits. Merges are strings: tokenizers before 0.20 know no other form."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, **plain}
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == TokenType.CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    return {
        "add_prefix_space": False,
        **{name: tokens[metadata[f"tokenizer.ggml.{kind}_token_id"]] for name, kind in kinds.items()},
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # else transformers 4 adds token_type_ids
        "model_max_length": metadata["llama.context_length"],
        # The published GPT2Tokenizer loses the Digits step on transformers 5, without a word: "  1" gets other ids.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
