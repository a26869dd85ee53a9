"""From a model's name to files, against a real HTTP server on this machine.

huggingface_hub reads HF_ENDPOINT and HF_HOME when it is imported, so each scenario runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from loopback_hub import LoopbackHub
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
MEBI = 1 << 20
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"

# Runs the calls of its argument one after the other, and prints what became of each.
DRIVER = """
import json, pathlib, sys
from airllm_nb.engine import download, hub
from airllm_nb.errors import AirLLMError

def shown(value):
    if isinstance(value, tuple):
        folder, headers = value
        return [str(folder), headers and {name: [size, raw.hex()] for name, (size, raw) in headers.items()}]
    return str(value)

for function, model, options in json.loads(sys.argv[1]):
    if function == "exec":
        exec(model)
        continue
    try:
        result = {"value": shown(getattr(hub, function)(model, **options))}
    except AirLLMError as error:
        result = {"error": type(error).__name__, "cause": error.cause, "remedy": error.remedy}
        result["from"] = str(error.__cause__)
    print(json.dumps(result))
assert not {"torch", "transformers"} & set(sys.modules)
"""


class Machine:
    """A user's machine: its own cache, and a hub within reach."""

    def __init__(self, hub: LoopbackHub, home: Path) -> None:
        self.hub = hub
        self.home = home

    def run(self, *calls, **environment) -> list[dict]:
        with self.start(*calls, **environment) as process:
            output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        return [json.loads(line) for line in output.splitlines()]

    def start(self, *calls, **environment) -> subprocess.Popen:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        env |= {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "PYTHONPATH": str(ROOT)} | environment
        command = [sys.executable, "-c", DRIVER, json.dumps([(*call, {}, {})[:3] for call in calls])]
        return subprocess.Popen(command, env=env, cwd=self.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def locate(self, model: str, *, function="locate", environment=None, **options) -> dict:
        return self.run((function, model, options), **(environment or {}))[0]


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def machine(hub, tmp_path) -> Machine:
    home = tmp_path / "home"
    home.mkdir()
    return Machine(hub, home)


@pytest.fixture
def sharded(tmp_path) -> Path:
    """Two shards of 1 MiB, and beside them what must not be downloaded."""
    folder = tmp_path / "sharded"
    weights = {f"layers.{n}.weight": np.full((512, 512), n, dtype=np.float32) for n in range(2)}
    texts = {
        "config.json": '{"model_type": "llama"}',
        "generation_config.json": "{}",
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "merges.txt": "",
        "chat_template.jinja": "{{ messages }}",
        "README.md": "no",
        "pytorch_model.bin": "no",
        "model.Q4_0.gguf": "no",
        "consolidated.safetensors": "no",
        "onnx/model.onnx": "no",
        "onnx/config.json": "no",
        "original/consolidated.00.pth": "no",
        INDEX: json.dumps({"weight_map": dict(zip(weights, SHARDS, strict=True))}),
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for shard, (name, tensor) in zip(SHARDS, weights.items(), strict=True):
        save_file({name: tensor}, folder / shard)
    return folder


@pytest.fixture
def single(tmp_path) -> Path:
    """One file of 1 MiB, with a header longer than what the first request brings."""
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"x": np.zeros(MEBI, dtype=np.uint8)}, folder / "model.safetensors", metadata={"note": "n" * 150_000})
    return folder


def header_of(file: Path) -> bytes:
    with file.open("rb") as opened:
        length = opened.read(8)
        return length + opened.read(int.from_bytes(length, "little"))


def test_a_local_folder_is_used_as_it_is(machine, sharded):
    (machine.home / "folder").mkdir()
    calls = [("locate", str(sharded)), ("locate_headers", str(sharded)), ("locate", "~/folder"), ("locate", "folder")]
    values = [done["value"] for done in machine.run(*calls, HOME=str(machine.home))]
    assert values == [str(sharded), [str(sharded), None], str(machine.home / "folder"), str(machine.home / "folder")]
    assert machine.hub.requests == []


