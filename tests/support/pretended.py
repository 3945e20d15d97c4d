"""Runs on a pretended GPU, small enough for a test."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pretended_gpu import PretendedGpu

from streamslr.config import RunConfig
from streamslr.run.context import RunContext, open_run
from streamslr.run.journal import JournalState
from streamslr.run.loop import run

TOTAL = 20 * 10**9
BASICS: dict[str, Any] = {"samples": 4, "seq_len": 16, "rank": 4, "device": "cuda", "match_epochs": 2, "match_batch": 2}


def open_on_gpu(model: Path, text: Path, out: Path, iterations: int = 5, **settings: Any) -> RunContext:
    """Open a run of a tiny model; an iterative solver stops after `iterations`."""
    context = open_run(RunConfig(**{"model": str(model), "calibration": text, "out": out, **BASICS, **settings}))
    solver = context.method.solver
    if hasattr(solver, "max_iterations"):
        solver = replace(solver, max_iterations=iterations)  # type: ignore[type-var]
    return replace(context, method=replace(context.method, solver=solver))


def run_on_gpu(
    model: Path, text: Path, out: Path, plan: dict[str, Any] | None = None, **settings: Any
) -> tuple[JournalState, PretendedGpu]:
    """Run on a pretended GPU; `plan` replaces choices of the plan."""
    with PretendedGpu(total=TOTAL) as gpu:
        context = open_on_gpu(model, text, out, **settings)
        return run(replace(context, plan=replace(context.plan, **(plan or {})))), gpu


def digests(state: JournalState) -> list[str]:
    """Return the sha256 of each block's shard."""
    return [block.shard.sha256 for block in state.blocks]
