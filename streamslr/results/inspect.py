"""What each block's shard holds and how good it is, from the journal; for people (tables) and for programs (JSON)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from rich.table import Table

from streamslr.config import format_bytes
from streamslr.errors import InputError
from streamslr.run.journal import JOURNAL_FILE, BlockRecord, JournalState, LinearRecord, read_journal
from streamslr.run.progress import PHASES
from streamslr.spec.allocation import LinearSpec, in_words
from streamslr.spec.pattern import parse_pattern


def read_run(folder: Path) -> JournalState:
    """The journal of a compressed folder, finished or not. Raises InputError when it is none."""
    state = read_journal(folder)
    if state is None:
        raise InputError(f"{folder} holds no {JOURNAL_FILE}: it is not an output folder of streamslr")
    return state


def summary(folder: Path, state: JournalState) -> dict[str, Any]:
    """The whole of `inspect --json`: totals, and a record a block with its linears."""
    return {
        "folder": str(folder),
        "format_version": state.format_version,
        "complete": state.complete,
        "blocks_done": len(state.blocks),
        "blocks_total": state.blocks_total,
        "settings": dict(state.fingerprint),
        "outliers": state.outliers,
        "finetuned": [asdict(record) for record in state.finetuned],
        "totals": totals(state.blocks),
        "blocks": [block_summary(folder, block) for block in state.blocks],
    }


def block_summary(folder: Path, block: BlockRecord) -> dict[str, Any]:
    """One block of `inspect --json`."""
    return {
        "index": block.index,
        "name": block.name,
        "file": block.shard.file,
        "present": (folder / block.shard.file).is_file(),
        "sha256": block.shard.sha256,
        "bytes": block.shard.nbytes,
        **totals((block,)),
        "matching": asdict(block.matching) if block.matching else None,
        "warnings": warnings(block),
        "phases": phase_readings(block.measured),
        "linears": [asdict(linear) for linear in block.linears],
    }


def how(state: JournalState) -> str:
    """The method, and what it was asked to make of the linears."""
    settings = state.fingerprint
    sparse = settings["pattern"] or f"compression {settings['compression']}"
    ratio = settings.get("rank_ratio")
    told = [
        f"{settings['method']} at {sparse} + "
        + (f"rank {settings['rank']}" if ratio is None else f"rank ratio {ratio:g}")
    ]
    told += [f"OWL ±{settings['owl']:g}"] if settings.get("owl") is not None else []
    told += [f"ranks {settings['ranks']}"] if settings.get("ranks") else []
    told += ["linears of a file"] if settings.get("allocation") else []
    return ", ".join(told)


def allocation(state: JournalState) -> dict[str, Any]:
    """What each linear becomes, as --allocation reads it. Raises InputError while that is not known."""
    if state.allocation is None:
        raise InputError("not known yet: the survey of the blocks is not done; the same `streamslr run` line goes on")
    return dict(state.allocation)


def becomes(linears: Iterable[LinearRecord]) -> str:
    """Patterns and ranks of some linears: "2:4 + rank 64", "52%–68% + rank 4–17"."""
    return in_words(LinearSpec(parse_pattern(linear.pattern), linear.rank) for linear in linears)


def _linears(state: JournalState) -> list[LinearRecord]:
    return [linear for block in state.blocks for linear in block.linears]


def warnings(block: BlockRecord) -> list[str]:
    """Whatever was out of the ordinary in a block."""
    found = [warning for linear in block.linears for warning in linear.warnings]
    if block.matching and not block.matching.applied:
        found.append(f"matching did not lower the loss of {block.name}; it is as it was solved")
    return found


def short_name(linear: LinearRecord, block: BlockRecord) -> str:
    """A linear's name within its block: self_attn.q_proj."""
    return linear.name.partition(f".{block.index}.")[2] or linear.name