def test_a_missing_folder_is_named(machine):
    names = ["/nowhere/model", "./model", "~/model", "a/b/c", "~nobody-of-this-name/model"]
    for name, done in zip(names, machine.run(*(("locate", name) for name in names)), strict=True):
        assert done["error"] == "CheckpointError"
        assert name in done["cause"]
    assert machine.hub.requests == []


def test_a_file_is_no_model(machine, sharded):
    gguf, weights = machine.run(("locate", str(sharded / "model.Q4_0.gguf")), ("locate_headers", str(sharded / SHARDS[0])))
    assert gguf["value"] == str(sharded / "model.Q4_0.gguf")  # but a GGUF file is one
    assert weights["error"] == "CheckpointError"
    assert "a file, not a folder" in weights["cause"]


def test_exactly_what_is_needed_is_downloaded(machine, sharded):
    machine.hub.add("org/name", sharded)
    folder = Path(machine.locate("org/name")["value"])
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "chat_template.jinja",
        INDEX,
        *SHARDS,
    }
    assert all((folder / name).read_bytes() == (sharded / name).read_bytes() for name in SHARDS)
    assert machine.hub.files_asked_for() == {p.name for p in folder.iterdir()}
    assert folder.is_relative_to(machine.home / "hub")  # the hub's own cache, which other libraries share

    asked = len(machine.hub.requests)
    assert machine.locate("org/name")["value"] == str(folder)
    assert not any(request.file for request in machine.hub.requests[asked:])  # nothing twice

    machine.hub.stop()
    again = machine.run(("locate", "org/name"), ("locate_headers", "org/name"), ("locate", "org/name", {"revision": folder.name}))
    assert [done["value"] for done in again] == [str(folder), [str(folder), None], str(folder)]
    assert machine.locate("org/name", environment={"HF_HUB_OFFLINE": "1"})["value"] == str(folder)


LISTENER = """
import threading
from airllm_nb.events import Fetching

here, events = threading.get_ident(), []

def listener(event):
    assert type(event) is Fetching
    assert threading.get_ident() == here
    events.append(event)
"""


def test_a_listener_is_told_of_each_file(machine, sharded):
    machine.hub.add("org/name", sharded)
    tell = f"""{LISTENER}
hub.locate("org/name", progress=listener)
files = [event for event in events if event.file]
print(json.dumps([[event.text for event in events], [[event.file, event.done, event.total] for event in files]]))
"""
    texts, files = machine.run(("exec", tell))[0]
    assert texts[0] == "Looking for org/name on the hub"
    assert texts[-1] == "Downloading org/name from the hub"
    sizes = {name: (sharded / name).stat().st_size for name in SHARDS}
    assert {name: total for name, _, total in files} == sizes
    for name in SHARDS:
        told = [done for file, done, _ in files if file == name]
        assert told == sorted(told)
        assert told[-1] == sizes[name]


def test_what_is_written_of_a_file_counts(machine):
    """Of a file that is complete, under way, under way under the name that newer versions give it, and not yet begun."""
    blobs = machine.home / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for name in ("complete", "old.incomplete", "new.1a2b3c4d.incomplete"):
        (blobs / name).write_bytes(bytes(8192))
    tell = f"""{LISTENER}
from airllm_nb.engine.download import HubFile, _Watch
etags = ("complete", "old", "new", "next", "")
watch = _Watch("org/name", [HubFile(f"{{etag}}.safetensors", 10_000, etag) for etag in etags], listener)
watch()
watch()
print(json.dumps([[event.file, event.done, event.total] for event in events]))
"""
    told = machine.run(("exec", tell))[0]
    done = {"complete": 10_000, "old": 8192, "new": 8192, "next": 0}
    assert told[:-2] == [[f"{etag}.safetensors", number, 10_000] for etag, number in done.items()]
    assert told[-2:] == [["", 0, 0]] * 2  # and nothing twice


