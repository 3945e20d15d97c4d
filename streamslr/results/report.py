"""One HTML page of a run, finished or not: errors, matching, time, memory and sizes, drawn from the journal alone."""

import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from streamslr.config import format_bytes
from streamslr.errors import InputError
from streamslr.io.shards import write_file
from streamslr.results.inspect import (
    describe_method,
    describe_specs,
    list_linears,
    list_warnings,
    read_run,
    short_name,
    sort_phases,
    totals,
)
from streamslr.run.journal import BlockRecord, JournalState, LinearRecord
from streamslr.run.progress import PHASES, format_duration

REPORT_FILE = "report.html"

Figure = dict[str, Any]  # {"data": traces, "layout": …}, as Plotly.newPlot takes them

_BEFORE, _AFTER, _WARN = "#a0a8b0", "#2f7fb5", "#d1495b"
_PHASE_COLOURS = dict(
    zip(
        PHASES,
        ("#5f9ea0", "#7d8790", "#a0a8b0", "#c3c9ce", "#4fa3d1", "#e09f3e", "#8e6bbf", "#3fa17a", "#7d8790"),
        strict=True,
    )
)
_PART_COLOURS = {"S": "#2f7fb5", "U·V": "#e09f3e", "dense linears": "#a0a8b0", "everything else": "#d3d8dc"}
_ERROR_COLOURS = [[0, "#24476b"], [0.3, "#2f7fb5"], [0.55, "#9cc5c9"], [0.75, "#f0c869"], [1, "#c8442f"]]
_LEGEND_SHARE = 0.005
"""Phases of a smaller share of the time are not in the legend; they are named on hover."""

