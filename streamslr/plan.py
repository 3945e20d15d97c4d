"""Bytes and FLOPs of each phase from headers alone, before any work; refuses what cannot fit. Pure arithmetic."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from streamslr.config import RunConfig, format_bytes
from streamslr.errors import BudgetError
from streamslr.solve.pattern import SparsityPattern
from streamslr.solve.threebasil import solve_bytes, solve_flops

BATCH_TOKENS = 2048
"""Tokens of a micro-batch: one window of the papers' length."""

_LIBRARY_BUFFERS = 176 * 2**20
"""Host memory that torch, zarr and the tokenizer come to hold beside the tensors: their buffers, 50 to 85 MB, and the
pages of their own code, up to 80 MB, on the CPU (tools/bench_run.py)."""

_BATCH_PHASES = ("embed", "grams", "propagate")  # whose memory grows with the windows

_SOLVE_ITERATIONS = 250
"""Iterations of a typical layer, for the FLOPs alone: means of 220 to 280 were seen on the reference model."""

_HIDDEN_BATCHES = 6
"""Micro-batches of hidden states alive in a pass: read ahead, current, output, two queued, one being written."""


@dataclass(frozen=True)
class BlockShape:
    """What the plan needs to know of one block. linears: name -> (o, d), value bytes; grams: d of each Gram."""

    linears: Mapping[str, tuple[int, int]]
    grams: tuple[int, ...]
    parameters: int  # all of the block, in numbers
    source_bytes: int


@dataclass(frozen=True)
class ModelShape:
    """The model as headers and the meta device show it."""

    blocks: tuple[BlockShape, ...]
    hidden_size: int
    outside_parameters: int
    outside_bytes: int
    value_bytes: int  # of a weight in the shards
    eager_heads: int = 0  # attention heads, where attention is not fused
    download_bytes: int = 0
    largest_shard_bytes: int = 0


@dataclass(frozen=True)
class Phase:
    """Peak bytes while the phase runs, and FLOPs of all its runs together; of the largest block where blocks differ."""

    name: str
    host_bytes: int
    gpu_bytes: int
    flops: float


