"""GGUF files of the hub: real HTTP and real huggingface_hub on 127.0.0.1, in fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub
from tiny_gguf import WIDE, llama3_factors, make_gguf

from airllm_nb.compat import gguf_files, versions

pytestmark = pytest.mark.skipif(versions.installed() < gguf_files.SINCE, reason="refused by this version of transformers")
ROOT = Path(__file__).parents[2]
DRIVER = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from airllm_nb import LayeredModel, plan
from airllm_nb.engine import gguf_hub
from airllm_nb.errors import AirLLMError

gguf_hub.FIRST_READ = 1000  # a tiny header takes several requests, too
for what, model, options in json.loads(sys.argv[1]):
    try:
        if what == "plan":
            found = plan(model, device="cpu", dtype="float32", **options)
            done = {"name": found.name, "least": found.least, "total": found.total_nbytes}
        elif what == "config":
            from airllm_nb.engine import hub
            from airllm_nb.engine.gguf_checkpoint import open_checkpoint
            done = json.loads((open_checkpoint(*hub.locate_headers(model)).folder / "config.json").read_text())
        else:
            events = []
            with torch.no_grad(), LayeredModel.from_pretrained(
                model, device="cpu", dtype="float32", progress=events.append, **options
            ) as loaded:
                logits = loaded(torch.arange(4, 20)[None]).logits[0, -1]
            fetched = {event.file for event in events if type(event).__name__ == "Fetching"}
            done = {"name": loaded.name, "sum": float(logits.double().sum()), "files": sorted(map(str, fetched))}
    except AirLLMError as error:
        done = {"error": type(error).__name__, "cause": error.cause, "remedy": error.remedy}
    print("result:" + json.dumps(done))
"""


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    """Run calls in a fresh process; returns what each gave or how it was refused."""

    def calls(*calls, **environment):
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "AIRLLM_NB_HOME": str(tmp_path / "home")}
        env |= {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"} | environment
        command = [sys.executable, "-c", DRIVER, json.dumps([(*call, {})[:3] for call in calls])]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line.removeprefix("result:")) for line in done.stdout.splitlines() if line.startswith("result:")]

    return calls


@pytest.fixture
def repo(hub, tmp_path):
    """A repository with a model in two quantizations, and what else such repositories hold."""
    folder = tmp_path / "repo"
    folder.mkdir()
    make_gguf(folder / "tiny-Q8_0.gguf", "llama", "Q8_0", width=WIDE, inner=WIDE)
    make_gguf(folder / "tiny-Q4_K_M.gguf", "llama", "Q4_K", width=WIDE, inner=WIDE, kinds={"attn_v": "Q6_K"})
    make_gguf(folder / "scaled.gguf", "llama", "Q8_0", fields={"llama.rope.scaling.type": "yarn"})
    (folder / "mmproj-F16.gguf").write_bytes(b"GGUF")
    (folder / "README.md").write_text("no")
    hub.add("org/name", folder)
    return folder


def test_planned_from_the_header_and_loaded(hub, run, repo):
    (planned,) = run(("plan", "org/name/tiny-Q8_0.gguf"))
    assert planned["name"] == "tiny-Q8_0.gguf"
    header = (repo / "tiny-Q8_0.gguf").read_bytes().index(b"output_norm.weight")
    assert header // 2 < hub.sent("tiny-Q8_0.gguf") < 4 * header
    hub.requests.clear()
    local, loaded, again = run(
        ("load", str(repo / "tiny-Q8_0.gguf")), ("load", "org/name/tiny-Q8_0.gguf"), ("plan", "org/name/tiny-Q8_0.gguf")
    )
    assert loaded["sum"] == local["sum"]
    assert "tiny-Q8_0.gguf" in loaded["files"]
    assert again == planned
    assert hub.files_asked_for() == {"tiny-Q8_0.gguf"}
    hub.requests.clear()
    offline, planned_offline = run(("load", "org/name/tiny-Q8_0.gguf"), ("plan", "org/name/tiny-Q8_0.gguf"), HF_HUB_OFFLINE="1")
    assert offline["sum"] == local["sum"]
    assert planned_offline == planned
    assert not hub.requests