def test_a_listener_stops_a_download(machine, sharded):
    repo = machine.hub.add("org/name", sharded)
    repo.waits[SHARDS[1]] = arrives = threading.Event()
    tell = """
from airllm_nb.events import Fetching
def listener(event):
    if event.file:
        raise KeyboardInterrupt
try:
    hub.locate("org/name", progress=listener)
except KeyboardInterrupt:
    print(json.dumps("stopped"), flush=True)
"""
    with machine.start(("exec", tell)) as process:
        try:
            assert json.loads(process.stdout.readline()) == "stopped"  # while the hub has not sent the second file
        finally:
            arrives.set()
        assert process.wait(60) == 0
    snapshot = next((machine.home / "hub" / "models--org--name" / "snapshots").iterdir())
    assert not (snapshot / SHARDS[1]).exists()  # its thread has noticed
    repo.waits.clear()
    assert machine.locate("org/name")["value"] == str(snapshot)


def test_planning_asks_for_headers_only(machine, sharded, single):
    machine.hub.add("org/sharded", sharded)
    machine.hub.add("gpt2", single)
    calls = [
        ("locate_headers", "org/sharded"),
        ("locate_headers", "gpt2"),
        ("locate", "gpt2"),
        ("locate_headers", "gpt2"),
    ]
    (folder, headers), (_, long), full, planned = (done["value"] for done in machine.run(*calls[:2], *calls[2:]))
    assert headers == {name: [(sharded / name).stat().st_size, header_of(sharded / name).hex()] for name in SHARDS}
    assert sorted(p.name for p in Path(folder).iterdir()) == sorted(
        ["config.json", "generation_config.json", "tokenizer_config.json", INDEX]
    )
    assert all(machine.hub.sent(name) <= 100_000 for name in SHARDS)
    file = single / "model.safetensors"
    assert long == {file.name: [file.stat().st_size, header_of(file).hex()]}
    first, second, *download = [r.sent for r in machine.hub.requests if r.file == file.name and r.sent]
    assert first + second == len(header_of(file))
    assert sum(download) == file.stat().st_size
    assert planned == [full, None]  # all is there: the files themselves are read


def test_a_server_that_ignores_ranges(machine, single):
    machine.hub.add("org/name", single, ignores_range=True)
    headers = machine.locate("org/name", function="locate_headers")["value"][1]
    file = single / "model.safetensors"
    assert headers == {file.name: [file.stat().st_size, header_of(file).hex()]}


def test_a_damaged_header_is_refused_before_it_is_asked_for(machine, tmp_path):
    lengths = {
        "none": b"",
        "short": b"\x01",
        "huge": (101 << 20).to_bytes(8, "little"),
        "over": b"\x99" + bytes(7) + b"{}",
    }
    for name, start in lengths.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(start)
        machine.hub.add(name, tmp_path / name)
    empty, *damaged = machine.run(*(("locate_headers", name) for name in lengths))
    assert empty["error"] == "HubError"  # no byte of it can be asked for: HTTP 416
    assert [done["error"] for done in damaged] == ["CheckpointError"] * 3
    assert machine.hub.sent("model.safetensors") == sum(map(len, lengths.values()))


def test_a_revision_is_kept(machine, single):
    repo = machine.hub.add("org/name", single)
    repo.revisions["refs/pr/1"] = "1" * 40
    folder = Path(machine.locate("org/name", revision="refs/pr/1")["value"])
    assert folder.name == "1" * 40
    wrong = machine.locate("org/name", revision="v9")
    assert wrong["error"] == "HubError"
    assert '"v9"' in wrong["cause"]
    machine.hub.stop()
    assert machine.locate("org/name", revision="refs/pr/1")["value"] == str(folder)


