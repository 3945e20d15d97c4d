"""The journal of a compressed folder as tables for people and as JSON for programs."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from streamslr.config import format_bytes
from streamslr.errors import InputError
from streamslr.io.durable import PARTIAL_SUFFIX
from streamslr.run.journal import JOURNAL_FILE, BlockRecord, JournalState, LinearRecord, Retries, in_kinds, read_journal
from streamslr.run.progress import PHASES, gpu_taken_bytes
from streamslr.run.quality import describe_quality
from streamslr.spec.allocation import LinearSpec, in_words
from streamslr.spec.pattern import parse_pattern
from streamslr.spec.values import INT8, STORED, parse_low_rank_values, parse_values

T = TypeVar("T")

REPORT_FILE = "report.html"
"""Name of the report in a compressed folder. `verify` allows it there."""


def read_run(folder: Path) -> JournalState:
    """Return the journal of a compressed folder, finished or not. Raise InputError when there is none."""
    state = read_journal(folder)
    if state is None and (folder / f"{JOURNAL_FILE}{PARTIAL_SUFFIX}").exists():
        raise InputError(f"{folder}: a run was stopped here before it began; the same `streamslr run` line begins it")
    if state is None:
        raise InputError(f"{folder} holds no {JOURNAL_FILE}: it is not an output folder of streamslr")
    return state


def get_block(state: JournalState, index: int) -> BlockRecord:
    """Return the record of block `index`, counted from 0. Raise InputError when the block is not finished."""
    if not 0 <= index < len(state.blocks):
        raise InputError(
            f"block {index} is not there: {len(state.blocks)} of {state.blocks_total} blocks are done, counted from 0"
        )
    return state.blocks[index]


def get_allocation(state: JournalState) -> dict[str, Any]:
    """Return pattern and rank of each linear, as --allocation reads them.

    Raises:
        InputError: OWL's survey, which decides them, is not done yet.
    """
    if state.allocation is None:
        raise InputError(
            "patterns and ranks are not known yet, because OWL's survey of the blocks is not done; "
            "the same `streamslr run` line continues it"
        )
    return dict(state.allocation)


# The parts of a record


def list_linears(blocks: Iterable[BlockRecord]) -> list[LinearRecord]:
    """Return the linears of some blocks, in order."""
    return [linear for block in blocks for linear in block.linears]


def list_warnings(block: BlockRecord) -> list[str]:
    """Return the warnings of a block: those of its linears, phases tried again, a matching that was not applied."""
    found = [warning for linear in block.linears for warning in linear.warnings]
    found += _list_retries(block.name, block.retries)
    for matching in (block.matching_off_grid, block.matching):
        if matching and matching.loss_before and not matching.applied:
            found.append(f"matching did not lower the loss of {block.name}; its weights stay as they were before")
    return found


def list_suspicions(state: JournalState) -> list[str]:
    """Return the reason why the result is suspect, if it is."""
    suspect = state.quality is not None and state.quality.verdict == "suspect"
    return [f"the result is suspect: {state.quality.reason}"] if state.quality and suspect else []


def list_early_retries(state: JournalState) -> list[str]:
    """Return the phases before block 0 and behind the last block that were tried again, and with what."""
    return _list_retries("beside the blocks", state.retries)


def _list_retries(where: str, retries: Retries) -> list[str]:
    return [f"{where}, {phase}: {sentence}" for phase, found in retries.items() for sentence in found]


def list_dense(state: JournalState) -> tuple[str, ...]:
    """Return the linears that had to stay dense, and why, in words: those at the same place of all blocks together."""
    return in_kinds(block.dense for block in state.blocks)


def short_name(linear: str, block: BlockRecord) -> str:
    """Return a linear's name within its block, like self_attn.q_proj."""
    return linear.partition(f".{block.index}.")[2] or linear


def sort_phases(measured: Mapping[str, T]) -> dict[str, T]:
    """Return what was measured of each phase, in the order of a run; the journal sorts phases by name."""
    order = {name: position for position, name in enumerate(PHASES)}
    return dict(sorted(measured.items(), key=lambda item: order.get(item[0], len(order))))


