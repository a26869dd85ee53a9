"""One GGUF file of a repository of the hub: ``org/name/file.gguf``."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from airllm_nb.engine import hub
from airllm_nb.engine.download import hub_file
from airllm_nb.engine.gguf_header import HeaderEndsError, read_factors, read_header
from airllm_nb.engine.gguf_parts import COUNT
from airllm_nb.engine.home import GGUF_FOLDER, cache_home, describe
from airllm_nb.errors import AirLLMError, CheckpointError, UnsupportedError
from airllm_nb.events import Listener

FIRST_READ = 4 << 20
"""Bytes of the first request for a header, doubled until it is whole: a vocabulary of 150,000 tokens takes some more."""
VERSION = "2"  # counted up when another part of the same file is kept
DIGITS = 12
SHOWN = 5
USUAL = ("q4_k_m", "q4_0", "q8_0")
NO_MODEL = re.compile(r"mmproj|imatrix|-\d{5}-of-\d{5}\.", re.IGNORECASE)
"""Parts of a model, or of a file."""
Headers = dict[str, tuple[int, bytes]]


def locate(name: str, revision: str | None, token: str | bool | None, progress: Listener | None) -> Path:
    """Return a file in the hub's cache, downloaded if it is not there yet, and if it is one that can be read.

    Parameters
    ----------
    name : str
        ``org/name/file.gguf``.
    revision, token, progress
        As for `hub.locate`.

    Raises
    ------
    CheckpointError, UnsupportedError
        If the repository has no such file, or it is refused: as its header tells before anything else is fetched.
    HubError
        If it cannot be fetched.
    """
    _require_supported()
    repo, file = _split(name)
    with hub.explained(repo, revision):
        try:
            info = hub.info_of(repo, revision, token, progress)
        except (OSError, hub.HTTP_ERROR):
            if (cached := _cached(repo, file, revision)) is None:
                raise
            return cached
        listed = {entry.rfilename: hub_file(entry) for entry in info.siblings or ()}
        _require(repo, file, listed)
        if (cached := _cached(repo, file, info.sha)) is None:
            _header(repo, file, info.sha, token)
            # By the name of the revision, which the cache then knows without the hub.
            cached = hub.download_all(repo, [file], revision, token, [listed[file]], progress) / file
    return cached


def locate_header(name: str, revision: str | None, token: str | bool | None) -> tuple[Path, Headers | None]:
    """Return a file in the hub's cache, or of its size with only its header in it: then no headers, instead of None.

    Parameters, errors
        As for `locate`.
    """
    _require_supported()
    repo, file = _split(name)
    with hub.explained(repo, revision):
        try:
            info = hub.info_of(repo, revision, token, None)
        except (OSError, hub.HTTP_ERROR):
            if (cached := _cached(repo, file, revision)) is None:
                raise
            return cached, None
        _require(repo, file, [entry.rfilename for entry in info.siblings or ()])
        if (cached := _cached(repo, file, info.sha)) is not None:
            return cached, None
        key = hashlib.sha256(f"{VERSION} {repo} {info.sha}".encode()).hexdigest()[:DIGITS]
        path = cache_home() / GGUF_FOLDER / f"header-{key}" / file
        if not path.is_file():
            _write(repo, path, *_header(repo, file, info.sha, token))
    return path, {}


def several(repo: str, listed: Iterable[str]) -> AirLLMError:
    """Return the refusal of a repository that has only GGUF files, of which one is to be named."""
    names = sorted(name for name in listed if name.lower().endswith(".gguf") and "/" not in name and not NO_MODEL.search(name))
    if not names:
        return CheckpointError(f'"{repo}" holds GGUF files only, and each is a part of a model or in a folder.', hub.OTHER)
    usual = [name for word in USUAL for name in names if word in name.lower()]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return CheckpointError(
        f'"{repo}" holds GGUF files only: {", ".join(names[:SHOWN])}{more}.',
        f"Name one: %airllm load {repo}/{(usual or names)[0]}",
    )


def _require_supported() -> None:
    from airllm_nb.compat import gguf_files  # and so PyTorch and transformers, which a refusal by name need not wait for

    gguf_files.require_supported()


def _split(name: str) -> tuple[str, str]:
    repo, _, file = name.rpartition("/")
    if repo.count("/") != 1:
        raise CheckpointError(f'There is no file "{name}".', "Check the path, or name a file of the hub as org/name/file.gguf.")
    return repo, file


def _require(repo: str, file: str, listed: Iterable[str]) -> None:
    if file in listed:
        return
    if not any(name.lower().endswith(".gguf") for name in listed):
        raise CheckpointError(f'"{repo}" has no file {file}, and no other GGUF file.', f"Name the model alone: {repo}")
    refusal = several(repo, listed)
    raise CheckpointError(f'"{repo}" has no file {file}. {refusal.cause}'.replace(" only", ""), refusal.remedy)


def _cached(repo: str, file: str, revision: str | None) -> Path | None:
    found = try_to_load_from_cache(repo, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _header(repo: str, file: str, commit: str, token: str | bool | None) -> tuple[int, dict[int, bytes]]:
    """Return a file's size, and by their offsets its header and what else makes the config; refuse what is fetched in vain."""
    size, raw = hub.read_range(repo, file, commit, token, 0, FIRST_READ)
    while True:
        try:
            header = read_header(io.BytesIO(raw), file, size)
            break
        except HeaderEndsError:
            if len(raw) >= min(size, hub.MAX_HEADER):
                raise
        raw += hub.read_range(repo, file, commit, token, len(raw), 2 * len(raw))[1]
    from airllm_nb.compat.gguf_exact import require_exact, settings

    parts = {0: raw}

    def read(start: int, count: int) -> bytes:
        if start + count <= len(raw):
            return raw[start : start + count]
        parts[start] = hub.read_range(repo, file, commit, token, start, start + count)[1]
        return parts[start]

    if (count := header.fields.get(COUNT) or 1) != 1:
        raise UnsupportedError(
            f"{file} is one of {count} parts of a model, which are not fetched.",
            "Download all of them into one folder, then load one of them by its path.",
        )
    require_exact(file, header.architecture, header.fields)
    settings(file, header.architecture, header.fields, read_factors(header, file, read))
    return size, parts


def _write(repo: str, path: Path, size: int, parts: dict[int, bytes]) -> None:
    """Write a file of a size that has only some parts, and takes no more room than they."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".header-", dir=path.parent) as temporary:
            whole = Path(temporary) / path.name
            with whole.open("wb") as file:
                for offset, raw in parts.items():
                    file.seek(offset)
                    file.write(raw)
                file.truncate(size)
            os.replace(whole, path)  # noqa: PTH105
        describe(path.parent, repo, "headers of GGUF files", "the hub")
    except OSError as error:
        raise AirLLMError(
            f"The header of {path.name} cannot be written to {path.parent}: {error.strerror or error}.",
            "Set AIRLLM_NB_HOME to a folder that you can write to.",
        ) from error
