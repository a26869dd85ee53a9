"""A tiny random checkpoint of any type that transformers' causal language models know.

A type's own defaults say which fields its config has; those that make a model large get small values here, in every part of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 160
LAYERS = 4

# Values by the name of the field, whatever the type: the first pattern that matches the whole name counts.
SHRINK: list[tuple[str, Any]] = [
    (r"pad_token_id", 0),
    (r"bos_token_id|(decoder_)?start_token_id", 1),
    (r"(forced_)?eos_token_id|eod_token_id|sep_token_id|cls_token_id|unk_index", 2),
    (r"\w+_token_(id|index)|boi_token_\w+|vocab_offset", VOCABULARY - 1),  # those of images and sounds: not in the prompt
    (r"(decoder_|unpadded_|audio_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"\w+_vocab_size", 16),
    (r"codebook_size", 128),
    (r"num_hidden_layers|(n|num|decoder|encoder|num_decoder|num_encoder)_layers?|num_blocks", LAYERS),
    (r"conf_num_hidden_layers|num_global_layers|depth", 2),
    (r"hidden_size|d_model|n_embd|emb_dim|word_embed_proj_dim|embedding_dim|(in|out)put_embedding_size|lru_width", 64),
    (r"hidden_size_global|backbone_hidden_size|out_hidden_size|adapter_out_dim|projector_(in|out)put_dim", 64),
    (r"output_channels|input_size", 64),
    (r"attention_hidden_size", 128),
    (r"attention_head_dim", 32),
    (r"attention_head_size", 16),
    (r"\w*intermediate_size\w*|\w*ffn_dim|ffn_hidden_size|expert_ffn_hidden_size|feed_forward_size", 96),
    (r"dff|d_ff|dim_ff|d_inner|mlp_dim|n_inner", 96),
    (r"\w*(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups)", 2),
    (r"\w*num_attention_heads|n_heads?|num_heads|\w*attention_heads", 4),
    (r"(swa_|global_)?head_dim|d_head|d_kv|dim_head|kv_channels|v_head_dim|linear_(key_|value_)?head_dim", 16),
    (r"qk_nope_head_dim|qk_rope_head_dim|index_head_dim", 16),
    (r"rotary_dim", 8),
    (r"linear_num_(key_|value_)?heads", 4),
    (r"index_n_heads", 2),
    (r"index_topk", 4),
    (r"(kv|q|o)_lora_rank|adapter_rank|hc_lowrank|laurel_rank|gated_norm_rank", 16),
    (r"max_position_embeddings|n_positions|n_ctx|context_length|max_seq_len|model_max_length", 128),
    (r"max_(target|source)_positions", 128),
    (r"(moe_)?(num_(local_|routed_)?|n_routed_)experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r"zero_expert_num", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r"sliding_window(_size)?|attention_window_size|local_attention|attention_chunk_size|local_attention_window_len", 6),
    (r"(mamba_)?chunk_size|block_size", 8),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size|time_step_rank|mamba_dt_rank", 8),
    (r"mamba_(n|num)_heads|n_mamba_heads", 8),
    (r"mamba_(d_head|head_?dim)", 16),
    (r"mamba_d_ssm", 128),
]
MADE_UP_LATER = frozenset(("head_dim", "num_key_value_heads"))  # from other fields, where they are None

ATTENTION_LAST = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4, "indexer_compress_ratio": 2,
    "ple_layer_ids": [2], "ple_embed_dim": 64, "heads_per_ngram": 2, "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2, "eos_token_id": 2,
}  # fmt: skip
DOTS3 = {
    "head_dim": 32, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
    "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
WITHOUT_PER_LAYER = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
ALL_SHARED = {"num_hidden_layers": LAYERS, "num_kv_shared_layers": LAYERS}  # an assistant reads the keys of another model

# What the rules cannot know, by type: mostly layers of every kind among the few, and sizes that belong together.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4], "use_cache": False},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {
            "pyramid_num_routed": [-1, -1, 2, 4], "adapter_in_dim": 64, "hidden_size": 64, "num_attention_heads": 4,
        },
        "audio_config": {"adapter_input_size": 64, "hidden_size": 64, "num_attention_heads": 4},
    },
    "dots3_note_text": DOTS3,
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "emu3": {"vocabulary_map": {"<image>": 157, "<|extra_200|>": 158, "<|visual token 000000|>": 159}},
    "gemma4_assistant": {"text_config": ALL_SHARED | WITHOUT_PER_LAYER},
    "gemma4_unified_assistant": {"text_config": ALL_SHARED},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": ATTENTION_LAST},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "rwkv": {"attention_hidden_size": 64, "rescale_every": 2},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"] * 2, "hash_seed": 0,
        "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "num_buckets": 2,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "use_mamba_kernels": False},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# What a config class asks for before it gives any defaults.
REQUIRED = {"gemma4_assistant": {"text_config": WITHOUT_PER_LAYER}}

# Their causal model finds none of its weights in the multimodal checkpoint: here it has a checkpoint of its own.
TEXT_ALONE = frozenset(("emu3",))


def tiny_config(model_type: str) -> Any:
    """Return the type's config, shrunk."""
    kind = transformers.CONFIG_MAPPING[model_type]
    defaults = kind(**REQUIRED.get(model_type, {}))
    causal = {"is_decoder": True} if "is_decoder" in vars(defaults) else {}
    return kind(**_merged(_shrunk(defaults) | causal, OVERRIDES.get(model_type, {})))


def _shrunk(config: Any) -> dict[str, Any]:
    """Return the fields of a config whose values must be small, with those values."""
    small: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            small[name] = _shrunk(value)
        elif _is_size(value) or (value is None and name in MADE_UP_LATER):
            small |= next(({name: tiny} for pattern, tiny in SHRINK if re.fullmatch(pattern, name)), {})
    if "kv_lora_rank" in vars(config):  # multi-head latent attention has a key for each head
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = {name: _merged(one[name], value) for name, value in other.items() if isinstance(value, dict) and name in one}
    return one | other | both


def make_any(folder: Path, model_type: str) -> Path:
    """Write a tiny checkpoint of a type, random in every parameter and every buffer that is stored."""
    config = tiny_config(model_type)
    torch.manual_seed(0)
    model = _published(config).from_config(config)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():  # norms around 1; an even initialisation would hide a lost layer
                tensor.normal_(1.0 if tensor.dim() <= 1 and not name.endswith("bias") else 0.0, 0.2)
    model.save_pretrained(folder, max_shard_size="100KB")
    config.save_pretrained(folder)
    return folder


def _published(config: Any) -> Any:
    """Return the kind of model that such a config is published with: a multimodal one, if the config has parts."""
    if config.model_type not in TEXT_ALONE:
        for part, name in (("text_config", "AutoModelForImageTextToText"), ("audio_encoder", "AutoModelForTextToWaveform")):
            auto = getattr(transformers, name, None)
            if hasattr(config, part) and auto is not None and type(config) in auto._model_mapping:
                return auto
    return transformers.AutoModelForCausalLM
