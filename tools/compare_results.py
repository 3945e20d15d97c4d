"""Show the rows of a comparison as a table and as a plot; `compare.py` measures them."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamslr.config import format_bytes
from streamslr.io.durable import write_file, write_json

Row = dict[str, Any]
"""One run: the fields of its Combination and what was measured."""


@dataclass(frozen=True)
class Combination:
    """One run: a method, what it makes of the linears, with or without matching, from one seed."""

    method: str
    pattern: str
    rank: int
    matched: bool
    seed: int

    def __str__(self) -> str:
        return f"{self.method} {self.pattern} + {self.rank}{', matched' if self.matched else ''}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """A folder name that no other combination has: 2:4 differs from 2.4%, seed -1 from 1."""
        return re.sub(r"[^\w.%-]+", "_", str(self))

    def describes(self, row: Row) -> bool:
        return all(row.get(name) == value for name, value in asdict(self).items())


@dataclass(frozen=True)
class Line:
    """A line of the table: a combination with one row for each seed, and the rows of the reference for it."""

    method: str
    pattern: str  # and the rank, "2:4 + 16"
    matched: bool
    rows: tuple[Row, ...]
    official: tuple[Row, ...]

    def figures(self, name: str) -> list[float]:
        """Return the figure of each seed that has one."""
        return [row[name] for row in self.rows if row.get(name) is not None]


def lines(record: Mapping[str, Any]) -> list[Line]:
    """Return the lines in the order in which patterns and methods were first run, unmatched before matched."""
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
    rows: list[Row] = record["reference"]["rows"] if record["reference"] else []
    return rows


def write(record: Mapping[str, Any], out: Path) -> None:
    """Write OUT.json, OUT.md and OUT.svg, each in one step, so that a kill leaves it whole."""
    write_json(Path(f"{out}.json"), record)
    write_file(Path(f"{out}.md"), markdown(record).encode())
    if len(record["rows"]) > 1:
        picture = Path(f"{out}.partial.svg")
        draw(record, picture)
        picture.replace(f"{out}.svg")


def markdown(record: Mapping[str, Any]) -> str:
    """Return the table, how to read it, and what was skipped and why."""
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
        "mean ± standard deviation (seeds). Linear error: tr(R H Rᵀ) / tr(W H Wᵀ) as solved, before matching, mean "
        "over the linears. CPU s: user and system of the whole run"
        + (f", {record['startup_cpu_seconds']:.1f} of them start-up" if "startup_cpu_seconds" in record else "")
        + "; empty where the run was resumed. Solve and match s: wall.",
    ]
    if record["reference"]:
        text += ["", f"Official: {record['reference']['source']}"]
    if record["skipped"]:
        text += ["", "Skipped:", "", *(f"- {name}: {why}" for name, why in record["skipped"].items())]
    return "\n".join([*text, "", f"    {record['command']}", ""])


def _mean(figures: Sequence[float], style: str) -> str:
    """Return '51.850', or for several figures '51.470 ± 0.470 (4)'."""
    if len(figures) < 2:
        return "".join(format(figure, style) for figure in figures)
    return f"{statistics.mean(figures):{style}} ± {statistics.stdev(figures):{style}} ({len(figures)})"


def draw(record: Mapping[str, Any], to: Path) -> None:
    """Draw perplexity against bytes and CPU seconds: a colour for each method, a shape for each pattern."""
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
