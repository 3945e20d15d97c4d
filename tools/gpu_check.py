"""Prove on one GPU what no machine without one can show, in under ten minutes, and write it down.

    python tools/gpu_check.py                              # all sections, the shapes below
    python tools/gpu_check.py --only card --only bytes     # some of them
    python tools/gpu_check.py --out FILE --minutes 8       # no section begins after 8 minutes

| section | what it shows |
|---|---|
| card | memory of the CUDA context; rates of products, copies and factorizations, the ones that counts assume |
| bytes | a small model compressed twice, and killed and resumed: the same bytes |
| block-8b | one Llama-3-8B block, 128 windows of 2048 tokens, twice: seconds a phase, plan / peak, the same bytes |
| block-70b-45gb, block-70b-24gb | one Llama-3-70B block within a budget: seconds, plan / peak; 45 GB in int4 too |
| solver | loss and time against the textbook procedure |
| inference | a packed linear on sparse tensor cores against the dense one |

Each section's figures are in the JSON as soon as it ends; one that fails leaves its error there and the next begins.
The file is tools/results/gpu-CARD.json, and the README's table of measured figures, between its two marks, is made
from it.

Without a GPU every section runs on the pretended one (tools/pretended_gpu) in a small shape, so that this file cannot
rot; nothing is written into the README then, and no figure is one of speed.

The machine needs this working tree and Python 3.11 or newer with torch built for its CUDA, but no network: bring wheels
of what pyproject.toml names, and of what that needs, made by

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d wheels PACKAGE…

and install them with `pip install --no-index --no-deps --target DIRECTORY wheels/*.whl`, DIRECTORY in PYTHONPATH. On a
machine with torch, numpy, rich, jinja2, accelerate and psutil these were enough: transformers, huggingface_hub,
hf_xet, httpx2, httpcore2, truststore, idna, tokenizers, safetensors, typer, click, zarr, numcodecs, donfig,
google_crc32c, msgspec.
Disk: 20 GB for 70B.
"""

import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import bench_block
import bench_inference
import bench_solver
import click
import torch
from bench_block import SHAPES, bench, commit, make_apart
from bench_solver import made_linear, textbook
from rich.console import Console

from streamslr.config import RunConfig
from streamslr.io.durable import file_sha256, write_json
from streamslr.run.context import open_run
from streamslr.run.loop import run
from streamslr.solvers import ThreeBasil, parse_pattern
from streamslr.spec.values import grid_of, parse_values
from streamslr.tensors import tf32_products

RESULTS, README = Path(__file__).with_name("results"), Path(__file__).parents[1] / "README.md"
_MARKS = "<!-- gpu_check: begin -->", "<!-- gpu_check: end -->"


Figures = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """Where the sections run, and how large."""

    scratch: Path  # folder for models and outputs
    pretended: bool  # no GPU here: small shapes on the pretended one

    def device(self) -> AbstractContextManager[object]:
        """Return the pretended GPU to enter, or nothing to enter where there is a real one."""
        return pretended_gpu() if self.pretended else nullcontext()

    def folder(self, name: str) -> Path:
        """Return an empty folder of this name in the scratch folder."""
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder


def pretended_gpu() -> AbstractContextManager[object]:
    """Return a pretended GPU whose tensors have values."""
    from pretended_gpu import PretendedGpu

    return PretendedGpu()


def card(check: Check) -> Figures:
    """Measure the card: the context's memory, and the rates that tools/count_block.py assumes."""
    n, k = (256, 64) if check.pretended else (8192, 64)
    with check.device():
        properties = torch.cuda.get_device_properties(0)
        torch.zeros(1, device="cuda")
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        square = torch.randn(n, n, device="cuda")
        low, tall = square.bfloat16(), torch.randn(4 * n, k, device="cuda")
        gram = (square @ square.T / n).diagonal_scatter(torch.full((n,), 2.0, device="cuda"))
        host, pinned = torch.empty(n, n), torch.empty(n, n).pin_memory()
        gigabytes, flops = square.nbytes / 1e9, 2 * n**3 / 1e12
        seconds = {
            "bf16 product": _seconds(lambda: low @ low),
            "float32 product": _seconds(lambda: square @ square),
            "device copy": _seconds(square.clone),
            "pageable to device": _seconds(lambda: square.copy_(host)),
            "pinned to device": _seconds(lambda: square.copy_(pinned, non_blocking=True)),
            "device to pinned": _seconds(lambda: pinned.copy_(square, non_blocking=True)),
            "cholesky": _seconds(lambda: torch.linalg.cholesky_ex(gram)),
            "cholesky_inverse": _seconds(lambda: torch.cholesky_inverse(gram)),
            f"QR of {4 * n}×{k}": _seconds(lambda: torch.linalg.qr(tall)),
        }
        with tf32_products():
            seconds["TF32 product"] = _seconds(lambda: square @ square)
        rates = {name: f"{flops / s:.4g} TFLOP/s" for name, s in seconds.items() if name.endswith("product")}
        rates |= {name: f"{gigabytes / s:.4g} GB/s" for name, s in seconds.items() if "device" in name}
        return {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "context_bytes": context,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "n": n,
            "seconds": seconds,
            "rates": rates,
        }


