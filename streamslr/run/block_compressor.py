"""One block from its Grams to its shard: solved, matched, S brought onto its grid, passed on, and written."""

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from streamslr.calibration.hidden_states import HiddenStates
from streamslr.errors import InputError
from streamslr.io.folder import write_block
from streamslr.io.safetensors_file import WrittenShard
from streamslr.masters import BlockWeights, epochs_on_grid
from streamslr.matching import CompressedBlock
from streamslr.model.blockwise import Block
from streamslr.run.block_solver import BlockSolver, WaitingGrams
from streamslr.run.context import RunContext
from streamslr.run.journal import LinearRecord, MatchRecord
from streamslr.run.passes import Boundary, Passes
from streamslr.spec.allocation import Allocation, rounds_late
from streamslr.spec.pattern import SparsityPattern

log = logging.getLogger("streamslr")


@dataclass(frozen=True)
class Compressed:
    """A compressed block.

    leaving: Hidden states that leave it.
    shard: Its shard.
    linears: Records of its linears.
    matching: The matching of what is stored; None in a run without.
    matching_off_grid: The matching before S came onto its grid; its loss afterwards is of its last epoch. None where
        there was none.
    """

    leaving: HiddenStates
    shard: WrittenShard
    linears: tuple[LinearRecord, ...]
    matching: MatchRecord | None = None
    matching_off_grid: MatchRecord | None = None