_LEAST_ERROR = 1e-12
"""What an error of nothing shows as on a logarithmic scale."""


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a compressed folder, to `folder`/report.html where `out` is None; returns its path.

    Some 5 MB, nearly all of them plotly's JavaScript, so that the page opens anywhere without a network. Raises
    InputError when `folder` is no output folder, or `out` lies in none.
    """
    state = read_run(folder)
    out = out or folder / REPORT_FILE
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is no folder; make it, or give another --out")
    write_file(out, page(folder, state).encode())
    return out


def page(folder: Path, state: JournalState) -> str:
    """The page as HTML. All that comes from the run (names, warnings, settings) is escaped."""
    drawn = figures(state)
    # "</script>" in a name would end the element that holds it; JSON reads \u003c as "<" all the same
    data = json.dumps(drawn, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    method = describe_method(state)
    return Template(_PAGE).substitute(
        title=escape(f"{_model_name(folder, state)}, {method}"),
        status=escape(_status(state)),
        key_figures=_key_figures(state),
        sections="".join(_section(name, title, text, drawn) for name, title, text in _texts(state)),
        warnings=_warning_list(folder, state),
        settings=_settings(folder, state),
        plotly=get_plotlyjs(),
        figures=data,
    )


def figures(state: JournalState) -> dict[str, Figure]:
    """The figures that this run has data for, by the id of their element."""
    if not state.blocks:
        return {}
    matched = [block for block in state.blocks if block.matching]
    return {
        "errors": _error_map(state.blocks),
        "block-errors": _block_errors(state.blocks),
        **({"matching": _matching(matched), "curves": _curves(matched)} if matched else {}),
        "time": _time(state),
        **{f"{place}-memory": _memory(state, place) for place in _peaks(state)},
        "sizes": _sizes(state),
    }


# Words


def _model_name(folder: Path, state: JournalState) -> str:
    return state.model or folder.absolute().name


def _status(state: JournalState) -> str:
    if state.complete:
        return f"Finished: {state.blocks_total} block{'s' if state.blocks_total > 1 else ''}."
    return (
        f"Unfinished: {len(state.blocks)} of {state.blocks_total} blocks are done, and this page shows these. "
        "The same streamslr run line goes on."
    )


def _key_figures(state: JournalState) -> str:
    of_all = totals(state.blocks)
    if not of_all:
        return ""
    sizes = _bytes_of_parts(state)
    before = sizes["dense linears"] + sizes["everything else"]
    after = sizes["S"] + sizes["U·V"] + sizes["everything else"]
    dense_bits = 8 * of_all["dense_linear_bytes"] / sum(math.prod(linear.shape) for linear in list_linears(state.blocks))
    seconds = sum(reading["seconds"] for _, _, reading in _readings(state))
    found = sum(len(list_warnings(block)) for block in state.blocks)
    shown = [
        ("bits a weight", f"{of_all['bits_per_weight']:.2f}", f"linears of the blocks; dense {dense_bits:.0f}"),
        ("size", format_bytes(after), f"of {format_bytes(before)}, {after / before:.0%}"),
        ("mean error", f"{of_all['error']:.3g}", f"pruning alone {of_all['wanda_error']:.3g}"),
        ("time", format_duration(seconds), f"{seconds / len(state.blocks):.3g} s a block"),
        *(
            (f"{place} memory", format_bytes(peak), f"at most, {format_bytes(budget)} allowed" if budget else "at most")
            for place, (peak, budget) in _peaks(state).items()
        ),
        ("warnings", str(found), "see below" if found else "nothing out of the ordinary"),
    ]
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(note)}</dd></div>"
        for name, value, note in shown
    )


def _texts(state: JournalState) -> Iterable[tuple[tuple[str, ...], str, str]]:
    """(figures, title, what to look for) of each section."""
    yield (
        ("errors", "block-errors"),
        "Error of each linear",
        "The share of a linear's output on the calibration text that S + U·V misses, "
        "tr(R H Rᵀ) / tr(W H Wᵀ), as solved, before matching. Look for a row or a column that stands out: that "
        "kind of linear, or that block, is the hard one. Below, each block's mean beside what plain pruning "
        "(the same pattern without U·V, by Wanda's score) would have cost.",
    )
    if state.fingerprint.get("match"):
        yield (
            ("matching", "curves"),
            "Matching",
            "What leaves each block against what should, ‖f̂(X) − T‖² / ‖T‖², before and after its weights were "
            "refined together; it tends to grow with depth, because later blocks also carry what earlier ones lost. "
            "Then the loss by epoch as a share of the first: curves should fall and flatten; a red one did not fall, "
            "and its block was left as solved.",
        )
    else:
        yield (), "Matching", "The blocks of this run were not matched (--no-match)."
    before = {name: reading["seconds"] for name, reading in sort_phases(state.measured).items()}
    took = f" Before block 0: {', '.join(f'{name} {s:.3g} s' for name, s in before.items())}." if before else ""
    yield (
        ("time",),
        "Time by phase",
        "Blocks of one shape should take the same time; solve varies with how long the solver iterates. "
        f"Starting Python and whatever was interrupted is not in it.{took}",
    )
    yield (
        ("host-memory", "gpu-memory"),
        "Memory against the budget",
        "The highest reading of each phase (its width is the time it took), with the plan of that phase as a line. "
        "Peaks should stay under their plan, the plan under the budget, and a late block should need no more than "
        "an early one. A budget of several times what was needed is not drawn.",
    )
    yield (
        ("sizes",),
        "Size",
        "S is its kept values and where they stand, packed; everything else, embeddings, head, norms and biases, keeps "
        "its size." + ("" if state.complete else " Of the finished blocks and what is outside the blocks."),
    )


def _section(names: Sequence[str], title: str, text: str, drawn: dict[str, Figure]) -> str:
    plots = "".join(
        f'<div class="figure" id="{name}" style="height:{drawn[name]["layout"]["height"]}px"></div>'
        for name in names
        if name in drawn
    )
    if names and not plots:
        text = "No block is finished yet."
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{plots}</section>\n"


def _warning_list(folder: Path, state: JournalState) -> str:
    found = [warning for block in state.blocks for warning in list_warnings(block)]
    found += [f"{s.file} is missing from the folder" for s in state.shards if not (folder / s.file).is_file()]
    if not found:
        return "<p>None.</p>"
    items = "".join(f"<li>{escape(warning)}</li>" for warning in found)
    return f"<ul>{items}</ul>"


def _settings(folder: Path, state: JournalState) -> str:
    """Everything that decided the output."""
    fixed = dict(state.fingerprint)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):  # not written yet, or gone: `verify` says so
        config = {}
    architecture = ", ".join(config.get("architectures") or []) or config.get("model_type", "")
    windows = f"{fixed.pop('samples', '?')} windows of {fixed.pop('seq_len', '?')} tokens of {state.calibration}"
    matching = "no"
    if fixed.get("match"):
        matching = (
            f"{fixed['match_epochs']} epochs, {fixed['match_batch']} windows a step, rate {fixed['match_lr']}, "
            f"recovering {fixed['match_recover']:.0%} of what earlier blocks lost"
        )
    rows = {
        "model": " ".join(filter(None, (state.model, f"({architecture})" if architecture else ""))),
        "identity": fixed.pop("model", ""),  # hub:ID@commit, or a digest of the folder's headers
        "pattern of S": fixed.pop("pattern", ""),
        "rank of U·V": fixed.pop("rank", ""),
        "linears became": describe_specs(list_linears(state.blocks)) if len(state.allocation or ()) > 1 and state.blocks else "",
        "calibration": windows,
        "digest of its tokens": fixed.pop("tokens", ""),
        "matching": matching,
        "fine-tuned": "; ".join(
            f"{record.steps} steps of {record.batch} windows of {record.seq_len} tokens of {record.data}, rate "
            f"{record.lr:g}, held-out loss {record.loss_before:.4f} → {record.loss_after:.4f}"
            for record in state.finetuned
        ),
        "windows at a time": state.micro_batch,
        **{name: value for name, value in fixed.items() if not name.startswith("match")},
        **state.made_with,  # the device's own name instead of "cuda"
    }
    return "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in rows.items()
        if value not in ("", None)
    )


# Data


def _readings(state: JournalState) -> list[tuple[int | None, str, Any]]:
    """(block, phase, what was measured) in the order of the run; None: before block 0."""
    parts = [(None, state.measured), *((block.index, block.measured) for block in state.blocks)]
    return [(index, name, reading) for index, part in parts for name, reading in sort_phases(part).items()]


def _peaks(state: JournalState) -> dict[str, tuple[int, int]]:
    """Of the host, and of a GPU where one was used: (highest reading, budget or 0), in bytes."""
    readings = [reading for _, _, reading in _readings(state)]
    return {
        place: (
            max(reading.get(f"{place}_peak_bytes", 0) for reading in readings),
            max(reading.get(f"{place}_budget_bytes", 0) for reading in readings),
        )
        for place in ("host", "gpu")
        if any(f"{place}_peak_bytes" in reading for reading in readings)
    }


def _bytes_of_parts(state: JournalState) -> dict[str, int]:
    """Of the finished blocks and what is outside the blocks, in their shards."""
    linears = list_linears(state.blocks)
    low_rank = sum(
        linear.rank * sum(linear.shape) * linear.dense_nbytes // math.prod(linear.shape) for linear in linears
    )
    packed = sum(linear.nbytes for linear in linears)
    return {
        "S": packed - low_rank,
        "U·V": low_rank,
        "dense linears": sum(linear.dense_nbytes for linear in linears),
        "everything else": sum(shard.nbytes for shard in state.shards) - packed,
    }


# Figures


def _marked(text: str) -> str:
    """`text` for plotly, which takes all text for HTML but does not know &quot;."""
    return escape(text, quote=False)


def _layout(height: int, x: str = "", y: str = "", **more: Any) -> Figure:
    axis = {"fixedrange": True, "zeroline": False, "automargin": True}
    return {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "font": {"family": "inherit", "size": 13},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"bgcolor": "#22272c", "bordercolor": "#22272c", "font": {"color": "#fff"}, "align": "left"},
        "legend": {"orientation": "h", "traceorder": "normal", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "dragmode": False,
        "xaxis": axis | {"title": {"text": x, "font": {"size": 13}}, "showgrid": False} | more.pop("xaxis", {}),
        "yaxis": axis | {"title": {"text": y, "font": {"size": 13}}} | more.pop("yaxis", {}),
    } | more


def _block_axis(blocks: Sequence[BlockRecord]) -> Figure:
    ends = [blocks[0].index - 0.5, blocks[-1].index + 0.5]
    step = next((n for n in (1, 2, 5, 10, 20) if len(blocks) <= 10 * n), 50)
    return {"tickformat": "d", "dtick": step, "tickangle": 0, "range": ends}


def _error_map(blocks: Sequence[BlockRecord]) -> Figure:
    """A row a kind of linear, a column a block; the first row is the mean over a block's linears."""
    names = list(dict.fromkeys(short_name(linear, block) for block in blocks for linear in block.linears))
    cells: list[list[float | None]] = []
    hover: list[list[str]] = []
    for name in names:
        found = [next((a for a in block.linears if short_name(a, block) == name), None) for block in blocks]
        cells.append([None if linear is None else _log(linear.error) for linear in found])
        hover.append(["" if linear is None else _describe(linear) for linear in found])
    means = [totals([block]) for block in blocks]
    cells.insert(0, [_log(mean["error"]) for mean in means])
    hover.insert(
        0,
        [
            f"<b>{_marked(block.name)}</b>, mean of its {len(block.linears)} linears<br>"
            f"error {mean['error']:.3g}, pruning alone {mean['wanda_error']:.3g}"
            for block, mean in zip(blocks, means, strict=True)
        ],
    )
    shown = [value for row in cells for value in row if value is not None]
    ticks = _ticks(min(shown), max(shown))
    gap = 2 if len(blocks) <= 40 else 1
    trace = {
        "type": "heatmap",
        "x": [block.index for block in blocks],
        "y": ["mean of block", *map(_marked, names)],
        "z": cells,
        "hovertext": hover,
        "hoverinfo": "text",
        "colorscale": _ERROR_COLOURS,
        "xgap": gap,
        "ygap": gap,
        "colorbar": {
            "orientation": "h",
            "y": 1.0,
            "yanchor": "bottom",
            "thickness": 10,
            "outlinewidth": 0,
            "tickangle": 0,
            "tickvals": [math.log10(tick) for tick in ticks],
            "ticktext": [f"{tick:.3g}" for tick in ticks],
        },
    }
    axes = {"xaxis": _block_axis(blocks) | {"showline": False}, "yaxis": {"autorange": "reversed", "showgrid": False}}
    return {"data": [trace], "layout": _layout(110 + 26 * len(cells), "block", "", **axes)}


