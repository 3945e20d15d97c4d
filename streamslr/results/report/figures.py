"""The plotly figures of the report: errors and matching; costs.py has time, memory and size."""

import math
import textwrap
from collections.abc import Sequence

from streamslr.config import format_bytes
from streamslr.results.inspect import short_name, totals
from streamslr.results.report.costs import draw_memory, draw_ranks, draw_sizes, draw_time, peak_memory
from streamslr.results.report.layout import (
    BLUE,
    GREY,
    MIN_LOG_VALUE,
    RED,
    Figure,
    block_axis,
    clipped_log10,
    escape_text,
    log_axis,
    make_layout,
    round_ticks,
)
from streamslr.run.journal import BlockRecord, JournalState, LinearRecord, MatchRecord

_ERROR_COLOURS = [[0, "#24476b"], [0.3, "#2f7fb5"], [0.55, "#9cc5c9"], [0.75, "#f0c869"], [1, "#c8442f"]]


def draw_figures(state: JournalState) -> dict[str, Figure]:
    """Return the figures that the run has data for, by the id of their HTML element."""
    if not state.blocks:
        return {}
    matched = [(block, match) for block in state.blocks if (match := block.whole_matching)]
    return {
        "errors": _draw_error_map(state.blocks),
        "block-errors": _draw_block_errors(state.blocks),
        **({"matching": _draw_matching(matched), "curves": _draw_curves(matched)} if matched else {}),
        **({"cosines": _draw_cosines(state.blocks)} if any(block.check for block in state.blocks) else {}),
        "time": draw_time(state),
        **({"ranks": draw_ranks(state)} if any(block.seconds_of_ranks for block in state.blocks) else {}),
        **{f"{device}-memory": draw_memory(state, device) for device in peak_memory(state)},
        "sizes": draw_sizes(state),
    }


def _draw_error_map(blocks: Sequence[BlockRecord]) -> Figure:
    """Draw a heat map: a row per kind of linear, a column per block; the first row is the mean of each block."""
    names = list(dict.fromkeys(short_name(linear.name, block) for block in blocks for linear in block.linears))
    cells: list[list[float | None]] = []
    hover: list[list[str]] = []
    for name in names:
        found = [next((a for a in block.linears if short_name(a.name, block) == name), None) for block in blocks]
        cells.append([None if linear is None else clipped_log10(linear.error) for linear in found])
        hover.append(["" if linear is None else _describe_linear(linear) for linear in found])
    means = [totals([block]) for block in blocks]
    cells.insert(0, [clipped_log10(mean["error"]) for mean in means])
    hover.insert(
        0,
        [
            f"<b>{escape_text(block.name)}</b>, mean of its {len(block.linears)} linears<br>"
            f"error {mean['error']:.3g}, pruning alone {mean['wanda_error']:.3g}"
            for block, mean in zip(blocks, means, strict=True)
        ],
    )
    shown = [value for row in cells for value in row if value is not None]
    ticks = round_ticks(min(shown), max(shown))
    gap = 2 if len(blocks) <= 40 else 1
    trace = {
        "type": "heatmap",
        "x": [block.index for block in blocks],
        "y": ["mean of block", *map(escape_text, names)],
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
    axes = {"xaxis": block_axis(blocks) | {"showline": False}, "yaxis": {"autorange": "reversed", "showgrid": False}}
    return {"data": [trace], "layout": make_layout(110 + 26 * len(cells), "block", "", **axes)}


def _describe_linear(linear: LinearRecord) -> str:
    """Return the text that the heat map shows on hover."""
    rows = [
        f"<b>{escape_text(linear.name)}</b>",
        f"error {linear.error:.3g}, pruning alone {linear.wanda_error:.3g}",
        f"{linear.shape[0]} × {linear.shape[1]}, {escape_text(linear.pattern)} + rank {linear.rank}",
        f"{linear.iterations} iterations, {format_bytes(linear.nbytes)} of {format_bytes(linear.dense_nbytes)}",
    ]
    for warning in linear.warnings:
        rows += [escape_text(line) for line in textwrap.wrap("! " + warning, 60)]
    return "<br>".join(rows)


def _draw_block_errors(blocks: Sequence[BlockRecord]) -> Figure:
    """Draw the mean error of each block, and that of pruning alone."""
    means = [totals([block]) for block in blocks]
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [block.index for block in blocks],
            "y": [max(mean[key], MIN_LOG_VALUE) for mean in means],
            "line": {"color": colour},
            "hovertemplate": "block %{x}: %{y:.3g}",
        }
        for name, key, colour in (("pruning alone", "wanda_error", GREY), ("S + U·V", "error", BLUE))
    ]
    axes = {
        "xaxis": block_axis(blocks),
        "yaxis": log_axis(mean[key] for mean in means for key in ("wanda_error", "error")),
    }
    return {"data": traces, "layout": make_layout(260, "block", "mean error", **axes)}


