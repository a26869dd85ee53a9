"""Which transformers is installed, what each model and feature needs of it, and the message when it is too old.

The table below is what the guards refuse by, what the tests check in real environments of `TESTED`, and what the README shows.
It was measured: logits and greedy tokens of tiny checkpoints of every family, on 37 versions from 4.43.0 on, against the newest.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airllm_nb.errors import UnsupportedError

Version = tuple[int, ...]
Raw = dict[str, Any]

FLOOR: Version = (4, 43)
"""The oldest version that reads Llama-3.1's rope_scaling."""
CEILING: Version = (6,)
"""The first version that nothing is known of: what it would compute is a guess, and so it is refused."""
MAPS_FILES: Version = (4, 51)
"""The first version whose ``from_pretrained`` always computes with weights where they lie in the mapped file, not with copies."""
TESTED = ("4.43.4", "4.51.3", "4.57.6", "5.0.0", "5.23.0")
"""The versions of which every test run has a real environment."""
MEASURED = Path(__file__).with_name("measured.json")
"""How wrong plain transformers is in each of them: what ``tests/matrix.py --measure`` found, by version and case."""


@dataclass(frozen=True)
class Need:
    """Something in a checkpoint that some versions of transformers lack or compute wrongly without a word.

    Attributes
    ----------
    what : str
        Its name, for people.
    exact : Version
        The first version from which on it is exact.
    concerns : callable
        Tells from a ``config.json`` (of the language model, with classic names) whether the checkpoint has it.
    refused : Version
        Versions from this one up to `exact` are refused; older ones are exact again (or refused for another reason).
    lacking : bool
        True if older versions do not have it at all, or have it and fail; False if they would compute something else.
    """

    what: str
    exact: Version
    concerns: Callable[[Raw], Any]
    refused: Version = (0,)
    lacking: bool = False

    def met(self, version: Version) -> bool:
        """Tell whether a version is exact."""
        return not self.refused <= version < self.exact

    def error(self, version: Version) -> UnsupportedError:
        """Return the refusal of a version that is not exact."""
        name = f"transformers {dotted(version)}"
        if self.lacking:
            return UnsupportedError(f"{name} cannot compute {self.what} exactly.", upgrade(dotted(self.exact)))
        return UnsupportedError(f"{name} would silently compute {self.what} wrongly.", upgrade(dotted(self.exact)))


def _family(what: str, exact: Version, *types: str) -> Need:
    return Need(what, exact, lambda raw: raw.get("model_type") in types, lacking=True)


def _kind(raw: Raw, *types: str) -> bool:
    return raw.get("model_type") in types


def _rope_type(raw: Raw) -> str | None:
    return rope_type(raw.get("rope_scaling"))


def rope_type(scaling: Any) -> str | None:
    """Return the kind of a rotary embedding's scaling; None if there is none."""
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else None
    return None if kind == "default" else kind


def _slides(raw: Raw) -> bool:
    """Tell whether a sliding window is narrower than the context."""
    window, context = raw.get("sliding_window"), raw.get("max_position_embeddings")
    return isinstance(window, int) and not (isinstance(context, int) and window >= context)


def _slides_in_part(raw: Raw) -> bool:
    """Tell whether Qwen's upper layers use a sliding window."""
    return bool(raw.get("use_sliding_window")) and _slides({"sliding_window": 4096} | raw)  # its default


def _partial(raw: Raw) -> bool:
    return raw.get("partial_rotary_factor", 1) not in (1, 1.0, None)


def _wide_heads(raw: Raw) -> bool:
    """Tell whether heads times their width is not the model's width."""
    width, heads, size = raw.get("head_dim"), raw.get("num_attention_heads"), raw.get("hidden_size")
    return bool(width and heads and size and width * heads != size)


def _own_stretch(raw: Raw) -> Any:
    """Tell whether longrope is stretched by something else than the ratio of the two contexts."""
    scaling = raw.get("rope_scaling") or {}
    if _rope_type(raw) not in ("longrope", "su"):
        return False
    if _kind(raw, "phi3"):  # never reads them
        return scaling.get("factor") or scaling.get("attention_factor")
    context, original = raw.get("max_position_embeddings"), raw.get("original_max_position_embeddings")
    return scaling.get("factor") and context and original and scaling["factor"] != context / original


def one_in(count: int, period: int) -> list[str]:
    """Return ``layer_types`` of `count` layers, of which the last of each `period` has full attention."""
    return ["sliding_attention" if (index + 1) % period else "full_attention" for index in range(count)]


def _unusual_order(raw: Raw) -> bool:
    """Tell whether ``layer_types`` says something else than versions assume that do not read it."""
    types, period = raw.get("layer_types"), raw.get("sliding_window_pattern")
    if not isinstance(types, list):
        return False
    if _kind(raw, *PATTERNED):
        return not isinstance(period, int) or period < 1 or types != one_in(len(types), period)
    return _kind(raw, "gemma2") and types != one_in(len(types), 2)