def _describe(linear: LinearRecord) -> str:
    """One linear, as the heat map says it on hover."""
    rows = [
        f"<b>{_marked(linear.name)}</b>",
        f"error {linear.error:.3g}, pruning alone {linear.wanda_error:.3g}",
        f"{linear.shape[0]} × {linear.shape[1]}, {_marked(linear.pattern)} + rank {linear.rank}",
        f"{linear.iterations} iterations, {format_bytes(linear.nbytes)} of {format_bytes(linear.dense_nbytes)}",
    ]
    for warning in linear.warnings:
        rows += [_marked(line) for line in textwrap.wrap("! " + warning, 60)]
    return "<br>".join(rows)


def _log(error: float) -> float:
    return math.log10(max(error, _LEAST_ERROR))


def _ticks(low: float, high: float) -> list[float]:
    """The roundest numbers of which two or more lie within 10^low to 10^high."""
    ticks: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), [tenths / 10 for tenths in range(10, 100)]):
        round_ones = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
        ticks = [tick for tick in round_ones if low <= math.log10(tick) <= high]
        if len(ticks) >= 2:
            break
    return ticks or [10**low]


def _block_errors(blocks: Sequence[BlockRecord]) -> Figure:
    means = [totals([block]) for block in blocks]
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [block.index for block in blocks],
            "y": [max(mean[key], _LEAST_ERROR) for mean in means],
            "line": {"color": colour},
            "hovertemplate": "block %{x}: %{y:.3g}",
        }
        for name, key, colour in (("pruning alone", "wanda_error", _BEFORE), ("S + U·V", "error", _AFTER))
    ]
    return {
        "data": traces,
        "layout": _layout(
            260,
            "block",
            "mean error",
            xaxis=_block_axis(blocks),
            yaxis=_log_axis(mean[key] for mean in means for key in ("wanda_error", "error")),
        ),
    }


