"""What quantization costs: ``python tests/quality.py [MODEL]`` prints the table of `tests/benchmarks/README.md`.

Perplexity of the beginning of Alice's Adventures in Wonderland (Lewis Carroll, 1865; public domain), and the mean
Kullback-Leibler divergence from the unquantized model's next-token distributions to the quantized one's, in nats. Activations
are float32 and the weights unpacked, so that what is seen is the rounding of the weights alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.functional import log_softmax

from airllm_nb import LayeredModel

TEXT = Path(__file__).parent / "texts" / "alice.txt"
QUANTIZATIONS = (None, "int8", "int4-32", "int4", "int4-128")


def distributions(model: str, quantize: str | None, ids: list[int] | None = None) -> tuple[torch.Tensor, list[int]]:
    """Return the log probabilities of each next token, shape (tokens - 1, vocabulary), and the tokens of the text."""
    with LayeredModel.from_pretrained(model, device="cpu", dtype="float32", quantize=quantize) as loaded, torch.no_grad():
        ids = ids or loaded.tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
        return log_softmax(loaded(torch.tensor([ids])).logits[0, :-1].float(), dim=-1), ids


def main(model: str = "demo") -> None:
    """Print a row for each quantization."""
    reference, ids = distributions(model, None)
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
