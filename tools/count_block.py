"""Count what one block of a large model costs on a GPU, phase by phase, on a machine without one.

    python tools/count_block.py --shape 70b --gpu-mem 45GB --json tools/results/count-70b.json
    python tools/count_block.py --shape 70b --gpu-mem 24GB --host-mem 24GB    # hidden states on disk

The block passes through the run's own code on a pretended GPU (`pretended_gpu/block.py`): its plan, all windows, every
operator, without memory or weights. Seconds are counts at assumed rates of an H100 (`Card` in `pretended_gpu/cost.py`),
never a measurement. Copies of pageable memory hold the device up; copies of pinned memory, launches and files go on
beside the kernels, and a phase takes the longest of these.

Few iterations, epochs and windows run; what one more of each costs is the difference of two runs, and the full numbers
(`--iterations`, `--epochs`, `--samples`) are that many times it. The plan is that of all windows. Two budgets decide
where hidden states wait, as in a run: --gpu-mem and --host-mem.
"""

import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from bench_block import commit
from pretended_gpu import Card, Cost, PretendedGpu
from pretended_gpu.block import SHAPES, BlockRun, run_block, write_sparse_checkpoint
from rich import box
from rich.console import Console
from rich.table import Table

from streamslr.config import RunConfig, parse_bytes
from streamslr.run.context import open_run
from streamslr.run.plan import Plan
from streamslr.solvers import threebasil

BLOCK_PHASES = ("load", "grams", "solve", "match", "propagate", "commit")
"""Phases of one block; embed comes once, before block 0."""

_ITERATIONS = (20, 40)
"""Iterations of the solver in the short and the long run: one stage and two."""

Record = dict[str, Any]


def count(
    folder: Path, card: Card, iterations: int, epochs: int, expandable: bool | None, settings: Mapping[str, Any]
) -> Record:
    """Return the record of one block of the checkpoint in `folder`: its plan's choices, and figures by phase.

    A phase that passes w windows in e epochs costs a + w · (b + (e - 2) · c), the solver a + b · iterations. Runs of w
    windows and 2 epochs, w and 3, and 2w and 2 give all of these.
    """

    def run(windows: int, iterations: int, epochs: int) -> BlockRun:
        gpu = PretendedGpu(values=False, expandable=expandable)
        return run_block(folder, gpu, iterations, windows, epochs, **settings)

    with PretendedGpu(values=False, expandable=expandable):
        config = RunConfig(model=str(folder), out=folder.with_name("out"), device="cuda", **settings)
        plan = open_run(config).plan
    samples: int = settings["samples"]
    some = min(samples, math.lcm(config.match_batch, plan.micro_batch))
    short = run(some, _ITERATIONS[0], 2)
    longer = run(some, _ITERATIONS[1], 3)
    wider = run(2 * some, 1, 2) if samples > some else None
    more_windows = samples / some - 1
    phases = {}
    for name, cost in short.costs.items():
        whole = cost
        if name == "solve":
            stages = (iterations - _ITERATIONS[0]) / (_ITERATIONS[1] - _ITERATIONS[0])
            whole = cost.plus(longer.costs[name].plus(cost, -1), stages)
        elif wider:
            whole = cost.plus(wider.costs[name].plus(cost, -1), more_windows)
        if name == "match":
            whole = whole.plus(longer.costs[name].plus(cost, -1), (epochs - 2) * samples / some)
        phases[name] = {**_figures(whole, card), **_memory(plan, name, [short, longer, *([wider] if wider else [])])}
    return {
        "plan": {
            "micro_batch": plan.micro_batch,
            "in_memory": plan.in_memory,
            "grams_at": plan.grams_at,
            "solver_workspace": plan.solver_workspace,
        },
        "retries": longer.retries,
        "phases": phases,
        "block_seconds": round(sum(phases[name]["seconds"] for name in BLOCK_PHASES if name in phases), 2),
    }


def _figures(cost: Cost, card: Card) -> Record:
    seconds = {kind: round(value, 3) for kind, value in cost.seconds(card).items()}
    return {
        "seconds": seconds.pop("total"),
        "seconds_by_kind": seconds,
        "flops": {unit: float(f"{flops:.4g}") for unit, flops in cost.flops.items()},
        "bytes": round(cost.bytes),
        "launches": round(cost.launches),
        "syncs": round(cost.syncs),
        "event_waits": round(cost.event_waits),
        "copied_bytes": {" ".join(kind): round(nbytes) for kind, nbytes in sorted(cost.copied.items())},
        "operators_by_bytes": {
            name: {key: float(f"{value:.4g}") for key, value in operator.items()}
            for name, operator in sorted(cost.operators.items(), key=lambda item: -item[1]["bytes"])[:8]
        },
    }


