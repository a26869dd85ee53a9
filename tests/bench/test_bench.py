"""The benchmark runs, on a tiny model, and refuses what would not be a measurement. No number is checked: that is its own job."""

import json
import os
import subprocess
import sys

import pytest
import torch

from airllm_nb import plan
from airllm_nb.bench import __main__ as command
from airllm_nb.bench import checkpoint, guesses, machine, processes, rows, sides
from airllm_nb.bench.machine import BenchError
from airllm_nb.engine import probe

PEERS = os.environ.get("AIRLLM_NB_PEERS", sys.executable)
"""A Python that has the peers' packages: see tests/benchmarks/README.md."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def root(checkpoints, monkeypatch):
    monkeypatch.setattr(machine, "require_quiet", lambda: None)  # other tests run beside this one
    monkeypatch.setattr(processes, "WHOLE", 0)
    return checkpoints


@pytest.fixture
def bench(root, monkeypatch):
    """A benchmark whose sides run in this process, and so in a second."""

    def side(_, name, folder, limit=None, **options):
        assert limit is None or limit > 10**8
        return json.loads(json.dumps(sides.SIDES[name](folder=str(folder), **options)))

    monkeypatch.setattr(processes.Bench, "side", side)
    monkeypatch.setenv("AIRLLM_NB_HOME", str(root))
    monkeypatch.setattr(probe, "SECONDS", 0.02)
    monkeypatch.setattr(probe, "_memory", {})
    return processes.Bench(root, 2, "tiny", PEERS)


def test_a_table_and_json(root, capsys, tmp_path):
    """The whole way, with processes of their own."""
    found = tmp_path / "found.json"
    assert not command.main(["a", "--shape", "tiny", "--tokens", "2", "--root", str(root), "--json", str(found)])
    assert capsys.readouterr().out.splitlines()[2].startswith("| a | fits in memory")
    measured = json.loads(found.read_text())
    assert {"processor", "memory", "torch", "transformers"} <= measured["machine"].keys()
    assert measured["a"].keys() == {"measure", "goal", "at", "unit", "value", "reached", "details"}
    assert (measured["a"]["goal"], measured["a"]["at"]) == (1.03, "most")
    assert measured["a"]["reached"] == (measured["a"]["value"] <= 1.03)
    assert measured["a"]["details"].keys() == {"plain", "ours", "listening"}


def test_a_process_under_a_memory_limit(root):
    bench = processes.Bench(root, 2, "tiny")
    options = {"folder": bench.folder("1b"), "dtype": "bfloat16", "tokens": 1}
    try:
        with machine.limited(10**9):
            pass
    except BenchError as refused:
        pytest.skip(refused.cause)
    assert bench.side("peak", limit=10**9, **options)["peak"] > 0
    with pytest.raises(processes.KilledError, match="side 'peak' was killed for want of memory"):
        bench.side("peak", limit=40_000_000, **options)


@pytest.mark.parametrize("name", [name for name in rows.ROWS if not name.startswith(("d-", "i", "j", "k", "q-llama", "q-gguf"))])
def test_each_row(bench, name):
    value, details = rows.ROWS[name].measure(bench)
    assert value > 0 or name == "q-int4"  # nothing is read from the disk there
    json.dumps(details)


def test_guesses(bench):
    value, guessed = rows.ROWS["i"].measure(bench)
    assert guessed.keys() == {"float32", "bfloat16"}
    assert value == min(way["tokens per pass"] for ways in guessed.values() for way in ways.values()) > 1


def test_guesses_that_change_the_text_are_no_measurement(bench, monkeypatch):
    texts = iter(([1, 2], [1, 3]))
    monkeypatch.setattr(guesses, "_generate", lambda *_: next(texts))
    with pytest.raises(BenchError, match="In float32, lookup gives other tokens"):
        rows.ROWS["i"].measure(bench)


def test_kernels(bench):
    _, found = rows.ROWS["j"].measure(bench)
    assert found.keys() == {"plain", "ours", "kernels"}
    assert "linear" in found["kernels"]


def test_sharing(bench, monkeypatch):
    monkeypatch.setattr(rows, "KERNELS", 2)
    value, found = rows.ROWS["k"].measure(bench)
    weights = sum(path.stat().st_size for path in machine.weights(bench.folder("1b")))
    assert found["one"]["mapped"] == pytest.approx(weights, rel=0.1)
    assert found["all"]["mapped"] == pytest.approx(weights, rel=0.1)
    assert value == sum(found["all"].values()) / sum(found["one"].values())


@pytest.mark.parametrize("name", [name for name in rows.ROWS if name.startswith("d-")])
def test_peers(bench, name, monkeypatch):
    monkeypatch.setattr(rows, "SHARES", (0.75,))
    try:
        value, found = rows.ROWS[name].measure(bench)
    except BenchError as missing:
        pytest.skip(missing.cause)
    assert value > 0 or name == "q-int4"  # nothing is read from the disk there
    assert len(found["ours"]["seconds"]) == len(found["peer"]["seconds"]) == 2


def test_int4_beside_llama_cpp(bench):
    try:
        value, found = rows.ROWS["q-llama.cpp"].measure(bench)
        ratio, streamed = rows.ROWS["q-gguf"].measure(bench)
    except BenchError as missing:
        pytest.skip(missing.cause)
    assert value > 0 < ratio
    assert len(found["ours"]["seconds"]) == len(found["peer"]["seconds"]) == 2
    assert streamed["GGUF"]["streamed"] > streamed["int4"]["streamed"] > 0


def test_a_peer_that_is_missing_is_told(root, capsys, monkeypatch):
    assert [row.name for row in rows.named("d")] == ["d-llama.cpp", "d-transformers", "d-airllm"]
    monkeypatch.setattr(processes.Bench, "side", None)  # our own side is not even begun
    script = root / "peers.py"
    script.write_text(processes.PEERS.read_text().replace('"llama-cpp-python"', '"no-such-peer"'))
    (root / "timing.py").write_text(processes.PEERS.with_name("timing.py").read_text())
    monkeypatch.setattr(processes, "PEERS", script)
    arguments = ["--shape", "tiny", "--root", str(root)]
    assert command.main(["d-llama.cpp", *arguments]) == 1
    assert f"| not measured: no-such-peer is not installed. Install it for {sys.executable}," in capsys.readouterr().out
    assert command.main(["d", "--peers", "/no/python", *arguments]) == 3
    assert capsys.readouterr().out.count("not measured: /no/python cannot be run") == 3


def test_a_setting_that_is_killed_is_left_out(root, monkeypatch):
    """Of the disk offload's settings the fastest counts, and those that the limit kills do not."""
    bench = processes.Bench(root, 2, "tiny")
    half = sum(path.stat().st_size for path in machine.weights(bench.folder("3b"))) / 2

    def peer(*_, memory):
        if memory > 0.7 * half:
            raise processes.KilledError("killed", "")
        return {"seconds": [memory]}

    monkeypatch.setattr(processes.Bench, "peer", peer)
    monkeypatch.setattr(rows, "_twice_the_limit", lambda _: {"seconds": [1]})
    _, found = rows.ROWS["d-transformers"].measure(bench)
    assert found["peer"]["seconds"] == [int(0.45 * half)]
    monkeypatch.setattr(rows, "SHARES", (0.9, 0.8))
    with pytest.raises(BenchError, match="with every setting"):
        rows.ROWS["d-transformers"].measure(bench)


