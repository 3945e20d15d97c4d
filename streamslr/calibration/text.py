"""Text file -> documents, whatever its encoding, line ends and packing; text that cannot be right is refused."""

import codecs
import gzip
import io
import json
import logging
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from streamslr.errors import InputError

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GZIP = b"\x1f\x8b"
_CONVERT = "convert it first, for example with `iconv -f {} -t UTF-8`"
_SURROGATE = re.compile("[\ud800-\udfff]")

log = logging.getLogger("streamslr")


def is_jsonl(path: Path) -> bool:
    """Return True for a file of one JSON object a line, by its name."""
    return path.name.lower().removesuffix(".gz").endswith((".jsonl", ".json"))


def read_documents(path: Path, *, again: bool = False) -> Iterator[str]:
    """Yield the documents of a text: the `text` of each line of a .jsonl file, any other file as a whole.

    Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark, packed by gzip or not. Line ends become
    newlines. Lone surrogates, which JSON can name and UTF-8 cannot write, become U+FFFD, with a warning. Lines are read
    as a stream, since C4's shard is 0.8 GB unpacked.

    Args:
        path: Text.
        again: True where the file was read before, so that its warnings are not repeated.

    Raises:
        InputError: The file cannot be read, is no text, or has a line that is no JSON object with a `text`.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise InputError(f"text file {path} does not exist") from error
    except OSError as error:
        raise InputError(f"text file {str(path)[:200]} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"text {path} is no regular file; it is read more than once, so give a file")
    number = 0  # lines read
    replaced: list[int] = []
    try:
        with _open(path) as file:
            for document in file if is_jsonl(path) else iter(file.read, ""):
                number += 1
                if "\0" in document:
                    line = number if is_jsonl(path) else document.count("\n", 0, document.index("\0")) + 1
                    raise InputError(
                        f"text {path} line {line} has a NUL character: it is no text, or UTF-16 without a byte order "
                        f"mark; {_CONVERT.format('UTF-16LE')}"
                    )
                text = _text_field(document) if is_jsonl(path) else document
                if text is not None:
                    text, count = _SURROGATE.subn("\N{REPLACEMENT CHARACTER}", text)
                    replaced += [number] * count
                    yield text
    except UnicodeDecodeError as error:
        line = number + error.object.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"text {path} line {line} is not {error.encoding.upper()} (byte 0x{error.object[error.start]:02x}); "
            f"{_CONVERT.format('WINDOWS-1252')}, or unpack it if it is an archive"
        ) from error
    except (EOFError, zlib.error, OSError, UnicodeError) as error:
        where = f" after line {number}" if number else ""
        raise InputError(f"text {path} cannot be read{where}: {error}; copy it again, or unpack it first") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f'{path} line {number} is not a JSON object with a "text" field: {error}; write one a line, or give plain '
            f"text as .txt"
        ) from error
    if replaced and not again:
        log.warning(
            "%s: %d lone surrogates, the first in line %d, are read as U+FFFD", path, len(replaced), replaced[0]
        )


@contextmanager
def _open(path: Path) -> Iterator[IO[str]]:
    """Open a text, unpacked and decoded."""
    with path.open("rb") as file:
        packed = path.suffix.lower() == ".gz" or file.peek(2)[:2] == _GZIP
        with gzip.open(file) if packed else file as content:
            start = content.peek(4)[:4]
            encoding = next((name for mark, name in _BYTE_ORDER_MARKS if start.startswith(mark)), "utf-8-sig")
            with io.TextIOWrapper(content, encoding) as text:
                yield text


def _text_field(line: str) -> str | None:
    """Return the `text` of a line of a .jsonl file, None for an empty line; raise ValueError for any other line."""
    if not line.strip():
        return None
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f"{line[:80].strip()!r}")
    return str(record["text"])