def test_a_gated_or_private_repository_needs_the_token(machine, single):
    machine.hub.add("org/gated", single, gated=True)
    machine.hub.add("org/private", single, private=True)
    for function in ("locate_headers", "locate"):
        calls = [(function, "org/gated"), (function, "org/gated", {"token": "hf_other"}), (function, "org/private")]
        for done in (refused := machine.run(*calls)):
            assert done["error"] == "HubError"
            assert "hf auth login" in done["remedy"]
            assert "huggingface-cli login" in done["remedy"]
            assert "token=" in done["remedy"]
        assert f"{machine.hub.url}/org/gated" in refused[0]["remedy"]
    machine.hub.requests.clear()
    assert machine.locate("org/gated", function="locate_headers", token=machine.hub.token)["value"][1]
    assert "value" in machine.locate("org/gated", token=machine.hub.token)
    assert "value" in machine.locate("org/private", environment={"HF_TOKEN": machine.hub.token})
    assert machine.locate("org/nothing", token=True)["cause"].startswith("`token=True`")


def test_pickles_are_refused_and_never_requested(machine, tmp_path):
    names = {
        "org/bin": "pytorch_model.bin",
        "org/pth": "original/consolidated.00.pth",
        "org/gguf": "model.gguf",
        "org/adapter": "adapter_model.safetensors",
    }
    for repo, file in names.items():
        (tmp_path / repo / file).parent.mkdir(parents=True)
        (tmp_path / repo / file).write_text("")
        (tmp_path / repo / "config.json").write_text("{}")
        machine.hub.add(repo, tmp_path / repo)
    done = dict(zip(names, machine.run(*(("locate", repo) for repo in names)), strict=True))
    assert {result["error"] for result in done.values()} == {"CheckpointError"}
    for repo in ("org/bin", "org/pth"):
        assert names[repo] in done[repo]["cause"]
        assert "save_pretrained" in done[repo]["remedy"]
        assert "refs/pr/" in done[repo]["remedy"]
    assert done["org/gguf"]["cause"] == '"org/gguf" holds GGUF files only: model.gguf.'
    assert done["org/gguf"]["remedy"] == "Name one: %airllm load org/gguf/model.gguf"
    assert machine.hub.files_asked_for() == set()


def test_an_index_cannot_name_anything_else(machine, tmp_path):
    values = [
        "1",
        '"../x.safetensors"',
        '"sub/x.safetensors"',
        '"*.safetensors"',
        '"pytorch_model.bin"',
        '"model-3.safetensors"',
    ]
    texts = ["{", "[]", "{}", '{"weight_map": {}}', *(f'{{"weight_map": {{"x": {value}}}}}' for value in values)]
    for number, text in enumerate(texts):
        folder = tmp_path / str(number)
        (folder / "sub").mkdir(parents=True)
        for file in ("config.json", "pytorch_model.bin", "sub/x.safetensors", *SHARDS):
            (folder / file).write_text("{}")
        (folder / INDEX).write_text(text)
        machine.hub.add(f"org/{number}", folder)
    calls = [(function, name) for name in machine.hub.repos for function in ("locate", "locate_headers")]
    assert {done.get("error") for done in machine.run(*calls)} == {"CheckpointError"}
    assert machine.hub.files_asked_for() == {"config.json", INDEX}


def test_no_config(machine, single):
    (single / "config.json").unlink()
    machine.hub.add("org/name", single)
    assert machine.locate("org/name")["cause"] == '"org/name" has no config.json.'


def test_a_malformed_name(machine):
    names = ["", " ", "org/with space", "org/--name", "a" * 100, "https://huggingface.co/gpt2"]
    for name, done in zip(names, machine.run(*(("locate", name) for name in names)), strict=True):
        assert done["error"] in {"HubError", "CheckpointError"}
        assert f'"{name}"' in done["cause"]
        assert "org/name" in done["remedy"]
    assert machine.hub.requests == []


def test_an_unknown_repository(machine):
    done = machine.locate("org/nothing")
    assert done["error"] == "HubError"
    assert "no such repository" in done["cause"]
    assert "RepoNotFound" in done["from"] or "401" in done["from"]  # the original stays chained


