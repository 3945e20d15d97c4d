"""Model of torch's caching allocator for CUDA: what it reserves for given allocations, and when it runs out.

Rules and sizes are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.13): sizes rounded to 512 bytes, one pool for
allocations up to 1 MB and one for larger ones, per stream; best fit among cached blocks; a limit on what is reserved;
cached memory given back once when the limit is hit. Expandable segments map pages of 2 MB (small) or 20 MB (large) at
the end of one range of addresses per pool, and give back only whole pages.

Not modelled: private pools of CUDA graphs, `max_split_size_mb`, `garbage_collection_threshold`, and the time that a
block of `record_stream` waits for the other stream.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import torch

ROUND, SMALL, SMALL_BUFFER = 512, 1 << 20, 2 << 20
MIN_LARGE, LARGE_BUFFER, ROUND_LARGE = 10 << 20, 20 << 20, 2 << 20

Pool = tuple[int, bool]
"""Number of a stream; whether the pool is that of small allocations."""


@dataclass(eq=False)
class Block:
    """A range of device memory, in a list with its neighbours of the same segment."""

    size: int
    pool: Pool
    free: bool = False
    mapped: bool = True  # False: addresses of an expandable segment without memory
    expandable: bool = False
    previous: "Block | None" = None
    next: "Block | None" = None

    @property
    def whole(self) -> bool:
        return self.previous is None and self.next is None


class _Cache:
    """Free blocks of one pool, sorted by size."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, Block]] = []

    def __iter__(self) -> Iterator[Block]:
        return iter([block for *_, block in self._entries])

    def add(self, block: Block) -> None:
        bisect.insort(self._entries, (block.size, id(block), block))

    def remove(self, block: Block) -> None:
        at = bisect.bisect_left(self._entries, (block.size, id(block)))
        assert self._entries[at][2] is block
        del self._entries[at]

    def fitting(self, size: int) -> Iterator[Block]:
        """Yield the blocks of at least `size` bytes, the smallest first."""
        for at in range(bisect.bisect_left(self._entries, (size, 0)), len(self._entries)):
            yield self._entries[at][2]


