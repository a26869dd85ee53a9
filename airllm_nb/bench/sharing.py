"""Row k: how much memory the weights take when several processes share one checkpoint.

``python -m airllm_nb.bench.sharing FOLDER DTYPE`` is one of these processes: it loads, generates, says so, and then answers every
line that it is given with what the weights occupy in it, until there are no more lines.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from airllm_nb import LayeredModel
from airllm_nb.bench.checkpoint import SHAPES, make
from airllm_nb.bench.timing import generate

Occupied = dict[str, int]


def sharing(folder: str, dtype: str, processes: int) -> dict[str, Occupied]:
    """Return what the weights occupy in one process that is alone, and in all processes together once all have generated."""
    with contextlib.ExitStack() as running:
        first = running.enter_context(_kernel(folder, dtype))
        one = _ask(first)
        kernels = [first, *(running.enter_context(_kernel(folder, dtype)) for _ in range(processes - 1))]
        return {"one": one, "all": dict(sum((Counter(_ask(kernel)) for kernel in kernels), Counter()))}


@contextlib.contextmanager
def _kernel(folder: str, dtype: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "airllm_nb.bench.sharing", folder, dtype]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        _line(process)
        yield process  # at the end, its input is closed, and it ends


def _ask(process: subprocess.Popen[str]) -> Occupied:
    assert process.stdin is not None
    print(file=process.stdin, flush=True)
    found: Occupied = json.loads(_line(process))
    return found


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    if not (line := process.stdout.readline()):
        raise RuntimeError("a process that shares the checkpoint has ended")
    return line


def _occupied(folder: Path) -> Occupied:
    """Return bytes: this process's part of what is mapped from a folder's files, and all that is its own.

    A page of a file that n processes have mapped counts 1/n in each: Pss in ``/proc/self/smaps``.
    """
    found = {"mapped": 0, "own": 0}
    mapped = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        key, *values = line.split()
        if not key.endswith(":"):  # the line that begins a mapping ends with its file
            mapped = Path(line.partition("/")[1] + line.partition("/")[2]).parent == folder
        elif key == ("Pss:" if mapped else "Anonymous:"):
            found["mapped" if mapped else "own"] += int(values[0]) * 1024
    return found


def main(folder: str, dtype: str) -> None:
    """Be one of the processes. What a tiny model leaves behind, such as imported code, is no part of the weights."""
    path = Path(folder).resolve()
    with tempfile.TemporaryDirectory() as other:
        tiny = make(Path(other) / "tiny", SHAPES["tiny"])
        with LayeredModel.from_pretrained(tiny, device="cpu", dtype=dtype, memory="1000TB", shared="insist") as model:
            generate(model, 1)
    before = _occupied(path)["own"]
    with LayeredModel.from_pretrained(path, device="cpu", dtype=dtype, memory="1000TB", shared="insist") as model:
        generate(model, 1)
        print("loaded", flush=True)
        for _ in sys.stdin:
            found = _occupied(path)
            print(json.dumps({**found, "own": found["own"] - before}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
