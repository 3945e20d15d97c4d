"""Methods × patterns × matching on one model and one calibration text, in one table and one plot.

    python tools/compare.py --model FOLDER --calibration TEXT --text TEXT --out tools/results/compare-NAME
    python tools/compare.py …the same line again…                                  # goes on where it stopped
    python tools/compare.py … --methods 3basil,oats,wanda --patterns 1:4+8 --match on --seeds 0,1,2,3 --threads 2

Writes OUT.json, OUT.md (the table) and OUT.svg (perplexity against the bytes of the linears, and against CPU
seconds), each anew after every row. Perplexity is that of the first --eval-windows windows of --text; the dense model
is the first row. Every combination is a `streamslr run` of its own in OUT.work, verified, evaluated, and deleted once
its row is written. Killed, the same line keeps the rows that are there, and the run that was under way resumes; other
methods, patterns or seeds in that line add rows. Methods without U·V run at rank 0 whatever the pattern's; what a
method or the model cannot do is skipped, and named in OUT.json and under the table.

CPU seconds are the run process's own, user and system, start-up included (it is measured too, and stands under the
table): on one thread they hardly feel who else uses the machine, as wall seconds do. --reference FILE sets figures of
other code beside ours: {"source": …, "rows": [{"method", "pattern", "rank", "matched", "seed", "perplexity",
"seconds"}, …]}.
"""

import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from bench_block import commit
from bench_run import STREAMSLR

from streamslr.cli import run
from streamslr.config import format_bytes
from streamslr.errors import InputError, StreamslrError
from streamslr.io.durable import file_sha256, write_file, write_json
from streamslr.memory import free_host_memory
from streamslr.model.checkpoint import open_checkpoint
from streamslr.results.evaluate import evaluate
from streamslr.results.inspect import read_run, totals
from streamslr.results.verify import verify
from streamslr.run.journal import refuse_changed_settings
from streamslr.solvers.methods import all_methods, find_method
from streamslr.spec.pattern import parse_pattern

Row = dict[str, Any]
_STARTUP = [sys.executable, "-c", "import streamslr.cli, streamslr.run, streamslr.run.context"]


@dataclass(frozen=True)
class Combination:
    """One run."""

    method: str
    pattern: str
    rank: int
    matched: bool
    seed: int

    def __str__(self) -> str:
        return f"{self.method} {self.pattern} + {self.rank}{', matched' if self.matched else ''}, seed {self.seed}"

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.%-]+", "_", str(self))  # no two alike: 2:4 is no 2.4%, seed -1 not 1

    def describes(self, row: Row) -> bool:
        return all(row.get(name) == value for name, value in asdict(self).items())


