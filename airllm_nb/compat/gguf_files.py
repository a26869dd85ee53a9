"""GGUF files as transformers reads them: config, tokenizer, and which tensor becomes which parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from airllm_nb.compat import versions
from airllm_nb.compat.config import first_line, quiet
from airllm_nb.errors import AirLLMError, CheckpointError, UnsupportedError

SINCE = (5, 23)
"""4.57.6 and 5.0.0 find the same weights (Gemma 2: but for last bits), but other tokenizers: of a real file and of each tiny one
they begin every text with a token, or with none, where this version does not, take another end, or ask for more packages."""
ARCHITECTURES = ("gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen3")
"""Compared with transformers' own loading, in `tests/engine/test_gguf.py`. Others may store heads or norms in another way."""


def require_supported() -> None:
    """Refuse a version of transformers, or an environment, that cannot read GGUF files exactly.

    Raises
    ------
    UnsupportedError, AirLLMError
        With the remedy.
    """
    if versions.installed() < SINCE:
        raise UnsupportedError(
            f"GGUF files need transformers {'.'.join(map(str, SINCE))}, and {versions.installed_text()} is installed.",
            "%pip install -U transformers  and restart the kernel, or use the model's safetensors files.",
        )
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise AirLLMError(f"GGUF files need the package gguf: {error}.", '%pip install "airllm_nb[demo]"') from error


def splits() -> frozenset[str]:
    """Return by which names (``tokenizer.ggml.pre``) a file may say how its byte-level tokenizer splits words.

    Of any other, transformers takes GPT-2's way without a word.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return frozenset((*GGUF_PRE_TOKENIZER_SPLITS, *OWN_SPLITS, "gpt-2"))


def foreign_fields(architecture: str) -> frozenset[str]:
    """Return the fields of other architectures that transformers obeys in a file of this one, as if they were its own."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    others = GGUF_CONFIG_MAPPING.keys() - {"general", "tokenizer", architecture}
    return frozenset(f"{other}.{field}" for other in others for field, name in GGUF_CONFIG_MAPPING[other].items() if name)


def _by_digits() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])


OWN_SPLITS: dict[str, Callable[[], Any]] = {"smollm": _by_digits}
"""Those that transformers does not know, and how the published tokenizers of these models have them."""
SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def write_small_files(path: Path, folder: Path, split: str | None, settings: Mapping[str, Any]) -> None:
    """Write the config, the generation config and the tokenizer of a GGUF file as the files of a published model.

    Parameters
    ----------
    path, folder : Path
        The file, and where they are written to.
    split : str or None
        By what name the file says how its tokenizer splits words.
    settings : mapping of str to object
        What the config is to say besides, as `gguf_exact.settings` returns it.

    Raises
    ------
    CheckpointError
        If transformers cannot read them.
    """
    import transformers

    with quiet():
        try:
            options = {"gguf_file": path.name}
            config = transformers.AutoConfig.from_pretrained(path.parent, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
        except Exception as error:  # whatever transformers finds wrong with it
            raise CheckpointError(
                f"The tokenizer or the config of {path.name} cannot be read: {first_line(error)}", "Use the safetensors files."
            ) from error
        _add(config, settings)
        if split in OWN_SPLITS:
            tokenizer.backend_tokenizer.pre_tokenizer = OWN_SPLITS[split]()
        config.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]  # noqa: SLF001
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        generation = transformers.GenerationConfig.from_model_config(config)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(generation, name, None) is None:
                setattr(generation, name, getattr(tokenizer, name, None))
        generation.save_pretrained(folder)


def _add(config: Any, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if name != "rope_parameters":
            setattr(config, name, value)
            continue
        parameters = config.rope_parameters
        parameters.get("full_attention", parameters).update(value)
        if hasattr(config, original := "original_max_position_embeddings") and original in value:
            setattr(config, original, value[original])  # Phi-3 has it beside them, where it counts more


Fix = Callable[[torch.Tensor], torch.Tensor]


def parameters(model: Any, architecture: str) -> dict[str, str]:
    """Return for each name of a tensor in the file the name of the parameter that it becomes.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On meta.
    architecture : str
        As the file names it.
    """
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    found: dict[str, str] = get_gguf_hf_weights_map(_Whole(model), processor(model, architecture))
    return found


class _Whole:
    """A model of which only all parameters are asked, by their full names.

    transformers would also ask each of its modules, and make a table of all layers for each: 62 layers took half a minute. Of
    `ARCHITECTURES` that finds no other name.
    """

    def __init__(self, model: Any) -> None:
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> tuple[()]:
        return ()


def processor(model: Any, architecture: str) -> Any:
    """Return transformers' own object that changes what a file stores in another way than the model has it."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())


def order_of_rows(made_by: Any, name: str, rows: int) -> torch.Tensor | None:
    """Return for each row of a parameter which row of the file's tensor it is; None if they have the same order."""
    given = np.arange(rows, dtype=np.int64).reshape(rows, 1)
    order = torch.from_numpy(made_by.process(weights=given.copy(), name=name).weights.reshape(-1).copy())
    return None if torch.equal(order, torch.arange(rows)) else order


def change_of_vector(made_by: Any, name: str) -> Fix:
    """Return what turns a vector of the file (a norm) into that of the model."""

    def change(vector: torch.Tensor) -> torch.Tensor:
        changed = made_by.process(weights=vector.numpy().copy(), name=name).weights
        return torch.from_numpy(np.ascontiguousarray(changed))

    return change
