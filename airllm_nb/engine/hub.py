"""From what a user names, a folder or a model of the Hugging Face hub, to files on this machine."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
)

from airllm_nb.engine.download import HubFile, aside, download, hub_file
from airllm_nb.errors import AirLLMError, CheckpointError, HubError
from airllm_nb.events import Fetching

if TYPE_CHECKING:
    from collections.abc import Iterator, KeysView

    from airllm_nb.events import Listener

SINGLE = constants.SAFETENSORS_SINGLE_FILE
INDEX = constants.SAFETENSORS_INDEX_FILE
MAX_HEADER = 32 << 20  # for 200,000 tensors in one file; json makes a gigabyte of as many bytes, if they are bad enough
FIRST_READ = 100_000  # holds the whole header of nearly every file, which saves a second request
PLANNING_FILES = ["config.json", "generation_config.json", "tokenizer_config.json", INDEX, "*.py"]
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.model.v*", "*.py", "*.tiktoken", "*.txt"]  # all but the weights
HTTP_ERROR = HfHubHTTPError.__bases__[0]  # of the client in use: requests (an OSError), httpx (no OSError) or httpx2
AGAIN = "and run this again: files that are already complete are kept."
OTHER = "Choose another model or revision: one that transformers can load from .safetensors files."


def locate(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: Listener | None = None,
) -> Path:
    """Return the folder that holds a model's files, downloading into the hub's own cache what is not there yet.

    Parameters
    ----------
    model : str or path
        A local folder, or a model of the hub such as ``"org/name"``.
    revision : str, optional
        Branch, tag or commit on the hub.
    token : str or bool, optional
        Access token of the hub; by default the saved login.
    progress : callable(event), optional
        Told of `airllm_nb.events.Fetching` while files are downloaded; what it raises stops that.

    Returns
    -------
    Path
        The folder itself, or the snapshot in the hub's cache (also when the hub cannot be reached).

    Raises
    ------
    CheckpointError
        If the folder does not exist, or the repository holds no safetensors checkpoint.
    HubError
        If the model cannot be fetched.
    """
    if (local := _local_folder(model)) is not None:
        return local
    repo = os.fspath(model)
    if repo.lower().endswith(".gguf"):
        from airllm_nb.engine import gguf_hub

        return gguf_hub.locate(repo, revision, token, progress)
    with explained(repo, revision):
        folder, names, listed = _fetch(repo, SMALL_FILES, revision, token, progress)
        missing = _absent(folder, names)
        if missing:
            # By commit, so that a push in between cannot mix two versions.
            files = [listed[name] for name in names if name in listed]
            download_all(repo, missing, folder.name, token, files, progress)
        if _absent(folder, names):
            raise ConnectionError  # old versions then return a partial snapshot without a word
    return folder


def locate_headers(
    model: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> tuple[Path, dict[str, tuple[int, bytes]] | None]:
    """Return what planning needs, without downloading any weights.

    Parameters
    ----------
    model, revision, token
        As for `locate`.

    Returns
    -------
    folder : Path
        The folder with at least ``config.json`` and the index.
    headers : dict of str to (int, bytes), or None
        Size and first bytes (length and header) of every safetensors file; None if the files are all in the folder.

    Raises
    ------
    CheckpointError, HubError
        As `locate`, and if a weight file is not a safetensors file.
    """
    if (local := _local_folder(model)) is not None:
        return local, None
    repo = os.fspath(model)
    if repo.lower().endswith(".gguf"):
        from airllm_nb.engine import gguf_hub

        return gguf_hub.locate_header(repo, revision, token)
    with explained(repo, revision):
        folder, names, _ = _fetch(repo, PLANNING_FILES, revision, token)
        if not _absent(folder, names):
            return folder, None
        with ThreadPoolExecutor(8) as pool:
            headers = pool.map(lambda name: _read_header(repo, name, folder.name, token), names)
            return folder, dict(zip(names, headers, strict=True))


def _local_folder(model: str | os.PathLike[str]) -> Path | None:
    """Return the folder or the GGUF file that `model` names, or None if it can only be a model of the hub."""
    text = os.fspath(model)
    path = Path(os.path.expanduser(text))  # noqa: PTH111  # Path.expanduser raises on an unknown "~name"
    try:
        is_folder, is_file = bool(text) and path.is_dir(), bool(text) and path.is_file()
    except OSError:  # a name that no file system takes
        is_folder = is_file = False
    if is_folder:
        return path.absolute()  # the notebook may change its folder while layers stream
    if is_file and path.suffix.lower() == ".gguf":
        return path.absolute()
    if is_file:
        raise CheckpointError(
            f'"{text}" cannot be loaded: it is a file, not a folder.',
            "Name the folder that holds config.json and the .safetensors files, or a model of the hub as org/name.",
        )
    on_hub = 2 if text.lower().endswith(".gguf") else 1  # org/name, org/name/file.gguf
    if not isinstance(model, str) or path.is_absolute() or text.startswith((".", "~")) or text.count(os.sep) > on_hub:
        what = "file" if on_hub > 1 else "folder"
        raise CheckpointError(f'There is no {what} "{text}".', "Check the path, or name a model of the hub as org/name.")
    return None


def _fetch(
    repo: str, patterns: list[str], revision: str | None, token: str | bool | None, progress: Listener | None = None
) -> tuple[Path, list[str], dict[str, HubFile]]:
    """Download the files that `patterns` name; return the folder, the names of the weight files, and what the hub lists."""
    commit, listed = revision, {}
    try:
        info = info_of(repo, revision, token, progress)
        commit, listed = info.sha, {file.rfilename: hub_file(file) for file in info.siblings or ()}
        _check_listing(repo, listed.keys())
        folder = download_all(repo, patterns, revision, token, [], progress)
    except (OSError, HTTP_ERROR):
        # No network, an expired login or a cache that only others may write: none matters if all is there.
        if (cached := _cached(repo, commit)) is None:
            raise
        return cached, _weight_files(cached), listed
    names = [SINGLE] if SINGLE in listed else _weight_files(folder)
    if absent := [name for name in names if name not in listed]:
        raise CheckpointError(f'The index of "{repo}" names {absent[0]}, which the repository does not hold.', OTHER)
    return folder, names, listed


def info_of(repo: str, revision: str | None, token: str | bool | None, progress: Listener | None) -> Any:
    """Ask the hub what is in a repository."""
    timeout = constants.HF_HUB_ETAG_TIMEOUT

    def ask() -> Any:
        return HfApi().model_info(repo, revision=revision, token=token, timeout=timeout, files_metadata=True)

    return aside(ask, progress and (lambda: progress(Fetching(f"Looking for {repo} on the hub"))))


def download_all(
    repo: str,
    patterns: list[str],
    revision: str | None,
    token: str | bool | None,
    files: list[HubFile],
    progress: Listener | None,
) -> Path:
    """Download the files at the top of a repository that `patterns` name; return the snapshot's folder."""
    try:
        return download(repo, files, patterns=patterns, revision=revision, token=token, progress=progress)
    except RuntimeError as error:  # hf_xet, which fetches large files, raises it for network and disk alike
        raise OSError(str(error)) from error