def _memory(plan: Plan, phase: str, runs: Sequence[BlockRun]) -> Record:
    """Return the peaks of a phase, which two micro-batches reach as all do, and the plan's bytes."""
    peaks = [run.peaks[phase] for run in runs if phase in run.peaks]
    if not peaks:
        return {}
    figures: Record = {
        f"peak_{kind}_bytes": max(getattr(peak, kind) for peak in peaks) for kind in ("allocated", "reserved")
    }
    planned = {cost.name: cost.gpu_bytes for cost in plan.phases}
    if phase in planned:
        ratio = planned[phase] / figures["peak_allocated_bytes"]
        figures |= {"planned_bytes": planned[phase], "plan_over_peak": round(ratio, 3)}
    return figures


def table(record: Record) -> Table:
    """Return the record as a table, a row a phase."""
    made = Table(title=f"one block, counted: {record['block_seconds']} s at rates of {record['card']}", box=box.SIMPLE)
    columns = ("phase", "s", "of these", "peak GB", "reserved", "plan/peak", "TFLOP", "GB", "launches", "waits")
    for column in (*columns, "h2d GB", "d2h GB"):
        made.add_column(column, justify="left" if column in ("phase", "of these") else "right")
    for name, row in record["phases"].items():
        kinds = sorted(row["seconds_by_kind"].items(), key=lambda item: -item[1])
        copied = {way: sum(n for kind, n in row["copied_bytes"].items() if way in kind) for way in ("h2d", "d2h")}
        made.add_row(
            name,
            f"{row['seconds']:.1f}",
            ", ".join(f"{kind} {value:.1f}" for kind, value in kinds if value >= 0.05),
            f"{row.get('peak_allocated_bytes', 0) / 1e9:.2f}",
            f"{row.get('peak_reserved_bytes', 0) / 1e9:.2f}",
            f"{row['plan_over_peak']:.3f}" if "plan_over_peak" in row else "",
            ", ".join(f"{unit} {flops / 1e12:.0f}" for unit, flops in row["flops"].items() if flops >= 5e11),
            f"{row['bytes'] / 1e9:.0f}",
            str(row["launches"]),
            f"{row['syncs']} + {row['event_waits']}",
            *(f"{nbytes / 1e9:.1f}" for nbytes in copied.values()),
        )
    return made


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.option("--shape", type=click.Choice(list(SHAPES)), default="70b", show_default=True)
@click.option("--gpu-mem", default="45GB", show_default=True)
@click.option("--host-mem", default="128GB", show_default=True, help="Decides whether hidden states wait on the disk.")
@click.option("--samples", default=128, show_default=True)
@click.option("--seq-len", default=2048, show_default=True)
@click.option("--pattern", default="2:4", show_default=True)
@click.option("--rank", default=64, show_default=True)
@click.option("--iterations", default=threebasil._TYPICAL_ITERATIONS, show_default=True)
@click.option("--epochs", default=RunConfig.of(model="m").epochs, show_default=True)
@click.option("--expandable/--no-expandable", default=None, help="Expandable segments [default: as the run asks].")
@click.option("--blocks", default=2, show_default=True, help="Blocks of the checkpoint; they only lengthen the plan.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Folder for a temporary folder.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="File for the record.")
def main(
    shape: str,
    gpu_mem: str,
    host_mem: str,
    samples: int,
    seq_len: int,
    pattern: str,
    rank: int,
    iterations: int,
    epochs: int,
    expandable: bool | None,
    blocks: int,
    scratch: Path | None,
    path: Path | None,
) -> None:
    card = Card()
    settings = {
        "gpu_mem": parse_bytes(gpu_mem),
        "host_mem": parse_bytes(host_mem),
        "samples": samples,
        "seq_len": seq_len,
        "pattern": pattern,
        "rank": rank,
    }
    with tempfile.TemporaryDirectory(dir=scratch) as work:
        folder = Path(work) / "model"
        folder.mkdir()
        write_sparse_checkpoint(folder, SHAPES[shape], max(8192, seq_len), blocks)
        record = {
            "command": " ".join(["python", *sys.argv]),
            "commit": commit(),
            "shape": shape,
            "card": card.name,
            "iterations": iterations,
            "epochs": epochs,
            **settings,
            **count(folder, card, iterations, epochs, expandable, settings),
        }
    Console(width=200).print(table(record))
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