def _draw_matching(matched: Sequence[tuple[BlockRecord, MatchRecord]]) -> Figure:
    """Draw the loss of each block before and after matching, joined by a line."""
    lines_x: list[int | None] = []
    lines_y: list[float | None] = []
    for block, match in matched:
        lines_x += [block.index, block.index, None]
        lines_y += [match.loss_before, match.loss_after, None]
    before = [(block.index, match.loss_before) for block, match in matched]
    applied = [(block.index, match.loss_after) for block, match in matched if match.applied]
    refused = [(block.index, match.loss_after) for block, match in matched if not match.applied]
    size = 9 if len(matched) <= 40 else 6
    traces: list[Figure] = [
        {
            "x": lines_x,
            "y": lines_y,
            "mode": "lines",
            "line": {"color": GREY},
            "showlegend": False,
            "hoverinfo": "skip",
        },
        _marker_trace("before", before, {"color": GREY, "size": size}),
        _marker_trace("after", applied, {"color": BLUE, "size": size}),
    ]
    if refused:
        traces.append(_marker_trace("after, not applied", refused, {"color": RED, "size": size, "symbol": "x"}))
    every = {"type": "scatter", "hovertemplate": "block %{x}: %{y:.3g}"}
    axes = {"xaxis": block_axis([block for block, _ in matched]), "yaxis": log_axis(lines_y)}
    return {"data": [every | trace for trace in traces], "layout": make_layout(280, "block", "loss", **axes)}


def _draw_cosines(blocks: Sequence[BlockRecord]) -> Figure:
    """Draw the cosine between hidden states of both models behind each block."""
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [block.index for block in blocks],
        "y": [block.check.cosine if block.check else None for block in blocks],
        "line": {"color": BLUE},
        "hovertemplate": "block %{x}: %{y:.4f}<extra></extra>",
    }
    axes = {"xaxis": block_axis(blocks), "yaxis": {"tickformat": ".4~f"}}
    return {"data": [trace], "layout": make_layout(240, "block", "cosine", **axes)}


def _marker_trace(name: str, points: Sequence[tuple[int, float | None]], marker: Figure) -> Figure:
    return {"x": [x for x, _ in points], "y": [y for _, y in points], "name": name, "mode": "markers", "marker": marker}


def _draw_curves(matched: Sequence[tuple[BlockRecord, MatchRecord]]) -> Figure:
    """Draw the loss by epoch of each block, as a fraction of its first."""
    traces: list[Figure] = []
    last = max(1, matched[-1][0].index)
    for block, match in matched:
        first = match.curve[0] if match.curve else None
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"block {block.index}",
                "showlegend": False,
                "x": list(range(len(match.curve))),
                "y": [None if loss is None or not first else loss / first for loss in match.curve],
                "customdata": list(match.curve),
                "line": {"color": _depth_colour(block.index / last) if match.applied else RED, "width": 1.5},
                "hovertemplate": f"block {block.index}, epoch %{{x}}: loss %{{customdata:.3g}}<extra></extra>",
            }
        )
    if len(matched) > 1:
        traces.append(_depth_bar(last))
    epochs = max(len(match.curve) for _, match in matched)
    axes = {"xaxis": {"tickformat": "d", "dtick": math.ceil(epochs / 12)}, "yaxis": {"tickformat": ".0%"}}
    return {"data": traces, "layout": make_layout(300, "epoch", "loss relative to epoch 0", **axes)}


def _depth_bar(last: int) -> Figure:
    """Return a trace without points: it draws the colour bar of the block indices 0 to `last`."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [None],
        "y": [None],
        "marker": {
            "showscale": True,
            "colorscale": [[k / 8, _depth_colour(k / 8)] for k in range(9)],
            "cmin": 0,
            "cmax": last,
            "color": [0],
            "colorbar": {
                "title": {"text": "block"},
                "thickness": 10,
                "outlinewidth": 0,
                "tickformat": "d",
                "nticks": min(6, last + 1),
            },
        },
        "showlegend": False,
        "hoverinfo": "skip",
    }


def _depth_colour(depth: float) -> str:
    """Return a colour for a block at `depth`: blue at 0 (first), purple at 1/2, orange at 1 (last)."""
    stops = ((47, 127, 181), (150, 90, 170), (230, 140, 50))
    start, end = stops[:2] if depth < 0.5 else stops[1:]
    position = 2 * depth if depth < 0.5 else 2 * depth - 1
    return "rgb({}, {}, {})".format(*(round(a + position * (b - a)) for a, b in zip(start, end, strict=True)))
