"""What of a file the page cache holds: asked before a read, so that afterwards only what the read brought in is dropped.

The kernel's own read-ahead is what makes a disk fast (2.0 GB/s against 0.9 where we measured), but it brings in pages beyond
what was asked for. `Residue` therefore remembers every page that was not there when we first looked: it is ours, whenever it
arrives.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from stat import S_ISREG

import numpy as np

PAGE = mmap.PAGESIZE
BEYOND = 16 << 20
"""Bytes behind a read that the kernel's read-ahead may bring in: twice the largest that we have met."""
FOLIO = 2 << 20
"""Bytes that the kernel may hold as one piece; it drops a piece only where the whole of it is to be dropped."""


def _find_mincore() -> ctypes._NamedFuncPointer | None:
    if not hasattr(os, "posix_fadvise"):
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return function


_mincore = _find_mincore()


class Residue:
    """The pages of one open file that are in the page cache because of us. Not safe to use from several threads at once.

    Parameters
    ----------
    descriptor : int
        Of the file, open for reading. Linux tells the truth about a file's pages only to who owns the file or may write it;
        of others' files nothing is known, and nothing is dropped.
    """

    def __init__(self, descriptor: int) -> None:
        stat = os.fstat(descriptor)
        self._descriptor = descriptor
        self._size = stat.st_size
        self.known = _mincore is not None and S_ISREG(stat.st_mode) and _may_ask(descriptor, stat)
        self._ours = np.zeros(-(-self._size // PAGE) if self.known else 0, dtype=bool)

    def holds(self, offset: int) -> bool | None:
        """Tell whether the page cache holds the byte at `offset`, and not because of us; None if that cannot be known."""
        if not self.known:
            return None
        page = offset // PAGE
        return page < len(self._ours) and bool(self._look(page, page + 1)[0]) and not self._ours[page]

    def missing(self, begin: int, end: int, *, keep: bool) -> int:
        """Return how many of the bytes from `begin` to `end` are not in the page cache, or only because of us.

        To be called before they are read. What that brings in is ours, to drop it later, or (`keep`) nobody's.
        """
        if not self.known:
            return end - begin
        if begin >= min(end, self._size):
            return 0
        first, last = begin // PAGE, -(-min(end, self._size) // PAGE)
        there = self._look(first, last if keep else min(-(-(end + BEYOND) // PAGE), len(self._ours)))
        ours = self._ours[first : first + len(there)]
        ours |= ~there
        missed = min(int(ours[: last - first].sum()) * PAGE, end - begin)
        if keep:
            ours[:] = False
        return missed

    def drop(self, begin: int, end: int) -> None:
        """Drop the pages from `begin` to `end`, which have been read, if they are in the page cache because of us.

        The last page and the last piece may reach beyond `end`: they go with whatever is dropped next.
        """
        first, last = max(begin - FOLIO, 0) // PAGE, end // PAGE
        for start, stop in _runs(self._ours[first:last]):
            os.posix_fadvise(self._descriptor, (first + start) * PAGE, (stop - start) * PAGE, os.POSIX_FADV_DONTNEED)
        self._ours[first : max(last - FOLIO // PAGE, first)] = False

    def drop_all(self) -> None:
        """Drop whatever is still there because of us, such as what the kernel read ahead in vain."""
        self.drop(0, len(self._ours) * PAGE)

    def _look(self, first: int, last: int) -> np.ndarray:
        """Return for each page whether it is in the page cache. The mapping that this takes is never read: it cannot fault."""
        assert _mincore is not None
        unit = mmap.ALLOCATIONGRANULARITY // PAGE
        start = first // unit * unit
        answer = np.empty(last - start, dtype=np.uint8)
        length = min(last * PAGE, self._size) - start * PAGE
        try:
            mapping = mmap.mmap(self._descriptor, length, access=mmap.ACCESS_READ, offset=start * PAGE)
        except ValueError:  # the file is shorter now, which reading it will find
            return np.ones(last - first, dtype=bool)
        # No `with`: an interrupt would find the view alive, and a mapping that has views refuses to close. It goes with them.
        view = np.frombuffer(mapping, dtype=np.uint8)
        failed = _mincore(view.ctypes.data, length, answer.ctypes.data)
        del view
        mapping.close()
        return np.ones(last - first, dtype=bool) if failed else (answer[first - start :] & 1).astype(bool)


def _may_ask(descriptor: int, stat: os.stat_result) -> bool:
    return stat.st_uid == os.geteuid() or os.access(f"/proc/self/fd/{descriptor}", os.W_OK)


def _runs(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """Return where runs of True begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.view(np.uint8), [0]))))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