@pytest.mark.usefixtures("repo")
def test_a_repository_with_gguf_files_only_names_them(hub, run, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for number in range(7):
        (many / f"m-{number}.gguf").write_bytes(b"GGUF")
    hub.add("org/many", many)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "m-00001-of-00002.gguf").write_bytes(b"GGUF")
    hub.add("org/parts", parts)
    named, planned, several, split = run(("load", "org/name"), ("plan", "org/name"), ("load", "org/many"), ("load", "org/parts"))
    assert named["cause"] == '"org/name" holds GGUF files only: scaled.gguf, tiny-Q4_K_M.gguf, tiny-Q8_0.gguf.'
    assert named["remedy"] == "Name one: %airllm load org/name/tiny-Q4_K_M.gguf"
    assert planned == named
    assert several["cause"] == '"org/many" holds GGUF files only: m-0.gguf, m-1.gguf, m-2.gguf, m-3.gguf, m-4.gguf and 2 more.'
    assert several["remedy"] == "Name one: %airllm load org/many/m-0.gguf"
    assert "each is a part of a model" in split["cause"]
    assert not hub.files_asked_for()


@pytest.mark.usefixtures("repo")
def test_what_is_not_there(hub, run, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "model.safetensors").write_bytes(b"")
    hub.add("org/plain", plain)
    other, none, unknown, deep = run(
        ("load", "org/name/tiny-Q2_K.gguf"), ("plan", "org/plain/model.gguf"), ("load", "org/nothing/model.gguf"),
        ("load", "org/name/folder/model.gguf"),
    )  # fmt: skip
    assert other["cause"].startswith('"org/name" has no file tiny-Q2_K.gguf. "org/name" holds GGUF files: scaled.gguf,')
    assert other["remedy"] == "Name one: %airllm load org/name/tiny-Q4_K_M.gguf"
    assert none["cause"] == '"org/plain" has no file model.gguf, and no other GGUF file.'
    assert unknown["error"] == "HubError"
    assert "no such repository" in unknown["cause"]
    assert deep["cause"] == 'There is no file "org/name/folder/model.gguf".'


@pytest.mark.usefixtures("repo")
def test_a_header_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    (refused,) = run(("plan", "org/name/tiny-Q8_0.gguf"), AIRLLM_NB_HOME=str(tmp_path / "file" / "home"))
    assert refused["cause"].startswith("The header of tiny-Q8_0.gguf cannot be written to ")
    assert "AIRLLM_NB_HOME" in refused["remedy"]


def test_factors_of_the_rotary_embedding_come_with_the_header(hub, run, repo):
    factors = {"rope_freqs.weight": llama3_factors(10000.0, 64, 8.0, 1.0, 4.0, 8192)}
    path = make_gguf(repo / "llama3.gguf", "llama", "Q8_0", width=WIDE, inner=WIDE, factors=factors, context=131072)
    planned, local, config = run(
        ("plan", "org/name/llama3.gguf"), ("plan", str(path)), ("config", "org/name/llama3.gguf")
    )  # fmt: skip
    assert planned == local
    assert config["rope_parameters"]["factor"] == 8.0
    assert hub.sent("llama3.gguf") < path.stat().st_size / 4
    loaded, local = run(("load", "org/name/llama3.gguf"), ("load", str(path)))
    assert loaded["sum"] == local["sum"]
    factors["rope_freqs.weight"][3] = 2
    make_gguf(repo / "damaged.gguf", "llama", "Q8_0", width=WIDE, inner=WIDE, factors=factors, context=131072)
    hub.requests.clear()
    for done in run(("plan", "org/name/damaged.gguf"), ("load", "org/name/damaged.gguf")):
        assert "no settings of Llama 3.1 give" in done["cause"]
    assert hub.sent("damaged.gguf") < path.stat().st_size / 2


def test_what_is_refused_is_not_downloaded(hub, run, repo):
    (repo / "cut.gguf").write_bytes((repo / "tiny-Q8_0.gguf").read_bytes()[:-5000])
    (repo / "foreign.gguf").write_bytes(b"x" * 100_000)
    part = "part-00001-of-00003.gguf"
    make_gguf(repo / part, "llama", "Q8_0", width=WIDE, inner=WIDE, fields={"split.count": 3})
    for file, words in (
        ("scaled.gguf", "a rotary embedding that is scaled"), (part, "is one of 3 parts of a model"),
        ("cut.gguf", "is truncated"), ("foreign.gguf", "is no GGUF file"),
    ):  # fmt: skip
        hub.requests.clear()
        for done in run(("plan", f"org/name/{file}"), ("load", f"org/name/{file}")):
            assert words in done["cause"]
        assert hub.sent(file) < (repo / file).stat().st_size
