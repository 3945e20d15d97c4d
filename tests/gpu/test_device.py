"""The pretended device itself: its allocator, what it counts, and what it answers."""

import random

import pytest
import torch
from pretended_gpu import PretendedGpu
from pretended_gpu.allocator import Block, CachingAllocator

MB = 2**20


def checkered(allocator: CachingAllocator) -> list[Block]:
    """Allocate 64 blocks of 40 MB, free every second one, and return the others."""
    blocks = [allocator.malloc(40 * MB) for _ in range(64)]
    for block in blocks[::2]:
        allocator.free(block)
    return blocks[1::2]


def test_gaps_are_reserved_until_the_limit_gives_them_back() -> None:
    allocator = CachingAllocator(64 * 40 * MB)
    checkered(allocator)
    allocator.malloc(100 * MB)  # no gap is large enough
    assert allocator.retries == 1
    assert allocator.reserved == (32 * 40 + 100) * MB


def test_expandable_segments_use_gaps_of_whole_pages_again() -> None:
    allocator = CachingAllocator(64 * 40 * MB + 20 * MB, expandable=True)
    checkered(allocator)
    allocator.malloc(512 * MB)
    assert allocator.retries == 1
    assert allocator.reserved <= allocator.limit


def test_a_large_block_is_split_only_with_expandable_segments() -> None:
    """By default what is left of a large block stays with it when it is 1 MB or less."""
    sizes = []
    for expandable in (False, True):
        allocator = CachingAllocator(10**9, expandable)
        allocator.free(allocator.malloc(40 * MB))
        sizes.append(allocator.malloc(39 * MB + 512 * 1024).size)
    assert sizes == [40 * MB, 39 * MB + 512 * 1024]


@pytest.mark.parametrize("expandable", [False, True])
def test_whatever_is_freed_can_be_given_back(expandable: bool) -> None:
    numbers, allocator = random.Random(0), CachingAllocator(2 << 30, expandable)
    live: list[Block] = []
    for _ in range(3000):
        if live and numbers.random() < 0.5:
            allocator.free(live.pop(numbers.randrange(len(live))))
            continue
        try:
            live.append(allocator.malloc(int(2 ** numbers.uniform(5, 28)), numbers.choice([0, 0, 1])))
        except torch.OutOfMemoryError:
            allocator.free(live.pop())
        assert sum(block.size for block in live) == allocator.allocated <= allocator.reserved
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)


def test_the_environment_chooses_expandable_segments_until_the_first_allocation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with PretendedGpu() as gpu:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.ones(1, device="cuda")
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
        torch.ones(1, device="cuda")
        assert gpu.allocator.expandable


def test_memory_is_freed_with_the_last_view() -> None:
    with PretendedGpu() as gpu:
        x = torch.ones(1000, device="cuda")
        view = x[10:]
        del x
        assert gpu.allocator.allocated == 4096
        del view
        assert gpu.allocator.allocated == 0


def test_a_limit_is_one_of_reserved_memory() -> None:
    with PretendedGpu(total=100 * MB) as gpu:
        torch.cuda.set_per_process_memory_fraction(0.2)
        small = torch.empty(1, device="cuda")  # 2 MB are reserved for small ones
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(19 * MB, dtype=torch.uint8, device="cuda")
        assert (gpu.allocator.retries, small.nbytes) == (1, 4)


def test_products_count_for_the_unit_that_multiplies_them() -> None:
    precision = torch.get_float32_matmul_precision()
    with PretendedGpu() as gpu:
        x = torch.ones(4, 4, device="cuda")
        _ = x @ x
        try:
            torch.set_float32_matmul_precision("high")
            _ = x @ x
        finally:
            torch.set_float32_matmul_precision(precision)
        half = x.bfloat16()
        wide = torch.mm(half, half, out_dtype=torch.float32)
        wide = torch.addmm(wide, half, half, out_dtype=torch.float32)
    assert gpu.cost.flops == {"fp32": 128.0, "tf32": 128.0, "bf16": 256.0}
    assert wide.dtype == torch.float32
    assert wide.tolist() == [[8.0] * 4] * 4


def test_copies_count_by_way_and_by_memory() -> None:
    with PretendedGpu() as gpu:
        torch.ones(4).to("cuda")
        torch.ones(4).to("cuda", non_blocking=True)  # pageable: the host waits all the same
        torch.ones(4).pin_memory().to("cuda", non_blocking=True)
        x = torch.ones(4, device="cuda")
        x.cpu()
        x.to("cpu", torch.bfloat16)  # cast on the host
        x.to("cpu", torch.bfloat16, non_blocking=True)  # cast on the device, into pinned memory
    assert gpu.cost.copied == {
        ("h2d", "pageable"): 32,
        ("h2d", "pinned"): 16,
        ("d2h", "pageable"): 32,
        ("d2h", "pinned"): 8,
    }
    assert gpu.cost.syncs == 4


def test_without_values_a_scalar_is_what_a_sound_run_gives() -> None:
    with PretendedGpu(values=False) as gpu:
        huge = torch.zeros(1 << 20, 1 << 12, device="cuda")  # 17 GB
        assert not bool(huge.isnan().any())
        assert bool(torch.isfinite(huge).all())
        first, second = float(huge.sum()), float(huge.sum())
        assert first > second > 0
        assert gpu.cost.syncs == 4
