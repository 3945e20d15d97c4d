"""One contract for every tier of hidden states, and what the disk tier does when files are lost."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from streamslr.calibration.hidden_states import (
    HiddenStates,
    HiddenStateStream,
    InMemory,
    OnDisk,
    WriteThrough,
    read_batches,
    spans,
)
from streamslr.calibration.transfers import Resident, Transfers
from streamslr.errors import BudgetError, StreamslrError

SAMPLES, SEQ_LEN, HIDDEN = 5, 3, 4
SHAPE = (SAMPLES, SEQ_LEN, HIDDEN)
Make = Callable[[torch.dtype], HiddenStates]


class ThroughGpu:
    """A boundary whose windows are written from a GPU and read on it, some of which stay there."""

    def __init__(self, tier: HiddenStates, resident_windows: int) -> None:
        self.windows, self.shape, self.dtype, self._tier = tier.windows, tier.shape, tier.dtype, tier
        self._transfers = Transfers(torch.device("cuda"), SEQ_LEN * HIDDEN * 4)
        self._resident = Resident(tier, resident_windows, torch.device("cuda"))

    def write(self, start: int, hidden: torch.Tensor) -> None:
        with self._transfers.writing(self._tier, len(hidden)) as write:
            given = hidden.cuda()
            write(start, given)
            given.zero_()

    def read(self, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        ((_, hidden),) = [(i, x.cpu()) for i, x in self._transfers.read(self._tier, [(start, stop)], self._resident)]
        return hidden if out is None else out.copy_(hidden)

    def seal(self) -> tuple[bytes, ...]:
        return self._tier.seal()

    def drop(self) -> None:
        self._tier.drop()


@pytest.fixture(params=["memory", "disk", "both", "gpu", "gpu and memory", "gpu and disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    def make(dtype: torch.dtype) -> HiddenStates:
        memory = InMemory(*SHAPE, dtype)
        if request.param == "memory":
            return memory
        disk = OnDisk(tmp_path / "boundary.zarr", *SHAPE, dtype, writers=4 if "gpu" in request.param else 1)
        tier = disk if "disk" in request.param else WriteThrough(memory, disk)
        return ThroughGpu(tier, SAMPLES if request.param == "gpu" else 1) if "gpu" in request.param else tier

    if "gpu" in request.param:
        with pytest.importorskip("pretended_gpu").PretendedGpu():
            yield make
    else:
        yield make


def states(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_back_the_bits_that_were_written(make: Make, dtype: torch.dtype) -> None:
    hidden, tier = states(dtype), make(dtype)
    tier.write(3, hidden[3:])
    tier.write(0, hidden[:3])
    tier.seal()
    assert torch.equal(tier.read(0, SAMPLES), hidden)
    assert torch.equal(tier.read(2, 4), hidden[2:4])


def test_zeros_and_special_values_survive(make: Make) -> None:
    hidden = torch.zeros(SHAPE)
    hidden[1] = -0.0
    hidden[2, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45])
    tier = make(torch.float32)
    tier.write(0, hidden)
    tier.seal()
    assert torch.equal(tier.read(0, SAMPLES).view(torch.int32), hidden.view(torch.int32))


def test_the_digest_names_the_content_not_the_tier_or_the_batches(make: Make) -> None:
    hidden, tier = states(torch.bfloat16), make(torch.bfloat16)
    for i in reversed(range(SAMPLES)):
        tier.write(i, hidden[i : i + 1])
    expected = InMemory(*SHAPE, torch.bfloat16)
    expected.write(0, hidden)
    assert tier.seal() == expected.seal()
    changed = InMemory(*SHAPE, torch.bfloat16)
    changed.write(0, states(torch.bfloat16, seed=1))
    assert tier.seal() != changed.seal()


def test_the_writer_and_the_reader_own_their_tensors(make: Make) -> None:
    hidden, tier = states(torch.float32), make(torch.float32)
    given = hidden.clone()
    tier.write(0, given)
    given.zero_()
    tier.seal()
    tier.read(0, 2).zero_()
    assert torch.equal(tier.read(0, SAMPLES), hidden)


def test_what_was_just_written_is_read_even_before_it_lies_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that is not there yet would read as zeros."""
    hold, store = threading.Event(), OnDisk._store

    def late(self: OnDisk, start: int, host: torch.Tensor) -> None:
        hold.wait(0.2)
        store(self, start, host)

    monkeypatch.setattr(OnDisk, "_store", late)
    tier, hidden = OnDisk(tmp_path / "late", *SHAPE, torch.float32), states(torch.float32)
    tier.write(0, hidden)
    assert torch.equal(tier.read(0, SAMPLES), hidden)


def remove(chunk: Path) -> None:
    chunk.unlink()


def remove_all(chunk: Path) -> None:
    shutil.rmtree(chunk.parents[3])


def truncate(chunk: Path) -> None:
    chunk.write_bytes(chunk.read_bytes()[:-1])


