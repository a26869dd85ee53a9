"""What our engine does while it is measured, in a process of its own: ``python -m airllm_nb.bench.sides NAME '{...}'``.

Each function here is one side of a measurement; it returns what JSON can hold, and the process prints that as its last line.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from airllm_nb import LayeredModel, plan
from airllm_nb.bench import machine
from airllm_nb.bench.display import display
from airllm_nb.bench.guesses import guesses
from airllm_nb.bench.machine import BenchError
from airllm_nb.bench.packing import crossover, decodes, packed, packs
from airllm_nb.bench.sharing import sharing
from airllm_nb.bench.timing import generate, plain, read_bytes
from airllm_nb.errors import AirLLMError
from airllm_nb.events import PassEnd

Seconds = list[float]


def fits(
    folder: str, dtype: str, tokens: int, rounds: int, kernels: str = "exact", quantize: str | None = None
) -> dict[str, Any]:
    """Generate with everything in memory, in turn: transformers itself, our engine, our engine with a listener."""
    model = plain(folder, dtype)
    options: dict[str, Any] = {"device": "cpu", "dtype": dtype, "memory": "1000TB", "kernels": kernels, "quantize": quantize}
    with LayeredModel.from_pretrained(folder, **options) as ours:
        found: dict[str, Seconds] = {"plain": [], "ours": [], "listening": []}
        for _ in range(rounds + 1):
            found["plain"] += generate(model, tokens)
            found["ours"] += generate(ours, tokens)
            ours.progress = lambda _: None
            found["listening"] += generate(ours, tokens)
            ours.progress = None
        counted = {name: seconds[tokens:] for name, seconds in found.items()}  # the first round warms up
        return {**counted, "kernels": ours.plan.kernels}


def cold(folder: str, dtype: str) -> dict[str, float]:
    """Load and generate one token, from files that are not in the page cache; then the same token from memory."""
    rate = machine.sequential_rate(Path(folder))
    read, begin = read_bytes(), time.perf_counter()
    with LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory="1000TB") as ours:
        generate(ours, 0)
        first = time.perf_counter() - begin
        read = read_bytes() - read
        passes = []
        for _ in range(3):
            begin = time.perf_counter()
            generate(ours, 0)
            passes.append(time.perf_counter() - begin)
    rates = [rate, machine.sequential_rate(Path(folder))]
    return {"first": first, "read": read, "compute": median(passes), "rate": sum(rates) / 2}


def streams(
    folder: str, dtype: str, tokens: int, memory: str | int = "auto", batch: int = 1, quantize: str | None = None, **options: Any
) -> dict[str, Any]:
    """Generate while layers stream from the disk; also gives the disk's rate, measured before and after in this process.

    `memory` may also be ``"least"``. Packed layers must be there.
    """
    memory = _budget(folder, dtype, memory, quantize)
    read = Path(folder) if quantize is None else packed(folder, quantize, dtype).folder
    rate = machine.sequential_rate(read)
    with LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory=memory, quantize=quantize) as ours:
        reads: list[int] = []

        def note(event: Any) -> None:
            if isinstance(event, PassEnd):
                reads.append(read_bytes())

        ours.progress = note
        seconds = generate(ours, tokens, batch, **options)
        streamed = ours.plan.streamed_nbytes
        layers = [layer.resident for layer in ours.layers]
    rates = [rate, machine.sequential_rate(read)]
    return {
        "seconds": seconds,
        "read": [after - before for before, after in itertools.pairwise(reads)],
        "streamed": streamed,
        "rate": sum(rates) / 2,
        "layers": len(layers),
        "resident": sum(layers),
    }


def peak(folder: str, dtype: str, tokens: int, prompt: int = 32) -> dict[str, int]:
    """Load with the least budget and generate; gives the most memory that this took, page cache left out."""
    torch.nn.functional.linear(torch.ones(32, 64), torch.ones(64, 64))  # what PyTorch sets up once
    planned = plan(folder, device="cpu", dtype=dtype, memory="1000TB")
    before = machine.anonymous()
    with (
        machine.peak() as most,
        LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory=planned.least) as ours,
    ):
        generate(ours, tokens, prompt=prompt)
    return {"peak": most() - before, "least": planned.least, "before": before}


def predicted(folder: str, dtype: str, memory: str | int, tokens: int) -> dict[str, Any]:
    """Predict the seconds per token from headers and a probe, then load and measure them; `memory` may also be ``"least"``."""
    memory = _budget(folder, dtype, memory)
    prediction = plan(folder, device="cpu", dtype=dtype, memory=memory).predict()
    if prediction is None or prediction.seconds is None:
        raise BenchError(f"Nothing is predicted here: {prediction}.", "See %airllm plan for what it predicts.")
    machine.evict(Path(folder))
    with LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory=memory) as ours:
        measured = median(generate(ours, 1 + tokens)[1:])  # the first one warms up
        resident = sum(layer.resident for layer in ours.layers)
    return {"predicted": prediction.seconds, "measured": measured, "words": str(prediction), "resident": resident}


def _budget(folder: str, dtype: str, memory: str | int, quantize: str | None = None) -> str | int:
    if memory != "least":
        return memory
    return plan(folder, device="cpu", dtype=dtype, memory="1000TB", quantize=quantize).least


def main(name: str, options: str) -> Any:
    """Run a side; a failure that has a cause and a remedy is an answer too."""
    try:
        return SIDES[name](**json.loads(options))
    except AirLLMError as error:
        return {"error": [error.cause, error.remedy]}


SIDES: dict[str, Callable[..., Any]] = {
    side.__name__: side for side in (fits, cold, streams, peak, display, guesses, sharing, predicted, packs, decodes, crossover)
}

if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
