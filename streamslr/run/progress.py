"""Progress of a run: seconds and peak memory of each phase, time left, a live display, a log line a block."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from streamslr.config import format_bytes
from streamslr.memory import MemoryWatch
from streamslr.printable import printable
from streamslr.ranks import Ranks, Traffic
from streamslr.run.journal import BlockRecord, Phases, Retries
from streamslr.run.plan import BlockKind

log = logging.getLogger("streamslr")

PHASES = ("survey", "non_block", "embed", "load", "grams", "solve", "match", "propagate", "check", "commit", "compare")
"""Phases in the order that a run goes through them; the first three come before block 0, LATE behind the last."""
LATE = ("compare",)


class Display(Protocol):
    """Display of progress. Warnings and finished blocks go to the log, not through it."""

    def blocks(self, done: int, total: int, eta: float | None) -> None:
        """Show that `done` of `total` blocks are committed, and `eta` seconds are left (None: not known yet)."""

    def phase(self, block: int | None, name: str, steps: int) -> None:
        """Show that a phase of `steps` steps begins, in a block or (None) before the first."""

    def step(self, steps: int, host_bytes: int, gpu_bytes: int | None = None) -> None:
        """Show that `steps` more steps of the phase are done, and what the process holds now of host and GPU."""


class NoDisplay:
    """Display that shows nothing: for --quiet, log files and the Python API."""

    def blocks(self, done: int, total: int, eta: float | None) -> None: ...
    def phase(self, block: int | None, name: str, steps: int) -> None: ...
    def step(self, steps: int, host_bytes: int, gpu_bytes: int | None = None) -> None: ...


class PhaseTimer:
    """Clock and memory meter of a run's phases; it also holds the run to its host budget."""

    def __init__(
        self,
        device: torch.device,
        display: Display,
        host_budget: int | None = None,
        planned: Callable[[int | None], Mapping[str, Mapping[str, int]]] = lambda block: {},
        gpu_context: int = 0,
        traffic: Traffic | None = None,
    ) -> None:
        """Make a timer that measures while entered.

        Args:
            device: Device that the run computes on.
            display: Display to tell of phases and their steps.
            host_budget: Private bytes that no phase may exceed; None without a limit.
            planned: Function of a block's number, or of None where no block is worked on: for each phase, figures to
                record beside the measured ones (Plan.memory).
            gpu_context: Bytes of the GPU that CUDA takes for itself, to show with what torch's allocator holds.
            traffic: What this rank exchanges with others; None where it is alone.
        """
        self._traffic = traffic
        self._device, self._display = device, display
        self._host_budget, self._planned, self._gpu_context = host_budget, planned, gpu_context
        self._watch = MemoryWatch()
        self._measured: dict[str, Any] = {}
        self._retries: dict[str, tuple[str, ...]] = {}

    def __enter__(self) -> "PhaseTimer":
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.end()

    @contextmanager
    def phase(self, name: str, steps: int, block: int | None = None) -> Iterator[Callable[[int], None]]:
        """Measure the body as phase `name` of `steps` steps; yield a function to call with the steps just done.

        Raises:
            MemoryError: By that function, when the process holds more than the host budget.
        """
        self._display.phase(block, name, steps)
        self._watch.take()
        if self._traffic:
            self._traffic.take()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.monotonic()
        yield self._step
        measured: dict[str, float | int] = {**self._planned(block).get(name, {})}
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            measured["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(self._device)
            measured["gpu_reserved_bytes"] = torch.cuda.max_memory_reserved(self._device)
        measured["seconds"] = round(time.monotonic() - start, 4)
        measured["host_peak_bytes"] = self._watch.take()
        if self._traffic:
            waited, measured["exchanged_bytes"] = self._traffic.take()
            measured["waited_seconds"] = round(waited, 4)
        if earlier := self._measured.get(name):  # the block went through this phase before, or others in a survey
            for sums in ("seconds", "waited_seconds", "exchanged_bytes"):
                if sums in measured:
                    measured[sums] = round(measured[sums] + earlier.pop(sums), 4)
            measured = {reading: max(value, earlier.get(reading, 0)) for reading, value in measured.items()}
        self._measured[name] = measured

    def _step(self, done: int) -> None:
        held = self._watch.now
        on_gpu = self._device.type == "cuda"
        self._display.step(done, held, self._gpu_context + torch.cuda.memory_reserved(self._device) if on_gpu else None)
        if self._host_budget is not None and held > self._host_budget:
            budget = format_bytes(self._host_budget)
            raise MemoryError(f"the process holds {format_bytes(held)} of host memory, --host-mem is {budget}")

    def take(self) -> dict[str, Any]:
        """Return what was measured of each phase since the last take, beside its planned figures.

        These are seconds and host_peak_bytes; on a GPU also gpu_peak_bytes, the tensors', and gpu_reserved_bytes, all
        that torch's allocator held.
        """
        measured, self._measured = self._measured, {}
        return measured

    def note_retry(self, phase: str, sentence: str) -> None:
        """Keep what a second try of a phase does without."""
        self._retries[phase] = (*self._retries.get(phase, ()), sentence)

    def take_retries(self) -> dict[str, tuple[str, ...]]:
        """Return what second tries did without since the last call, by phase."""
        retries, self._retries = self._retries, {}
        return retries


@dataclass(frozen=True)
class Agreed:
    """Figures of a block over all ranks: the most of each that was measured, what was cut, seconds that each worked."""

    measured: Phases
    retries: Retries
    seconds_by_rank: Mapping[str, tuple[float, ...]]


def agreed(measured: Sequence[Mapping[str, Mapping[str, float]]], retries: Sequence[Retries]) -> Agreed:
    """Put together what each rank measured, and what its second tries did without."""
    if len(measured) == 1:
        return Agreed(measured[0], retries[0], {})
    most: dict[str, dict[str, float]] = {}
    for of_rank in measured:
        for phase, figures in of_rank.items():
            so_far = most.setdefault(phase, {})
            so_far.update({name: max(value, so_far.get(name, value)) for name, value in figures.items()})
    cut: dict[str, tuple[str, ...]] = {}
    for rank, cut_there in enumerate(retries):
        for phase, sentences in cut_there.items():
            cut[phase] = (*cut.get(phase, ()), *(f"rank {rank}: {sentence}" for sentence in sentences))
    worked = {
        phase: tuple(round(of_rank[phase]["seconds"] - of_rank[phase]["waited_seconds"], 4) for of_rank in measured)
        for phase in most
        if all(phase in of_rank for of_rank in measured)
    }
    return Agreed(most, cut, worked)


class WarningsOfRanks(logging.Handler):
    """Warnings that each rank logs; rank 0, which speaks for all, says those of others that it did not log itself."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(logging.WARNING)
        self._ranks = ranks
        self._logged: list[str] = []

    def __enter__(self) -> "WarningsOfRanks":
        log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        log.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._logged.append(record.getMessage())

    def share(self) -> None:
        """Let rank 0 log what the others have logged since the last call; every rank must call it."""
        own, *others = self._ranks.gather(self._logged)
        if self._ranks.rank == 0:
            for rank, logged in enumerate(others, 1):
                for sentence in dict.fromkeys(logged):
                    if sentence not in own:
                        log.warning("rank %d: %s", rank, sentence)
        self._logged.clear()


class BlockProgress:
    """Count of committed blocks, with the time left and a log line a block."""

    def __init__(self, display: Display, done: int, kinds: Sequence[BlockKind]) -> None:
        """Start with `done` blocks, committed by earlier starts of the run, of those in `kinds`."""
        self._display, self._kinds = display, kinds
        self._total = sum(len(kind.blocks) for kind in kinds)
        self._seconds: dict[int, float] = {}
        self._last = time.monotonic()
        display.blocks(done, self._total, None)

    def committed(self, record: BlockRecord) -> None:
        """Count a block that was committed, and log its line."""
        now, done = time.monotonic(), record.index + 1  # a block whose shard was lost is made anew
        self._seconds[record.index], self._last = now - self._last, now
        eta = seconds_left(self._kinds, done, self._seconds)
        self._display.blocks(done, self._total, eta)
        seconds = sum(m["seconds"] for m in record.measured.values())
        peak = format_bytes(max(m["host_peak_bytes"] for m in record.measured.values()))
        if on_gpu := [gpu_taken_bytes(m) for m in record.measured.values() if "gpu_peak_bytes" in m]:
            peak += f" on the host and {format_bytes(max(on_gpu))} on the GPU"
        errors = [linear.error for linear in record.linears]
        matched = ""
        if matching := record.whole_matching:
            matched = f" block loss {matching.loss_before:.3g}"
            matched += f" -> {matching.loss_after:.3g}," if matching.applied else " (not matched),"
        if record.check and record.check.cosine is not None:
            matched += f" cosine {record.check.cosine:.4f},"
        slowest = ""
        if worked := record.seconds_of_ranks:
            mean = sum(worked) / len(worked)
            slowest = (
                f" rank {worked.index(max(worked))} the slowest (×{max(worked) / max(mean, 1e-9):.2f} of the mean),"
            )
        log.info(
            "block %d of %d, %s: mean relative error %.3g (pruning alone %.3g),%s %.1f s,%s peak %s, "
            "%s written, %s left",
            done,
            self._total,
            record.name,
            sum(errors) / len(errors),
            sum(linear.wanda_error for linear in record.linears) / len(errors),
            matched,
            seconds,
            slowest,
            peak,
            format_bytes(record.shard.nbytes),
            format_duration(eta),
        )


def seconds_left(kinds: Sequence[BlockKind], done: int, seconds: Mapping[int, float]) -> float:
    """Return the seconds that the blocks from number `done` on will take.

    Each takes the mean of the timed blocks of its kind. Where none is timed yet, it takes as long for its planned FLOPs
    as all timed blocks together took for theirs.

    Args:
        kinds: All blocks, by kind.
        done: Blocks that are committed.
        seconds: Number of each timed block -> its seconds. There is at least one.
    """
    flops = {block: kind.flops / len(kind.blocks) for kind in kinds for block in kind.blocks}
    pace = sum(seconds.values()) / sum(flops[block] for block in seconds)
    left = 0.0
    for kind in kinds:
        timed = [seconds[block] for block in kind.blocks if block in seconds]
        each = sum(timed) / len(timed) if timed else pace * flops[kind.blocks[0]]
        left += each * sum(block >= done for block in kind.blocks)
    return left


def gpu_taken_bytes(measured: Mapping[str, Any]) -> int:
    """Return the most that a phase took of the card: torch's reserved memory and CUDA's own, as the budget counts it.

    Folders of earlier versions have the peak of tensors alone.
    """
    return int(measured.get("gpu_reserved_bytes", measured["gpu_peak_bytes"]) + measured.get("gpu_context_bytes", 0))


def format_duration(seconds: float) -> str:
    """Return a duration for people: 4000 -> '1 h 06 min', 75 -> '1 min 15 s', 3 -> '3 s'."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


class LiveDisplay(logging.Handler):
    """Display on a terminal: bars for blocks and phase, time left, memory beside its budget, the last warnings."""

    def __init__(self, console: Console, host_budget: int, gpu_budget: int | None = None):
        super().__init__(logging.WARNING)
        self._budget, self._gpu_budget = host_budget, gpu_budget
        self._bars = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._blocks: TaskID = self._bars.add_task("blocks", total=None, note="")
        self._phase: TaskID = self._bars.add_task("starting", total=None, note="")
        self._warnings: deque[str] = deque(maxlen=3)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    def __enter__(self) -> "LiveDisplay":
        log.addHandler(self)
        self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._live.__exit__(*exc)
        log.removeHandler(self)

    def _render(self) -> Group:
        return Group(self._bars, *(Text(w, style="yellow") for w in self._warnings))

    def emit(self, record: logging.LogRecord) -> None:
        self._warnings.append(printable(record.getMessage()))

    def blocks(self, done: int, total: int, eta: float | None) -> None:
        left = f"{format_duration(eta)} left" if eta is not None else ""
        self._bars.update(self._blocks, completed=done, total=total, note=left)

    def phase(self, block: int | None, name: str, steps: int) -> None:
        where = name if block is None else f"block {block}: {name}"
        self._bars.reset(self._phase, total=steps, description=where)

    def step(self, steps: int, host_bytes: int, gpu_bytes: int | None = None) -> None:
        memory = f"host {format_bytes(host_bytes)} of {format_bytes(self._budget)}"
        if gpu_bytes is not None:
            memory += f", gpu {format_bytes(gpu_bytes)}"
            memory += f" of {format_bytes(self._gpu_budget)}" if self._gpu_budget else ""
        self._bars.update(self._phase, advance=steps, note=memory)