def test_unknown_rows_are_told(capsys):
    with pytest.raises(SystemExit):
        command.main(["z"])
    assert "there is no row 'z'; there are a, b, c, d-llama.cpp," in capsys.readouterr().err


def test_a_process_that_fails_is_told_with_its_cause(root, tmp_path):
    with pytest.raises(BenchError, match="(?s)side 'fits' failed.*Unrecognized model"):
        processes.Bench(root).side("fits", tmp_path, dtype="bfloat16", tokens=1, rounds=1)
    with pytest.raises(BenchError, match="'lots' is not a size"):
        processes.Bench(root).side("streams", root / "tiny", dtype="bfloat16", tokens=1, memory="lots")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "x failed \\(Segmentation fault"),
        ("pass", "x ended without a result"),
        ("print('Bus 7')", "x ended without a result"),
    ],
)
def test_a_process_that_ends_otherwise_is_not_short_of_memory(code, said):
    with pytest.raises(BenchError, match=said) as failed:
        processes._run("x", [sys.executable, "-c", f"import os, signal; {code}"], None)
    assert not isinstance(failed.value, processes.KilledError)


def test_where_no_file_can_be_dropped_and_no_limit_be_set(root, capsys, monkeypatch):
    """As on Windows and macOS: the rows that need neither are measured."""
    begin = subprocess.Popen.__init__

    def windows(self, *arguments, preexec_fn=None, **options):
        if preexec_fn is not None:
            raise ValueError("preexec_fn is not supported on Windows platforms")
        begin(self, *arguments, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", windows)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert command.main(["a", "c", "--shape", "tiny", "--tokens", "1", "--root", str(root)]) == 1
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert "not measured" not in first
    assert "not measured: Files cannot be dropped from the page cache here." in second


def test_what_cannot_be_written_is_told_before_anything_is_measured(root, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(processes.Bench, "side", None)
    file = tmp_path / "file"
    file.touch()
    for option, path in [("--root", file), ("--root", file / "folder"), ("--json", tmp_path), ("--json", tmp_path / "no" / "a")]:
        with pytest.raises(SystemExit):
            command.main(["a", "--shape", "tiny", "--root", str(root), option, str(path)])
        assert f"{option} {path} cannot be written (" in capsys.readouterr().err
    with pytest.raises(BenchError, match="No checkpoint can be made in"):
        processes.Bench(file, shape="tiny").folder("1b")


def test_what_the_page_cache_held_is_no_measurement(root, monkeypatch):
    monkeypatch.setattr(processes, "WHOLE", 0.95)
    bench = processes.Bench(root, shape="tiny")
    found = {"read": [50, 50, 60], "streamed": 100}
    monkeypatch.setattr(processes.Bench, "side", lambda *_, **__: found)
    with pytest.raises(BenchError, match="Only 50% of the planned bytes"):
        bench.streams(root, None)
    found["read"] = [96, 96, 10]
    assert bench.streams(root, None) is found


def test_a_busy_machine_is_refused():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        own = machine.psutil.Process().children
        machine_children = [child for child in own(recursive=True) if child.pid != busy.pid]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(machine.psutil.Process, "children", lambda *_, **__: machine_children)
            with pytest.raises(BenchError, match="Other processes use"):
                machine.require_quiet(0.5)
    finally:
        busy.kill()
        busy.wait()


@pytest.mark.parametrize("name", checkpoint.SHAPES)
def test_the_shapes_are_those_of_llama(name, tmp_path, monkeypatch):
    """Of the large ones only the sizes, without writing them."""
    shape = checkpoint.SHAPES[name]
    tensors = checkpoint._tensors(shape)
    if name == "tiny":
        folder = checkpoint.make(tmp_path / name, shape)
        planned = plan(folder, device="cpu", dtype="bfloat16")
        assert len(planned.layers) == shape.layers
        assert planned.checkpoint_nbytes == sum(2 * torch.Size(size).numel() for size in tensors.values())
        monkeypatch.setattr(checkpoint, "save_file", None)
        assert checkpoint.make(folder, shape) == folder  # it is there
    billions = sum(torch.Size(size).numel() for size in tensors.values()) / 1e9
    assert billions == pytest.approx({"tiny": 0.0002, "1b": 1.1, "3b": 3.2}[name], rel=0.1)
