"""Compressions, exports and fine-tunings in child processes, where one is killed or fails at a chosen step."""

import errno
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from streamslr.ranks import Ranks
from tests.support.forkserver import exit_code
from tests.support.started_ranks import StartedRanks


@dataclass(frozen=True)
class Fault:
    """What happens to one rank when it calls a method of a class: Fault(1, Passes, "match", "memory").

    rank: The rank.
    owner, method: The method.
    what: "kill" (as by kill -9), "memory" (that runs out), "disk" (that is full) or "error" (a mistake in the code);
        under torchrun also "kill node" (torchrun and its ranks) and "interrupt" (Ctrl-C for torchrun).
    call: Number of the call, from 0; every call from there on where `lasts`.
    phase: Phase of the run in which calls count; "" for all.
    """

    rank: int
    owner: type
    method: str
    what: str = "kill"
    call: int = 0
    phase: str = ""
    lasts: bool = False

    def __str__(self) -> str:
        where = f"{self.owner.__name__}.{self.method}" + (f" in {self.phase}" if self.phase else "")
        return f"rank {self.rank}, {self.what} at call {self.call} of {where}"

    def befall(self) -> None:
        """Let it happen, here and now."""
        if self.what == "interrupt":
            return os.kill(os.getppid(), signal.SIGINT)
        if self.what == "kill node":
            torchrun = psutil.Process(os.getppid())
            for process in [torchrun, *torchrun.children()]:
                if process.pid != os.getpid():
                    process.kill()
        if self.what.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        raise {
            "memory": MemoryError("the machine is full"),
            "disk": OSError(errno.ENOSPC, "No space left on device"),
            "error": ZeroDivisionError("a mistake"),
        }[self.what]


def compress_by_ranks(
    world: int, settings: dict[str, Any], *faults: Fault, plan: dict[str, Any] | None = None, seconds: float = 60
) -> list[Any]:
    """Compress by so many ranks; return what `StartedRanks.results` does: the log of each that came to the end.

    Args:
        world: Number of ranks.
        settings: Settings of `RunConfig.of`.
        faults: What happens to the ranks.
        plan: Fields of the plan to replace.
        seconds: As for `StartedRanks.results`.
    """
    folder = Path(tempfile.mkdtemp())
    return StartedRanks(world, folder, compress_as_rank, settings, faults, plan or {}).results(seconds)


def compress_as_rank(
    ranks: Ranks, settings: dict[str, Any], faults: tuple[Fault, ...] = (), plan: dict[str, Any] | None = None
) -> list[str]:
    """Do one rank's part of a run, with its faults; return the warnings and messages that it logged."""
    from streamslr.config import RunConfig
    from streamslr.run.context import open_run
    from streamslr.run.loop import run

    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("streamslr").addHandler(handler)
    logging.getLogger("streamslr").setLevel(logging.INFO)
    for fault in faults:
        if fault.rank == ranks.rank:
            _prepare(fault, Path(settings["out"]))
    context = open_run(RunConfig.of(**settings), ranks=ranks)
    run(replace(context, plan=replace(context.plan, **plan or {})))
    return logged


def run_with_fault(rank: str, what: str, *line: str) -> None:
    """Run the command `streamslr` as one of torchrun's ranks, of which one has a fault when it collects for block 1.

    Every agent of torchrun counts as a machine of its own.
    """
    from streamslr.cli import main
    from streamslr.run.passes import Passes

    socket.gethostname = lambda: f"node-{os.environ['GROUP_RANK']}"
    if os.environ["RANK"] == rank:
        _prepare(Fault(int(rank), Passes, "collect", what, call=1), Path())
    main(line, prog_name="streamslr")


def _prepare(fault: Fault, out: Path) -> None:
    """Let the fault befall this process when its moment comes; of renames those in `out` count."""
    from streamslr.run.progress import PhaseTimer

    phase, calls = "", 0
    timed, original = PhaseTimer.phase, getattr(fault.owner, fault.method)

    @contextmanager
    def watched(self: PhaseTimer, name: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal phase
        before, phase = phase, name
        with timed(self, name, *args, **kwargs) as step:
            yield step
        phase = before

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        elsewhere = fault.method == "replace" and args[0].parent != out  # a chunk of zarr, which commits nothing
        if fault.phase in ("", phase) and not elsewhere:
            calls += 1
            if calls == fault.call + 1 or (fault.lasts and calls > fault.call):
                fault.befall()
        return original(*args, **kwargs)

    PhaseTimer.phase = watched  # type: ignore[method-assign]
    setattr(fault.owner, fault.method, counted)


def compress_in_child(settings: dict[str, Any], die_at: int | None = None, counting: str = "renames") -> int:
    """Compress in a child and return its exit code: 0, or -9 where it was killed.

    Args:
        settings: Arguments of `streamslr.compress`.
        die_at: Number of steps before the kill; None for no kill.
        counting: "renames" counts the files that take their final name, the points of commit; "work" counts chunks of
            hidden states written, passes through a block, linears solved, and calls of fsync.
    """
    return exit_code(_child, settings, die_at, counting)


def export_in_child(folder: Path, out: Path, to: str, die_at: int) -> int:
    """Export in a child that is killed before the file `die_at` takes its final name; return its exit code."""
    return exit_code(_export, folder, out, to, die_at)


def finetune_in_child(folder: Path, data: Path, out: Path, settings: dict[str, Any], counting: str, die_at: int) -> int:
    """Fine-tune in a child that is killed after `die_at` "steps" of Adam or "renames"; return its exit code."""
    return exit_code(_finetune, folder, data, out, settings, counting, die_at)


def _export(folder: Path, out: Path, to: str, die_at: int) -> None:
    from streamslr.results.export import export

    _die_after(Path, "replace", die_at)
    export(folder, out, to)


def _finetune(folder: Path, data: Path, out: Path, settings: dict[str, Any], counting: str, die_at: int) -> None:
    from torch.optim import Adam

    from streamslr.finetune import finetune

    _die_after(*{"steps": (Adam, "step"), "renames": (Path, "replace")}[counting], die_at)
    finetune(folder, data, out, **settings)


def _die_after(owner: type, name: str, calls: int) -> None:
    """Kill the process when the method is called once more than `calls` times."""
    done, original = 0, getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if done == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def _child(settings: dict[str, Any], die_at: int | None, counting: str) -> None:
    import streamslr
    from streamslr.calibration.hidden_states import OnDisk
    from streamslr.model.blockwise import BlockwiseModel
    from streamslr.solvers.threebasil import ThreeBasil

    steps = 0

    def step() -> None:
        nonlocal steps
        if steps == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1

    def watched(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "replace" and args[0].parent != settings["out"]:  # zarr's chunks commit nothing
                return original(*args, **kwargs)
            step()
            return original(*args, **kwargs)

        setattr(owner, name, call)

    points: dict[str, list[tuple[Any, str]]] = {
        "renames": [(Path, "replace")],
        "work": [(OnDisk, "_store"), (BlockwiseModel, "_run"), (ThreeBasil, "solve"), (os, "fsync")],
    }
    for owner, name in points[counting]:
        watched(owner, name)
    streamslr.compress(**settings)


if __name__ == "__main__":
    run_with_fault(*sys.argv[1:])
