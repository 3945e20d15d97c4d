"""Measure the solver's loss against its time, beside the textbook procedure and the losses of the official code.

    python tools/bench_solver.py --model FOLDER --grams GRAMS.safetensors --official LOSSES.json \
        --pattern 2:4 --rank 16 --frontier --json OUT.json --plot OUT.svg
    python tools/bench_solver.py --made 1024x1024 --pattern 2:4 --rank 64
    python tools/bench_solver.py --made 4096x14336 --pattern 2:4 --rank 64 --frontier --device cuda

Linear by linear, every solver runs on the same (W, H), one after another, in one process on the same device and
threads (--threads, 1 by default), so that other load on the machine slows all of them alike. Ratios of time are
between sums over linears; ratios of loss are means over linears. Loss is tr(R H Rᵀ) / tr(W H Wᵀ) with the damped H.
share_of_peak is the FLOP/s of the solver over those of one large bfloat16 product, timed in the same run.

GRAMS holds H undamped under the name of the first linear of each group that shares an input (model.layers.0.
self_attn.q_proj for q, k and v). LOSSES is {"2:4+16": {"0.self_attn.q_proj": {"loss": …}}} of the official code.
"""

import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from bench_block import commit, product_flops
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

from streamslr.solvers import (
    LinearProblem,
    SparseLowRank,
    SparsityPattern,
    ThreeBasil,
    Unstructured,
    parse_pattern,
    relative_error,
)
from streamslr.solvers.base import damping_diagonal

# Linears that share the input of another, which names their Gram matrix.
SHARES_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}

# One solver from hasty to patient; slower growth of ρ buys loss with time.
FRONTIER: Mapping[str, ThreeBasil] = {
    "hasty": ThreeBasil(rho_start=0.5, rho_growth=1.6, stage_iterations=4),
    "quick": ThreeBasil(rho_start=0.3, rho_growth=1.4, stage_iterations=6),
    "brisk": ThreeBasil(stage_iterations=8),
    "default": ThreeBasil(),
    "patient": ThreeBasil(rho_start=0.1, rho_growth=1.2, stage_iterations=40),
}
Row = dict[str, Any]
"""One linear: its name, its shape, the official loss, and a record for each solver."""
VARIANTS: dict[str, ThreeBasil] = {
    **FRONTIER,
    "float32": ThreeBasil(precision="float32"),
    "tiled": ThreeBasil(tile_rows=64),
}
VARIANTS |= {how: ThreeBasil(inverses=how) for how in ("series", "factor")}


