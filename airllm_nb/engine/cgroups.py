"""The control groups that this process is in, from its own up to the root: each may limit memory and processor time."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def groups(controller: Literal["memory", "cpu"]) -> list[tuple[int, Path]]:
    """Return version (1 or 2) and folder of each group that can hold this process to a limit; none where it is not Linux."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, root = 2, CGROUP
        elif controller in controllers.split(","):
            version, root = 1, CGROUP / controller
        else:
            continue
        # In a container the path is the host's, and the container's own group is mounted at the root.
        group = root / path.lstrip("/")
        found += [(version, folder) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return found


def numbers(*paths: Path) -> list[int | None]:
    """Return the numbers in files of a group, in their order; None where there is no file or no limit (``max``, -1)."""
    found: list[int | None] = []
    for path in paths:
        try:
            words = path.read_text().split()
        except OSError:
            words = [""]
        found += [int(word) if word.isdigit() else None for word in words]
    return found
