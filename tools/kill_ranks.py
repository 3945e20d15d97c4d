"""Kill a random rank of a run by torchrun at random moments, and see that all end and the same line goes on.

    python tools/kill_ranks.py --kills 20 --ranks 2 --out tools/results/ranks-kills.json

An unbroken run gives the bytes to compare with and the time that a whole run takes. Then, for each kill, a run begins
in a new folder; after a random part of that time, counted from when its ranks are there, one of them is killed (-9).
The tool counts the seconds until torchrun has ended, looks for the line that names the rank, and starts the same line
again, which must end with the same bytes. Moments are random: two runs of this tool do not kill at the same places.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import psutil
from bench_block import commit

sys.path.insert(0, str(Path(__file__).parents[1]))

from streamslr.run.journal import read_journal
from tests.support.compressed_folders import run_contents
from tests.support.tiny_models import TEXT, tiny_checkpoint

TINY = "--samples 9 --seq-len 32 --rank 4 --match-epochs 4 --match-batch 4"
"""Settings of the run on the tiny model."""


@dataclass(frozen=True)
class Kill:
    """One kill and what came of it."""

    rank: int
    after_seconds: float  # since all ranks were there
    blocks_done: int  # blocks that the journal had when all had ended
    seconds_to_end: float  # from the kill until torchrun had ended
    exit_code: int
    said: tuple[str, ...]  # lines of streamslr on standard error
    named: bool  # one line, which names the rank; none where the others had done their work
    identical: bool  # the same line ended with the bytes of the unbroken run


def start(ranks: int, line: list[str], errors: Path) -> "subprocess.Popen[bytes]":
    """Start the run by torchrun, one thread a rank; what it prints goes to the file `errors`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with errors.open("wb") as file:
        return subprocess.Popen([*command, "-m", "streamslr", "run", *line, "--quiet"], stderr=file, env=environment)


def wait_for_ranks(torchrun: "subprocess.Popen[bytes]", ranks: int) -> dict[int, psutil.Process]:
    """Return the processes of all ranks, once each has connections to the others."""
    parent = psutil.Process(torchrun.pid)
    while torchrun.poll() is None:
        found = {}
        for child in parent.children():
            try:
                if child.net_connections(kind="tcp"):
                    found[int(child.environ()["RANK"])] = child
            except (psutil.Error, KeyError):
                continue
        if len(found) == ranks:
            return found
        time.sleep(0.02)
    raise SystemExit(f"torchrun ended with {torchrun.returncode} before its ranks were there")


def count_blocks(out: Path) -> tuple[int, int]:
    """Return how many blocks of the run in a folder are finished, and how many there are."""
    state = read_journal(out)
    return (len(state.blocks), state.blocks_total) if state else (0, 1)


def kill_once(ranks: int, line: list[str], out: Path, seconds: float, expected: dict[str, bytes]) -> Kill | None:
    """Kill a rank at a random moment and start the line again; None where the run ended before."""
    errors = out.with_name("stderr.txt")
    torchrun = start(ranks, line, errors)
    processes = wait_for_ranks(torchrun, ranks)
    rank, after = random.randrange(ranks), random.uniform(0, seconds)
    try:
        torchrun.wait(after)
        return None
    except subprocess.TimeoutExpired:
        pass
    try:
        processes[rank].send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        torchrun.wait()
        return None
    killed = time.monotonic()
    code = torchrun.wait(120)
    to_end = time.monotonic() - killed
    said = tuple(text for text in errors.read_text().splitlines() if text.startswith("streamslr, rank"))
    done, total = count_blocks(out)
    named = len(said) == 1 and bool(re.search(rf"rank {rank} \(process \d+\) ended without a word", said[0]))
    named = named or (done == total and not said)
    again = start(ranks, line, errors).wait(600)
    identical = again == 0 and run_contents(out) == expected
    return Kill(rank, round(after, 2), done, round(to_end, 2), code, said, named, identical)


@click.command()
@click.option("--kills", default=20, show_default=True, help="Number of kills.")
@click.option("--ranks", default=2, show_default=True, help="Number of ranks.")
@click.option("--model", type=click.Path(path_type=Path), help="Model folder [default: a tiny one, made here].")
@click.option("--settings", default=TINY, show_default=True, help="Settings of the run, as on its command line.")
@click.option("--calibration", type=click.Path(path_type=Path), help="Calibration text [default: a short one].")
@click.option("--seed", type=int, help="Seed of ranks and moments [default: another each time].")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file; kills of other numbers of ranks in it stay.")
def main(
    kills: int,
    ranks: int,
    model: Path | None,
    settings: str,
    calibration: Path | None,
    seed: int | None,
    out: Path | None,
) -> None:
    random.seed(seed)
    command = f"python tools/kill_ranks.py {' '.join(sys.argv[1:])}"
    folder = Path(tempfile.mkdtemp(prefix="streamslr-kill-ranks-"))
    model = model or tiny_checkpoint(folder / "model", blocks=4, shards=3)
    if calibration is None:
        calibration = folder / "text.txt"
        calibration.write_text(TEXT * 40)
    work = folder / "work"
    work.mkdir()
    line = ["--model", str(model), "--calibration", str(calibration), "--device", "cpu", "--out", str(work / "out")]
    line += settings.split()
    torchrun = start(ranks, line, work / "stderr.txt")
    wait_for_ranks(torchrun, ranks)
    began = time.monotonic()
    if torchrun.wait():
        raise SystemExit((work / "stderr.txt").read_text())
    seconds = time.monotonic() - began
    expected = run_contents(work / "out")
    done: list[Kill] = []
    while len(done) < kills:
        shutil.rmtree(work / "out", ignore_errors=True)
        if kill := kill_once(ranks, line, work / "out", seconds, expected):
            done.append(kill)
            click.echo(kill)
            if out:  # after each, since all take a quarter of an hour
                before = json.loads(out.read_text()) if out.exists() else {}
                ours = {"command": command, "commit": commit(), **_summary(done, seconds)}
                out.write_text(json.dumps(before | {f"{ranks} ranks": ours}, indent=1) + "\n")
    shutil.rmtree(folder)


def _summary(kills: list[Kill], seconds: float) -> dict[str, Any]:
    to_end = sorted(kill.seconds_to_end for kill in kills)
    return {
        "seconds_of_a_whole_run": round(seconds, 2),
        "killed": len(kills),
        "blocks_done": sorted(kill.blocks_done for kill in kills),
        "seconds_to_end": {"median": to_end[len(to_end) // 2], "most": to_end[-1]},
        "ended_with_an_exit_code": sum(kill.exit_code != 0 for kill in kills),
        "named_in_one_line": sum(kill.named for kill in kills),
        "identical": sum(kill.identical for kill in kills),
        "kills": [asdict(kill) for kill in kills],
    }


if __name__ == "__main__":
    main()