@click.command(help=__doc__)
@click.option("--model", required=True, help="Folder or hub id.")
@click.option("--calibration", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True)
@click.option("--text", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True)
@click.option("--samples", default=64, show_default=True, help="Calibration windows.")
@click.option("--seq-len", default=256, show_default=True, help="Tokens in a window, of calibration and of --text.")
@click.option("--eval-windows", default=400, show_default=True)
@click.option("--methods", help="Names, comma-separated [default: all that `streamslr methods` lists].")
@click.option("--patterns", default="2:4+16,1:4+8", show_default=True, help="Each with the rank of U·V behind a +.")
@click.option("--match", type=click.Choice(["on", "off", "both"]), default="both", show_default=True)
@click.option("--seeds", default="0", show_default=True, help="Comma-separated; of several, the mean and spread.")
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="Any other setting of every run.")
@click.option("--threads", default=1, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--reference", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the runs [default: OUT.work].")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Without a suffix: it gets three.")
def main(
    model: str,
    calibration: Path,
    text: Path,
    samples: int,
    seq_len: int,
    eval_windows: int,
    methods: str | None,
    patterns: str,
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
        {"on": [True], "off": [False], "both": [False, True]}[match],
        [int(seed) for seed in seeds.split(",")],
    )
    own = {"--model", "--calibration", "--device", "--samples", "--seq-len", "--quiet", "--out"}
    own |= {"--method", "--pattern", "--rank", "--seed", "--match", "--no-match"}
    others = [part for change in changes for part in option(change)]
    if taken := own & set(others[::2]):
        raise click.UsageError(f"--set: {', '.join(sorted(taken))} is not for it, compare.py has its own")
    line = [
        *(STREAMSLR, "run", "--quiet", "--model", model, "--calibration", str(calibration), "--device", device),
        *("--samples", str(samples), "--seq-len", str(seq_len), *others),
    ]
    run.make_context("run", [*line[2:], "--out", str(out)])  # a UsageError now, not once a combination
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

    def perplexity(of: str) -> float:
        result = evaluate(
            of, text, seq_len, windows=eval_windows, device=device, free_memory=free_host_memory(), scratch=work
        )
        return result.perplexity

    if not rows:
        rows.append({"method": "dense", "perplexity": perplexity(model)})
        write(record, out)
    new = [one for one in asked if not any(one.describes(row) for row in rows)]
    if new and "startup_cpu_seconds" not in record:
        record["startup_cpu_seconds"] = timed(_STARTUP, threads)[0]
    for number, one in enumerate(new, start=1):
        measured = work / f"{one.folder}.json"  # so that a kill while it is evaluated loses no figure
        try:
            find_method(one.method).require(parse_pattern(one.pattern), one.rank)
            if not measured.exists():
                write_json(measured, measure(one, line, work / one.folder, threads))
        except InputError as error:  # it cannot be done, however often it is tried
            record["skipped"][str(one)] = str(error)
            click.echo(f"{number} of {len(new)}, {one}: skipped: {error}", err=True)
        else:
            rows.append(json.loads(measured.read_text()) | {"perplexity": perplexity(str(work / one.folder))})
            click.echo(f"{number} of {len(new)}, {one}: {rows[-1]['perplexity']:.3f}", err=True)
        write(record, out)
        measured.unlink(missing_ok=True)
        shutil.rmtree(work / one.folder, ignore_errors=True)
    write(record, out)
    if not any(work.iterdir()):
        work.rmdir()
    click.echo(f"{out}.json, {out}.md, {out}.svg")


def pattern_and_rank(item: str) -> tuple[str, int]:
    """'2:4+16' -> ('2:4', 16); without a +, rank 0. Raises InputError for an unknown pattern or rank."""
    pattern, _, rank = item.partition("+")
    if not re.fullmatch(r"\d*", rank):
        raise InputError(f"--patterns {item!r}: behind the + stands the rank, as in 2:4+16")
    return str(parse_pattern(pattern)), int(rank or 0)


def option(change: str) -> list[str]:
    """'match_epochs=8' -> ['--match-epochs', '8']."""
    name, _, value = change.partition("=")
    return [f"--{name.replace('_', '-')}", value]


def combinations(
    methods: Iterable[str], patterns: Sequence[tuple[str, int]], matched: Sequence[bool], seeds: Sequence[int]
) -> list[Combination]:
    """All of them, a seed after another; methods without U·V at rank 0. Raises InputError for an unknown method."""
    found = [find_method(name) for name in methods]
    return list(
        dict.fromkeys(
            Combination(method.name, pattern, rank if method.low_rank else 0, match, seed)
            for seed, (pattern, rank), match, method in product(seeds, patterns, matched, found)
        )
    )


def measure(one: Combination, line: Sequence[str], folder: Path, threads: int) -> Row:
    """One run, new or resumed in `folder`, and verified. Raises InputError for what it refuses, and so will again."""
    resumed = folder.exists()
    match = "--match" if one.matched else "--no-match"
    own = ["--method", one.method, "--pattern", one.pattern, "--rank", str(one.rank), "--seed", str(one.seed), match]
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
    matchings = [block.matching for block in state.blocks if block.matching]
    return asdict(one) | {
        "linear_bytes": totals(state.blocks)["linear_bytes"],
        "dense_linear_bytes": totals(state.blocks)["dense_linear_bytes"],
        "linear_error": totals(state.blocks)["error"],  # as solved
        "block_losses": [[m.loss_before, m.loss_after] for m in matchings],
        "cpu_seconds": None if resumed else cpu,  # of this start alone they would say nothing
        "wall_seconds": None if resumed else wall,
        "phase_seconds": seconds,  # wall, of all starts
        "host_peak_bytes": max(peaks),
        "commit": commit(),
        "made_with": dict(state.made_with),
    }


