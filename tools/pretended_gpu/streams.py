"""Pretended CUDA streams and events, and a check that work on them is ordered.

Every stream has a vector clock, and so has the host. A kernel comes after all that its stream and the host knew when it
was started; events, waits and synchronisations carry clocks from one to another. An access to memory that another
stream, or the host, may be using at the same time raises StreamRaceError, with values or without: the order is checked,
not what a real race would do. All threads of the host count as one.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HOST = -1
"""The host's number beside those of streams."""

Clock = dict[int, int]
"""Number of a stream, or HOST -> the last of its steps that is known to be over."""


class StreamRaceError(RuntimeError):
    """Two streams, or a stream and the host, use the same memory without an order between them."""


@dataclass
class _Accesses:
    """The last write of a range of bytes, and the reads since, each as (who, step)."""

    written: tuple[int, int] | None = None
    read: Clock = field(default_factory=dict)


class Streams:
    """The streams of a pretended GPU, their order, and which one each thread works on."""

    def __init__(self) -> None:
        self.watching = False  # whether accesses are checked: from the first side stream or pinned buffer on
        self.lock = threading.RLock()
        self._clocks: dict[int, Clock] = {HOST: {}, 0: {}}
        self._current = threading.local()

    def new(self) -> int:
        with self.lock:
            self.watching = True
            number = len(self._clocks) - 1
            self._clocks[number] = {}
            return number

    @property
    def current(self) -> int:
        """Number of the stream that this thread starts kernels on."""
        return int(getattr(self._current, "number", 0))

    @current.setter
    def current(self, number: int) -> None:
        self._current.number = number

    def clock(self, who: int) -> Clock:
        """Return a copy of the clock of a stream or of the host."""
        with self.lock:
            return dict(self._clocks[who])

    def join(self, who: int, clock: Mapping[int, int]) -> None:
        """Let `who` wait for all that a clock knows."""
        with self.lock:
            mine = self._clocks[who]
            for other, step in clock.items():
                mine[other] = max(mine.get(other, 0), step)

    def wait_for_all(self) -> None:
        for number in list(self._clocks):
            self.join(HOST, self.clock(number))

    def access(self, who: int, read: list[Tensor], written: list[Tensor]) -> None:
        """Record one step of `who`, on tensors whose device functions are off.

        Raises:
            StreamRaceError: Another may use one of the tensors at the same time.
        """
        if not self.watching:
            return
        with self.lock:
            clock = self._clocks[who]
            if who != HOST:
                self.join(who, self._clocks[HOST])
            clock[who] = clock.get(who, 0) + 1
            for tensor in read:
                self._check(tensor, clock, who, writes=False)
            for tensor in written:
                self._check(tensor, clock, who, writes=True)

    def _check(self, tensor: Tensor, clock: Clock, who: int, writes: bool) -> None:
        if tensor.layout != torch.strided or not tensor.numel():
            return
        storage: Any = tensor.untyped_storage()
        if who == HOST and getattr(storage, "accesses", None) is None:
            return  # only memory that a stream has used can be in use
        if getattr(storage, "accesses", None) is None:
            storage.accesses = {}
        start, stop = _range(tensor)
        for (first, end), accesses in storage.accesses.items():
            if first < stop and start < end:
                others = dict([accesses.written]) if accesses.written else {}
                if writes:
                    others = {k: max(others.get(k, 0), accesses.read.get(k, 0)) for k in others | accesses.read}
                for other, step in others.items():
                    if clock.get(other, 0) < step:
                        does = f"{_name(who)} {'writes' if writes else 'reads'} {tuple(tensor.shape)} {tensor.dtype}"
                        raise StreamRaceError(
                            f"{does} while {_name(other)} may use it: no event or synchronisation orders them "
                            f"(pretended)"
                        )
        mine = storage.accesses.setdefault((start, stop), _Accesses())
        if writes:
            mine.written, mine.read = (who, clock[who]), {}
        else:
            mine.read[who] = clock[who]

    def unordered_at_free(self, storage: Any, stream: int) -> str | None:
        """Return what is wrong with freeing memory allocated on `stream`: another stream may use it, unrecorded."""
        clock = self._clocks[stream]
        for accesses in (getattr(storage, "accesses", None) or {}).values():
            last = dict(accesses.read)
            if accesses.written:
                last[accesses.written[0]] = max(last.get(accesses.written[0], 0), accesses.written[1])
            for other, step in last.items():
                recorded = other in getattr(storage, "recorded_streams", ())
                if other not in (HOST, stream) and not recorded and clock.get(other, 0) < step:
                    return f"memory of {_name(stream)} was freed while {_name(other)} may use it: record_stream"
        return None


def _name(who: int) -> str:
    return "the host" if who == HOST else f"stream {who}"


def _range(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte and the last + 1 of a tensor in its storage."""
    size = tensor.dtype.itemsize
    last = sum(int(n - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * size
    return start, start + (last + 1) * size


class PretendedStream:
    """Stand-in for torch.cuda.Stream."""

    def __init__(self, gpu: Any, number: int | None = None) -> None:
        self._gpu, self.device = gpu, torch.device("cuda", 0)
        self.number = gpu.streams.new() if number is None else number

    @property
    def cuda_stream(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PretendedStream) and self.number == other.number

    def __hash__(self) -> int:
        return hash(self.number)

    def __enter__(self) -> "PretendedStream":
        self._before = self._gpu.streams.current
        self._gpu.streams.current = self.number
        return self

    def __exit__(self, *_: object) -> None:
        self._gpu.streams.current = self._before

    def wait_stream(self, stream: "PretendedStream") -> None:
        self._gpu.streams.join(self.number, self._gpu.streams.clock(stream.number))

    def wait_event(self, event: "PretendedEvent") -> None:
        self._gpu.streams.join(self.number, event.clock)

    def record_event(self, event: "PretendedEvent | None" = None) -> "PretendedEvent":
        event = event or PretendedEvent(self._gpu)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._gpu.synchronized("stream.synchronize()", self.number)

    def query(self) -> bool:
        """Return True: all work is over as soon as one asks."""
        self._gpu.streams.join(HOST, self._gpu.streams.clock(self.number))
        return True


class PretendedEvent:
    """Stand-in for torch.cuda.Event."""

    def __init__(self, gpu: Any) -> None:
        self._gpu, self.clock = gpu, dict[int, int]()

    def record(self, stream: PretendedStream | None = None) -> None:
        self.clock = self._gpu.streams.clock(self._gpu.streams.current if stream is None else stream.number)

    def wait(self, stream: PretendedStream | None = None) -> None:
        self._gpu.streams.join(self._gpu.streams.current if stream is None else stream.number, self.clock)

    def synchronize(self) -> None:
        with self._gpu.lock:
            self._gpu.cost.event_waits += 1
        self._gpu.streams.join(HOST, self.clock)

    def query(self) -> bool:
        """Return True: all work is over as soon as one asks."""
        self._gpu.streams.join(HOST, self.clock)
        return True

    def elapsed_time(self, end: "PretendedEvent") -> float:
        """Return 0: nothing takes time here."""
        return 0.0


@contextmanager
def working_on(stream: PretendedStream | None) -> Iterator[None]:
    """Stand in for torch.cuda.stream."""
    if stream is None:
        yield
        return
    with stream:
        yield