class CachingAllocator:
    """Allocations on one device, held to a limit.

    Attributes:
        limit: Bytes that may be reserved.
        expandable: Use expandable segments. It may change until the first allocation.
        allocated, reserved: Bytes in use, and bytes taken from the device.
        peak_allocated, peak_reserved: The most of both since `reset_peaks`.
        allocations: Number of allocations.
        retries: Times that cached memory was given back because the limit was hit.
        failures: Times that this did not help, so that memory ran out.
    """

    def __init__(self, total: int, expandable: bool = False) -> None:
        self.limit, self.expandable = total, expandable
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.allocations = self.retries = self.failures = 0
        self._caches: dict[Pool, _Cache] = {}
        self._ends: dict[Pool, Block] = {}  # last block of each pool's expandable segment, never mapped

    def malloc(self, size: int, stream: int = 0) -> Block:
        """Return a block of at least `size` bytes for work on `stream`.

        Raises:
            torch.OutOfMemoryError: The limit does not allow it, even with nothing cached.
        """
        rounded = max(ROUND, -(-size // ROUND) * ROUND)
        pool = (stream, rounded <= SMALL)
        block = self._cached(rounded, pool) or self._reserve(rounded, pool)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = self._reserve(rounded, pool)
        if block is None:
            self.failures += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {rounded / 2**30:.2f} GiB: {self.allocated / 2**30:.2f} GiB "
                f"are allocated, {self.reserved / 2**30:.2f} GiB reserved, the limit is {self.limit / 2**30:.2f} GiB "
                f"(pretended)"
            )
        block.free = False
        self._split(block, rounded)
        self.allocations += 1
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def free(self, block: Block) -> None:
        """Keep the memory of a block for later allocations."""
        self.allocated -= block.size
        self._put_back(block)

    def empty_cache(self) -> None:
        """Give back the segments, or the whole pages of expandable segments, that hold no live block."""
        for cache in self._caches.values():
            for block in cache:
                if block.expandable:
                    self._unmap(block)
                elif block.whole:
                    cache.remove(block)
                    self.reserved -= block.size

    def reset_peaks(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _cache(self, pool: Pool) -> _Cache:
        return self._caches.setdefault(pool, _Cache())

    def _cached(self, size: int, pool: Pool) -> Block | None:
        """Take the smallest free block that is large enough; one at a growing end counts as what it can grow to."""
        found: Block | None = None
        for block in self._cache(pool).fitting(size):
            if block.expandable and block.next is not None and block.next is self._ends.get(pool):
                found = found or block
                continue
            found = block
            break
        if found is not None:
            self._cache(pool).remove(found)
        return found

    def _reserve(self, size: int, pool: Pool) -> Block | None:
        """Take memory from the device; None where the limit does not allow it."""
        segment = SMALL_BUFFER if pool[1] else LARGE_BUFFER if size < MIN_LARGE else _round_up(size, ROUND_LARGE)
        if self.reserved + segment > self.limit:
            return None
        if self.expandable:
            return self._grow(size, pool)
        self.reserved += segment
        return Block(segment, pool)

    def _grow(self, size: int, pool: Pool) -> Block:
        """Map pages into the first run of free addresses that can hold `size` bytes: a gap, or the segment's end."""
        block = self._ends.get(pool)
        if block is None:
            block = self._ends[pool] = Block(1 << 62, pool, mapped=False, expandable=True)
        while block.previous is not None:
            block = block.previous
        start, room = block, 0
        while room < size:  # the last block, which is not mapped, is as large as it takes
            room += block.size
            if block.mapped and not block.free:
                assert block.next is not None
                start, room = block.next, 0
            if room < size:
                assert block.next is not None
                block = block.next
        taken = self._take(start, size)
        while taken.size < size:
            assert taken.next is not None
            self._absorb(taken, self._take(taken.next, size - taken.size))
        return taken

    def _take(self, block: Block, size: int) -> Block:
        """Return a free block out of the cache; or if it has no memory, its front, given pages for `size` bytes."""
        if block.mapped:
            self._cache(block.pool).remove(block)
            return block
        size = min(_round_up(size, _page(block.pool)), block.size)
        self.reserved += size
        if size == block.size:
            block.mapped = True
            return block
        front = Block(size, block.pool, expandable=True)
        block.size -= size
        _insert(front, block.previous, block)
        return front

    def _unmap(self, block: Block) -> None:
        """Give back the whole pages in a free block; what is left before and behind them stays cached."""
        address, other = 0, block.previous
        while other is not None:
            address, other = address + other.size, other.previous
        end = address + block.size
        start, stop = _round_up(address, _page(block.pool)), end // _page(block.pool) * _page(block.pool)
        if stop <= start:
            return
        self._cache(block.pool).remove(block)
        self.reserved -= stop - start
        block.size, block.mapped, block.free = stop - start, False, False
        if start > address:
            before = Block(start - address, block.pool, free=True, expandable=True)
            _insert(before, block.previous, block)
            self._cache(block.pool).add(before)
        if end > stop:
            behind = Block(end - stop, block.pool, free=True, expandable=True)
            _insert(behind, block, block.next)
            self._cache(block.pool).add(behind)
        for neighbour in (block.previous, block.next):
            if neighbour is not None and not neighbour.mapped:
                self._absorb(block, neighbour)

    def _split(self, block: Block, size: int) -> None:
        rest = block.size - size
        if rest >= ROUND if block.pool[1] or block.expandable else rest > SMALL:
            after = Block(rest, block.pool, expandable=block.expandable)
            block.size = size
            _insert(after, block, block.next)
            self._put_back(after)

    def _put_back(self, block: Block) -> None:
        """Make a block free, joined with its free neighbours."""
        block.free = True
        for other in (block.previous, block.next):
            if other is not None and other.free:
                self._cache(block.pool).remove(other)
                self._absorb(block, other)
        self._cache(block.pool).add(block)

    def _absorb(self, block: Block, neighbour: Block) -> None:
        """Make a neighbour part of a block."""
        block.size += neighbour.size
        if neighbour is block.previous:
            _link(neighbour.previous, block)
        else:
            _link(block, neighbour.next)
        if self._ends.get(block.pool) is neighbour:
            self._ends[block.pool] = block


def _page(pool: Pool) -> int:
    return SMALL_BUFFER if pool[1] else LARGE_BUFFER


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _link(first: Block | None, second: Block | None) -> None:
    if first is not None:
        first.next = second
    if second is not None:
        second.previous = first


def _insert(block: Block, after: Block | None, before: Block | None) -> None:
    _link(after, block)
    _link(block, before)
