"""Show the rows of a comparison as a table and as a plot; `compare.py` measures them."""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamslr.config import format_bytes
from streamslr.io.durable import write_file, write_json
from streamslr.spec.values import STORED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AFTER = "after"
ROUNDINGS = ("solved", "nearest", AFTER)
"""How S comes onto a grid: two in the run, and one after a run with values as stored."""

# A line with more than so many times the median perplexity is drawn at the edge of the plot of bits.
_RUINED = 2.0

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
    values: str = STORED
    rounding: str | None = None  # one of ROUNDINGS where values are on a grid

    @classmethod
    def of(cls, row: Row) -> "Combination":
        """Return the combination of a row; rows of before 2026-11-27 say nothing of values, which are as stored."""
        return cls(**{field.name: row[field.name] for field in fields(cls) if field.name in row})

    def __str__(self) -> str:
        grid = "" if self.values == STORED else f", {self.values} {self.rounding}"
        return f"{self.method} {self.pattern} + {self.rank}{grid}{', matched' * self.matched}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """A folder name that no other combination has: 2:4 differs from 2.4%, seed -1 from 1."""
        return re.sub(r"[^\w.%-]+", "_", str(self))

    @property
    def run(self) -> "Combination":
        """The combination that is run for this one: with values as stored where S is rounded after the run."""
        return replace(self, values=STORED, rounding=None) if self.rounding == AFTER else self

    @property
    def numbers(self) -> str:
        """Values and how S came onto them, "int4/128 nearest"; solved, as is usual, stays unsaid."""
        return self.values if self.rounding in (None, "solved") else f"{self.values} {self.rounding}"


@dataclass(frozen=True)
class Line:
    """A line of the table: a combination with one row for each seed, and the rows of the reference for it."""

    of: Combination  # of the first seed
    rows: tuple[Row, ...]
    official: tuple[Row, ...]

    @property
    def pattern(self) -> str:
        """Pattern and rank, "2:4 + 16"."""
        return f"{self.of.pattern} + {self.of.rank}"

    @property
    def bits(self) -> float:
        """Bits a weight of the linears; rows of before 2026-11-27 do not say, and are of models in 16 bits."""
        first = self.rows[0]
        return float(first.get("bits", 16 * first["linear_bytes"] / first["dense_linear_bytes"]))

    @property
    def dense_bits(self) -> float:
        """Bits a weight of the linears in the dense model."""
        return self.bits * float(self.rows[0]["dense_linear_bytes"] / self.rows[0]["linear_bytes"])

    @property
    def perplexity(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.figures("perplexity"))

    def figures(self, name: str) -> list[float]:
        """Return the figure of each seed that has one."""
        return [row[name] for row in self.rows if row.get(name) is not None]


def lines(record: Mapping[str, Any]) -> list[Line]:
    """Return the lines by values, pattern, rank and method, each in the order in which it was first run.

    Ranks go up; within a method come its roundings, and unmatched before matched.
    """
    groups: dict[Combination, list[Row]] = {}
    for row in record["rows"][1:]:
        groups.setdefault(replace(Combination.of(row), seed=0), []).append(row)
    values, patterns, methods = (
        list(dict.fromkeys(getattr(one, name) for one in groups)) for name in ("values", "pattern", "method")
    )

    def place(one: Combination) -> tuple[int, ...]:
        rounding = ROUNDINGS.index(one.rounding) if one.rounding else 0
        first = values.index(one.values), patterns.index(one.pattern), one.rank
        return *first, methods.index(one.method), rounding, one.matched

    found = []
    for one in sorted(groups, key=place):
        ours = [Combination.of(row) for row in groups[one]]
        theirs = [row for row in _official(record) if Combination.of(row) in ours]
        found.append(Line(ours[0], tuple(groups[one]), tuple(theirs)))
    return found


def best_of(drawn: Sequence[Line]) -> list[Line]:
    """Return the lines that no other line with so many bits or fewer has less perplexity than, by their bits."""
    found: list[Line] = []
    for line in sorted(drawn, key=lambda line: (line.bits, line.perplexity)):
        if not found or line.perplexity < found[-1].perplexity:
            found.append(line)
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
    dense, of_runs = record["rows"][0], lines(record)
    head = ["method", "values", "pattern + rank", "matched", "perplexity", "official", "bits", "bytes of linears"]
    head += ["of dense", "linear error", "CPU s", "solve s", "match s", "official s", "peak memory"]
    bits = f"{of_runs[0].dense_bits:.2f}" if of_runs else ""
    whole = format_bytes(of_runs[0].rows[0]["dense_linear_bytes"]) if of_runs else ""
    known = [row["perplexity"] for row in _official(record) if row["method"] == "dense"]
    body = [["dense", "", "", "", f"{dense['perplexity']:.3f}", _mean(known, ".3f"), bits, whole, "1", *[""] * 6]]
    for line in of_runs:
        first, phases = line.rows[0], [row["phase_seconds"] for row in line.rows]
        body.append(
            [
                line.of.method,
                line.of.numbers,
                line.pattern,
                "yes" if line.of.matched else "no",
                _mean(line.figures("perplexity"), ".3f"),
                _mean([row["perplexity"] for row in line.official], ".3f"),
                f"{line.bits:.2f}",
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
        "mean ± standard deviation (seeds). Bits: of a weight of the linears, 8 × bytes of S (values, scales, meta), U "
        "and V / weights. Linear error: tr(R H Rᵀ) / tr(W H Wᵀ) as solved, before matching, mean "
        "over the linears. CPU s: user and system of the whole run"
        + (f", {record['startup_cpu_seconds']:.1f} of them start-up" if "startup_cpu_seconds" in record else "")
        + "; empty where the run was resumed. Solve and match s: wall.",
    ]
    if any(line.of.rounding == AFTER for line in of_runs):
        text += [
            "",
            "After: S of the run with values as stored, rounded to the nearest once the run was finished. Seconds and "
            "memory are those of the run.",
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
    """Draw perplexity against the size of the linears and against CPU seconds.

    A colour for each method, a shape for each pattern; the size is in MB. Where rows differ in their values or rounding
    it is in bits a weight: a colour and a kind of line for each of these (with its method, where there are several), a
    shape for each pattern and rank, and a broad line along the best rows. A row whose perplexity is far from the others
    is then drawn at the upper edge, with its perplexity beside it.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    drawn, runs = lines(record), [Combination.of(row) for row in record["rows"][1:]]
    formats = list(dict.fromkeys(one.numbers for one in runs))
    frontier, many_methods = len(formats) > 1, len({one.method for one in runs}) > 1

    def kind(one: Combination) -> str:
        parts = [one.method] if many_methods or not frontier else []
        return ", ".join([*parts, one.numbers] if frontier else parts)

    def shape(line: Line) -> str:  # one for 2:4 + 16 and for the 2:4 + 0 of the methods without U·V
        return line.pattern if frontier else line.of.pattern

    kinds = {kind(one): one.numbers for one in runs}
    colours = {name: plt.get_cmap("tab20" if len(kinds) > 10 else "tab10")(i % 20) for i, name in enumerate(kinds)}
    shapes = {name: "osD^vPX*<>phd"[i % 13] for i, name in enumerate(dict.fromkeys(shape(line) for line in drawn))}
    dashes: dict[str, dict[str, Any]] = {
        name: {"linestyle": ("-", "--", ":", "-.")[i % 4] if frontier else "none"} for i, name in enumerate(formats)
    }
    means = [line.perplexity for line in drawn]
    limit = _RUINED * statistics.median(means) if frontier else math.inf
    edge = 1.05 * max(mean for mean in means if mean <= limit)
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
    for line in drawn:
        colour, ppl = colours[kind(line.of)], line.figures("perplexity")
        error = statistics.stdev(ppl) if len(ppl) > 1 and line.perplexity <= limit else None
        style: dict[str, Any] = {"marker": shapes[shape(line)], "color": colour, "linestyle": "none"}
        style["markerfacecolor"] = colour if line.of.matched else "none"
        megabytes = line.rows[0]["linear_bytes"] / 1e6
        for axes, xs in zip(panels, ([line.bits if frontier else megabytes], line.figures("cpu_seconds")), strict=True):
            if xs:
                at = statistics.mean(xs), min(line.perplexity, edge)
                axes.errorbar(*at, yerr=error, **style)
                if line.perplexity > limit:
                    axes.annotate(f"↑ {line.perplexity:.4g}", at, (6, -3), textcoords="offset points", fontsize=8)
        for row in line.official:
            if row["seconds"] is not None:
                panels[1].plot(row["seconds"], row["perplexity"], marker="x", color=colour, linestyle="none")
    if frontier:
        _draw_curves(panels[0], [line for line in drawn if line.perplexity <= limit], kind, colours, dashes)
    dense = record["rows"][0]["perplexity"]
    size = "bits a weight of the compressed linears" if frontier else "MB of the compressed linears"
    for axes, label in zip(panels, (size, "CPU seconds of the run"), strict=True):
        axes.axhline(dense, color="grey", linestyle="--", linewidth=1)
        axes.set_xlabel(label)
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    panels[0].annotate(f"dense {dense:.2f}", (0.01, dense), xycoords=("axes fraction", "data"), va="top")
    panels[0].set_ylabel(f"perplexity (↑: above {limit:.4g}, at the edge)" if max(means) > limit else "perplexity")
    panels[1].set_xscale("log")
    panels[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_minor_formatter("{x:g}")
    for axis in (panels[0].yaxis, panels[1].xaxis):  # 60, not 6 × 10¹
        axis.set_major_formatter("{x:g}")
    panels[1].xaxis.set_minor_formatter("")
    handles = [
        Line2D([], [], color=colours[name], marker="o", label=name, **dashes[numbers])
        for name, numbers in kinds.items()
    ]
    if frontier:
        handles.append(Line2D([], [], color="grey", linewidth=6, alpha=0.3, label="best at so many bits or fewer"))
    handles += [Line2D([], [], color="k", marker=s, linestyle="none", label=name) for name, s in shapes.items()]
    handles.append(Line2D([], [], color="k", marker="o", fillstyle="none", linestyle="none", label="not matched"))
    if any(line.official for line in drawn):
        handles.append(Line2D([], [], color="k", marker="x", linestyle="none", label="official code"))
    figure.legend(handles=handles, loc="outside right upper")
    figure.suptitle(f"{record['model']}: below and to the left is better")
    figure.savefig(to)
    plt.close(figure)


def _draw_curves(
    axes: "Axes",
    drawn: Sequence[Line],
    kind: Callable[[Combination], str],
    colours: Mapping[str, Any],
    dashes: Mapping[str, Mapping[str, Any]],
) -> None:
    """Join the lines of each kind, matched or not, by their bits; and along the best lines, in steps."""
    curves: dict[tuple[str, bool], list[Line]] = {}
    for line in sorted(drawn, key=lambda line: line.bits):
        curves.setdefault((kind(line.of), line.of.matched), []).append(line)
    for (name, _), curve in curves.items():
        style: dict[str, Any] = {"color": colours[name], "linewidth": 1, "alpha": 0.6, **dashes[curve[0].of.numbers]}
        axes.plot([line.bits for line in curve], [line.perplexity for line in curve], **style)
    best = best_of(drawn)
    bits, ppl = [line.bits for line in best], [line.perplexity for line in best]
    widest = max(line.bits for line in drawn)
    axes.step([*bits, widest], [*ppl, ppl[-1]], where="post", color="grey", linewidth=6, alpha=0.3, zorder=0)
