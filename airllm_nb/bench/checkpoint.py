"""Checkpoints of real shapes with random weights, for measuring: what the numbers mean does not matter to time and memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

CONTEXT = 4096


class Shape(NamedTuple):
    """What decides the size of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


SHAPES = {
    "tiny": Shape(64, 128, 4, 4, 2, 320, tied=False),
    "1b": Shape(2048, 5632, 22, 32, 4, 32000, tied=False),  # TinyLlama 1.1B
    "3b": Shape(3072, 8192, 28, 24, 8, 128256, tied=True),  # Llama 3.2 3B
}


def make(folder: Path, shape: Shape) -> Path:
    """Write a sharded bfloat16 Llama into `folder`, unless it is there; returns the folder."""
    if (folder / "config.json").exists():  # written last
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(shape)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in tensors.items():
        if name.endswith("0.input_layernorm.weight") or sum(map(math.prod, files[-1].values())) > 2**28:
            files.append({})
        files[-1][name] = size
    generator = torch.Generator().manual_seed(0)
    where = {}
    for number, group in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        values = {name: _values(size, generator) for name, size in group.items()}
        save_file(values, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(group, file))
    _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    _write(folder / "config.json", _config(shape))
    return folder


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    width = shape.hidden // shape.heads * shape.kv_heads
    layer = {
        "input_layernorm": (shape.hidden,),
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (width, shape.hidden),
        "self_attn.v_proj": (width, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "post_attention_layernorm": (shape.hidden,),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for index in range(shape.layers):
        tensors |= {f"model.layers.{index}.{name}.weight": size for name, size in layer.items()}
    tensors["model.norm.weight"] = (shape.hidden,)
    return tensors if shape.tied else tensors | {"lm_head.weight": (shape.vocabulary, shape.hidden)}


def _values(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return (torch.randn(size, generator=generator) * 0.02).bfloat16()


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary, "tie_word_embeddings": shape.tied,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
