"""Measure time and memory of whole runs against their plan: of a model, and of the same model with repeated blocks.

    python tools/bench_run.py --model FOLDER --calibration TEXT --samples 64 --seq-len 256 --rank 16 \
        --repeat-blocks 4 --json OUT.json

Memory is the unique set size, read from outside the process 10 times a second. Overhead of streaming is the wall time
of the process over the sum of the phases in its journal, with and without its start-up. Start-up is the imports, timed
in a process of their own.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import psutil
from bench_block import commit

from streamslr.config import format_bytes

STREAMSLR = str(Path(sys.executable).with_name("streamslr"))
"""Command line of the environment that runs this tool."""


def measure(model: Path, out: Path, options: list[str]) -> dict[str, Any]:
    """Run the command line once, and measure it from outside.

    Args:
        model: Model folder.
        out: Folder to write.
        options: Other options of `streamslr run`.

    Returns:
        Figures for the JSON, in bytes and seconds, and their ratios.
    """
    line = ["--model", str(model), "--device", "cpu", *options]
    plan = json.loads(subprocess.run([STREAMSLR, "plan", *line, "--json"], check=True, capture_output=True).stdout)
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import streamslr.cli, streamslr.run, streamslr.run.context"], check=True)
    startup = time.monotonic() - start
    start, peak = time.monotonic(), 0
    process = psutil.Popen([STREAMSLR, "run", *line, "--out", str(out), "--quiet"])
    while process.poll() is None:
        try:
            peak = max(peak, process.memory_full_info().uss)
        except psutil.Error:  # the process ended after the poll
            break
        time.sleep(0.1)
    if process.wait() != 0:
        raise SystemExit(f"streamslr run on {model} ended with {process.returncode}")
    wall = time.monotonic() - start
    journal = json.loads((out / "streamslr.json").read_text())
    phases: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for part in (journal, *journal["blocks"]):
        for name, measured in part["measured"].items():
            phases[name] = phases.get(name, 0.0) + measured["seconds"]
            peaks[name] = max(peaks.get(name, 0), measured["host_peak_bytes"])
    compute = sum(phases.values())
    return {
        "blocks": len(journal["blocks"]),
        "peak_uss_bytes": peak,
        "planned_host_bytes": plan["host_bytes"],
        "planned_to_peak": plan["host_bytes"] / peak,
        "wall_seconds": wall,
        "startup_seconds": startup,
        "phase_seconds": phases,
        "phase_planned_to_peak": {p["name"]: p["host_bytes"] / peaks[p["name"]] for p in plan["phases"]},
        "wall_to_phases": wall / compute,
        "wall_without_startup_to_phases": (wall - startup) / compute,
    }


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--calibration", required=True)
@click.option("--samples", default="64")
@click.option("--seq-len", default="256")
@click.option("--pattern", default="2:4")
@click.option("--rank", default="16")
@click.option("--match-epochs", default="10")
@click.option("--repeat-blocks", type=int, default=4)
@click.option("--json", "to", type=click.Path(path_type=Path))
def main(model: Path, repeat_blocks: int, to: Path | None, **options: str) -> None:
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    with tempfile.TemporaryDirectory() as folder:
        deep = Path(folder) / "deep"
        maker = [sys.executable, str(Path(__file__).with_name("make_checkpoint.py"))]
        repeat = ["--from", str(model), "--repeat-blocks", str(repeat_blocks)]
        subprocess.run([*maker, *repeat, str(deep)], check=True, stdout=subprocess.DEVNULL)
        runs = [measure(m, Path(folder) / f"out-{m.name}", flags) for m in (model, deep)]
    for run in runs:
        click.echo(
            f"{run['blocks']} blocks: peak {format_bytes(run['peak_uss_bytes'])}, plan / peak "
            f"{run['planned_to_peak']:.3f}, wall {run['wall_seconds']:.1f} s ({run['startup_seconds']:.1f} s of it "
            f"start-up), wall / phases {run['wall_to_phases']:.3f}, "
            f"without start-up {run['wall_without_startup_to_phases']:.3f}"
        )
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in run["phase_planned_to_peak"].items())
        click.echo(f"  plan / peak of each phase: {ratios}")
    growth = runs[1]["peak_uss_bytes"] / runs[0]["peak_uss_bytes"] - 1
    click.echo(f"peak grows by {growth:.1%} with {repeat_blocks} times the blocks")
    if to:
        record = {"command": " ".join(["python", *sys.argv]), "commit": commit(), "runs": runs, "peak_growth": growth}
        to.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
