"""Hidden states of the calibration windows at the boundaries between blocks: on disk (zarr), in memory, or both.

Boundary i is what enters block i, for all windows.
"""

import errno
import hashlib
import math
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
import zarr
from torch import Tensor
from zarr.core.buffer import default_buffer_prototype

from streamslr.errors import BudgetError, StreamslrError, first_line

_PENDING_WRITES = 2
"""Micro-batches that may wait for the disk and its one thread. More would only hide a disk that is too slow."""

_READING, _WRITING = 2, 1 + _PENDING_WRITES + 1
"""Micro-batches held per stream during a pass. Reading: current + prefetched. Writing: output + queued + 1 being
written."""

_HASH_THREADS = min(8, os.cpu_count() or 1)
"""Threads that take digests of windows where nothing else is to be done meanwhile."""

_BOUNDARIES: Mapping[str, tuple[int, int, int]] = {
    "embed": (1, 1, 2),
    "load": (1, 1, 2),
    "grams": (1, 2, 3),
    "solve": (1, 2, 3),
    "match": (1, 2, 3),
    "propagate": (2, 2, 3),
    "check": (2, 2, 4),
    "compare": (1, 1, 2),
}
"""Phase -> boundaries of hidden states, of targets and of check windows that exist in it."""


class HiddenStates(Protocol):
    """One boundary: hidden states [windows, T, h] on the host, in one dtype. Each window is written once.

    Every tier gives back the bits that were written. Several threads may write and read windows at a time.
    """

    windows: int
    """Number of windows."""

    shape: tuple[int, int, int]
    """(windows, T, h)."""

    dtype: torch.dtype
    """Dtype that windows are stored in."""

    def write(self, start: int, hidden: Tensor) -> None:
        """Store `hidden` [b, T, h], on any device, as windows `start` to `start` + b - 1.

        The bytes may reach the disk after the call has returned; the caller may change `hidden` at once.
        """

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return a copy [stop - start, T, h] of windows `start` to `stop` - 1 on the host; the caller may change it.

        Args:
            start: First window.
            stop: Last window + 1.
            out: Contiguous tensor of that shape and the boundary's dtype to read into; None: a new one.
        """

    def seal(self) -> tuple[bytes, ...]:
        """Wait for all writes; return the sha256 of each window, the same on every tier.

        Raises:
            ValueError: A window was never written.
            BudgetError: The disk is full.
        """

    def drop(self) -> None:
        """Free the memory and the disk space."""


def boundary_bytes(windows: int, seq_len: int, hidden_size: int, value_bytes: int) -> int:
    """Return the bytes of one boundary of one stream, [windows, T, h]; `value_bytes` is of the stream's dtype."""
    return windows * seq_len * hidden_size * value_bytes


def digest_of(windows: Iterable[bytes]) -> str:
    """Return the digest of a boundary, given those of its windows in order (`HiddenStates.seal`)."""
    return hashlib.sha256(b"".join(windows)).hexdigest()


def scratch_bytes(hidden: int, targets: int, check: int = 0) -> int:
    """Return the bytes of the most boundaries that exist at a time: two of each stream; check windows have two streams.

    Args:
        hidden: Bytes of one boundary of hidden states.
        targets: Bytes of one boundary of targets; 0 without matching.
        check: Bytes of one boundary of check windows.
    """
    return 2 * (hidden + targets + 2 * check)


def held_bytes(phase: str, hidden: int, targets: int, check: int = 0) -> int:
    """Return the bytes of all boundaries that exist in a phase: host memory, where the plan keeps them in memory.

    Without matching, half the boundaries of both streams are counted. The survey has two boundaries of one stream.

    Args:
        phase: Name of the phase.
        hidden: Bytes of one boundary of hidden states.
        targets: Bytes of one boundary of targets; 0 without matching.
        check: Bytes of one boundary of check windows.
    """
    if phase == "survey":
        return 2 * hidden
    of_hidden, of_targets, of_check = _BOUNDARIES[phase]
    held = of_hidden * hidden + of_targets * targets if targets else (of_hidden + of_targets) * hidden // 2
    return held + of_check * check


