"""Standard output and error that outlive their readers: a run of days does not end with its terminal."""

import io
import os
import sys
from typing import Any


class _LastingFile(io.FileIO):
    """Standard stream by its file descriptor. Once a write fails, it and all that follow are dropped."""

    gone = False

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError:  # no reader, no terminal, or a full disk
            self.gone = True
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # for whatever else writes there, the end of Python too
            os.close(null)
            return len(content)


def make_streams_last() -> None:
    """Put streams that cannot fail in the place of standard output and error.

    A descriptor that is closed becomes /dev/null; otherwise the next file opened, a shard, would get its number, and
    messages of libraries would be written into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stdout is sys.__stdout__:  # not where a caller put a stream of its own
        sys.stdout = _lasting_stream(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lasting_stream(2, sys.stderr)


def output_is_gone() -> bool:
    """Return True once a write to standard output failed."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, _LastingFile) and raw.gone


def _lasting_stream(descriptor: int, stream: io.TextIOWrapper | None) -> io.TextIOWrapper:
    file = _LastingFile(descriptor, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",  # a path need not be text
        line_buffering=descriptor == 2 or file.isatty(),
    )
