"""How wrong plain transformers is, by version: the numbers behind the picture in the notebook about versions.

`python tests/matrix.py --measure` runs this in the environment of each version and writes the file; the tests of every version
check that it still holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import families
import torch
import transformers
from safetensors.torch import load_file

from airllm_nb import LayeredModel
from airllm_nb.compat import versions
from airllm_nb.errors import UnsupportedError

CASES = {
    "Llama 3.1, config.json written by transformers 5": ("llama3-rope", "v5"),
    "Llama stretched by yarn": ("llama-yarn", "classic"),
    "Qwen2 stretched by yarn, as its README says": ("qwen2-yarn-factor", "classic"),
    "Gemma 2 (soft-capping)": ("gemma2", "classic"),
}


def measure(answers: Path) -> dict[str, dict[str, float | str | None]]:
    """Return for each case the largest logit error of plain transformers (None if it fails), and what airllm_nb does."""
    return {title: _case(answers / name, style) for title, (name, style) in CASES.items()}


def _case(folder: Path, style: str) -> dict[str, float | str | None]:
    expected = load_file(folder / "expected.safetensors")
    return {"transformers": _plain(folder / style, expected), "airllm_nb": _ours(folder / style, expected)}


def _plain(folder: Path, expected: dict[str, torch.Tensor]) -> float | None:
    dtype = "dtype" if versions.installed() >= (5,) else "torch_dtype"
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **{dtype: torch.float32}).eval()
        return _error(model, expected)
    except (ValueError, RuntimeError, TypeError, KeyError):  # what the versions raise that know the model only in part
        return None


def _ours(folder: Path, expected: dict[str, torch.Tensor]) -> float | str:
    try:
        with LayeredModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
            return _error(model, expected)
    except UnsupportedError:
        return "refused"


def _error(model, expected: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        errors = [(model(families.prompt(kind)).logits - expected[f"{kind}.logits"]).abs().max() for kind in families.PROMPTS]
    return round(max(errors).item(), 4)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
