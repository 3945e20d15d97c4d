"""Measure time, memory and FLOP/s of a whole run on one block of a large model, against its plan.

    export PYTHONPATH=.
    python tools/bench_block.py --shape llama-3-70b --gpu-mem 45GB --host-mem 24GB --device cuda --json 70b-45gb.json
    python tools/bench_block.py --shape llama-3-70b --gpu-mem 24GB --host-mem 24GB --device cuda --json 70b-24gb.json
    python tools/bench_block.py --shape small --device cpu      # under a minute

The tool makes a checkpoint with blocks of the model's true shape and a vocabulary of 2048, in a temporary folder under
--scratch, drops it from the page cache, and compresses it as `streamslr run` does. Every figure is the journal's or the
plan's. A linear is packed in phase solve as soon as it is solved, and the shard is written during propagate.

FLOP/s of a phase are the plan's FLOPs of one block over the measured seconds. They are compared with one large matrix
product on the same device after the run, in bf16, on a CPU in float32. The time of all blocks is the time of
the last block times the real model's number of blocks; with `--blocks 2` the last block's tensors were prefetched.

Weights resemble trained ones: normal entries, columns scaled lognormally, and 32 directions added whose singular values
fall as k^-0.7 from three times the largest of the rest. Embeddings have lognormal channels, a few of them 20 times
larger, so that Grams have outlier directions. Norms are lognormal around 1. The text is the demo model's, its
paragraphs shuffled and repeated.

A machine with a GPU needs this working tree, but no network. Bring wheels made for its Python (3.11 or newer) by
`pip download -d wheels` on a machine like it: torch built for its CUDA, transformers, safetensors, huggingface-hub,
zarr, psutil, click and rich in pyproject.toml's ranges, and what these depend on. Then the lines above work in the root
of the tree. Disk: the block in bf16 and two boundaries of hidden states, 12 GB for 70B.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from logging.handlers import BufferingHandler
from math import sqrt
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import click
import make_checkpoint
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from streamslr.config import RunConfig, format_bytes
from streamslr.errors import StreamslrError
from streamslr.io.safetensors_file import DTYPE_NAMES
from streamslr.memory import held
from streamslr.run.context import open_run
from streamslr.run.costs import PhaseCost
from streamslr.run.loop import run
from streamslr.run.plan import Plan
from streamslr.run.progress import NoDisplay

DEMO = Path(__file__).with_name("demo_model")
Rows = dict[str, dict[str, Any]]
"""Phase -> its figures, measured and planned."""

_CHARACTERS_PER_TOKEN = 6
"""Characters written for each token wanted: more than the demo's tokenizer puts into one."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama's blocks, their number, and the default windows to pass through one."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    blocks: int
    samples: int = 128
    seq_len: int = 2048


SHAPES = {
    "llama-3-8b": Shape(4096, 14336, 32, 8, 32),
    "llama-3-70b": Shape(8192, 28672, 64, 8, 80),
    "llama-3.1-405b": Shape(16384, 53248, 128, 8, 126),
    "small": Shape(512, 1792, 8, 2, 8, samples=16, seq_len=256),
    "tiny": Shape(64, 192, 4, 2, 2, samples=4, seq_len=64),
}


def make(folder: Path, shape: Shape, blocks: int, tokens: int, seed: int) -> None:
    """Write a checkpoint and its calibration text, `folder`/model and `folder`/text.txt.

    Args:
        folder: Existing folder.
        shape: Sizes of the model.
        blocks: Number of blocks to make.
        tokens: Tokens that the text has at least.
        seed: Seed of weights and of the order of paragraphs.
    """
    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": blocks,
        "max_position_embeddings": 131072,
    }
    out = folder / "model"
    out.mkdir()
    make_checkpoint.write(out, make_checkpoint.random(out, "llama", sizes, DEMO, seed=seed, weight=trained))
    for shard in out.glob("*.safetensors"):
        with shard.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    paragraphs = (DEMO / "calibration.txt").read_text().split("\n\n")
    order, written = Random(seed), 0
    with (folder / "text.txt").open("w") as text:
        while written < tokens * _CHARACTERS_PER_TOKEN:
            order.shuffle(paragraphs)
            written += text.write("\n\n".join(paragraphs) + "\n\n")