def _cached(repo: str, revision: str | None) -> Path | None:
    """Return the snapshot in the hub's cache, if everything that is needed is in it."""
    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return None if _absent(folder, _weight_files(folder)) else folder


def _absent(folder: Path, names: list[str]) -> list[str]:
    return [name for name in names if not (folder / name).is_file()]


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the safetensors files that make up the checkpoint of `folder`."""
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():  # with both, transformers takes the single file
        return [SINGLE]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        usable = bool(names) and all(name.endswith(".safetensors") and Path(name).name == name for name in names)
    except (ValueError, LookupError, TypeError, AttributeError):
        usable = False
    if not usable:
        raise CheckpointError(f"{index} is no index of safetensors files.", OTHER)
    return names


def _check_listing(repo: str, listed: KeysView[str]) -> None:
    """Refuse, before anything is downloaded, a repository without a safetensors checkpoint."""
    if not listed & {SINGLE, INDEX}:
        pickles = sorted(name for name in listed if name.endswith((".bin", ".pth", ".pt")))
        if any(name.lower().endswith(".gguf") for name in listed):
            from airllm_nb.engine import gguf_hub

            raise gguf_hub.several(repo, listed)
        if pickles and not any(name.endswith(".safetensors") for name in listed):
            raise CheckpointError(
                f'"{repo}" holds only pickled weights ({pickles[0]}), and loading a pickle can run any code.',
                f'Convert it once where you trust it: AutoModelForCausalLM.from_pretrained("{repo}").save_pretrained('
                'folder); or, if its page on the hub shows a pull request that adds safetensors: revision="refs/pr/1".',
            )
        raise CheckpointError(f'"{repo}" holds neither {SINGLE} nor {INDEX}.', OTHER)
    if "config.json" not in listed:
        raise CheckpointError(f'"{repo}" has no config.json.', OTHER)


def _read_header(repo: str, name: str, revision: str, token: str | bool | None) -> tuple[int, bytes]:
    """Return size and first bytes (length and header) of a safetensors file on the hub."""
    size, raw = read_range(repo, name, revision, token, 0, FIRST_READ)
    stop = 8 + int.from_bytes(raw[:8], "little")
    if stop > min(8 + MAX_HEADER, size):
        raise CheckpointError(f'{name} of "{repo}" is no safetensors file, or is truncated.', OTHER)
    if len(raw) < stop:
        raw += read_range(repo, name, revision, token, len(raw), stop)[1]
    return size, raw[:stop]


def read_range(repo: str, name: str, revision: str, token: str | bool | None, start: int, stop: int) -> tuple[int, bytes]:
    """Return the size of a file on the hub, and its bytes from `start` to `stop`."""
    headers = {**build_hf_headers(token=token), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    url, timeout = hf_hub_url(repo, name, revision=revision), constants.HF_HUB_DOWNLOAD_TIMEOUT
    response = http_backoff("GET", url, headers=headers, timeout=timeout, max_retries=2)
    hf_raise_for_status(response)
    if len(response.content) < int(response.headers.get("Content-Length", 0)):
        raise ConnectionError  # urllib3 1 does not tell
    size = response.headers.get("Content-Range", "").rpartition("/")[2]  # absent if the whole file came
    return int(size or len(response.content)), response.content


@contextlib.contextmanager
def explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises for expected failures into errors with a cause and a remedy."""
    try:
        yield
    except (OSError, HTTP_ERROR, HFValidationError) as error:
        if (explained := _explain(error, repo, revision)) is None:
            raise
        raise explained from error