def _log_axis(values: Iterable[float | None]) -> Figure:
    """Labelled with plain numbers, which plotly's own are not."""
    logs = [_log(value) for value in values if value is not None]
    ticks = _ticks(min(logs) - 0.05, max(logs) + 0.05)
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:.3g}" for tick in ticks]}


def _matching(blocks: Sequence[BlockRecord]) -> Figure:
    """The loss of each block before and after."""
    records = [(block, block.matching) for block in blocks if block.matching]
    lines_x: list[int | None] = []
    lines_y: list[float | None] = []
    for block, match in records:
        lines_x += [block.index, block.index, None]
        lines_y += [match.loss_before, match.loss_after, None]
    kept = [(block.index, match.loss_after) for block, match in records if match.applied]
    size = 9 if len(blocks) <= 40 else 6
    left = [(block.index, match.loss_after) for block, match in records if not match.applied]
    traces: list[Figure] = [
        {
            "x": lines_x,
            "y": lines_y,
            "mode": "lines",
            "line": {"color": _BEFORE},
            "showlegend": False,
            "hoverinfo": "skip",
        },
        {
            "x": [block.index for block, _ in records],
            "y": [match.loss_before for _, match in records],
            "name": "before",
            "mode": "markers",
            "marker": {"color": _BEFORE, "size": size},
        },
        {
            "x": [x for x, _ in kept],
            "y": [y for _, y in kept],
            "name": "after",
            "mode": "markers",
            "marker": {"color": _AFTER, "size": size},
        },
    ]
    if left:
        traces.append(
            {
                "x": [x for x, _ in left],
                "y": [y for _, y in left],
                "name": "after, not kept",
                "mode": "markers",
                "marker": {"color": _WARN, "size": size, "symbol": "x"},
            }
        )
    shared = {"type": "scatter", "hovertemplate": "block %{x}: %{y:.3g}"}
    return {
        "data": [shared | trace for trace in traces],
        "layout": _layout(280, "block", "loss", xaxis=_block_axis(blocks), yaxis=_log_axis(lines_y)),
    }


