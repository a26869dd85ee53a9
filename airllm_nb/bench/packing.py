"""What quantizing takes, and how fast quantized layers decode from memory."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from airllm_nb import LayeredModel
from airllm_nb.bench import machine
from airllm_nb.bench.timing import generate
from airllm_nb.engine.gguf_checkpoint import open_checkpoint
from airllm_nb.engine.packed_cache import PackedCache
from airllm_nb.engine.planning import prepare, short_name


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


def decodes(folder: str, dtype: str, tokens: int, quantize: str) -> dict[str, Any]:
    """Generate with everything in memory, after a round that warms up."""
    with LayeredModel.from_pretrained(folder, device="cpu", dtype=dtype, memory="1000TB", quantize=quantize) as ours:
        generate(ours, tokens)
        return {"seconds": generate(ours, tokens)}
