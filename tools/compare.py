"""Compare methods, patterns, value formats and matching on one model and one calibration text, in a table and a plot.

    python tools/compare.py --model FOLDER --calibration TEXT --text TEXT --out tools/results/compare-NAME
    python tools/compare.py …the same line again…                                  # goes on where it stopped
    python tools/compare.py … --methods 3basil,oats,wanda --patterns 1:4+8 --match on --seeds 0,1,2,3 --threads 2
    python tools/compare.py … --methods 3basil --patterns 2:4+16,dense+16 --values stored,int8,int4

Writes OUT.json, OUT.md (the table) and OUT.svg (perplexity against the bytes of the linears and against CPU seconds)
after every row. The first row is the dense model. Perplexity is measured on the first --eval-windows windows of --text.
Where rows differ in their values or rounding, OUT.svg has bits a weight in place of bytes, and the least perplexity
with so many bits or fewer.

--values takes the formats of `streamslr run --values`, with the columns that share a scale behind a stroke (int4/64;
128 without). --rounding says how S comes onto their grids: solved or nearest, as `streamslr run --rounding`, or after:
S of the finished run with values as stored is rounded to the nearest, each group with the scale of least squared error.
Such a row has the seconds and the memory of that run.

Every combination is a `streamslr run` in OUT.work that is verified, evaluated, and deleted once its row is written.
After a kill the same line keeps finished rows and resumes the run under way; other methods, patterns, formats or seeds
in that line add rows. Methods without U·V run at rank 0. What a method or the model cannot do, such as values as stored
with pattern dense, is skipped, and named in OUT.json and under the table.

CPU seconds are user and system time of the run process, start-up included; the start-up alone stands under the table.
On one thread they depend little on other load, unlike wall seconds.

--reference FILE adds figures of other code: {"source": …, "rows": [{"method", "pattern", "rank", "matched", "seed",
"perplexity", "seconds"}, …]}; "values" (like "int4/128") and "rounding" where they are not as stored.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from bench_block import commit
from bench_run import STREAMSLR
from compare_results import AFTER, ROUNDINGS, Combination, Row, write
from compare_rounding import write_rounded

from streamslr.cli import run
from streamslr.errors import InputError, StreamslrError
from streamslr.io.durable import file_sha256, write_json
from streamslr.memory import free_host_memory
from streamslr.model.checkpoint import open_checkpoint
from streamslr.results.evaluate import evaluate
from streamslr.results.inspect import read_run, totals
from streamslr.results.verify import verify
from streamslr.run.journal_writer import refuse_changed_settings
from streamslr.solvers.methods import all_methods, find_method
from streamslr.spec.pattern import parse_pattern
from streamslr.spec.values import STORED, grid_of, parse_values, values_text

_STARTUP = [sys.executable, "-c", "import streamslr.cli, streamslr.run, streamslr.run.context"]


@click.command(help=__doc__)
@click.option("--model", required=True, help="Folder or hub id.")
@click.option("--calibration", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True)
@click.option("--text", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True)
@click.option("--samples", default=64, show_default=True, help="Calibration windows.")
@click.option("--seq-len", default=256, show_default=True, help="Tokens in a window of --calibration and --text.")
@click.option("--eval-windows", default=400, show_default=True)
@click.option("--methods", help="Comma-separated names [default: all of `streamslr methods`].")
@click.option(
    "--patterns", default="2:4+16,1:4+8", show_default=True, help="Comma-separated, each with its rank behind a +."
)
@click.option("--values", default=STORED, show_default=True, help="Comma-separated: stored, int8, int4, fp8.")
@click.option(
    "--rounding", default="solved", show_default=True, help="Comma-separated: solved, nearest, after; not for stored."
)
@click.option("--match", type=click.Choice(["on", "off", "both"]), default="both", show_default=True)
@click.option("--seeds", default="0", show_default=True, help="Comma-separated; several give mean and spread.")
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="Another setting for every run.")
@click.option("--threads", default=1, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--reference", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the runs [default: OUT.work].")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Path without a suffix, for .json, .md and .svg."
)
def main(
    model: str,
    calibration: Path,
    text: Path,
    samples: int,
    seq_len: int,
    eval_windows: int,
    methods: str | None,
    patterns: str,
    values: str,
    rounding: str,
    match: str,
    seeds: str,
    changes: tuple[str, ...],
    threads: int,
    device: str,
    reference: Path | None,
    work: Path | None,
    out: Path,
) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run under way ends with us
    torch.set_num_threads(threads)
    settings = {
        "model": open_checkpoint(model).identity,
        "calibration": file_sha256(calibration),
        "text": file_sha256(text),
        "samples": samples,
        "seq_len": seq_len,
        "eval_windows": eval_windows,
        "threads": threads,
        "device": device,
        "others": sorted(changes),
    }
    asked = combinations(
        methods.split(",") if methods else [method.name for method in all_methods()],
        [pattern_and_rank(item) for item in patterns.split(",")],
        values_and_roundings(values.split(","), rounding.split(",")),
        {"on": [True], "off": [False], "both": [False, True]}[match],
        [int(seed) for seed in seeds.split(",")],
    )
    line = [
        *(STREAMSLR, "run", "--quiet", "--model", model, "--calibration", str(calibration), "--device", device),
        *("--samples", str(samples), "--seq-len", str(seq_len), *other_options(changes)),
    ]
    run.make_context("run", [*line[2:], "--out", str(out)])  # raises UsageError before any combination does
    work = work or Path(f"{out}.work")
    work.mkdir(parents=True, exist_ok=True)

    file = Path(f"{out}.json")
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"settings": settings, "rows": []}
    refuse_changed_settings(file, record["settings"], settings)
    rows: list[Row] = record["rows"]
    record |= {
        "command": shlex.join(["python", *sys.argv]),
        "model": Path(model).name,
        "reference": json.loads(reference.read_text()) if reference else None,
        "skipped": {},
    }

    def perplexity(folder: str) -> float:
        memory = free_host_memory()
        return evaluate(
            folder, text, seq_len, windows=eval_windows, device=device, free_memory=memory, scratch=work
        ).perplexity

    if not rows:
        rows.append({"method": "dense", "perplexity": perplexity(model)})
        write(record, out)
    finished = {Combination.of(row) for row in rows[1:]}
    new = [one for one in asked if one not in finished]
    if new and "startup_cpu_seconds" not in record:
        record["startup_cpu_seconds"] = timed(_STARTUP, threads)[0]
    add_rows(record, new, line, perplexity, out, work, threads)
    write(record, out)
    if not any(work.iterdir()):
        work.rmdir()
    click.echo(f"{out}.json, {out}.md, {out}.svg")


def add_rows(
    record: dict[str, Any],
    new: Sequence[Combination],
    line: Sequence[str],
    perplexity: Callable[[str], float],
    out: Path,
    work: Path,
    threads: int,
) -> None:
    """Run and evaluate each new combination and write its row, or note in the record why it was skipped."""
    rows = record["rows"]
    for number, one in enumerate(new, start=1):
        folder = work / one.run.folder
        measured = work / f"{one.run.folder}.json"  # keeps the figures of the run if the evaluation is killed
        try:
            find_method(one.method).require(parse_pattern(one.pattern), one.rank)
            if not measured.exists():
                write_json(measured, measure(one.run, line, folder, threads))
        except InputError as error:  # another try would end the same
            record["skipped"][str(one)] = str(error)
            click.echo(f"{number} of {len(new)}, {one}: skipped: {error}", err=True)
        else:
            row = json.loads(measured.read_text())
            if one.rounding == AFTER:
                row = measure_rounded(one, row, folder, work / one.folder)
            rows.append(row | {"perplexity": perplexity(str(work / one.folder))})
            click.echo(f"{number} of {len(new)}, {one}: {rows[-1]['perplexity']:.3f}", err=True)
        write(record, out)
        if one != one.run:
            shutil.rmtree(work / one.folder, ignore_errors=True)
        if not any(other.run == one.run for other in new[number:]):
            measured.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def pattern_and_rank(item: str) -> tuple[str, int]:
    """Parse '2:4+16' as ('2:4', 16), without a + at rank 0. Raises InputError for an unknown pattern or rank."""
    pattern, _, rank = item.partition("+")
    if not re.fullmatch(r"\d*", rank):
        raise InputError(f"--patterns {item!r}: behind the + stands the rank, as in 2:4+16")
    return str(parse_pattern(pattern)), int(rank or 0)


def other_options(changes: Iterable[str]) -> list[str]:
    """Turn ['match_epochs=8'] into ['--match-epochs', '8']. Raises UsageError for settings that are set here."""
    own = {"--model", "--calibration", "--device", "--samples", "--seq-len", "--quiet", "--out"}
    own |= {"--method", "--pattern", "--rank", "--values", "--group", "--rounding", "--seed", "--match", "--no-match"}
    options = [(f"--{name.replace('_', '-')}", value) for name, _, value in (c.partition("=") for c in changes)]
    if taken := own & {name for name, _ in options}:
        raise click.UsageError(f"--set cannot change {', '.join(sorted(taken))}: compare.py sets it")
    return [part for pair in options for part in pair]


def values_and_roundings(values: Iterable[str], roundings: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return each format with each rounding, values as stored once without; ["int4"] becomes [("int4/128", "solved")].

    Raises:
        InputError: A format or rounding is unknown, or nothing is there to be rounded.
    """
    if unknown := set(roundings) - set(ROUNDINGS):
        raise InputError(f"--rounding {', '.join(sorted(unknown))} is not known; there are {', '.join(ROUNDINGS)}")
    found = [parse_values(item) for item in values]
    if not any(map(grid_of, found)) and list(roundings) != ["solved"]:
        raise InputError(f"--rounding {','.join(roundings)} has no effect: --values has only stored; add int4 or int8")
    pairs = (product([values_text(form)], roundings if grid_of(form) else [None]) for form in found)
    return [pair for of_format in pairs for pair in of_format]


