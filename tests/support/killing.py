"""Compressions, exports and fine-tunings in a child process that is killed, as by kill -9, at a chosen step."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A fork server that has imported everything, and computed nothing: a child starts at once, and forks no threads.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "streamslr.run.loop",
        "streamslr.run.context",
        "streamslr.results.export",
        "streamslr.finetune",
        "transformers.models.llama.modeling_llama",
    ]
)


def compress_in_child(settings: dict[str, Any], die_at: int | None = None, counting: str = "renames") -> int:
    """The child's exit code: 0, or -9 where it was killed at step `die_at` of what is counted.

    counting: "renames", right before each file takes its final name, all earlier ones having theirs (the commit
    points); "work", every chunk of hidden states written, every pass through a block, every solved layer.
    """
    return _exit_code(_child, settings, die_at, counting)


def export_in_child(folder: Path, out: Path, to: str, die_at: int) -> int:
    """The child's exit code: 0, or -9 where it was killed right before the file `die_at` took its final name."""
    return _exit_code(_export, folder, out, to, die_at)


def finetune_in_child(folder: Path, data: Path, out: Path, settings: dict[str, Any], counting: str, die_at: int) -> int:
    """The child's exit code: 0, or -9 where it was killed after so many "steps" of Adam, or "renames" of a file."""
    return _exit_code(_finetune, folder, data, out, settings, counting, die_at)


def _exit_code(target: Callable[..., None], *args: Any) -> int:
    process = _context.Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


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
    """From now on the process is killed when this method is called once more than so often."""
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