def make_apart(folder: Path, name: str, blocks: int, tokens: int, seed: int) -> None:
    """Call `make` for a shape of SHAPES in another process, so that its memory is not in the figures."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as maker:
        maker.submit(make, folder, SHAPES[name], blocks, tokens, seed).result()


def trained(name: str, empty: Tensor, generator: torch.Generator) -> Tensor:
    """Fill `empty` with weights that resemble trained ones, strip by strip, without a float32 copy of the whole."""

    def normal(*size: int) -> Tensor:
        return torch.empty(size).normal_(generator=generator)

    if empty.dim() < 2:
        return empty.copy_(torch.exp(0.2 * normal(len(empty))))
    o, d = empty.shape
    if "embed" in name:
        channels, left, right = torch.exp(0.5 * normal(d)), torch.zeros(o, 1), torch.zeros(1, d)
        channels[torch.randperm(d, generator=generator)[: max(4, d // 1024)]] *= 20
    else:
        strength = 3 * (sqrt(o) + sqrt(d)) * torch.arange(1, 33).float() ** -0.7
        channels, left, right = torch.exp(0.3 * normal(d)), normal(o, 32) / sqrt(o) * strength, normal(32, d) / sqrt(d)
    for start in range(0, o, 256):
        strip = normal(min(256, o - start), d).mul_(channels).addmm_(left[start : start + 256], right)
        empty[start : start + 256] = strip.mul_(1 / sqrt(d))
    return empty


def product_flops(device: torch.device, dtype: torch.dtype, n: int | None = None) -> float:
    """Measure FLOP/s of one large matrix product [n, n]: the best of five, or of as many as fit three seconds."""
    n = n or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    seconds: list[float] = []
    begun = time.monotonic()
    while len(seconds) < 6 and (time.monotonic() - begun < 3 or len(seconds) < 2):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[1:])  # the first one warms up


def compare_with_plan(plan: Plan, measured: Mapping[str, Mapping[str, float]], products: Mapping[str, float]) -> Rows:
    """Return for each phase what was measured, what was planned, and their ratios; None where the plan has no figure.

    Args:
        plan: Plan of the run.
        measured: Phase -> readings, as the journal keeps them.
        products: Dtype -> FLOP/s of one large matrix product.
    """
    planned: dict[str, PhaseCost] = {phase.name: phase for phase in plan.phases}
    rows = {}
    for name, m in measured.items():
        phase = planned.get(name)
        row: dict[str, Any] = {"seconds": m["seconds"]}
        for memory in ("host", "gpu"):
            if (peak := m.get(f"{memory}_peak_bytes")) is not None:
                plan_bytes = getattr(phase, f"{memory}_bytes", None)
                row[memory] = {
                    "peak_bytes": peak,
                    "planned_bytes": plan_bytes,
                    "planned_to_peak": plan_bytes / peak if plan_bytes and peak else None,
                }
        flops = phase.flops / plan.blocks / m["seconds"] if phase and phase.flops and m["seconds"] else None
        fractions = {dtype: flops / product for dtype, product in products.items()} if flops else {}
        rows[name] = row | {"flops_per_second": flops, "fraction_of_product": fractions}
    return rows


def table(title: str, rows: Rows, dtypes: Iterable[str]) -> Table:
    """Return `rows` as a table, one row a phase."""
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    memories = [memory for memory in ("host", "gpu") if any(memory in row for row in rows.values())]
    shown.add_column("phase")
    memory_columns = [column for memory in memories for column in (memory, "planned", "ratio")]
    for column in ("seconds", *memory_columns, "TFLOP/s", *(f"/ {dtype}" for dtype in dtypes)):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = [name, f"{row['seconds']:.2f}"]
        for memory in memories:
            figures = row.get(memory, {})
            cells += [_or_dash(figures.get(key), format_bytes) for key in ("peak_bytes", "planned_bytes")]
            cells.append(_or_dash(figures.get("planned_to_peak"), "{:.2f}".format))
        cells.append(_or_dash(row["flops_per_second"], lambda f: f"{f / 1e12:.3g}"))
        cells += [_or_dash(row["fraction_of_product"].get(dtype), "{:.0%}".format) for dtype in dtypes]
        shown.add_row(*cells)
    return shown


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "–" if value is None else text(value)


class Lines(NoDisplay):
    """Print a line as each phase begins, so that a run that is cut off has said where it was."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def phase(self, block: int | None, name: str, steps: int) -> None:
        where = name if block is None else f"block {block}: {name}"
        click.echo(f"{time.monotonic() - self._start:8.1f} s  {where}", err=True)