@dataclass(frozen=True)
class Plan:
    """What a run will take. `run` obeys micro_batch and in_memory; the rest is for people and for refusals."""

    device: str
    blocks: int
    micro_batch: int  # windows that pass a block together
    in_memory: bool  # hidden states are kept in host memory beside the scratch folder
    phases: tuple[Phase, ...]
    scratch_bytes: int
    output_bytes: int
    source_bytes: int
    download_bytes: int
    cache_bytes: int  # of them that lie on the disk at a time

    def as_dict(self) -> dict[str, Any]:
        """For `plan --json`."""
        return asdict(self) | {
            "host_bytes": self.host_bytes,
            "gpu_bytes": self.gpu_bytes,
            "flops": self.flops,
        }

    def table(self, host_mem: int, gpu_mem: int | None) -> Table:
        """A row a phase, for people."""
        budget = f"host budget {format_bytes(host_mem)}"
        if gpu_mem is not None:
            budget += f", gpu budget {format_bytes(gpu_mem)}"
        tier = "memory and disk" if self.in_memory else "disk"
        table = Table(
            min_width=76,
            title=f"plan: {self.blocks} blocks on {self.device}, {self.micro_batch} windows at a time, {budget}",
            caption=f"output {format_bytes(self.output_bytes)} (source {format_bytes(self.source_bytes)}), "
            f"scratch {format_bytes(self.scratch_bytes)} (hidden states: {tier})"
            + (f", to download {format_bytes(self.download_bytes)}" if self.download_bytes else ""),
        )
        for name in ("phase", "host", "gpu", "FLOPs"):
            table.add_column(name, justify="left" if name == "phase" else "right")
        for phase in self.phases:
            gpu = format_bytes(phase.gpu_bytes) if gpu_mem is not None else "–"
            table.add_row(phase.name, format_bytes(phase.host_bytes), gpu, f"{phase.flops:.2e}")
        table.add_section()
        gpu = format_bytes(self.gpu_bytes) if gpu_mem is not None else "–"
        table.add_row("peak", format_bytes(self.host_bytes), gpu, f"{self.flops:.2e}")
        return table

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        return max(phase.host_bytes for phase in self.phases)

    @property
    def gpu_bytes(self) -> int:
        return max(phase.gpu_bytes for phase in self.phases)

    def require_memory(self, host_mem: int, gpu_mem: int | None) -> None:
        """Raises BudgetError naming the phase, its bytes and the flag that would help."""
        for place, budget in (("host", host_mem), ("gpu", gpu_mem)):
            if budget is None:
                continue
            phase = max(self.phases, key=lambda p: getattr(p, f"{place}_bytes"))
            need = getattr(phase, f"{place}_bytes")
            if need > budget:
                batch = f" ({self.micro_batch} windows pass together)" if phase.name in _BATCH_PHASES else ""
                shorter = " or, in a new --out, shorten --seq-len" if batch else ""
                raise BudgetError(
                    f"phase {phase.name}{batch} needs {format_bytes(need)} of {place} memory, the budget is "
                    f"{format_bytes(budget)}; raise --{place}-mem{shorter}"
                )

    def require_disk(self, out: Path, scratch: Path, cache: Path) -> None:
        """Raises BudgetError when a file system lacks room for what is still to come to it."""
        needs = [
            (out, "output", self.output_bytes - _size(out, "*.safetensors"), "give --out on another disk"),
            (scratch, "hidden states", self.scratch_bytes - _size(scratch, "**/*"), "give --scratch on another disk"),
            (cache, "downloads", self.cache_bytes, "set HF_HOME to a folder on another disk, or give --evict-shards"),
        ]
        disks: dict[int, list[tuple[Path, str, int, str]]] = {}
        for path, what, need, advice in needs:
            place = _existing_parent(path)
            if need > 0:
                disks.setdefault(place.stat().st_dev, []).append((place, what, need, advice))
        for entries in disks.values():
            total = sum(need for _, _, need, _ in entries)
            disk = os.statvfs(entries[0][0])
            if total > (free := disk.f_bavail * disk.f_frsize):
                parts = " and ".join(f"{what} {format_bytes(need)}" for _, what, need, _ in entries)
                raise BudgetError(
                    f"{entries[0][0]} has {format_bytes(free)} free; {parts} need {format_bytes(total)} there. "
                    f"Free some, or {', or '.join(advice for *_, advice in entries)}"
                )


def _size(folder: Path, pattern: str) -> int:
    return sum(p.stat().st_size for p in folder.glob(pattern) if p.is_file())


