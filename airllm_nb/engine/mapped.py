"""Weights that are not read but mapped: every process that maps the same files has them in memory once, together.

The mapping is private and copied on write. PyTorch knows no read-only tensors: where memory must not be written to, a model that
rescales its weights (RWKV), or a user who does, kills the process. Here the pages that are written to become the process's own,
as with ``from_pretrained``, and nothing ever reaches the file.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Iterable, Iterator

import torch

from airllm_nb.compat.keys import Tensors
from airllm_nb.engine.checkpoint import FileState, TensorEntry
from airllm_nb.engine.reader import CHUNK, changed
from airllm_nb.engine.sharing import shareable
from airllm_nb.engine.weights import GroupReader, WeightGroup, as_bytes
from airllm_nb.errors import CheckpointError

POPULATE_READ = 22 if sys.platform == "linux" else None
"""``MADV_POPULATE_READ``, which Python does not name: maps pages in, and fails where touching them would kill."""


class SharingReader(GroupReader):
    """Maps the weights that stay, as far as they lie in the files as they compute, and reads the others.

    Made as a `GroupReader` is. A mapping lives as long as a tensor that lies in it.
    """

    def load(self, group: WeightGroup, device: torch.device) -> bool:
        """Bring a group's weights in, to stay, and attach them; True if any of it had to come from the disk."""
        entries = shareable(group, self._checkpoint)
        from_disk = super().load(group.without(entries), device)
        tensors: Tensors = {}
        for run in _runs(entries.values()):
            found, missed = self._map(run)
            tensors |= found
            from_disk |= missed > 0
        group.put({name: tensors[entry.name] for name, entry in entries.items()})
        return from_disk

    def _map(self, run: list[TensorEntry]) -> tuple[Tensors, int]:
        """Map tensors that lie one after the other.

        Returns
        -------
        dict of str to torch.Tensor, int
            The tensors by their names in the checkpoint, and how many bytes were not in the page cache.
        """
        path, begin, end = run[0].file, run[0].offset, run[-1].offset + run[-1].nbytes
        start = begin - begin % mmap.ALLOCATIONGRANULARITY
        try:
            with path.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start)
                state = FileState.of(os.fstat(file.fileno()))
        except FileNotFoundError as error:
            raise changed(path, "was removed") from error
        except (OSError, ValueError) as error:  # ValueError: the file is shorter now
            raise CheckpointError(f"{path.name} cannot be mapped ({error}).", "Load the model without shared.") from error
        if state != self._checkpoint.states[path]:
            raise changed(path, "was replaced or rewritten")
        missed = self._bring_in(run[0], mapping, start, end)
        # The tensor holds the mapping, but not as a buffer: closing it by hand would pull the memory from under it.
        return {
            entry.name: torch.frombuffer(
                mapping, dtype=entry.dtype, count=entry.nbytes // entry.dtype.itemsize, offset=entry.offset - start
            ).view(entry.shape)
            for entry in run
        }, missed

    def _bring_in(self, first: TensorEntry, mapping: mmap.mmap, start: int, end: int) -> int:
        """Read a file's mapped part through, at the disk's rate (page faults would not be), and enter it into the page table."""
        missed = 0
        staging = as_bytes(torch.empty(CHUNK, dtype=torch.uint8, device="cpu"))
        for offset in range(start, end, CHUNK):
            size = min(CHUNK, end - offset)
            missed += self._reader.read(first.file, offset, staging[:size], keep_cached=True)
            if POPULATE_READ is not None:
                try:
                    mapping.madvise(POPULATE_READ, offset - start, size)
                except OSError as error:
                    if error.errno == errno.EFAULT:
                        raise changed(first.file, "was truncated") from error
                    if error.errno != errno.EINVAL:  # Linux before 5.14: the first pass enters them
                        raise CheckpointError(f"{first.file.name} cannot be mapped ({error.strerror}).",
                                              "Load the model without shared.") from error  # fmt: skip
        return missed


def _runs(entries: Iterable[TensorEntry]) -> Iterator[list[TensorEntry]]:
    """Yield tensors that lie one after the other in one file, as few lists as there can be."""
    run: list[TensorEntry] = []
    for entry in sorted(entries, key=lambda entry: (entry.file, entry.offset)):
        if run and (entry.file != run[-1].file or entry.offset != run[-1].offset + run[-1].nbytes):
            yield run
            run = []
        run.append(entry)
    if run:
        yield run
