"""The rows of the table: what each measures, its goal, and the measurement, which runs in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from airllm_nb.bench import checkpoint, machine
from airllm_nb.bench.machine import BenchError

WHOLE = 0.95
"""Share of its planned bytes that a pass must have read from the disk: below it the page cache helped, and the row is invalid."""
SPARE = 300_000_000
"""Bytes beside the weights that a process may need: row e's limit, after what the imports took."""
Found = tuple[float, dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """How to measure.

    Attributes
    ----------
    root : Path
        Where the checkpoints are, or are made.
    tokens : int
        Tokens that count, of each run.
    shape : str, optional
        One of `checkpoint.SHAPES`, instead of each row's own.
    """

    root: Path
    tokens: int = 5
    shape: str | None = None

    def folder(self, shape: str) -> Path:
        """Return the folder of a checkpoint, made if it is not there."""
        name = self.shape or shape
        return checkpoint.make(self.root / name, checkpoint.SHAPES[name])

    def side(self, name: str, folder: Path, limit: int | None = None, **options: Any) -> dict[str, Any]:
        """Run one of `sides` from a cold page cache, in a process of its own, under a memory limit in bytes."""
        machine.require_quiet()
        machine.evict(folder)
        command = [sys.executable, "-m", "airllm_nb.bench.sides", name, json.dumps({"folder": str(folder), **options})]
        with machine.limited(limit) as enter:
            # The limit has to be there before the process begins, and a cgroup is entered by the process itself.
            done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=enter)
        if done.returncode:
            why = "was killed for want of memory" if done.returncode < 0 else f"failed:\n{done.stderr.strip()[-2000:]}"
            raise BenchError(f"The side {name!r} {why}", "See above for the cause; the other rows do not need this one.")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def streams(self, folder: Path, limit: int | None, **options: Any) -> dict[str, Any]:
        """Run the side that streams, and refuse a result to which the page cache has helped."""
        found = self.side("streams", folder, limit, tokens=self.tokens, **options)
        if median(found["read"]) < WHOLE * found["streamed"]:
            share = median(found["read"]) / found["streamed"]
            raise BenchError(
                f"Only {share:.0%} of the planned bytes came from the disk.", "Run it under a memory limit: as root."
            )
        return found


@dataclass(frozen=True)
class Row:
    """One line of the table: `goal` is the largest (or, if `most`, the smallest) ratio that is wanted."""

    name: str
    what: str
    goal: float
    measure: Callable[[Bench], Found]
    most: bool = False

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
    folder = bench.folder("3b")
    found = bench.streams(folder, _nbytes(folder) // 2, dtype="bfloat16")
    return median(found["read"]) / median(found["seconds"]) / found["rate"], found


def _peak(bench: Bench) -> Found:
    values = {}
    for dtype in ("bfloat16", "float32"):
        free = bench.side("peak", bench.folder("1b"), dtype=dtype, tokens=2)
        bench.side("peak", bench.folder("1b"), free["least"] + free["before"] + SPARE, dtype=dtype, tokens=2)
        values[dtype] = free["peak"] / free["least"]
    return max(values.values()), values


def _wide(bench: Bench) -> Found:
    folder = bench.folder("1b")
    narrow, wide = (bench.streams(folder, _tight(folder), dtype=dtype, memory="least") for dtype in ("bfloat16", "float32"))
    return median(wide["seconds"]) / median(narrow["seconds"]), {"bfloat16": narrow, "float32": wide}


def _batch(bench: Bench) -> Found:
    folder = bench.folder("1b")
    one, many = (bench.streams(folder, _tight(folder), dtype="bfloat16", memory="least", batch=batch) for batch in (1, 16))
    return median(many["seconds"]) / median(one["seconds"]), {"1": one, "16": many}


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in machine.weights(folder))


def _tight(folder: Path) -> int | None:
    """Return a limit under which the page cache cannot hold the checkpoint; none for one that is too small to matter."""
    return max(_nbytes(folder) * 2 // 3, 10**9) if _nbytes(folder) > 10**9 else None


ROWS = {
    row.name: row
    for row in (
        Row("a", "fits in memory: seconds per token over plain transformers", 1.03, _fits),
        Row("b", "first token from a cold disk, over bytes / disk rate + compute", 1.15, _cold),
        Row("c", "twice the memory limit: bytes streamed per second over the disk's rate", 0.95, _half, most=True),
        Row("e", "peak memory of the least budget over that budget", 1.1, _peak),
        Row("f", "float32 from a bfloat16 checkpoint that streams, over bfloat16", 1.1, _wide),
        Row("h", "16 prompts at once, streaming: seconds per pass over one", 1.5, _batch),
    )
}
