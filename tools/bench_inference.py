"""Measure time and memory of a packed linear S + U·V against the dense one, over shapes and numbers of tokens.

    python tools/bench_inference.py --shape 1024x4096 --shape 4096x4096 --pattern 2:4 --rank 64 --json OUT.json
    python tools/bench_inference.py --device cuda --dtype bfloat16 --graphs --tokens 1 --tokens 16 --tokens 4096
    python tools/bench_inference.py --device cuda --dtype bfloat16 --graphs --pattern 8:16 --shape 28672x8192
    python tools/bench_inference.py --values int4 --dtype bfloat16 --tokens 1

These ways multiply the same x [tokens, d], where tokens is batch times sequence, and 1 is generation for one reader:

    dense       torch's linear with W = S + U·V merged, as `streamslr export --to dense` writes it
    packed      SparseLowRankLinear as it is loaded: the way that the last lines name
    stored      with --values: as packed, with S of the same pattern in --dtype
    unfused     S unpacked whole before each product, by torch on a GPU and the C library on a CPU
    kept dense  SparseLowRankLinear after keep_dense(): S dense beside its packed form
    triton      on a GPU: the Triton kernel for packed S, where it passed its check; sparse tensor cores are not asked
    tiles       on a GPU: S unpacked tile by tile into the product

They take turns in one process on the same threads, so that other load slows all of them alike. Ratios are between
medians over --repeats; on a CPU with one thread, of that thread's CPU time; on a GPU a reading is of ten calls in a
row. Memory is the bytes of the weights over those of the dense weight. A linear of less than 50 MB may stay in a GPU's
L2 cache from call to call: for few tokens take a larger one. --graphs replays a CUDA graph of each way, without the
host's time for launches, as servers do; a way that cannot be captured is left out, with its reason.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from bench_block import commit
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from streamslr.io.packed_layout import number_dtype
from streamslr.io.packing import merge, pack, pack_on_grid, unpack_rows
from streamslr.runtime import triton_product
from streamslr.runtime.linear import SparseLowRankLinear, _GpuKernel
from streamslr.runtime.packed_rows import unpack_native, why_not_native
from streamslr.spec.pattern import SparsityPattern, parse_pattern
from streamslr.spec.values import ValueFormat, grid_of, group_count, parse_values, spread


@click.command(help=__doc__)
@click.option("--shape", "shapes", multiple=True, default=["4096x4096"], show_default=True, help="OxD, repeatable.")
@click.option("--pattern", default="2:4", show_default=True)
@click.option(
    "--values", default="stored", show_default=True, help="Format of the values of S, such as int4 or fp8/64."
)
@click.option("--rank", default=64, show_default=True)
@click.option("--tokens", multiple=True, type=int, default=[1, 16, 128, 512, 2048], show_default=True)
@click.option("--dtype", "dtypes", multiple=True, default=["bfloat16", "float32"], show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@click.option("--repeats", default=9, show_default=True)
@click.option("--graphs", is_flag=True, help="Replay CUDA graphs.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the readings here.")
@torch.inference_mode()
def main(
    shapes: tuple[str, ...],
    pattern: str,
    values: str,
    rank: int,
    tokens: tuple[int, ...],
    dtypes: tuple[str, ...],
    device: str,
    threads: int,
    repeats: int,
    graphs: bool,
    json_path: Path | None,
) -> None:
    if graphs and device != "cuda":
        raise click.UsageError("--graphs needs --device cuda")
    torch.set_num_threads(threads)
    rows = []
    for shape in shapes:
        o, d = map(int, shape.lower().split("x"))
        for dtype in dtypes:
            settings = o, d, parse_pattern(pattern), rank, getattr(torch, dtype), device
            linear = random_linear(*settings, grid_of(parse_values(values)))
            beside = {} if values == "stored" or pattern == "dense" else {"stored": random_linear(*settings)}
            for n in tokens:
                rows.append(measure(linear, n, repeats, graphs, beside) | {"dtype": dtype})
                click.echo(f"{shape} {dtype} {n} tokens: {rows[-1]['time_to_dense']}", err=True)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {threads} thread(s)"
    machine = f"{where}, torch {torch.__version__}"
    show(rows, f"{pattern} + {rank}, values {values}, on {machine}: time / dense, below 1 is better")
    if json_path:
        record = {
            "command": f"python {' '.join(sys.argv)}",
            "commit": commit(),
            "machine": machine,
            "pattern": pattern,
            "values": values,
            "rank": rank,
        }
        json_path.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


def random_linear(
    o: int,
    d: int,
    pattern: SparsityPattern,
    rank: int,
    dtype: torch.dtype,
    device: str,
    values: ValueFormat | None = None,
) -> SparseLowRankLinear:
    W = torch.randn(o, d, device=device)
    S = W * pattern.project(W)
    if values is None:
        parts = pack(S, pattern, dtype)
    else:
        scales = torch.full((o, group_count(d, values.group)), 4 / values.largest, device=device)
        parts = pack_on_grid(values.nearest(S / spread(scales, d)), scales, pattern, dtype, values)
    linear = empty_linear((o, d), pattern, rank, parts, values)
    if rank:
        parts |= {"U": torch.randn(o, rank).to(dtype), "V": torch.randn(rank, d).to(dtype)}
    linear.load_state_dict(parts)
    return linear


def empty_linear(
    shape: tuple[int, int],
    pattern: SparsityPattern,
    rank: int,
    parts: Mapping[str, Tensor],
    values: ValueFormat | None,
) -> SparseLowRankLinear:
    """Return a linear to load parts into, on their device."""
    (o, d), nonzeros = shape, int(parts["row_offsets"][-1]) if "row_offsets" in parts else None
    dtype, device = number_dtype(parts), parts["values"].device
    return SparseLowRankLinear(d, o, pattern, rank, nonzeros=nonzeros, dtype=dtype, device=device, values=values)


def measure(
    linear: SparseLowRankLinear,
    tokens: int,
    repeats: int,
    graphs: bool = False,
    beside: Mapping[str, SparseLowRankLinear] | None = None,
) -> dict[str, Any]:
    """Time the ways, and other linears of this shape by their name, in turns; return medians as ratios to dense."""
    o, d = linear.out_features, linear.in_features
    parts = linear.packed()
    dtype, device = number_dtype(parts), linear.values.device
    W = merge(parts, linear.pattern, (o, d), dtype)
    kept_dense = second(linear)
    kept_dense.keep_dense()
    x = torch.randn(tokens, d, device=device).to(dtype)
    scales_dtype = None if linear.scales is None else linear.scales.dtype
    native = device.type == "cpu" and why_not_native(linear.pattern, linear.values.dtype, scales_dtype) is None
    unpack = unpack_native if native else unpack_rows
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def unfused() -> Tensor:
        y = nn.functional.linear(x, unpack(parts, linear.pattern, (o, d), slice(0, o)).to(dtype))
        if linear.U is None or linear.V is None:
            return y
        return torch.addmm(y, nn.functional.linear(x, linear.V), linear.U.t())

    ways: dict[str, Callable[[], object]] = {
        "dense": lambda: nn.functional.linear(x, W),
        "packed": lambda: linear(x),
        **{name: partial(other, x) for name, other in (beside or {}).items()},
        "unfused": unfused,
        "kept dense": lambda: kept_dense(x),
    }
    if device.type == "cuda":
        ways |= ways_by_operator(linear, x)
    if graphs:
        ways = captured(ways)
    calls = 10 if device.type == "cuda" else 1
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):  # the first warms up
        for name, way in ways.items():
            start = clock()
            for _ in range(calls):
                way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append((clock() - start) / calls)
    medians = {name: statistics.median(readings) for name, readings in seconds.items()}
    held = {"packed": nbytes(linear), "unfused": nbytes(linear), "kept dense": nbytes(kept_dense)}
    return {
        "shape": [o, d],
        "tokens": tokens,
        "kernel": linear.kernel,
        "dense_ms": round(1e3 * medians["dense"], 3),
        "time_to_dense": {name: round(medians[name] / medians["dense"], 2) for name in ways if name != "dense"},
        "memory_to_dense": {name: round(held[name] / W.nbytes, 4) for name in held},
    }


def second(linear: SparseLowRankLinear) -> SparseLowRankLinear:
    """Return a linear of the same parts, whose kernel is not chosen yet."""
    shape = linear.out_features, linear.in_features
    made = empty_linear(shape, linear.pattern, linear.rank, linear.packed(), linear.value_format)
    made.load_state_dict(linear.packed())
    return made


def ways_by_operator(linear: SparseLowRankLinear, x: Tensor) -> dict[str, Callable[[], object]]:
    """Return the ways of a GPU that read S packed, whatever kernel the linear would choose."""
    packed = second(linear)
    packed._gpu_kernel = _GpuKernel("not asked")

    def tiles() -> Tensor:
        with mock.patch.object(triton_product, "DEVICES", set()):
            y: Tensor = packed(x)
        return y

    scales_dtype = None if linear.scales is None else linear.scales.dtype
    fault = triton_product.fault(linear.pattern, x.device, x.dtype, linear.values.dtype, scales_dtype)
    if fault:
        click.echo(f"triton is left out: {fault}", err=True)
        return {"tiles": tiles}
    return {"triton": lambda: packed(x), "tiles": tiles}


def captured(ways: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Return the replays of a CUDA graph of each way, but of those that CUDA does not capture."""
    replays: dict[str, Callable[[], object]] = {}
    for name, way in ways.items():
        way()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                way()
        except RuntimeError as error:
            click.echo(f"{name} is left out of the graphs: {str(error).partition(chr(10))[0]}", err=True)
        else:
            replays[name] = graph.replay
    return replays


def nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    ways = list(dict.fromkeys(name for row in rows for name in row["time_to_dense"]))
    for name in ("shape", "dtype", "tokens", "dense ms", *ways, "memory packed", "kept dense"):
        table.add_column(name, justify="right")
    for row in rows:
        times, memory = row["time_to_dense"], row["memory_to_dense"]
        table.add_row(
            "x".join(map(str, row["shape"])),
            row["dtype"],
            str(row["tokens"]),
            str(row["dense_ms"]),
            *(f"{times[name]:.2f}" if name in times else "" for name in ways),
            f"{memory['packed']:.3f}",
            f"{memory['kept dense']:.3f}",
        )
    Console(width=140).print(table)
    for kernel in sorted({row["kernel"] for row in rows}):
        click.echo(f"packed: {kernel}")


if __name__ == "__main__":
    main()