PATTERNED = ("cohere2", "gemma3_text")
"""Types that had a sliding_window_pattern before they had layer_types."""
WINDOWLESS = ("llama", "gemma", "granite", "cohere", "olmo2", "glm")
"""Types without sliding windows, whose KV cache obeys a stray one in newer versions."""
FAMILIES = (
    _family("Llama, InternLM (as Llama), Yi, SmolLM", FLOOR, "llama"),
    _family("Llama 4 (text)", (4, 53), "llama4_text", "llama4"),
    _family("Qwen2, Qwen2-MoE", FLOOR, "qwen2", "qwen2_moe"),
    _family("Qwen3, Qwen3-MoE", (4, 51), "qwen3", "qwen3_moe"),
    _family("Qwen3-Next", (4, 57), "qwen3_next"),
    _family("Qwen3.5, Qwen3.5-MoE", (5, 2), "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe"),
    _family("Mistral, Mixtral", FLOOR, "mistral", "mixtral"),
    _family("Gemma", FLOOR, "gemma"),
    _family("Gemma 2", (4, 51, 3), "gemma2"),
    _family("Gemma 3 (text)", (4, 51, 3), "gemma3_text", "gemma3"),
    _family("Phi, Phi-3", FLOOR, "phi", "phi3"),
    _family("GPT-2, GPT-NeoX", FLOOR, "gpt2", "gpt_neox"),
    _family("DeepSeek-V2", (4, 55), "deepseek_v2"),
    _family("DeepSeek-V3", (4, 51), "deepseek_v3"),
    _family("gpt-oss", (4, 55), "gpt_oss"),
    _family("GLM", (4, 48), "glm"),
    _family("GLM-4", (4, 51), "glm4"),
    _family("GLM-4.5 (MoE)", (4, 55), "glm4_moe"),
    _family("OLMo 2", (4, 48), "olmo2"),
    _family("OLMo 3", (4, 57), "olmo3"),
    _family("Granite", (4, 45), "granite"),
    _family("Cohere (Command R)", FLOOR, "cohere"),
    _family("Cohere 2 (Command R7B)", (4, 51, 3), "cohere2"),
    _family("Falcon", FLOOR, "falcon"),
    _family("StarCoder2, StableLM", FLOOR, "starcoder2", "stablelm"),
    _family("SmolLM3", (4, 53), "smollm3"),
    _family("InternLM3", (5, 23), "internlm3"),
)
OTHERS = (
    _family("Apertus", (5, 2), "apertus"),
    _family("BLT", (5, 23), "blt"),
    _family("Doge", (5, 18), "doge"),
    _family("ModernBERT decoder, Reformer, XLM-RoBERTa-XL", (5, 0), "modernbert-decoder", "reformer", "xlm-roberta-xl"),
    _family("Moshi, xLSTM", (5, 2), "moshi", "xlstm"),
    _family("MVP", (4, 45), "mvp"),
    _family("RecurrentGemma", (5, 18), "recurrent_gemma"),
    _family("RoBERTa, BERT generation, CamemBERT, data2vec, X-MOD", (4, 47), "roberta", "roberta-prelayernorm", "xlm-roberta",
            "xmod", "bert-generation", "camembert", "data2vec-text"),
)  # fmt: skip
"""Rarer ones that some versions in the tested range compute wrongly; all others are as exact as they are new."""
FEATURES = (
    Need("a scaled rotary embedding of Llama", (4, 43, 4), lambda raw: _kind(raw, "llama") and _rope_type(raw), lacking=True),
    Need("a scaled rotary embedding of Qwen2", (4, 45), lambda raw: _kind(raw, "qwen2", "qwen2_moe") and _rope_type(raw)),
    Need("yarn's rotary embedding outside of Llama", (4, 51), lambda raw: not _kind(raw, "llama") and _rope_type(raw) == "yarn"),
    Need("a dynamic rotary embedding after a longer text", (5, 14), lambda raw: _rope_type(raw) == "dynamic", (5, 0)),
    Need("a dynamic rotary embedding outside of Llama", (4, 45),
         lambda raw: not _kind(raw, "llama") and _rope_type(raw) == "dynamic"),
    Need("longrope outside of Phi-3", (4, 51), lambda raw: not _kind(raw, "phi3") and _rope_type(raw) == "longrope"),
    Need("longrope with a factor of its own", (5, 0), _own_stretch),
    Need("Gemma 3's attention in both directions", (4, 57),
         lambda raw: _kind(raw, "gemma3_text") and raw.get("use_bidirectional_attention")),
    Need("yarn of DeepSeek-V3", (4, 56), lambda raw: _kind(raw, "deepseek_v3") and _rope_type(raw) == "yarn"),
    Need("yarn of DeepSeek-V2", (5, 20), lambda raw: _kind(raw, "deepseek_v2") and _rope_type(raw) == "yarn"),
    Need("the scaled rotary embedding of OLMo 3", (5, 14), lambda raw: _kind(raw, "olmo3") and _rope_type(raw), (5, 0)),
    Need("the partial rotary embedding of Phi-4-mini", (4, 51), lambda raw: _kind(raw, "phi3") and _partial(raw)),
    Need("the bias of Phi's head", (4, 48, 3), lambda raw: _kind(raw, "phi"), (4, 48)),
    Need("heads of Llama and Mistral wider than hidden_size / heads", (4, 45),
         lambda raw: _kind(raw, "llama", "mistral") and _wide_heads(raw)),
    Need("sliding windows of Phi-3 and StarCoder2", (4, 48), lambda raw: _kind(raw, "phi3", "starcoder2") and _slides(raw)),
    Need("sliding windows of Qwen2 and Qwen3", (4, 53),
         lambda raw: _kind(raw, "qwen2", "qwen3", "qwen3_moe") and _slides_in_part(raw)),
    Need("sliding windows of Qwen2-MoE", (5, 0), lambda raw: _kind(raw, "qwen2_moe") and _slides_in_part(raw)),
    Need("an unusual order of layer_types", (4, 53), _unusual_order),
    Need("a sliding_window of a model that has none", (4, 56, 2), lambda raw: _kind(raw, *WINDOWLESS) and _slides(raw)),
    Need("the experts in groups of DeepSeek-V2", (5, 14), lambda raw: raw.get("topk_method") == "group_limited_greedy", (5, 0),
         lacking=True),
    Need("the norm in groups of Mamba 2", (5, 23), lambda raw: _kind(raw, "mamba2") and raw.get("n_groups", 8) != 1),
    Need("Bamba", (5, 16), lambda raw: _kind(raw, "bamba"), (5, 0)),
    Need("the attention of Llama 4", (4, 56, 2), lambda raw: _kind(raw, "llama4_text"), (4, 53)),
)  # fmt: skip