def test_nothing_cached_and_no_hub(machine, single):
    machine.hub.add("org/name", single)
    assert machine.locate("org/name", function="locate_headers")["value"]  # brings everything but the weights
    offline = machine.locate("org/name", environment={"HF_HUB_OFFLINE": "1"})
    machine.hub.stop()
    gone, plan = machine.run(("locate", "org/name"), ("locate_headers", "org/name"))
    assert [done["error"] for done in (offline, gone, plan)] == ["HubError"] * 3
    assert "HF_HUB_OFFLINE" in offline["cause"]
    assert "connection" in gone["cause"]
    assert gone["cause"] == plan["cause"]


def test_the_hub_is_ill(machine, single):
    machine.hub.add("org/name", single)
    machine.hub.status = 502
    ill = machine.locate("org/name")
    assert ill["error"] == "HubError"
    assert "HTTP 502" in ill["cause"]
    machine.hub.status = None
    folder = machine.locate("org/name")["value"]
    machine.hub.status = 502
    assert machine.locate("org/name")["value"] == folder  # the cache serves


def test_a_connection_that_breaks_midway(machine, sharded):
    repo = machine.hub.add("org/name", sharded)
    repo.broken[SHARDS[1]] = 300_000
    broken = machine.locate("org/name")
    assert broken["error"] == "HubError"
    assert "run this again" in broken["remedy"]
    repo.broken.clear()
    machine.hub.requests.clear()
    folder = Path(machine.locate("org/name")["value"])
    assert (folder / SHARDS[1]).read_bytes() == (sharded / SHARDS[1]).read_bytes()
    assert machine.hub.files_asked_for() == {SHARDS[1]}  # the rest was kept


def test_headers_over_a_broken_connection(machine, sharded):
    machine.hub.add("org/name", sharded).broken[SHARDS[0]] = 50
    assert machine.locate("org/name", function="locate_headers")["error"] == "HubError"


def test_disk_trouble(machine, single):
    """The RuntimeErrors are as measured with hf_xet 1.8, through which huggingface_hub fetches most weights."""
    machine.hub.add("org/name", single)
    plain, xet, access, network = (
        [("exec", f"def fail(*a, **k): raise {error}\ndownload.snapshot_download = fail"), ("locate", "org/name")]
        for error in (
            "OSError(28, 'No space left on device')",
            "RuntimeError('Task error: IO Error: No space left on device (os error 28)')",
            "PermissionError(13, 'Permission denied', '/cache')",
            "RuntimeError('Task error: CAS Client Error: Request error')",
        )
    )
    plain, xet, access, network = machine.run(*plain, *xet, *access, *network)
    assert "disk is full" in plain["cause"]
    assert "disk is full" in xet["cause"]
    assert "/cache" in access["cause"]
    assert "connection" in network["cause"]


def test_a_partial_snapshot_is_not_taken_for_the_whole(machine, single):
    """Old versions of huggingface_hub return what is there when the hub fails between two calls."""
    machine.hub.add("org/name", single)
    partial = """
whole = download.snapshot_download
download.snapshot_download = lambda *args, **options: whole(*args, **options | {"allow_patterns": "config.json"})
"""
    (done,) = machine.run(("exec", partial), ("locate", "org/name"))
    assert "not complete" in done["cause"]


def test_a_bug_keeps_its_traceback(machine, single):
    machine.hub.add("org/name", single)
    bug = "def fail(*args, **kwargs): raise OSError(9, 'what no user can have caused')\ndownload.snapshot_download = fail"
    with pytest.raises(AssertionError, match="what no user can have caused"):
        machine.run(("exec", bug), ("locate", "org/name"))


def test_a_complete_cache_that_only_others_may_write(machine, single):
    machine.hub.add("org/name", single)
    denied = "def fail(*args, **kwargs): raise PermissionError(13, 'Permission denied')\ndownload.snapshot_download = fail"
    before, after = machine.run(("locate", "org/name"), ("exec", denied), ("locate", "org/name"))
    assert before == after
    assert "value" in after
