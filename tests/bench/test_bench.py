"""The benchmark runs, on a tiny model, and refuses what would not be a measurement. No number is checked: that is its own job."""

import json
import subprocess
import sys

import pytest
import torch

from airllm_nb import plan
from airllm_nb.bench import __main__ as command
from airllm_nb.bench import checkpoint, machine, rows
from airllm_nb.bench.machine import BenchError


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "require_quiet", lambda: None)  # other tests run beside this one
    return tmp_path


def test_a_table_and_json(root, capsys):
    found = root / "found.json"
    missing = command.main(["--shape", "tiny", "--tokens", "2", "--root", str(root), "--json", str(found)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rows.ROWS)
    assert sum("not measured" in line for line in lines) == missing
    measured = json.loads(found.read_text())
    assert {"processor", "memory", "torch", "transformers"} <= measured["machine"].keys()
    assert len(measured) == 1 + len(rows.ROWS) - missing
    assert len(measured["a"]) == 4  # the ratio, and seconds of three sides
    assert all(seconds > 0 for seconds in measured["a"].values())
    assert measured["b"]["first"] > 0


def test_a_process_that_fails_is_told_with_its_cause(root):
    with pytest.raises(BenchError, match="(?s)side 'fits' failed.*Unrecognized model"):
        rows.Bench(root).side("fits", root, dtype="bfloat16", tokens=1, rounds=1)


def test_what_the_page_cache_held_is_no_measurement(root, monkeypatch):
    bench = rows.Bench(root, shape="tiny")
    found = {"read": [50, 50, 60], "streamed": 100}
    monkeypatch.setattr(rows.Bench, "side", lambda *_, **__: found)
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
