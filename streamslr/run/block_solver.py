"""One block: its Grams to the ranks that need them, its linears solved there, the solutions to all ranks."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from streamslr.calibration.expert_grams import ExpertSum, add_experts, blend_expert, kinds_to_blend, warn_of_few_tokens
from streamslr.calibration.grams import (
    Gram,
    count_rows,
    group_grams,
    offload_grams,
    sum_grams,
)
from streamslr.calibration.hidden_states import HiddenStates
from streamslr.calibration.routed_inputs import RoutedInputs
from streamslr.errors import InputError
from streamslr.io.packing import merge
from streamslr.io.scratch import rank_scratch
from streamslr.model.blockwise import Block
from streamslr.model.shape import BlockShape
from streamslr.ranks import ALONE, Ranks
from streamslr.run.context import RunContext
from streamslr.run.dealing import Deal, deal_linears
from streamslr.run.journal import LinearRecord
from streamslr.run.passes import Boundary, Passes
from streamslr.run.solve_linear import LinearCompressor, Solved
from streamslr.solvers.base import GramCache
from streamslr.spec.allocation import Allocation
from streamslr.spec.pattern import SparsityPattern


@dataclass(frozen=True)
class WaitingGrams:
    """Grams of a block that wait to be solved on this rank, and what those of experts in groups are collected from.

    deal: Who solves which linear.
    grams: Linears that share a Gram, and a function that returns it once.
    expert_sums: For each kind of experts, the sum of their Grams, to blend rare ones with; empty where that is done.
    kept: Inputs of experts, for Grams that are collected when it is their turn.
    groups: Owners of these Grams, by group.
    rows: Owner of a Gram -> its rows over all ranks.
    """

    deal: Deal
    grams: deque[tuple[tuple[str, ...], Callable[[], Gram]]] = field(default_factory=deque)
    expert_sums: dict[str, ExpertSum] = field(default_factory=dict)
    kept: list[RoutedInputs] = field(default_factory=list)
    groups: Sequence[Sequence[str]] = ()
    rows: dict[str, int] = field(default_factory=dict)

    def with_rows_of_all(self, grams: list[Gram]) -> list[Gram]:
        """Return Grams of this rank's windows, with the rows of all ranks; empties `grams`, whose matrices they are."""
        counted = [replace(gram, rows=self.rows[gram.linears[0]]) for gram in grams]
        grams.clear()
        return counted


Compress = Callable[[str, Gram, GramCache, Ranks], Solved]
"""Function of (name of a linear, its Gram, what those before it with that Gram left, ranks that do it together) that
puts what is stored of the linear into the live block and returns it, with its record."""


