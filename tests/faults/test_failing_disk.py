"""A disk that gives errors, or is full: a clear message, and when it works again so does the session."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

HERE = Path(__file__).parent
SESSION = """
import sys
from pathlib import Path
from airllm_nb import plan
from airllm_nb.errors import CheckpointError
from airllm_nb.notebook.renderers import SilentRenderer
from airllm_nb.notebook.session import Session

folder, control = sys.argv[1], Path(sys.argv[2])
options = {"device": "cpu", "dtype": "float32"}
memory = plan(folder, **options, memory="1TB").least
session = Session(SilentRenderer, lambda _: None)

def load():
    session.load(folder, memory=memory, **options)

def ask():
    return session.ask("What is this?", max_new_tokens=4, temperature=0).text

def refused(call):
    try:
        call()
    except CheckpointError as error:
        assert "failed" in error.cause or "cannot be read" in error.cause, error
        assert error.remedy
        return
    raise AssertionError("not refused")

load()
expected = ask()
for mode in "est" * 2:
    control.write_text(mode)
    refused(ask)
    refused(load)
    control.unlink()
    load()
    assert ask() == expected, mode
control.write_text("h")  # a short read is allowed, and no error
assert ask() == expected
load()
assert ask() == expected
print("right")
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The library that lets reads fail."""
    compiler = shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("shim") / "failing_reads.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "failing_reads.c", "-ldl"], check=True)
    return library


def test_read_errors(shim, checkpoint, tmp_path):
    control = tmp_path / "control"
    environment = os.environ | {"LD_PRELOAD": str(shim), "FAILING_READS": str(control)}
    folder = checkpoint("llama", tokenizer=True)
    command = [sys.executable, "-W", "ignore", "-c", SESSION, folder, control]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == "right\n", run.stderr


DOWNLOAD = """
from airllm_nb.engine import hub
from airllm_nb.errors import AirLLMError
try:
    print(hub.locate("org/model"))
except AirLLMError as error:
    print(f"{type(error).__name__}: {error.cause}|{error.remedy}")
"""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB, and what makes it larger."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a file system here: that takes Linux and root")
    yield place, lambda: subprocess.run(["mount", "-o", "remount,size=50m", place], check=True)
    subprocess.run(["umount", "-l", place], check=True)


def test_full_disk(small_disk, checkpoint):
    place, enlarge = small_disk
    folder = checkpoint("llama", tokenizer=True)
    with LoopbackHub() as hub:
        hub.add("org/model", folder)
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(place), "HF_HUB_OFFLINE": "0"}

        def download():
            command = [sys.executable, "-W", "ignore", "-c", DOWNLOAD]
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

        for _ in range(2):
            assert download().startswith("HubError: The disk is full")
        enlarge()
        there = Path(download())
        assert {path.name: path.read_bytes() for path in there.iterdir()} == {
            path.name: path.read_bytes() for path in folder.iterdir()
        }
