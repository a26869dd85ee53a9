"""How every type of transformers' causal language models fares with the layered engine, compared with ``from_pretrained``."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import budgets
from tiny_any import VOCABULARY, make_any
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from airllm_nb import LayeredModel, plan
from airllm_nb.compat import config as compat_config
from airllm_nb.compat import versions
from airllm_nb.errors import AirLLMError

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
DTYPE = "dtype" if versions.installed() >= (5,) else "torch_dtype"

EXACT = "exact"
REFUSED = "refused, as from_pretrained does"  # on older versions: transformers itself fails, in whatever way
NOT_TINY = "not tiny-able"
ONLY_HERE = "refused, though from_pretrained works"

NEWEST = (5, 23)
"""The version of transformers that the two tables below speak of."""

NOT_EXACT = {
    "gemma3n": (NOT_TINY, "its vision tower is a model of timm, which the tests do not install"),
    "gemma4_assistant": (
        NOT_TINY,
        "its config demands that all layers share keys, which Gemma4TextConfig.kv_sharing_modes refuses",
    ),
    "gemma4_unified_assistant": (NOT_TINY, "as gemma4_assistant, by Gemma4UnifiedTextConfig.kv_sharing_modes"),
    "musicgen": (
        REFUSED,
        "MusicgenForCausalLM takes a MusicgenDecoderConfig, and AutoModelForCausalLM gives it the whole config",
    ),
    "musicgen_melody": (REFUSED, "as musicgen"),
}
ONLY_LOGITS = {"reformer": "its own generate fails: the cache that it is handed is not one of its own"}
HEAD_BIAS = (
    "bert-generation", "camembert", "data2vec-text", "reformer", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
)  # fmt: skip
WINDOWED = ("got_ocr2", "qwen2", "qwen3")
FAULTY = (
    dict.fromkeys(HEAD_BIAS, ((4, 43), (4, 51)))
    | dict.fromkeys(WINDOWED, ((4, 49), (4, 53)))
    | {"recurrent_gemma": ((5, 0), (5, 1))}
)
"""From and below which version a type's ``from_pretrained`` is no reference: it zeroes the bias of the head, obeys a window that
is switched off, or leaves a rotary buffer uninitialised, without a word."""


ANSWER = "answer.bin"  # no .safetensors, or the checkpoint would seem to have one more file
CLOSE = 1e-4  # float32 logits of about 10: versions add up in different orders


class Answer(NamedTuple):
    """What a model says: logits, and the tokens of greedy decoding; None where transformers itself cannot generate."""

    logits: torch.Tensor
    tokens: torch.Tensor | None


def walk(model_type: str, folder: Path) -> str:
    """Return how a type fares; raises AssertionError if anything is wrong."""
    try:
        make_any(folder, model_type)
    except Exception:  # noqa: BLE001  # whatever transformers' own code raises
        return NOT_TINY
    since, below = FAULTY.get(model_type, (NEWEST, NEWEST))
    if since <= versions.installed() < below:
        return REFUSED
    try:
        expected = _reference(folder)
    except Exception:  # noqa: BLE001  # whatever transformers' own code raises
        return _without_reference(folder)
    try:
        sizes = budgets(plan(folder, device="cpu", dtype="float32"))
        answers = {keep: _layered(folder, sizes[keep], generate=expected.tokens is not None) for keep in ("all", "none")}
    except AirLLMError:
        return ONLY_HERE
    for keep, answer in answers.items():
        assert torch.equal(answer.logits, expected.logits), keep
        assert expected.tokens is None or torch.equal(answer.tokens, expected.tokens), keep
    assert versions.installed() < NEWEST or (expected.tokens is None) == (model_type in ONLY_LOGITS)
    return EXACT


def answer(model_type: str, folder: Path) -> None:
    """Make a type's checkpoint, and beside it what ``from_pretrained`` answers; nothing where it is not made or not answered."""
    try:
        make_any(folder, model_type)
        expected = _reference(folder)
    except Exception:  # noqa: BLE001  # whatever transformers' own code raises: the walk of this version says why
        return
    tensors = {name: tensor.contiguous() for name, tensor in expected._asdict().items() if tensor is not None}
    save_file(tensors, folder / ANSWER)


def on_older_version(folder: Path) -> str:
    """Return how the installed version fares with a checkpoint that the newest one made; raises AssertionError if it is wrong."""
    expected = load_file(folder / ANSWER)
    try:
        with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
            found = _ask(model, generate="tokens" in expected and takes_mask(model))
    except AirLLMError:
        return "refused"
    assert torch.allclose(found.logits, expected["logits"], rtol=0, atol=CLOSE), (found.logits - expected["logits"]).abs().max()
    assert found.tokens is None or torch.equal(found.tokens, expected["tokens"])
    return EXACT


def takes_mask(model: Any) -> bool:
    """Tell whether a model's ``generate`` takes an attention mask: Mamba's did not in the beginning."""
    return "attention_mask" in inspect.signature(type(model._hf).forward).parameters


def _without_reference(folder: Path) -> str:
    """Return `REFUSED`, after making sure that the engine refuses where the newest transformers does."""
    try:
        answer = _layered(folder, plan(folder, device="cpu", dtype="float32").least, generate=False)
    except AirLLMError:
        return REFUSED
    except Exception:  # noqa: BLE001  # the model's own forward, as in transformers
        answer = None
    assert versions.installed() < NEWEST, answer
    return REFUSED


def _reference(folder: Path) -> Answer:
    attention = compat_config.attention(transformers.AutoConfig.from_pretrained(folder))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **{DTYPE: torch.float32}, **attention
    )
    assert not report["missing_keys"]  # these would be random
    answer = _ask(model.eval(), generate=False)
    assert answer.logits.isfinite().all()
    try:
        return _ask(model, generate=True)
    except Exception:  # noqa: BLE001  # whatever transformers' own code raises
        return answer


def _layered(folder: Path, memory: int, *, generate: bool) -> Answer:
    with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32", memory=memory) as model:
        assert any(layer.nbytes for layer in model.layers)
        return _ask(model, generate=generate)


def _ask(model: Any, *, generate: bool) -> Answer:
    ids = torch.randint(3, VOCABULARY - 10, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return Answer(logits, model.generate(ids, **options) if generate else None)


if __name__ == "__main__":
    for name in TYPES:
        answer(name, Path(sys.argv[1]) / name)
