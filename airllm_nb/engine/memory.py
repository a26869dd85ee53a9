"""What this process may use of the machine's memory, and sizes as people write them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from pathlib import Path

import psutil
import torch

from airllm_nb.engine import cgroups
from airllm_nb.errors import MemoryBudgetError

ACTIVATIONS = 200_000_000
"""Bytes kept free for activations and what else Python needs; the KV cache is estimated apart from it."""
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63
CGROUP_FILES = {  # by version: the limit, what is used; in memory.stat: file pages not in use and in use, and those mapped
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file", "total_mapped_file"),
    2: ("memory.max", "memory.current", "inactive_file", "active_file", "file_mapped"),
}


def parse_size(text: str | float) -> int:
    """Read a size such as ``"4GB"``, ``"1.5 GiB"``, ``"800M"`` or a number of bytes.

    Returns
    -------
    int
        Bytes. GB is 10^9, GiB is 2^30.

    Raises
    ------
    MemoryBudgetError
        If it is no positive size.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:e\+?\d+)?)\s*([KMGT]?I?)B?\s*", str(text), re.IGNORECASE | re.ASCII)
    try:
        size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    except (ValueError, KeyError, OverflowError):  # 1.2.3, 1IB, 1e999
        size = 0
    if size <= 0:
        raise MemoryBudgetError(
            f"{text!r} is not a size.", 'Write a memory budget as "4GB", "800MB", a number of bytes, or "auto".'
        )
    return size


def format_size(nbytes: float) -> str:
    """Write a size in bytes with three significant digits: ``"538 MB"``, ``"2.20 GB"``."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while nbytes >= 999.5 and len(units) > 1:  # noqa: PLR2004  # three digits, rounded
        nbytes /= 1000
        del units[0]
    unit = units[0]
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:#.3g}".rstrip(".") + f" {unit}"


def limits(*, mapped: bool = False) -> dict[str, int]:
    """Return what each authority over this process's memory still allows.

    Parameters
    ----------
    mapped : bool
        For memory that is itself file pages. Those that lie there already and are in use count as used otherwise, and may be
        the very ones: of a model that was mapped before.

    Returns
    -------
    dict of str to int
        Bytes left, by a name fit for people: the host's available memory, every cgroup that this process is in (v1 and v2),
        and JupyterHub's ``MEM_LIMIT``.
    """
    left = {"available memory": psutil.virtual_memory().available}
    for version, folder in cgroups.groups("memory"):
        limit, usage, *names = CGROUP_FILES[version]
        allowed, used = ((*cgroups.numbers(folder / name), None)[0] for name in (limit, usage))  # an empty file says nothing
        if allowed is not None and allowed < UNLIMITED:
            # File pages count as used but are given back on demand, also those that were read twice (active); but programs and
            # libraries are mapped, and without them nothing runs well.
            inactive, active, in_maps = (_stat(folder / "memory.stat", name) for name in names)
            held = max((used or 0) - inactive - (active if mapped else max(active - in_maps, 0)), 0)
            left["container limit"] = min(left.get("container limit", UNLIMITED), max(allowed - held, 0))
    with contextlib.suppress(MemoryBudgetError):  # set by JupyterHub's spawners, in bytes; 0 or nothing is no limit
        limit_size = parse_size(os.environ.get("MEM_LIMIT", ""))
        left["JupyterHub's MEM_LIMIT"] = max(limit_size - psutil.Process().memory_info().rss, 0)
    return left


def available(device: torch.device, *, mapped: bool = False) -> tuple[int, str]:
    """Return the bytes that weights (owned or `mapped`) could still use on `device`, and the name of the limit that says so."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, for it to use again
        return torch.cuda.mem_get_info(device)[0] + cached, "free GPU memory"
    left = limits(mapped=mapped)
    name = min(left, key=left.__getitem__)
    return left[name], name


def _stat(path: Path, name: str) -> int:
    try:
        return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(f"{name} ")), 0)
    except OSError:
        return 0


def trim() -> None:
    """Give freed memory back to the system, of which glibc keeps some: after loading 2.2 GB that were shared, 180 MB."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not Linux, or not glibc
        ctypes.CDLL(None).malloc_trim(0)