def phase_readings(measured: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The readings of each phase, in the order that a run goes through them; the journal's are sorted by name."""
    order = {name: position for position, name in enumerate(PHASES)}
    return dict(sorted(measured.items(), key=lambda item: order.get(item[0], len(order))))


def _matched(block: BlockRecord) -> str:
    """Its loss before and after matching."""
    matching = block.matching
    if matching is None:
        return "–"
    after = f"{matching.loss_after:.3g}" if matching.applied else "not kept"
    return f"{matching.loss_before:.3g} → {after}"


def totals(blocks: Sequence[BlockRecord]) -> dict[str, Any]:
    """Means and sums over every linear of some blocks; {} where there are none."""
    linears = [linear for block in blocks for linear in block.linears]
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


def _seconds(block: BlockRecord) -> float:
    return float(sum(phase["seconds"] for phase in block.measured.values()))


def run_table(folder: Path, state: JournalState) -> Table:
    """A row a block."""
    done, total = len(state.blocks), state.blocks_total
    mixed = len({(linear.pattern, linear.rank) for linear in _linears(state)}) > 1
    table = Table(
        title=f"{folder}: {how(state)}, {done} of {total} blocks"
        + ("" if state.complete else " (unfinished: the same `streamslr run` line goes on)"),
        caption="errors: tr(R H Rᵀ) / tr(W H Wᵀ) as solved, mean over linears; pruned: by Wanda, without U·V; "
        "matching: ‖f̂(X) − T‖² / ‖T‖² of the block before and after"
        + "".join(
            f"\nthen fine-tuned on {record.data}, {record.steps} steps: "
            f"held-out loss {record.loss_before:.4f} → {record.loss_after:.4f}"
            for record in state.finetuned
        ),
    )
    for name in (
        "block",
        "linears",
        *(["becomes"] if mixed else []),
        "pruned",
        "S + U·V",
        "matching",
        "seconds",
        "bytes",
        "of dense",
        "digest",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("warnings")
    for block in state.blocks:
        row = block_summary(folder, block)
        table.add_row(
            str(block.index),
            str(len(block.linears)),
            *([becomes(block.linears)] if mixed else []),
            f"{row['wanda_error']:.3g}",
            f"{row['error']:.3g}",
            _matched(block),
            f"{row['seconds']:.1f}",
            format_bytes(block.shard.nbytes),
            f"{row['ratio']:.3f}",
            block.shard.sha256[:12],
            ("" if row["present"] else "FILE MISSING; ") + (f"{len(row['warnings'])}" if row["warnings"] else ""),
        )
    if state.blocks:
        of_all = totals(state.blocks)
        table.add_section()
        table.add_row(
            "all",
            str(sum(len(block.linears) for block in state.blocks)),
            *([becomes(_linears(state))] if mixed else []),
            f"{of_all['wanda_error']:.3g}",
            f"{of_all['error']:.3g}",
            "",
            f"{of_all['seconds']:.1f}",
            format_bytes(sum(block.shard.nbytes for block in state.blocks)),
            f"{of_all['ratio']:.3f}",
        )
    return table


def block_table(folder: Path, block: BlockRecord) -> Table:
    """A row a linear."""
    table = Table(
        title=f"{folder / block.shard.file}  {block.name}  sha256 {block.shard.sha256[:12]}  "
        f"{format_bytes(block.shard.nbytes)}",
        caption=f"matching {_matched(block)}\n"
        + "  ".join(f"{name} {phase['seconds']:.1f} s" for name, phase in phase_readings(block.measured).items()),
    )
    columns = ("shape", "pattern", "density", "rank", "pruned", "S + U·V", "iterations", "bytes", "of dense")
    table.add_column("linear", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("warnings")
    for linear in block.linears:
        table.add_row(
            short_name(linear, block),
            f"{linear.shape[0]}×{linear.shape[1]}",
            linear.pattern,
            f"{linear.density:.4f}",
            str(linear.rank),
            f"{linear.wanda_error:.3g}",
            f"{linear.error:.3g}",
            str(linear.iterations),
            format_bytes(linear.nbytes),
            f"{linear.nbytes / linear.dense_nbytes:.3f}",
            "; ".join(linear.warnings),
        )
    return table


def get_block(state: JournalState, index: int) -> BlockRecord:
    """Block `index` of the run. Raises InputError when it is not there (yet)."""
    if not 0 <= index < len(state.blocks):
        raise InputError(
            f"block {index} is not there: {len(state.blocks)} of {state.blocks_total} blocks are done, counted from 0"
        )
    return state.blocks[index]
