"""Runs cases that may kill a process, each in a process of its own: forked from one that has torch imported, so that it is quick.

Whoever has cases starts `Server` (a fresh Python, because a process with threads must not be forked) and gets one outcome each:

refused
    An `AirLLMError` with a cause and a remedy, after at most `MOST_READ` bytes read and `MOST_MEMORY` bytes more memory, and the
    process gives the right answer with an undamaged checkpoint afterwards.
right
    Exactly the reference.
lost
    Anything else: a signal, another exception, other numbers, too much read or taken, no end within `PATIENCE`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import guards

HERE = Path(__file__).parent
MOST_READ = 64 << 20
MOST_MEMORY = 1 << 30
PATIENCE = int(os.environ.get("AIRLLM_NB_PATIENCE", "60"))
LONGEST = 1000
"""Characters of a message that can still be called clear."""


class Server:
    """A warm process that forks one child for each case.

    Parameters
    ----------
    module : str
        Has `warm(folder)`, called once before any fork, and `case(name, seed, folder)`, called in each child: it returns "right"
        or raises. `folder` is where it may write.
    folder : Path
        Given to `warm`.
    """

    def __init__(self, module: str, folder: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        path = [str(HERE), str(HERE.parent), str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, module, str(folder)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=environment | {"PYTHONPATH": os.pathsep.join(path)},
        )  # fmt: skip

    def run(self, name: str, seed: int) -> tuple[str, str]:
        """Return a case's outcome, and what it said."""
        self.process.stdin.write(json.dumps([name, seed]) + "\n")
        self.process.stdin.flush()
        outcome, said = json.loads(self.process.stdout.readline())
        return outcome, said

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(PATIENCE)


def _serve(module: str, folder: Path) -> None:
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed meanwhile must not get between the answers
    guards.disable_as_asked()
    cases = importlib.import_module(module)
    cases.warm(folder)
    gc.collect()
    gc.freeze()  # or each child would look through all that it was born with, and so copy it
    for line in sys.stdin:
        name, seed = json.loads(line)
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as place:
            outcome = _forked(cases, name, seed, Path(place))
        told.write(json.dumps(outcome) + "\n")
        told.flush()


def _forked(cases, name: str, seed: int, place: Path) -> tuple[str, str]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(PATIENCE)
        try:
            answer = json.dumps(_outcome(cases, name, seed, place))
        except BaseException:  # noqa: BLE001  # a child must never come back to the server's loop
            answer = json.dumps(("lost", traceback.format_exc()))
        os.write(writing, answer[:60_000].encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "lost", f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    with contextlib.suppress(ValueError):
        outcome, told = json.loads(said)
        return outcome, told
    return "lost", f"no answer: {said[:200]!r}"


def _outcome(cases, name: str, seed: int, place: Path) -> tuple[str, str]:
    from airllm_nb.errors import AirLLMError

    size = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 30), size + (4 << 30)))  # rather a MemoryError than the machine's end
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory from now on
    memory, read = _status("VmRSS"), _read()
    try:
        return cases.case(name, seed, place), ""
    except AirLLMError as error:
        read, memory = _read() - read, _status("VmHWM") - memory
        said = f"{type(error).__name__}: {error}"
        problems = []
        if not (error.cause.strip() and error.remedy.strip()):
            problems.append("no cause or no remedy")
        if len(said) > LONGEST or not all(c.isprintable() or c == "\n" for c in said):
            problems.append(f"not to be read: {len(said)} characters, {said[:300]!r}")
        if read > MOST_READ:
            problems.append(f"{read / 1e6:.0f} MB read")
        if memory > MOST_MEMORY:
            problems.append(f"{memory / 1e6:.0f} MB taken")
    except BaseException:  # noqa: BLE001  # an interrupt would be as lost as anything else
        return "lost", traceback.format_exc()
    if problems:
        return "lost", "; ".join(problems) + f" ({said[:300]!r})"
    if seed % 5 == 0 and (afterwards := cases.case("", 0, place / "afterwards")) != "right":
        return "lost", f"afterwards {afterwards} ({said})"
    return "refused", said


def _status(name: str) -> int:
    """Return a size from this process's status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def _read() -> int:
    """Return how many bytes this process has read so far, from wherever."""
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    sys.modules["fork_server"] = sys.modules[__name__]
    _serve(sys.argv[1], Path(sys.argv[2]))
