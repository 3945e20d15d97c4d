"""Windows of hidden states between the host and a GPU, beside its compute: pinned buffers and a copy stream each way.

The tiers of hidden states know the host only. Here threads read windows from a tier into pinned buffers, from which a
copy stream takes them to the GPU while it computes; and the other way round. The thread that computes waits for what it
needs next, and where the disk is slower than the GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue

import torch
from torch import Tensor

from streamslr.calibration.hidden_states import HiddenStates, Span

_PINNED_BYTES, _FEWEST, _MOST = 2**29, 2, 8
"""Pinned memory of a run, and the fewest and most windows that it is cut into. Each has a thread that reads or writes
it, and takes its digest."""

READING, WRITING = 2, 1
"""Micro-batches on the GPU for each stream that a pass reads: current + on its way; and for each that it writes."""


def pinned_windows(window: int) -> int:
    """Return the number of pinned buffers for windows of `window` bytes."""
    return max(_FEWEST, min(_MOST, _PINNED_BYTES // window))


def pinned_bytes(window: int) -> int:
    """Return the bytes of all pinned buffers for windows of `window` bytes; torch rounds them up to a power of two."""
    return 1 << (pinned_windows(window) * window - 1).bit_length()


def gpu_transfer_bytes(micro_batch: int, reads: int = 0, writes: int = 0) -> int:
    """Return the bytes that a pass takes on the GPU for windows on their way.

    Args:
        micro_batch: Bytes of one micro-batch [b, T, h].
        reads: Streams that the pass reads.
        writes: Streams that the pass writes.
    """
    return micro_batch * (reads * READING + writes * WRITING)


def host_transfer_bytes(window: int, reads: int = 0, writes: int = 0) -> int:
    """Return the bytes on the host beside the pinned buffers: a window for each thread that reads or writes.

    Args:
        window: Bytes of one window [T, h] in the widest dtype.
        reads: Streams that the pass reads.
        writes: Streams that the pass writes.
    """
    threads = pinned_windows(window)
    return window * (reads * threads + writes * (threads + 1))


class Resident:
    """The first windows of a boundary, kept on the GPU from when they are first read. They are the same bits."""

    def __init__(self, states: HiddenStates, windows: int, device: torch.device) -> None:
        """Allocate memory for windows 0 to `windows` - 1 of `states`."""
        _, *shape = states.shape
        self._states = torch.empty(windows, *shape, dtype=states.dtype, device=device)
        self._loaded: set[int] = set()

    def __contains__(self, window: int) -> bool:
        return window in self._loaded

    def exchange(self, start: int, hidden: Tensor) -> None:
        """Fill in the windows of `hidden` [b, T, h], from window `start` on, that are here; keep those that are not."""
        for window, values in zip(range(start, len(self._states)), hidden, strict=False):
            if window in self._loaded:
                values.copy_(self._states[window])
            else:
                self._states[window].copy_(values)
                self._loaded.add(window)


class Transfers:
    """Reads and writes of hidden states by a GPU, through pinned buffers that all passes of a run share."""

    def __init__(self, device: torch.device, window: int) -> None:
        """Allocate the pinned buffers.

        Args:
            device: The GPU.
            window: Bytes of one window [T, h], in the widest dtype that will be read or written.
        """
        self._device = device
        self._count = pinned_windows(window)
        self._pinned = torch.empty(self._count, window, dtype=torch.uint8, pin_memory=True).unbind()
        # free buffers, each with the copy out of it that must have ended before it is filled
        self._free: SimpleQueue[tuple[int, torch.cuda.Event | None]] = SimpleQueue()
        for number in range(self._count):
            self._free.put((number, None))
        self._to_gpu: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._to_host: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def read(
        self, states: HiddenStates, batches: Sequence[Span], resident: Resident | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (first window, hidden [b, T, h] on the GPU) for each span; the next one is on its way meanwhile.

        The caller may change a tensor, and may use it until it asks for the next one.

        Args:
            states: Boundary to read.
            batches: Windows wanted, in this order.
            resident: Windows of this boundary that are on the GPU, or shall stay there.
        """
        if not batches:
            return
        most = max(stop - start for start, stop in batches)
        _, *shape = states.shape
        slots = [torch.empty(most, *shape, dtype=states.dtype, device=self._device) for _ in batches[:READING]]
        compute = torch.cuda.current_stream(self._device)
        with ThreadPoolExecutor(self._count, thread_name_prefix="hidden-states-reader") as readers:

            def begin(number: int) -> list[Future[torch.cuda.Event]]:
                start, stop = batches[number]
                slot = slots[number % READING][: stop - start].unbind()
                missing = [window for window in range(start, stop) if resident is None or window not in resident]
                unused = _recorded(compute)  # whoever used this slot has queued all work on it by now
                return [readers.submit(self._fetch, states, w, slot[w - start], unused) for w in missing]

            upcoming = begin(0)
            try:
                for number, (start, stop) in enumerate(batches):
                    for future in upcoming:
                        compute.wait_event(future.result())
                    upcoming = begin(number + 1) if number + 1 < len(batches) else []
                    hidden = slots[number % READING][: stop - start]
                    if resident is not None:
                        resident.exchange(start, hidden)
                    yield start, hidden
            finally:  # no copy may reach a slot once its memory is free
                for future in upcoming:
                    future.cancel()
                readers.shutdown()
                compute.wait_stream(self._to_gpu)

    @contextmanager
    def writing(self, states: HiddenStates, micro_batch: int) -> Iterator[Callable[[int, Tensor], None]]:
        """Yield a function of (first window, hidden [b, T, h] on the GPU) that stores windows of `states`.

        The caller may change a tensor at once. When the context ends, every window has been handed to the tier.

        Args:
            states: Boundary to write.
            micro_batch: The most windows that are written together.
        """
        _, *shape = states.shape
        staging = torch.empty(micro_batch, *shape, dtype=states.dtype, device=self._device)
        compute = torch.cuda.current_stream(self._device)
        jobs: list[Future[None]] = []
        with ThreadPoolExecutor(self._count, thread_name_prefix="hidden-states-writer") as writers:

            def write(start: int, hidden: Tensor) -> None:
                compute.wait_stream(self._to_host)  # the windows before have left the staging buffer
                staging[: len(hidden)].copy_(hidden)
                written = _recorded(compute)
                for window, values in enumerate(staging[: len(hidden)], start):
                    number = self._take()
                    copied = self._copy(self._to_host, self._buffer(number, values), values, written)
                    jobs.append(writers.submit(self._store, states, window, number, values, copied))
                while jobs and jobs[0].done():
                    jobs.pop(0).result()

            try:
                yield write
                for job in jobs:
                    job.result()
            finally:  # no copy may read the staging buffer once its memory is free
                writers.shutdown()
                compute.wait_stream(self._to_host)

    def _fetch(self, states: HiddenStates, window: int, slot: Tensor, unused: torch.cuda.Event) -> torch.cuda.Event:
        """Read a window into its slot [T, h] on the GPU; return the event of its arrival."""
        number, arrived = self._take(), None
        try:
            host = self._buffer(number, slot)
            states.read(window, window + 1, out=host[None])
            arrived = self._copy(self._to_gpu, slot, host, unused)
            return arrived
        finally:
            self._free.put((number, arrived))

    def _store(self, states: HiddenStates, window: int, number: int, values: Tensor, copied: torch.cuda.Event) -> None:
        """Hand a window to the tier once it has arrived in its pinned buffer."""
        try:
            copied.synchronize()
            states.write(window, self._buffer(number, values)[None])
        finally:
            self._free.put((number, None))

    def _take(self) -> int:
        """Return a pinned buffer that may be filled; wait for one."""
        number, leaving = self._free.get()
        if leaving is not None:
            leaving.synchronize()
        return number

    def _buffer(self, number: int, like: Tensor) -> Tensor:
        """Return a pinned buffer as a window [T, h] of the shape and dtype of `like`."""
        return self._pinned[number][: like.nbytes].view(like.dtype).view(like.shape)

    @staticmethod
    def _copy(stream: torch.cuda.Stream, to: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        """Queue a copy on a stream, to begin after an event; return the event of its end."""
        with torch.cuda.stream(stream):
            stream.wait_event(after)
            to.copy_(source, non_blocking=True)
            return _recorded(stream)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return an event that happens when all work queued on the stream so far is done."""
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
