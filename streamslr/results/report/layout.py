"""Parts that the figures share: colours, the plotly layout, axes of blocks and of logarithms."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from streamslr.printable import printable
from streamslr.run.journal import BlockRecord

Figure = dict[str, Any]
"""{"data": traces, "layout": …}, the arguments of Plotly.newPlot; or a part of one."""

GREY, BLUE, RED = "#a0a8b0", "#2f7fb5", "#d1495b"
"""Colours of what was there before compression, of the result, and of a warning."""

MIN_LOG_VALUE = 1e-12
"""Smallest value on a logarithmic axis; an error of 0 is drawn there."""


def escape_text(text: str) -> str:
    """Escape `text` for plotly, which reads all text as HTML but does not know &quot;; and what does not print."""
    return escape(printable(text), quote=False)


def make_layout(height: int, x: str = "", y: str = "", **more: Any) -> Figure:
    """Return the layout of a figure.

    Args:
        height: Height in CSS pixels.
        x: Title of the horizontal axis.
        y: Title of the vertical axis.
        more: Properties of plotly's layout; `xaxis` and `yaxis` are added to the axes.
    """
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


def block_axis(blocks: Sequence[BlockRecord]) -> Figure:
    """Return an axis with a whole number for every block, or for every 2nd, 5th, … of many."""
    ends = [blocks[0].index - 0.5, blocks[-1].index + 0.5]
    step = next((n for n in (1, 2, 5, 10, 20) if len(blocks) <= 10 * n), 50)
    return {"tickformat": "d", "dtick": step, "tickangle": 0, "range": ends}


def log_axis(values: Iterable[float | None]) -> Figure:
    """Return a logarithmic axis for `values`, labelled with plain numbers; plotly's own labels are not plain."""
    logs = [clipped_log10(value) for value in values if value is not None]
    ticks = round_ticks(min(logs) - 0.05, max(logs) + 0.05)
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:.3g}" for tick in ticks]}


def clipped_log10(value: float) -> float:
    """Return log10 of `value`, at least that of MIN_LOG_VALUE."""
    return math.log10(max(value, MIN_LOG_VALUE))


def round_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between 10^low and 10^high, from the coarsest series that has two or more there."""
    ticks: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), [tenths / 10 for tenths in range(10, 100)]):
        round_ones = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
        ticks = [tick for tick in round_ones if low <= math.log10(tick) <= high]
        if len(ticks) >= 2:
            break
    return ticks or [10**low]
