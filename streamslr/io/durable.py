"""Files that last: written whole or not at all, in a folder that one process holds, on a disk with space for them."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from streamslr.config import format_bytes
from streamslr.errors import BudgetError, InputError, ResumeError, StreamslrError
from streamslr.outside import open_regular

PARTIAL_SUFFIX = ".partial"
"""End of a file's name until it is whole. A later attempt at the same file replaces a leftover one."""

_SLICE = 64 << 20
"""Bytes hashed and written at once: large enough that the calls cost nothing, small enough that Ctrl-C acts soon."""


class DurableFile:
    """File that `durable_file` is writing."""

    def __init__(self, path: Path, nbytes: int, file: FileIO) -> None:
        self._path, self._nbytes, self._file = path, nbytes, file
        self._digest = hashlib.sha256()

    def write(self, content: bytes | memoryview) -> None:
        """Append `content`. Errors as `durable_file`."""
        view = memoryview(content)
        for start in range(0, len(view), _SLICE):
            part = view[start : start + _SLICE]
            self._digest.update(part)
            with _named_errors(self._path, self._nbytes):
                while len(part):
                    part = part[self._file.write(part) :]

    @property
    def sha256(self) -> str:
        """Digest of all bytes written so far, as hex."""
        return self._digest.hexdigest()


@contextmanager
def durable_file(path: Path, nbytes: int) -> Iterator[DurableFile]:
    """Write the file `path` durably: a power cut after the block cannot undo it.

    The bytes go to a partial file, which is flushed to the disk and then renamed to `path`; a file of that name is
    replaced. Whatever fails on the way, the partial file is removed. After kill -9 it may stay, but never under the
    final name.

    Args:
        path: file to write, in a folder that exists.
        nbytes: size of the whole file, for the error message.

    Yields:
        The file to write to.

    Raises:
        BudgetError: the disk is full.
        StreamslrError: the system refuses the file.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with _named_errors(path, nbytes):
            partial.unlink(missing_ok=True)
            # 0o666: the umask decides who may read, as for any file the user makes.
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            yield DurableFile(path, nbytes, file)
            with _named_errors(path, nbytes):
                os.fsync(file.fileno())
                partial.replace(path)
                fsync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: bytes) -> str:
    """Write a small file durably and return its sha256. Errors as `durable_file`."""
    with durable_file(path, len(content)) as file:
        file.write(content)
    return file.sha256


def copy_file(source: Path, path: Path) -> str:
    """Copy a regular file durably, piece by piece, and return its sha256.

    Raises:
        InputError: `source` cannot be read, or is no regular file. Other errors as `durable_file`.
    """
    with open_regular(source) as opened, durable_file(path, os.fstat(opened.fileno()).st_size) as file:
        while piece := opened.read(_SLICE):
            file.write(piece)
    return file.sha256


def write_json(path: Path, obj: Any) -> str:
    """Write `obj` durably as JSON (sorted keys, indented, a newline at the end) and return the file's sha256."""
    text = json.dumps(obj, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return write_file(path, text.encode())


def file_sha256(path: Path) -> str:
    """Return the digest of a regular file as hex. Raises InputError where it cannot be read."""
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error


def is_as_written(path: Path, sha256: str) -> bool:
    """Return True for a file that is there with the content of this digest. Raises InputError as `file_sha256`."""
    return path.is_file() and file_sha256(path) == sha256


def fsync_folder(folder: Path) -> None:
    """Make the renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot fsync a folder, and offer nothing instead.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def lock_folder(folder: Path, advice: str) -> Iterator[None]:
    """Hold `folder`, which is made if it is missing, so that no other process writes it meanwhile.

    The lock is on the folder itself, so no lock file can be left behind; it ends with the process.

    Args:
        folder: folder to lock.
        advice: advice to the user in the error message, such as "give another --out".

    Raises:
        ResumeError: another process holds the folder, or it cannot be made or opened.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ResumeError(f"{folder} cannot be made or opened: {error.strerror}; {advice}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResumeError(f"another process is writing {folder}; wait for it, or {advice}") from error
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that are still to be written into a folder. The folder need not exist yet."""

    folder: Path
    what: str
    """Name of the bytes in the error message."""
    nbytes: int
    advice: str
    """Advice to the user in the error message, such as "give --out on another disk"."""


def require_disk_space(*needs: DiskNeed) -> None:
    """Raise BudgetError when a file system has less space free than all needs on it together."""
    by_disk: dict[int, list[tuple[Path, DiskNeed]]] = {}
    for need in needs:
        if need.nbytes > 0:  # a folder that is not needed may be one that cannot be read
            folder = next(p for p in (need.folder.absolute(), *need.folder.absolute().parents) if p.exists())
            by_disk.setdefault(folder.stat().st_dev, []).append((folder, need))
    for entries in by_disk.values():
        folder, _ = entries[0]
        disk = os.statvfs(folder)
        free = disk.f_bavail * disk.f_frsize
        if sum(need.nbytes for _, need in entries) > free:
            parts = " and ".join(f"{need.what} {format_bytes(need.nbytes)}" for _, need in entries)
            raise BudgetError(
                f"{folder} has {format_bytes(free)} free; {parts} do not fit there. "
                f"Free some, or {', or '.join(need.advice for _, need in entries)}"
            )


@contextmanager
def _named_errors(path: Path, nbytes: int) -> Iterator[None]:
    """Turn an OSError into one that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise BudgetError(
                f"cannot write {path}: {error.strerror}; it takes {nbytes} bytes. "
                f"Free some space there, then run the same line again, or choose another folder"
            ) from error
        raise StreamslrError(
            f"cannot write {path}: {error.strerror}; check the folder, then run the same line again"
        ) from error
