"""Time, memory and size of a run: the numbers from the journal, and their figures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamslr.config import format_bytes
from streamslr.io.packed_layout import low_rank_bytes
from streamslr.results.inspect import list_linears, sort_phases
from streamslr.results.report.layout import BLUE, GREY, RED, Figure, block_axis, escape_text, make_layout
from streamslr.run.journal import JournalState
from streamslr.run.progress import LATE, PHASES, gpu_taken_bytes
from streamslr.spec.values import parse_low_rank_values

_PHASE_COLOURS = dict(
    zip(
        PHASES,
        (
            "#5f9ea0",
            "#7d8790",
            "#a0a8b0",
            "#c3c9ce",
            "#4fa3d1",
            "#e09f3e",
            "#8e6bbf",
            "#3fa17a",
            "#b0c4b1",
            "#7d8790",
            "#a0a8b0",
        ),
        strict=True,
    )
)
_PART_COLOURS = {"S": BLUE, "U·V": "#e09f3e", "dense linears": GREY, "everything else": "#d3d8dc"}

_LEGEND_FRACTION = 0.005
"""Smallest fraction of the time with which a phase is in the legend; shorter phases are named on hover."""

_MOST_RANKS_IN_LEGEND = 16
"""Most ranks that the legend names; more are named on hover."""

_DRAWN_BUDGET = 4
"""Largest budget that is drawn, in units of the highest peak or plan; a larger one would flatten everything else."""


@dataclass(frozen=True)
class Reading:
    """Measurements of one phase of one block."""

    block: int | None
    """Index of the block; None for the phases before block 0, and behind the last block."""
    phase: str
    measured: Mapping[str, Any]
    """seconds, {host|gpu}_{peak|planned|budget}_bytes."""

    @property
    def seconds(self) -> float:
        return float(self.measured["seconds"])


@dataclass(frozen=True)
class PeakMemory:
    """Highest reading of a run and its budget, in bytes; the budget is 0 where there was none."""

    peak: int
    budget: int


def list_readings(state: JournalState) -> list[Reading]:
    """Return the readings of every phase, in the order of the run."""
    late = {name: measured for name, measured in state.measured.items() if name in LATE}
    early = {name: measured for name, measured in state.measured.items() if name not in LATE}
    parts = [(None, early), *((block.index, block.measured) for block in state.blocks), (None, late)]
    return [Reading(index, phase, reading) for index, part in parts for phase, reading in sort_phases(part).items()]


def peak_memory(state: JournalState) -> dict[str, PeakMemory]:
    """Return the peak memory of "host" and, where a GPU was used, of "gpu"."""
    readings = [reading.measured for reading in list_readings(state)]
    return {
        device: PeakMemory(
            peak=max(_taken_bytes(reading, device) for reading in readings if f"{device}_peak_bytes" in reading),
            budget=max(reading.get(f"{device}_budget_bytes", 0) for reading in readings),
        )
        for device in ("host", "gpu")
        if any(f"{device}_peak_bytes" in reading for reading in readings)
    }


def _taken_bytes(measured: Mapping[str, Any], device: str) -> int:
    """Return the peak of a phase as its budget counts it."""
    return gpu_taken_bytes(measured) if device == "gpu" else int(measured["host_peak_bytes"])


def bytes_by_part(state: JournalState) -> dict[str, int]:
    """Return the bytes of S, U·V, the dense linears and everything else.

    Counts the shards of the finished blocks and of the tensors outside the blocks.
    """
    linears = list_linears(state.blocks)
    low_rank = sum(
        low_rank_bytes(
            linear.shape,
            linear.rank,
            linear.dense_nbytes // math.prod(linear.shape),
            parse_low_rank_values(linear.low_rank_values),
        )
        for linear in linears
    )
    packed = sum(linear.nbytes for linear in linears)
    return {
        "S": packed - low_rank,
        "U·V": low_rank,
        "dense linears": sum(linear.dense_nbytes for linear in linears),
        "everything else": sum(shard.nbytes for shard in state.shards) - packed,
    }


def draw_time(state: JournalState) -> Figure:
    """Draw the time of each phase, a stacked bar per block."""
    readings = list_readings(state)
    whole = sum(reading.seconds for reading in readings) or 1.0
    divisor, unit = (1, "seconds") if whole / len(state.blocks) < 300 else (60, "minutes")
    traces = []
    for phase in dict.fromkeys(reading.phase for reading in readings if reading.block is not None):
        seconds = [block.measured[phase]["seconds"] if phase in block.measured else 0.0 for block in state.blocks]
        traces.append(
            {
                "type": "bar",
                "name": f"{escape_text(phase)} {sum(seconds) / whole:.0%}",
                "showlegend": sum(seconds) / whole >= _LEGEND_FRACTION,
                "x": [block.index for block in state.blocks],
                "y": [s / divisor for s in seconds],
                "marker": {"color": _PHASE_COLOURS.get(phase, GREY)},
                "hovertemplate": f"block %{{x}}, {escape_text(phase)}: %{{y:.3g}} {unit}<extra></extra>",
            }
        )
    layout = make_layout(300, "block", unit, xaxis=block_axis(state.blocks), barmode="stack", bargap=0.15)
    return {"data": traces, "layout": layout}


def draw_ranks(state: JournalState) -> Figure:
    """Draw the seconds that each rank worked on each block that ranks shared out, a line per rank."""
    worked = [block.seconds_of_ranks for block in state.blocks]
    world = max(map(len, worked))
    divisor, unit = (1, "seconds") if max(map(max, filter(None, worked))) < 300 else (60, "minutes")
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": f"rank {rank}",
            "showlegend": world <= _MOST_RANKS_IN_LEGEND,
            "x": [block.index for block in state.blocks],
            "y": [seconds[rank] / divisor if rank < len(seconds) else None for seconds in worked],
            "line": {"width": 1.5},
            "hovertemplate": f"block %{{x}}, rank {rank}: %{{y:.3g}} {unit}<extra></extra>",
        }
        for rank in range(world)
    ]
    layout = make_layout(240, "block", unit, xaxis=block_axis(state.blocks))
    layout["yaxis"]["rangemode"] = "tozero"
    return {"data": traces, "layout": layout}


def draw_memory(state: JournalState, device: str) -> Figure:
    """Draw the peak of each phase over the time of the run, with plan and budget as lines.

    Args:
        state: The journal.
        device: "host" or "gpu".
    """
    readings = [reading for reading in list_readings(state) if f"{device}_peak_bytes" in reading.measured]
    whole = sum(reading.seconds for reading in readings)
    divisor, unit = (1, "seconds") if whole < 300 else (60, "minutes") if whole < 3 * 3600 else (3600, "hours")
    highest = max(reading.measured[f"{device}_peak_bytes"] for reading in readings)
    scale, size = (1e9, "GB") if highest >= 1e9 else (1e6, "MB")
    bars: dict[str, Figure] = {}
    planned: dict[str, list[float | None]] = {"x": [], "y": []}
    budgets: dict[str, list[float | None]] = {"x": [], "y": []}
    start = 0.0
    for reading in readings:
        width = reading.seconds / divisor
        bar = bars.setdefault(reading.phase, _empty_bar(reading.phase))
        peak = reading.measured[f"{device}_peak_bytes"]
        plan, budget = (reading.measured.get(f"{device}_{kind}_bytes") for kind in ("planned", "budget"))
        reserved = reading.measured.get(f"{device}_reserved_bytes")
        bar["x"].append(start)
        bar["y"].append(peak / scale)
        bar["width"].append(width)
        block = "before block 0" if reading.block is None else f"block {reading.block}"
        bar["hovertext"].append(
            f"{block}, {escape_text(reading.phase)}: {format_bytes(peak)}"
            + (f", planned {format_bytes(plan)}" if plan else "")
            + (f", {format_bytes(reserved)} reserved by torch" if reserved else "")
        )
        for line, value in ((planned, plan), (budgets, budget)):
            line["x"] += [start, start + width]
            line["y"] += [value and value / scale] * 2
        start += width
    for bar in bars.values():
        bar["showlegend"] = sum(bar["width"]) >= _LEGEND_FRACTION * start
    lines = []
    top = max([highest / scale, *filter(None, planned["y"])])
    for name, line, colour, dash in (("planned", planned, "#7d8790", "solid"), ("budget", budgets, RED, "dash")):
        known = [value for value in line["y"] if value is not None]
        if known and max(known) < _DRAWN_BUDGET * top:
            style = {"color": colour, "width": 1.5, "dash": dash}
            lines.append({"type": "scatter", "mode": "lines", "name": name, **line, "line": style, "hoverinfo": "skip"})
    return {"data": [*bars.values(), *lines], "layout": make_layout(320, unit, f"{device}, {size}", bargap=0)}


def _empty_bar(phase: str) -> Figure:
    return {
        "type": "bar",
        "name": escape_text(phase),
        "x": [],
        "y": [],
        "width": [],
        "offset": 0,
        "hovertext": [],
        "hoverinfo": "text",
        "marker": {"color": _PHASE_COLOURS.get(phase, GREY), "line": {"width": 0}},
    }


def draw_sizes(state: JournalState) -> Figure:
    """Draw the bytes of the model before and after, a bar each."""
    parts = bytes_by_part(state)
    before = parts["dense linears"] + parts["everything else"]
    scale, unit = (1e9, "GB") if before >= 1e9 else (1e6, "MB")
    bars = {"dense linears": ["before"], "S": ["after"], "U·V": ["after"], "everything else": ["before", "after"]}
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": rows,
            "x": [parts[name] / scale] * len(rows),
            "customdata": [format_bytes(parts[name])] * len(rows),
            "text": [format_bytes(parts[name]) if parts[name] > 0.1 * before else ""] * len(rows),
            "textposition": "inside",
            "textangle": 0,
            "insidetextanchor": "middle",
            "marker": {"color": _PART_COLOURS[name]},
            "hovertemplate": f"{name}: %{{customdata}}<extra></extra>",
        }
        for name, rows in bars.items()
        if parts[name]
    ]
    axes = {"yaxis": {"categoryarray": ["after", "before"], "categoryorder": "array"}}
    return {"data": traces, "layout": make_layout(210, unit, "", barmode="stack", bargap=0.25, **axes)}
