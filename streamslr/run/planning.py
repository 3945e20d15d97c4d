"""The choices of a plan: how small the pieces of the work are, and where what waits is kept, so that budgets hold."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from streamslr.calibration.hidden_states import held_bytes, scratch_bytes
from streamslr.config import LARGEST, RunConfig
from streamslr.gpu import GpuMemory
from streamslr.model.shape import ModelShape
from streamslr.ranks import ALONE, Ranks
from streamslr.run.costs import Costs, PhaseCost
from streamslr.run.plan import BATCH_PHASES, BlockKind, Plan
from streamslr.solvers.methods import Method
from streamslr.spec.allocation import Allocation, in_words, parameter_fraction

BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 16384
"""Most tokens of a micro-batch on a CPU, one window of the papers' length, and on a GPU. There products of 4,096 tokens
and more run at their full rate, and a micro-batch of 8 windows halves what is lost between kernels once more."""

EXPERT_GRAMS_AT_ONCE = 8 * 10**9
"""Most bytes of experts' Grams that are collected at a time, where not all are: those of a block of DeepSeek-V3 take
57 GB. Each group reads the kept inputs once, 3.8 GB there by default, which is little beside its solves."""

_MATCHED = ("match", "propagate")
"""Phases that read hidden states and targets of the same two boundaries."""

_BESIDE_BLOCKS = ("embed", "compare")
"""Phases of the whole model, which pass no block."""


Kinds = Sequence[Costs]
"""Costs of each kind of blocks; all of them obey the same choices."""


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
        expert_gram_bytes_at_once=max(k.gram_costs.largest_expert_group_bytes for k in kinds)
        if costs.gram_costs.keeps_inputs
        else None,
        expert_gram_groups=max(kind.gram_costs.expert_groups for kind in kinds),
        kept_input_bytes=max(kind.kept_input_bytes for kind in kinds),
        grams_at=grams_at,
        solved_at="host" if costs.solved_on_host else "device",
        solver_workspace=workspace,
        phases=tuple(_over_kinds(same) for same in zip(*by_kind, strict=True)),
        kinds=tuple(
            BlockKind(blocks, tuple(p for p in phases if p.name not in _BESIDE_BLOCKS), kind.gram_costs.expert_groups)
            for blocks, phases, kind in zip(model.block_kinds, by_kind, kinds, strict=True)
        ),
        scratch_bytes=scratch
        + max(kind.kept_input_bytes + (kind.gram_costs.waiting_bytes if grams_at == "disk" else 0) for kind in kinds),
        output_bytes=model.non_block_bytes + sum(costs.packed_costs.shard_bytes(block) for block in model.blocks),
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
        if budgets.hold(phase for phase in phases if phase.name in BATCH_PHASES):
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
    if any(costs.gram_costs.has_experts for costs in kinds):
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
        most = min(
            costs.gram_costs.largest_group_bytes + max(0, room or 0) for costs, room in zip(kinds, rooms, strict=True)
        )
        kinds = [replace(costs, grams_at_once=most) for costs in kinds]
    if kinds[0].expert_grams_at_once is not None:
        most = EXPERT_GRAMS_AT_ONCE
        for costs in (costs for costs in kinds if costs.gram_costs.has_experts):
            room = budgets.left_on_device([costs.replays(micro_batch, "device")])
            most = min(most, most if room is None else costs.gram_costs.largest_expert_group_bytes + max(0, room))
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
