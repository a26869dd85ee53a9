import os
import threading

import pytest

from airllm_nb.engine import page_cache
from airllm_nb.engine.checkpoint import FileState
from airllm_nb.engine.reader import CHUNK, Reader
from airllm_nb.errors import CheckpointError


class Files:
    def __init__(self, *paths):
        self.states = {path: FileState.of(path.stat()) for path in paths}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(2 * CHUNK + 12345))
    return path


def read(reader, path, offset, size, **options):
    into = bytearray(size)
    missed = reader.read(path, offset, memoryview(into), **({"keep_cached": True} | options))
    return bytes(into), missed


@pytest.mark.parametrize("known", [True, False], ids=["page cache asked", "page cache unknown"])
@pytest.mark.parametrize("keep_cached", [True, False])
@pytest.mark.parametrize(("offset", "size"), [(0, 1), (3, CHUNK), (CHUNK - 1, CHUNK + 2), (12345, 2 * CHUNK), (7, 0)])
def test_the_bytes_of_the_file(data, monkeypatch, offset, size, keep_cached, known):
    if not known:
        monkeypatch.setattr(page_cache, "_mincore", None)
    reader = Reader(Files(data))
    for _ in range(2):
        assert read(reader, data, offset, size, keep_cached=keep_cached)[0] == data.read_bytes()[offset : offset + size]
    reader.close()


def test_a_system_without_positional_reads(data, monkeypatch):
    monkeypatch.setattr(page_cache, "_mincore", None)
    monkeypatch.delattr(os, "preadv")
    reader = Reader(Files(data))
    assert read(reader, data, 5, CHUNK)[0] == data.read_bytes()[5 : 5 + CHUNK]
    reader.close()


def cached(path):
    """Return which pages of a file are in the page cache."""
    with path.open("rb") as file:
        residue = page_cache.Residue(file.fileno())
        return residue._look(0, len(residue._ours))


def evict(path, begin=0, size=0):
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), begin, size, os.POSIX_FADV_DONTNEED)


only_linux = pytest.mark.skipif(page_cache._mincore is None, reason="only Linux tells what the page cache holds")


@only_linux
def test_pages_that_were_there_stay_and_the_others_go(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(6 * CHUNK))
    evict(path)
    if cached(path).any():
        pytest.skip("this file system never leaves the page cache")
    reader = Reader(Files(path))
    with path.open("rb", buffering=0) as file:  # somebody else reads a part, some of which the kernel reads ahead
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.seek(2 * CHUNK)
        file.read(CHUNK)
    before = cached(path)
    assert before.any()
    assert not before.all()
    for offset in range(123, 5 * CHUNK, CHUNK // 3):
        read(reader, path, offset, CHUNK // 3, keep_cached=False)
    assert cached(path)[before].all()
    reader.close()
    assert (cached(path) == before).all()


@only_linux
def test_tells_disk_from_page_cache_and_drops_what_it_brought_in(data):
    reader = Reader(Files(data))
    size = data.stat().st_size
    evict(data)
    missed = read(reader, data, 0, size)[1]
    if missed == 0:
        pytest.skip("this file system never leaves the page cache")
    assert read(reader, data, 0, size)[1] == 0  # kept
    evict(data)
    assert read(reader, data, 0, size, keep_cached=False)[1] > size / 2
    assert read(reader, data, 0, size, keep_cached=False)[1] > size / 2  # dropped
    reader.close()


@only_linux
def test_pieces_that_begin_within_a_page_leave_nothing_behind(data):
    """Read again and again, as by streaming: what one pass leaves in the page cache would pass for cached in the next one."""
    reader = Reader(Files(data))
    size = data.stat().st_size
    evict(data)
    pieces = [(offset, min(1_000_072, size - offset)) for offset in range(0, size, 1_000_072)]
    if sum(read(reader, data, *piece, keep_cached=False)[1] for piece in pieces) == 0:
        pytest.skip("this file system never leaves the page cache")
    for _ in range(3):
        assert sum(read(reader, data, *piece, keep_cached=False)[1] for piece in pieces) > 0.95 * size
    reader.close()


@only_linux
def test_what_was_cached_before_stays(data):
    reader = Reader(Files(data))
    evict(data)
    if read(reader, data, CHUNK, CHUNK)[1] == 0:  # the second half
        pytest.skip("this file system never leaves the page cache")
    assert read(reader, data, 0, 2 * CHUNK, keep_cached=False)[1] < 1.1 * CHUNK
    assert read(reader, data, CHUNK, CHUNK)[1] < 0.1 * CHUNK
    reader.close()


def test_many_threads(data):
    reader = Reader(Files(data))
    content = data.read_bytes()
    wrong = []

    def check(offset):
        if read(reader, data, offset, 100_000)[0] != content[offset : offset + 100_000]:
            wrong.append(offset)

    threads = [threading.Thread(target=check, args=(offset,)) for offset in range(0, CHUNK, CHUNK // 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    reader.close()


def test_an_error_of_the_disk_is_named(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="Reading folder failed: Is a directory"):
        read(Reader(Files(folder)), folder, 0, 1)
