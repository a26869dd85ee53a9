"""Seconds per token, predicted by a plan and then measured: ``python tests/benchmarks/prediction.py FOLDER DTYPE MEMORY ...``.

Evict the files from the page cache before, and let nothing else compute. Under a memory limit, MEMORY is ``auto``.
"""

import statistics
import sys
import time

import torch

from airllm_nb import LayeredModel, plan


def predicted_and_measured(folder, dtype, memory, tokens=6):
    """Return a row: what was asked, layers that stay, seconds predicted and measured, their ratio, the prediction in words.

    What is measured is the median of `tokens` passes over one token, after a prompt of 8 and one pass to warm up.
    """
    predicted = plan(folder, device="cpu", dtype=dtype, memory=memory).predict()
    with LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory=memory) as model:
        past = model(torch.ones(1, 8, dtype=torch.long), use_cache=True).past_key_values
        seconds = []
        for _ in range(1 + tokens):
            begin = time.perf_counter()
            past = model(torch.ones(1, 1, dtype=torch.long), past_key_values=past, use_cache=True).past_key_values
            seconds.append(time.perf_counter() - begin)
        layers = f"{sum(layer.resident for layer in model.layers)} of {len(model.layers)}"
    measured = statistics.median(seconds[1:])
    return {
        "model": folder, "dtype": dtype, "memory": memory, "layers that stay": layers, "predicted": predicted.seconds,
        "measured": measured, "ratio": predicted.seconds and predicted.seconds / measured, "words": str(predicted),
    }  # fmt: skip


def main(arguments):
    """Print a row for each model, dtype and memory."""
    for folder, dtype, memory in zip(*[iter(arguments)] * 3, strict=True):
        row = predicted_and_measured(folder, dtype, memory)
        print(" | ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