def _curves(blocks: Sequence[BlockRecord]) -> Figure:
    """Loss by epoch, each block's relative to its first."""
    traces: list[Figure] = []
    last = max(1, blocks[-1].index)
    for block in blocks:
        curve, kept = (block.matching.curve, block.matching.applied) if block.matching else ((), False)
        first = curve[0] if curve else None
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"block {block.index}",
                "showlegend": False,
                "x": list(range(len(curve))),
                "y": [None if loss is None or not first else loss / first for loss in curve],
                "customdata": list(curve),
                "line": {"color": _depth_colour(block.index / last) if kept else _WARN, "width": 1.5},
                "hovertemplate": f"block {block.index}, epoch %{{x}}: loss %{{customdata:.3g}}<extra></extra>",
            }
        )
    scale = {
        "showscale": True,
        "colorscale": [[k / 8, _depth_colour(k / 8)] for k in range(9)],
        "cmin": 0,
        "cmax": last,
    }
    bar = {"title": {"text": "block"}, "thickness": 10, "outlinewidth": 0, "tickformat": "d", "nticks": 6}
    if len(blocks) > 1:  # a trace of nothing, for its colour bar
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [None],
                "y": [None],
                "marker": scale | {"color": [0], "colorbar": bar},
                "showlegend": False,
                "hoverinfo": "skip",
            }
        )
    epochs = max(len(block.matching.curve) for block in blocks if block.matching)
    axes = {"xaxis": {"tickformat": "d", "dtick": math.ceil(epochs / 12)}, "yaxis": {"tickformat": ".0%"}}
    return {"data": traces, "layout": _layout(300, "epoch", "loss, of the first", **axes)}


