"""The machine while something is measured: whether it is quiet, its disk's rate, the page cache, memory limits."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from airllm_nb.engine.cgroups import CGROUP
from airllm_nb.engine.memory import format_size
from airllm_nb.engine.reader import CHUNK
from airllm_nb.errors import AirLLMError

BUSY = 0.10
"""Share of one core that other processes may use together while something is measured."""


class BenchError(AirLLMError):
    """Nothing can be measured like this."""


def require_quiet(seconds: float = 1.0) -> None:
    """Refuse to measure beside other work: it can make PyTorch many times slower.

    Raises
    ------
    BenchError
        If other processes use more than `BUSY` of a core; names the busiest.
    """
    own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    before = _cpu_seconds(own)
    time.sleep(seconds)
    used = {key: (value - before[key]) / seconds for key, value in _cpu_seconds(own).items() if key in before}
    if sum(used.values()) > BUSY:
        (pid, name), share = max(used.items(), key=lambda item: item[1])
        raise BenchError(
            f"Other processes use {sum(used.values()):.2f} of a core (most: {name}, process {pid}, {share:.2f}).",
            "Stop them or wait, then measure again.",
        )


def _cpu_seconds(leave_out: set[int]) -> dict[tuple[int, str], float]:
    seconds = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid not in leave_out:
                times = process.cpu_times()
                seconds[process.pid, process.name()] = times.user + times.system
    return seconds


def describe() -> dict[str, str]:
    """Return the machine, and the versions of what computes, in words."""
    import torch
    import transformers

    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "processor": f"{model}, {os.cpu_count()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "memory": format_size(psutil.virtual_memory().total),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8").splitlines()
    return []


def weights(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that hold weights; it may be one file itself."""
    if folder.is_file():
        return [folder]
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))


def evict(folder: Path) -> None:
    """Drop a checkpoint's files from the page cache, so that the next read comes from the disk.

    Raises
    ------
    BenchError
        If this system cannot: only Linux can.
    """
    if not hasattr(os, "posix_fadvise"):
        raise BenchError("Files cannot be dropped from the page cache here.", "Run it on Linux.")
    for path in weights(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet is not dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential_rate(folder: Path, seconds: float = 2.0) -> float:
    """Measure the disk: bytes per second of one thread that reads the checkpoint's files from start to end, as ``dd`` would.

    The files are dropped from the page cache before and after, and behind the reading.
    """
    evict(folder)
    buffer = memoryview(bytearray(CHUNK))
    done, begin = 0, time.perf_counter()
    for path in weights(folder):
        with path.open("rb", buffering=0) as file:
            while (count := file.readinto(buffer)) and time.perf_counter() - begin < seconds:
                os.posix_fadvise(file.fileno(), max(file.tell() - 2 * CHUNK, 0), CHUNK, os.POSIX_FADV_DONTNEED)
                done += count
    rate = done / (time.perf_counter() - begin)
    evict(folder)
    return rate


@contextlib.contextmanager
def limited(nbytes: int | None) -> Iterator[Callable[[], None]]:
    """Make a memory cgroup of `nbytes` for a block (None: no limit); gives what a child process calls to enter it.

    Page cache counts, as it does in a container.

    Raises
    ------
    BenchError
        If no cgroup can be made here: that takes Linux and root.
    """
    if nbytes is None:
        yield lambda: None
        return
    version1 = (CGROUP / "memory").is_dir()
    group = (CGROUP / "memory" if version1 else CGROUP) / f"airllm_nb_bench_{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version1 else "memory.max")).write_text(str(nbytes))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        raise BenchError(
            f"No memory limit can be set here ({error.strerror}).", "Run it as root on Linux, or leave these rows out."
        ) from error

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield enter
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """Remove a cgroup; after an interrupt, the killed process may be in it for a moment."""
    for _ in range(30):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)


@contextlib.contextmanager
def peak() -> Iterator[Callable[[], int]]:
    """Watch this process's own memory during a block; gives what returns the most of it, in bytes."""
    most, over = anonymous(), threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.002):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: most
    finally:
        over.set()
        watcher.join()


def anonymous() -> int:
    """Return this process's own memory in bytes, page cache left out: RssAnon + RssShmem."""
    wanted = ("RssAnon:", "RssShmem:")
    return sum(int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith(wanted))