def describe_method(state: JournalState) -> str:
    """Return the method and the settings of the linears: "3basil at 2:4 + rank 64, OWL ±0.08"."""
    settings = state.fingerprint
    sparse = settings["pattern"] or f"compression {settings['compression']}"
    ratio = settings.get("rank_ratio")
    low_rank = f"rank {settings['rank']}" if ratio is None else f"rank ratio {ratio:g}"
    values = settings.get("values", STORED)
    if values != STORED:
        sparse += f" {values}" + (" rounded to the nearest" if settings["rounding"] == "nearest" else "")
    factors = settings.get("low_rank_values", STORED)
    if factors != STORED and not (factors == INT8 and state.finetuned):  # fine-tuning makes numbers of codes
        low_rank += f" in {factors}"
    parts = [f"{settings['method']} at {sparse} + {low_rank}"]
    if settings.get("owl") is not None:
        parts.append(f"OWL ±{settings['owl']:g}")
    if settings.get("ranks"):
        parts.append(f"ranks {settings['ranks']}")
    if settings.get("allocation"):
        parts.append("patterns and ranks from a file")
    return ", ".join(parts)


def describe_specs(linears: Iterable[LinearRecord]) -> str:
    """Return patterns and ranks of some linears: "2:4 + rank 64", "52%–68% + rank 4–17"."""
    return in_words(
        LinearSpec(
            parse_pattern(linear.pattern),
            linear.rank,
            parse_values(linear.values),
            parse_low_rank_values(linear.low_rank_values),
        )
        for linear in linears
    )


def _describe_matching(block: BlockRecord) -> str:
    """Return the block's loss before and after matching: "0.0077 → 0.0037"."""
    matching = block.whole_matching
    if matching is None:
        return "–"
    after = f"{matching.loss_after:.3g}" if matching.applied else "not applied"
    return f"{matching.loss_before:.3g} → {after}"


def describe_cosine(block: BlockRecord) -> str:
    """Return the cosine of the check windows behind a block: "0.9962"."""
    if block.check is None:
        return "–"
    return "not finite" if block.check.cosine is None else f"{block.check.cosine:.4f}"


def describe_check(state: JournalState) -> list[str]:
    """Return lines on the check of a run: its windows and figures, and why it is suspect; none without a check."""
    if state.check is None or state.quality is None:
        return []
    apart = f", {state.check.overlapping} of them not apart from others" if state.check.overlapping else ""
    figures = f"{state.quality.windows} check windows{apart}: {describe_quality(state.quality)}"
    return [figures, *(f"WARNING: {sentence}" for sentence in list_suspicions(state))]


def _describe_gpu(block: BlockRecord) -> list[str]:
    """Return a line with what each phase took of a GPU, and the peak of its tensors; none for a CPU."""
    on_gpu = {name: reading for name, reading in sort_phases(block.measured).items() if "gpu_peak_bytes" in reading}
    phases = (
        f"{name} {format_bytes(gpu_taken_bytes(reading))} ({format_bytes(int(reading['gpu_peak_bytes']))} in tensors)"
        for name, reading in on_gpu.items()
    )
    return [f"GPU memory: {', '.join(phases)}"] if on_gpu else []


# JSON


def summary(folder: Path, state: JournalState) -> dict[str, Any]:
    """Return all of `inspect --json`: totals, and a record per block with its linears."""
    return {
        "folder": str(folder),
        "format_version": state.format_version,
        "complete": state.complete,
        "blocks_done": len(state.blocks),
        "blocks_total": state.blocks_total,
        "settings": dict(state.fingerprint),
        "outliers": state.outliers,
        "unread": list(state.unread),
        "finetuned": [asdict(record) for record in state.finetuned],
        "retries": list_early_retries(state),
        "check": asdict(state.check) if state.check else None,
        "quality": asdict(state.quality) if state.quality else None,
        "totals": totals(state.blocks),
        "blocks": [block_summary(folder, block) for block in state.blocks],
    }


def block_summary(folder: Path, block: BlockRecord) -> dict[str, Any]:
    """Return one block of `inspect --json`."""
    return {
        "index": block.index,
        "name": block.name,
        "file": block.shard.file,
        "present": (folder / block.shard.file).is_file(),
        "sha256": block.shard.sha256,
        "bytes": block.shard.nbytes,
        **totals((block,)),
        "matching": asdict(block.matching) if block.matching else None,
        "matching_off_grid": asdict(block.matching_off_grid) if block.matching_off_grid else None,
        "cosine": block.check.cosine if block.check else None,
        "warnings": list_warnings(block),
        "phases": sort_phases(block.measured),
        "seconds_by_rank": dict(sort_phases(block.seconds_by_rank)),
        "linears": [asdict(linear) for linear in block.linears],
        "dense": dict(block.dense),
    }


