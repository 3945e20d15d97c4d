"""The plan of a run as a table for people."""

from rich.table import Table

from streamslr.config import format_bytes
from streamslr.run.plan import Plan


def plan_table(plan: Plan) -> Table:
    """Return a table with one row a phase, and the choices and totals of the plan around it."""
    budget = f"host budget {format_bytes(plan.host_mem)}"
    if plan.device != "cpu":
        budget += ", no gpu budget given" if plan.gpu_mem is None else f", gpu budget {format_bytes(plan.gpu_mem)}"
    tier = "memory and disk" if plan.in_memory else "disk"
    choices = "" if plan.grams_at == "device" else f", Gram matrices wait on {plan.grams_at}"
    if plan.resident_windows:
        choices += f", {plan.resident_windows} windows stay on the gpu while a block is matched"
    choices += "" if plan.solver_workspace is None else ", the solver works in tiles"
    table = Table(
        min_width=76,
        title=f"plan: {plan.blocks} blocks on {plan.device}, {plan.micro_batch} windows at a time, {budget}",
        caption=f"output {format_bytes(plan.output_bytes)} (source {format_bytes(plan.source_bytes)}), "
        f"scratch {format_bytes(plan.scratch_bytes)} (hidden states: {tier}){choices}"
        + (f", to download {format_bytes(plan.download_bytes)}" if plan.download_bytes else "")
        + f"\nlinears become {plan.linears}: S, U and V keep {plan.parameter_fraction:.1%} of their parameters"
        + "".join(f"\nstay dense: {which}" for which in plan.dense),
    )
    for name in ("phase", "host", "gpu", "FLOPs"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in plan.phases:
        table.add_row(
            phase.name, format_bytes(phase.host_bytes), _gpu_bytes(plan, phase.gpu_bytes), f"{phase.flops:.2e}"
        )
    table.add_section()
    table.add_row("peak", format_bytes(plan.host_bytes), _gpu_bytes(plan, plan.gpu_bytes), f"{plan.flops:.2e}")
    return table


def _gpu_bytes(plan: Plan, count: int) -> str:
    return "–" if plan.device == "cpu" else format_bytes(count)
