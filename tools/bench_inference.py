"""Measure time and memory of a packed linear S + U·V against the dense one, over shapes and numbers of tokens.

    python tools/bench_inference.py --shape 1024x4096 --shape 4096x4096 --pattern 2:4 --rank 64 --json OUT.json
    python tools/bench_inference.py --device cuda --dtype bfloat16 --tokens 1 --tokens 4096

Four ways multiply the same x [tokens, d], where tokens is batch times sequence, and 1 is generation for one reader:

    dense       torch's linear with W = S + U·V merged, as `streamslr export --to dense` writes it
    packed      SparseLowRankLinear as it is loaded: sparse tensor cores, packed rows multiplied, or S unpacked in tiles
    unfused     S unpacked whole before each product, by torch on a GPU and the C library on a CPU
    kept dense  SparseLowRankLinear after keep_dense(): S dense beside its packed form

They take turns in one process on the same threads, so that other load slows all of them alike. Ratios are between
medians over --repeats; on a CPU with one thread, of that thread's CPU time. Memory is the bytes of the weights over
those of the dense weight.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from streamslr.io.packing import merge, pack, unpack_rows
from streamslr.runtime.linear import SparseLowRankLinear
from streamslr.runtime.packed_rows import unpack_native, why_not_native
from streamslr.spec.pattern import SparsityPattern, parse_pattern


@click.command(help=__doc__)
@click.option("--shape", "shapes", multiple=True, default=["4096x4096"], show_default=True, help="OxD, repeatable.")
@click.option("--pattern", default="2:4", show_default=True)
@click.option("--rank", default=64, show_default=True)
@click.option("--tokens", multiple=True, type=int, default=[1, 16, 128, 512, 2048], show_default=True)
@click.option("--dtype", "dtypes", multiple=True, default=["bfloat16", "float32"], show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@click.option("--repeats", default=9, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the readings here.")
@torch.inference_mode()
def main(
    shapes: tuple[str, ...],
    pattern: str,
    rank: int,
    tokens: tuple[int, ...],
    dtypes: tuple[str, ...],
    device: str,
    threads: int,
    repeats: int,
    json_path: Path | None,
) -> None:
    torch.set_num_threads(threads)
    rows = []
    for shape in shapes:
        o, d = map(int, shape.lower().split("x"))
        for dtype in dtypes:
            linear = random_linear(o, d, parse_pattern(pattern), rank, getattr(torch, dtype), device)
            for n in tokens:
                rows.append(measure(linear, n, repeats) | {"dtype": dtype})
                click.echo(f"{shape} {dtype} {n} tokens: {rows[-1]['time_to_dense']}", err=True)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {threads} thread(s)"
    machine = f"{where}, torch {torch.__version__}"
    show(rows, f"{pattern} + {rank} on {machine}: time / dense, below 1 is better")
    if json_path:
        record = {"command": f"python {' '.join(sys.argv)}", "machine": machine, "pattern": pattern, "rank": rank}
        json_path.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


def random_linear(
    o: int, d: int, pattern: SparsityPattern, rank: int, dtype: torch.dtype, device: str
) -> SparseLowRankLinear:
    W = torch.randn(o, d, device=device)
    parts = pack(W * pattern.project(W), pattern, dtype)
    linear = SparseLowRankLinear(d, o, pattern, rank, nonzeros=len(parts["values"]), dtype=dtype, device=device)
    if rank:
        parts |= {"U": torch.randn(o, rank).to(dtype), "V": torch.randn(rank, d).to(dtype)}
    linear.load_state_dict(parts)
    return linear


def measure(linear: SparseLowRankLinear, tokens: int, repeats: int) -> dict[str, Any]:
    """Time the four ways in turns; return medians and memory as ratios to the dense one."""
    o, d = linear.out_features, linear.in_features
    parts = linear.packed()
    dtype, device = linear.values.dtype, linear.values.device
    W = merge(parts, linear.pattern, (o, d), dtype)
    kept_dense = SparseLowRankLinear(
        d, o, linear.pattern, linear.rank, nonzeros=len(linear.values), dtype=dtype, device=device
    )
    kept_dense.load_state_dict(parts)
    kept_dense.keep_dense()
    x = torch.randn(tokens, d, device=device).to(dtype)
    native = device.type == "cpu" and why_not_native(str(linear.pattern), dtype) is None
    unpack = unpack_native if native else unpack_rows
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def unfused() -> Tensor:
        y = nn.functional.linear(x, unpack(parts, linear.pattern, (o, d), slice(0, o)))
        if linear.U is None or linear.V is None:
            return y
        return torch.addmm(y, nn.functional.linear(x, linear.V), linear.U.t())

    ways: Mapping[str, Callable[[], Tensor]] = {
        "dense": lambda: nn.functional.linear(x, W),
        "packed": lambda: linear(x),
        "unfused": unfused,
        "kept dense": lambda: kept_dense(x),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):  # the first warms up
        for name, way in ways.items():
            start = clock()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(clock() - start)
    medians = {name: statistics.median(readings) for name, readings in seconds.items()}
    held = {"packed": nbytes(linear), "unfused": nbytes(linear), "kept dense": nbytes(kept_dense)}
    return {
        "shape": [o, d],
        "tokens": tokens,
        "kernel": linear.kernel,
        "dense_ms": round(1e3 * medians["dense"], 3),
        "time_to_dense": {name: round(medians[name] / medians["dense"], 2) for name in held},
        "memory_to_dense": {name: round(held[name] / W.nbytes, 4) for name in held},
    }


def nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for name in ("shape", "dtype", "tokens", "dense ms", *rows[0]["time_to_dense"], "memory packed", "kept dense"):
        table.add_column(name, justify="right")
    for row in rows:
        times, memory = row["time_to_dense"], row["memory_to_dense"]
        table.add_row(
            "x".join(map(str, row["shape"])),
            row["dtype"],
            str(row["tokens"]),
            str(row["dense_ms"]),
            *(f"{ratio:.2f}" for ratio in times.values()),
            f"{memory['packed']:.3f}",
            f"{memory['kept dense']:.3f}",
        )
    Console(width=140).print(table)
    for kernel in sorted({row["kernel"] for row in rows}):
        click.echo(f"packed: {kernel}")


if __name__ == "__main__":
    main()
