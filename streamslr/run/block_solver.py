"""One block: its Grams to the ranks that need them, its linears solved there, the solutions to all ranks."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from streamslr.calibration.expert_grams import ExpertSum, add_experts, blend_expert, kinds_to_blend, warn_of_few_tokens
from streamslr.calibration.grams import (
    Gram,
    count_rows,
    gram_groups,
    offload_grams,
    sum_grams,
)
from streamslr.calibration.hidden_states import HiddenStates
from streamslr.errors import InputError
from streamslr.io.packing import merge
from streamslr.io.scratch import rank_scratch
from streamslr.model.blockwise import Block
from streamslr.ranks import ALONE, Ranks
from streamslr.run.context import RunContext
from streamslr.run.dealing import Deal, deal_linears
from streamslr.run.journal import LinearRecord
from streamslr.run.passes import Boundary, Passes
from streamslr.run.solve_linear import LinearCompressor
from streamslr.spec.allocation import Allocation
from streamslr.spec.pattern import SparsityPattern


@dataclass(frozen=True)
class WaitingGrams:
    """Grams of a block that wait to be solved on this rank.

    deal: Who solves which linear.
    expert_sums: For each kind of experts, the sum of their Grams, to blend rare ones with; empty where that is done.
    grams: Linears that share a Gram, and a function that returns it once.
    """

    deal: Deal
    expert_sums: dict[str, ExpertSum]
    grams: deque[tuple[tuple[str, ...], Callable[[], Gram]]]


Solved = tuple[Mapping[str, Tensor], LinearRecord]
"""A packed linear and its record."""


@dataclass(frozen=True)
class BlockSolver:
    """Solver of a run's blocks, before they are matched."""

    context: RunContext
    allocation: Allocation
    passes: Passes
    linear_compressor: LinearCompressor

    def collect(self, block: Block, boundary: Boundary) -> tuple[WaitingGrams, HiddenStates | None]:
        """Collect the Grams of the dense block and its targets; each Gram goes to the ranks that need it.

        Where not all Grams fit at once, the windows pass the block once for each group of them.
        """
        context, passes, ranks = self.context, self.passes, self.context.ranks
        at_once, folder = context.plan.gram_bytes_at_once, rank_scratch(context.config, ranks)
        if ranks.world == 1 and at_once is None:
            grams, targets = passes.retry("grams", partial(passes.collect, block, boundary))
            deal = self._deal(block, [gram.linears for gram in grams])
            linears = [gram.linears for gram in grams]
            takes = offload_grams(grams, context.plan.grams_at, folder)
            return WaitingGrams(deal, {}, deque(zip(linears, takes, strict=True))), targets
        shape = context.shape.blocks[block.index]
        waiting = WaitingGrams(self._deal(block, shape.groups), {}, deque())
        targets, entering, seen = None, boundary, []
        for owners in gram_groups(shape.grams, at_once):
            collect = partial(passes.collect, block, entering, owners, blend=False)
            grams, of_block = passes.retry("grams", collect)
            targets, entering = targets or of_block, Boundary(boundary.hidden, None)
            with self.passes.timer.phase("grams", steps=0, block=block.index):
                grams = count_rows(grams, ranks)
                seen += [replace(gram, matrix=gram.matrix.to("meta")) for gram in grams]
                add_experts(waiting.expert_sums, grams, block.experts)
                grams = sum_grams(grams, lambda gram: waiting.deal.needs(gram.linears, ranks.world), ranks)
                linears = [gram.linears for gram in grams]
                takes = offload_grams(grams, context.plan.grams_at, folder, first=len(waiting.grams))
                waiting.grams.extend(zip(linears, takes, strict=True))
        if [gram.linears for gram in seen] != list(shape.groups):
            raise InputError(
                f"{block.name}: its linears share their inputs in another way for these windows than its shapes say; "
                "start without torchrun, with memory for all Gram matrices at once"
            )
        for kind in waiting.expert_sums.keys() - kinds_to_blend(seen, block.experts):
            del waiting.expert_sums[kind]
        for of_kind in waiting.expert_sums.values():
            ranks.sum_(of_kind.matrix)
        warn_of_few_tokens(block, seen)
        return waiting, targets

    def _deal(self, block: Block, groups: Sequence[tuple[str, ...]]) -> Deal:
        """Deal the block's linears to ranks; groups: those that share a Gram."""
        context, shapes = self.context, self.context.blockwise.linears[block.index]
        on_gpu = context.device.type == "cuda"
        return deal_linears(groups, shapes, self.allocation, context.method, context.ranks.world, on_gpu)

    def solve(
        self, block: Block, waiting: WaitingGrams, step: Callable[[int], None]
    ) -> tuple[dict[str, Mapping[str, Tensor]], tuple[LinearRecord, ...]]:
        """Compress every linear of the live block; return them packed, and their records. Empties `waiting`.

        Each rank solves its own linears, after those that all solve together, and then gets those of the others.
        """
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
                dtype = context.blockwise.stored_dtype(f"{name}.weight")
                weight = partial(context.blockwise.stored_weight, name)
                packed, record = self.linear_compressor.compress(
                    name, block.linears[name], weight, gram.matrix, dtype, cache, ranks if together else ALONE
                )
                warnings = (*gram.warnings(name), *record.warnings)
                solved[name] = packed, replace(record, rows=gram.rows, warnings=warnings)
                step(1)
            del gram, cache
        step(len(block.linears) - len(solved))
        patterns = {name: self.allocation[name].pattern for name in block.linears}
        solved |= exchange_solved(block, solved, deal, patterns, ranks)
        return {name: solved[name][0] for name in deal.linears}, tuple(solved[name][1] for name in deal.linears)


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
