"""Bytes and FLOPs of each phase from headers alone, before any work; refuses what cannot fit. Pure arithmetic."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from streamslr.config import RunConfig, format_bytes
from streamslr.errors import BudgetError
from streamslr.matching import TILE
from streamslr.solvers.base import Solver
from streamslr.spec.allocation import Allocation, in_words, parameter_fraction
from streamslr.spec.owl import scoring_bytes

BATCH_TOKENS = 2048
"""Tokens of a micro-batch: one window of the papers' length."""

_LIBRARY_BUFFERS, _EARLY_BUFFERS = 120 * 2**20, 76 * 2**20
"""Host memory that torch, zarr and the tokenizer come to hold beside the tensors, buffers and pages of their own code;
and what of it is there before the first block (tools/bench_run.py, a process alone on its machine)."""

_BOUNDARIES = {"survey": 2, "embed": 2, "load": 2, "grams": 3, "solve": 3, "match": 3, "propagate": 4}
"""HiddenStateStream of both streams that exist in each phase where blocks are matched; half as many where not, but for the
survey, which has one stream."""

_BATCH_PHASES = ("survey", "embed", "grams", "match", "propagate")  # whose memory grows with the windows

_SAVED_HIDDEN = 6
"""Tensors [b, T, h] beside the linears' inputs and outputs that a pass keeps for its gradients, counted in Llama's
block: two norms' inputs and outputs, two residuals; in float32, on the CPU."""

_TILE_COPIES = 4
"""Tiles of a dense weight alive at once in matching: S, its sum with U·V, their gradient and a product (counted; with
both figures the plan of a matching is 1.02 to 1.04 of its measured peak, tools/results/run-llama-8m.json)."""

_USABLE = 0.97
"""Share of a GPU budget that the plan fills (chosen, no GPU was at hand): the allocator's limit counts what lies unused
between tensors too."""

_READ, _WRITTEN = 2, 4
"""Micro-batches of hidden states alive in a pass, of a stream that is read: read ahead and current; of one that is
written: output, two queued, one being written."""


@dataclass(frozen=True)
class BlockShape:
    """What the plan needs to know of one block.

    linears: name -> (o, d). grams: first linear of those that share an input -> d. routing: linear of an expert ->
    (k, E), where each token passes k of E experts.
    """

    linears: Mapping[str, tuple[int, int]]
    grams: Mapping[str, int]
    parameters: int  # all of the block, in numbers
    source_bytes: int
    routing: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def share(self, linear: str) -> float:
        """Of the tokens, that reach it on average."""
        chosen, experts = self.routing.get(linear, (1, 1))
        return chosen / experts

    @property
    def active_parameters(self) -> float:
        """Those that a token passes."""
        return self.parameters - sum((1 - self.share(name)) * o * d for name, (o, d) in self.linears.items())

    @property
    def gram_bytes(self) -> int:
        """Of all its Grams, in float32."""
        return sum(4 * d * d for d in self.grams.values())

    @property
    def shared_gram_bytes(self) -> int:
        """Of the sum over experts that those with few tokens lean on."""
        return max((4 * d * d for name, d in self.grams.items() if name in self.routing), default=0)

    def routed_bytes(self, tokens: int, h: int, c: int) -> int:
        """Of a pass through experts: inputs, which are held while Grams are collected, and outputs in two orders."""
        inputs = sum(self.share(name) * d for name, d in self.grams.items() if name in self.routing)
        chosen = max((k for k, _ in self.routing.values()), default=0)
        return round(tokens * (c * inputs + 2 * 4 * chosen * h))


@dataclass(frozen=True)
class ModelShape:
    """The model as headers and the meta device show it."""

    blocks: tuple[BlockShape, ...]
    hidden_size: int
    non_block_parameters: int
    non_block_bytes: int
    value_bytes: int  # of a weight in the shards
    eager_heads: int = 0  # attention heads, where attention is not fused
    download_bytes: int = 0
    largest_shard_bytes: int = 0


@dataclass(frozen=True)
class PhaseCost:
    """Peak bytes while the phase runs, and FLOPs of all its runs together; of the largest block where blocks differ."""

    name: str
    host_bytes: int
    gpu_bytes: int
    flops: float