def timed(line: Sequence[str], threads: int) -> tuple[float, float]:
    """(CPU, wall) seconds of a process. Raises InputError where it says that its input is wrong."""
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
        raise InputError(said.strip().removeprefix("streamslr: "))
    if process.returncode:
        raise StreamslrError(f"{shlex.join(line)} ended with {process.returncode}: {said.strip()}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - start


# The table and the plot


@dataclass(frozen=True)
class Line:
    """A combination over its seeds, and what the reference has for it. Figures: one a seed."""

    method: str
    pattern: str  # with the rank
    matched: bool
    rows: tuple[Row, ...]
    official: tuple[Row, ...]

    def figures(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if row.get(name) is not None]


def lines(record: Mapping[str, Any]) -> list[Line]:
    """In the order that patterns and methods were first run in; unmatched before matched."""
    official = _official(record)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in record["rows"][1:]:
        groups.setdefault(tuple(row[name] for name in ("method", "pattern", "rank", "matched")), []).append(row)
    names = list(dict.fromkeys(pattern for _, pattern, _, _ in groups))
    order = list(dict.fromkeys(method for method, _, _, _ in groups))
    found = []
    for key in sorted(groups, key=lambda k: (names.index(k[1]), order.index(k[0]), k[2], k[3])):
        method, pattern, rank, matched = key
        ours = [Combination(method, pattern, rank, matched, row["seed"]) for row in groups[key]]
        theirs = [row for row in official if any(one.describes(row) for one in ours)]
        found.append(Line(method, f"{pattern} + {rank}", matched, tuple(groups[key]), tuple(theirs)))
    return found


def _official(record: Mapping[str, Any]) -> list[Row]:
    return record["reference"]["rows"] if record["reference"] else []


def write(record: Mapping[str, Any], out: Path) -> None:
    """OUT.json, OUT.md and OUT.svg, each whole or as it was."""
    write_json(Path(f"{out}.json"), record)
    write_file(Path(f"{out}.md"), markdown(record).encode())
    if len(record["rows"]) > 1:
        picture = Path(f"{out}.partial.svg")
        draw(record, picture)
        picture.replace(f"{out}.svg")


def markdown(record: Mapping[str, Any]) -> str:
    """The table, what was skipped, and how to read it."""
    dense, *others = record["rows"]
    head = ["method", "pattern + rank", "matched", "perplexity", "official", "bytes of linears", "of dense"]
    head += ["linear error", "CPU s", "solve s", "match s", "official s", "peak memory"]
    whole = format_bytes(others[0]["dense_linear_bytes"]) if others else ""
    known = [row["perplexity"] for row in _official(record) if row["method"] == "dense"]
    body = [["dense", "", "", f"{dense['perplexity']:.3f}", _mean(known, ".3f"), whole, "1", *[""] * 6]]
    for line in lines(record):
        first, phases = line.rows[0], [row["phase_seconds"] for row in line.rows]
        body.append(
            [
                line.method,
                line.pattern,
                "yes" if line.matched else "no",
                _mean(line.figures("perplexity"), ".3f"),
                _mean([row["perplexity"] for row in line.official], ".3f"),
                format_bytes(first["linear_bytes"]),
                f"{first['linear_bytes'] / first['dense_linear_bytes']:.3f}",
                _mean(line.figures("linear_error"), ".4f"),
                _mean(line.figures("cpu_seconds"), ".1f"),
                _mean([seconds["solve"] for seconds in phases], ".1f"),
                _mean([seconds["match"] for seconds in phases if "match" in seconds], ".1f"),
                _mean([row["seconds"] for row in line.official if row["seconds"] is not None], ".0f"),
                format_bytes(max(line.figures("host_peak_bytes"))),
            ]
        )
    settings = record["settings"]
    text = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
    text += [
        "",
        f"{record['model']}, {settings['samples']} calibration windows of {settings['seq_len']} tokens, perplexity on "
        f"{settings['eval_windows']} windows, {settings['threads']} thread(s) on {settings['device']}. Several seeds: "
        "mean ± standard deviation (seeds). Linear error: tr(R H Rᵀ) / tr(W H Wᵀ) as solved, before matching, mean over "
        "the linears. CPU s: user and system of the whole run"
        + (f", {record['startup_cpu_seconds']:.1f} of them start-up" if "startup_cpu_seconds" in record else "")
        + "; empty where the run was resumed. Solve and match s: wall.",
    ]
    if record["reference"]:
        text += ["", f"Official: {record['reference']['source']}"]
    if record["skipped"]:
        text += ["", "Skipped:", "", *(f"- {name}: {why}" for name, why in record["skipped"].items())]
    return "\n".join([*text, "", f"    {record['command']}", ""])


def _mean(figures: Sequence[float], style: str) -> str:
    """'51.850', or of several '51.470 ± 0.470 (4)'."""
    if len(figures) < 2:
        return "".join(format(figure, style) for figure in figures)
    return f"{statistics.mean(figures):{style}} ± {statistics.stdev(figures):{style}} ({len(figures)})"


def draw(record: Mapping[str, Any], to: Path) -> None:
    """Perplexity against bytes and against CPU seconds: a colour a method, a shape a pattern, filled where matched."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    drawn = lines(record)
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(dict.fromkeys(x.method for x in drawn))}
    # one shape for 2:4 + 16 and for the 2:4 + 0 of the methods without U·V
    shapes = {name: "osD^vPX*"[i % 8] for i, name in enumerate(dict.fromkeys(x.rows[0]["pattern"] for x in drawn))}
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
    for line in drawn:
        colour, ppl = colours[line.method], line.figures("perplexity")
        error = statistics.stdev(ppl) if len(ppl) > 1 else None
        style: dict[str, Any] = {"marker": shapes[line.rows[0]["pattern"]], "color": colour, "linestyle": "none"}
        style["markerfacecolor"] = colour if line.matched else "none"
        for axes, name in zip(panels, ("linear_bytes", "cpu_seconds"), strict=True):
            if xs := line.figures(name):
                x = statistics.mean(xs) / (1e6 if name == "linear_bytes" else 1)
                axes.errorbar(x, statistics.mean(ppl), yerr=error, **style)
        for row in line.official:
            if row["seconds"] is not None:
                panels[1].plot(row["seconds"], row["perplexity"], marker="x", color=colour, linestyle="none")
    dense = record["rows"][0]["perplexity"]
    for axes, label in zip(panels, ("MB of the compressed linears", "CPU seconds of the run"), strict=True):
        axes.axhline(dense, color="grey", linestyle="--", linewidth=1)
        axes.set_xlabel(label)
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    panels[0].annotate(f"dense {dense:.2f}", (0.01, dense), xycoords=("axes fraction", "data"), va="bottom")
    panels[0].set_ylabel("perplexity")
    panels[1].set_xscale("log")
    panels[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_minor_formatter("{x:g}")
    for axis in (panels[0].yaxis, panels[1].xaxis):  # 60, not 6 × 10¹
        axis.set_major_formatter("{x:g}")
    panels[1].xaxis.set_minor_formatter("")
    handles = [Line2D([], [], color=c, marker="o", linestyle="none", label=name) for name, c in colours.items()]
    handles += [Line2D([], [], color="k", marker=s, linestyle="none", label=name) for name, s in shapes.items()]
    handles.append(Line2D([], [], color="k", marker="o", fillstyle="none", linestyle="none", label="not matched"))
    if any(line.official for line in drawn):
        handles.append(Line2D([], [], color="k", marker="x", linestyle="none", label="official code"))
    figure.legend(handles=handles, loc="outside right upper")
    figure.suptitle(f"{record['model']}: below and to the left is better")
    figure.savefig(to)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main()
    except StreamslrError as error:
        click.echo(f"compare: {error}", err=True)
        sys.exit(error.exit_code)
