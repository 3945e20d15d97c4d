"""Hidden states of the calibration windows, one boundary a block boundary: on disk (zarr), in memory, or both."""

import errno
import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
import zarr
from torch import Tensor
from zarr.core.buffer import default_buffer_prototype

from streamslr.errors import BudgetError, StreamslrError

_PENDING_WRITES = 2  # micro-batches that may wait for the disk; more only hides a disk that is too slow


class HiddenStates(Protocol):
    """One boundary: hidden states [samples, T, h] on the host. Each sample is written once, then sealed."""

    samples: int

    def write(self, start: int, hidden: Tensor) -> None:
        """Store hidden [b, T, h] as samples start … start + b - 1. May return before the bytes are on disk."""

    def read(self, start: int, stop: int) -> Tensor:
        """A fresh copy [stop - start, T, h] of these samples; the caller may change it."""

    def seal(self) -> str:
        """Wait for all writes; the sha256 of what was written, the same on every tier."""

    def drop(self) -> None:
        """Give back the memory and the disk space."""


def _bytes_of(sample: Tensor) -> memoryview:
    """sample [T, h] as raw bytes; bfloat16 goes by way of uint16, which numpy and zarr know."""
    return memoryview(_as_numpy_dtype(sample.contiguous()).numpy().data).cast("B")


def _as_numpy_dtype(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor


class _Digest:
    """sha256 over the samples' sha256, in sample order: the writer may see them in any order."""

    def __init__(self, samples: int):
        self._of_sample: list[bytes | None] = [None] * samples

    def add(self, start: int, hidden: Tensor) -> None:
        for offset, sample in enumerate(hidden):
            self._of_sample[start + offset] = hashlib.sha256(_bytes_of(sample)).digest()

    def hexdigest(self) -> str:
        missing = [i for i, digest in enumerate(self._of_sample) if digest is None]
        if missing:
            raise ValueError(f"boundary sealed without samples {missing}")
        return hashlib.sha256(b"".join(d for d in self._of_sample if d is not None)).hexdigest()


class InMemory:
    """A boundary in one host tensor: the fastest tier, lost when the process ends."""

    def __init__(self, samples: int, seq_len: int, hidden_size: int, dtype: torch.dtype):
        self.samples = samples
        self._states = torch.empty(samples, seq_len, hidden_size, dtype=dtype)
        self._written: set[int] = set()

    def write(self, start: int, hidden: Tensor) -> None:
        self._states[start : start + len(hidden)] = hidden
        self._written.update(range(start, start + len(hidden)))

    def read(self, start: int, stop: int) -> Tensor:
        return self._states[start:stop].clone()

    def seal(self) -> str:
        digest = _Digest(self.samples)
        for i in self._written:
            digest.add(i, self._states[i : i + 1])
        return digest.hexdigest()

    def drop(self) -> None:
        self._states = self._states.new_empty(0)


class OnDisk:
    """A boundary as a zarr array, one uncompressed chunk a sample, written by a thread behind the compute.

    Chunks are not fsynced: the journal holds the boundary's digest, and a boundary that does not match
    it after a power cut is rebuilt by replaying the finished blocks, which costs a forward pass a block.
    """

    def __init__(self, folder: Path, samples: int, seq_len: int, hidden_size: int, dtype: torch.dtype):
        self.folder, self.samples = folder, samples
        self._shape, self._dtype = (samples, seq_len, hidden_size), dtype
        self._digest = _Digest(samples)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="hidden-states-writer")
        self._pending: list[Future[None]] = []
        shutil.rmtree(folder, ignore_errors=True)
        try:
            self._array = zarr.create_array(
                store=folder,
                shape=self._shape,
                chunks=(1, seq_len, hidden_size),
                dtype="uint16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."),
                compressors=None,
                fill_value=0,
                # the default leaves chunks of zeros unwritten, to be read as zeros when a file is lost
                config={"write_empty_chunks": True},
                attributes={"dtype": str(dtype).removeprefix("torch.")},
            )
        except OSError as error:
            raise self._disk_error(error) from error

    @classmethod
    def reopen(cls, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype, digest: str) -> "OnDisk | None":
        """The sealed boundary in `folder`, or None when it is not there, or not what `digest` names."""
        self = cls.__new__(cls)
        self.folder, self.samples, self._shape, self._dtype = folder, shape[0], shape, dtype
        self._digest, self._pending = _Digest(shape[0]), []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="hidden-states-writer")
        try:
            self._array = zarr.open_array(store=folder, mode="r")
            if self._array.shape != shape:
                return None
            for i in range(shape[0]):
                self._digest.add(i, self.read(i, i + 1))
        except (OSError, ValueError, KeyError, RuntimeError):
            return None
        return self if self._digest.hexdigest() == digest else None

    def write(self, start: int, hidden: Tensor) -> None:
        while len(self._pending) >= _PENDING_WRITES:
            self._pending.pop(0).result()
        # the caller may reuse `hidden`; on a GPU this copy is the transfer itself
        host = hidden.to(device="cpu", dtype=self._dtype, copy=True)
        self._pending.append(self._writer.submit(self._store, start, host))

    def _store(self, start: int, host: Tensor) -> None:
        try:
            self._array[start : start + len(host)] = _as_numpy_dtype(host).numpy()
        except OSError as error:
            raise self._disk_error(error) from error
        self._digest.add(start, host)

    def _disk_error(self, error: OSError) -> StreamslrError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return StreamslrError(f"hidden states cannot be written to {self.folder}: {error}; give another --scratch")
        size = self._shape[0] * self._shape[1] * self._shape[2] * self._dtype.itemsize
        return BudgetError(
            f"hidden states do not fit at {self.folder}: {error.strerror or error} (one boundary takes "
            f"{size:,} bytes, with matching four exist at a time); free space there or give --scratch another folder, "
            "then start the same line again"
        )

    def read(self, start: int, stop: int) -> Tensor:
        self._wait()
        hidden = torch.empty(stop - start, *self._shape[1:], dtype=self._dtype)
        buffer = default_buffer_prototype().nd_buffer.from_numpy_array(_as_numpy_dtype(hidden).numpy())
        self._array.get_basic_selection(slice(start, stop), out=buffer)
        return hidden

    def _wait(self) -> None:
        """For the writes on their way: a chunk that is not there yet would read as zeros."""
        while self._pending:
            self._pending.pop(0).result()

    def seal(self) -> str:
        self._wait()
        return self._digest.hexdigest()

    def drop(self) -> None:
        self._writer.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self.folder, ignore_errors=True)


