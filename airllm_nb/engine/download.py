"""Fetches files of a model of the hub, on threads of their own: whoever asked is told how far it is, and may stop it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import constants, snapshot_download
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import tqdm

from airllm_nb.events import Fetching, Listener

T = TypeVar("T")

POLL = 0.2
"""Seconds between two looks at how far it is."""


class HubFile(NamedTuple):
    """A file of a repository: its name, its size in bytes, and how the hub's cache calls it; 0 and "" if the hub does not say."""

    name: str
    nbytes: int
    etag: str


def hub_file(listed: Any) -> HubFile:
    """Take from an entry of the hub's listing, with metadata, what is needed."""
    large = listed.lfs  # its hash is then the content's, not that of the few lines that git keeps
    return HubFile(listed.rfilename, listed.size or 0, (large["sha256"] if large else listed.blob_id) or "")


class StoppedError(Exception):
    """Ends the download's own threads; nobody waits for them any more."""


def download(
    repo: str,
    files: list[HubFile],
    *,
    patterns: list[str],
    revision: str | None,
    token: str | bool | None,
    progress: Listener | None,
) -> Path:
    """Download the files at the top of a repository that `patterns` name, and return the snapshot's folder.

    An interrupt, or an exception that the listener raises, ends it at once. What is under way then comes to an end with its next
    piece (up to 10 MB; where huggingface_hub is older than 1.0, with its file), and later goes on from there.

    Parameters
    ----------
    repo, revision, token
        As for ``snapshot_download``.
    files : list of HubFile
        The files that the listener is told of.
    patterns : list of str
        What to download.
    progress : callable(event) or None
        Told every fifth of a second, on the thread that calls.
    """
    stop = threading.Event()

    class Bar(tqdm):  # type: ignore[misc]  # shows nothing where someone listens, and is where a download can be stopped
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | ({"disable": True} if progress else {}))

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise StoppedError
            shown: bool | None = super().update(n)
            return shown

        def __iter__(self) -> Iterator[Any]:
            for item in super().__iter__():
                if stop.is_set():
                    raise StoppedError
                yield item

    def fetch() -> str:
        folder: str = snapshot_download(
            repo, revision=revision, token=token, allow_patterns=patterns, ignore_patterns="*/*", tqdm_class=Bar
        )
        return folder

    try:
        return Path(aside(fetch, _Watch(repo, files, progress) if progress else None))
    finally:
        stop.set()


def aside(call: Callable[[], T], meanwhile: Callable[[], object] | None = None) -> T:
    """Make a call on a thread of its own, so that an interrupt need not wait for it; return or raise what it does.

    Parameters
    ----------
    call : callable
        What may take long.
    meanwhile : callable, optional
        Called here every fifth of a second, and when it is over. What it raises is raised at once.
    """
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((True, call()))
        except BaseException as error:  # noqa: BLE001  # raised where it is waited for
            outcome.put((False, error))

    threading.Thread(target=run, name="airllm_nb-download", daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            succeeded, value = outcome.get(timeout=POLL)
            break
        if meanwhile is not None:
            meanwhile()
    if not succeeded:
        raise value
    if meanwhile is not None:
        meanwhile()
    result: T = value
    return result


class _Watch:
    """Tells a listener how much of each file is in the hub's cache: by looking, since the hub's own bars do not name files."""

    def __init__(self, repo: str, files: list[HubFile], progress: Listener) -> None:
        self._text = f"Downloading {repo} from the hub"
        self._folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
        self._files = [file for file in files if file.etag]
        self._told: dict[str, int] = {}
        self._progress = progress

    def __call__(self) -> None:
        for file in self._files:
            done = self._here(file)
            if self._told.get(file.name) != done:
                self._told[file.name] = done
                self._progress(Fetching(self._text, file.name, done, file.nbytes))
        self._progress(Fetching(self._text))  # also if nothing comes: a listener may want to stop it

    def _here(self, file: HubFile) -> int:
        """Return how many bytes are there: of the complete file, or of one of which more comes."""
        if (self._folder / file.etag).exists():
            return file.nbytes
        written = [0]
        for part in self._folder.glob(f"{file.etag}*.incomplete"):  # newer versions give each attempt a name of its own
            with contextlib.suppress(OSError):  # it has just become complete
                status = part.stat()
                # A file that is written in several places has holes.
                written.append(min(status.st_size, getattr(status, "st_blocks", 1 << 60) * 512))
        return min(max(written), file.nbytes)
