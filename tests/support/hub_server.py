"""A local server that speaks the hub's protocol over real HTTP: commits, gates, ranges, redirects."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest

LFS = (".safetensors", ".gz", ".bin")


@dataclass(frozen=True)
class Request:
    """One request: `range` is "" without the header, `status` the status of the answer."""

    method: str
    path: str
    range: str
    status: int


@dataclass
class Repository:
    """Commits by sha, newest last; each is a folder that must not change. Branches and tags name commits."""

    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


class Hub:
    """The server's content and its log. `url` is what HF_ENDPOINT takes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.tokens: set[str] = set()
        """Tokens that may read gated and private repositories."""
        self.status = 0
        """When set, every request is answered with this status: 503 for a hub that is down."""
        self.ranges = True
        """When unset, whole files are sent to who asks for a part, as some mirrors do."""
        self.requests: list[Request] = []

    def add(
        self,
        repo: str,
        folder: Path,
        kind: str = "model",
        refs: tuple[str, ...] = ("main",),
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """Commit the files of a folder to a repository, move `refs` there, and return the sha of the commit."""
        repository = self.repositories.setdefault((kind, repo), Repository())
        repository.gated, repository.private = gated, private
        digest = hashlib.sha1(f"{len(repository.commits)}".encode())
        for path in files_of(folder):
            digest.update(str(path).encode() + (folder / path).read_bytes())
        repository.commits[digest.hexdigest()] = folder
        repository.refs |= dict.fromkeys(refs, digest.hexdigest())
        return digest.hexdigest()

    def downloads(self, suffix: str = "") -> list[str]:
        """Return the names of the files sent whole so far, in order, that end in `suffix`."""
        sent = [r.path for r in self.requests if r.method == "GET" and r.status == 200 and "/api/" not in r.path]
        return [Path(path).name for path in sent if path.endswith(suffix)]

    def environment(self, cache: Path) -> dict[str, str]:
        """Return the environment variables of a process that talks to this hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
        }

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Make this process talk to this hub; huggingface_hub reads its environment only once, at import."""
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name, value in self.environment(cache).items():
            monkeypatch.setenv(name, value)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a hub on 127.0.0.1 while the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


def files_of(folder: Path) -> list[Path]:
    """Return every file below a folder, as paths relative to it."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _answer(self) -> None:
        self.hub: Hub = self.server.hub  # type: ignore[attr-defined]
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        if self.hub.status:
            return self._send(self.hub.status, {"X-Error-Message": "the hub is down"})
        if match := re.fullmatch(r"/lfs/(model|dataset)/(.+)/([0-9a-f]{40})/(.+)", path):
            kind, repo, sha, name = match.groups()
            return self._send_file(self.hub.repositories[kind, repo].commits[sha] / name, {})
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/([^/]+)/([^/]+)(/.*)?)?", path):
            kind, repo, what, revision, _ = match.groups()
            return self._api(kind, repo, what or "revision", revision or "main")
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            prefix, repo, revision, name = match.groups()
            return self._resolve("dataset" if prefix else "model", repo, revision, name)
        return self._send(404, {"X-Error-Message": f"no such route {path}"})

    def _find(self, kind: str, repo: str, revision: str) -> tuple[Repository, str] | None:
        """Return the repository and the sha of the commit; None where it has sent the error."""
        found = self.hub.repositories.get((kind, repo))
        if found is None or (found.private and not self._logged_in()):
            self._send(401 if not self._token() else 404, {"X-Error-Code": "RepoNotFound"})
            return None
        sha = found.refs.get(revision, revision)
        if sha not in found.commits:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return found, sha

    def _api(self, kind: str, repo: str, what: str, revision: str) -> None:
        """Send repository info, tree or paths-info, for gated repositories too, as the hub does."""
        found = self._find(kind, repo, revision)
        if found is None:
            return None
        repository, sha = found
        folder = repository.commits[sha]
        files = {str(path): (folder / path).read_bytes() for path in files_of(folder)}
        if what == "revision":
            siblings = [
                {"rfilename": name} | ({"size": len(data), "blobId": _git_sha(data)} if "blobs" in self.query else {})
                for name, data in files.items()
            ]
            info = {"_id": sha[:24], "id": repo, "sha": sha, "siblings": siblings, "tags": []}
            return self._send_json(info | {"private": repository.private, "gated": repository.gated and "auto"})
        if what == "paths-info":
            wanted = json.loads(self.body)["paths"]
            files = {name: data for name, data in files.items() if name in wanted}
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": _git_sha(data)}
            | ({"lfs": {"oid": _sha256(data), "size": len(data), "pointerSize": 134}} if _is_lfs(name) else {})
            for name, data in files.items()
        ]
        return self._send_json(entries)

    def _resolve(self, kind: str, repo: str, revision: str, name: str) -> None:
        found = self._find(kind, repo, revision)
        if found is None:
            return None
        repository, sha = found
        if repository.gated and not self._logged_in():
            return self._send(403 if self._token() else 401, {"X-Error-Code": "GatedRepo"})
        path = repository.commits[sha] / name
        commit = {"X-Repo-Commit": sha}
        if not path.is_file():
            return self._send(404, commit | {"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        if not _is_lfs(name):
            return self._send_file(path, commit | {"ETag": f'"{_git_sha(data)}"'})
        headers = commit | {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{_sha256(data)}"'}
        # Another host, as the hub's content network is: no HEAD may follow there, no token be sent.
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
        return self._send(302, headers | {"Location": f"{elsewhere}/lfs/{kind}/{repo}/{sha}/{name}"})

    def _send_file(self, path: Path, headers: Mapping[str, str]) -> None:
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or not self.hub.ranges:
            return self._send(200, headers, data)
        first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        if first > last:
            return self._send(416, {"Content-Range": f"bytes */{len(data)}"})
        span = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        return self._send(206, {**headers, **span}, data[first : last + 1])

    def _send_json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.hub.requests.append(
            Request(self.command, unquote(urlsplit(self.path).path), self.headers.get("Range", ""), status)
        )
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _logged_in(self) -> bool:
        return self._token() in self.hub.tokens

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the log is `Hub.requests`."""


def _is_lfs(name: str) -> bool:
    return name.endswith(LFS)


def _git_sha(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
