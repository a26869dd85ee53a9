"""What quantizing takes, and how fast quantized layers decode from memory."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from airllm_nb import LayeredModel
from airllm_nb.bench import machine
from airllm_nb.bench.timing import generate
from airllm_nb.engine.gguf_checkpoint import open_checkpoint
from airllm_nb.engine.packed import Int4, Int8, Packing, multiply
from airllm_nb.engine.packed_cache import PackedCache
from airllm_nb.engine.planning import prepare, short_name
from airllm_nb.engine.rounding import nearest

ROWS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
TIMES = 7


def packed(folder: str, quantize: str, dtype: str) -> PackedCache:
    """Return the packed layers of a checkpoint, there or not."""
    cache = prepare(
        short_name(folder), open_checkpoint(Path(folder)), device="cpu", dtype=dtype, memory="1000TB", kernels="exact",
        shared=False, trust_remote_code=False, quantize=quantize,
    ).packed  # fmt: skip
    assert cache is not None
    return cache


def packs(folder: str, dtype: str, quantize: str) -> dict[str, Any]:
    """Pack a checkpoint's layers anew; gives the input's bytes, the seconds, those of a core, and the memory that it took."""
    torch.nn.functional.linear(torch.ones(32, 64), torch.ones(64, 64))  # what PyTorch sets up once
    cache = packed(folder, quantize, dtype)
    shutil.rmtree(cache.folder, ignore_errors=True)
    layers = [layer.group.nbytes for layer in cache.original.layers]
    before, cores, begin = machine.anonymous(), time.process_time(), time.perf_counter()
    with machine.peak() as most:
        cache.fill()
    return {
        "input": sum(layers), "layer": max(layers), "output": cache.nbytes, "seconds": time.perf_counter() - begin,
        "seconds of a core": time.process_time() - cores, "peak": most() - before, "folder": str(cache.folder),
    }  # fmt: skip


def crossover(folder: str, dtype: str) -> dict[str, Any]:
    """Measure up to how many rows the kernel is faster than unpacking and ``linear``, for the largest matrix of a layer."""
    cache = packed(folder, "int8", dtype)
    layer = cache.original.layers[-1].group
    outputs, inputs = max((weight.shape for weight in layer.weights.values() if len(weight.shape) > 1), key=math.prod)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for packing in (Int8(), Int4()):
            stored = nearest(torch.randn(outputs, inputs), packing)
            times = {rows: _both_ways(packing, stored, (outputs, inputs), rows, getattr(torch, dtype)) for rows in ROWS}
            faster = [rows for rows, (kernel, unpacked) in times.items() if kernel < unpacked]
            found[str(packing)] = {"rows": max(faster, default=0), "taken": packing.most_rows, "seconds": times}
    return found


def _both_ways(
    packing: Packing, stored: torch.Tensor, shape: tuple[int, int], count: int, dtype: torch.dtype
) -> tuple[float, float]:
    """Return the seconds by the kernel, and by unpacking: medians, in turn."""
    rows = torch.randn(count, shape[1]).to(dtype)
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(TIMES + 1):
        for most, kept in zip((count, 0), seconds, strict=True):
            begin = time.perf_counter()
            multiply(packing, rows, stored, shape, most_rows=most)
            kept.append(time.perf_counter() - begin)
    return median(seconds[0][1:]), median(seconds[1][1:])


def decodes(folder: str, dtype: str, tokens: int, quantize: str) -> dict[str, Any]:
    """Generate with everything in memory, after a round that warms up."""
    with LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory="1000TB", quantize=quantize) as ours:
        generate(ours, tokens)
        return {"seconds": generate(ours, tokens)}