@dataclass(frozen=True)
class BlockSolver:
    """Solver of a run's blocks, before they are matched, and for their grids between two matchings."""

    context: RunContext
    allocation: Allocation
    passes: Passes
    linear_compressor: LinearCompressor

    def collect(
        self, block: Block, boundary: Boundary, matched: bool = False
    ) -> tuple[WaitingGrams, HiddenStates | None]:
        """Collect the Grams of the live block and its targets; each Gram goes to the ranks that need it.

        The block is dense; or it is matched already, and then the boundary has no targets, and nothing is warned of
        that has been before.

        Where not all Grams fit at once, the inputs of experts are kept, from which `solve` collects their Grams group
        by group. Where the others do not fit either, the windows pass the block once for each group of them.
        """
        context, passes, ranks = self.context, self.passes, self.context.ranks
        plan, folder = context.plan, rank_scratch(context.config, ranks)
        shape = context.shape.blocks[block.index]
        if ranks.world == 1 and plan.gram_bytes_at_once is None and plan.expert_gram_bytes_at_once is None:
            collected = passes.retry("grams", partial(passes.collect, block, boundary, warn=not matched))
            collected.grams.sort(key=_order(shape))
            linears = [gram.linears for gram in collected.grams]
            deal = self._deal(block, linears)
            takes = offload_grams(collected.grams, plan.grams_at, folder)
            return WaitingGrams(deal, deque(zip(linears, takes, strict=True))), collected.targets
        in_passes, from_inputs = group_grams(shape, plan.gram_bytes_at_once, plan.expert_gram_bytes_at_once)
        keep = dict.fromkeys(block.expert_of[owner][0] for group in from_inputs for owner in group)
        waiting = WaitingGrams(self._deal(block, shape.groups), groups=from_inputs)
        targets, entering = None, boundary
        for owners in in_passes:
            collect = partial(passes.collect, block, entering, owners, blend=False, keep=() if waiting.rows else keep)
            collected = passes.retry("grams", collect)
            with passes.timer.phase("grams", steps=0, block=block.index):
                if not waiting.rows:  # the first pass
                    seen = count_rows(sorted(collected.seen, key=_order(shape)), ranks)
                    waiting.rows.update((gram.linears[0], gram.rows) for gram in seen)
                    waiting.kept.extend(collected.kept)
                    targets, entering = collected.targets, Boundary(boundary.hidden, None)
                grams = sorted(waiting.with_rows_of_all(collected.grams), key=_order(shape))
                add_experts(waiting.expert_sums, grams, block.experts)
                self._let_wait(waiting, grams)
        if [gram.linears for gram in seen] != list(shape.groups):
            raise InputError(
                f"{block.name}: its linears share their inputs in another way for these windows than its shapes say; "
                "start without torchrun, with memory for all Gram matrices at once"
            )
        if not matched:
            warn_of_few_tokens(block, seen)
        blended = kinds_to_blend(seen, block.experts)
        for group in from_inputs:
            if owners := [owner for owner in group if block.experts[owner] in blended]:
                add_experts(waiting.expert_sums, self._collect_experts(block, waiting, owners), block.experts)
        for kind in waiting.expert_sums.keys() - blended:
            del waiting.expert_sums[kind]
        for of_kind in waiting.expert_sums.values():
            ranks.sum_(of_kind.matrix)
        return waiting, targets

    def _collect_experts(self, block: Block, waiting: WaitingGrams, owners: Sequence[str]) -> list[Gram]:
        """Return the Grams of experts from this rank's kept inputs, with the rows of all ranks."""
        collect = partial(self.passes.collect_experts, block, waiting.kept, owners)
        grams = waiting.with_rows_of_all(self.passes.retry("grams", collect))
        return sorted(grams, key=_order(self.context.shape.blocks[block.index]))

    def _let_wait(self, waiting: WaitingGrams, grams: list[Gram]) -> None:
        """Sum Grams to the ranks that need them, where they wait to be solved. Empties `grams`."""
        ranks = self.context.ranks
        needed = sum_grams(grams, lambda gram: waiting.deal.needs(gram.linears, ranks.world), ranks)
        linears = [gram.linears for gram in needed]
        folder = rank_scratch(self.context.config, ranks)
        takes = offload_grams(needed, self.context.plan.grams_at, folder, first=len(waiting.grams))
        waiting.grams.extend(zip(linears, takes, strict=True))

    def _deal(self, block: Block, groups: Sequence[tuple[str, ...]]) -> Deal:
        """Deal the block's linears to ranks; groups: those that share a Gram."""
        context, shapes = self.context, self.context.blockwise.linears[block.index]
        on_gpu = context.device.type == "cuda"
        return deal_linears(groups, shapes, self.allocation, context.method, context.ranks.world, on_gpu)

    def solve(
        self, block: Block, waiting: WaitingGrams
    ) -> tuple[dict[str, Mapping[str, Tensor]], tuple[LinearRecord, ...]]:
        """Compress every linear of the live dense block; return them packed, and their records. Empties `waiting`."""

        def compress(name: str, gram: Gram, cache: GramCache, ranks: Ranks) -> Solved:
            weight, dtype = partial(self.context.blockwise.stored_weight, name), self._dtype(name)
            packed, record = self.linear_compressor.compress(
                name, block.linears[name], weight, gram.matrix, dtype, cache, ranks
            )
            return packed, replace(record, rows=gram.rows, warnings=(*gram.warnings(name), *record.warnings))

        return self._for_each_linear(block, waiting, compress)

    def round(
        self,
        block: Block,
        waiting: WaitingGrams,
        matched: Mapping[str, Mapping[str, Tensor]],
        records: Sequence[LinearRecord],
    ) -> tuple[dict[str, Mapping[str, Tensor]], tuple[LinearRecord, ...]]:
        """Bring S of every linear of the live matched block onto its grid; return as `solve`. Empties `waiting`.

        Args:
            block: Live block, with S + U·V as matched.
            waiting: Gram matrices of what it gives its linears.
            matched: Its packed linears.
            records: Their records.
        """
        record_of = {record.name: record for record in records}

        def round_one(name: str, gram: Gram, _: GramCache, ranks: Ranks) -> Solved:
            before = matched[name], record_of[name]
            linear, dtype = block.linears[name], self._dtype(name)
            return self.linear_compressor.round(name, linear, gram.matrix, dtype, before, ranks)

        return self._for_each_linear(block, waiting, round_one)

    def _dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a linear's weight is stored in."""
        return self.context.blockwise.stored_dtype(f"{name}.weight")

    def _for_each_linear(
        self, block: Block, waiting: WaitingGrams, work: Compress
    ) -> tuple[dict[str, Mapping[str, Tensor]], tuple[LinearRecord, ...]]:
        """Do `work` for every linear of the live block; return them packed, and their records. Empties `waiting`.

        Each rank takes its own linears, after those that all take together, and then gets those of the others. Grams of
        experts in groups are collected when their turn comes; no expert is in two groups.
        """
        ranks, deal, timer = self.context.ranks, waiting.deal, self.passes.timer
        solved: dict[str, Solved] = {}
        for owners in ((), *waiting.groups):
            if owners:
                grams = self._collect_experts(block, waiting, owners)
                with timer.phase("grams", steps=0, block=block.index):
                    self._let_wait(waiting, grams)
            with timer.phase("solve", steps=len(block.linears), block=block.index) as step:
                step(len(solved))
                solved |= self._work_on_waiting(block, waiting, work, step)
        for inputs in waiting.kept:
            inputs.states.drop()
        waiting.kept.clear()  # before the block is matched, whose plan counts neither these nor the sums
        waiting.expert_sums.clear()
        with timer.phase("solve", steps=len(block.linears), block=block.index) as step:
            step(len(solved))
            patterns = {name: self.allocation[name].pattern for name in block.linears}
            others = exchange_solved(block, solved, deal, patterns, ranks)
            step(len(others))
        solved |= others
        return {name: solved[name][0] for name in deal.linears}, tuple(solved[name][1] for name in deal.linears)

    def _work_on_waiting(
        self, block: Block, waiting: WaitingGrams, work: Compress, step: Callable[[int], None]
    ) -> dict[str, Solved]:
        """Do `work` for the linears whose Grams wait on this rank."""
        context, ranks, deal = self.context, self.context.ranks, waiting.deal
        solved: dict[str, Solved] = {}
        # Linears that all ranks solve together come first, so that no rank waits for another's own.
        order = deque(sorted(waiting.grams, key=lambda entry: deal.by_rows.isdisjoint(entry[0])))
        waiting.grams.clear()
        while order:
            gram = order.popleft()[1]()  # freed once its linears are solved
            gram = replace(gram, matrix=gram.matrix.to(context.device))
            if waiting.expert_sums and not gram.shared_fraction:
                gram = blend_expert(gram, waiting.expert_sums, block.experts)
            own = [name for name in gram.linears if deal.owners.get(name) == ranks.rank]
            together = [name for name in gram.linears if name in deal.by_rows and name not in solved]
            if together and own:
                order.append((gram.linears, partial(replace, gram)))
            cache = self.linear_compressor.gram_cache(block.linears, together or own)
            for name in together or own:
                solved[name] = work(name, gram, cache, ranks if together else ALONE)
                step(1)
            del gram, cache
        return solved