def totals(blocks: Sequence[BlockRecord]) -> dict[str, Any]:
    """Return means and sums over every linear of some blocks; {} where there are none.

    Returns:
        wanda_error and error are means over linears, without weights; ratio is packed bytes by dense bytes.
    """
    linears = list_linears(blocks)
    if not linears:
        return {}
    dense = sum(linear.dense_nbytes for linear in linears)
    return {
        "wanda_error": sum(linear.wanda_error for linear in linears) / len(linears),
        "error": sum(linear.error for linear in linears) / len(linears),
        "iterations": sum(linear.iterations for linear in linears),
        "seconds": round(sum(_seconds(block) for block in blocks), 3),
        "linear_bytes": sum(linear.nbytes for linear in linears),
        "dense_linear_bytes": dense,
        "ratio": sum(linear.nbytes for linear in linears) / dense,
        "bits_per_weight": 8 * sum(linear.nbytes for linear in linears) / sum(prod(linear.shape) for linear in linears),
    }


def seconds_by_ranks(blocks: Iterable[BlockRecord]) -> dict[int, list[float]]:
    """Return, for each number of ranks that shared blocks out, the seconds that each rank worked on these."""
    found: dict[int, list[float]] = {}
    for block in blocks:
        if worked := block.seconds_of_ranks:
            before = found.get(len(worked), [0.0] * len(worked))
            found[len(worked)] = [sum(pair) for pair in zip(before, worked, strict=True)]
    return found


def describe_ranks(blocks: Sequence[BlockRecord]) -> list[str]:
    """Return a line on the work of each rank, for each number of ranks; none for one process."""
    counts = Counter(len(block.seconds_of_ranks) for block in blocks)
    return [
        f"work of {world} ranks on {counts[world]} block{'s' if counts[world] > 1 else ''}, without waiting: "
        + ", ".join(f"rank {rank} {seconds:.1f} s" for rank, seconds in enumerate(worked))
        for world, worked in seconds_by_ranks(blocks).items()
    ]


def _seconds(block: BlockRecord) -> float:
    return float(sum(phase["seconds"] for phase in block.measured.values()))


# Tables

_ERROR_CAPTIONS = (
    "error: part of a linear's output that S + U·V loses, tr(R H Rᵀ) / tr(W H Wᵀ), before matching",
    "pruning alone: the same error for the pattern without U·V, chosen by Wanda's score",
    "of dense: bytes of the packed linears, relative to the dense ones",
)
_ROUNDINGS = {
    "unrounded_error": ("before\nrounding", "the same error before S came onto its grid"),
    "rounding_error": ("rounding", "the same error of S + U·V on the grid of S, against S + U·V as matched before"),
}
"""Name of the error in the record of a linear -> its column and what that says."""
_MATCHING_CAPTION = "matching: error of the block's output, mean of ‖f̂(x) − t‖² / ‖t‖² over tokens, before → after"
_COSINE_CAPTION = "cosine: between the hidden states behind the block and the dense model's, mean over check tokens"