def textbook(problem: LinearProblem) -> SparseLowRank:
    """Solve as the official code of 3BASiL does, in plain torch: the yardstick of time.

    Each iteration: full-size products, a randomised SVD in H^½ (`torch.svd_lowrank`). H^½ and H^-½ come from a
    float64 eigendecomposition; every 10 iterations the inverse is rebuilt from it. Everything else is float32. ρ
    starts at 0.1 and grows as the support moves. The projection is the fastest known: ours for n:m, kthvalue for
    p %, both faster than topk and scatter.
    """
    torch.manual_seed(problem.seed)
    pattern, rank = problem.pattern, problem.rank
    added, dead = damping_diagonal(problem.gram)
    H = problem.gram + torch.diag(added)
    s = H.diagonal().sqrt()
    W = problem.weight * s
    W[:, dead] = 0
    G = H / s[:, None] / s
    energies, Q = torch.linalg.eigh(G.double())
    energies.clamp_(min=1e-12)
    root = ((Q * energies.sqrt()) @ Q.T).float()
    inverse_root = ((Q / energies.sqrt()) @ Q.T).float()

    def project(Z: Tensor) -> Tensor:
        if isinstance(pattern, Unstructured):
            magnitudes = Z.abs().flatten()
            rank_of_smallest = magnitudes.numel() - pattern.num_kept(*Z.shape) + 1
            mask: Tensor = Z.abs() >= magnitudes.kthvalue(rank_of_smallest).values
            return mask
        return pattern.project(Z)

    def inverse(rho: float) -> Tensor:
        inverted: Tensor = (Q / (energies + rho)) @ Q.T
        return inverted.float()

    def low_rank(S: Tensor) -> tuple[Tensor, Tensor]:
        u, values, v = torch.svd_lowrank((W - S) @ root, q=rank)
        return u * values, v.T @ inverse_root

    rho, iterations, moved_once = 0.1, 0, False
    M = inverse(rho)
    D = W * project(W)
    Y, UV = torch.zeros_like(W), torch.zeros_like(W)
    U, V = W[:, :0], W[:0]
    support = D != 0
    kept = max(int(support.sum()), 1)
    while iterations < 2000:
        S = ((W - UV) @ G + rho * (D - Y)) @ M
        Z = S + Y
        D = Z * project(Z)
        Y = Z - D
        if rank:
            U, V = low_rank(S)
            UV = U @ V
        iterations += 1
        if iterations % 10:
            continue
        now = D != 0
        moved = int((now != support).sum()) / kept
        support, last_rho = now, rho
        moved_once = moved_once or moved > 0.005
        if not moved_once and rho > 1e-4:  # too large to move anything: start again with less
            rho /= 5
            D = W * project(W)
            Y, UV = torch.zeros_like(W), torch.zeros_like(W)
            support = D != 0
        else:
            if moved == 0 or (iterations >= 100 and moved < 3e-4):
                break
            rho *= 1.1 if moved > 0.1 else 1.05 if moved > 0.005 else 1.02
            Y *= last_rho / rho
        M = inverse(rho)
    return SparseLowRank(D * pattern.project(D) / s, U, V / s, iterations)


