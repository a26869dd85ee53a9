"""The families that every version of the matrix must compute exactly or refuse, as tiny checkpoints.

Each case is a ``config.json`` as published on the hub in the days of transformers 4. The newest transformers makes weights for
it and says what is right (`make`): the expected logits and tokens lie beside the checkpoint, which exists twice, with the
classic ``config.json`` and with the one that ``save_pretrained`` of the newest version writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tiny import CONFIGS, LLAMA3_ROPE, SHAPE, make_checkpoint

STYLES = ("classic", "v5")
PROMPTS = {"short": 9, "long": 20, "again": 9}
"""Tokens. The long one exceeds every window and original context below; the short one crosses them while it generates,
and comes again when the model has seen a longer one."""
NEW_TOKENS = 8
PADDING = 4


def _llama(**fields) -> dict:
    return CONFIGS["llama"] | fields


def _kind(model_type: str, **fields) -> dict:
    return SHAPE | {"model_type": model_type, "max_position_embeddings": 128} | fields


LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LONGROPE_WIDE = {
    "type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5],
}  # fmt: skip
DEEPSEEK = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
}  # fmt: skip
DEEPSEEK_YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1, "mscale": 0.7,
    "mscale_all_dim": 0.7,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {"head_dim": 16, "pad_token_id": 0, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
HYBRID = EXPERTS | {
    "head_dim": 16, "partial_rotary_factor": 0.5, "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip

FAMILIES: dict[str, dict] = CONFIGS | {
    "llama-theta": _llama(rope_theta=500000.0),
    "llama-head-dim": _llama(head_dim=24),
    "llama-linear": _llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama-dynamic": _llama(max_position_embeddings=16, rope_scaling={"type": "dynamic", "factor": 4.0}),
    "llama-yarn": _llama(rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}),
    "internlm": _llama(attention_bias=True, rope_scaling={"type": "dynamic", "factor": 4.0}),
    "internlm3": _kind("internlm3", qkv_bias=True, bias=True, head_dim=16, rope_scaling={"rope_type": "dynamic", "factor": 6.0}),
    "llama4": _kind("llama4_text", head_dim=16, num_local_experts=4, interleave_moe_layer_step=2, intermediate_size_mlp=96,
                    no_rope_layers=[1, 1, 1, 0], attention_chunk_size=8, rope_scaling=LLAMA3_ROPE, rope_theta=500000.0),
    "qwen2-yarn": CONFIGS["qwen2"] | {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}},
    "qwen2-yarn-factor": CONFIGS["qwen2"] | {  # as Qwen2.5's README has it: the context is the original one
        "max_position_embeddings": 16, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "qwen2-linear": CONFIGS["qwen2"] | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "qwen2-window": CONFIGS["qwen2"] | {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2},
    "qwen2-moe": _kind("qwen2_moe", shared_expert_intermediate_size=64, **EXPERTS),
    "qwen3": _kind("qwen3", head_dim=24),
    "qwen3-moe": _kind("qwen3_moe", head_dim=24, norm_topk_prob=True, **EXPERTS),
    "qwen3-next": _kind("qwen3_next", **HYBRID),
    "qwen3.5": _kind("qwen3_5_text", **HYBRID),
    "qwen3.5-moe": _kind("qwen3_5_moe_text", **HYBRID),
    "mistral-head-dim": CONFIGS["mistral"] | {"head_dim": 24, "sliding_window": None},
    "gemma": _kind("gemma", **GEMMA),
    "gemma2": _kind("gemma2", sliding_window=6, query_pre_attn_scalar=20, attn_logit_softcapping=2.0,
                    final_logit_softcapping=3.0, **GEMMA),
    "gemma3": _kind("gemma3_text", sliding_window=6, query_pre_attn_scalar=20, rope_theta=1e6, rope_local_base_freq=1e4,
                    sliding_window_pattern=2, rope_scaling={"rope_type": "linear", "factor": 8.0}, **GEMMA),
    "phi": _kind("phi", partial_rotary_factor=0.5),
    "phi-linear": _kind("phi", partial_rotary_factor=0.5, rope_scaling={"type": "linear", "factor": 4.0}),
    "phi3": _kind("phi3", num_key_value_heads=4, original_max_position_embeddings=128),
    "phi3-longrope": _kind("phi3", original_max_position_embeddings=16, rope_scaling=LONGROPE_WIDE),
    "phi3-window": _kind("phi3", sliding_window=6),
    "phi4": _kind("phi3", partial_rotary_factor=0.5, original_max_position_embeddings=16, rope_scaling=LONGROPE),
    "gpt-neox": {
        "model_type": "gpt_neox", "vocab_size": SHAPE["vocab_size"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 128, "rotary_pct": 0.5,
        "rotary_emb_base": 20000, "bos_token_id": 256, "eos_token_id": 257,
    },
    "deepseek-v2": _kind("deepseek_v2", topk_method="group_limited_greedy", **DEEPSEEK),
    "deepseek-v2-yarn": _kind("deepseek_v2", topk_method="group_limited_greedy", **DEEPSEEK, rope_scaling=DEEPSEEK_YARN),
    "deepseek-v2-lite": _kind("deepseek_v2", topk_method="greedy",
                              **DEEPSEEK | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek-v3": _kind("deepseek_v3", norm_topk_prob=True, **DEEPSEEK),
    "deepseek-v3-yarn": _kind("deepseek_v3", norm_topk_prob=True, **DEEPSEEK, rope_scaling=DEEPSEEK_YARN),
    "gpt-oss": _kind("gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=6, rope_theta=150000.0,
                     rope_scaling={"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                                   "original_max_position_embeddings": 16}),
    "mistral-yarn": CONFIGS["mistral"] | {
        "sliding_window": None, "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}},
    "stablelm-linear": _kind("stablelm", partial_rotary_factor=0.5, rope_scaling={"type": "linear", "factor": 4.0}),
    "llama-stray-window": _llama(sliding_window=6),
    "gemma2-stray-pattern": _kind("gemma2", sliding_window=6, sliding_window_pattern=3, query_pre_attn_scalar=20,
                                  attn_logit_softcapping=2.0, **GEMMA),
    "stablelm-dynamic": _kind("stablelm", partial_rotary_factor=0.5, max_position_embeddings=16,
                              rope_scaling={"type": "dynamic", "factor": 4.0}),
    "falcon-linear": _kind("falcon", num_kv_heads=2, new_decoder_architecture=True, bias=False, alibi=False,
                           rope_scaling={"type": "linear", "factor": 4.0}),
    "glm": _kind("glm", head_dim=16, partial_rotary_factor=0.5, attention_bias=True),
    "glm4": _kind("glm4", head_dim=16, partial_rotary_factor=0.5, attention_bias=True),
    "glm4-moe": _kind("glm4_moe", head_dim=16, partial_rotary_factor=0.5, attention_bias=True, use_qk_norm=True,
                      n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=32,
                      first_k_dense_replace=1, n_group=1, topk_group=1),
    "olmo2": _kind("olmo2"),
    "olmo3": _kind("olmo3", sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2, rope_theta=500000.0,
                   rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16,
                                 "attention_factor": 1.2, "beta_fast": 32.0, "beta_slow": 1.0}),
    "granite": _kind("granite", embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=2.0),
    "cohere": _kind("cohere", rope_theta=8e6, logit_scale=0.25, use_qk_norm=True),
    "cohere2": _kind("cohere2", logit_scale=0.25, sliding_window=6, sliding_window_pattern=2),
    "falcon-7b": _kind("falcon", multi_query=True, parallel_attn=True, alibi=False, bias=False, new_decoder_architecture=False),
    "falcon-40b": _kind("falcon", num_kv_heads=2, new_decoder_architecture=True, bias=False, alibi=False),
    "falcon-rw": _kind("falcon", multi_query=False, parallel_attn=False, alibi=True, bias=True),
    "starcoder2": _kind("starcoder2", use_bias=True),
    "starcoder2-window": _kind("starcoder2", use_bias=True, sliding_window=6),
    "smollm3": _kind("smollm3", no_rope_layers=[1, 1, 1, 0], pad_token_id=257),
    "stablelm": _kind("stablelm", partial_rotary_factor=0.5, use_qkv_bias=True),
}  # fmt: skip


def prompt(name: str) -> torch.Tensor:
    """Token ids of shape (2, tokens), the same on every version."""
    return torch.randint(0, 256, (2, PROMPTS[name]), generator=torch.Generator().manual_seed(len(name)))


def greedy(model, ids: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """Return exactly NEW_TOKENS new ids for each row, of which the first begins with `padding` tokens that do not count."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 257}
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def make(folder: Path, name: str) -> None:
    """Write ``folder/classic`` and ``folder/v5`` with the weights, and ``folder/expected.safetensors``: the newest's answer."""
    raw = FAMILIES[name]
    classic = make_checkpoint(folder / "classic", raw=raw, dtype=torch.float32)
    modern = folder / "v5"
    modern.mkdir()
    for file in classic.iterdir():
        (modern / file.name).hardlink_to(file)
    (modern / "config.json").unlink()
    transformers.AutoConfig.from_pretrained(classic).save_pretrained(modern)
    model = transformers.AutoModelForCausalLM.from_pretrained(classic, dtype=torch.float32).eval()
    expected = {}
    for kind in PROMPTS:
        ids = prompt(kind)
        with torch.no_grad():
            expected[f"{kind}.logits"] = model(ids).logits.contiguous()
        expected[f"{kind}.tokens"] = greedy(model, ids).contiguous()
    expected["padded.tokens"] = greedy(model, prompt("short"), PADDING).contiguous()
    save_file(expected, folder / "expected.safetensors", {"format": "pt", "transformers": transformers.__version__})


if __name__ == "__main__":
    for family in FAMILIES:
        make(Path(sys.argv[1]) / family, family)