def parse(text: str) -> Version:
    """Return ``(5, 24, 0)`` for ``"5.24.0.dev0"``: a pre-release or post-release counts as its release."""
    numbers = re.match(r"\d+(\.\d+){0,2}", text)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


TABLE = (*FAMILIES, *OTHERS, *FEATURES)


def installed() -> Version:
    """Return the installed version of transformers, for example ``(4, 57, 6)``, without importing it; ``()`` if there is none."""
    return parse(version_of("transformers") or "")


def installed_text() -> str:
    """Return ``"transformers 4.57.6"``."""
    return f"transformers {version_of('transformers')}"


def version_of(package: str) -> str | None:
    """Return the version of an installed package, without importing it; None if there is none."""
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    # Its own `version` parses the whole README for 3 milliseconds, and a load asks some 16 times.
    line = re.search(r"^Version: *(\S+)", found.read_text("METADATA") or "", re.MULTILINE)
    return line[1] if line else found.version


def dotted(version: Version) -> str:
    """Return ``"4.51"`` for ``(4, 51)``."""
    return ".".join(map(str, version))


def upgrade(minimum: str) -> str:
    """Return the remedy that installs at least `minimum`, for example ``"4.51"``."""
    return f'Run  %pip install -U "transformers>={minimum}"  and restart the kernel.'


def problem() -> UnsupportedError | None:
    """Return what keeps every model from running: no transformers, one out of range, or another in memory than on disk."""
    floor, ceiling = dotted(FLOOR), dotted(CEILING)
    if not (version := installed()):
        return UnsupportedError(f"transformers is not installed: airllm_nb needs {floor} or newer.", upgrade(floor))
    # After `%pip install` in a running kernel the guards would speak of one version, and another one would compute.
    in_memory = getattr(sys.modules.get("transformers"), "__version__", None)
    if in_memory not in (None, version_of("transformers")):
        return UnsupportedError(
            f"transformers {in_memory} is in memory, and {version_of('transformers')} has been installed since.",
            "Restart the kernel.",
        )
    if version < FLOOR:
        return UnsupportedError(f"{installed_text()} is too old: airllm_nb needs {floor} or newer.", upgrade(floor))
    if version >= CEILING:
        return UnsupportedError(
            f"{installed_text()} is too new: airllm_nb is tested up to {TESTED[-1]} and needs a version below {ceiling}.",
            f'Run  %pip install "transformers>={floor},<{ceiling}"  and restart the kernel, or update airllm_nb.',
        )
    return None


def require_supported() -> None:
    """Refuse a transformers that no model can run on.

    Raises
    ------
    UnsupportedError
        Names the installed version, the one needed, and the command that installs it.
    """
    if (found := problem()) is not None:
        raise found


def unmet(raw: Raw, version: Version) -> Iterator[Need]:
    """Yield what a checkpoint needs and a version of transformers does not give.

    Parameters
    ----------
    raw : dict
        ``config.json`` of the language model, with classic names (see `airllm_nb.compat.classic`).
    version : Version
        The version in question.
    """
    return (need for need in TABLE if not need.met(version) and need.concerns(raw))