def run_table(folder: Path, state: JournalState) -> Table:
    """Return the table of `inspect`: a row per block."""
    mixed = (
        len(
            {
                (linear.pattern, linear.rank, linear.values, linear.low_rank_values)
                for linear in list_linears(state.blocks)
            }
        )
        > 1
    )
    caption = [*_ERROR_CAPTIONS, "error and pruning alone are means over the linears of the block"]
    if any(block.matching for block in state.blocks):
        caption.append(_MATCHING_CAPTION)
    if any(block.check for block in state.blocks):
        caption.append(_COSINE_CAPTION)
    caption += describe_check(state)
    caption += (
        f"fine-tuned on {record.data}, {record.steps} steps: "
        f"held-out loss {record.loss_before:.4f} → {record.loss_after:.4f}"
        for record in state.finetuned
    )
    caption += (f"stay dense: {which}" for which in list_dense(state))
    caption += (f"kept as it is, the model does not run it: {part}" for part in state.unread)
    caption += list_early_retries(state)
    caption += describe_ranks(state.blocks)
    table = Table(
        title=f"{folder}: {describe_method(state)}, {len(state.blocks)} of {state.blocks_total} blocks"
        + ("" if state.complete else " (unfinished: the same `streamslr run` line continues it)"),
        caption="\n".join(caption),
        caption_justify="left",
    )
    columns = ["block", "linears", "error", "pruning\nalone", "matching", "seconds", "bytes", "of\ndense", "sha256"]
    checked = any(block.check for block in state.blocks)
    if checked:
        columns.insert(5, "cosine")
    if mixed:
        columns.insert(2, "pattern + rank")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("warnings")
    for block in state.blocks:
        row = block_summary(folder, block)
        missing = [] if row["present"] else ["FILE MISSING"]
        warnings = [str(len(row["warnings"]))] if row["warnings"] else []
        table.add_row(
            str(block.index),
            str(len(block.linears)),
            *([describe_specs(block.linears)] if mixed else []),
            f"{row['error']:.3g}",
            f"{row['wanda_error']:.3g}",
            _describe_matching(block),
            *([describe_cosine(block)] if checked else []),
            f"{row['seconds']:.1f}",
            format_bytes(block.shard.nbytes),
            f"{row['ratio']:.1%}",
            block.shard.sha256[:12],
            "; ".join(missing + warnings),
        )
    if state.blocks:
        of_all = totals(state.blocks)
        table.add_section()
        table.add_row(
            "all",
            str(len(list_linears(state.blocks))),
            *([describe_specs(list_linears(state.blocks))] if mixed else []),
            f"{of_all['error']:.3g}",
            f"{of_all['wanda_error']:.3g}",
            "",
            *([""] if checked else []),
            f"{of_all['seconds']:.1f}",
            format_bytes(sum(block.shard.nbytes for block in state.blocks)),
            f"{of_all['ratio']:.1%}",
        )
    return table


def _or_dash(error: float | None) -> str:
    return "–" if error is None else f"{error:.3g}"


def block_table(folder: Path, block: BlockRecord) -> Table:
    """Return the table of `inspect --block`: a row per linear."""
    phases = ", ".join(f"{name} {phase['seconds']:.1f} s" for name, phase in sort_phases(block.measured).items())
    matching = [f"{_MATCHING_CAPTION}: {_describe_matching(block)}"] if block.matching else []
    matching += [f"{_COSINE_CAPTION}: {describe_cosine(block)}"] if block.check else []
    retries = _list_retries(block.name, block.retries)
    found = [name for name in _ROUNDINGS if any(getattr(linear, name) is not None for linear in block.linears)]
    roundings = {name: _ROUNDINGS[name] for name in found}
    captions = [*_ERROR_CAPTIONS, *matching]
    captions[1:1] = [f"{column}: {meaning}".replace("\n", " ") for column, meaning in roundings.values()]
    captions += [f"time: {phases}", *describe_ranks([block]), *_describe_gpu(block), *retries]
    table = Table(
        title=f"{folder / block.shard.file}: {block.name}, {format_bytes(block.shard.nbytes)}, "
        f"sha256 {block.shard.sha256[:12]}",
        caption="\n".join(captions),
        caption_justify="left",
    )
    table.add_column("linear", no_wrap=True)
    columns = ["shape", "pattern", "density", "rank", "error", "pruning\nalone", "iterations", "bytes", "of\ndense"]
    columns[5:5] = [column for column, _ in roundings.values()]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("warnings")
    for linear in block.linears:
        table.add_row(
            short_name(linear.name, block),
            f"{linear.shape[0]}×{linear.shape[1]}",
            linear.pattern if linear.values == STORED else f"{linear.pattern} {linear.values}",
            f"{linear.density:.4f}",
            str(linear.rank) + ("" if linear.low_rank_values == STORED else f" {linear.low_rank_values}"),
            f"{linear.error:.3g}",
            *(_or_dash(getattr(linear, name)) for name in roundings),
            f"{linear.wanda_error:.3g}",
            str(linear.iterations),
            format_bytes(linear.nbytes),
            f"{linear.nbytes / linear.dense_nbytes:.1%}",
            "; ".join(linear.warnings),
        )
    for name, why in block.dense.items():
        table.add_row(short_name(name, block), "", "dense", *[""] * (len(columns) - 2), why)
    return table