def _existing_parent(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def make_plan(
    config: RunConfig,
    model: ModelShape,
    pattern: SparsityPattern,
    device: torch.device,
    dtype: torch.dtype,
    baseline: int,
    host_mem: int,
    micro_batch: int | None = None,
) -> Plan:
    """The plan of a run that computes in `dtype` on `device`.

    baseline: private bytes that the process holds before any work. micro_batch: fixed by an earlier start of
    the same run, because it decides the last bits of a matrix product; None to choose.
    """
    if micro_batch is None:
        micro_batch = max(1, min(config.samples, BATCH_TOKENS // config.seq_len))
        while micro_batch > 1:
            phases = _phases(config, model, pattern, device, dtype, baseline, micro_batch)
            if max(p.host_bytes for p in phases) <= host_mem:
                break
            micro_batch //= 2
    phases = _phases(config, model, pattern, device, dtype, baseline, micro_batch)
    generations = 2 * config.samples * config.seq_len * model.hidden_size * dtype.itemsize
    # half of what is left stays free: a budget filled to the brim helps nobody
    in_memory = generations <= (host_mem - max(p.host_bytes for p in phases)) // 2
    if in_memory:
        phases = tuple(Phase(p.name, p.host_bytes + generations, p.gpu_bytes, p.flops) for p in phases)
    return Plan(
        device=device.type,
        blocks=len(model.blocks),
        micro_batch=micro_batch,
        in_memory=in_memory,
        phases=phases,
        scratch_bytes=generations,
        output_bytes=model.outside_bytes
        + sum(_packed_bytes(block, pattern, config.rank, model.value_bytes) for block in model.blocks),
        source_bytes=model.outside_bytes + sum(block.source_bytes for block in model.blocks),
        download_bytes=model.download_bytes,
        # the shard being read, the one being fetched, and those that hold what is outside the blocks
        cache_bytes=min(model.download_bytes, 4 * model.largest_shard_bytes)
        if config.evict_shards
        else model.download_bytes,
    )


def _packed_bytes(block: BlockShape, pattern: SparsityPattern, rank: int, value_bytes: int) -> int:
    dense = sum(o * d for o, d in block.linears.values())
    packed = 0
    for o, d in block.linears.values():
        packed += pattern.packed_bits(o, d, 8 * value_bytes) // 8 + min(rank, o, d) * (o + d) * value_bytes
    return packed + (block.parameters - dense) * value_bytes


def _phases(
    config: RunConfig,
    model: ModelShape,
    pattern: SparsityPattern,
    device: torch.device,
    dtype: torch.dtype,
    baseline: int,
    micro_batch: int,
) -> tuple[Phase, ...]:
    c, h = dtype.itemsize, model.hidden_size
    tokens, batch_tokens = config.samples * config.seq_len, micro_batch * config.seq_len

    block = max(b.parameters for b in model.blocks) * c
    source = max(b.source_bytes for b in model.blocks)
    grams = max(sum(4 * d * d for d in b.grams) for b in model.blocks)
    packed = max(_packed_bytes(b, pattern, config.rank, model.value_bytes) for b in model.blocks)
    solve = max(_solve_peak(o, d, config.rank, c) for b in model.blocks for o, d in b.linears.values())
    activations = max(_activation_bytes(b.linears.values(), batch_tokens, h, c) for b in model.blocks)
    if model.eager_heads:  # scores and what is being made of them a head, and the masks that two kinds of call keep
        activations += micro_batch * config.seq_len**2 * 4 * (2 * model.eager_heads + 2)
    widest = max(d for b in model.blocks for d in b.grams)
    gram_input = 0 if c == 4 else 4 * batch_tokens * widest  # the float32 copy that the product reads
    hidden = _HIDDEN_BATCHES * batch_tokens * h * c
    outside = model.outside_parameters * c

    forward = 2.0 * tokens * sum(b.parameters for b in model.blocks)
    gram_flops = 2.0 * tokens * sum(d * d for b in model.blocks for d in b.grams)
    solving = sum(
        float(solve_flops(o, d, config.rank, _SOLVE_ITERATIONS)) for b in model.blocks for o, d in b.linears.values()
    )
    # (phase, bytes where the compute is, bytes on the host wherever the compute is, FLOPs)
    rows = (
        ("embed", outside + 4 * batch_tokens * h * c, hidden, 0.0),
        ("load", block, source, 0.0),
        ("grams", block + grams + activations + gram_input, hidden, forward + gram_flops),
        ("solve", block + grams + packed + solve, 0, solving),
        ("propagate", block + packed + activations, hidden + packed, forward),
    )
    fixed = baseline + _LIBRARY_BUFFERS
    if device.type == "cpu":
        return tuple(Phase(name, fixed + near + far, 0, flops) for name, near, far, flops in rows)
    return tuple(Phase(name, fixed + far, near, flops) for name, near, far, flops in rows)


def _solve_peak(o: int, d: int, rank: int, c: int) -> int:
    """The solver's own, its result S, U, V, the merged weight, and W in float32 where the block is not."""
    weight = 0 if c == 4 else 4 * o * d
    return solve_bytes(o, d, rank) + weight + 8 * o * d + 4 * rank * (o + d)


def _activation_bytes(linears: Iterable[tuple[int, int]], batch_tokens: int, h: int, c: int) -> int:
    """Of a pass without gradients: the residual stream and its norms, and three tensors of the widest layer."""
    widest = max(max(shape) for shape in linears)
    return batch_tokens * c * (6 * h + 3 * widest)
