"""Host and GPU memory: what this process holds and may hold, giving freed memory back, retrying with less."""

import ctypes
import gc
import logging
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from streamslr.errors import first_line, says_out_of_memory

_SAMPLE_SECONDS = 0.05
_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # mallopt(3)
_LARGE = 2**20
_SHARD = re.compile(rb"\.safetensors[^\n]*\n(?:[^\n]*\n)*?Rss: +(\d+) kB")
"""Resident pages of a mapped shard in /proc/self/smaps: proc_pid_smaps(5)."""

log = logging.getLogger("streamslr")

T = TypeVar("T")


def keep_no_freed_memory() -> None:
    """Make glibc return every freed tensor of 1 MB or more to the system at once, for the rest of the process.

    By default glibc raises that size to 32 MB as large tensors are freed, and keeps what is below it in one arena a
    thread. The private peak of a run on the 8 M reference model then creeps from 500 to 570 MB over eight blocks;
    with this call it stays at 440 MB, at the same speed. Does nothing where the C library is not glibc.
    """
    if libc := _glibc():
        libc.mallopt(_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_ARENA_MAX, 2)


def return_freed_memory() -> None:
    """Return the small freed allocations to the system too (tokenizers make millions)."""
    if libc := _glibc():
        libc.malloc_trim(0)


def release_memory(device: torch.device) -> None:
    """Free what only reference cycles hold, and what torch's allocator keeps of a GPU's memory for later use."""
    gc.collect()
    return_freed_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def held_to_gpu_limit(device: torch.device, limit: int | None) -> Iterator[None]:
    """Make torch's allocator refuse to reserve more of a GPU's memory than `limit` bytes while entered."""
    if device.type != "cuda" or limit is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def note_nothing(phase: str, sentence: str) -> None:
    """Take no note of a retry."""


def retry_on_oom(
    work: Callable[[], T],
    shrink: Callable[[], str | None],
    *,
    phase: str,
    device: torch.device,
    note: Callable[[str, str], None] = note_nothing,
) -> T:
    """Call `work`; where memory runs out in it, shrink and call it once more, as often as something can shrink.

    Args:
        work: What to do. It must leave nothing behind when it fails.
        shrink: Makes the next call need less memory and says how, in words; returns None where nothing can shrink.
        phase: Name of the work, for messages.
        device: Where the work computes; its unused memory is released before the next call.
        note: Called before each further call, with the phase and what it does with less, for the journal.

    Returns:
        What `work` returns.

    Raises:
        MemoryError: Memory ran out and nothing can shrink. Other errors pass through.
    """
    while True:
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not says_out_of_memory(error):
                raise
            reason = first_line(error)
        # Outside of the except clause: the traceback holds the tensors of the call that failed.
        release_memory(device)
        smaller = shrink()
        if smaller is None:
            raise MemoryError(f"phase {phase}, as small as it can be: {reason}")
        log.warning("phase %s ran out of memory (%s): once more with %s", phase, reason, smaller)
        note(phase, f"ran out of memory: {smaller}")


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None


def held() -> int:
    """Return the bytes of memory that this process holds. Takes 2 ms; 20 ms where a shard is mapped.

    That is its resident memory without the pages of mapped shards, which the kernel can reclaim. Pages of libraries
    count whole. The unique set size leaves out those that another process maps too, so a run beside a second one
    seemed to hold 60 MB less, and its plan was short by them when the other ended.
    """
    resident = int(psutil.Process().memory_info().rss)
    if b".safetensors" not in Path("/proc/self/maps").read_bytes():
        return resident
    # psutil.Process.memory_maps() reads the same in 70 ms.
    return resident - sum(1024 * int(kilobytes) for kilobytes in _SHARD.findall(Path("/proc/self/smaps").read_bytes()))


def anonymous() -> int:
    """Return this process's memory without mapped files, so without shards and libraries, in bytes."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def free_host_memory() -> int:
    """Return the bytes that this process may hold: its own, and what is free on the machine or in its container."""
    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        # The page cache counts as used here, though the kernel gives it up on demand.
        stat = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
        cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
        free = min(free, int(text) - int(used.read_text()) + cached)
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)  # ulimit -v
    if address_space != resource.RLIM_INFINITY:
        free = min(free, max(0, address_space - int(psutil.Process().memory_info().vms)))
    return free + held()


class MemoryWatch(threading.Thread):
    """Peak of the host memory that `held` counts, since the last take().

    Anonymous memory is sampled every 50 ms; mapped memory is taken from the last take().
    """

    def __init__(self) -> None:
        super().__init__(name="memory-watch", daemon=True)
        self._mapped = held() - anonymous()
        self._peak = self.now = self._mapped + anonymous()
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        self.now = self._mapped + anonymous()
        self._peak = max(self._peak, self.now)

    def take(self) -> int:
        """Return the peak in bytes, and start the next one from what is held now."""
        mapped = held() - anonymous()  # grows as pages of libraries are first run
        grown, self._mapped = mapped - self._mapped, mapped
        self._look()
        peak, self._peak = self._peak + max(0, grown), self.now
        return peak

    def end(self) -> None:
        self._ended.set()
        self.join()