def transfer_bytes(micro_batch: int, reads: int = 0, writes: int = 0) -> int:
    """Return the bytes of the micro-batches that a pass holds between disk and compute, current and output included.

    The threads of `read_batches` and `OnDisk` fix their number.

    Args:
        micro_batch: Bytes of one micro-batch [b, T, h].
        reads: Streams that the pass reads.
        writes: Streams that the pass writes.
    """
    return micro_batch * (reads * _READING + writes * _WRITING)


def _bytes_of(window: Tensor) -> memoryview:
    """Return the raw bytes of a window [T, h]; bfloat16 passes as uint16, which numpy and zarr know."""
    return memoryview(_as_numpy_dtype(window.contiguous()).numpy().data).cast("B")


def _as_numpy_dtype(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor


class _Digests:
    """sha256 of each window; windows may be added in any order."""

    def __init__(self, windows: int):
        self._of_window: list[bytes | None] = [None] * windows

    def add(self, start: int, hidden: Tensor) -> None:
        for offset, window in enumerate(hidden):
            self._of_window[start + offset] = hashlib.sha256(_bytes_of(window)).digest()

    def changed(self, start: int, hidden: Tensor) -> list[int]:
        """Return the windows among `hidden` [b, T, h], from window `start` on, that are not as they were added."""
        return [
            start + offset
            for offset, window in enumerate(hidden)
            if self._of_window[start + offset] != hashlib.sha256(_bytes_of(window)).digest()
        ]

    def all(self) -> tuple[bytes, ...]:
        missing = [i for i, digest in enumerate(self._of_window) if digest is None]
        if missing:
            raise ValueError(f"boundary sealed without windows {missing}")
        return tuple(digest for digest in self._of_window if digest is not None)


class InMemory:
    """A boundary in one host tensor: the fastest tier, lost when the process ends."""

    def __init__(self, windows: int, seq_len: int, hidden_size: int, dtype: torch.dtype):
        self.windows, self.shape, self.dtype = windows, (windows, seq_len, hidden_size), dtype
        self._states = torch.empty(self.shape, dtype=dtype)
        self._written: set[int] = set()

    def write(self, start: int, hidden: Tensor) -> None:
        self._states[start : start + len(hidden)] = hidden
        self._written.update(range(start, start + len(hidden)))

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        return self.view(start, stop).clone() if out is None else out.copy_(self.view(start, stop))

    def view(self, start: int, stop: int) -> Tensor:
        """Return windows `start` to `stop` - 1 themselves; they must not be changed."""
        return self._states[start:stop]

    def seal(self) -> tuple[bytes, ...]:
        digests = _Digests(self.windows)
        with ThreadPoolExecutor(_HASH_THREADS, thread_name_prefix="hidden-states-digest") as pool:
            list(pool.map(lambda i: digests.add(i, self.view(i, i + 1)), self._written))
        return digests.all()

    def drop(self) -> None:
        self._states = self._states.new_empty(0)


class OnDisk:
    """A boundary as a zarr array, one uncompressed chunk a window, written by threads behind the compute.

    Chunks are not fsynced. The journal holds the boundary's digest, so a boundary that a power cut damaged is found and
    made again, by passing the windows through the finished blocks.
    """

    def __init__(
        self, folder: Path, windows: int, seq_len: int, hidden_size: int, dtype: torch.dtype, writers: int = 1
    ):
        self._open(folder, (windows, seq_len, hidden_size), dtype, writers)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            self._array = zarr.create_array(
                store=folder,
                shape=self.shape,
                chunks=(1, seq_len, hidden_size),
                dtype="uint16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."),
                compressors=None,
                fill_value=0,
                # by default zarr writes no chunk of zeros, and reads a lost file as zeros without an error
                config={"write_empty_chunks": True},
                attributes={"dtype": str(dtype).removeprefix("torch.")},
            )
        except OSError as error:
            raise self._disk_error(error) from error

    @classmethod
    def reopen(cls, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> "OnDisk | None":
        """Return the sealed boundary [windows, T, h] in `folder`, or None when it is lost."""
        self = cls.__new__(cls)
        self._open(folder, shape, dtype, writers=1)
        try:
            _require_no_pipe(folder / "zarr.json")
            self._array = zarr.open_array(store=folder, mode="r")
            if self._array.shape != shape:
                return None
            with ThreadPoolExecutor(_HASH_THREADS, thread_name_prefix="hidden-states-digest") as pool:
                list(pool.map(lambda i: self._digests.add(i, self._load(i, i + 1)), range(shape[0])))
        except (OSError, ValueError, KeyError, RuntimeError):
            return None
        return self

    def _open(self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype, writers: int) -> None:
        self.folder, self.windows, self.shape, self.dtype = folder, shape[0], shape, dtype
        self._digests = _Digests(shape[0])
        self._writers = ThreadPoolExecutor(writers, thread_name_prefix="hidden-states-writer")
        self._room = threading.Semaphore(writers + _PENDING_WRITES - 1)  # copies that may wait for the disk
        self._pending: list[Future[None]] = []
        self._lock = threading.Lock()  # of `_pending`

    def write(self, start: int, hidden: Tensor) -> None:
        self._room.acquire()
        try:
            # a copy, since the caller may change `hidden`; from a GPU it is the transfer
            stored = self._submit(start, hidden.to(device="cpu", dtype=self.dtype, copy=True))
        except BaseException:
            self._room.release()
            raise
        stored.add_done_callback(lambda _: self._room.release())

    def write_unchanging(self, start: int, host: Tensor) -> None:
        """Store windows from host memory that nobody changes any more, in the boundary's dtype: without a copy."""
        self._submit(start, host)

    def _submit(self, start: int, host: Tensor) -> Future[None]:
        """Queue a write; raise what an earlier one failed with."""
        with self._lock:
            done = [future for future in self._pending if future.done()]
            self._pending = [future for future in self._pending if future not in done]
        for future in done:
            future.result()
        with self._lock:
            stored = self._writers.submit(self._store, start, host)
            self._pending.append(stored)
        return stored

    def _store(self, start: int, host: Tensor) -> None:
        try:
            self._array[start : start + len(host)] = _as_numpy_dtype(host).numpy()
        except OSError as error:
            raise self._disk_error(error) from error
        self._digests.add(start, host)

    def _disk_error(self, error: OSError) -> StreamslrError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return StreamslrError(f"hidden states cannot be written to {self.folder}: {error}; give another --scratch")
        size = math.prod(self.shape) * self.dtype.itemsize
        return BudgetError(
            f"hidden states do not fit at {self.folder}: {error.strerror or error} (one boundary takes "
            f"{size:,} bytes, with matching four exist at a time); free space there or give --scratch another folder, "
            "then start the same line again"
        )

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        self._wait()
        try:
            hidden = self._load(start, stop, out)
            changed = self._digests.changed(start, hidden)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise self._damaged(f"windows {start} to {stop - 1} cannot be read ({first_line(error)})") from error
        if changed:
            raise self._damaged(f"windows {changed} are missing or not as they were written")
        return hidden

    def _load(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return what the files hold; zarr gives zeros for a chunk that is missing."""
        for i in range(start, stop):
            _require_no_pipe(self.folder / self._array.metadata.encode_chunk_key((i, 0, 0)))
        hidden = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype) if out is None else out
        buffer = default_buffer_prototype().nd_buffer.from_numpy_array(_as_numpy_dtype(hidden).numpy())
        self._array.get_basic_selection(slice(start, stop), out=buffer)
        return hidden

    def _damaged(self, fault: str) -> StreamslrError:
        return StreamslrError(
            f"hidden states in {self.folder}: {fault}. Something else deletes or changes files there, or the disk is "
            f"damaged; start the same line again, which makes them anew and goes on"
        )

    def _wait(self) -> None:
        """Wait for pending writes: a chunk that is not there yet would be taken for a missing one."""
        with self._lock:
            pending = list(self._pending)
        for future in pending:
            future.result()

    def seal(self) -> tuple[bytes, ...]:
        self._wait()
        return self._digests.all()

    def drop(self) -> None:
        self._writers.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _require_no_pipe(path: Path) -> None:
    """Raise OSError where `path` is neither a file nor missing: zarr would wait for a pipe without end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file")


class WriteThrough:
    """A boundary in memory, to read from, and on disk, to resume from."""

    def __init__(self, memory: InMemory, disk: OnDisk):
        self.windows, self.shape, self.dtype = memory.windows, memory.shape, memory.dtype
        self._memory, self._disk = memory, disk

    def write(self, start: int, hidden: Tensor) -> None:
        self._memory.write(start, hidden)
        self._disk.write_unchanging(start, self._memory.view(start, start + len(hidden)))

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        return self._memory.read(start, stop, out)

    def seal(self) -> tuple[bytes, ...]:
        return self._disk.seal()

    def drop(self) -> None:
        self._disk.drop()
        self._memory.drop()


Span = tuple[int, int]
"""First window, and last window + 1, of those that pass a block together."""


def spans(ranges: Iterable[Span], micro_batch: int) -> list[Span]:
    """Cut ranges of windows, in their order, into spans of at most `micro_batch` windows."""
    return [(i, min(i + micro_batch, stop)) for start, stop in ranges for i in range(start, stop, micro_batch)]


def read_batches(states: HiddenStates, batches: Sequence[Span]) -> Iterator[tuple[int, Tensor]]:
    """Yield (first window, hidden [b, T, h] on the host) for each span; the next one is read meanwhile."""
    if not batches:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="hidden-states-reader") as reader:
        upcoming = reader.submit(states.read, *batches[0])
        for number, (start, _) in enumerate(batches, start=1):
            hidden = upcoming.result()
            if number < len(batches):
                upcoming = reader.submit(states.read, *batches[number])
            yield start, hidden


class HiddenStateStream:
    """A stream of boundaries in the scratch folder of a run, `hidden` or `targets`. At most two boundaries exist."""

    def __init__(
        self,
        folder: Path,
        name: str,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        in_memory: bool,
        writers: int = 1,
    ):
        """Name a stream; nothing is created.

        Args:
            folder: Scratch folder of the run.
            name: Name of the stream, the start of its files' names.
            shape: (windows, T, h) of each boundary.
            dtype: Dtype that its hidden states are stored in.
            in_memory: Keep a copy in host memory to read from (the plan decides).
            writers: Threads that write a boundary to the disk and take its digests.
        """
        self.folder, self._name, self._writers = folder, name, writers
        self._shape, self._dtype, self._in_memory = shape, dtype, in_memory

    def _path(self, index: int) -> Path:
        return self.folder / f"{self._name}-{index:05d}.zarr"

    def new(self, index: int) -> HiddenStates:
        """Create boundary `index`, empty; an earlier one of the same index is deleted."""
        disk = OnDisk(self._path(index), *self._shape, dtype=self._dtype, writers=self._writers)
        return WriteThrough(InMemory(*self._shape, dtype=self._dtype), disk) if self._in_memory else disk

    def reopen(self, index: int) -> HiddenStates | None:
        """Return boundary `index` as an earlier process left it; None when it is lost. `seal` says if it is damaged.

        Every other boundary of the stream is deleted.
        """
        for leftover in self.folder.glob(f"{self._name}-*.zarr"):
            if leftover != self._path(index):
                shutil.rmtree(leftover)
        return OnDisk.reopen(self._path(index), self._shape, self._dtype)
