"""A CUDA device that pretends, for machines without one: while a PretendedGpu is entered, "cuda" is a device.

No tensor *is* on another device: its *storage* carries a tag. So views, parameters and in-place operations need no
care, and autograd, threads and transformers' loader run as they are. `modes.py` has the two modes that keep up the
pretence, for every thread that starts while it is entered. (FakeTensorMode cannot do this: on a CPU-only torch a fake
cuda tensor that requires grad aborts the process.)

What it shows: mixed devices, memory against a limit, copies, waits, launches, FLOPs and bytes of each phase, races
between streams. What it cannot show: speed, kernels' own faults, atomics, what libraries take beside torch's allocator.
"""

import contextlib
import os
import sys
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pretended_gpu.allocator import CachingAllocator
from pretended_gpu.cost import MULTIPROCESSORS, Cost
from pretended_gpu.modes import DispatchMode, FunctionMode
from pretended_gpu.streams import PretendedEvent, PretendedStream, Streams, working_on

_NAME = "pretended GPU"


class Answers:
    """Values of scalars where there are none (shapes only): what a sound run gives.

    Truth is True, but for `any`: False. Numbers begin near 1 and fall slowly, as losses do. Integers are 0, the largest
    of integers 4. What is counted is spread evenly.

    Attributes:
        by_function: Function of the package that asks -> its answer, where the general one is wrong there.
        kept: Fraction of a mask that is True.
    """

    def __init__(self, by_function: dict[str, Any] | None = None, kept: float = 0.5) -> None:
        self.by_function, self.kept = by_function or {}, kept
        self._asked = 0

    def scalar(self, dtype: torch.dtype, origin: str, function: str) -> Any:
        """Return the value of a scalar made by the operator `origin`, that `function` asks for."""
        if function in self.by_function:
            answer = self.by_function[function]
            return answer[-1] if isinstance(answer, list) else answer
        if dtype == torch.bool:
            return origin != "any"
        if not dtype.is_floating_point:
            return 4 if origin in ("max", "amax") else 0
        self._asked += 1
        return 1 / (1 + self._asked / 1000)

    def numbers(self, tensor: Tensor, function: str) -> list[Any]:
        """Return the values of a tensor of one dimension that `function` asks for."""
        answer, counted = self.by_function.get(function), getattr(tensor.untyped_storage(), "counted", None)
        if counted is not None:
            return [counted * (i + 1) // len(tensor) - counted * i // len(tensor) for i in range(len(tensor))]
        return (
            answer
            if isinstance(answer, list)
            else [self.scalar(tensor.dtype, "", function) for _ in range(len(tensor))]
        )

    def true_in(self, mask: Tensor) -> int:
        """Return how many values of a mask are True."""
        return int(mask.numel() * self.kept)


class PretendedGpu:
    """A device of `total` bytes while entered.

        with PretendedGpu() as gpu:
            run(open_run(config))  # raises where devices are mixed, or streams race
        gpu.allocator.peak_reserved, gpu.by_phase["solve"].syncs

    Attributes:
        allocator: Model of the caching allocator.
        streams: Streams and their order.
        phase: Name of the phase that costs are added to; set it as work goes on.
        phase_of_thread: Name of a pool of threads -> phase that its work counts for, whichever is on.
        by_phase: Phase -> its cost.
        notes: What is allowed but waits or is slow, with the line of code -> how often.
        faults: What was found where nothing could be raised; leaving raises these.
        at_peak: Largest allocations, with their shapes, when `allocator.allocated` was highest; with `trace` only.
        pinned: Bytes of host memory that are pinned now, and the most of them.
    """

    def __init__(
        self,
        values: bool = True,
        total: int = 80 * 10**9,
        capability: tuple[int, int] = (9, 0),
        expandable: bool | None = None,
        context: int = 0,
        answers: Answers | None = None,
        trace: bool = False,
    ) -> None:
        """Describe the device.

        Args:
            values: Storages are host memory, so that everything computes. False: they are on meta, of any size; host
                memory is real but never written from the device, and `answers` gives the value of a scalar.
            total: Bytes of the device.
            capability: CUDA compute capability.
            expandable: Use expandable segments. None: as PYTORCH_CUDA_ALLOC_CONF (or PYTORCH_ALLOC_CONF) says at the
                first allocation. False also stands for a platform that refuses them.
            context: Bytes that CUDA's context takes of the device, beside the allocator.
            answers: Values of scalars where there are none.
            trace: Keep the largest allocations of the peak, which takes time.
        """
        self.values, self.total, self.context, self.trace = values, total, context, trace
        self.backing = "cpu" if values else "meta"
        self.answers = answers or Answers()
        self._allocating, self._to_free = False, list[Any]()
        self.allocator, self.streams = CachingAllocator(total), Streams()
        self.phase, self.phase_of_thread = "start", dict[str, str]()
        self.by_phase: dict[str, Cost] = defaultdict(Cost)
        self.notes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.at_peak: list[tuple[int, str]] = []
        self.pinned: Counter[str] = Counter()
        self.wanted = threading.local()  # .where: place of the tensors that an operator makes, if not its own
        self._capability, self._expandable = capability, expandable
        self._live: dict[int, tuple[int, str]] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self.lock = threading.RLock()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "PretendedGpu":
        gpu, run = self, threading.Thread.run
        deterministic: Any = torch.utils.deterministic
        deterministic_fills = deterministic.fill_uninitialized_memory

        def run_in_modes(thread: threading.Thread) -> None:
            with gpu.modes():
                run(thread)

        for name, stand_in in self._stand_ins().items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, stand_in, create=True))
        # nothing here draws from the device's generator
        random: dict[str, Any] = {
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda *_: None,
        }
        self._stack.enter_context(mock.patch.multiple(torch.cuda.random, **random))
        self._stack.enter_context(mock.patch.object(threading.Thread, "run", run_in_modes))
        self._stack.enter_context(mock.patch.object(Tensor, "record_stream", self._record_stream))
        self._stack.enter_context(mock.patch.object(torch.autocast, "__init__", _autocast_backing(self.backing)))
        if not self.values:  # else deterministic algorithms fill host memory that stands for nothing
            self._stack.callback(setattr, deterministic, "fill_uninitialized_memory", deterministic_fills)
            deterministic.fill_uninitialized_memory = False
        self._stack.enter_context(self.modes())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if self.faults and kind is None:
            raise RuntimeError("; ".join(self.faults))

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        """Keep up the pretence in this thread."""
        with FunctionMode(self), DispatchMode(self):
            yield

    @property
    def cost(self) -> Cost:
        """Cost of the phase that is on, or that this thread works for."""
        thread = threading.current_thread().name.rpartition("_")[0]
        return self.by_phase[self.phase_of_thread.get(thread, self.phase)]

    def note(self, what: str, function: str | None = None) -> None:
        """Count what is allowed but costs, by the line of the package that did it."""
        frame = self._caller()
        site = f"{frame.f_code.co_filename.rpartition('streamslr/')[2]}:{frame.f_lineno}" if frame else "?"
        self.notes[f"{what} ({site})"] += 1

    def caller(self) -> str:
        """Return the name of the package's innermost function on the stack."""
        frame = self._caller()
        return frame.f_code.co_name if frame else ""

    @staticmethod
    def _caller() -> Any:
        frame: Any = sys._getframe()
        while frame and "/streamslr/" not in frame.f_code.co_filename:
            frame = frame.f_back
        return frame

    def synchronized(self, what: str, stream: int | None = None) -> None:
        """Count that the host waited for all work of a stream, by default the current one."""
        with self.lock:
            self.cost.syncs += 1
            self.note(f"sync: {what}")
        self.streams.join(-1, self.streams.clock(self.streams.current if stream is None else stream))

    def copied(self, direction: str, nbytes: int, pinned: bool) -> None:
        """Count a copy between host and device."""
        with self.lock:
            self.cost.copied[direction, "pinned" if pinned else "pageable"] += nbytes

    # Places of tensors. Functions of torch must be off: .device would be answered by the pretence.

    def where(self, tensor: Tensor) -> str:
        """Return "cuda", "cpu" or "meta"."""
        if tensor.layout != torch.strided:
            return tensor.device.type
        return getattr(tensor.untyped_storage(), "place", None) or tensor.device.type

    def is_pinned(self, tensor: Tensor) -> bool:
        return bool(getattr(tensor.untyped_storage(), "pinned", False))

    def pin(self, tensor: Tensor) -> None:
        """Make the memory of a host tensor pinned."""
        storage: Any = tensor.untyped_storage()
        if self.is_pinned(tensor):
            return
        storage.pinned = True
        self.streams.watching = True
        nbytes = storage.nbytes()
        self.pinned["now"] += nbytes
        self.pinned["peak"] = max(self.pinned["peak"], self.pinned["now"])
        weakref.finalize(storage, self.pinned.subtract, {"now": nbytes})

    def place(self, tensor: Tensor, where: str, made_by: str = "") -> None:
        """Say where a new tensor is; on the device its memory is allocated.

        Raises:
            torch.OutOfMemoryError: The device has no memory for it.
        """
        with torch._C.DisableTorchFunction(), self.lock:
            storage: Any = tensor.untyped_storage()
            if getattr(storage, "place", None) is not None:
                return
            storage.place = where
            if where != "cuda":
                return
            if made_by:
                storage.made_by = made_by
            self._allocate(storage, f"{made_by} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")

    def _allocate(self, storage: Any, what: str) -> None:
        stream, nbytes, key = self.streams.current, storage.nbytes(), id(storage)
        block = self.malloc(nbytes)

        def freed(_: object) -> None:
            with self.lock:
                self._free(block)
                self._live.pop(key, None)
                self._watched.pop(key, None)
                if accessed.accesses and (fault := self.streams.unordered_at_free(accessed, stream)):
                    self.faults.append(fault)

        # what streams did with the memory outlives its storage, for the check when it is freed
        accessed = SimpleNamespace(accesses={}, recorded_streams=set())
        storage.accesses, storage.recorded_streams = accessed.accesses, accessed.recorded_streams
        self._watched[key] = weakref.ref(storage, freed)
        if self.trace:
            self._live[key] = (nbytes, what)
            self._remember_peak()

    def malloc(self, nbytes: int) -> Any:
        """Allocate device memory; `allocator.free` takes what it returns."""
        with self.lock:
            if not self.allocator.allocations:
                self.allocator.expandable = self._uses_expandable_segments()
            self._allocating = True
            try:
                return self.allocator.malloc(nbytes, self.streams.current)
            finally:
                self._allocating = False
                while self._to_free:
                    self.allocator.free(self._to_free.pop())

    def _free(self, block: Any) -> None:
        """Free a block, or have it freed soon: a garbage collection may come in the midst of an allocation."""
        if self._allocating:
            self._to_free.append(block)
        else:
            self.allocator.free(block)

    @contextlib.contextmanager
    def workspace(self, nbytes: int, of: str) -> Iterator[None]:
        """Hold device memory that an operator takes beside its result."""
        block = self.malloc(nbytes)
        if self.trace:
            self._remember_peak((nbytes, f"workspace of {of}"))
        try:
            yield
        finally:
            with self.lock:
                self._free(block)

    def _remember_peak(self, *more: tuple[int, str]) -> None:
        if self.allocator.allocated >= self.allocator.peak_allocated:
            self.at_peak = sorted([*self._live.values(), *more], reverse=True)[:14]

    def _uses_expandable_segments(self) -> bool:
        if self._expandable is not None:
            return self._expandable
        settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF", "")
        return "expandable_segments:true" in settings.lower().replace(" ", "")

    def _stand_ins(self) -> dict[str, Any]:
        """Return what takes the place of names in torch.cuda."""
        major, minor = self._capability
        properties = SimpleNamespace(
            name=_NAME, total_memory=self.total, major=major, minor=minor, multi_processor_count=MULTIPROCESSORS
        )
        allocator = self.allocator
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "init": lambda: None,
            "_lazy_init": lambda: None,
            "_lazy_call": lambda work, **_: None,  # seeds of the device's generator, which nothing here draws from
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_name": lambda device=None: _NAME,
            "get_device_capability": lambda device=None: self._capability,
            "is_current_stream_capturing": lambda: False,
            "get_device_properties": lambda device=None: properties,
            "is_bf16_supported": lambda including_emulation=True: major >= 8,
            "mem_get_info": lambda device=None: (self.total - self.context - allocator.reserved, self.total),
            "set_per_process_memory_fraction": self._hold_to,
            "get_per_process_memory_fraction": lambda device=None: allocator.limit / self.total,
            "reset_peak_memory_stats": self._reset_peaks,
            "memory_allocated": lambda device=None: allocator.allocated,
            "max_memory_allocated": lambda device=None: allocator.peak_allocated,
            "memory_reserved": lambda device=None: allocator.reserved,
            "max_memory_reserved": lambda device=None: allocator.peak_reserved,
            "memory_stats": lambda device=None: self._memory_stats(),
            "memory_snapshot": lambda: [{"is_expandable": allocator.expandable}],
            "empty_cache": allocator.empty_cache,
            "synchronize": lambda device=None: self._synchronize(),
            "Stream": lambda device=None, priority=0, **_: PretendedStream(self),
            "Event": lambda *_, **__: PretendedEvent(self),
            "stream": working_on,
            "current_stream": lambda device=None: PretendedStream(self, self.streams.current),
            "default_stream": lambda device=None: PretendedStream(self, 0),
            "set_stream": self._set_stream,
        }

    def _hold_to(self, fraction: float, device: torch.device | int | None = None) -> None:
        if isinstance(device, torch.device) and device.index is None:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        self.allocator.limit = int(self.total * fraction)

    def _reset_peaks(self, device: object = None) -> None:
        self.allocator.reset_peaks()
        self.at_peak = []

    def _memory_stats(self) -> dict[str, int]:
        allocator = self.allocator
        return {
            "allocated_bytes.all.current": allocator.allocated,
            "allocated_bytes.all.peak": allocator.peak_allocated,
            "reserved_bytes.all.current": allocator.reserved,
            "reserved_bytes.all.peak": allocator.peak_reserved,
            "num_alloc_retries": allocator.retries,
        }

    def _synchronize(self) -> None:
        self.cost.syncs += 1
        self.note("sync: torch.cuda.synchronize()")
        self.streams.wait_for_all()

    @property
    def _record_stream(self) -> Any:
        """Return what takes the place of Tensor.record_stream, whose own parser refuses pretended streams."""

        def record_stream(tensor: Tensor, stream: PretendedStream) -> None:
            with torch._C.DisableTorchFunction():
                storage: Any = tensor.untyped_storage()
                storage.recorded_streams.add(stream.number)

        return record_stream

    def _set_stream(self, stream: PretendedStream) -> None:
        self.streams.current = stream.number


def _autocast_backing(backing: str) -> Any:
    """Return an `__init__` of torch.autocast that casts on what backs "cuda"."""
    original = torch.autocast.__init__

    def start(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, backing if device_type == "cuda" else device_type, *args, **kwargs)

    return start
