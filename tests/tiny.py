"""Tiny random checkpoints, made on the spot: small enough for every test, real enough for every code path."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

LAYERS = 4
VOCABULARY = 256 + 3  # the bytes, and <s>, </s>, <unk>
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip

# Classic config.json, as published on the hub: every version of transformers from the floor on reads it.
CONFIGS = {
    "llama": SHAPE | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128},
    "llama-tied": SHAPE | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128, "tie_word_embeddings": True,
    },
    "llama3-rope": SHAPE | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128, "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE,
    },
    "qwen2": SHAPE | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 128},
    "mistral": SHAPE | {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "max_position_embeddings": 128, "sliding_window": 6,
    },
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": LAYERS,
        "n_head": 4, "n_positions": 128, "bos_token_id": 256, "eos_token_id": 257,
    },
    "mixtral": SHAPE | {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "max_position_embeddings": 128, "num_local_experts": 4,
    },
}  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_checkpoint(
    folder: Path,
    kind: str = "llama",
    *,
    raw: dict | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shards: str = "100KB",
    tokenizer: bool = False,
    **changes,
) -> Path:
    """Write a checkpoint of one of CONFIGS or of `raw`, with `changes` to its config.json; sharded unless `shards` is large."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = (raw or CONFIGS[kind]) | {"torch_dtype": str(dtype).removeprefix("torch.")} | changes
    (folder / "config.json").write_text(json.dumps(raw))
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # transformers' initialisation is so even that a lost layer could go unnoticed
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # the only kind of buffer below that a checkpoint brings
                buffer.uniform_(0.0, 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    (folder / "config.json").write_text(json.dumps(raw))
    if tokenizer:
        make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write a byte-level tokenizer: token i is byte i, so any text is a prompt and any answer is text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = bytes_to_unicode()
    vocabulary = {character: byte for byte, character in alphabet.items()} | {"<s>": 256, "</s>": 257, "<unk>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "</s>",
        "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in settings.items() if value}))


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def budgets(plan) -> dict[str, int]:
    """Budgets in bytes that keep all layers, about half of them, none."""
    return {"all": plan.total_nbytes, "half": (plan.total_nbytes + plan.least) // 2, "none": plan.least}