def _depth_colour(share: float) -> str:
    """From the first block's blue through purple to the last one's orange."""
    stops = ((47, 127, 181), (150, 90, 170), (230, 140, 50))
    first, then = stops[:2] if share < 0.5 else stops[1:]
    part = 2 * share if share < 0.5 else 2 * share - 1
    return "rgb({}, {}, {})".format(*(round(a + part * (b - a)) for a, b in zip(first, then, strict=True)))


def _time(state: JournalState) -> Figure:
    whole = sum(reading["seconds"] for _, _, reading in _readings(state)) or 1.0
    unit, name = (1, "seconds") if whole / len(state.blocks) < 300 else (60, "minutes")
    traces = []
    for phase in dict.fromkeys(phase for index, phase, _ in _readings(state) if index is not None):
        seconds = [block.measured.get(phase, {}).get("seconds", 0.0) for block in state.blocks]
        traces.append(
            {
                "type": "bar",
                "name": f"{_marked(phase)} {sum(seconds) / whole:.0%}",
                "showlegend": sum(seconds) / whole >= _LEGEND_SHARE,
                "x": [block.index for block in state.blocks],
                "y": [s / unit for s in seconds],
                "marker": {"color": _PHASE_COLOURS.get(phase, _BEFORE)},
                "hovertemplate": f"block %{{x}}, {_marked(phase)}: %{{y:.3g}} {name}<extra></extra>",
            }
        )
    layout = _layout(300, "block", name, xaxis=_block_axis(state.blocks), barmode="stack", bargap=0.15)
    return {"data": traces, "layout": layout}


def _memory(state: JournalState, place: str) -> Figure:
    """Peak of each phase over the run's time, with plan and budget; place: host or gpu."""
    readings = [(i, phase, r) for i, phase, r in _readings(state) if f"{place}_peak_bytes" in r]
    whole = sum(r["seconds"] for _, _, r in readings)
    divisor, unit = (1, "seconds") if whole < 300 else (60, "minutes") if whole < 3 * 3600 else (3600, "hours")
    most = max(r[f"{place}_peak_bytes"] for _, _, r in readings)
    scale, size = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    bars: dict[str, Figure] = {}
    planned: dict[str, list[float | None]] = {"x": [], "y": []}
    budgets: dict[str, list[float | None]] = {"x": [], "y": []}
    start = 0.0
    for index, phase, r in readings:
        width = r["seconds"] / divisor
        bar = bars.setdefault(
            phase,
            {
                "type": "bar",
                "name": _marked(phase),
                "x": [],
                "y": [],
                "width": [],
                "offset": 0,
                "hovertext": [],
                "hoverinfo": "text",
                "marker": {"color": _PHASE_COLOURS.get(phase, _BEFORE), "line": {"width": 0}},
            },
        )
        peak, plan, budget = (r.get(f"{place}_{what}_bytes") for what in ("peak", "planned", "budget"))
        bar["x"].append(start)
        bar["y"].append(peak / scale)
        bar["width"].append(width)
        where = "before block 0" if index is None else f"block {index}"
        bar["hovertext"].append(
            f"{where}, {_marked(phase)}: {format_bytes(peak)}" + (f", planned {format_bytes(plan)}" if plan else "")
        )
        for line, value in ((planned, plan), (budgets, budget)):
            line["x"] += [start, start + width]
            line["y"] += [value and value / scale] * 2
        start += width
    for bar in bars.values():
        bar["showlegend"] = sum(bar["width"]) >= _LEGEND_SHARE * start
    lines = []
    # a budget far above what was needed would flatten all else: the head of the page says it
    top = max([most / scale, *filter(None, planned["y"])])
    for name, line, colour, dash in (("planned", planned, "#7d8790", "solid"), ("budget", budgets, _WARN, "dash")):
        known = [value for value in line["y"] if value is not None]
        if known and max(known) < 4 * top:
            style = {"color": colour, "width": 1.5, "dash": dash}
            lines.append({"type": "scatter", "mode": "lines", "name": name, **line, "line": style, "hoverinfo": "skip"})
    layout = _layout(320, unit, f"{place}, {size}", bargap=0)
    return {"data": [*bars.values(), *lines], "layout": layout}