def linears_of(model: Path, grams: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield short name, W [o, d] in float32 and H [d, d] of each linear with a Gram matrix, in the model's order."""
    with safe_open(grams, "pt") as held:
        available = set(held.keys())
        found = {}
        for shard in sorted(model.glob("*.safetensors")):
            with safe_open(shard, "pt") as weights:
                for key in weights.keys():  # noqa: SIM118
                    name = key.removesuffix(".weight")
                    parent, _, leaf = name.rpartition(".")
                    gram = f"{parent}.{SHARES_INPUT.get(leaf, leaf)}"
                    if gram in available:
                        found[name] = (shard, key, gram)
        for name in sorted(found, key=lambda n: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", n)]):
            shard, key, gram = found[name]
            with safe_open(shard, "pt") as weights:
                yield name.removeprefix("model.layers."), weights.get_tensor(key).float(), held.get_tensor(gram)


def made_linear(o: int, d: int, device: str = "cpu", seed: int = 0) -> tuple[str, Tensor, Tensor]:
    """Make name, W [o, d] and H [d, d] with the structure of trained linears, which random ones lack.

    Inputs: a spectrum that decays as 1/k, a mean, a few outlier channels, and only 4 d rows, so that H is not exact.
    Weights: a decaying spectrum of their own on top of noise, heavy tails.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    k = torch.arange(1, d + 1, dtype=torch.float32, device=device)
    basis = torch.linalg.qr(normal(d, d)).Q
    channels = torch.exp(0.5 * normal(d))
    channels[torch.randperm(d, generator=generator, device=device)[: max(1, d // 256)]] *= 20
    H = torch.zeros(d, d, device=device)
    mean = 0.5 * normal(d)
    for _ in range(4):
        X = ((normal(d, d) * k.rsqrt()) @ basis.T * (d / k.reciprocal().sum()).sqrt() + mean) * channels
        H += X.T @ X / (2 * d)
    smaller = min(o, d)
    left, right = torch.linalg.qr(normal(o, smaller)).Q, torch.linalg.qr(normal(d, smaller)).Q
    W = (left * torch.arange(1, smaller + 1, device=device).float().pow(-0.7)) @ right.T
    W = W / W.square().mean().sqrt() + normal(o, d)
    return f"made {o}x{d}", 0.02 * W * torch.exp(0.3 * normal(o, d)), H


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="Folder with safetensors weights.")
@click.option("--grams", type=click.Path(path_type=Path, exists=True), help="Gram matrices of its linears.")
@click.option("--official", type=click.Path(path_type=Path, exists=True), help="Losses of the official code.")
@click.option("--made", multiple=True, metavar="OxD", help="Made problem of this shape; may be repeated.")
@click.option("--pattern", default="2:4", show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option(
    "--variant", "variants", multiple=True, default=["default"], help=f"Any of {', '.join(VARIANTS)}; may be repeated."
)
@click.option("--frontier", is_flag=True, help=f"All of {', '.join(FRONTIER)}.")
@click.option("--every", default=1, show_default=True, help="Only every n-th linear.")
@click.option("--no-textbook", is_flag=True, help="Skip the slow reference.")
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw loss against time here (.svg, .png).")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here.")
def main(
    model: Path | None,
    grams: Path | None,
    official: Path | None,
    made: tuple[str, ...],
    pattern: str,
    rank: int,
    variants: tuple[str, ...],
    frontier: bool,
    every: int,
    no_textbook: bool,
    threads: int,
    device: str,
    plot: Path | None,
    out: Path | None,
) -> None:
    torch.set_num_threads(threads)
    if (model is None) != (grams is None) or (model is None) == (not made):
        raise click.UsageError("give --model with --grams, or --made")
    if unknown := [v for v in variants if v not in VARIANTS]:
        raise click.UsageError(f"unknown variant {', '.join(unknown)}; choose of {', '.join(VARIANTS)}")
    variants = tuple(FRONTIER) if frontier else variants
    solvers: dict[str, Callable[[LinearProblem], SparseLowRank]] = {v: VARIANTS[v].solve for v in variants}
    if not no_textbook:
        solvers["textbook"] = textbook
    if model is not None and grams is not None:
        linears: Iterator[tuple[str, Tensor, Tensor]] = linears_of(model, grams)
    else:
        shapes = ((int(o), int(d)) for o, d in (shape.split("x") for shape in made))
        linears = (made_linear(o, d, device) for o, d in shapes)

    parsed_pattern = parse_pattern(pattern)
    official_losses = _official_losses(official, pattern, rank) if official else {}
    rows = []
    for index, (name, W, H) in enumerate(linears):
        if index % every == 0:
            W, H = W.to(device), H.to(device)
            rows.append(measure(name, W, H, parsed_pattern, rank, solvers, official_losses.get(name)))
            print(f"{name}: " + _line(rows[-1], list(solvers)), file=sys.stderr, flush=True)
    peak = product_flops(torch.device(device), torch.bfloat16)
    summary = {solver: _summary(rows, solver, peak) for solver in solvers}
    _show(summary, f"{pattern} + {rank}, {len(rows)} linears, {threads} thread(s)")
    if plot:
        _draw(summary, f"{pattern} + {rank}, {len(rows)} linears", plot)
    if out:
        command = " ".join(["python", "tools/bench_solver.py", *sys.argv[1:]])
        name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
        record = {
            "command": command,
            "commit": commit(),
            "machine": f"{name}, torch {torch.__version__}, {threads} thread(s)",
            "product_flops": peak,
            "pattern": pattern,
            "rank": rank,
        }
        out.write_text(json.dumps({**record, "summary": summary, "linears": rows}, indent=1) + "\n")


def _official_losses(path: Path, pattern: str, rank: int) -> dict[str, float]:
    tables = json.loads(path.read_text())
    key = f"{pattern}+{rank}"
    for candidate in (key, f"{key} alps"):
        if candidate in tables:
            return {name: row["loss"] for name, row in tables[candidate].items()}
    raise click.UsageError(f"{path} has no table {key}; it has {', '.join(tables)}")


def measure(
    name: str,
    W: Tensor,
    H: Tensor,
    pattern: SparsityPattern,
    rank: int,
    solvers: Mapping[str, Callable[[LinearProblem], SparseLowRank]],
    official_loss: float | None,
) -> Row:
    """Solve W [o, d] with the Gram matrix H [d, d] by each solver; return its loss, seconds and iterations."""
    row: Row = {"linear": name, "shape": list(W.shape), "official": official_loss}
    for solver, solve in solvers.items():
        problem = LinearProblem(name, W, H, pattern, rank)
        _wait_for(W)
        start = time.perf_counter()
        result = solve(problem)
        _wait_for(W)
        seconds = time.perf_counter() - start
        if wrong := pattern.check(result.S != 0):
            raise AssertionError(f"{solver} on {name}: {wrong}")
        row[solver] = {
            "loss": relative_error(W, H, result.dense()),
            "seconds": seconds,
            "iterations": result.iterations,
            "warnings": list(result.warnings),
        }
    return row


def _wait_for(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _summary(rows: list[Row], solver: str, peak: float) -> dict[str, float | None]:
    """Return one solver's means and sums over linears, and its ratios to the textbook and to the official code."""
    ours = [row[solver] for row in rows]
    seconds = sum(x["seconds"] for x in ours)
    summary: dict[str, float | None] = {
        "mean_loss": sum(x["loss"] for x in ours) / len(ours),
        "seconds": seconds,
        "mean_iterations": sum(x["iterations"] for x in ours) / len(ours),
    }
    ratios = [x["loss"] / row["official"] for x, row in zip(ours, rows, strict=True) if row["official"]]
    summary["loss_to_official"] = sum(ratios) / len(ratios) if ratios else None
    summary["worst_loss_to_official"] = max(ratios) if ratios else None
    if solver in VARIANTS:
        products = sum(2 * row["shape"][0] * row["shape"][1] ** 2 * row[solver]["iterations"] for row in rows)
        summary["share_of_peak"] = products / seconds / peak
    if "textbook" in rows[0]:
        slow = [row["textbook"] for row in rows]
        summary["loss_to_textbook"] = sum(x["loss"] / y["loss"] for x, y in zip(ours, slow, strict=True)) / len(ours)
        summary["time_to_textbook"] = seconds / sum(y["seconds"] for y in slow)
    return summary


def _draw(summary: Mapping[str, Mapping[str, Any]], title: str, to: Path) -> None:
    """Draw loss against time, both as ratios where there is something to compare with."""
    import matplotlib.pyplot as plt

    against = "official" if all(row["loss_to_official"] for row in summary.values()) else "textbook"
    loss = f"loss_to_{against}" if "textbook" in summary or against == "official" else "mean_loss"
    seconds = "time_to_textbook" if "textbook" in summary else "seconds"
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    paces = [(row[seconds], row[loss]) for name, row in summary.items() if name in FRONTIER]
    axes.plot(*zip(*sorted(paces), strict=True), color="tab:blue", zorder=1)
    for name, row in summary.items():
        axes.scatter(row[seconds], row[loss], color="tab:blue" if name in VARIANTS else "tab:red", zorder=2)
        right = name in VARIANTS
        place: dict[str, Any] = {"xytext": (6 if right else -6, 6), "ha": "left" if right else "right"}
        axes.annotate(name, (row[seconds], row[loss]), textcoords="offset points", **place)
    axes.margins(0.08)
    axes.set_xscale("log")
    axes.set_xlabel("time / textbook" if seconds == "time_to_textbook" else "seconds")
    axes.set_ylabel("mean relative loss" if loss == "mean_loss" else f"loss / {against}, mean over linears")
    axes.set_title(f"{title}: below and to the left is better")
    axes.grid(alpha=0.3)
    figure.savefig(to)


def _line(row: Row, solvers: list[str]) -> str:
    return ", ".join(
        f"{s} {row[s]['loss']:.6f} {row[s]['seconds']:.2f}s {row[s]['iterations']} iterations" for s in solvers
    )


def _show(summary: Mapping[str, Mapping[str, float | None]], title: str) -> None:
    table = Table(title=title)
    columns = {key: None for row in summary.values() for key in row}
    table.add_column("solver")
    for key in columns:
        table.add_column(key.replace("_", " "), justify="right")
    for solver, row in summary.items():
        cells = ("" if row.get(key) is None else f"{row[key]:.4g}" for key in columns)
        table.add_row(solver, *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
