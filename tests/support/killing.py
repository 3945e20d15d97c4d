"""Compressions, exports and fine-tunings in a child process that is killed at a chosen step, as by kill -9."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.forkserver import exit_code


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
        "work": [(OnDisk, "_store"), (BlockwiseModel, "run_block"), (ThreeBasil, "solve"), (os, "fsync")],
    }
    for owner, name in points[counting]:
        watched(owner, name)
    streamslr.compress(**settings)