def _order(shape: BlockShape) -> Callable[[Gram], int]:
    """Return the key by which Grams are in the order of their block's shape; in a pass, rare experts may come last."""
    places = {group: place for place, group in enumerate(shape.groups)}
    return lambda gram: places.get(gram.linears, len(places))


def exchange_solved(
    block: Block, own: Mapping[str, Solved], deal: Deal, patterns: Mapping[str, SparsityPattern], ranks: Ranks
) -> dict[str, Solved]:
    """Return the linears that other ranks solved, and put them into the live block.

    Args:
        block: The live block.
        own: What this rank has solved.
        deal: Who solved which linear.
        patterns: Pattern of each linear.
        ranks: The ranks.
    """
    described = {
        name: (record, {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in packed.items()})
        for name, (packed, record) in own.items()
        if name in deal.owners
    }
    solved: dict[str, Solved] = {}
    descriptions = [entry for of_rank in ranks.gather(described) for entry in of_rank.items()]
    for name, (record, parts) in descriptions:
        owner, linear = deal.owners[name], block.linears[name]
        packed = (
            own[name][0]
            if owner == ranks.rank
            else {
                part: torch.empty(shape, dtype=dtype, device=linear.weight.device)
                for part, (shape, dtype) in parts.items()
            }
        )
        for tensor in packed.values():
            ranks.broadcast_(tensor, owner)
        if owner != ranks.rank:
            shape = (linear.weight.shape[0], linear.weight.shape[1])
            linear.weight.copy_(merge(packed, patterns[name], shape, linear.weight.dtype))
            solved[name] = packed, record
    return solved
