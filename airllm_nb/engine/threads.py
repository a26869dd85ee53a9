"""How many threads compute on the CPU: no more than this process may use at once, and never more than the user set."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from airllm_nb.engine import cgroups

_TWO_GRAINS = 1 << 16
"""Elements that PyTorch shares between two threads, and not between more (``at::internal::GRAIN_SIZE`` is half of it)."""


class Threads(NamedTuple):
    """A number of compute threads, and the `reason` for it in words for people."""

    number: int
    reason: str


def compute_threads() -> Threads:
    """Return how many threads should compute on this machine's CPU.

    The least of what PyTorch would take (the number of cores, ``OMP_NUM_THREADS``, or what ``torch.set_num_threads`` was told),
    the cores that this process may run on, its container's quota of processor time, and JupyterHub's ``CPU_LIMIT``. PyTorch does
    not look at the last two. With a quota its threads then use it up early in every period (0.1 s, usually), and all of them
    stand still for the rest of it, also the one that others wait for. The limit alone stops nobody, where the hub's spawner
    starts plain processes: then it is the other users who wait.
    """
    own = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or own
    count = min(own, cores)
    limits = ((cpu_quota(), "the container may use"), (hub_limit(), "JupyterHub's CPU_LIMIT is"))
    limit, authority = min(((cores, authority) for cores, authority in limits if cores), default=(math.inf, ""))
    # Part of a core is left for reading: with 1.5 one thread took 0.92 (64 rows) to 0.98 (one row) of the time of two in float32.
    if limit < count + 1:
        return Threads(max(int(limit), 1), f"{authority} {limit:.3g} {'core' if limit == 1 else 'cores'}")
    if own < cores:
        return Threads(own, f"PyTorch's setting; {cores} cores")
    return Threads(cores, f"{cores} {'core' if cores == 1 else 'cores'}")


def cpu_quota() -> float | None:
    """Return the processor time that this process's control groups (v1 and v2) allow it, in cores; None without a limit."""
    quotas = []
    for version, folder in cgroups.groups("cpu"):
        if version == 1:
            time, period = cgroups.numbers(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
        else:
            time, period = (*cgroups.numbers(folder / "cpu.max"), None, None)[:2]
        if time and period:
            quotas.append(time / period)
    return min(quotas, default=None)


def hub_limit() -> float | None:
    """Return the cores that JupyterHub grants its user: ``CPU_LIMIT``, as its spawners set it; None without a limit."""
    with contextlib.suppress(ValueError):  # empty, or not written by a spawner
        limit = float(os.environ.get("CPU_LIMIT", ""))
        if 0 < limit < math.inf:
            return limit
    return None


def apply() -> Threads:
    """Let PyTorch compute with `compute_threads` from now on, in this process; returns them."""
    threads = compute_threads()
    if threads.number < torch.get_num_threads():
        torch.set_num_threads(threads.number)
    return threads


@contextlib.contextmanager
def applied() -> Iterator[Threads]:
    """Compute with `compute_threads` for the time of a measurement."""
    before = torch.get_num_threads()
    try:
        yield apply()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@contextlib.contextmanager
def one() -> Iterator[None]:
    """Compute on the calling thread alone, where work comes in pieces so small that several would mostly wait for each other."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def rest_sooner() -> None:
    """Have OpenMP's threads wait asleep, not spinning, as long as the calling thread lives: a thread that reads needs their core.

    GNU's OpenMP, which PyTorch has on Linux, keeps a thread without work spinning for some 300,000 rounds (5 ms and more), but
    for 100 only where it has more threads than there are cores (``do_spin`` in GCC's ``libgomp/config/linux/wait.h``). So the
    calling thread gets a team of two of its own, which is gone when it ends. Each operation of several threads then begins
    0.04 ms later: worth it where computing waits for the disk, and not where it does not.
    """
    if torch.get_num_threads() > 1:
        torch.empty(_TWO_GRAINS, dtype=torch.uint8).fill_(0)
