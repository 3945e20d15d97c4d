"""The plan of a run as a table for people."""

import re
from collections.abc import Iterable
from itertools import groupby, takewhile

from rich.table import Table

from streamslr.config import format_bytes
from streamslr.run.plan import BlockKind, Plan

_MOST_RANGES = 4
"""Ranges of block numbers that are shown of a kind of blocks."""


def plan_table(plan: Plan) -> Table:
    """Return a table with one row a phase, and the choices and totals of the plan around it.

    Where blocks differ, a row for each kind of them follows: the most that one of them takes, and the FLOPs of all.
    """
    budget = f"host budget {format_bytes(plan.host_mem)}"
    if plan.device != "cpu":
        budget += ", no gpu budget given" if plan.gpu_mem is None else f", gpu budget {format_bytes(plan.gpu_mem)}"
    tier = "memory and disk" if plan.in_memory else "disk"
    choices = "" if plan.grams_at == "device" else f", Gram matrices wait on {plan.grams_at}"
    if plan.resident_windows:
        choices += f", {plan.resident_windows} windows stay on the gpu while a block is matched"
    if plan.solved_at == "host":
        choices += ", solved linears wait in host memory while a block is matched"
    choices += "" if plan.solver_workspace is None else ", the solver works in tiles"
    if plan.gram_bytes_at_once is not None:
        choices += f", Gram matrices are collected {format_bytes(plan.gram_bytes_at_once)} at a time"
    ranks = f" on each of {plan.world} ranks" if plan.world > 1 else ""
    kinds = plan.kinds if len(plan.kinds) > 1 else ()
    blocks = f"{plan.blocks} blocks" + (f" of {len(kinds)} kinds" if kinds else "")
    table = Table(
        min_width=76,
        title=f"plan: {blocks} on {plan.device}{ranks}, {plan.micro_batch} windows at a time, {budget}",
        caption=f"output {format_bytes(plan.output_bytes)} (source {format_bytes(plan.source_bytes)}), "
        f"scratch {format_bytes(plan.scratch_bytes)} (hidden states: {tier}){choices}"
        + (f", to download {format_bytes(plan.download_bytes)}" if plan.download_bytes else "")
        + (f", each rank sends {format_bytes(plan.sent_bytes_in_all)}" if kinds and plan.world > 1 else "")
        + f"\nlinears become {plan.linears}: S, U and V keep {plan.parameter_fraction:.1%} of their parameters"
        + (f"\n{plan.expert_grams_in_words}" if plan.expert_gram_groups else "")
        + "".join(f"\nstay dense: {which}" for which in plan.dense)
        + "".join(f"\n{line}" for line in who_solves(plan)),
    )
    for name in ("phase", "host", "gpu", "FLOPs", *(["sent a block"] if plan.world > 1 else [])):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in plan.phases:
        table.add_row(phase.name, *_figures(plan, phase.host_bytes, phase.gpu_bytes, phase.flops, phase.sent_bytes))
    table.add_section()
    for kind in kinds:
        peaks = max(phase.host_bytes for phase in kind.phases), max(phase.gpu_bytes for phase in kind.phases)
        table.add_row(_blocks_in_words(kind), *_figures(plan, *peaks, kind.flops, kind.sent_bytes))
    table.add_section()
    table.add_row("peak", *_figures(plan, plan.host_bytes, plan.gpu_bytes, plan.flops, plan.sent_bytes))
    return table


def _blocks_in_words(kind: BlockKind) -> str:
    """Return the number of blocks of a kind, and which they are: "3 blocks: 0, 4–5"."""
    shown = []
    for _, run in groupby(enumerate(kind.blocks), key=lambda pair: pair[1] - pair[0]):
        first, *others = (block for _, block in run)
        shown.append(f"{first}–{others[-1]}" if others else f"{first}")
    which = ", ".join(shown if len(shown) <= _MOST_RANGES else [*shown[:_MOST_RANGES], "…"])
    return f"{len(kind.blocks)} block{'s' if len(kind.blocks) > 1 else ''}: {which}"


def who_solves(plan: Plan) -> list[str]:
    """Return a line for each rank, or for ranks that solve alike: its linears of the block that takes most work."""
    if plan.deal is None:
        return []
    owners = plan.deal.owners
    by_rows = [name for name in plan.deal.linears if name in plan.deal.by_rows]
    block = _common_start([*owners, *by_rows])
    shares = []
    for rank in range(plan.world):
        own = [name.removeprefix(f"{block}.") for name, owner in owners.items() if owner == rank]
        shares.append((rank, _shortened(own)))
    lines = []
    for text, alike in groupby(shares, key=lambda share: share[1]):
        first, *others = (rank for rank, _ in alike)
        who = f"ranks {first} to {others[-1]}, each" if others else f"rank {first}"
        lines.append(f"{who}: {text}")
    if by_rows:
        lines.append(f"all by rows: {_shortened(name.removeprefix(f'{block}.') for name in by_rows)}")
    lines[0] = f"{block}: {lines[0]}"
    return lines


def _common_start(names: Iterable[str]) -> str:
    """Return the parts of dotted names that all of them begin with."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(first for first, *others in takewhile(lambda same: len(set(same)) == 1, parts))


def _shortened(names: Iterable[str]) -> str:
    """Return names as a list, those that differ in a number alone (experts) as one with their count."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return ", ".join(f"{len(of)} × {kind}" if len(of) > 1 else of[0] for kind, of in kinds.items()) or "nothing alone"


def _figures(plan: Plan, host: int, gpu: int, flops: float, sent: int) -> list[str]:
    return [
        format_bytes(host),
        _gpu_bytes(plan, gpu),
        f"{flops:.2e}",
        *([format_bytes(sent) if sent else "–"] if plan.world > 1 else []),
    ]


def _gpu_bytes(plan: Plan, count: int) -> str:
    return "–" if plan.device == "cpu" else format_bytes(count)