@dataclass(frozen=True)
class Plan:
    """What a run will take. It obeys micro_batch to solver_workspace; the rest is for people and for refusals."""

    device: str
    blocks: int
    micro_batch: int  # windows that pass a block together
    in_memory: bool  # hidden states are kept in host memory beside the scratch folder
    grams_at: str  # where Gram matrices wait to be solved: "device", "host" or "disk"
    solver_workspace: int | None  # bytes that one solve may take where all it likes does not fit: it works in tiles
    phases: tuple[PhaseCost, ...]
    scratch_bytes: int
    output_bytes: int
    source_bytes: int
    download_bytes: int
    cache_bytes: int  # of them that lie on the disk at a time
    linears: str  # patterns and ranks, in words
    parameter_fraction: float  # of the linears' parameters, by S, U and V

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
        means = "" if self.grams_at == "device" else f", Gram matrices wait on {self.grams_at}"
        means += "" if self.solver_workspace is None else ", the solver works in tiles"
        table = Table(
            min_width=76,
            title=f"plan: {self.blocks} blocks on {self.device}, {self.micro_batch} windows at a time, {budget}",
            caption=f"output {format_bytes(self.output_bytes)} (source {format_bytes(self.source_bytes)}), "
            f"scratch {format_bytes(self.scratch_bytes)} (hidden states: {tier}){means}"
            + (f", to download {format_bytes(self.download_bytes)}" if self.download_bytes else "")
            + f"\nlinears become {self.linears}: S, U and V keep {self.parameter_fraction:.1%} of their parameters",
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

    def memory(self, host_mem: int, gpu_mem: int | None) -> dict[str, dict[str, int]]:
        """{phase: {host_planned_bytes, host_budget_bytes[, the same of the gpu]}}: what readings are held against."""
        memory = {}
        for phase in self.phases:
            memory[phase.name] = {"host_planned_bytes": phase.host_bytes, "host_budget_bytes": host_mem}
            if gpu_mem is not None:
                memory[phase.name] |= {"gpu_planned_bytes": phase.gpu_bytes, "gpu_budget_bytes": gpu_mem}
        return memory

    def require_memory(self, host_mem: int, gpu_mem: int | None) -> None:
        """Raises BudgetError naming the phase, its bytes and the flag that would help."""
        for place, budget in (("host", host_mem), ("gpu", gpu_mem)):
            if budget is None:
                continue
            phase = max(self.phases, key=lambda p: getattr(p, f"{place}_bytes"))
            need = getattr(phase, f"{place}_bytes")
            if need > budget:
                batch = f" (windows pass {self.micro_batch} at a time)" if phase.name in _BATCH_PHASES else ""
                shorter = " or, in a new --out, shorten --seq-len" if batch else ""
                raise BudgetError(
                    f"phase {phase.name}{batch} needs {format_bytes(need)} of {place} memory, the budget is "
                    f"{format_bytes(budget)}; raise --{place}-mem{shorter}"
                )

    def require_disk(self, out: Path, scratch: Path, cache: Path) -> None:
        """Raises BudgetError when a file system lacks space for what is still to come to it."""
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


@dataclass(frozen=True)
class Pieces:
    """What may be cut smaller to fit a budget. It decides last bits, so a run keeps what it started with."""

    micro_batch: int
    solver_workspace: int | None


def make_plan(
    config: RunConfig,
    model: ModelShape,
    allocation: Allocation,
    solver: Solver,
    device: torch.device,
    dtype: torch.dtype,
    baseline: int,
    host_mem: int,
    gpu_mem: int | None = None,
    pieces: Pieces | None = None,
) -> Plan:
    """The plan of a run that computes in `dtype` on `device`, cut as small as the budgets ask for.

    baseline: private bytes that the process holds before any work. pieces: those of an earlier start of the
    same run; None to choose.
    """
    needs = _Needs(config, model, allocation, solver, device, dtype, baseline)
    usable = None if gpu_mem is None else int(gpu_mem * _USABLE)
    budget = host_mem if device.type == "cpu" else usable

    def fits(phases: Iterable[PhaseCost], names: tuple[str, ...], near: bool = True) -> bool:
        """near: also where the compute is."""
        chosen = [p for p in phases if p.name in names]
        on_gpu = not near or usable is None or all(p.gpu_bytes <= usable for p in chosen)
        return on_gpu and all(p.host_bytes <= host_mem for p in chosen)

    micro_batch = pieces.micro_batch if pieces else max(1, min(config.samples, BATCH_TOKENS // config.seq_len))
    while not pieces and micro_batch > 1 and not fits(needs.phases(micro_batch, "device", None), _BATCH_PHASES):
        micro_batch //= 2
    workspace = pieces.solver_workspace if pieces else None
    tiers = ("device", "disk") if device.type == "cpu" else ("device", "host", "disk")
    solving = {tier: needs.phases(micro_batch, tier, workspace) for tier in tiers}
    whole = [tier for tier in tiers if fits(solving[tier], ("solve",))]
    aside = [tier for tier in tiers[1:] if fits(solving[tier], ("solve",), near=device.type == "cpu")]
    grams_at = (whole or aside or ["disk"])[0]
    if not whole and not pieces and budget is not None:
        workspace = max(0, budget - needs.beside_solver(grams_at) - (needs.fixed if device.type == "cpu" else 0))
        if needs.solving(workspace) == needs.solving(None):  # most methods cannot do with less
            workspace = None
    phases = needs.phases(micro_batch, grams_at, workspace)
    boundaries = (4 if config.match else 2) * config.samples * config.seq_len * model.hidden_size * dtype.itemsize
    # half of what is left stays free: a budget filled to the brim helps nobody
    in_memory = boundaries <= (host_mem - max(p.host_bytes for p in phases)) // 2
    if in_memory:
        held = {name: boundaries * count // 4 for name, count in _BOUNDARIES.items()}
        held["survey"] *= 1 if config.match else 2
        phases = tuple(PhaseCost(p.name, p.host_bytes + held[p.name], p.gpu_bytes, p.flops) for p in phases)
    return Plan(
        device=device.type,
        blocks=len(model.blocks),
        micro_batch=micro_batch,
        in_memory=in_memory,
        grams_at=grams_at,
        solver_workspace=workspace,
        phases=phases,
        scratch_bytes=boundaries + (needs.grams if grams_at == "disk" else 0),
        output_bytes=model.non_block_bytes + sum(needs.packed_bytes(block) for block in model.blocks),
        source_bytes=model.non_block_bytes + sum(block.source_bytes for block in model.blocks),
        download_bytes=model.download_bytes,
        # the shard being read, the one being fetched, and those that hold what is outside the blocks
        cache_bytes=min(model.download_bytes, 4 * model.largest_shard_bytes)
        if config.evict_shards
        else model.download_bytes,
        linears=in_words(allocation.values()),
        parameter_fraction=parameter_fraction(allocation, (block.linears for block in model.blocks)),
    )


class _Needs:
    """What a run takes, phase by phase; of its largest block where blocks differ."""

    def __init__(
        self,
        config: RunConfig,
        model: ModelShape,
        allocation: Allocation,
        solver: Solver,
        device: torch.device,
        dtype: torch.dtype,
        baseline: int,
    ) -> None:
        self.config, self.model, self.allocation, self.device = config, model, allocation, device
        self.solver = solver
        self.c = dtype.itemsize
        self.fixed = baseline + _LIBRARY_BUFFERS
        self.block = max(b.parameters for b in model.blocks) * self.c
        self.source = max(b.source_bytes for b in model.blocks)
        self.grams = max(b.gram_bytes for b in model.blocks)
        self.packed = max(self.packed_bytes(b) for b in model.blocks)

    def packed_bytes(self, block: BlockShape) -> int:
        """Of a block as stored."""
        value_bytes = self.model.value_bytes
        dense = sum(o * d for o, d in block.linears.values())
        packed = 0
        for name, (o, d) in block.linears.items():
            spec = self.allocation[name]
            low_rank = min(spec.rank, o, d) * (o + d) * value_bytes
            packed += spec.pattern.packed_bits(o, d, 8 * value_bytes) // 8 + low_rank
        return packed + (block.parameters - dense) * value_bytes

    def phases(self, micro_batch: int, grams_at: str, workspace: int | None) -> tuple[PhaseCost, ...]:
        config, model, c, h = self.config, self.model, self.c, self.model.hidden_size
        tokens, batch_tokens = config.samples * config.seq_len, micro_batch * config.seq_len
        activations = max(
            _activation_bytes(b.linears.values(), batch_tokens, h, c) + b.routed_bytes(batch_tokens, h, c)
            for b in model.blocks
        )
        scores = 0
        if model.eager_heads:  # a head's scores and what is made of them, and the masks that two kinds of call keep
            scores = micro_batch * config.seq_len**2 * 4 * (2 * model.eager_heads + 2)
        widest = max(d for b in model.blocks for d in b.grams.values())
        gram_input = 0 if c == 4 else 4 * batch_tokens * widest  # the float32 copy that the product reads
        hidden = batch_tokens * h * c
        reads, writes = (2 * _READ, _WRITTEN) if config.match else (_READ, 0)  # of the dense pass
        non_block = model.non_block_parameters * c

        forward = 2.0 * tokens * sum(b.active_parameters for b in model.blocks)
        gram_flops = 2.0 * tokens * sum(b.share(name) * d * d for b in model.blocks for name, d in b.grams.items())
        shared = max(b.shared_gram_bytes for b in model.blocks)  # made when all windows have passed
        linears = [linear for b in model.blocks for linear in b.linears.items()]
        solving = sum(self.solver.flops(o, d, self.allocation[name].rank) for name, (o, d) in linears)
        # (phase, bytes where the compute is, bytes on the host wherever the compute is, FLOPs)
        rows = [
            ("embed", non_block + 2 * hidden, 2 * (_WRITTEN - 1) * hidden, 0.0),
            ("load", self.block, self.source, 0.0),
            (
                "grams",
                self.block + self.grams + max(shared, activations + scores + gram_input),
                (reads + writes) * hidden,
                forward + gram_flops,
            ),
            (
                "solve",
                self.beside_solver(grams_at) + self.solving(workspace),
                self.grams if grams_at == "host" else 0,
                solving,
            ),
        ]
        if config.owl is not None:
            surveying = self.block + activations + scores + gram_input + scoring_bytes(widest)
            rows.insert(0, ("survey", surveying, (_READ + _WRITTEN) * hidden, forward))
        if config.match:
            micro = min(micro_batch, config.match_batch) * config.seq_len
            training = max(self.training(b, micro) for b in model.blocks) + scores
            flops = forward * (3 * config.match_epochs - 2)
            rows.append(("match", self.block + 2 * self.packed + training, reads * hidden, flops))
        stored = (2 if config.match else 1) * self.packed  # as solved and as matched
        passing = self.block + stored + activations + scores
        copy = 0 if self.device.type == "cpu" else self.packed  # on its way to the shard
        rows.append(("propagate", passing, (reads + _WRITTEN) * hidden + copy, forward))
        cpu = self.device.type == "cpu"
        fixed = {"embed": self.fixed - _LIBRARY_BUFFERS + _EARLY_BUFFERS}
        return tuple(
            PhaseCost(name, fixed.get(name, self.fixed) + far + (near if cpu else 0), 0 if cpu else near, flops)
            for name, near, far, flops in rows
        )

    def beside_solver(self, grams_at: str) -> int:
        """What else there is while a linear is solved: the block, Grams, what is packed, W in float32 on a GPU."""
        widest = max(d for b in self.model.blocks for d in b.grams.values())
        grams = self.grams if grams_at == "device" else 4 * widest * widest
        weight = 0 if self.c == 4 else max(4 * o * d for b in self.model.blocks for o, d in b.linears.values())
        return self.block + grams + self.packed + weight

    def solving(self, workspace: int | None) -> int:
        """The most that one solve takes, or what is made of its result after it."""
        gpu, most = self.device.type == "cuda", 0
        for name, (o, d) in (linear for b in self.model.blocks for linear in b.linears.items()):
            spec = self.allocation[name]
            solve = self.solver.peak_bytes(o, d, spec.rank, workspace, by_row=spec.pattern.by_row, gpu=gpu)
            most = max(most, solve, 8 * o * d)
        return most

    def training(self, block: BlockShape, tokens: int) -> int:
        """Masters, gradients and moments in float32, where the kept values are, activations of a micro-batch."""
        specs = [(self.allocation[name], o, d) for name, (o, d) in block.linears.items()]
        kept = sum(round(spec.pattern.density * o * d) for spec, o, d in specs)
        low_rank = sum(min(spec.rank, o, d) * (o + d) for spec, o, d in specs)
        vectors = block.parameters - sum(o * d for o, d in block.linears.values())
        widest = max(o * d for o, d in block.linears.values())
        inputs = sum(block.share(name) * d for name, d in block.grams.items())
        outputs = sum(block.share(name) * o for name, (o, _) in block.linears.items())
        saved = round(inputs + outputs) + _SAVED_HIDDEN * self.model.hidden_size
        tile = _TILE_COPIES * 4 * min(widest, TILE)
        routed = block.routed_bytes(tokens, self.model.hidden_size, self.c)
        return 16 * (kept + low_rank + vectors) + 4 * kept + tokens * saved * self.c + routed + tile


def _activation_bytes(linears: Iterable[tuple[int, int]], batch_tokens: int, h: int, c: int) -> int:
    """Of a pass without gradients: the residual stream and its norms, and three tensors of the widest linear."""
    widest = max(max(shape) for shape in linears)
    return batch_tokens * c * (6 * h + 3 * widest)
