"""Whether the weights of a checkpoint may be shared with other processes, and which of them lie in its files as they compute.

A shared weight is the page cache's own copy of the file. Whoever rewrites the file in place changes the model of everybody who
maps it, and whoever truncates it kills their processes (SIGBUS): so it must be a file that its user cannot write to.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from airllm_nb.engine.checkpoint import Checkpoint, TensorEntry
from airllm_nb.engine.weights import ALIGN, WeightGroup
from airllm_nb.errors import AirLLMError, DeviceError, SharingError

Shared = bool | Literal["insist"]
"""Own all weights, share them where that is safe, or share them at the user's own risk."""


@dataclass(frozen=True)
class Access:
    """What decides whether a user could change a file.

    Attributes
    ----------
    owner : int
        User id of the file's owner.
    writable : bool
        Whether the user may write to it now.
    read_only : bool
        Whether it lies on a read-only mount, where nobody may.
    """

    owner: int
    writable: bool
    read_only: bool

    @classmethod
    def of(cls, path: Path) -> Access:
        """Look at a file, through symbolic links."""
        effective = os.access in os.supports_effective_ids
        return cls(
            owner=path.stat().st_uid,
            writable=os.access(path, os.W_OK, effective_ids=effective),
            read_only=bool(os.statvfs(path).f_flag & os.ST_RDONLY),
        )

    def danger(self, user: int) -> str:
        """Return why the user with this id could change the file, in words; an empty string if that is not so."""
        if self.read_only:
            return ""
        if user == 0:
            return "root can write to it"
        if self.owner == user:
            return "it is your own file, which you can always make writable"
        return "you may write to it" if self.writable else ""


def require_shareable(checkpoint: Checkpoint, device: torch.device, shared: Shared) -> None:
    """Refuse to share weights where that could harm.

    Parameters
    ----------
    checkpoint : Checkpoint
        Its files are looked at as far as they are on this machine.
    device : torch.device
        Where the model computes.
    shared : bool or "insist"
        What the user asks for.

    Raises
    ------
    AirLLMError
        If `shared` is none of these.
    DeviceError
        If `device` has memory of its own.
    SharingError
        If this user could change a file, and does not insist.
    """
    if shared not in (True, False, "insist"):
        raise AirLLMError(f"shared={shared!r} means nothing.", 'Give shared=True, shared=False or shared="insist".')
    if shared and device.type != "cpu":
        raise DeviceError(f"{device} cannot share weights: they must be copied into its own memory.", 'Use device="cpu".')
    if shared and shared != "insist":
        for path in sorted({entry.file for entry in checkpoint.values()}):
            if path.exists() and (danger := _danger(path)):
                raise SharingError(
                    f"{path.name} cannot be shared: {danger}, and rewriting a mapped file changes the model or kills the kernel.",
                    "Load it without shared, or have the files owned by another user and not writable for you, or on a read-only "
                    'mount; shared="insist" (--shared-insist) shares them at your own risk.',
                )


def _danger(path: Path) -> str:
    if not hasattr(os, "geteuid"):
        return "this system does not tell whether you could write to it"
    return Access.of(path).danger(os.geteuid())


def shareable(group: WeightGroup, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """Return the weights of a group that can be computed with where they lie in the files, and where that is.

    That is so if nothing converts them, and if they begin where in a cache line ``from_pretrained`` would have them. Buffers are
    left out: they are small, and a model may change them.
    """
    found = {}
    for recipe in group.recipes:
        if recipe.convert is not None:
            continue
        (target,) = recipe.targets
        weight, entry = group.weights[target], checkpoint[recipe.sources[0]]
        aligned = entry.offset % entry.dtype.itemsize == 0 and (entry.offset - weight.offset) % ALIGN == 0
        in_place = entry.dtype == weight.dtype and aligned and entry.nbytes > 0
        if in_place and not any(place.is_buffer for place in weight.places):
            found[target] = entry
    return found
