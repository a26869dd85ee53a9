"""Runs each side of a measurement in a process of its own, from a cold page cache and under a memory limit where needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from safetensors import SafetensorError

from airllm_nb.bench import checkpoint, machine
from airllm_nb.bench.machine import BenchError

WHOLE = 0.95
"""Share of its planned bytes that a pass must have read from the disk: below it the page cache helped, and the row is invalid."""
COLD = ("cold", "streams", "peak", "predicted", "packs")
"""Sides that read from the disk what is measured, or whose page cache counts in their memory limit. For the others it does not
matter where their weights come from, and they can be measured where no file can be dropped from the page cache."""
PEERS = Path(__file__).with_name("peers.py")
KILLED = -9
"""What a process returns that was ended by SIGKILL, as the kernel ends it for want of memory."""


class KilledError(BenchError):
    """A process did not survive its memory limit."""


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
    peers : str
        The Python that has the peers' packages.
    took : dict
        What packing took, by folder and quantization.
    """

    root: Path
    tokens: int = 5
    shape: str | None = None
    peers: str = sys.executable
    took: dict[tuple[Path, str], dict[str, Any]] = field(default_factory=dict)

    def folder(self, shape: str) -> Path:
        """Return the folder of a checkpoint, made if it is not there."""
        name = self.shape or shape
        try:
            return checkpoint.make(self.root / name, checkpoint.SHAPES[name])
        except (OSError, SafetensorError) as error:
            raise BenchError(f"No checkpoint can be made in {self.root}: {error}.", "Choose another with --root.") from error

    def side(self, name: str, folder: Path, limit: int | None = None, **options: Any) -> dict[str, Any]:
        """Run one of `sides`, under a memory limit in bytes."""
        machine.require_quiet()
        if name in COLD:
            machine.evict(folder)
        command = [sys.executable, "-m", "airllm_nb.bench.sides", name, json.dumps({"folder": str(folder), **options})]
        return _run(f"side {name!r}", command, limit, {**os.environ, "AIRLLM_NB_HOME": str(self.root)})

    def streams(self, folder: Path, limit: int | None, **options: Any) -> dict[str, Any]:
        """Run the side that streams, and refuse a result to which the page cache has helped."""
        found = self.side("streams", folder, limit, tokens=self.tokens, **options)
        if median(found["read"]) < WHOLE * found["streamed"]:
            share = median(found["read"]) / found["streamed"]
            raise BenchError(
                f"Only {share:.0%} of the planned bytes came from the disk.", "Run it under a memory limit: as root."
            )
        return found

    def packed(self, folder: Path, quantize: str) -> dict[str, Any]:
        """Have a checkpoint's layers packed, anew the first time; returns what that took."""
        if (folder, quantize) not in self.took:
            self.took[folder, quantize] = self.side("packs", folder, dtype="bfloat16", quantize=quantize)
        return self.took[folder, quantize]

    def peer(self, name: str, folder: Path, limit: int | None, **options: Any) -> dict[str, Any]:
        """Run one of the peers; the files that it wants of its own are written before, without a limit."""
        path = self.written(name, folder)
        machine.require_quiet()
        machine.evict(folder)
        machine.evict(path)
        return self._peer("measure", name, folder, limit, path=str(path), tokens=self.tokens, **options)

    def written(self, name: str, folder: Path) -> Path:
        """Return what one of the peers reads, written if it is not there."""
        return Path(self._peer("prepare", name, folder)["path"])

    def _peer(self, step: str, name: str, folder: Path, limit: int | None = None, **options: Any) -> dict[str, Any]:
        foreign = self.peers != sys.executable
        environment = {key: value for key, value in os.environ.items() if not (foreign and key == "PYTHONPATH")}
        command = [self.peers, str(PEERS), step, name, json.dumps({"folder": str(folder), **options})]
        return _run(name, command, limit, environment)


def _run(name: str, command: Sequence[str], limit: int | None, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a process and return what it prints as its last line."""
    with machine.limited(limit) as enter:
        # The limit has to be there before the process begins, and a cgroup is entered by the process itself. Windows refuses any
        # function to call there.
        first = None if limit is None else enter
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, preexec_fn=first)
        except OSError as error:
            raise BenchError(f"{command[0]} cannot be run ({error.strerror}).", "Name a Python that has the peers.") from error
    remedy = "The other rows do not need this one."
    if done.returncode == KILLED:
        raise KilledError(f"The {name} was killed for want of memory.", remedy)
    if done.returncode:
        cause = f" ({signal.strsignal(-done.returncode)})" if done.returncode < 0 else ""
        raise BenchError(f"The {name} failed{cause}:\n{done.stderr.strip()[-2000:]}", remedy)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise BenchError(f"The {name} ended without a result:\n{done.stderr.strip()[-2000:]}", remedy) from error
    if "error" in found:
        raise BenchError(*found["error"])
    return found
