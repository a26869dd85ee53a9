"""The language model in a checkpoint that can also see or hear: loaded by itself, where that gives the same answers.

A multimodal ``config.json`` describes the language model in its ``text_config``, and transformers mostly has a causal model for
that. Its weights lie in the checkpoint below a prefix that differs from type to type and from version to version.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from airllm_nb.compat import versions
from airllm_nb.compat.versions import Raw
from airllm_nb.errors import UnsupportedError

TEXT_PARTS = frozenset((
    "aria", "deepseek_vl", "deepseek_vl_hybrid", "dots3_note", "gemma3", "gemma4", "gemma4_unified", "got_ocr2",
    "hyperclovax_vision_v2", "idefics2", "idefics3", "internvl", "janus", "lighton_ocr", "llama4", "llava",
    "llava_next", "llava_next_video", "llava_onevision", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "mistral3",
    "ovis2", "pp_chart2table", "qwen3_5", "qwen3_5_moe", "smolvlm", "video_llama_3", "video_llava", "vipllava",
))  # fmt: skip
"""Types whose text part, loaded as a causal model of its own, gives the logits of the whole: compared with tiny checkpoints.

Others do more with text than their text part does: Aya Vision and Cohere 2 Vision leave out its logit scale, PaliGemma lets each
token of the prompt see those after it; Kimi K2.5, MiniMax M3 and Qianfan OCR store their text part under names of their own.
"""


def language_model(config: Any, raw: Raw) -> Any:
    """Return the config of the language model in a multimodal config; `config` itself if that is what runs.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Made from `raw`.
    raw : dict
        ``config.json``.

    Raises
    ------
    UnsupportedError
        If only images or sounds make sense of the model, or transformers has no causal model for its text part.
    """
    from transformers import AutoModelForCausalLM, PretrainedConfig

    text = getattr(config, "text_config", None)
    if not isinstance(raw.get("text_config"), dict) or not isinstance(text, PretrainedConfig):
        return config
    models = AutoModelForCausalLM._model_mapping  # noqa: SLF001  # has no public form that includes other people's models
    whole = models.get(type(config), None)
    if type(text) in models and getattr(whole, "config_class", None) is type(text):  # transformers itself takes the text part
        return text
    if type(text) in models and config.model_type in TEXT_PARTS:
        if versions.installed() >= (5,) or "tie_word_embeddings" in raw:  # version 4 asks the text part, unless told otherwise
            text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
        return text
    if whole is not None:
        return config
    raise UnsupportedError(
        f"{config.model_type!r} is a multimodal model, and {versions.installed_text()} has no causal language model that gives "
        "the same answers for its text part.",
        "Choose a model for text, or load this one with transformers itself.",
    )


def language_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Find the tensors of the language model in a multimodal checkpoint.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The causal model of the text part.
    stored : iterable of str
        Names in the checkpoint.

    Returns
    -------
    dict of str to str
        Name in the checkpoint -> name in a checkpoint of the text part alone. What the other parts need is not in it.
    """
    stored, wanted = list(stored), model.state_dict().keys()
    embedding = next(name for name, part in model.named_modules() if part is model.get_input_embeddings())
    base = embedding.rpartition(".")[0] + "."  # base_model_prefix is not always where the decoder is
    within = f"{embedding.removeprefix(base)}.weight"
    prefixes = {name.removesuffix(within) for name in stored if name == within or name.endswith(f".{within}")}
    inside = {name.removeprefix(base) for name in wanted if name.startswith(base)}
    prefix = max(prefixes, key=lambda found: sum(name.removeprefix(found) in inside for name in stored), default=base)
    parts = {name.partition(".")[0] for name in inside}  # "layers", "embed_tokens" ...: beside them may lie a vision tower
    rests = {name: name.removeprefix(prefix) for name in stored if name.startswith(prefix)}
    names = {name: base + rest for name, rest in rests.items() if rest.partition(".")[0] in parts}
    for head in wanted:  # beside the decoder: "lm_head.weight", or the same below a prefix of its own
        if not head.startswith(base):
            names |= {name: head for name in stored if name not in names and (name == head or name.endswith(f".{head}"))}
    return names
