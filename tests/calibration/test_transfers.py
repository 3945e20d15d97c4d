"""Windows between the host and a GPU: what is copied, what waits, and what faults of a tier become."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from streamslr.calibration.hidden_states import InMemory, OnDisk, Span
from streamslr.calibration.transfers import Resident, Transfers, pinned_bytes, pinned_windows
from streamslr.errors import StreamslrError

SHAPE = (6, 3, 4)
WINDOW = 3 * 4 * 4
BATCHES: list[Span] = [(2, 4), (0, 2), (4, 6)]


@pytest.fixture
def gpu() -> Iterator[Any]:
    with pytest.importorskip("pretended_gpu").PretendedGpu() as gpu:
        yield gpu


def written() -> tuple[InMemory, torch.Tensor]:
    hidden = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    states = InMemory(*SHAPE, torch.float32)
    states.write(0, hidden)
    return states, hidden


def transfers() -> Transfers:
    return Transfers(torch.device("cuda"), WINDOW)


def test_the_thread_that_computes_waits_for_no_copy(gpu: Any) -> None:
    states, leaving = written()[0], InMemory(*SHAPE, torch.float32)
    moving, before = transfers(), gpu.cost.syncs
    with moving.writing(leaving, 2) as write:
        for start, x in moving.read(states, BATCHES):
            write(start, x.mul_(2))
    assert gpu.cost.syncs == before
    assert torch.equal(leaving.read(0, 6), 2 * states.read(0, 6))


@pytest.mark.parametrize(("resident_windows", "again"), [(0, 6), (3, 3), (6, 0)])
def test_windows_that_stay_on_the_gpu_are_copied_once(gpu: Any, resident_windows: int, again: int) -> None:
    states, hidden = written()
    moving, resident = transfers(), Resident(states, resident_windows, torch.device("cuda"))
    copied = []
    for _ in range(2):
        before = gpu.cost.h2d
        for start, x in moving.read(states, BATCHES, resident):
            assert torch.equal(x.cpu(), hidden[start : start + 2])
            x.zero_()
        copied.append(gpu.cost.h2d - before)
    assert copied == [6 * WINDOW, again * WINDOW]


def test_each_window_leaves_the_gpu_once(gpu: Any, tmp_path: Path) -> None:
    hidden, leaving = written()[1].cuda(), OnDisk(tmp_path / "boundary.zarr", *SHAPE, torch.float32, writers=4)
    before = gpu.cost.d2h
    with transfers().writing(leaving, 2) as write:
        for start, stop in BATCHES:
            write(start, hidden[start:stop])
    assert gpu.cost.d2h - before == 6 * WINDOW
    leaving.seal()


@pytest.mark.usefixtures("gpu")
def test_a_window_that_is_lost_ends_the_pass_and_every_buffer_is_free_again(tmp_path: Path) -> None:
    states = OnDisk(tmp_path / "boundary.zarr", *SHAPE, torch.float32)
    states.write(0, written()[1])
    states.seal()
    (tmp_path / "boundary.zarr/c/5/0/0").unlink()
    moving = transfers()
    for _ in range(pinned_windows(WINDOW) + 1):
        with pytest.raises(StreamslrError, match=r"windows .* missing or not as they were written"):
            list(moving.read(states, BATCHES))


@pytest.mark.usefixtures("gpu")
def test_a_write_that_fails_ends_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StreamslrError("the disk is full")

    monkeypatch.setattr(InMemory, "write", full)
    moving, leaving = transfers(), InMemory(*SHAPE, torch.float32)
    for _ in range(pinned_windows(WINDOW) + 1):
        with pytest.raises(StreamslrError, match="full"), moving.writing(leaving, 2) as write:
            write(0, torch.zeros(2, *SHAPE[1:], device="cuda"))


@pytest.mark.parametrize(
    ("window", "windows", "pinned"), [(2**20, 8, 2**23), (3 * 2**20, 8, 2**25), (2**26, 8, 2**29), (2**29, 2, 2**30)]
)
def test_pinned_memory_is_bounded(window: int, windows: int, pinned: int) -> None:
    assert (pinned_windows(window), pinned_bytes(window)) == (windows, pinned)
