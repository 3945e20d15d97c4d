"""Files from outside: opened only where they are regular files of a sane size, and JSON parsed into typed records."""

import json
import os
import stat
import threading
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from streamslr.errors import InputError
from streamslr.printable import printable

LARGEST_JSON = 100_000_000
"""Bytes of the largest JSON file that is read; safetensors has the same limit for a header. An index of 100,000 tensors
takes some 10 MB."""

T = TypeVar("T")

_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
_building = threading.Lock()  # of `_decoders`


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read, through links; never wait for a pipe or read a device.

    Raises:
        InputError: The file cannot be opened, or is none.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"cannot read {path}: {reason}") from error
    raise InputError(f"cannot read {path}: it is no regular file; put a copy of the file there")


def read_bounded(path: Path, limit: int = LARGEST_JSON) -> bytes:
    """Return the content of a regular file of at most `limit` bytes. Raises InputError as `open_regular`."""
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            content = file.read() if size <= limit else b""
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
    if max(size, len(content)) > limit:
        raise InputError(f"{path} has more than {limit:,} bytes, too many for such a file; copy or download it again")
    return content


def decoder_of(kind: type[T]) -> msgspec.json.Decoder[T]:
    """Return the decoder of a type, which any thread may use.

    msgspec (0.22) describes a struct when it is first decoded. Another thread that decodes one meanwhile finds half of
    the description, and the process ends by SIGSEGV. So decoders are built one at a time, and only once.
    """
    with _building:
        if kind not in _decoders:
            _decoders[kind] = msgspec.json.Decoder(kind)
        return _decoders[kind]


def parse_json(raw: bytes, kind: type[T]) -> T:
    """Parse JSON into a record of msgspec, or another type that msgspec knows.

    Names must not occur twice in an object, and texts hold no halves of surrogate pairs.

    Args:
        raw: The JSON.
        kind: Type of the result.

    Raises:
        ValueError: The text is not JSON, or not of that type; the message says where.
    """
    try:
        parsed = decoder_of(kind).decode(raw)
        json.loads(raw, object_pairs_hook=_require_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
    return parsed


def parse_loose_json(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object as Python's own parser does: with NaN, Infinity, and names that occur twice.

    config.json of some models holds them (`"time_step_limit": [0.0, Infinity]`), and transformers reads it so.

    Raises:
        ValueError: The text is not such JSON, or a text in it holds half of a surrogate pair.
    """
    try:
        parsed = json.loads(raw)
        if not isinstance(parsed, dict):
            raise ValueError("it is no object")
        json.dumps(parsed, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("a text in it holds half of a surrogate pair") from error
    return parsed


def _require_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"it holds {printable(twice)!r} twice")
    return found
