"""That what is measured is what it is said to be, and remembered. How fast it is, no test says."""

import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from airllm_nb.engine import memory, page_cache, probe, sample
from airllm_nb.engine.checkpoint import Checkpoint

SHAPES = ((64, 32), (128, 64))
LINUX = pytest.mark.skipif(page_cache._mincore is None, reason="only Linux tells what is in the page cache")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.02)
    monkeypatch.setattr(sample, "FILE", 32_000_000)
    monkeypatch.setattr(probe, "_memory", {})


@pytest.fixture
def large(tmp_path):
    """Return a checkpoint of 64 MB on a disk."""
    save_file({"x": torch.zeros(32 << 20, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    if sample.in_memory(tmp_path):
        pytest.skip("the temporary folder lies in memory")
    return Checkpoint(tmp_path)


def evict(checkpoint):
    for file in checkpoint.states:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def test_the_weights_exceed_the_caches_and_the_rows_of_large_ones_are_cut():
    for shapes in (SHAPES, ((100_000, 2048), (2048, 100_000))):
        linears = probe.Linears(shapes, torch.bfloat16)
        assert probe.WEIGHTS * 0.9 < linears._nbytes <= probe.WEIGHTS
        assert {weight.shape[1] for _, weight in linears._pairs} == {columns for _, columns in shapes}
        sweeps = iter((True, True, False))
        assert linears.rate(lambda it=sweeps: next(it)) > 0
        assert next(sweeps, None) is None


def test_little_memory_is_no_place_to_measure(monkeypatch):
    monkeypatch.setenv("MEM_LIMIT", "1")
    assert memory.available(torch.device("cpu"))[0] == 0
    with pytest.raises(sample.Unmeasurable, match="too little memory"):
        probe.computing(SHAPES, torch.float32)


def test_computing_is_measured_once(monkeypatch):
    first = probe.computing(SHAPES, torch.float32)
    monkeypatch.setattr(probe, "Linears", None)  # to measure again would raise
    assert probe.computing(SHAPES, torch.float32) == first > 0
    with pytest.raises(TypeError):
        probe.computing(SHAPES, torch.bfloat16)


def test_random_numbers_stay_the_users():
    before = torch.random.get_rng_state()
    assert probe.layer_overhead() > 0
    assert torch.equal(torch.random.get_rng_state(), before)


@LINUX
def test_what_is_in_the_page_cache(large):
    entries = list(large.values())
    next(iter(large.states)).read_bytes()
    assert sample.cached_share(large, entries) == 1
    evict(large)
    assert sample.cached_share(large, entries) < 0.5


@LINUX
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reading_says_what_came_from_the_disk(large, dtype):
    entries = list(large.values())
    evict(large)
    with sample.Sample(large, entries, dtype) as reads:
        assert reads.rate(0.05) > 0
        assert reads.missed > 0
    next(iter(large.states)).read_bytes()
    with sample.Sample(large, entries, dtype) as reads:
        assert reads.rate(0.05) > 0
        assert reads.missed == 0


@LINUX
def test_streaming_is_measured_once_for_a_disk(large, monkeypatch):
    entries = list(large.values())
    evict(large)
    first = probe.streaming(large, entries, SHAPES, torch.bfloat16)
    for speed in first:
        assert speed.alone > 0
        assert 0 < speed.share <= 1
    monkeypatch.setattr(probe, "Sample", None)
    assert probe.streaming(large, entries, SHAPES, torch.bfloat16) is first


@LINUX
def test_a_temporary_file_stands_for_what_is_not_here(large, tmp_path):
    file = next(iter(large.states))
    raw = file.read_bytes()
    headers = {file.name: (len(raw), raw[: 8 + int.from_bytes(raw[:8], "little")])}
    file.unlink()
    planned = Checkpoint(tmp_path, headers)
    reading, computing = probe.streaming(planned, list(planned.values()), SHAPES, torch.float32)
    assert reading.alone > 0 < computing.alone
    assert list(tmp_path.iterdir()) == []


@LINUX
def test_nothing_is_written_beside_the_weights_nor_where_it_is_not_wanted(large, tmp_path, monkeypatch):
    entries = list(large.values())
    next(iter(large.states)).read_bytes()
    with pytest.raises(sample.Unmeasurable, match="without writing"):
        probe.streaming(large, entries, SHAPES, torch.bfloat16, write=False)
    home = tmp_path.parent / f"{tmp_path.name}-home"
    home.mkdir()
    monkeypatch.setattr(sample.constants, "HF_HOME", str(home))
    monkeypatch.setattr(sample.tempfile, "gettempdir", lambda: str(tmp_path))  # the checkpoint's own folder
    assert sample.scratch(tmp_path) == home
    with sample.temporary(tmp_path, torch.bfloat16) as made:
        assert made.folder.parent == home
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert list(home.iterdir()) == []
    monkeypatch.setattr(sample.constants, "HF_HOME", "/dev/shm")
    with pytest.raises(sample.Unmeasurable, match="the disk cannot be measured: the folder for temporary files is not on it"):
        probe.streaming(large, entries, SHAPES, torch.bfloat16)


@pytest.mark.parametrize("missing", ["posix_fadvise", "mincore"])
def test_a_system_that_does_not_tell_is_not_measured(tmp_path, monkeypatch, missing):
    if missing == "mincore":
        monkeypatch.setattr(page_cache, "_mincore", None)
    else:
        monkeypatch.delattr(os, missing, raising=False)
    with pytest.raises(sample.Unmeasurable, match="does not tell"), sample.temporary(tmp_path, torch.bfloat16):
        pass


def test_what_the_reading_thread_raises_is_raised():
    def rate(_):
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("a bug")
        return 1.0

    with pytest.raises(ValueError, match="a bug"):
        probe._both(SimpleNamespace(rate=rate), SHAPES, torch.float32, None)


def test_only_memory_that_ran_out_is_no_error():
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")):
        with pytest.raises(sample.Unmeasurable, match="too little memory"), sample.enough_memory():
            raise error
    with pytest.raises(RuntimeError, match="shape"), sample.enough_memory():
        raise RuntimeError("shape")


@LINUX
def test_all_in_the_page_cache_leaves_it_there(large):
    """The disk is then measured with a file of our own: the page cache is everybody's."""
    entries = list(large.values())
    next(iter(large.states)).read_bytes()
    assert probe.streaming(large, entries, SHAPES, torch.bfloat16)[0].alone > 0
    assert sample.cached_share(large, entries) == 1
    assert [path.name for path in large.folder.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(("free", "error"), [(0, "nearly full"), (1 << 50, "No such file")])
def test_a_disk_that_cannot_be_measured_says_why(tmp_path, monkeypatch, free, error):
    if not free:
        monkeypatch.setattr(sample, "scratch", lambda folder: folder)
    monkeypatch.setattr(sample.psutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(sample.Unmeasurable, match=error), sample.temporary(tmp_path / "gone", torch.bfloat16):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has /dev/shm")
def test_a_folder_in_memory():
    assert sample.in_memory(Path("/dev/shm"))
    assert not sample.in_memory(Path("/usr"))