def _seconds(work: Callable[[], object]) -> float:
    """Return the fastest of four calls after one that warms up."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def same_bytes(check: Check) -> Figures:
    """Compress a small model twice, and once more killed after its first block and resumed; compare all files."""
    folder, shape = check.folder("bytes"), "tiny" if check.pretended else "small"
    samples, seq_len = SHAPES[shape].samples, SHAPES[shape].seq_len
    make_apart(folder, shape, 2, samples * seq_len, 0)

    def settings(out: str) -> Figures:
        paths = {"model": folder / "model", "calibration": folder / "text.txt", "out": folder / out}
        method = {"method": "wanda", "rank": 0} if check.pretended else {"rank": 16}  # the solver takes minutes there
        return paths | method | {"samples": samples, "seq_len": seq_len, "device": "cuda", "match_epochs": 3}

    for out in ("first", "second"):
        _compress(settings(out), check.pretended)
    process = get_context("spawn").Process(target=_compress, args=(settings("killed"), check.pretended))
    process.start()
    while process.is_alive() and len(list((folder / "killed").glob("model-block-*.safetensors"))) < 1:
        process.join(0.05)
    killed = process.is_alive()
    if process.pid and killed:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    _compress(settings("killed"), check.pretended)
    digests = {out: _digests(folder / out) for out in ("first", "second", "killed")}
    different = {out: sorted(n for n, d in digests["first"].items() if of.get(n) != d) for out, of in digests.items()}
    return {
        "files": len(digests["first"]),
        "killed_while_running": killed,
        "same_twice": not different["second"],
        "same_after_kill": not different["killed"],
        "different": {out: names for out, names in different.items() if names},
    }


def _compress(settings: Mapping[str, Any], pretended: bool) -> None:
    with pretended_gpu() if pretended else nullcontext():
        run(open_run(RunConfig.of(**settings)))


def _digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every shard of a compressed folder; the journal beside them holds times."""
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors*"))}


def block(shape: str, *settled: tuple[str, str]) -> Callable[[Check], Figures]:
    """Return a section that compresses one block by each budget and values, and compares equal values' bytes."""

    def section(check: Check) -> Figures:
        name = "tiny" if check.pretended else shape
        sizes = SHAPES[name]
        settings: Figures = {"samples": sizes.samples, "seq_len": sizes.seq_len, "rank": 64, "device": "cuda"}
        if check.pretended:
            settings |= {"method": "wanda", "rank": 0, "match_epochs": 2}
        folder = check.folder(shape)
        make_apart(folder, name, 1, settings["samples"] * settings["seq_len"], 0)
        runs = []
        for budget, values in settled:
            shutil.rmtree(folder / "out", ignore_errors=True)
            own = settings | {"gpu_mem": budget, "values": values}
            with check.device():
                runs.append(bench(folder, name, own, 64 if check.pretended else None))
            if not check.pretended:
                bench_block.show(Console(width=100), runs[-1])
        shutil.rmtree(folder)
        shards = {(values, run["blocks"][0]["sha256"]) for (_, values), run in zip(settled, runs, strict=True)}
        return {"runs": runs, "same_bytes": len(shards) == len({values for _, values in settled})}

    return section


def solver(check: Check) -> Figures:
    """Solve made linears by the solver and by the textbook procedure."""
    sizes = [(64, 64)] if check.pretended else [(2048, 2048), (4096, 4096)]
    ways = {"ours": ThreeBasil().solve, "textbook": textbook}
    rank, rows = (4, []) if check.pretended else (64, [])
    with check.device():
        for o, d in sizes:
            name, W, H = made_linear(o, d, "cpu" if check.pretended else "cuda")
            W, H = W.to("cuda"), H.to("cuda")
            rows.append(bench_solver.measure(name, W, H, parse_pattern("2:4"), rank, ways, None))
    return {"rows": rows}


def inference(check: Check) -> Figures:
    """Time a packed 2:4 + 64 linear, with values as stored and in int4, beside the dense one."""
    shapes, tokens = ([(64, 64)], (1, 32)) if check.pretended else ([(8192, 8192), (28672, 8192)], (1, 16, 2048))
    rows = []
    with check.device(), torch.inference_mode():
        for o, d in shapes:
            for values in ("stored", "int4"):
                settings = parse_pattern("2:4"), 64, torch.bfloat16, "cuda", grid_of(parse_values(values))
                linear = bench_inference.random_linear(o, d, *settings)
                measured = [bench_inference.measure(linear, n, repeats=3 if check.pretended else 9) for n in tokens]
                rows += [row | {"values": values} for row in measured]
    return {"rows": rows}


SECTIONS: Mapping[str, Callable[[Check], Figures]] = {
    "card": card,
    "bytes": same_bytes,
    "block-8b": block("llama-3-8b", ("45GB", "stored"), ("45GB", "stored")),
    "block-70b-45gb": block("llama-3-70b", ("45GB", "stored"), ("45GB", "int4")),
    "block-70b-24gb": block("llama-3-70b", ("24GB", "stored")),
    "inference": inference,
    "solver": solver,
}