def _sizes(state: JournalState) -> Figure:
    """Two bars: as it was, as it is."""
    parts = _bytes_of_parts(state)
    before = parts["dense linears"] + parts["everything else"]
    scale, unit = (1e9, "GB") if before >= 1e9 else (1e6, "MB")
    rows = {"dense linears": ["before"], "S": ["after"], "U·V": ["after"], "everything else": ["before", "after"]}
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": where,
            "x": [parts[name] / scale] * len(where),
            "customdata": [format_bytes(parts[name])] * len(where),
            "text": [format_bytes(parts[name]) if parts[name] > 0.1 * before else ""] * len(where),
            "textposition": "inside",
            "textangle": 0,
            "insidetextanchor": "middle",
            "marker": {"color": _PART_COLOURS[name]},
            "hovertemplate": f"{name}: %{{customdata}}<extra></extra>",
        }
        for name, where in rows.items()
        if parts[name]
    ]
    axes = {"yaxis": {"categoryarray": ["after", "before"], "categoryorder": "array"}}
    return {"data": traces, "layout": _layout(210, unit, "", barmode="stack", bargap=0.25, **axes)}


# No request leaves the page: its own policy forbids every one. Colours of text and lines in figures follow the page's,
# so that light, dark and print need no second drawing.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>
:root { --ink: #1d2226; --soft: #5d6770; --line: #dfe3e6; --page: #fdfdfc }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7e9; --soft: #9aa4ac; --line: #353b41; --page: #16191c }
}
@media print { :root { --ink: #000; --soft: #444; --line: #ccc; --page: #fff } section { break-inside: avoid } }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 56rem; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .3rem }
p { margin: .3rem 0 .8rem; color: var(--soft); max-width: 44rem }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.6rem, 1fr)); gap: 1rem; margin: 1.5rem 0 0;
  padding: 1rem 0; border-block: 1px solid var(--line) }
dt, dd { margin: 0; font-size: .8rem; line-height: 1.35; color: var(--soft) }
dt + dd { font-size: 1.15rem; white-space: nowrap; color: var(--ink) }
table { border-collapse: collapse; font-size: .85rem; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: normal; color: var(--soft); white-space: nowrap }
td, li { overflow-wrap: anywhere }
ul { font-size: .9rem; padding-left: 1.2rem }
.figure { margin: .5rem 0 1rem; font-family: inherit }
.figure text:not(.bartext):not(.hovertext text) { fill: var(--ink) !important }
.figure .hoverlayer text, .figure .hoverlayer tspan { fill: #fff !important }
.figure .gridlayer path { stroke: var(--line) !important }
</style>
</head>
<body>
<h1>$title</h1>
<p>Every linear weight as W ≈ S + U·V, S sparse, U·V of low rank. $status</p>
<noscript><p>The figures need JavaScript; all of it is in this page.</p></noscript>
<dl>$key_figures</dl>
$sections
<section><h2>Warnings and fallbacks</h2>$warnings</section>
<section><h2>What was done, and with what</h2><table>$settings</table></section>
<script>$plotly</script>
<script type="application/json" id="data">$figures</script>
<script>
const figures = JSON.parse(document.getElementById("data").textContent);
for (const [id, figure] of Object.entries(figures))
  Plotly.newPlot(id, figure.data, figure.layout, {displayModeBar: false, responsive: true});
</script>
</body>
</html>
"""