def combinations(
    methods: Iterable[str],
    patterns: Sequence[tuple[str, int]],
    values: Sequence[tuple[str, str | None]],
    matched: Sequence[bool],
    seeds: Sequence[int],
) -> list[Combination]:
    """Return all combinations, seed by seed; methods without U·V at rank 0. Raises InputError for an unknown method."""
    found = [find_method(name) for name in methods]
    return list(
        dict.fromkeys(
            Combination(method.name, pattern, rank if method.low_rank else 0, match, seed, form, rounding)
            for seed, (pattern, rank), match, method, (form, rounding) in product(
                seeds, patterns, matched, found, values
            )
        )
    )


def measure(one: Combination, line: Sequence[str], folder: Path, threads: int) -> Row:
    """Run one combination in `folder`, new or resumed, and verify it. Raises InputError where the run refuses it."""
    resumed = folder.exists()
    match = "--match" if one.matched else "--no-match"
    own = ["--method", one.method, "--pattern", one.pattern, "--rank", str(one.rank), "--seed", str(one.seed), match]
    own += ["--values", one.values, *(["--rounding", one.rounding] if one.rounding else [])]
    cpu, wall = timed([*line, *own, "--out", str(folder)], threads)
    if problems := verify(folder).problems:
        raise StreamslrError(f"{one}: {folder} is not sound: {problems}")
    state = read_run(folder)
    parts = [state.measured, *(block.measured for block in state.blocks)]
    seconds: dict[str, float] = {}
    for part in parts:
        for phase, measured in part.items():
            seconds[phase] = seconds.get(phase, 0.0) + measured["seconds"]
    peaks = [measured["host_peak_bytes"] for part in parts for measured in part.values()]
    matchings = [matching for block in state.blocks if (matching := block.whole_matching)]
    return asdict(one) | {
        "linear_bytes": totals(state.blocks)["linear_bytes"],
        "dense_linear_bytes": totals(state.blocks)["dense_linear_bytes"],
        "bits": totals(state.blocks)["bits_per_weight"],
        "linear_error": totals(state.blocks)["error"],  # as solved
        "block_losses": [[m.loss_before, m.loss_after] for m in matchings],
        "cpu_seconds": None if resumed else cpu,  # the last start alone would say nothing
        "wall_seconds": None if resumed else wall,
        "phase_seconds": seconds,  # wall, over all starts
        "host_peak_bytes": max(peaks),
        "commit": commit(),
        "made_with": dict(state.made_with),
    }


def measure_rounded(one: Combination, row: Row, folder: Path, rounded: Path) -> Row:
    """Write `folder`, whose row is given, with S rounded into `rounded`; return the row of that."""
    shutil.rmtree(rounded, ignore_errors=True)  # a killed process left it
    form = grid_of(parse_values(one.values))
    assert form is not None
    linear_bytes, weights = write_rounded(folder, form, rounded), round(8 * row["linear_bytes"] / row["bits"])
    measured = {"linear_bytes": linear_bytes, "bits": 8 * linear_bytes / weights}
    return row | asdict(one) | measured | {"linear_error": None, "block_losses": []}


def timed(line: Sequence[str], threads: int) -> tuple[float, float]:
    """Run a process and return its CPU and wall seconds. Raises InputError where it ends with that exit code."""
    start = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode == InputError.exit_code:
        raise InputError(said.strip().rpartition("streamslr: ")[2])  # warnings come before it
    if process.returncode:
        raise StreamslrError(f"{shlex.join(line)} ended with {process.returncode}: {said.strip()}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - start


if __name__ == "__main__":
    try:
        main()
    except StreamslrError as error:
        click.echo(f"compare: {error}", err=True)
        sys.exit(error.exit_code)