def empty(chunk: Path) -> None:
    chunk.write_bytes(b"")


def flip(chunk: Path) -> None:
    content = bytearray(chunk.read_bytes())
    content[7] ^= 1
    chunk.write_bytes(content)


def put_a_pipe(chunk: Path) -> None:
    chunk.unlink()
    os.mkfifo(chunk)


@pytest.mark.parametrize("damage", [remove, remove_all, truncate, empty, flip, put_a_pipe])
@pytest.mark.parametrize("reopened", [False, True])
def test_a_chunk_that_is_not_as_it_was_written_is_never_read(
    tmp_path: Path, damage: Callable[[Path], None], reopened: bool
) -> None:
    tier: HiddenStates | None = OnDisk(tmp_path / "boundary.zarr", *SHAPE, torch.float32)
    assert tier
    tier.write(0, states(torch.float32))
    tier.seal()
    if reopened:
        tier = OnDisk.reopen(tmp_path / "boundary.zarr", SHAPE, torch.float32)
        assert tier
    assert torch.equal(tier.read(0, 5), states(torch.float32))
    damage(tmp_path / "boundary.zarr/c/2/0/0")
    with pytest.raises(StreamslrError, match=r"boundary\.zarr: windows (1 to 3|\[.*2.*\]) .*; start the same line"):
        tier.read(1, 4)
    if damage is not remove_all:
        assert torch.equal(tier.read(3, 5), states(torch.float32)[3:])


@pytest.mark.parametrize("file", ["zarr.json", "c/2/0/0"])
def test_a_boundary_with_a_pipe_in_place_of_a_file_is_not_reopened(tmp_path: Path, file: str) -> None:
    tier = OnDisk(tmp_path / "boundary.zarr", *SHAPE, torch.float32)
    tier.write(0, states(torch.float32))
    tier.seal()
    put_a_pipe(tmp_path / "boundary.zarr" / file)
    assert OnDisk.reopen(tmp_path / "boundary.zarr", SHAPE, torch.float32) is None


def test_an_incomplete_boundary_cannot_be_sealed(make: Make) -> None:
    tier = make(torch.float32)
    tier.write(1, states(torch.float32)[1:])
    with pytest.raises(ValueError, match=r"without windows \[0\]"):
        tier.seal()


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 9])
def test_batches_cover_a_boundary_in_order(make: Make, micro_batch: int) -> None:
    hidden, tier = states(torch.float32), make(torch.float32)
    tier.write(0, hidden)
    tier.seal()
    starts, parts = zip(*read_batches(tier, spans([(0, SAMPLES)], micro_batch)), strict=True)
    assert list(starts) == list(range(0, SAMPLES, micro_batch))
    assert torch.equal(torch.cat(parts), hidden)


def boundaries(folder: Path, in_memory: bool = False) -> HiddenStateStream:
    return HiddenStateStream(folder, "boundary", SHAPE, torch.bfloat16, in_memory)


def sealed(folder: Path, index: int = 3) -> tuple[bytes, ...]:
    tier = boundaries(folder).new(index)
    tier.write(0, states(torch.bfloat16))
    return tier.seal()


@pytest.mark.parametrize("in_memory", [False, True])
def test_another_process_reopens_a_sealed_boundary(tmp_path: Path, in_memory: bool) -> None:
    tier = boundaries(tmp_path, in_memory).new(3)
    tier.write(0, states(torch.bfloat16))
    digests = tier.seal()
    reopened = boundaries(tmp_path, in_memory).reopen(3)
    assert reopened is not None
    assert reopened.seal() == digests
    assert torch.equal(reopened.read(0, SAMPLES), states(torch.bfloat16))


def test_a_lost_or_damaged_boundary_is_not_reopened_as_it_was(tmp_path: Path) -> None:
    digests = sealed(tmp_path)
    chunk = tmp_path / "boundary-00003.zarr" / "c" / "2" / "0" / "0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    flipped = boundaries(tmp_path).reopen(3)
    assert flipped is None or flipped.seal() != digests
    chunk.write_bytes(whole[:-2])
    assert boundaries(tmp_path).reopen(3) is None
    chunk.unlink()  # zarr would read it as zeros
    missing = boundaries(tmp_path).reopen(3)
    assert missing is None or missing.seal() != digests
    assert boundaries(tmp_path / "elsewhere").reopen(3) is None


def test_reopening_discards_every_other_boundary(tmp_path: Path) -> None:
    sealed(tmp_path, 3)
    sealed(tmp_path, 4)
    assert boundaries(tmp_path).reopen(3) is not None
    assert [p.name for p in tmp_path.iterdir()] == ["boundary-00003.zarr"]


def test_a_full_disk_is_a_budget_error_that_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    tier = OnDisk(tmp_path / "g.zarr", *SHAPE, torch.float32)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(tier._array), "__setitem__", full)
    tier.write(0, states(torch.float32))
    with pytest.raises(BudgetError, match=r"No space left .* 240 bytes.*--scratch"):
        tier.seal()
