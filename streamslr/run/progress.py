"""What a run tells while it works: seconds and peak memory of each phase, ETA, a live display, a line a block."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from streamslr.config import format_bytes
from streamslr.memory import MemoryWatch

if TYPE_CHECKING:
    from streamslr.run.journal import BlockRecord

log = logging.getLogger("streamslr")

PHASES = ("survey", "non_block", "embed", "load", "grams", "solve", "match", "propagate", "commit")
"""In the order that a run goes through them; the first three come before block 0."""


class Display(Protocol):
    """Where progress is shown. Warnings and finished blocks reach the log by themselves."""

    def blocks(self, done: int, total: int, eta: float | None) -> None:
        """`done` of `total` blocks are committed; `eta` seconds are left, None while nobody can know."""

    def phase(self, block: int | None, name: str, steps: int) -> None:
        """A phase of so many steps begins, of a block or of the whole run."""

    def step(self, steps: int, host_bytes: int) -> None:
        """So many steps of the phase are done; what the process holds now."""


class NoDisplay:
    """Shows nothing: --quiet, log files, the Python API."""

    def blocks(self, done: int, total: int, eta: float | None) -> None: ...
    def phase(self, block: int | None, name: str, steps: int) -> None: ...
    def step(self, steps: int, host_bytes: int) -> None: ...


class PhaseTimer:
    """The clock of a run: times each phase, takes its peak memory, and tells the display."""

    def __init__(
        self,
        display: Display,
        device: torch.device,
        total_blocks: int,
        done: int,
        host_budget: int | None = None,
        planned: Mapping[str, Mapping[str, int]] | None = None,
    ):
        """host_budget: private bytes that no phase may exceed; None where nobody set a limit. planned: what is
        written down beside the readings of each phase (Plan.memory)."""
        self._host_budget, self._planned = host_budget, planned or {}
        self._display, self._device = display, device
        self._total, self._done_before, self._done = total_blocks, done, done
        self._watch = MemoryWatch()
        self._measured: dict[str, Any] = {}
        self._started = time.monotonic()

    def __enter__(self) -> "PhaseTimer":
        self._watch.start()
        self._display.blocks(self._done, self._total, None)
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.end()

    @contextmanager
    def phase(self, name: str, steps: int, block: int | None = None) -> Iterator[Callable[[int], None]]:
        """Times the body as `name`; the body calls what it is given with the steps it has done.

        That call raises MemoryError when the process holds more than the host budget.
        """
        self._display.phase(block, name, steps)
        self._watch.take()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.monotonic()
        yield self._step
        measured: dict[str, float | int] = {}
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            measured["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(self._device)
        measured["seconds"] = round(time.monotonic() - start, 4)
        measured["host_peak_bytes"] = self._watch.take()
        if earlier := self._measured.get(name):  # the block went through this phase before
            measured["seconds"] = round(measured["seconds"] + earlier.pop("seconds"), 4)
            measured = {reading: max(value, earlier.get(reading, 0)) for reading, value in measured.items()}
        self._measured[name] = {**self._planned.get(name, {}), **measured}

    def _step(self, done: int) -> None:
        held = self._watch.now
        self._display.step(done, held)
        if self._host_budget is not None and held > self._host_budget:
            budget = format_bytes(self._host_budget)
            raise MemoryError(f"the process holds {format_bytes(held)} of host memory, --host-mem is {budget}")

    def take(self) -> dict[str, Any]:
        """{phase: {seconds, host_peak_bytes[, gpu_peak_bytes], what was planned}} since the last take."""
        measured, self._measured = self._measured, {}
        return measured

    def committed(self, record: "BlockRecord") -> None:
        """A block is durable: move the display on, and write the log's line of it."""
        self._done += 1
        spent = time.monotonic() - self._started
        eta = spent / (self._done - self._done_before) * (self._total - self._done)
        self._display.blocks(self._done, self._total, eta)
        seconds = sum(m["seconds"] for m in record.measured.values())
        peak = max(m["host_peak_bytes"] for m in record.measured.values())
        errors = [linear.error for linear in record.linears]
        matched = ""
        if record.matching:
            matched = f" block loss {record.matching.loss_before:.3g}"
            matched += f" -> {record.matching.loss_after:.3g}," if record.matching.applied else " (not matched),"
        log.info(
            "block %d of %d, %s: mean relative error %.3g (pruning alone %.3g),%s %.1f s, peak %s, %s written, %s left",
            self._done,
            self._total,
            record.name,
            sum(errors) / len(errors),
            sum(linear.wanda_error for linear in record.linears) / len(errors),
            matched,
            seconds,
            format_bytes(peak),
            format_bytes(record.shard.nbytes),
            format_duration(eta),
        )


def format_duration(seconds: float) -> str:
    """4000 -> '1 h 06 min', 75 -> '1 min 15 s', 3 -> '3 s'."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


class LiveDisplay(logging.Handler):
    """Two bars, ETA, memory against its budget and the last warnings, redrawn in place on a terminal."""

    def __init__(self, console: Console, host_budget: int):
        super().__init__(logging.WARNING)
        self._budget = host_budget
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
        self._warnings.append(record.getMessage())

    def blocks(self, done: int, total: int, eta: float | None) -> None:
        left = f"{format_duration(eta)} left" if eta is not None else ""
        self._bars.update(self._blocks, completed=done, total=total, note=left)

    def phase(self, block: int | None, name: str, steps: int) -> None:
        where = name if block is None else f"block {block}: {name}"
        self._bars.reset(self._phase, total=steps, description=where)

    def step(self, steps: int, host_bytes: int) -> None:
        memory = f"host {format_bytes(host_bytes)} of {format_bytes(self._budget)}"
        self._bars.update(self._phase, advance=steps, note=memory)
