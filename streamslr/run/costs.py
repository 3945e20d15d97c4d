"""Bytes and FLOPs of each phase on the busiest rank, for blocks of one kind: sums of what the parts take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import starmap

import torch

from streamslr.calibration.expert_grams import blend_bytes
from streamslr.calibration.gram_products import product_bytes
from streamslr.calibration.grams import grams_bytes
from streamslr.calibration.hidden_states import boundary_bytes, transfer_bytes
from streamslr.calibration.transfers import gpu_transfer_bytes, host_transfer_bytes, pinned_bytes
from streamslr.config import RunConfig
from streamslr.masters import epochs_on_grid
from streamslr.matching_costs import count_masters, refine_bytes, refine_flops, refine_micro_batches, refine_steps
from streamslr.model.pass_costs import activation_bytes, kept_input_bytes, routed_bytes, score_bytes
from streamslr.model.shape import BlockShape, ModelShape
from streamslr.run.dealing import Deal, deal_linears
from streamslr.run.gram_costs import GramCosts
from streamslr.run.packed_costs import PackedCosts
from streamslr.run.quality import logits_bytes
from streamslr.run.traffic import gram_traffic, match_traffic, ring_bytes
from streamslr.solvers.methods import Method
from streamslr.solvers.rounding import peak_bytes, rounding_bytes
from streamslr.spec.allocation import Allocation, rounds_late
from streamslr.spec.owl import scoring_bytes

_LIBRARY_BUFFERS, _EARLY_BUFFERS = 120 * 2**20, 76 * 2**20
"""Host memory that torch, zarr and the tokenizer hold beside tensors, for buffers and pages of their code; and the part
of it that they hold before the first block. Measured by tools/bench_run.py with the process alone on its machine."""


@dataclass(frozen=True)
class PhaseCost:
    """Peak bytes while a phase runs, and FLOPs of all its runs together.

    sent_bytes: what a rank sends to others for one block, on average over ranks; 0 in one process.
    """

    name: str
    host_bytes: int
    gpu_bytes: int
    flops: float
    sent_bytes: int = 0


@dataclass(frozen=True)
class SolveStage:
    """Linears that are solved while the same Grams wait.

    linears: Names, by block.
    waiting: Bytes of the Grams that wait on a rank at most.
    packed: Bytes of the linears that are packed when the last one is.
    """

    linears: Sequence[Sequence[str]]
    waiting: int
    packed: int


@dataclass(frozen=True)
class Costs:
    """Costs of a run's phases on its busiest rank, in blocks of one kind.

    Bytes are those of the block that takes most, where the linears of blocks have different specs.
    """

    config: RunConfig
    model: ModelShape  # with the blocks of one kind alone
    allocation: Allocation
    method: Method
    device: torch.device
    dtype: torch.dtype  # of hidden states and products
    baseline: int  # bytes that the process holds before any work
    gpu_workspaces: int = 0  # bytes of libraries in torch's allocator, from the first product on
    world: int = 1  # ranks that share the run
    grams_at_once: int | None = None  # bytes of the Grams that one pass collects; None: one pass collects all
    expert_grams_at_once: int | None = None  # bytes of experts' Grams collected from kept inputs; None: in passes too
    solved_on_host: bool = False  # solved and refined linears wait in host memory while a block is matched

    def phases(self, micro_batch: int, grams_at: str, workspace: int | None) -> tuple[PhaseCost, ...]:
        """Return the cost of each phase, in the order that a run goes through them.

        Args:
            micro_batch: Windows that pass a block together.
            grams_at: Tier where Grams wait to be solved: "device", "host" or "disk".
            workspace: Bytes that one solve may take; None: as many as it likes.
        """
        return (
            *([self._survey(micro_batch)] if self.config.owl is not None else []),
            self._embed(micro_batch),
            self._load(),
            self.grams(micro_batch, grams_at),
            self.solve(grams_at, workspace),
            *([self.match(micro_batch)] if self.config.match else []),
            self._propagate(micro_batch),
            *([self._check(), self._compare()] if self.config.check_windows else []),
        )

    def solve(self, grams_at: str, workspace: int | None) -> PhaseCost:
        """Return the cost of phase solve; arguments as of `phases`."""
        flops = sum(max(deal.loads) for deal in self.deals)
        waiting = self.gram_costs.waiting_bytes if grams_at == "host" else 0
        sent = max(ring_bytes(self.packed_costs.linears_bytes(block), self.world) for block in self.model.blocks)
        if self._rounds_late:
            of_numbers = (self.packed_costs.linears_bytes(block, off_grid=True) for block in self.model.blocks)
            sent += max(ring_bytes(numbers, self.world) for numbers in of_numbers)
        compute = max(self._beside(stage, grams_at) + self._solver_bytes(stage, workspace) for stage in self._stages)
        if self._rounds_late:
            compute = max(compute, max(self._rounding(stage, grams_at) for stage in self._stages))
        return self._cost("solve", compute, waiting + self._matched_bytes[1], flops, sent)

    def solver_bytes(self, workspace: int | None) -> int:
        """Return the most bytes that one solve takes, or merging its result: two float32 matrices [o, d]."""
        return max(self._solver_bytes(stage, workspace) for stage in self._stages)

    def beside_solver(self, grams_at: str) -> int:
        """Return the most bytes beside a solve: block, Grams, packed linears, and W in float32 where the block is not.

        Where experts are blended as they are solved, the sums of all their kinds are there too.
        """
        return max(self._beside(stage, grams_at) for stage in self._stages)

    @cached_property
    def _stages(self) -> list[SolveStage]:
        """Parts of a block that are solved while the same Grams wait: all of it, or the experts' behind the others."""
        blocks, whole = self.model.blocks, self.packed_costs.waiting_bytes
        if not self.gram_costs.keeps_inputs:
            return [SolveStage([tuple(block.linears) for block in blocks], self.gram_costs.waiting_bytes, whole)]
        of_experts = [tuple(block.expert_of) for block in blocks]
        others = [tuple(block.linears.keys() - block.expert_of.keys()) for block in blocks]
        packed = max(starmap(self.packed_costs.waiting_linears_bytes, zip(blocks, others, strict=True)))
        stages = [
            SolveStage(others, self.gram_costs.passes_waiting_bytes, packed),
            SolveStage(of_experts, self.gram_costs.experts_waiting_bytes, whole),
        ]
        return [stage for stage in stages if any(stage.linears)]

    def _solver_bytes(self, stage: SolveStage, workspace: int | None) -> int:
        gpu, solver, most = self.device.type == "cuda", self.method.solver, 0
        for block, deal, names in zip(self.model.blocks, self.deals, stage.linears, strict=True):
            for name in names:
                o, d = block.linears[name]
                spec, rows = self.allocation[name], -(-o // self.world) if name in deal.by_rows else o
                spec = spec.off_grid if self._rounds_late else spec
                most = max(most, peak_bytes(solver, spec, rows, d, workspace, gpu), 8 * o * d)
        return most

    def _beside(self, stage: SolveStage, grams_at: str) -> int:
        pairs = zip(self.model.blocks, stage.linears, strict=True)
        shapes = [block.linears[name] for block, names in pairs for name in names]
        grams = stage.waiting if grams_at == "device" else grams_bytes([max(d for _, d in shapes)])
        grams += self._block.expert_sum_bytes if self.gram_costs.blends_late else 0
        weight = 0 if self._value_bytes == 4 else 4 * max(o * d for o, d in shapes)
        return self._block_bytes + grams + self._routing_bytes + stage.packed + weight

    def _rounding(self, stage: SolveStage, grams_at: str) -> int:
        """Return the bytes of coming onto a grid once blocks are matched, beside what `_beside` counts."""
        pairs = zip(self.model.blocks, stage.linears, strict=True)
        shapes = [(name, *block.linears[name]) for block, names in pairs for name in names]
        rounding = max(max(rounding_bytes(self.allocation[n], o, d, self._on_gpu), 8 * o * d) for n, o, d in shapes)
        as_matched = 4 * max(o * d for _, o, d in shapes) if self._value_bytes == 4 else 0  # else in place of W
        packed = max(map(self.packed_costs.linears_bytes, self.model.blocks))
        beside = self._beside(replace(stage, packed=packed), grams_at)
        return beside + rounding + as_matched + self._matched_bytes[0]

    @property
    def fixed_bytes(self) -> int:
        """Host bytes of the process and its libraries, in every phase but embed."""
        return self.baseline + _LIBRARY_BUFFERS

    def _survey(self, micro_batch: int) -> PhaseCost:
        on_gpu, host = self._moving(micro_batch, reads=("hidden",), writes=("hidden",))
        compute = self._block_bytes + self._pass_bytes(micro_batch) + on_gpu + scoring_bytes(self.widest)
        return self._cost("survey", compute, host, self._forward_flops)

    def _embed(self, micro_batch: int) -> PhaseCost:
        outputs = 2 * self._hidden_bytes(micro_batch)
        on_gpu, host = self._moving(micro_batch, writes=("hidden", "targets"))
        if self._on_gpu:
            on_gpu += 2 * 4 * self._tokens(micro_batch) * self.model.hidden_size  # float32 of the norm after the blocks
        else:
            host -= outputs
        compute = self.model.non_block_parameters * self._value_bytes + outputs + on_gpu
        return self._cost("embed", compute, host, 0.0)

    def _load(self) -> PhaseCost:
        # beside the weights, values that calls of blocks share: angles of the positions, masks
        shared = 0 if self.device.type == "cpu" else self._hidden_bytes(1) // 4
        return self._cost("load", self._block_bytes + shared, self._block.source_bytes, 0.0)

    def grams(self, micro_batch: int, grams_at: str) -> PhaseCost:
        """Return the cost of phase grams; arguments as of `phases`.

        Each group of Grams has a pass of its own, after which the Grams that the rank keeps go where they wait. Where
        the inputs of experts are kept, their Grams are collected from these by group.
        """
        passes, replays = self.passes(micro_batch, grams_at), self.replays(micro_batch, grams_at)
        host, gpu = max(passes.host_bytes, replays.host_bytes), max(passes.gpu_bytes, replays.gpu_bytes)
        flops, sent = passes.flops + replays.flops, passes.sent_bytes
        if self._rounds_late:  # Grams of the dense block, then of the matched one
            flops, sent = 2 * flops, 2 * sent
        return replace(passes, host_bytes=host, gpu_bytes=gpu, flops=flops, sent_bytes=sent)

    def passes(self, micro_batch: int, grams_at: str) -> PhaseCost:
        """Return the cost of the passes of the block in phase grams; arguments as of `phases`."""
        on_gpu, host = self._moving(micro_batch, reads=self._streams, writes=self._streams[1:])
        passing = self._pass_bytes(micro_batch) + self._product_bytes(micro_batch) + on_gpu
        sizes = self._tokens(micro_batch), self._value_bytes
        passing += kept_input_bytes(self._block, *sizes)
        grams = self.gram_costs.largest_group_bytes
        if self.grams_at_once is not None:
            grams += 0 if self.gram_costs.keeps_inputs else self._block.expert_sum_bytes
            host += self.gram_costs.waiting_bytes if grams_at == "host" else 0
        elif not self.gram_costs.keeps_inputs:
            blending = blend_bytes(self._block.expert_grams.values())  # after all windows
            passing = max(passing, self._block.expert_sum_bytes if self.gram_costs.blends_late else blending)
        on_gpu, writing = self._moving_inputs(micro_batch, writes=1)
        kept = on_gpu + self._routing_bytes
        pairs = list(zip(self.model.blocks, self.gram_costs.in_passes, strict=True))
        products = sum(b.token_fraction(o) * b.grams[o] ** 2 for b, groups in pairs for group in groups for o in group)
        flops = self._forward_flops + 2.0 * self._tokens(self.windows) * products
        again = sum(block.active_parameters * (len(groups) - 1) for block, groups in pairs)
        flops += 2.0 * self._tokens(self._fitted) * again
        sent = max(gram_traffic(*pair, self.world) for pair in zip(self.model.blocks, self.deals, strict=True))
        computed, waiting = self._matched_bytes
        compute = self._block_bytes + grams + passing + kept + computed
        return self._cost("grams", compute, host + writing + waiting, flops, sent)

    def replays(self, micro_batch: int, grams_at: str) -> PhaseCost:
        """Return the cost of collecting Grams from kept inputs in phase grams; arguments as of `phases`.

        Each Gram of an expert is collected twice: for the sum that rare experts are blended with, and to be solved.
        """
        on_gpu, host = self._moving_inputs(micro_batch, reads=1)
        passing = on_gpu + self._routing_bytes + self._product_bytes(micro_batch)
        sizes = self._tokens(micro_batch), self.model.hidden_size, self._value_bytes
        passing += routed_bytes(self._block, *sizes)
        grams = self.gram_costs.largest_expert_group_bytes + self._block.expert_sum_bytes
        grams += self.gram_costs.passes_waiting_bytes if grams_at == "device" else 0
        host += self.gram_costs.waiting_bytes if grams_at == "host" else 0
        work = 0.0
        for block in self.model.blocks if self.gram_costs.keeps_inputs else ():
            for group in (group for group in block.groups if group[0] in block.expert_of):
                products = sum(o * d for o, d in (block.linears[name] for name in group))
                work += block.token_fraction(group[0]) * (products + block.grams[group[0]] ** 2)
        flops = 2 * 2.0 * self._tokens(self._fitted) * work
        computed, waiting = self._matched_bytes
        return self._cost("grams", self._block_bytes + grams + passing + computed, host + waiting, flops)

    def match(self, micro_batch: int) -> PhaseCost:
        """Return the cost of phase match; arguments as of `phases`."""
        micro_batch = min(micro_batch, -(-self.config.match_batch // self.world))
        sizes = self._tokens(micro_batch), self.model.hidden_size, self._value_bytes, self._stream_bytes
        refined = 0 if self.solved_on_host else self.packed_costs.waiting_bytes
        refining = max(refine_bytes(block, self.allocation, *sizes, refined, self.world) for block in self.model.blocks)
        on_gpu, host = self._moving(micro_batch, reads=self._streams)
        compute = self._block_bytes + refining + self._score_bytes(micro_batch) + on_gpu
        if self.solved_on_host:
            host += self._stored_bytes
        else:
            compute += self.packed_costs.waiting_bytes  # as solved
        masters = max(count_masters(block, self.allocation) for block in self.model.blocks)
        sent, flops, epochs = 0, 0.0, self.config.epochs
        for count in (epochs, epochs_on_grid(epochs)) if self._rounds_late else (epochs,):
            sizes_of_steps = self.config.samples, self.config.match_batch, count
            steps = refine_steps(*sizes_of_steps)
            summed = refine_micro_batches(*sizes_of_steps, micro_batch, self.world)
            sent += match_traffic(masters, summed, steps, self.world)
            forward = self._forward_flops / self.windows
            flops += refine_flops(forward, *sizes_of_steps, self.config.held_out, self.world)
        return self._cost("match", compute, host, flops, sent)

    def _propagate(self, micro_batch: int) -> PhaseCost:
        on_gpu, host = self._moving(micro_batch, reads=self._streams, writes=("hidden",))
        compute = self._block_bytes + self._pass_bytes(micro_batch) + on_gpu
        if self.solved_on_host:
            host += self._stored_bytes
        else:
            compute += self._stored_bytes
            host += 0 if self.device.type == "cpu" else self.packed_costs.waiting_bytes  # on its way to the shard
        return self._cost("propagate", compute, host, self._forward_flops)

    def _check(self) -> PhaseCost:
        """Check windows pass the block one at a time, and their hidden states are compared in float32."""
        windows = -(-self.config.check_windows // self.world)
        host = self._waiting_for_check(reads=1, writes=1)
        compute = self._block_bytes + max(self._pass_bytes(1), self._compared_bytes)
        return self._cost("check", compute, host, 2 * windows * self._forward_flops / self.windows)

    def _compare(self) -> PhaseCost:
        """Logits of the check windows; where the vocabulary is unknown, all non-block tensors count as embeddings."""
        vocabulary = self.model.vocabulary or self.model.non_block_parameters // self.model.hidden_size
        logits = logits_bytes(self.config.seq_len, vocabulary)
        compute = self.model.non_block_parameters * self._value_bytes + 2 * self._hidden_bytes(1) + logits
        return self._cost("compare", compute, self._waiting_for_check(reads=2), 0.0)

    def _waiting_for_check(self, reads: int = 0, writes: int = 0) -> int:
        return transfer_bytes(self._hidden_bytes(1), reads, writes)

    @property
    def _compared_bytes(self) -> int:
        """Two windows of hidden states as stored and in float32, and their products."""
        return 2 * self._hidden_bytes(1) + 4 * 4 * self._tokens(1) * self.model.hidden_size

    @property
    def check_bytes(self) -> int:
        """Bytes of one boundary of the check windows, of one of their two streams."""
        return self.window_bytes("hidden") * -(-self.config.check_windows // self.world)

    def boundary_bytes(self, stream: str) -> int:
        """Return the bytes of one boundary of a stream, "hidden" or "targets"; 0 where the run has no such stream."""
        return self.window_bytes(stream) * self.windows if stream in self._streams else 0

    def window_bytes(self, stream: str) -> int:
        """Return the bytes of one window of a stream, "hidden" or "targets"; those of boundary 0 are equal."""
        seq_len, h = self.config.seq_len, self.model.hidden_size
        hidden = boundary_bytes(1, seq_len, h + self.model.carried, self._value_bytes)
        return max(hidden, boundary_bytes(1, seq_len, h, self._stream_bytes)) if stream == "targets" else hidden

    def _moving(self, micro_batch: int, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> tuple[int, int]:
        """Return the bytes on the GPU and on the host of the windows that a pass reads and writes, by streams."""
        windows = {name: self.window_bytes(name) for name in (*reads, *writes)}
        if not self._on_gpu:
            sizes = [(windows[name] * micro_batch, reads.count(name), writes.count(name)) for name in windows]
            return 0, sum(transfer_bytes(*size) for size in sizes)
        on_gpu = sum(gpu_transfer_bytes(windows[name] * micro_batch, reads=1) for name in reads)
        on_gpu += sum(gpu_transfer_bytes(windows[name] * micro_batch, writes=1) for name in writes)
        return on_gpu, host_transfer_bytes(self.window_bytes("targets"), len(reads), len(writes))

    def _cost(self, phase: str, compute: int, host: int, flops: float, sent: int = 0) -> PhaseCost:
        """Place the bytes of a phase: `compute` where blocks are computed, `host` on the host in any case."""
        on_cpu = self.device.type == "cpu"
        fixed = self.baseline + _EARLY_BUFFERS if phase == "embed" else self.fixed_bytes
        fixed += 0 if on_cpu else pinned_bytes(self.window_bytes("targets"))  # all phases share them
        on_host = fixed + host + (compute if on_cpu else 0)
        return PhaseCost(phase, on_host, 0 if on_cpu else compute + self.gpu_workspaces, flops, sent)

    @property
    def windows(self) -> int:
        """Windows of the fullest rank: fitted and held-out ones are each dealt round robin."""
        return self._fitted + -(-self.config.held_out // self.world)

    @property
    def _fitted(self) -> int:
        """Windows of the fullest rank that Grams and matching see."""
        return -(-self.config.samples // self.world)

    def _tokens(self, windows: int) -> int:
        return windows * self.config.seq_len

    def _hidden_bytes(self, windows: int) -> int:
        return self._tokens(windows) * (self.model.hidden_size + self.model.carried) * self._value_bytes

    def _pass_bytes(self, micro_batch: int) -> int:
        """Activations and attention scores of a pass without gradients, and what blocks hand on, in and out."""
        sizes = self._tokens(micro_batch), self.model.hidden_size, self._value_bytes, self._stream_bytes
        carried = 2 * self._tokens(micro_batch) * self.model.carried * self._value_bytes
        return activation_bytes(self._block, *sizes) + self._score_bytes(micro_batch) + carried

    def _score_bytes(self, micro_batch: int) -> int:
        return score_bytes(micro_batch, self.config.seq_len, self.model.eager_heads)

    def _product_bytes(self, micro_batch: int) -> int:
        return product_bytes(self.widest, self._tokens(micro_batch), self._value_bytes, self._on_gpu)

    @property
    def _streams(self) -> tuple[str, ...]:
        """Streams of hidden states: with matching also the targets."""
        return ("hidden", "targets") if self.config.match else ("hidden",)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type != "cpu"

    @property
    def _value_bytes(self) -> int:
        return self.dtype.itemsize

    @property
    def _stream_bytes(self) -> int:
        """Bytes of one number of the residual stream inside blocks, and of targets."""
        return 4 if self.model.float32_stream else self._value_bytes

    @cached_property
    def deals(self) -> list[Deal]:
        """Deal of the linears of each block."""
        who = self.allocation, self.method, self.world, self._on_gpu
        return [deal_linears(block.groups, block.linears, *who) for block in self.model.blocks]

    @cached_property
    def packed_costs(self) -> PackedCosts:
        """Bytes of the compressed blocks."""
        return PackedCosts(self.model, self.allocation, self._rounds_late)

    @cached_property
    def gram_costs(self) -> GramCosts:
        """Bytes of the blocks' Grams."""
        at_once = self.grams_at_once, self.expert_grams_at_once
        return GramCosts(self.model.blocks, self.deals, self.world, *at_once)

    @property
    def _block(self) -> BlockShape:
        """Shape of every block; only names and specs of linears differ."""
        return self.model.blocks[0]

    @property
    def _block_bytes(self) -> int:
        return self._block.parameters * self._value_bytes

    @property
    def kept_input_bytes(self) -> int:
        """Bytes of the kept inputs of a block's experts, in the scratch folder."""
        return self.gram_costs.modules_kept * self._fitted * self.window_bytes("hidden")

    @property
    def _routing_bytes(self) -> int:
        return self.gram_costs.routing_bytes(self._tokens(self._fitted))

    def _moving_inputs(self, micro_batch: int, reads: int = 0, writes: int = 0) -> tuple[int, int]:
        """Return the bytes on the GPU and on the host of kept inputs on their way.

        A pass writes those of all modules of experts in the block, and later one module's are read at a time.
        """
        if not self.gram_costs.keeps_inputs:
            return 0, 0
        writes *= self.gram_costs.modules_kept
        moved = self._hidden_bytes(micro_batch)
        if not self._on_gpu:
            return 0, transfer_bytes(moved, reads, writes)
        host = host_transfer_bytes(self.window_bytes("targets"), reads, writes)
        return gpu_transfer_bytes(moved, reads, writes), host

    @property
    def _rounds_late(self) -> bool:
        """True where S comes onto its grid between two matchings."""
        return rounds_late(self.config, self.allocation)

    @property
    def _matched_bytes(self) -> tuple[int, int]:
        """Bytes, where blocks are computed and in host memory, of weights as matched that wait for their grid."""
        waiting = self.packed_costs.waiting_bytes if self._rounds_late else 0
        return (0, waiting) if self.solved_on_host else (waiting, 0)

    @property
    def _stored_bytes(self) -> int:
        """Bytes of a block's packed linears, with matching as solved and as refined."""
        return (2 if self.config.match else 1) * self.packed_costs.waiting_bytes

    @cached_property
    def widest(self) -> int:
        """Width of the widest input."""
        return max(self._block.grams.values())

    @cached_property
    def _forward_flops(self) -> float:
        """FLOPs of one pass of all windows through all blocks."""
        return 2.0 * self._tokens(self.windows) * sum(block.active_parameters for block in self.model.blocks)
