"""The report as an HTML page: the template page.html, filled from the journal of a run."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from streamslr.config import format_bytes
from streamslr.errors import InputError
from streamslr.io.durable import write_file
from streamslr.outside import parse_loose_json, read_bounded
from streamslr.printable import printable
from streamslr.results.inspect import (
    REPORT_FILE,
    describe_check,
    describe_method,
    describe_specs,
    list_dense,
    list_early_retries,
    list_linears,
    list_suspicions,
    list_warnings,
    read_run,
    sort_phases,
    totals,
)
from streamslr.results.report.costs import bytes_by_part, list_readings, peak_memory
from streamslr.results.report.figures import draw_figures
from streamslr.run.journal import JournalState
from streamslr.run.progress import format_duration
from streamslr.spec.values import INT8, STORED


@dataclass(frozen=True)
class KeyFigure:
    """One number at the head of the page, with a note below it."""

    name: str
    value: str
    note: str


class _Config(msgspec.Struct):
    """Entries of config.json that the page shows."""

    architectures: list[str] | None = None
    model_type: str = ""


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a compressed folder and return its path.

    The page has some 5 MB, nearly all of them plotly's JavaScript, so that it opens anywhere without a network.

    Args:
        folder: A compressed folder, finished or not.
        out: HTML file to write; None stands for `folder`/report.html.

    Raises:
        InputError: `folder` is no output folder, or the folder of `out` does not exist.
    """
    state = read_run(folder)
    out = out or folder / REPORT_FILE
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is no folder; make it, or give another --out")
    write_file(out, render_page(folder, state).encode())
    return out


def render_page(folder: Path, state: JournalState) -> str:
    """Return the page as HTML, with everything that comes from the run escaped.

    Args:
        folder: The compressed folder, for its config.json and to see which shards are there.
        state: Its journal.
    """
    start_phases = [f"{phase} {m['seconds']:.3g} s" for phase, m in sort_phases(state.measured).items()]
    return _load_template().render(
        title=f"{state.model or folder.absolute().name}, {describe_method(state)}",
        state=state,
        key_figures=_list_key_figures(state) if state.blocks else [],
        start_phases=", ".join(start_phases),
        check=describe_check(state),
        warnings=_list_all_warnings(folder, state),
        settings=_list_settings(folder, state),
        figures=draw_figures(state),
        plotly=get_plotlyjs(),
    )


def _load_template() -> Template:
    environment = Environment(
        loader=PackageLoader("streamslr.results.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,  # not Markup, which is ours
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The filter tojson escapes <, >, & and ', so no name can end the script element that holds the figures.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    return environment.get_template("page.html")


def _list_key_figures(state: JournalState) -> list[KeyFigure]:
    of_all = totals(state.blocks)
    sizes = bytes_by_part(state)
    before = sizes["dense linears"] + sizes["everything else"]
    after = sizes["S"] + sizes["U·V"] + sizes["everything else"]
    weights = sum(math.prod(linear.shape) for linear in list_linears(state.blocks))
    dense_bits = 8 * of_all["dense_linear_bytes"] / weights
    seconds = sum(reading.seconds for reading in list_readings(state))
    found = sum(len(list_warnings(block)) for block in state.blocks)
    found += len(list_early_retries(state)) + len(list_suspicions(state))
    return [
        KeyFigure(
            "bits per weight", f"{of_all['bits_per_weight']:.2f}", f"linears of the blocks; dense {dense_bits:.0f}"
        ),
        KeyFigure("size", format_bytes(after), f"of {format_bytes(before)}, {after / before:.0%}"),
        KeyFigure("mean error", f"{of_all['error']:.3g}", f"pruning alone {of_all['wanda_error']:.3g}"),
        *_list_quality(state),
        KeyFigure("time", format_duration(seconds), f"{seconds / len(state.blocks):.3g} s per block"),
        *(
            KeyFigure(
                f"{device} memory",
                format_bytes(memory.peak),
                f"at most, {format_bytes(memory.budget)} allowed" if memory.budget else "at most",
            )
            for device, memory in peak_memory(state).items()
        ),
        KeyFigure("warnings", str(found), "see below" if found else "nothing unusual"),
    ]


def _list_quality(state: JournalState) -> list[KeyFigure]:
    """Return the perplexity on the check windows, if the run has been checked."""
    if state.quality is None:
        return []
    dense, compressed = (
        "not finite" if figure is None else f"{figure:.4g}"
        for figure in (state.quality.perplexity_dense, state.quality.perplexity)
    )
    return [KeyFigure("perplexity", compressed, f"dense {dense}, on {state.quality.windows} check windows")]


def _list_all_warnings(folder: Path, state: JournalState) -> list[str]:
    missing = [shard.file for shard in state.shards if not (folder / shard.file).is_file()]
    return [
        *list_suspicions(state),
        *list_early_retries(state),
        *(warning for block in state.blocks for warning in list_warnings(block)),
        *(f"{file} is missing from the folder" for file in missing),
    ]


def _list_settings(folder: Path, state: JournalState) -> dict[str, Any]:
    """Return everything that decided the output, by the name that the page shows."""
    fixed = dict(state.fingerprint)
    windows = f"{fixed.pop('samples', '?')} windows of {fixed.pop('seq_len', '?')} tokens of {state.calibration}"
    fixed.pop("bos", None)  # "auto" says less than what it gave
    windows += ", each begins with BOS" if state.bos else ""
    matching = "no"
    if fixed.get("match"):
        matching = (
            f"{fixed['match_epochs']} epochs, {fixed['match_batch']} windows per step, learning rate "
            f"{fixed['match_lr']}, recovers {fixed['match_recover']:.0%} of the error of earlier blocks"
        )
    if state.finetuned and fixed.get("low_rank_values") == INT8:  # numbers since then
        fixed["low_rank_values"] = STORED
    differing = len(state.allocation or ()) > 1 and state.blocks
    rows = {
        "model": " ".join(filter(None, (state.model, _read_architecture(folder)))),
        "identity": fixed.pop("model", ""),  # hub:ID@commit, or a digest of the folder's headers
        "pattern of S": fixed.pop("pattern", ""),
        "rank of U·V": fixed.pop("rank", ""),
        "patterns and ranks": describe_specs(list_linears(state.blocks)) if differing else "",
        "linears that stay dense": "; ".join(list_dense(state)),
        "calibration": windows,
        "sha256 of its tokens": fixed.pop("tokens", ""),
        "matching": matching,
        "fine-tuned": "; ".join(
            f"{record.steps} steps of {record.batch} windows of {record.seq_len} tokens of {record.data}, learning "
            f"rate {record.lr:g}, held-out loss {record.loss_before:.4f} → {record.loss_after:.4f}"
            for record in state.finetuned
        ),
        "windows per micro-batch": state.micro_batch,
        **{name: value for name, value in fixed.items() if not name.startswith("match")},
        **state.made_with,  # names the device's model where the fingerprint says cuda
    }
    return {name: value for name, value in rows.items() if value not in ("", None)}


def _read_architecture(folder: Path) -> str:
    """Return the architecture of config.json in brackets; "" where the file is missing or damaged."""
    try:
        config = msgspec.convert(parse_loose_json(read_bounded(folder / "config.json")), _Config)
    except (InputError, ValueError, msgspec.MsgspecError):  # `verify` reports it
        return ""
    architecture = ", ".join(config.architectures or ()) or config.model_type
    return f"({architecture})" if architecture else ""