@click.command(help=__doc__)
@click.option("--only", "names", multiple=True, type=click.Choice(list(SECTIONS)), help="Can be repeated.")
@click.option("--minutes", default=9.0, show_default=True, help="No section begins after these.")
@click.option("--scratch", type=click.Path(path_type=Path, exists=True), help="Folder to make the temporary folder in.")
@click.option("--commit", "known_commit", help="Commit to write into the JSON where there is no git.")
@click.option(
    "--out", "to", type=click.Path(path_type=Path), help="JSON to write [default: tools/results/gpu-CARD.json]."
)
def main(
    names: tuple[str, ...], minutes: float, scratch: Path | None, known_commit: str | None, to: Path | None
) -> None:
    pretended, begun = not torch.cuda.is_available(), time.monotonic()
    where = "pretended GPU" if pretended else torch.cuda.get_device_name()
    if to is None and not pretended:
        to = RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', where.lower())}.json"
    record: Figures = {
        "command": " ".join(["python", *sys.argv]),
        "commit": known_commit or commit(),
        "device": where,
        "sections": {},
    }
    failed = []
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        check = Check(Path(temporary), pretended)
        for name in names or SECTIONS:
            if time.monotonic() - begun > 60 * minutes:
                record["sections"][name] = {"skipped": f"{minutes:g} minutes were over"}
                continue
            start = time.monotonic()
            try:
                figures = SECTIONS[name](check)
            except Exception:  # whatever it is, the other sections still have something to show
                figures = {"error": traceback.format_exc()}
                failed.append(name)
                click.echo(figures["error"], err=True)
            record["sections"][name] = {"section_seconds": round(time.monotonic() - start, 1), **figures}
            click.echo(
                f"{name}: {'failed' if name in failed else 'done'} in {time.monotonic() - start:.1f} s", err=True
            )
            if to:
                write_json(to, record)
    lines = summary(record)
    click.echo("\n".join(lines))
    if not pretended and README.is_file() and not names:
        put_between(README, _MARKS, lines)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def summary(record: Mapping[str, Any]) -> list[str]:
    """Return the figures for people, as a table in Markdown."""
    sections = record["sections"]
    lines = [f"Measured on {record['device']} at {record['commit']} by `tools/gpu_check.py`:", ""]
    lines += ["| what | figure |", "|---|---|"]
    if (found := sections.get("bytes", {})).get("files"):
        lines.append(
            f"| same bytes twice; after a kill | {_yes(found['same_twice'])}; {_yes(found['same_after_kill'])} |"
        )
    for name, found in sections.items():
        for one in found.get("runs", ()):
            phases = one["blocks"][0]["phases"]
            times = ", ".join(
                f"{phase} {row['seconds']:.1f}" for phase, row in phases.items() if row["seconds"] >= 0.05
            )
            ratios = [
                row["gpu"]["planned_to_peak"] for row in phases.values() if row.get("gpu", {}).get("planned_to_peak")
            ]
            peak = max(row["gpu"]["peak_bytes"] for row in phases.values() if "gpu" in row) / 1e9
            what = f"{name.removeprefix('block-')}, values {one['settings']['values']}"
            lines.append(
                f"| {what}: seconds a block | {one['blocks'][0]['seconds']:.1f} ({times}); peak "
                f"{peak:.1f} GB, plan / peak {min(ratios):.2f} to {max(ratios):.2f} |"
            )
    for row in sections.get("solver", {}).get("rows", ()):
        ours, slow = row["ours"], row["textbook"]
        lines.append(
            f"| solver, {row['linear']}, against the textbook | {ours['seconds'] / slow['seconds']:.2f} of its time, "
            f"{ours['loss'] / slow['loss']:.2f} of its loss |"
        )
    measured = sections.get("inference", {}).get("rows", [])
    o, d = max((row["shape"] for row in measured), default=(0, 0))  # the largest stands for all
    for values in dict.fromkeys(row["values"] for row in measured):
        rows = [row for row in measured if (row["shape"], row["values"]) == ([o, d], values)]
        times = ", ".join(f"{row['time_to_dense']['packed']:.3g} ({row['tokens']})" for row in rows)
        memory = rows[0]["memory_to_dense"]["packed"]
        lines.append(
            f"| packed {o}×{d}, values {values}: time / dense (tokens) | {times}; {memory:.2f} of dense memory |"
        )
    return lines


def _yes(truth: bool) -> str:
    return "yes" if truth else "**no**"


def put_between(path: Path, marks: tuple[str, str], lines: list[str]) -> None:
    """Replace what stands between the two marks in a file."""
    text = path.read_text()
    begin, end = (text.index(mark) for mark in marks)
    path.write_text(text[: begin + len(marks[0])] + "\n" + "\n".join(lines) + "\n" + text[end:])


if __name__ == "__main__":
    main()
