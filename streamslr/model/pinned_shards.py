"""Shards of a dense model, held to the content that a run read first; headers alone do not show other weights."""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from streamslr.errors import InputError, ResumeError
from streamslr.io.durable import file_sha256

Times = tuple[int, int]
"""When a file was last written and when its entry last changed, in ns. `cp -p` keeps the first, nothing the second."""

log = logging.getLogger("streamslr")


@dataclass(frozen=True)
class ShardDigest:
    """Content of one shard of the dense model, as a run first read it."""

    sha256: str
    nbytes: int


@dataclass(frozen=True)
class _Seen:
    """A file as the system describes it: another one, or one that was written again, has another description."""

    path: Path
    nbytes: int
    times: Times


class PinnedShards:
    """Digests of the shards that a run has read, in this process or an earlier one.

    Each shard is read whole once in a process, on a thread of its own, when the first of its tensors is wanted; the
    tensors then come from the system's cache. Safe to use from several threads.

    Attributes:
        digests: content of each shard by its name.
        times: for each shard, when its file was last written and changed, also where it was not read yet.
    """

    def __init__(self, digests: Mapping[str, ShardDigest], times: Mapping[str, Times]) -> None:
        self.digests, self.times = dict(digests), dict(times)
        self._seen: dict[str, _Seen] = {}  # what was last hashed, or is being hashed
        self._hashing: list[tuple[str, _Seen, Future[str]]] = []
        self._lock = threading.Lock()

    def read(self, shard: str, path: Path) -> bool:
        """Begin to hash a shard that is about to be read; return False where this process has done so already."""
        with self._lock:
            seen = _describe(path)
            if self._seen.get(shard) == seen:
                return False
            self._seen[shard] = seen
            self._hashing.append((shard, seen, _in_background(lambda: file_sha256(path))))
            return True

    def wait(self) -> None:
        """Wait for the digests of all shards read so far: their files may be deleted then. Errors as `check`."""
        with self._lock:
            while self._hashing:
                shard, seen, digest = self._hashing.pop(0)
                self._compare(shard, seen, digest.result())

    def check_earlier(self, files: Mapping[str, Path]) -> None:
        """Compare files with what an earlier process knew of them. Only what has another size or time is read.

        Args:
            files: the shards that are on this machine, by name.

        Raises:
            ResumeError: a shard has other content.
        """
        for shard, path in files.items():
            seen, digest = _describe(path), self.digests.get(shard)
            if self.times.get(shard, seen.times) == seen.times and (digest is None or digest.nbytes == seen.nbytes):
                self.times[shard] = seen.times
            elif digest is None:
                log.warning("%s was written or moved since this run began, which has not read it before", path)
                self.times[shard] = seen.times
            else:
                self._compare(shard, seen, file_sha256(path))
                self._seen[shard] = seen
                log.info("%s was written or moved since this run read it, and its content is the same", path)

    def check(self) -> None:
        """Wait for the digests of all shards read so far; read again what was written since then.

        Raises:
            ResumeError: a shard has other content than when the run read it first.
            InputError: a shard cannot be read.
        """
        self.wait()
        with self._lock:
            for shard, seen in self._seen.items():
                if seen.path.is_file() and (now := _describe(seen.path)) != seen:
                    self._compare(shard, now, file_sha256(now.path))
                    self._seen[shard] = now

    def _compare(self, shard: str, seen: _Seen, sha256: str) -> None:
        found = ShardDigest(sha256, seen.nbytes)
        first = self.digests.setdefault(shard, found)
        if found != first:
            raise ResumeError(
                f"{seen.path} has changed since this run first read it (sha256 {first.sha256[:12]}… then, "
                f"{sha256[:12]}… now): the result would be a mix of two models. Put the earlier file back and start "
                f"the same line again, or give another --out"
            )
        self.times[shard] = seen.times


def _describe(path: Path) -> _Seen:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; copy or download the file again") from error
    return _Seen(path, status.st_size, (status.st_mtime_ns, status.st_ctime_ns))


def _in_background(work: Callable[[], str]) -> Future[str]:
    """Do `work` on a thread that does not keep the process alive: Ctrl-C must not wait for it."""
    result: Future[str] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="shard-hasher", daemon=True).start()
    return result
