"""What each block's shard holds and how good it is, from the journal; for people (tables) and for programs (JSON)."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from streamslr.config import format_bytes
from streamslr.errors import InputError
from streamslr.journal import JOURNAL_FILE, BlockRecord, JournalState, read_journal


def read_run(folder: Path) -> JournalState:
    """The journal of a compressed folder, finished or not. Raises InputError when it is none."""
    state = read_journal(folder)
    if state is None:
        raise InputError(f"{folder} holds no {JOURNAL_FILE}: it is not an output folder of streamslr")
    return state


def summary(folder: Path, state: JournalState) -> dict[str, Any]:
    """The whole of `inspect --json`: totals, and a record a block with its layers."""
    return {
        "folder": str(folder),
        "format_version": state.format_version,
        "complete": state.complete,
        "blocks_done": len(state.blocks),
        "blocks_total": state.blocks_total,
        "settings": dict(state.fingerprint),
        "totals": _totals(state.blocks),
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
        **_totals((block,)),
        "matching": asdict(block.matching) if block.matching else None,
        "warnings": [warning for layer in block.layers for warning in layer.warnings] + _not_kept(block),
        "phases": dict(block.measured),
        "layers": [asdict(layer) for layer in block.layers],
    }


def _not_kept(block: BlockRecord) -> list[str]:
    if block.matching is None or block.matching.kept:
        return []
    return [f"matching did not lower the loss of {block.name}; it is as it was solved"]


def _matched(block: BlockRecord) -> str:
    """Its loss before and after matching."""
    matching = block.matching
    if matching is None:
        return "–"
    after = f"{matching.loss_after:.3g}" if matching.kept else "not kept"
    return f"{matching.loss_before:.3g} → {after}"


def _totals(blocks: tuple[BlockRecord, ...]) -> dict[str, Any]:
    layers = [layer for block in blocks for layer in block.layers]
    if not layers:
        return {}
    dense = sum(layer.dense_nbytes for layer in layers)
    return {
        "error_before": sum(layer.error_before for layer in layers) / len(layers),
        "error_after": sum(layer.error_after for layer in layers) / len(layers),
        "iterations": sum(layer.iterations for layer in layers),
        "seconds": round(sum(_seconds(block) for block in blocks), 3),
        "linear_bytes": sum(layer.nbytes for layer in layers),
        "dense_linear_bytes": dense,
        "ratio": sum(layer.nbytes for layer in layers) / dense,
    }


def _seconds(block: BlockRecord) -> float:
    phases: Mapping[str, Any] = block.measured
    return float(sum(phase["seconds"] for phase in phases.values()))


def run_table(folder: Path, state: JournalState) -> Table:
    """A row a block."""
    done, total = len(state.blocks), state.blocks_total
    settings = state.fingerprint
    table = Table(
        title=f"{folder}: {settings['pattern']} + rank {settings['rank']}, {done} of {total} blocks"
        + ("" if state.complete else " (unfinished: the same `streamslr run` line goes on)"),
        caption="errors: tr(R H Rᵀ) / tr(W H Wᵀ) as solved, mean over layers; pruned: before 3BASiL, without U·V; "
        "matching: ‖f̂(X) − T‖² / ‖T‖² of the block before and after",
    )
    for name in (
        "block",
        "layers",
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
            str(len(block.layers)),
            f"{row['error_before']:.3g}",
            f"{row['error_after']:.3g}",
            _matched(block),
            f"{row['seconds']:.1f}",
            format_bytes(block.shard.nbytes),
            f"{row['ratio']:.3f}",
            block.shard.sha256[:12],
            ("" if row["present"] else "FILE MISSING; ") + (f"{len(row['warnings'])}" if row["warnings"] else ""),
        )
    if state.blocks:
        totals = _totals(state.blocks)
        table.add_section()
        table.add_row(
            "all",
            str(sum(len(block.layers) for block in state.blocks)),
            f"{totals['error_before']:.3g}",
            f"{totals['error_after']:.3g}",
            "",
            f"{totals['seconds']:.1f}",
            format_bytes(sum(block.shard.nbytes for block in state.blocks)),
            f"{totals['ratio']:.3f}",
        )
    return table


def block_table(folder: Path, block: BlockRecord) -> Table:
    """A row a layer."""
    table = Table(
        title=f"{folder / block.shard.file}  {block.name}  sha256 {block.shard.sha256[:12]}  "
        f"{format_bytes(block.shard.nbytes)}",
        caption=f"matching {_matched(block)}\n"
        + "  ".join(f"{name} {phase['seconds']:.1f} s" for name, phase in block.measured.items()),
    )
    columns = ("shape", "pattern", "density", "rank", "pruned", "S + U·V", "iterations", "bytes", "of dense")
    table.add_column("layer", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("warnings")
    for layer in block.layers:
        table.add_row(
            layer.name.removeprefix(block.name + "."),
            f"{layer.shape[0]}×{layer.shape[1]}",
            layer.pattern,
            f"{layer.density:.4f}",
            str(layer.rank),
            f"{layer.error_before:.3g}",
            f"{layer.error_after:.3g}",
            str(layer.iterations),
            format_bytes(layer.nbytes),
            f"{layer.nbytes / layer.dense_nbytes:.3f}",
            "; ".join(layer.warnings),
        )
    return table


def get_block(state: JournalState, index: int) -> BlockRecord:
    """Block `index` of the run. Raises InputError when it is not there (yet)."""
    if not 0 <= index < len(state.blocks):
        raise InputError(
            f"block {index} is not there: {len(state.blocks)} of {state.blocks_total} blocks are done, counted from 0"
        )
    return state.blocks[index]