def commit() -> str | None:
    """Return the commit of this working tree, marked -dirty where files differ; None without git."""
    line = ["git", "-C", str(DEMO), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # the working tree was copied without its history
        return None


def bench(folder: Path, name: str, settings: Mapping[str, Any], product_size: int | None = None) -> dict[str, Any]:
    """Compress the model that `make` wrote into `folder`; return the journal's figures beside the plan's.

    Args:
        folder: Folder of the model and its text. The output goes to `folder`/out, which must not exist.
        name: Name of the shape, a key of SHAPES.
        settings: Settings of RunConfig beside model, out and calibration.
        product_size: Size of the product that FLOP/s are compared with; None for a large one.
    """
    shape, messages = SHAPES[name], BufferingHandler(10**6)
    log = logging.getLogger("streamslr")
    log.addHandler(messages)
    paths = {"model": folder / "model", "out": folder / "out", "calibration": folder / "text.txt"}
    baseline, start = held(), time.monotonic()
    try:
        context = open_run(RunConfig.of(**paths, **settings))
        journal = run(context, Lines())
    finally:
        log.removeHandler(messages)
    wall = time.monotonic() - start

    dtypes = [torch.bfloat16 if context.device.type == "cuda" else torch.float32]  # of the passes
    products = {DTYPE_NAMES[dtype]: product_flops(context.device, dtype, product_size) for dtype in dtypes}
    measured = [journal.measured, *(block.measured for block in journal.blocks)]
    parts = [compare_with_plan(context.plan, readings, products) for readings in measured]
    seconds = [sum(row["seconds"] for row in part.values()) for part in parts]
    return {
        "commit": commit(),
        "device": torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": {"name": name, **asdict(shape)},
        "settings": dict(settings),
        "micro_batch": context.plan.micro_batch,
        "in_memory": context.plan.in_memory,
        "grams_at": context.plan.grams_at,
        "solver_workspace": context.plan.solver_workspace,
        "baseline_bytes": baseline,
        "host_budget_bytes": context.plan.host_mem,
        "gpu_budget_bytes": context.plan.gpu_mem,
        "product_flops_per_second": products,
        "non_block": parts[0],
        "blocks": [
            {
                "phases": part,
                "seconds": block_seconds,
                "mean_error": sum(linear.error for linear in block.linears) / len(block.linears),
                "sha256": block.shard.sha256,
            }
            for part, block_seconds, block in zip(parts[1:], seconds[1:], journal.blocks, strict=True)
        ],
        "wall_seconds": wall,
        "wall_to_phases": wall / sum(seconds),
        "all_blocks_hours": shape.blocks * seconds[-1] / 3600,
        "warnings": [entry.getMessage() for entry in messages.buffer if entry.levelno >= logging.WARNING],
    }


@click.command(help=__doc__)
@click.option("--shape", "name", type=click.Choice(list(SHAPES)), required=True)
@click.option("--blocks", default=1, help="Blocks to make and compress.")
@click.option("--samples", type=int, help="Windows [default: the shape's].")
@click.option("--seq-len", type=int, help="Tokens in a window [default: the shape's].")
@click.option("--pattern", default="2:4")
@click.option("--rank", default=64)
@click.option("--seed", default=0)
@click.option("--device", type=click.Choice(["cpu", "cuda"]))
@click.option("--gpu-mem")
@click.option("--host-mem")
@click.option(
    "--set", "others", multiple=True, metavar="NAME=VALUE", help="Another setting of RunConfig; can be repeated."
)
@click.option("--scratch", type=click.Path(path_type=Path, exists=True), help="Folder to make the temporary folder in.")
@click.option("--commit", "known_commit", help="Commit to write into the JSON where there is no git.")
@click.option("--json", "to", type=click.Path(path_type=Path))
def main(
    name: str,
    blocks: int,
    samples: int | None,
    seq_len: int | None,
    seed: int,
    others: tuple[str, ...],
    scratch: Path | None,
    known_commit: str | None,
    to: Path | None,
    **settings: Any,
) -> None:
    shape = SHAPES[name]
    settings |= {"samples": samples or shape.samples, "seq_len": seq_len or shape.seq_len, "seed": seed}
    settings |= {key.replace("-", "_"): _value(value) for key, value in (change.split("=", 1) for change in others)}
    logging.basicConfig(format="%(message)s")
    logging.getLogger("streamslr").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        folder = Path(temporary)
        try:
            make_apart(folder, name, blocks, settings["samples"] * settings["seq_len"], seed)
            record = bench(folder, name, settings)
        except StreamslrError as error:
            raise SystemExit(str(error)) from error
    record = {"command": " ".join(["python", *sys.argv]), **record}
    record["commit"] = known_commit or record["commit"]
    show(Console(width=100), record)
    if to:
        to.write_text(json.dumps(record, indent=2) + "\n")


def show(console: Console, record: Mapping[str, Any]) -> None:
    """Print the figures that go into the JSON."""
    name, products, blocks = record["shape"]["name"], record["product_flops_per_second"], record["blocks"]
    console.print(table("before the blocks", record["non_block"], products))
    for i, block in enumerate(blocks):
        console.print(table(f"{name}, block {i}: {block['seconds']:.1f} s", block["phases"], products))
    reached = ", ".join(f"{flops / 1e12:.3g} TFLOP/s in {dtype}" for dtype, flops in products.items())
    click.echo(f"{record['device']}, torch {record['torch']}")
    click.echo(f"a large product reaches {reached}")
    click.echo(f"wall / phases {record['wall_to_phases']:.2f}, {len(record['warnings'])} warnings")
    number, seconds = record["shape"]["blocks"], blocks[-1]["seconds"]
    click.echo(f"all {number} blocks of {name}: {record['all_blocks_hours']:.2f} h, {number} × {seconds:.1f} s")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]} × {len(names)}" if names else "cpu"


def _value(text: str) -> Any:
    """Return the number or truth value that `text` is, else the text itself, like 4GB."""
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
