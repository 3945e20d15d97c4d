"""Perplexity of whole runs over seeds: compress, verify, evaluate; the mean and its spread.

    python tools/bench_perplexity.py --model FOLDER --calibration TEXT --text TEXT --pattern 1:4 --rank 8 \
        --seeds 4 --samples 64 --seq-len 256 --windows 400 --set match=false --json OUT.json

--set NAME=VALUE, as often as wanted, changes any other setting of a run.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

import streamslr
from streamslr.memory import free_host_memory
from streamslr.results.evaluate import evaluate
from streamslr.results.verify import verify


@click.command(help=__doc__)
@click.option("--model", required=True)
@click.option("--calibration", required=True)
@click.option("--text", type=click.Path(path_type=Path), required=True)
@click.option("--pattern", default="2:4")
@click.option("--rank", default=16)
@click.option("--seeds", default=1)
@click.option("--samples", default=64)
@click.option("--seq-len", default=256)
@click.option("--windows", default=400)
@click.option("--device", default="cpu")
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE")
@click.option("--json", "to", type=click.Path(path_type=Path))
def main(
    model: str,
    calibration: str,
    text: Path,
    pattern: str,
    rank: int,
    seeds: int,
    samples: int,
    seq_len: int,
    windows: int,
    device: str,
    changes: tuple[str, ...],
    to: Path | None,
) -> None:
    perplexities, losses = [], []
    more = {name: value_of(text) for name, text in (change.split("=", 1) for change in changes)}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            settings = {"samples": samples, "seq_len": seq_len, "pattern": pattern, "rank": rank, "device": device}
            out = Path(folder) / "out"
            state = streamslr.compress(model, out, calibration=calibration, seed=seed, **settings | more)
            if problems := verify(out).problems:
                raise SystemExit(f"seed {seed}: {problems}")
            result = evaluate(str(out), text, seq_len, windows=windows, device=device, free_memory=free_host_memory())
        perplexities.append(result.perplexity)
        losses.append([[b.matching.loss_before, b.matching.loss_after] for b in state.blocks if b.matching])
        click.echo(f"seed {seed}: {result.perplexity:.4f}")
    spread = statistics.stdev(perplexities) if seeds > 1 else None
    click.echo(f"mean {statistics.mean(perplexities):.4f}" + (f", standard deviation {spread:.4f}" if spread else ""))
    if to:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = {
            "command": " ".join(["python", *sys.argv]),
            "commit": commit,
            "perplexities": perplexities,
            "mean": statistics.mean(perplexities),
            "standard_deviation": spread,
            "threads": torch.get_num_threads(),
            "block_losses": losses,  # a seed, a block: before matching, after
        }
        to.write_text(json.dumps(record, indent=2) + "\n")


def value_of(text: str) -> Any:
    """A number, true or false; else the text itself, like 4GB."""
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
