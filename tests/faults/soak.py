"""The soak: everything, for a long time, in one process and in a random order, while what the process holds is counted.

    python tests/faults/soak.py --seconds 3600

Its last line says what it did, and what it found; it stands in README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import linecache
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MKL_DISABLE_FAST_MM"] = "1"  # it would keep buffers of all sizes that it ever needed
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "0"  # and it a kernel for each of the last 1024 shapes
os.environ["LRU_CACHE_CAPACITY"] = "1"  # as does what PyTorch has around it (ideep): 0.26 MB in bfloat16 for each number of rows
sys.path += [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import soak_actions
from counting import Held
from IPython.core.interactiveshell import InteractiveShell
from ipywidgets.widgets import widget
from soak_person import Person
from soak_reference import SHAPES, Reference
from traitlets.config import Config

from airllm_nb.bench.machine import anonymous
from airllm_nb.compat.config import quiet
from airllm_nb.notebook import background

ACTIONS = 12
"""Things that are done in a round; then everything is put away, and counted."""
LEAST = 24
"""Rounds, to say anything about growth."""
HANGS = 600
MOST = 8 << 20
"""Bytes by which memory may grow over the second half of the rounds; a model that stays is 12 MB each time."""


def main(seconds: float, seed: int, *, of_a_core: bool) -> None:
    """Do rounds for as long, by the clock or of the processor's time; raise if anything is wrong, or grows."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts this in the background has it ignored
    rng, passed, begin = random.Random(seed), time.process_time if of_a_core else time.monotonic, time.monotonic()
    end, parent = passed() + seconds, os.environ.get("AIRLLM_NB_SOAK_FOR")
    held: list[Held] = []
    with (
        tempfile.TemporaryDirectory(prefix="airllm_nb-soak-") as folder, quiet(),
        mock.patch.object(background, "RESTS", 0.02),
        mock.patch("airllm_nb.engine.plan.predict", _predicts_nothing),  # it measures the machine for two seconds
    ):  # fmt: skip
        references = [Reference(Path(folder), kind) for kind in SHAPES]
        shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
        shell.run_line_magic("xmode", "Plain")  # otherwise IPython keeps a syntax tree of each file that a traceback names
        shell.run_line_magic("load_ext", "airllm_nb")
        person = Person(shell, references, Path(folder), rng)
        while passed() < end or len(held) < LEAST:
            if parent and not Path("/proc", parent).exists():
                sys.exit("nobody waits for it any more")
            with contextlib.redirect_stdout(io.StringIO()):
                _round(person, len(held))
            held.append(_held(held))
            if len(held) % 10 == 0:
                print(f"round {len(held)}, {time.monotonic() - begin:.0f} s: {held[-1]}", flush=True)
    grown, slope = _growth([one.memory for one in held])
    did = ", ".join(f"{count} {what}" for what, count in sorted(person.did.items(), key=lambda pair: -pair[1]))
    print(
        f"Seed {seed}: {len(held)} rounds in {time.monotonic() - begin:.0f} s ({time.process_time():.0f} s of a core): {did}. "
        f"All exact, or clear errors. Left after each round: {len(held[-1].threads)} threads, {held[-1].descriptors} descriptors "
        f"({held[1].descriptors} at the beginning), no widget; {held[-1].memory / 1e6:.0f} MB in use, in the second half "
        f"{grown / 1e6:+.1f} MB ({slope / 1e3:+.1f} kB a round); {anonymous() / 1e6:.0f} MB by the system's count."
    )
    assert grown < MOST, "the memory grows"


def _predicts_nothing(*_: object, **__: object) -> None:
    """Stand in for a function; a mock would keep all that it is called with."""


def _round(person: Person, number: int) -> None:
    """Do several things in one session, then put everything away."""
    done = []
    faulthandler.dump_traceback_later(HANGS, exit=True)
    try:
        for _ in range(ACTIONS):
            action = person.rng.choice(soak_actions.ACTIONS)
            if person.model is None and action not in (soak_actions.reload_extension, soak_actions.use_panel):
                action = Person.load
            done.append(action.__name__)
            action(person)
            assert not person.session.busy
        soak_actions.reload_extension(person)
        person.shell.reset()  # it keeps what cells have shown,
        linecache.clearcache()  # and their sources
    except BaseException:
        print(f"round {number}: {' '.join(done)}", file=sys.stderr)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()


def _held(before: Sequence[Held]) -> Held:
    """Return what the process holds; raise if that is a thread, a widget, or a descriptor more than after the second round."""
    most = before[1].descriptors if len(before) > 1 else sys.maxsize
    until = time.monotonic() + 60
    while (now := Held.now()).threads or now.descriptors > most:
        assert time.monotonic() < until, f"{now} after {before[1:2]}: {_open_files()}"
        time.sleep(0.05)
    widgets = widget._instances if hasattr(widget, "_instances") else widget.Widget.widgets
    assert not widgets, f"{len(widgets)} widgets are left"
    return now


def _open_files() -> list[str]:
    """Return what each file descriptor stands for."""
    return [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


def _growth(memory: Sequence[int]) -> tuple[float, float]:
    """Return by how many bytes the memory has grown in the second half of the rounds, and how many that is each.

    It is the median of all slopes between two of them (Theil and Sen), which single rounds do not move.
    """
    rounds = range(len(memory) // 2, len(memory), len(memory) // 800 + 1)
    slope = statistics.median((memory[b] - memory[a]) / (b - a) for a in rounds for b in rounds if a < b)
    return slope * (rounds[-1] - rounds[0]), slope


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--of-a-core", action="store_true", help="count this process's processor time instead of the clock")
    chosen = parser.parse_args()
    main(chosen.seconds, chosen.seed, of_a_core=chosen.of_a_core)