@dataclass(frozen=True)
class BlockCompressor:
    """Compressor of a run's blocks, from their Grams to their shards."""

    context: RunContext
    allocation: Allocation
    passes: Passes
    solver: BlockSolver

    def compress(
        self, block: Block, grams: WaitingGrams, hidden: HiddenStates, targets: HiddenStates | None
    ) -> Compressed:
        """Solve the linears of the live block, match it to its targets, pass the windows on, and write its shard.

        Where S has a grid, the block is matched with numbers first; then S comes onto its grid in the metric of what
        the matched block gives its linears, and the block is matched once more, in half the epochs.

        Args:
            block: Live block, dense.
            grams: Its Gram matrices; emptied.
            hidden: What enters the block.
            targets: What should leave it; None without matching.
        """
        # Solve each linear: S + U·V takes the place of its weight. Grams of many experts are collected as it goes on.
        packed, records = self.solver.solve(block, grams)
        solved = self._waiting(BlockWeights(packed, self.context.blockwise.as_stored(block.index)))
        del packed
        if targets is None:
            leaving, _, shard = self.propagate_and_write(block, solved, hidden, None)
            return Compressed(leaving, shard, records)
        # Match the block to its targets, first with numbers where S has a grid.
        epochs, off_grid = self.context.config.epochs, None
        if rounds_late(self.context.config, {name: self.allocation[name] for name in block.linears}):
            with self.passes.windows.resident(hidden, targets):
                solved, off_grid = self.match_off_grid(block, solved, hidden, targets)
            # Bring S onto its grid, given what the matched block gives its linears.
            grams, _ = self.solver.collect(block, Boundary(hidden, None), matched=True)
            on_grid, records = self.solver.round(block, grams, solved.packed, records)
            solved, epochs = self._waiting(replace(solved, packed=on_grid)), epochs_on_grid(epochs)
            del on_grid
        with self.passes.windows.resident(hidden, targets):
            leaving, shard, matching = self.match_and_propagate(block, solved, hidden, targets, epochs)
        return Compressed(leaving, shard, records, matching, off_grid)

    def match_off_grid(
        self, block: Block, solved: BlockWeights, hidden: HiddenStates, targets: HiddenStates
    ) -> tuple[BlockWeights, MatchRecord]:
        """Match the block with numbers in S; keep it as solved where that does not lower its loss."""
        compressed = CompressedBlock(block, self._patterns(block))
        epochs = self.context.config.epochs
        matched, curve, held_out = self._match(compressed, solved, hidden, targets, epochs)
        loss = curve[-1]
        if len(curve) == 2:  # the mean over the only epoch of steps; of one step, that before it
            leaving, measured = self.passes.retry("propagate", partial(self.passes.propagate, block, hidden, targets))
            leaving.drop()
            loss = measured.over(self.context.ranks).relative
        record = _match_record(curve, held_out, loss)
        if record.applied:
            return matched, record
        if matched is not solved:  # it was trained
            _warn_of(block, record)
            compressed.load(solved)
        return solved, record

    def match_and_propagate(
        self, block: Block, solved: BlockWeights, hidden: HiddenStates, targets: HiddenStates, epochs: int
    ) -> tuple[HiddenStates, WrittenShard, MatchRecord]:
        """Match the block and pass the windows on; keep it as solved where that does not lower its loss."""
        compressed = CompressedBlock(block, self._patterns(block))
        matched, curve, held_out = self._match(compressed, solved, hidden, targets, epochs)
        leaving, loss, shard = self.propagate_and_write(block, matched, hidden, targets)
        record = _match_record(curve, held_out, loss)
        if not record.applied and matched is not solved:  # it was trained, for nothing
            _warn_of(block, record)
            compressed.load(solved)
            leaving.drop()
            leaving, _, shard = self.propagate_and_write(block, solved, hidden, None)
        return leaving, shard, record

    def propagate_and_write(
        self, block: Block, weights: BlockWeights, hidden: HiddenStates, targets: HiddenStates | None
    ) -> tuple[HiddenStates, float, WrittenShard]:
        """Pass the windows through the block, while rank 0 writes `weights`, which it must hold already, as its shard.

        Returns:
            The hidden states that leave the block; their loss against `targets`, 0 without any; and the shard.
        """
        ranks = self.context.ranks
        with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer:
            writing = writer.submit(self._write, block, weights) if ranks.rank == 0 else None
            leaving, loss = self.passes.retry("propagate", partial(self.passes.propagate, block, hidden, targets))
            shard = writing.result() if writing else None
        return leaving, loss.over(ranks).relative, ranks.tell(shard)  # type: ignore[return-value]

    def _write(self, block: Block, weights: BlockWeights) -> WrittenShard:
        """Write the block's shard."""
        shapes = self.context.blockwise.linears[block.index]
        linears = {
            name: (weights.packed[name], pattern, shapes[name]) for name, pattern in self._patterns(block).items()
        }
        others = self.context.blockwise.by_key(weights.other_tensors)
        return write_block(self.context.config.out, block.index, linears, others)

    def _match(
        self, block: CompressedBlock, solved: BlockWeights, hidden: HiddenStates, targets: HiddenStates, epochs: int
    ) -> tuple[BlockWeights, tuple[float, ...], tuple[float, ...]]:
        """Match a block as `Passes.match` does, once more in less memory where that runs out."""
        work = partial(self.passes.match, block, solved, hidden, targets, epochs)
        matched, curve, held_out = self.passes.retry_match(work)
        if not math.isfinite(curve[0]):
            name = self.context.blockwise.block_names[block.index]
            raise InputError(
                f"{name}: its output is so large or small that its loss is {curve[0]}; check the model's weights"
            )
        return matched, curve, held_out

    def _waiting(self, weights: BlockWeights) -> BlockWeights:
        """Return a block's weights where the plan lets them wait while it is matched."""
        if self.context.plan.solved_at != "host":
            return weights
        packed = {name: {part: t.cpu() for part, t in parts.items()} for name, parts in weights.packed.items()}
        return replace(weights, packed=packed)

    def _patterns(self, block: Block) -> dict[str, SparsityPattern]:
        return {name: self.allocation[name].pattern for name in block.linears}


def _match_record(curve: Sequence[float], held_out: Sequence[float], loss: float) -> MatchRecord:
    """Return the record of a matching, given its losses by epoch and that at the end.

    It is applied where the loss has fallen, on held-out windows too if there are any.
    """
    applied = loss < curve[0] and (not held_out or held_out[-1] < held_out[0])
    by_epoch = [tuple(map(_finite_or_none, losses)) for losses in (curve, held_out)]
    return MatchRecord(curve[0], _finite_or_none(loss), applied, *by_epoch)


def _warn_of(block: Block, record: MatchRecord) -> None:
    """Log that a block is kept as it was, and which loss matching did not lower."""
    before, after, where = record.loss_before, record.loss_after, ""
    if record.held_out and after is not None and after < before:
        before, after, where = record.held_out[0] or math.nan, record.held_out[-1], " on held-out windows"
    shown = "not finite" if after is None else f"{after:.3g}"
    log.warning("%s: matching did not lower its loss of %.3g%s (%s); kept as it was", block.name, before, where, shown)


def _finite_or_none(loss: float) -> float | None:
    """Return None for NaN and infinity, which JSON does not have."""
    return loss if math.isfinite(loss) else None