class WriteThrough:
    """Memory to read from, disk to resume from."""

    def __init__(self, memory: InMemory, disk: OnDisk):
        self.samples = memory.samples
        self._memory, self._disk = memory, disk

    def write(self, start: int, hidden: Tensor) -> None:
        self._memory.write(start, hidden)
        self._disk.write(start, hidden)

    def read(self, start: int, stop: int) -> Tensor:
        return self._memory.read(start, stop)

    def seal(self) -> str:
        return self._disk.seal()

    def drop(self) -> None:
        self._memory.drop()
        self._disk.drop()


Span = tuple[int, int]
"""First and last + 1 of the samples that pass together."""


def spans(ranges: Iterable[Span], micro_batch: int) -> list[Span]:
    """The ranges of samples cut, in their order, into pieces of at most `micro_batch`."""
    return [(i, min(i + micro_batch, stop)) for start, stop in ranges for i in range(start, stop, micro_batch)]


def read_batches(states: HiddenStates, batches: Sequence[Span]) -> Iterator[tuple[int, Tensor]]:
    """(first sample, hidden [b, T, h]) for each span, each read while the one before is computed on."""
    with ThreadPoolExecutor(1, thread_name_prefix="hidden-states-reader") as reader:
        upcoming = reader.submit(states.read, *batches[0])
        for number, (start, _) in enumerate(batches, start=1):
            hidden = upcoming.result()
            if number < len(batches):
                upcoming = reader.submit(states.read, *batches[number])
            yield start, hidden


class HiddenStateStream:
    """One stream in the scratch folder of a run: boundary i is what enters block i; two exist at most."""

    def __init__(self, folder: Path, name: str, shape: tuple[int, int, int], dtype: torch.dtype, in_memory: bool):
        """shape: (samples, T, h). in_memory: keep a copy in host memory to read from (the plan decides)."""
        self.folder, self._name = folder, name
        self._shape, self._dtype, self._in_memory = shape, dtype, in_memory

    def _path(self, index: int) -> Path:
        return self.folder / f"{self._name}-{index:05d}.zarr"

    def new(self, index: int) -> HiddenStates:
        disk = OnDisk(self._path(index), *self._shape, dtype=self._dtype)
        return WriteThrough(InMemory(*self._shape, dtype=self._dtype), disk) if self._in_memory else disk

    def reopen(self, index: int, digest: str) -> HiddenStates | None:
        """What an earlier process sealed under this digest, or None when it is lost or damaged."""
        for leftover in self.folder.glob(f"{self._name}-*.zarr"):
            if leftover != self._path(index):
                shutil.rmtree(leftover)
        return OnDisk.reopen(self._path(index), self._shape, self._dtype, digest)
