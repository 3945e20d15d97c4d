"""The plan of a run, before any work: what each phase takes, what fits the budgets, and what is refused."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from streamslr.calibration.hidden_states import held_bytes, scratch_bytes
from streamslr.config import LARGEST, RunConfig, format_bytes
from streamslr.errors import BudgetError
from streamslr.gpu import GpuMemory
from streamslr.io.durable import DiskNeed, require_disk_space
from streamslr.model.shape import ModelShape
from streamslr.ranks import ALONE, Ranks
from streamslr.run.costs import Costs, PhaseCost
from streamslr.run.dealing import Deal
from streamslr.solvers.methods import Method
from streamslr.spec.allocation import Allocation, in_words, parameter_fraction

BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 16384
"""Most tokens of a micro-batch on a CPU, one window of the papers' length, and on a GPU. There products of 4,096 tokens
and more run at their full rate, and a micro-batch of 8 windows halves what is lost between kernels once more."""

EXPERT_GRAMS_AT_ONCE = 8 * 10**9
"""Most bytes of experts' Grams that are collected at a time, where not all are: those of a block of DeepSeek-V3 take
57 GB. Each group reads the kept inputs once, 3.8 GB there by default, which is little beside its solves."""

_BATCH_PHASES = ("survey", "embed", "grams", "match", "propagate")
"""Phases that windows pass through; their memory grows with the micro-batch."""

_MATCHED = ("match", "propagate")
"""Phases that read hidden states and targets of the same two boundaries."""

_BESIDE_BLOCKS = ("embed", "compare")
"""Phases of the whole model, which pass no block."""


Kinds = Sequence[Costs]
"""Costs of each kind of blocks; all of them obey the same choices."""


@dataclass(frozen=True)
class BlockKind:
    """Blocks of one kind: their shapes are equal. Their costs are those of a model that has no others."""

    blocks: tuple[int, ...]  # their numbers
    phases: tuple[PhaseCost, ...]  # without those that pass no block
    expert_gram_groups: int  # of a block; 0 where no inputs of experts are kept

    @property
    def flops(self) -> float:
        """FLOPs of all blocks of the kind."""
        return sum(phase.flops for phase in self.phases)

    @property
    def sent_bytes(self) -> int:
        """Bytes that a rank sends to others for one block, on average over ranks."""
        return sum(phase.sent_bytes for phase in self.phases)


@dataclass(frozen=True)
class Plan:
    """Cost of a run on its busiest rank, and the choices that it obeys: `micro_batch` to `solver_workspace`.

    Blocks of all kinds obey the same choices, which the most demanding kind decides.
    """

    device: str
    blocks: int
    micro_batch: int  # windows that pass a block together
    in_memory: bool  # hidden states are kept in host memory beside the scratch folder
    resident_windows: int  # windows of a boundary that stay on the GPU while a block is matched and passed
    gram_bytes_at_once: int | None  # bytes of the Grams that one pass of a block collects; None: one pass collects all
    expert_gram_bytes_at_once: int | None  # bytes of experts' Grams that are collected from kept inputs at a time
    expert_gram_groups: int  # of a block, at most; 0 where no inputs are kept
    kept_input_bytes: int  # of these inputs, in the scratch folder, at most
    grams_at: str  # tier where Gram matrices wait to be solved: "device", "host" or "disk"
    solved_at: str  # tier where solved and refined linears wait while their block is matched: "device" or "host"
    solver_workspace: int | None  # bytes that one solve may take, which then works in tiles; None: as many as it likes
    phases: tuple[PhaseCost, ...]  # bytes of the kind of blocks that takes most in the phase, FLOPs of all blocks
    kinds: tuple[BlockKind, ...]  # that of block 0 first
    scratch_bytes: int  # of one rank
    output_bytes: int
    source_bytes: int
    download_bytes: int
    cache_bytes: int  # of the download, the most that lies on the disk at a time
    linears: str  # patterns and ranks, in words
    parameter_fraction: float  # parameters of S, U and V over those of the dense linears
    host_mem: int  # budget of host memory
    gpu_mem: int | None  # budget of GPU memory; None without one: on a CPU, and where no GPU can be asked
    gpu_context: int = 0  # bytes of gpu_mem that CUDA takes for itself
    dense: tuple[str, ...] = ()  # linears that stay dense, with the reason, in words
    world: int = 1  # ranks that share the run
    local_world: int = 1  # of these, the ranks on this machine
    deal: Deal | None = None  # who solves the linears of the block that takes most work; None in one process

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as `plan --json` prints it."""
        fields = asdict(self)
        if self.deal:
            fields["deal"]["by_rows"] = sorted(self.deal.by_rows)
        budgets = {"host_budget_bytes": fields.pop("host_mem"), "gpu_budget_bytes": fields.pop("gpu_mem")}
        totals = {"host_bytes": self.host_bytes, "gpu_bytes": self.gpu_bytes, "flops": self.flops}
        totals |= {"sent_bytes": self.sent_bytes, "sent_bytes_in_all": self.sent_bytes_in_all}
        return fields | totals | budgets

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        return sum(phase.flops for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        """Peak of host memory."""
        return max(phase.host_bytes for phase in self.phases)

    @property
    def gpu_bytes(self) -> int:
        """Peak of GPU memory."""
        return max(phase.gpu_bytes for phase in self.phases)

    @property
    def sent_bytes(self) -> int:
        """Bytes that a rank sends to others for one block, of the kind with most, on average over ranks."""
        return max(kind.sent_bytes for kind in self.kinds)

    @property
    def sent_bytes_in_all(self) -> int:
        """Bytes that a rank sends to others for all blocks, on average over ranks."""
        return sum(len(kind.blocks) * kind.sent_bytes for kind in self.kinds)

    def memory(self, block: int | None = None) -> dict[str, dict[str, int]]:
        """Return {phase: planned and budgeted bytes}, which the journal keeps beside what is measured.

        Phase grams also has the number of groups of experts' Grams, if they are cut.

        Args:
            block: Number of the block whose phases these are; None: those of the whole model.
        """
        phases, groups = self.phases, self.expert_gram_groups
        if block is not None:
            (kind,) = (kind for kind in self.kinds if block in kind.blocks)
            phases, groups = kind.phases, kind.expert_gram_groups
        memory = {}
        for phase in phases:
            memory[phase.name] = {"host_planned_bytes": phase.host_bytes, "host_budget_bytes": self.host_mem}
            if self.gpu_mem is not None:
                memory[phase.name] |= {
                    "gpu_planned_bytes": phase.gpu_bytes,
                    "gpu_context_bytes": self.gpu_context,
                    "gpu_budget_bytes": self.gpu_mem,
                }
        if groups:
            memory["grams"]["expert_gram_groups"] = groups
        return memory

    @property
    def expert_grams_in_words(self) -> str:
        """Sentence on Grams of experts that are collected in groups; "" where they are not."""
        if not self.expert_gram_groups:
            return ""
        size, kept = format_bytes(self.expert_gram_bytes_at_once or 0), format_bytes(self.kept_input_bytes)
        return (
            f"Gram matrices of experts do not fit at once: they are made in {self.expert_gram_groups} groups of at "
            f"most {size} a block, from {kept} of inputs in the scratch folder"
        )

    def require_memory(self) -> None:
        """Raise BudgetError where a phase does not fit a budget; name the phase, its bytes and the flag that helps."""
        for kind, budget, beside in (("host", self.host_mem, 0), ("gpu", self.gpu_mem, self.gpu_context)):
            if budget is None:
                continue
            phase = max(self.phases, key=lambda p: getattr(p, f"{kind}_bytes"))
            need = getattr(phase, f"{kind}_bytes") + beside
            if need > budget:
                batch = f" (windows pass {self.micro_batch} at a time)" if phase.name in _BATCH_PHASES else ""
                own = f", {format_bytes(beside)} of it for CUDA itself" if beside else ""
                shorter = " or, in a new --out, shorten --seq-len" if batch else ""
                shorter = (
                    " or, in a new --out, give --check-windows 0" if phase.name in ("check", "compare") else shorter
                )
                raise BudgetError(
                    f"phase {phase.name}{batch} needs {format_bytes(need)} of {kind} memory{own}, the budget is "
                    f"{format_bytes(budget)}; raise --{kind}-mem{shorter}"
                )

    def require_disk(self, out: Path, scratch: Path, cache: Path) -> None:
        """Raise BudgetError where a file system lacks space for what the run has yet to write to it.

        Args:
            out: Output folder.
            scratch: Folder of hidden states, and of Grams that wait on the disk.
            cache: Folder of downloads.
        """
        in_out = self.output_bytes - _size(out, "*.safetensors")
        shared = scratch.absolute().is_relative_to(out.absolute())  # by the ranks of all machines, as the output is
        in_scratch = (self.world if shared else self.local_world) * self.scratch_bytes - _size(scratch, "**/*")
        require_disk_space(
            DiskNeed(out, "output", in_out, "give --out on another disk"),
            DiskNeed(scratch, "hidden states", in_scratch, "give --scratch on another disk"),
            DiskNeed(
                cache, "downloads", self.cache_bytes, "set HF_HOME to a folder on another disk, or give --evict-shards"
            ),
        )


def _size(folder: Path, glob: str) -> int:
    return sum(p.stat().st_size for p in folder.glob(glob) if p.is_file())


@dataclass(frozen=True)
class Pieces:
    """Choices that cut the work into smaller pieces. They decide last bits, so a resumed run keeps its first ones."""

    micro_batch: int
    solver_workspace: int | None


def make_plan(
    config: RunConfig,
    model: ModelShape,
    allocation: Allocation,
    method: Method,
    device: torch.device,
    dtype: torch.dtype,
    baseline: int,
    host_mem: int,
    gpu: GpuMemory | None = None,
    pieces: Pieces | None = None,
    ranks: Ranks = ALONE,
) -> Plan:
    """Plan a run, cut into pieces as small as the budgets ask for; the same on each rank that has the same budgets.

    Args:
        config: Settings of the run.
        model: Shapes of the model.
        allocation: Pattern and rank of each linear.
        method: Method, whose solver knows its own cost.
        device: Device that the run computes on. It need not exist.
        dtype: Dtype of hidden states and products.
        baseline: Private bytes that the process holds before any work.
        host_mem: Budget of host memory, of one rank.
        gpu: Memory of the GPU that a rank may take; None: no limit.
        pieces: Pieces of an earlier start of the same run; None: choose them.
        ranks: Ranks that share the run. The plan is that of the one with the most windows, Grams and work.
    """
    workspaces = (gpu or GpuMemory(0)).workspaces
    kinds: Kinds = [
        Costs(config, of_kind, allocation, method, device, dtype, baseline, workspaces, ranks.world)
        for of_kind in (replace(model, blocks=tuple(model.blocks[i] for i in kind)) for kind in model.block_kinds)
    ]
    budgets = _Budgets(host_mem, gpu.usable if gpu else None, device.type == "cpu")
    workspace = pieces.solver_workspace if pieces else None
    kinds = _cut_grams(kinds, budgets, workspace)
    if config.match and device.type != "cpu":
        room = budgets.left_on_device(costs.match(1) for costs in kinds)
        kinds = [replace(costs, solved_on_host=room is not None and room < 0) for costs in kinds]
    micro_batch = pieces.micro_batch if pieces else _choose_micro_batch(kinds, budgets)
    kinds = _enlarge_groups(kinds, budgets, micro_batch)
    grams_at = _choose_gram_tier(kinds, budgets, workspace)
    if not pieces:
        workspace = _choose_workspace(kinds, budgets, grams_at)
    costs = kinds[0]  # for what all kinds have in common
    by_kind = [kind.phases(micro_batch, grams_at, workspace) for kind in kinds]

    resident_windows = _choose_resident_windows(costs, budgets, chain.from_iterable(by_kind))
    kept = resident_windows * (costs.window_bytes("hidden") + costs.window_bytes("targets"))
    boundaries = costs.boundary_bytes("hidden"), costs.boundary_bytes("targets"), costs.check_bytes
    scratch = scratch_bytes(*boundaries)
    # half of what is left stays free for what else runs on the machine
    in_memory = scratch <= (host_mem - max(phase.host_bytes for phase in chain.from_iterable(by_kind))) // 2

    def with_windows(phase: PhaseCost) -> PhaseCost:
        on_host = held_bytes(phase.name, *boundaries) if in_memory else 0
        on_gpu = kept if phase.name in _MATCHED else 0
        return replace(phase, host_bytes=phase.host_bytes + on_host, gpu_bytes=phase.gpu_bytes + on_gpu)

    by_kind = [tuple(map(with_windows, phases)) for phases in by_kind]
    return Plan(
        device=device.type,
        blocks=len(model.blocks),
        micro_batch=micro_batch,
        in_memory=in_memory,
        resident_windows=resident_windows,
        gram_bytes_at_once=costs.grams_at_once,
        expert_gram_bytes_at_once=max(k.of_grams.largest_expert_group for k in kinds)
        if costs.of_grams.keeps_inputs
        else None,
        expert_gram_groups=max(kind.of_grams.expert_groups for kind in kinds),
        kept_input_bytes=max(kind.kept_input_bytes for kind in kinds),
        grams_at=grams_at,
        solved_at="host" if costs.solved_on_host else "device",
        solver_workspace=workspace,
        phases=tuple(_over_kinds(same) for same in zip(*by_kind, strict=True)),
        kinds=tuple(
            BlockKind(blocks, tuple(p for p in phases if p.name not in _BESIDE_BLOCKS), kind.of_grams.expert_groups)
            for blocks, phases, kind in zip(model.block_kinds, by_kind, kinds, strict=True)
        ),
        scratch_bytes=scratch
        + max(kind.kept_input_bytes + (kind.of_grams.waiting if grams_at == "disk" else 0) for kind in kinds),
        output_bytes=model.non_block_bytes + sum(costs.packed.shard(block) for block in model.blocks),
        source_bytes=model.non_block_bytes + sum(block.source_bytes for block in model.blocks),
        download_bytes=model.download_bytes,
        cache_bytes=_cache_bytes(model, config.evict_shards),
        linears=in_words(allocation.values()),
        parameter_fraction=parameter_fraction(allocation, (block.linears for block in model.blocks)),
        host_mem=host_mem,
        gpu_mem=gpu.budget if gpu else None,
        gpu_context=gpu.context if gpu else 0,
        world=ranks.world,
        local_world=ranks.local_world,
        deal=max(chain.from_iterable(kind.deals for kind in kinds), key=lambda deal: sum(deal.loads))
        if ranks.world > 1
        else None,
    )


def _over_kinds(costs: Sequence[PhaseCost]) -> PhaseCost:
    """Return the cost of a phase over all kinds of blocks: bytes of the kind that takes most, FLOPs of all."""
    return PhaseCost(
        costs[0].name,
        max(cost.host_bytes for cost in costs),
        max(cost.gpu_bytes for cost in costs),
        sum(cost.flops for cost in costs),
        max(cost.sent_bytes for cost in costs),
    )


@dataclass(frozen=True)
class _Budgets:
    """Memory that phases may fill; None on the GPU: no limit."""

    host: int
    gpu: int | None
    on_cpu: bool  # blocks are computed in host memory

    def hold_on_host(self, phases: Iterable[PhaseCost]) -> bool:
        return all(phase.host_bytes <= self.host for phase in phases)

    def left_on_device(self, phases: Iterable[PhaseCost]) -> int | None:
        """Return the least that a phase leaves of the memory that blocks are computed in; None: no limit."""
        if self.on_cpu:
            return self.host - max(phase.host_bytes for phase in phases)
        return None if self.gpu is None else self.gpu - max(phase.gpu_bytes for phase in phases)

    def fit_on_device(self, phases: Iterable[PhaseCost]) -> bool:
        """Tell if phases fit the memory that blocks are computed in."""
        left = self.left_on_device(phases)
        return left is None or left >= 0

    def hold(self, phases: Iterable[PhaseCost]) -> bool:
        phases = tuple(phases)
        on_gpu = self.gpu is None or all(phase.gpu_bytes <= self.gpu for phase in phases)
        return on_gpu and self.hold_on_host(phases)


def _choose_micro_batch(kinds: Kinds, budgets: _Budgets) -> int:
    """Return the windows that pass together, halved until every pass fits, but at least one.

    On a CPU they begin with BATCH_TOKENS of tokens. On a GPU they are a power of two, at most GPU_BATCH_TOKENS of
    tokens, and no more than a step of matching takes.
    """
    config, windows = kinds[0].config, kinds[0].windows
    if budgets.on_cpu:
        micro_batch = max(1, min(windows, BATCH_TOKENS // config.seq_len))
    else:
        most = min(windows, GPU_BATCH_TOKENS // config.seq_len, config.match_batch if config.match else LARGEST)
        micro_batch = 1 << max(0, most.bit_length() - 1)
    while micro_batch > 1:
        phases = chain.from_iterable(costs.phases(micro_batch, "device", None) for costs in kinds)
        if budgets.hold(phase for phase in phases if phase.name in _BATCH_PHASES):
            break
        micro_batch //= 2
    return micro_batch


def _choose_gram_tier(kinds: Kinds, budgets: _Budgets, workspace: int | None) -> str:
    """Return the tier where Grams wait: the fastest that leaves a solve enough memory.

    Where no tier does, it is the fastest off the device that the host can hold, since a smaller workspace can make
    the solve fit there. Grams of passes in groups never wait on the device, which cannot hold them all.
    """
    tiers = ("device", "disk") if budgets.on_cpu else ("device", "host", "disk")
    phases = {tier: [costs.solve(tier, workspace) for costs in kinds] for tier in tiers}
    if kinds[0].grams_at_once is not None:
        phases = {tier: [*phases[tier], *(costs.grams(1, tier) for costs in kinds)] for tier in tiers[1:]}
    whole = [tier for tier in phases if budgets.hold(phases[tier])]
    offloaded = [tier for tier in tiers[1:] if budgets.hold_on_host(phases[tier])]
    return (whole or offloaded or ["disk"])[0]


def _cut_grams(kinds: Kinds, budgets: _Budgets, workspace: int | None) -> Kinds:
    """Return the costs with Grams in groups where not all can be collected in one pass; as small as groups can be.

    Those of experts are cut first, since they need no pass for each group. They are cut too where all fit while windows
    pass, but would have to leave the device to be solved.
    """
    if any(costs.of_grams.has_experts for costs in kinds):
        whole = budgets.fit_on_device(costs.grams(1, "device") for costs in kinds)
        if not (whole and _choose_gram_tier(kinds, budgets, workspace) == "device"):
            kinds = [replace(costs, expert_grams_at_once=0) for costs in kinds]
    whole = budgets.fit_on_device(costs.grams(1, "device") for costs in kinds)
    return kinds if whole else [replace(costs, grams_at_once=0) for costs in kinds]


def _enlarge_groups(kinds: Kinds, budgets: _Budgets, micro_batch: int) -> Kinds:
    """Return the costs with as many Grams in a group as the budget leaves memory for, but at least one.

    Grams of experts take EXPERT_GRAMS_AT_ONCE at most.
    """
    if kinds[0].grams_at_once is not None:
        rooms = [budgets.left_on_device([costs.passes(micro_batch, "disk")]) for costs in kinds]
        most = min(costs.of_grams.largest_group + max(0, room or 0) for costs, room in zip(kinds, rooms, strict=True))
        kinds = [replace(costs, grams_at_once=most) for costs in kinds]
    if kinds[0].expert_grams_at_once is not None:
        most = EXPERT_GRAMS_AT_ONCE
        for costs in (costs for costs in kinds if costs.of_grams.has_experts):
            room = budgets.left_on_device([costs.replays(micro_batch, "device")])
            most = min(most, most if room is None else costs.of_grams.largest_expert_group + max(0, room))
        kinds = [replace(costs, expert_grams_at_once=most) for costs in kinds]
    return kinds


def _choose_workspace(kinds: Kinds, budgets: _Budgets, grams_at: str) -> int | None:
    """Return the bytes that the budget leaves to one solve; None where it fits as it is, or cannot do with less."""
    budget = budgets.host if budgets.on_cpu else budgets.gpu
    if budget is None:
        return None
    workspaces = []
    for costs in (costs for costs in kinds if not budgets.hold([costs.solve(grams_at, None)])):
        beside = costs.beside_solver(grams_at) + (costs.fixed_bytes if budgets.on_cpu else costs.gpu_workspaces)
        workspace = max(0, budget - beside)
        if costs.solver_bytes(workspace) != costs.solver_bytes(None):
            workspaces.append(workspace)
    return min(workspaces, default=None)


def _choose_resident_windows(costs: Costs, budgets: _Budgets, phases: Iterable[PhaseCost]) -> int:
    """Return the windows of hidden states and targets that a GPU's budget has room for beside matching.

    Where no budget is known it is none: the plan then says what a GPU must have at least.
    """
    if budgets.on_cpu or not costs.config.match or budgets.gpu is None:
        return 0
    room = budgets.gpu - max(phase.gpu_bytes for phase in phases if phase.name in _MATCHED)
    window = costs.window_bytes("hidden") + costs.window_bytes("targets")
    return max(0, min(costs.windows, room // window))


def _cache_bytes(model: ModelShape, evict_shards: bool) -> int:
    """Return the most bytes of downloads on the disk at a time.

    With --evict-shards four shards are: the one being read, the one being fetched, and those of the non-block tensors.
    """
    return min(model.download_bytes, 4 * model.largest_shard_bytes) if evict_shards else model.download_bytes
