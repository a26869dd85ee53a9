"""A hub on 127.0.0.1: real HTTP, real huggingface_hub, no network.

It speaks what huggingface_hub (0.23 to 2) asks of https://huggingface.co when it downloads a model: the repository's
information, its tree, and the files themselves with ETag, commit, range requests and, as on the real hub, a redirect
from the repository to the place where large files lie.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from pathlib import Path

API = re.compile(r"/api/models/(?P<repo>.+?)(/revision/(?P<revision>[^/]+)|/tree/(?P<tree>[^/]+))?")
FILE = re.compile(r"(?P<cdn>/cdn)?/(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass(frozen=True)
class Request:
    """One request as it was answered: `sent` counts the bytes of the body."""

    method: str
    path: str
    file: str
    sent: int
    authorization: str | None


@dataclass
class Repo:
    """A local folder, served as a repository."""

    folder: Path
    gated: bool = False
    private: bool = False
    revisions: dict[str, str] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)  # file -> the connection breaks at this offset
    ignores_range: bool = False
    waits: dict[str, threading.Event] = field(default_factory=dict)  # file -> the rest comes when it is set

    def files(self) -> list[str]:
        """All files, by path inside the repository."""
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())


class LoopbackHub:
    """Serves folders as repositories while it is entered as a context.

    Examples
    --------
    >>> with LoopbackHub() as hub:
    ...     hub.add("org/name", folder)
    ...     subprocess.run(..., env={**os.environ, "HF_ENDPOINT": hub.url})
    ...     hub.sent("model.safetensors")
    """

    token = "hf_of_somebody_with_access"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.status: int | None = None  # answer everything with this error
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop serving: from now on connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, folder: Path, **options: object) -> Repo:
        """Serve `folder` as the repository `name`, with one commit that "main" names."""
        repo = Repo(folder, **options)
        repo.revisions.setdefault("main", hashlib.sha1(name.encode()).hexdigest())
        self.repos[name] = repo
        return repo

    def sent(self, file: str) -> int:
        """Bytes of `file` that were sent in answer to GET requests."""
        return sum(request.sent for request in self.requests if request.file == file)

    def files_asked_for(self) -> set[str]:
        """Names of all files that were asked for, by HEAD or GET."""
        return {request.file for request in self.requests if request.file}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open, as the real hub does

    def do_GET(self) -> None:
        hub = self.server.hub
        # The revision is one quoted segment: match before unquoting, so that "refs%2Fpr%2F1" stays one.
        match = FILE.fullmatch(self.path) or API.fullmatch(self.path.partition("?")[0])
        parts = {key: value and unquote(value) for key, value in match.groupdict().items()} if match else {}
        repo = hub.repos.get(parts.get("repo") or "")
        authorized = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if hub.status is not None:
            self.answer(hub.status, b"")
        elif repo is None or (repo.private and not authorized):
            self.answer(404 if self.headers.get("Authorization") else 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif (commit := self.commit(repo, parts)) is None:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif "file" not in parts:
            self.answer_api(repo, parts, commit)
        elif repo.gated and not authorized and not parts["cdn"]:
            self.answer(403 if self.headers.get("Authorization") else 401, b"", {"X-Error-Code": "GatedRepo"})
        elif parts["file"] not in repo.files():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            self.answer_file(repo, parts, commit)

    def do_HEAD(self) -> None:
        self.do_GET()

    def commit(self, repo: Repo, parts: dict[str, str | None]) -> str | None:
        revision = parts.get("revision") or parts.get("tree") or "main"
        return revision if revision in repo.revisions.values() else repo.revisions.get(revision)

    def answer_api(self, repo: Repo, parts: dict[str, str | None], commit: str) -> None:
        if parts["tree"]:
            sizes = {name: (repo.folder / name).stat().st_size for name in repo.files()}
            body = [{"type": "file", "path": name, "size": size, "oid": _etag(name.encode())} for name, size in sizes.items()]
        else:
            siblings = [_sibling(repo.folder, name, blobs="blobs=true" in self.path.lower()) for name in repo.files()]
            flags = {"private": repo.private, "gated": repo.gated, "disabled": False}
            counts = {"downloads": 0, "likes": 0, "tags": []}
            body = {
                "id": parts["repo"],
                "modelId": parts["repo"],
                "sha": commit,
                "siblings": siblings,
                **flags,
                **counts,
            }
        self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def answer_file(self, repo: Repo, parts: dict[str, str | None], commit: str) -> None:
        name = parts["file"]
        body = (repo.folder / name).read_bytes()
        about = {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if name.endswith(".safetensors") and not parts["cdn"]:
            about |= {
                "X-Linked-Size": str(len(body)),
                "X-Linked-Etag": about["ETag"],
                "Location": f"{self.server.hub.url}/cdn{self.path}",
            }
            return self.answer(302, b"", about, file=name)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted or repo.ignores_range:
            return self.answer(200, body, about, name, repo.broken.get(name), repo.waits.get(name))
        start, stop = int(wanted[1]), min(int(wanted[2] or len(body)) + 1, len(body))
        if start >= len(body):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(body)}"}, name)
        about["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        breaks_at = max(0, repo.broken[name] - start) if name in repo.broken else None
        return self.answer(206, body[start:stop], about, name, breaks_at)

    def answer(self, status, body, headers=None, file="", breaks_at=None, waits=None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        sent = body[:breaks_at] if self.command == "GET" else b""
        # Before the bytes go out: who has received them must find them in the log.
        self.server.hub.requests.append(Request(self.command, self.path, file, len(sent), self.headers.get("Authorization")))
        half = len(sent) // 2
        self.wfile.write(sent[:half])
        if waits is not None and sent:
            waits.wait()
        self.wfile.write(sent[half:])
        if self.command == "GET" and len(sent) < len(body):
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Keep the tests' output clean."""


def _sibling(folder: Path, name: str, *, blobs: bool) -> dict:
    if not blobs:
        return {"rfilename": name}
    body = (folder / name).read_bytes()
    about = {"rfilename": name, "size": len(body), "blobId": _etag(body)}
    if name.endswith(".safetensors"):
        about |= {"blobId": "of the pointer", "lfs": {"sha256": _etag(body), "size": len(body), "pointerSize": 134}}
    return about


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
