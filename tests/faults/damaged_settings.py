"""Damage to what says what the model is and how it speaks; and folders that bring code."""

from __future__ import annotations

import json
import os
import pickle

from damage import INDEX, JUNK, change_json, flip, kind, shards


@kind(other_model=True)
def config_types(folder, rng, seed):
    def change(config):
        config[rng.choice(sorted(config))] = rng.choice(JUNK)

    change_json(folder / "config.json", change)


@kind(other_model=True)
def config_values(folder, rng, seed):
    def change(config):
        key = rng.choice([key for key in config if type(config[key]) is int])
        config[key] = rng.choice([config[key] + 1, config[key] - 1, config[key] * 2, config[key] // 2, 10**5, 10**12, 0, -1, 1])

    change_json(folder / "config.json", change)


@kind(other_model=True)
def config_additions(folder, rng, seed):
    """Fields that the file did not have, of names that transformers knows."""
    names = [
        "rope_theta", "rope_scaling", "rms_norm_eps", "hidden_act", "attention_dropout", "head_dim", "pad_token_id",
        "use_cache", "tie_word_embeddings", "_attn_implementation", "attn_implementation", "quantization_config", "auto_map",
        "text_config", "layer_types", "sliding_window", "output_attentions", "output_hidden_states", "return_dict",
        "pruned_heads", "id2label", "num_labels", "chunk_size_feed_forward", "is_encoder_decoder", "torch_dtype", "dtype",
        "architectures", "rope_parameters", "initializer_range", "max_length", "num_beams", "activation_function", "n_inner",
        "use_bfloat16", "_name_or_path",
    ]  # fmt: skip

    def change(config):
        for name in rng.sample(names, 2):
            config[name] = rng.choice(JUNK)

    change_json(folder / "config.json", change)


@kind(other_model=True)
def config_bits(folder, rng, seed):
    path = folder / "config.json"
    flip(path, rng, 0, path.stat().st_size, 1 + seed % 2)


@kind
def config_needs_much_memory(folder, rng, seed):
    """Sizes that would be allocated before any weight tells that they are wrong."""
    names = ["max_position_embeddings", "n_positions", "vocab_size", "n_ctx", "hidden_size", "n_embd"]
    names += ["num_hidden_layers", "n_layer"]
    change_json(
        folder / "config.json",
        lambda config: config.update({name: 10 ** (5 + seed // 2) for name in names[2 * (seed % 4) :][:2] if name in config}),
    )


@kind(other_model=True)
def generation_config(folder, rng, seed):
    names = [
        "max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "bos_token_id", "do_sample", "temperature", "top_k",
        "top_p", "num_beams", "num_return_sequences", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
        "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id", "forced_bos_token_id", "sequence_bias",
        "cache_implementation", "cache_config", "min_length", "min_new_tokens", "guidance_scale", "penalty_alpha",
        "assistant_confidence_threshold", "prompt_lookup_num_tokens", "watermarking_config", "stop_strings", "use_cache",
        "output_scores", "num_assistant_tokens", "constraints", "max_time", "exponential_decay_length_penalty",
        "renormalize_logits", "token_healing", "custom_generate", "compile_config", "dola_layers",
    ]  # fmt: skip
    path = folder / "generation_config.json"
    change_json(path, lambda config: config.update({name: rng.choice(JUNK) for name in rng.sample(names, 1 + seed % 3)}))


@kind(other_model=True)
def tokenizer_json(folder, rng, seed):
    path = folder / "tokenizer.json"
    if seed < 3:
        os.truncate(path, rng.randrange(path.stat().st_size))
    elif seed < 6:
        flip(path, rng, 0, path.stat().st_size, 3)
    else:

        def change(content):
            content[rng.choice(sorted(content))] = rng.choice(JUNK)

        change_json(path, change)


@kind(other_model=True)
def tokenizer_config(folder, rng, seed):
    names = [
        "tokenizer_class", "bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "model_max_length",
        "add_bos_token", "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "fast_tokenizer_files",
        "auto_map", "padding_side", "model_input_names", "clean_up_tokenization_spaces", "from_slow", "backend",
    ]  # fmt: skip

    def change(config):
        config[rng.choice(names)] = rng.choice(JUNK)

    change_json(folder / "tokenizer_config.json", change)


@kind
def chat_templates(folder, rng, seed):
    """Templates that fail, never end, fill the memory, or reach for what they must not."""
    template = [
        "{{ ''.__class__.__mro__ }}", "{{ messages.__class__.__base__.__subclasses__() }}", "{% for", "{{ nosuch.thing }}",
        "{% for a in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}", "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception('no\x1b[2J') }}", "{% include '/etc/passwd' %}", "{{ 1 / 0 }}",
    ][seed]  # fmt: skip
    change_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template=template))


@kind
def pickles(folder, rng, seed):
    """Nothing of a model is executed: pickles that would say so if they were opened, beside the weights or in their place."""

    class Run:
        def __reduce__(self):
            return os.abort, ()

    bomb = pickle.dumps(Run())
    for name in ["pytorch_model.bin", "model.pth", "training_args.bin", "model.pt", "adapter_model.bin"]:
        (folder / name).write_bytes(bomb)
    if seed < 4:
        for path in [*shards(folder), folder / INDEX][:: 1 if seed % 2 else -1]:
            path.unlink()
    elif seed < 6:
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "pytorch_model.bin"}}))
    elif seed < 8:
        rng.choice(shards(folder)).write_bytes(bomb)


@kind(other_model=True)
def code(folder, rng, seed):
    """Code that the folder brings: files that would end the process if they were imported, named wherever files are named."""
    for name in [
        "mine.py",
        "modeling_llama.py",
        "tokenization.py",
        "custom_generate/generate.py",
        "sitecustomize.py",
        "torch.py",
    ]:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("import os\nos.abort()\n")
    auto = {f"Auto{what}": f"mine.{what}" for what in ("Config", "ModelForCausalLM", "Model", "Tokenizer")}
    file, change = [
        ("config.json", {"auto_map": auto}), ("config.json", {"auto_map": auto, "model_type": "mine"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["mine.T", "mine.T"]}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["mine.T", "mine.T"]}, "tokenizer_class": "T"}),
        ("config.json", {"attn_implementation": "org/kernel"}), ("config.json", {"_attn_implementation": "org/kernel"}),
        ("config.json", {"auto_map": {"AutoConfig": "org/other--mine.C"}, "model_type": "mine"}),
        ("config.json", {"custom_pipelines": {"text-generation": {"impl": "mine.P"}}, "architectures": ["mine.Model"]}),
        ("generation_config.json", {"custom_generate": str(folder)}),
        ("config.json", {"_attn_implementation_internal": "org/kernel"}),
    ][seed]  # fmt: skip
    change_json(folder / file, lambda config: config.update(change))
