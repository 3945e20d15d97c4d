"""Measure runs that torchrun shares out over CPU ranks against one process: quality, bytes, work, time, memory.

    python tools/bench_ranks.py --model FOLDER --calibration TEXT --text TEXT --worlds 1,2,4 --seeds 0,1,2 \
        --json OUT.json -- --samples 64 --seq-len 256 --pattern 1:4 --rank 8

Each run is one thread a rank. It is done twice where more than one rank shares it, and the shards must be the same
bytes. FLOPs are counted in runs of their own: products by torch's counter, factorizations of [d, d] as d³/3, their
inverses as 2d³/3. Wall time is of the process with its start; `--repeats` runs of each world are taken in turn.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

import click
import psutil
import torch
from bench_block import commit
from torch.utils.flop_counter import FlopCounterMode

_COUNTED = "STREAMSLR_COUNT_FLOPS"
"""Environment variable: prefix of the files that ranks write their FLOPs to."""


def launch(world: int, script: list[str]) -> list[str]:
    """Return the command line that starts a script or module on `world` ranks."""
    if world == 1:
        return [sys.executable, *script]
    ranks = ["--standalone", "--nproc-per-node", str(world)]
    return [sys.executable, "-m", "torch.distributed.run", *ranks, *script]


def shared_run(world: int, line: list[str], out: Path, count: Path | None = None) -> dict[str, Any]:
    """Run once; return wall seconds, the largest private memory of a rank, and the digest of all shards."""
    script = ["-m", "streamslr"] if count is None else [__file__, "--counted"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({_COUNTED: str(count)} if count else {})
    start, peak = time.monotonic(), 0
    process = psutil.Popen([*launch(world, script), "run", *line, "--out", str(out), "--quiet"], env=environment)
    while process.poll() is None:
        try:
            ranks = process.children(recursive=True) if world > 1 else [process]
            peak = max(peak, *(rank.memory_full_info().uss for rank in ranks), 0)
        except psutil.Error:  # a process ended meanwhile
            pass
        time.sleep(0.1)
    wall = time.monotonic() - start
    if process.wait() != 0:
        raise SystemExit(f"the run on {world} ranks ended with {process.returncode}")
    digest = hashlib.sha256()
    for shard in sorted(out.glob("*.safetensors")):
        digest.update(shard.read_bytes())
    return {"wall_seconds": round(wall, 2), "private_bytes": peak, "sha256": digest.hexdigest()}


def perplexity(folder: Path, text: Path) -> float:
    options = ["--text", str(text), "--seq-len", "256", "--windows", "400", "--device", "cpu", "--json"]
    line = [sys.executable, "-m", "streamslr", "eval", str(folder), *options]
    return float(json.loads(subprocess.run(line, check=True, capture_output=True).stdout)["perplexity"])


def counted() -> None:
    """Be a rank whose FLOPs are counted."""
    from streamslr.cli import main

    sys.argv.remove("--counted")
    rank = os.environ.get("RANK", "0")

    def cube(parts: float) -> Any:
        return lambda shape, *_, **__: int(parts * shape[-1] ** 3)

    factors = {
        torch.ops.aten.linalg_cholesky_ex: cube(1 / 3),
        torch.ops.aten.cholesky_inverse: cube(2 / 3),
    }
    with FlopCounterMode(display=False, custom_mapping=factors) as counter:
        main(standalone_mode=False)
    Path(f"{os.environ[_COUNTED]}-{rank}").write_text(str(counter.get_total_flops()))


def count_flops(world: int, line: list[str], folder: Path) -> list[int]:
    """Return the FLOPs of each rank."""
    shared_run(world, line, folder / f"counted-{world}", folder / f"flops-{world}")
    return [int((folder / f"flops-{world}-{rank}").read_text()) for rank in range(world)]


@click.command()
@click.option("--model", type=click.Path(path_type=Path), required=True)
@click.option("--calibration", type=click.Path(path_type=Path), required=True)
@click.option("--text", type=click.Path(path_type=Path), required=True, help="Text of the perplexity.")
@click.option("--worlds", default="1,2,4", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True, help="Empty: no runs for quality.")
@click.option("--count/--no-count", default=True, help="Count FLOPs.")
@click.option("--repeats", default=0, show_default=True, help="Runs of each world for the wall time, seed 0.")
@click.option("--json", "output", type=click.Path(path_type=Path), required=True)
@click.argument("options", nargs=-1)
def bench(
    model: Path,
    calibration: Path,
    text: Path,
    worlds: str,
    seeds: str,
    count: bool,
    repeats: int,
    output: Path,
    options: tuple[str, ...],
) -> None:
    """Measure and print; OPTIONS are further options of `streamslr run`."""
    numbers = [int(world) for world in worlds.split(",")]
    line = ["--model", str(model), "--calibration", str(calibration), "--device", "cpu", *options]
    result: dict[str, Any] = {"commit": commit(), "command": sys.argv, "options": list(options), "worlds": {}}
    with tempfile.TemporaryDirectory(prefix="bench-ranks-", dir=os.environ.get("TMPDIR")) as temporary:
        folder = Path(temporary)
        for world in numbers:
            found: dict[str, Any] = {}
            if seeds:
                runs = []
                for seed in seeds.split(","):
                    out = folder / f"{world}-{seed}"
                    runs.append(shared_run(world, [*line, "--seed", seed], out))
                    runs[-1]["perplexity"] = perplexity(out, text)
                    click.echo(f"{world} ranks, seed {seed}: {runs[-1]}")
                values = [run["perplexity"] for run in runs]
                found |= {"runs": runs, "perplexity": mean(values), "spread": pstdev(values)}
                if world > 1:
                    again = shared_run(world, [*line, "--seed", seeds.split(",")[0]], folder / f"{world}-again")
                    found["same_bytes"] = again["sha256"] == runs[0]["sha256"]
            if count:
                found["flops"] = count_flops(world, line, folder)
            result["worlds"][world] = found
            output.write_text(json.dumps(result, indent=1) + "\n")
        walls: dict[int, list[float]] = {world: [] for world in numbers}
        for repeat in range(repeats):
            for world in numbers:
                walls[world].append(shared_run(world, line, folder / f"wall-{world}-{repeat}")["wall_seconds"])
        for world in numbers:
            found = result["worlds"][world]
            if repeats:
                found |= {"walls": walls[world], "faster": median(walls[numbers[0]]) / median(walls[world])}
            if count:
                found["busiest_of_one"] = max(found["flops"]) / result["worlds"][numbers[0]]["flops"][0]
            click.echo(f"{world} ranks: " + json.dumps({k: v for k, v in found.items() if k != "runs"}))
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if "--counted" in sys.argv:
        counted()
    else:
        bench()
