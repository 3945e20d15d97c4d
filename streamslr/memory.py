"""Host memory: what this process holds, what it may still take, and making the C library give back what is freed."""

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

_SAMPLE_SECONDS = 0.05
_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # mallopt(3)
_LARGE = 2**20


def keep_no_freed_memory() -> None:
    """Has glibc return every freed tensor of 1 MB or more to the system at once, for the rest of the process.

    By itself it raises that size with every large block freed, to 32 MB, and keeps the rest in an arena a
    thread: on the reference model the private peak then creeps from 500 to 570 MB over eight blocks, and
    stays at 440 MB like this, at the same speed. Elsewhere than on glibc nothing happens.
    """
    if libc := _glibc():
        libc.mallopt(_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_ARENA_MAX, 2)


def return_freed_memory() -> None:
    """Gives the system what many small allocations left behind (tokenizers build millions)."""
    if libc := _glibc():
        libc.malloc_trim(0)


def release_memory(device: torch.device) -> None:
    """Frees what only garbage holds, and what torch keeps of a GPU's memory for later."""
    gc.collect()
    return_freed_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def held_to_gpu_budget(device: torch.device, budget: int | None) -> Iterator[None]:
    """While entered, torch refuses to take more of a GPU's memory than the budget."""
    if device.type != "cuda" or budget is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def why_out_of_memory(error: Exception) -> str:
    """What an error says whose cause is memory, the host's or a GPU's; raises any other again.

    Not every allocator has an error of its own: torch's on the CPU, cuBLAS and cuSOLVER say it in words.
    """
    words = ("DefaultCPUAllocator", "ALLOC_FAILED", "out of memory")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words):
        return str(error).strip().partition("\n")[0] or type(error).__name__
    raise error


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None


def uss() -> int:
    """Unique set size: all that ending this process would free. Walks every page, so not for every moment."""
    return int(psutil.Process().memory_full_info().uss)


def anonymous() -> int:
    """Memory of this process without mapped files: shards and libraries are not in it."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def free_host_memory() -> int:
    """What this process may hold in all: its own, and what is free on the machine or in its container."""
    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        # files that the kernel merely remembers count as used, and are given up on demand
        stat = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
        cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
        free = min(free, int(text) - int(used.read_text()) + cached)
    return free + uss()


class MemoryWatch(threading.Thread):
    """Peak private host memory since the last take(), sampled 20 times a second.

    Counts what is anonymous at each moment, and what was mapped at the last take(): USS, but for the pages of
    shards being read, which the system takes back whenever it needs them.
    """

    def __init__(self) -> None:
        super().__init__(name="memory-watch", daemon=True)
        self._mapped = uss() - anonymous()
        self._peak = self.now = self._mapped + anonymous()
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        self.now = self._mapped + anonymous()
        self._peak = max(self._peak, self.now)

    def take(self) -> int:
        """The peak in bytes; starts the next one from what is held now."""
        mapped = uss() - anonymous()  # libraries come in page by page, as their code is first run
        grown, self._mapped = mapped - self._mapped, mapped
        self._look()
        peak, self._peak = self._peak + max(0, grown), self.now
        return peak

    def end(self) -> None:
        self._ended.set()
        self.join()
