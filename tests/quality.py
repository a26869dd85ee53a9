"""What quantization costs: ``python tests/quality.py [MODEL [TEXT]]`` prints the table of `tests/benchmarks/README.md`.

Perplexity of a text file, or of the beginning of Alice's Adventures in Wonderland (Lewis Carroll, 1865; public domain), and the
mean Kullback-Leibler divergence from the unquantized model's next-token distributions to the quantized one's, in nats.
Activations are float32 and the weights unpacked, so that what is seen is the rounding of the weights alone. For comparison, the
same matrices rounded as llama.cpp does it for its Q4_0, in groups of 32 (without its matrix of importances).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from airllm_nb import LayeredModel
from airllm_nb.engine.decoder_layers import find

TEXT = Path(__file__).parent / "texts" / "alice.txt"
LLAMA_CPP = "llama.cpp's Q4_0"
QUANTIZATIONS = (None, "int8", "int4-32", "int4", "int4-128", "int4-gptq", "int4-128-gptq", LLAMA_CPP)


def distributions(
    model: str, quantize: str | None, ids: list[int] | None = None, text: Path = TEXT
) -> tuple[torch.Tensor, list[int]]:
    """Return the log probabilities of each next token, shape (tokens - 1, vocabulary), and the tokens of the text."""
    ours = None if quantize == LLAMA_CPP else quantize
    with LayeredModel.from_pretrained(model, device="cpu", dtype="float32", quantize=ours) as loaded, torch.no_grad():
        ids = ids or loaded.tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
        computing = _as_llama_cpp(loaded.path) if quantize == LLAMA_CPP else loaded
        return log_softmax(computing(torch.tensor([ids])).logits[0, :-1].float(), dim=-1), ids


def _as_llama_cpp(folder: Path) -> Any:
    """Return plain transformers with the linear layers of the decoder layers rounded to Q4_0."""
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    kind = gguf.GGMLQuantizationType.Q4_0
    for layer in find(model).values():
        for module in layer.modules():
            if type(module) is torch.nn.Linear:
                rounded = gguf.dequantize(gguf.quantize(module.weight.detach().numpy(), kind), kind)
                module.weight.data = torch.from_numpy(rounded.copy())
    return model


def main(model: str = "demo", text: str | Path = TEXT) -> None:
    """Print a row for each quantization."""
    reference, ids = distributions(model, None, text=Path(text))
    following = torch.tensor(ids[1:])
    print(f"{model}, {len(ids)} tokens\n\n| quantize | perplexity | over unquantized | KL divergence |\n|---|--:|--:|--:|")
    base = None
    for quantize in QUANTIZATIONS:
        found = reference if quantize is None else distributions(model, quantize, ids)[0]
        perplexity = float(torch.exp(-found.gather(1, following[:, None]).mean()))
        base = base or perplexity
        divergence = float((reference.exp() * (reference - found)).sum(dim=-1).mean())
        print(f"| {quantize or 'no'} | {perplexity:.2f} | {perplexity / base - 1:+.1%} | {divergence:.4f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