def _explain(  # one flat table is easier to read than parts of it  # noqa: C901, PLR0912  # one branch for each thing that can go wrong
    error: Exception, repo: str, revision: str | None
) -> AirLLMError | None:
    """Return the cause and the remedy, or None for what is no expected failure."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "not in the cache" is the consequence, this is the reason
    login = "`huggingface_hub.login()` (in a terminal: `hf auth login`, or the older `huggingface-cli login`)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    match error:
        case HFValidationError():
            cause = f'"{repo}" is no local folder, and no valid name of a model on the hub.'
            remedy = "Name a local folder, or a model of the hub as org/name."
        case GatedRepoError():
            cause = f'"{repo}" is gated: its owner decides who may download it.'
            remedy = f"Ask for access at {constants.ENDPOINT}/{repo}, then log in with {login} or pass `token=`."
        case RepositoryNotFoundError():
            cause = f'There is no folder "{repo}" here, and no such repository on the hub, or it is private.'
            remedy = f"Check the spelling; for a private one log in with {login} or pass a valid `token=`."
        case RevisionNotFoundError():
            cause = f'"{repo}" has no revision "{revision}".'
            remedy = f"Choose a branch, tag or commit that {constants.ENDPOINT}/{repo}/tree/main shows."
        case LocalTokenNotFoundError():
            cause = "`token=True` asks for the saved login of the hub, and there is none."
            remedy = f"Log in with {login}, or pass the token itself."
        case OfflineModeIsEnabled():
            cause = f'HF_HUB_OFFLINE is set, and "{repo}" is not complete in the cache ({constants.HF_HUB_CACHE}).'
            remedy = "Load it once with HF_HUB_OFFLINE unset and the kernel restarted, or name a local folder."
        case HfHubHTTPError() if status in (401, 403):
            cause = f'The hub refuses access to "{repo}" (HTTP {status}).'
            remedy = f"If your token is old or mistyped, log in again with {login} or pass a valid `token=`."
        case HfHubHTTPError() if status is not None:
            cause = f'The hub answered with HTTP {status} when asked for "{repo}".'
            remedy = f"Wait a little {AGAIN}"
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):  # hf_xet's
            cause = f'The disk is full: "{repo}" does not fit into the cache ({constants.HF_HUB_CACHE}).'
            remedy = f"Set HF_HOME to a folder on a larger disk and restart the kernel, or free space {AGAIN}"
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS):
            cause = f"The cache of the hub cannot be written: {error}."
            remedy = "Make it writable, or set HF_HOME to a folder of yours and restart the kernel."
        case OSError(errno=int()) if not isinstance(error, (ConnectionError, TimeoutError)):
            return None
        case _:
            cause = f'The connection to the hub failed ({type(error).__name__}), and "{repo}" is not complete in the cache.'
            remedy = f"Check the network {AGAIN}"
    return HubError(cause, remedy)
