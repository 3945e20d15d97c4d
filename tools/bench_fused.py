"""Measure 3BASiL's iteration on a GPU with its fused step and with torch's passes, on the same made linear.

    python tools/bench_fused.py --json OUT.json
    python tools/bench_fused.py --shape 4096x14336 --pattern 1:8 --rank 128 --sweep

Times are medians over --iterations, between CUDA events, the first three left out. kernel and product are the two
halves of the fused step, timed alone; GB/s are the bytes that the kernel has to read and write over its time. "D
differs" is the fraction of the support of D that differs from torch's passes after all iterations from the same start;
beside it, the same for torch's passes with float32 products, which is what bfloat16 alone changes.

--sweep times the kernel alone over shapes of its blocks, best first. Off a GPU the kernel runs in Triton's interpreter
(TRITON_INTERPRET=1), where only tiny shapes come to an end.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from bench_block import commit
from torch import Tensor

from streamslr.solvers import LinearProblem, ThreeBasil, parse_pattern, threebasil_fused
from streamslr.solvers.threebasil_fused import Blocks, FusedState, describe
from streamslr.solvers.threebasil_metric import Pace, StageInverses, build_metric
from streamslr.solvers.threebasil_state import AdmmState

# Bytes a weight that the kernel reads and writes: Z twice, W, the product and T.
KERNEL_BYTES = 4 + 4 + 4 + 2 + 2
_WARM_UP = 3


def made_linear(o: int, d: int, device: torch.device, pattern: str, rank: int) -> LinearProblem:
    """Make a linear quickly at any size: noise and a low-rank part, in the weight and in the inputs of the Gram.

    Supports move as in a trained one, which is enough to time an iteration. bench_solver.py makes better ones.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    channels, mixed = torch.exp(0.5 * normal(d)), normal(64, d) / 8
    gram = torch.zeros(d, d, device=device)
    for _ in range(4):
        X = normal(d // 4 + 64, d).addmm_(normal(d // 4 + 64, 64), mixed).mul_(channels)
        gram.addmm_(X.t(), X)
    weight = normal(o, d).addmm_(normal(o, 64), normal(64, d), alpha=1 / 8).mul_(0.02)
    return LinearProblem(f"made {o}x{d}", weight, gram, parse_pattern(pattern), rank)


def start(problem: LinearProblem, fused: bool, dtype: torch.dtype) -> AdmmState:
    """Return the state of a solve before its first iteration, with the fused step or with torch's passes."""
    devices, threebasil_fused.DEVICES = threebasil_fused.DEVICES, {problem.weight.device.type} if fused else set()
    try:
        metric = build_metric(problem, [])
        inverses = StageInverses(metric, Pace(ThreeBasil.rho_start, ThreeBasil.rho_growth), dtype, by_series=False)
        state = AdmmState(problem, metric, problem.rank, inverses)
    finally:
        threebasil_fused.DEVICES = devices
    if fused and not state.fused:
        raise click.ClickException(f"the fused step is not used: {describe(problem.weight.device)}")
    state.enter_stage(0)
    return state


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call."""
    if device.type != "cuda":
        begun = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - begun)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    work()
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last))


def median_of(times: list[float]) -> float:
    """Return the median without the calls that warm up."""
    return statistics.median(times[_WARM_UP:])


def support_of(state: AdmmState) -> Tensor:
    """Return the support of D, bool [o, d], on the CPU."""
    if state.fused:
        return ((state.fused.Z != 0) & state.pattern.project(state.fused.Z)).cpu()
    return torch.cat([(part.D != 0).t() for part in state.tiles[0].slices], dim=1).cpu()


def measure(problem: LinearProblem, iterations: int) -> dict[str, Any]:
    """Return the times of an iteration and its parts each way, and how the supports differ afterwards."""
    device, (o, d) = problem.weight.device, problem.weight.shape
    row: dict[str, Any] = {"shape": f"{o}x{d}", "pattern": str(problem.pattern), "rank": problem.rank}
    supports = {}
    for way, dtype in (("fused", torch.bfloat16), ("torch", torch.bfloat16), ("float32", torch.float32)):
        if device.type == "cuda":
            torch.cuda.empty_cache()
        state = start(problem, way == "fused", dtype)
        low_rank, sparse = [], []
        for _ in range(iterations + _WARM_UP):
            low_rank.append(milliseconds(state.update_low_rank, device))
            sparse.append(milliseconds(state.update_sparse, device))
        row[way] = {"low_rank_ms": median_of(low_rank), "sparse_ms": median_of(sparse)}
        supports[way] = support_of(state)
        if state.fused:
            kernel, product = time_parts(state, state.fused, iterations)
            row["kernel_ms"], row["kernel_bytes_per_second"] = kernel, 1000 * KERNEL_BYTES * o * d / kernel
            row["product_ms"], row["product_flops"] = product, 2000 * o * d * d / product
        del state
    kept = supports["torch"].count_nonzero().item()
    for name, way in (("d_differs", "fused"), ("d_differs_at_float32", "float32")):
        row[name] = (supports[way] != supports["torch"]).count_nonzero().item() / kept
    return row


def time_parts(state: AdmmState, fused: FusedState, repeats: int) -> tuple[float, float]:
    """Return the milliseconds of the kernel and of the product over all rows; the state is of no use afterwards."""
    device = fused.Z.device
    Q = (state.B - state.times_inverse(state.B)).t()
    products = [fused.input[rows] @ state.M.t() for rows in fused.rows]

    def kernel() -> None:
        for rows, product in zip(fused.rows, products, strict=True):
            fused.update_rows(rows, product, state.U.t()[rows], Q, 1.0, False)

    def multiply() -> None:
        for rows, product in zip(fused.rows, products, strict=True):
            torch.mm(fused.input[rows], state.M.t(), out=product)

    calls = range(repeats + _WARM_UP)
    kernel_times, product_times = ([milliseconds(work, device) for _ in calls] for work in (kernel, multiply))
    return median_of(kernel_times), median_of(product_times)


def sweep(problem: LinearProblem, repeats: int) -> list[dict[str, Any]]:
    """Return the kernel's time for many shapes of its blocks, best first; what does not compile is left out."""
    state = start(problem, True, torch.bfloat16)
    assert state.fused
    rows = []
    shapes = itertools.product((32, 64, 128), (32, 64, 128), (16, 32), (4, 8), (1, 2, 3))
    for blocks in itertools.starmap(Blocks, shapes):
        if not 8 <= blocks.rows * blocks.columns // (32 * blocks.warps) <= 32 or blocks.columns % state.fused.pattern.m:
            continue
        state.fused.blocks = blocks
        try:
            rows.append({"blocks": list(blocks), "kernel_ms": time_parts(state, state.fused, repeats)[0]})
        except Exception as error:  # of the compiler or for want of shared memory
            print(f"{blocks}: {type(error).__name__}: {error}")
    return sorted(rows, key=lambda row: row["kernel_ms"])


def show(row: dict[str, Any]) -> None:
    """Print one shape."""
    print(f"{row['shape']} at {row['pattern']} + {row['rank']}")
    for way in ("fused", "torch", "float32"):
        low_rank, sparse = row[way]["low_rank_ms"], row[way]["sparse_ms"]
        print(f"  {way:8} {low_rank + sparse:9.2f} ms an iteration: U·V {low_rank:.2f}, S, D and Y {sparse:.2f}")
    print(f"  kernel   {row['kernel_ms']:9.2f} ms, {row['kernel_bytes_per_second'] / 1e9:.0f} GB/s")
    print(f"  product  {row['product_ms']:9.2f} ms, {row['product_flops'] / 1e12:.0f} TFLOP/s")
    print(f"  D differs in {row['d_differs']:.2%} of its support, at float32 in {row['d_differs_at_float32']:.2%}")
    for tried in row.get("sweep", [])[:8]:
        print(f"  blocks {tried['blocks']}: {tried['kernel_ms']:.2f} ms")


@click.command(help=__doc__)
@click.option(
    "--shape", "shapes", multiple=True, default=["8192x28672", "28672x8192"], metavar="OxD", show_default=True
)
@click.option("--pattern", default="2:4", show_default=True)
@click.option("--rank", default=64, show_default=True)
@click.option("--iterations", default=20, show_default=True)
@click.option("--sweep", "sweeps", is_flag=True, help="Time the kernel over shapes of its blocks too.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the figures here.")
def main(
    shapes: tuple[str, ...], pattern: str, rank: int, iterations: int, sweeps: bool, device: str, out: Path | None
) -> None:
    rows = []
    for shape in shapes:
        o, d = (int(side) for side in shape.split("x"))
        problem = made_linear(o, d, torch.device(device), pattern, rank)
        rows.append(measure(problem, iterations))
        if sweeps:
            rows[-1]["sweep"] = sweep(problem, iterations)
        show(rows[-1])
    if out:
        name = torch.cuda.get_device_name() if device == "cuda" else device
        made_with = {"commit": commit(), "machine": f"{name}, torch {torch.__version__}"}
        out.write_text(json.dumps({**made_with, "linears": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
