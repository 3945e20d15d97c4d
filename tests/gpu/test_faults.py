"""Faults put in on purpose are caught: tensors on the wrong device, and the order of streams and host."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_gpu import DeviceMixError, PretendedGpu, StreamRaceError
from torch import Tensor

from streamslr.calibration.grams import GramCollector
from streamslr.calibration.hidden_states import WriteThrough, read_batches
from streamslr.calibration.transfers import Transfers
from streamslr.errors import InputError
from streamslr.io.packing import pack
from streamslr.masters import flats
from streamslr.run import solve_linear
from streamslr.run.rank_windows import RankWindows
from streamslr.run.solve_linear import LinearCompressor
from streamslr.solvers import threebasil
from streamslr.solvers.threebasil_state import AdmmState
from tests.support.pretended import run_on_gpu
from tests.support.tiny_models import tiny_checkpoint

Patch = Callable[[pytest.MonkeyPatch], None]


def gram_stays_on_the_host(patch: pytest.MonkeyPatch) -> None:
    compress = LinearCompressor.compress
    patch.setattr(
        LinearCompressor,
        "compress",
        lambda self, name, linear, weight, gram, *args: compress(self, name, linear, weight, gram.cpu(), *args),
    )


def gram_is_made_on_the_host(patch: pytest.MonkeyPatch) -> None:
    add = GramCollector._add

    def on_host(self: GramCollector, owner: str, x: Tensor) -> None:
        self._grams.setdefault(owner, torch.zeros(x.shape[-1], x.shape[-1]))
        add(self, owner, x)

    patch.setattr(GramCollector, "_add", on_host)


def hidden_states_stay_on_the_host(patch: pytest.MonkeyPatch) -> None:
    def batches(self: RankWindows, states: Any, step: Any = None, wanted: Any = None) -> Iterator[tuple[int, Tensor]]:
        yield from read_batches(states, wanted or self.all_spans())

    patch.setattr(RankWindows, "batches", batches)


def solver_starts_on_the_host(patch: pytest.MonkeyPatch) -> None:
    build = AdmmState

    def on_host(*args: Any) -> Any:
        state = build(*args)
        state.B = state.B.cpu()
        return state

    patch.setattr(threebasil, "AdmmState", on_host)


def packed_parts_are_on_the_host(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(solve_linear, "pack", lambda *args: {name: part.cpu() for name, part in pack(*args).items()})


def masters_are_on_the_host(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("streamslr.matching.flats", lambda shapes, _, ranks: flats(shapes, torch.device("cpu"), ranks))


def device_memory_is_read_by_numpy(patch: pytest.MonkeyPatch) -> None:
    def store(
        self: Transfers, states: WriteThrough, window: int, number: int, values: Tensor, copied: torch.cuda.Event
    ) -> None:
        self._free.put((number, None))
        states._disk.write_unchanging(window, values[None])

    patch.setattr(Transfers, "_store", store)


@pytest.mark.parametrize(
    "fault",
    [
        gram_stays_on_the_host,
        gram_is_made_on_the_host,
        hidden_states_stay_on_the_host,
        solver_starts_on_the_host,
        packed_parts_are_on_the_host,
        masters_are_on_the_host,
        device_memory_is_read_by_numpy,
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_tensor_on_the_wrong_device_ends_the_run(
    fault: Patch, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint(tmp_path / "model", blocks=1, hidden=32)
    fault(monkeypatch)
    # what a block raises in a pass becomes an InputError, with the text of the fault
    with pytest.raises((DeviceMixError, TypeError, InputError), match="pretended"):
        run_on_gpu(model, text, tmp_path / "out", iterations=1)


def pinned_buffer_is_filled_again_while_it_is_copied() -> None:
    host = torch.ones(8).pin_memory()
    host.to("cuda", non_blocking=True)
    host.zero_()


def host_reads_before_the_copy_is_over() -> None:
    torch.ones(8, device="cuda").to("cpu", non_blocking=True).sum()


def host_reads_by_numpy_before_the_copy_is_over() -> None:
    torch.empty(8, pin_memory=True).copy_(torch.ones(8, device="cuda"), non_blocking=True).numpy()


def kernel_does_not_wait_for_the_copy_stream() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        copied = torch.ones(8).pin_memory().to("cuda", non_blocking=True)
    copied.add_(1)


def copy_stream_does_not_wait_for_the_kernel() -> None:
    side, x = torch.cuda.Stream(), torch.ones(8, device="cuda") + 1
    with torch.cuda.stream(side):
        x.to("cpu", non_blocking=True)


@pytest.mark.parametrize(
    "race",
    [
        pinned_buffer_is_filled_again_while_it_is_copied,
        host_reads_before_the_copy_is_over,
        host_reads_by_numpy_before_the_copy_is_over,
        kernel_does_not_wait_for_the_copy_stream,
        copy_stream_does_not_wait_for_the_kernel,
    ],
    ids=lambda race: race.__name__,
)
def test_work_without_an_order_is_found(race: Callable[[], None]) -> None:
    with PretendedGpu(), pytest.raises(StreamRaceError):
        race()


def test_events_and_waits_make_an_order() -> None:
    """A ring of one pinned buffer, filled again when its event says so, and a copy stream that kernels wait for."""
    with PretendedGpu() as gpu:
        side, ready, host = torch.cuda.Stream(), torch.cuda.Event(), torch.empty(8, pin_memory=True)
        total = torch.zeros(8, device="cuda")
        for number in range(3):
            ready.synchronize()
            host.fill_(number)
            with torch.cuda.stream(side):
                copied = host.to("cuda", non_blocking=True)
                ready.record()
            torch.cuda.current_stream().wait_event(ready)
            total += copied
            copied.record_stream(torch.cuda.current_stream())
        assert total.tolist() == [3.0] * 8
    assert (gpu.cost.syncs, gpu.cost.event_waits, gpu.cost.copied["h2d", "pinned"]) == (1, 3, 96)


def test_memory_freed_while_another_stream_may_use_it_is_found() -> None:
    def use_and_free() -> None:
        with PretendedGpu():
            side, x = torch.cuda.Stream(), torch.ones(8, device="cuda")
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x.add_(1)
            del x

    with pytest.raises(RuntimeError, match="record_stream"):
        use_and_free()


def test_what_cuda_refuses_to_do_deterministically_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(True)
    try:
        with PretendedGpu():
            x = torch.ones(8, 8, device="cuda")
            with pytest.raises(RuntimeError, match="CUBLAS_WORKSPACE_CONFIG"):
                _ = x @ x
            with pytest.raises(RuntimeError, match="kthvalue"):
                x.kthvalue(2)
    finally:
        torch.use_deterministic_algorithms(False)
