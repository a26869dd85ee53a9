"""The rows of the table: what each measures, its goal, and the measurement, which runs in processes of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from airllm_nb.bench import machine
from airllm_nb.bench.machine import BenchError
from airllm_nb.bench.processes import Bench, KilledError

SPARE = 300_000_000
"""Bytes beside the weights that a process may need: row e's limit, after what the imports took."""
SMALL = 10**9
"""A checkpoint of fewer bytes is not measured under a limit: imports alone would fill it."""
SHARES = (0.75, 0.6, 0.45)
"""Of the limit, what transformers' disk offload may keep of the model: the best of those that survive counts."""
KERNELS = 4
"""Processes that share one checkpoint in row k."""
ANSWER = 40
"""Least tokens of a round in row g: a text, for a run's first pictures come faster than the others."""
REPEATED = 64
"""Tokens of a text that repeats its prompt."""
Found = tuple[float, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One line of the table: `goal` is the largest (or, if `most`, the smallest) value that is wanted."""

    name: str
    what: str
    goal: float
    measure: Callable[[Bench], Found]
    most: bool = False
    unit: str = "ratio"

    def reached(self, value: float) -> bool:
        """Tell whether a value is as good as the goal."""
        return value >= self.goal if self.most else value <= self.goal


def _fits(bench: Bench) -> Found:
    found = bench.side("fits", bench.folder("1b"), dtype="bfloat16", tokens=bench.tokens, rounds=3)
    plain, ours, listening = (median(found[name]) for name in ("plain", "ours", "listening"))
    return max(ours, listening) / plain, {"plain": plain, "ours": ours, "listening": listening}


def _cold(bench: Bench) -> Found:
    found = bench.side("cold", bench.folder("1b"), dtype="bfloat16")
    return found["first"] / (found["read"] / found["rate"] + found["compute"]), found


def _half(bench: Bench) -> Found:
    found = _twice_the_limit(bench)
    return median(found["read"]) / median(found["seconds"]) / found["rate"], found


def _twice_the_limit(bench: Bench) -> dict[str, Any]:
    folder = bench.folder("3b")
    limit = _limit(folder, 1 / 2)
    return bench.streams(folder, limit, dtype="bfloat16", memory="auto" if limit else "least")


def _over_llama_cpp(bench: Bench) -> Found:
    return _over(bench, lambda folder, limit: bench.peer("llama.cpp", folder, limit))


def _over_transformers(bench: Bench) -> Found:
    def attempt(share: float, folder: Path, limit: int | None) -> dict[str, Any] | None:
        with contextlib.suppress(KilledError):
            return bench.peer("transformers", folder, limit, memory=int(share * (limit or _nbytes(folder) / 2)))
        return None

    def best(folder: Path, limit: int | None) -> dict[str, Any]:
        found = [one for share in SHARES if (one := attempt(share, folder, limit))]
        if not found:
            raise KilledError("transformers is killed for want of memory with every setting.", "Leave this row out.")
        return min(found, key=lambda one: median(one["seconds"]))

    return _over(bench, best)


def _over_airllm(bench: Bench) -> Found:
    return _over(bench, lambda folder, limit: bench.peer("AirLLM", folder, limit))


def _over(bench: Bench, measure: Callable[[Path, int | None], dict[str, Any]]) -> Found:
    """Measure the peer first: a peer that is not there costs nothing then."""
    folder = bench.folder("3b")
    peer = measure(folder, _limit(folder, 1 / 2))
    ours = _twice_the_limit(bench)
    return median(ours["seconds"]) / median(peer["seconds"]), {"ours": ours, "peer": peer}


def _peak(bench: Bench) -> Found:
    values = {}
    for dtype in ("bfloat16", "float32"):
        free = bench.side("peak", bench.folder("1b"), dtype=dtype, tokens=2)
        bench.side("peak", bench.folder("1b"), free["least"] + free["before"] + SPARE, dtype=dtype, tokens=2)
        values[dtype] = free["peak"] / free["least"]
    return max(values.values()), values


def _wide(bench: Bench) -> Found:
    folder = bench.folder("1b")
    limit = _limit(folder, 2 / 3)
    narrow, wide = (bench.streams(folder, limit, dtype=dtype, memory="least") for dtype in ("bfloat16", "float32"))
    return median(wide["seconds"]) / median(narrow["seconds"]), {"bfloat16": narrow, "float32": wide}


def _display(bench: Bench) -> Found:
    found = bench.side("display", bench.folder("1b"), dtype="bfloat16", tokens=max(bench.tokens, ANSWER), rounds=4)
    total = {what: sum(seconds) for what, seconds in found.items()}
    serving = total["listener on"] + total["passing on on"] - total["passing on off"]
    ratios = [on / off for on, off in zip(found["run on"], found["run off"], strict=True)]
    return 1 + serving / total["run on"], {"by the clock": median(ratios), **found}


def _batch(bench: Bench) -> Found:
    folder = bench.folder("1b")
    limit = _limit(folder, 2 / 3)
    one, many = (bench.streams(folder, limit, dtype="bfloat16", memory="least", batch=batch) for batch in (1, 16))
    return median(many["seconds"]) / median(one["seconds"]), {"1": one, "16": many}


def _guesses(bench: Bench) -> Found:
    if bench.shape:
        folder = bench.folder(bench.shape)
    else:  # random weights repeat nothing
        from airllm_nb.demo import demo_path

        folder = demo_path()
    found = bench.side("guesses", folder, tokens=REPEATED)
    return min(way["tokens per pass"] for dtype in found.values() for way in dtype.values()), found


def _kernels(bench: Bench) -> Found:
    found = bench.side("fits", bench.folder("3b"), dtype="bfloat16", tokens=bench.tokens, rounds=3, kernels="measured")
    plain, ours = median(found["plain"]), median(found["ours"])
    return ours / plain, {"plain": plain, "ours": ours, "kernels": found["kernels"]}


def _sharing(bench: Bench) -> Found:
    found = bench.side("sharing", bench.folder("1b"), dtype="bfloat16", processes=KERNELS)
    one, all_of_them = (sum(found[key].values()) for key in ("one", "all"))
    return all_of_them / one, found


def _prediction(bench: Bench) -> Found:
    half = bench.folder("3b")
    limit = _limit(half, 1 / 2)
    cases = {
        "resident": bench.side("predicted", bench.folder("1b"), dtype="bfloat16", memory="1000TB", tokens=bench.tokens),
        "streaming": bench.side(
            "predicted", half, limit, dtype="bfloat16", memory="auto" if limit else "least", tokens=bench.tokens
        ),
    }
    ratios = [case["predicted"] / case["measured"] for case in cases.values()]
    return max(max(ratio, 1 / ratio) for ratio in ratios), cases


def _int4_over_llama_cpp(bench: Bench) -> Found:
    folder = bench.folder("3b")
    peer = bench.peer("llama.cpp Q4_0", folder, None)
    bench.packed(folder, "int4+head")  # llama.cpp quantizes the head as well
    ours = bench.side("decodes", folder, dtype="bfloat16", tokens=bench.tokens, quantize="int4+head")
    return median(ours["seconds"]) / median(peer["seconds"]), {"ours": ours, "peer": peer}


def _int4_over_bfloat16(bench: Bench) -> Found:
    folder = bench.folder("3b")
    bench.packed(folder, "int4")
    found = bench.side("fits", folder, dtype="bfloat16", tokens=bench.tokens, rounds=3, quantize="int4")
    plain, ours = median(found["plain"]), median(found["ours"])
    return ours / plain, {"plain": plain, "ours": ours}


def _int4_stays(bench: Bench) -> Found:
    found = _quantized_under_half(bench, "int4")
    return sum(found["read"]) / len(found["read"]) / found["packed"]["output"], found


def _int8_streams(bench: Bench) -> Found:
    found = _quantized_under_half(bench, "int8")
    if not found["streamed"]:
        raise BenchError("All of int8 stays in memory within this limit.", "Leave this row out.")
    return median(found["read"]) / median(found["seconds"]) / found["rate"], found


def _quantized_under_half(bench: Bench, quantize: str) -> dict[str, Any]:
    folder = bench.folder("3b")
    packed = bench.packed(folder, quantize)
    limit = _limit(folder, 1 / 2)
    found = bench.streams(folder, limit, dtype="bfloat16", memory="auto" if limit else "least", quantize=quantize)
    return {**found, "packed": packed}


def _packing(bench: Bench) -> Found:
    found = {name: bench.packed(bench.folder("3b"), name) for name in ("int4", "int8")}
    return min(one["input"] / 1e6 / one["seconds of a core"] for one in found.values()), found


def _packing_peak(bench: Bench) -> Found:
    found = {name: bench.packed(bench.folder("3b"), name) for name in ("int4", "int8")}
    return max(one["peak"] / one["layer"] for one in found.values()), found


def _crossover(bench: Bench) -> Found:
    """Tell how far the rows that take the kernel are from those that should: what is between computes too slowly."""
    found = bench.side("crossover", bench.folder("3b"), dtype="bfloat16")
    ratios = [max(one["rows"], 1) / one["taken"] for one in found.values()]
    return max(max(ratio, 1 / ratio) for ratio in ratios), found


def _gguf(bench: Bench) -> Found:
    """Take the faster of the GGUF file as it is, and after one conversion."""
    folder = bench.folder("3b")
    file = bench.written("llama.cpp Q4_0", folder)
    limit = _limit(folder, 1 / 2)
    bench.packed(folder, "int4")
    bench.packed(file, "int4-32")
    options = {"dtype": "bfloat16", "memory": "least"}
    found = {
        "int4": bench.streams(folder, limit, **options, quantize="int4"),
        "GGUF": bench.streams(file, limit, **options),
        "GGUF, int4-32": bench.streams(file, limit, **options, quantize="int4-32"),
    }
    seconds = {name: median(one["seconds"]) for name, one in found.items()}
    return min(seconds["GGUF"], seconds["GGUF, int4-32"]) / seconds["int4"], found


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in machine.weights(folder))


def _limit(folder: Path, share: float) -> int | None:
    """Return that share of a checkpoint as a memory limit, in which imports have room too; None for one that is `SMALL`."""
    return max(int(_nbytes(folder) * share), SMALL) if _nbytes(folder) > SMALL else None


ROWS = {
    row.name: row
    for row in (
        Row("a", "fits in memory: seconds per token over plain transformers", 1.03, _fits),
        Row("b", "first token from a cold disk, over bytes / disk rate + compute", 1.15, _cold),
        Row("c", "twice the memory limit: bytes streamed per second over the disk's rate", 0.95, _half, most=True),
        Row("d-llama.cpp", "twice the memory limit: seconds per token over llama.cpp f16, mmap", 0.45, _over_llama_cpp),
        Row("d-transformers", "the same over transformers' disk offload", 0.42, _over_transformers),
        Row("d-airllm", "the same over AirLLM", 0.17, _over_airllm),
        Row("e", "peak memory of the least budget over that budget", 1.1, _peak),
        Row("f", "float32 from a bfloat16 checkpoint that streams, over bfloat16", 1.1, _wide),
        Row("g", "run and all processor seconds that serve its display, in a kernel, over the run", 1.01, _display),
        Row("h", "16 prompts at once, streaming: seconds per pass over one", 1.5, _batch),
        Row("i", "prompt lookup and a draft model, streaming: tokens per pass", 2, _guesses, most=True, unit="tokens per pass"),
        Row("j", "one row, bfloat16, measured kernels: seconds per token over plain transformers", 0.75, _kernels),
        Row("k", f"{KERNELS} kernels that share a checkpoint: memory of the weights over one kernel's", 1.1, _sharing),
        Row(
            "q-llama.cpp", "int4 with its head, fits in memory: seconds per token over llama.cpp Q4_0", 0.8, _int4_over_llama_cpp
        ),
        Row(
            "q-bfloat16", "int4, fits in memory: seconds per token over plain transformers in bfloat16", 0.5, _int4_over_bfloat16
        ),
        Row("q-int4", "int4, bfloat16 twice the memory limit: bytes read per token over its size", 0.001, _int4_stays),
        Row(
            "q-int8",
            "int8, bfloat16 twice the memory limit: bytes streamed per second over the disk's rate",
            0.95,
            _int8_streams,
            most=True,
        ),
        Row("q-packing", "quantizing: MB of bfloat16 per second of a core", 150, _packing, most=True, unit="MB/s"),
        Row("q-peak", "quantizing: memory that it takes over the largest layer", 3, _packing_peak),
        Row(
            "q-rows",
            "rows up to which the kernel is faster than unpacking over those that take it, or the inverse",
            2,
            _crossover,
        ),
        Row("q-gguf", "GGUF Q4_0, streaming, itself or quantized once: seconds per token over int4", 1.3, _gguf),
        Row("p", "seconds per token predicted over measured, or the inverse", 1.3, _prediction),
    )
}


def named(name: str) -> list[Row]:
    """Return the rows that a name stands for: its own, or ``d`` for all whose names begin with ``d-``."""
    return [row for row in ROWS.values() if name in (row.name, row.name.partition("-")[0])]
