"""Kill runs, fine-tunings and exports at random moments, and see that the same line ends with the same bytes.

    python tools/kill.py --kills 100 --out tools/results/kills.md

A child does the work on a tiny model; after a random part of the time that the whole work takes it is killed (-9) and
started again, until it ends by itself. Then its folder is compared, byte for byte, with one that was never interrupted,
and the work begins anew. The moments are random: two runs of this tool do not kill at the same places.
"""

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1]))

from streamslr import compress
from streamslr.finetune import finetune
from streamslr.results.export import export
from tests.support.compressed_folders import file_contents, run_contents
from tests.support.forkserver import Child
from tests.support.tiny_models import TEXT, tiny_checkpoint

RUN: dict[str, Any] = {"samples": 6, "seq_len": 16, "rank": 4, "device": "cpu", "match_epochs": 3}
TUNING: dict[str, Any] = {"seq_len": 32, "batch": 8, "steps": 10, "device": "cpu"}


@dataclass(frozen=True)
class Work:
    """One line that a user starts again after a kill."""

    name: str
    begin: Callable[[Path], None]  # does the work into a folder
    contents: Callable[[Path], Any]  # what must be equal at the end


def works(folder: Path) -> list[Work]:
    """Make a tiny model, a text and a finished folder; return what can be killed on them."""
    model = tiny_checkpoint(folder / "model", blocks=4, shards=3)
    text = folder / "text.txt"
    text.write_text(TEXT * 20)
    settings = {"model": model, "calibration": text, **RUN}
    finished = folder / "finished"
    compress(**settings, out=finished)
    on_disk = {**settings, "host_mem": "0.6GB", "scratch": folder / "scratch"}
    return [
        Work("run", partial(_compress, settings), run_contents),
        Work("run, hidden states on another disk", partial(_compress, on_disk), run_contents),
        Work("finetune", partial(_finetune, finished, text), file_contents),
        Work("export --to dense", partial(_export, finished, "dense"), file_contents),
        Work("export --to peft", partial(_export, finished, "peft"), file_contents),
    ]


def _compress(settings: dict[str, Any], out: Path) -> None:
    compress(**settings, out=out)


def _finetune(folder: Path, data: Path, out: Path) -> None:
    finetune(folder, data, out, **TUNING)


def _export(folder: Path, to: str, out: Path) -> None:
    export(folder, out, to)


def kill(work: Work, kills: int, folder: Path) -> tuple[int, int]:
    """Kill `work` so often; return how often it came to an end, and how often that end was another."""
    out = folder / "out"  # the same path every time: an adapter names its base by it
    began = time.monotonic()
    if Child(work.begin, out).join() != 0:
        raise SystemExit(f"{work.name} fails without a kill")
    seconds = time.monotonic() - began
    expected = work.contents(out)
    killed = finished = lost = 0
    while killed < kills:
        shutil.rmtree(out)
        while True:
            child = Child(work.begin, out)
            code = child.join(random.uniform(0, seconds) if killed < kills else None)
            if code is not None:
                break
            child.kill()
            killed += 1
        finished += 1
        if code != 0 or work.contents(out) != expected:
            lost += 1
            kept = out.with_name(f"lost-{lost}")
            shutil.copytree(out, kept)
            click.echo(f"{work.name}: exit code {code}; what it left is in {kept}")
    return finished, lost


@click.command()
@click.option("--kills", default=100, show_default=True, help="Number of kills, dealt to all kinds of work.")
@click.option("--out", type=click.Path(path_type=Path), help="File for the table.")
def main(kills: int, out: Path | None) -> None:
    folder = Path(tempfile.mkdtemp(prefix="streamslr-kill-"))
    rows = ["| work | kills | ends | lost or other bytes |", "|---|--:|--:|--:|"]
    kinds, any_lost = works(folder), False
    for i, work in enumerate(kinds):
        count = kills // len(kinds) + (i < kills % len(kinds))
        finished, lost = kill(work, count, Path(tempfile.mkdtemp(dir=folder)))
        any_lost |= lost > 0
        rows.append(f"| `{work.name}` | {count} | {finished} | {lost} |")
        click.echo(rows[-1])
    if not any_lost:
        shutil.rmtree(folder)
    if out:
        table = "\n".join(rows)
        out.write_text(f"# Kills at random moments\n\n`python tools/kill.py --kills {kills}`\n\n{__doc__}\n{table}\n")


if __name__ == "__main__":
    main()
