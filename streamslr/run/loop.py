"""The block loop: load, Grams, solve, match, propagate, write, commit. Reads as the algorithm (DESIGN, section 4)."""

import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from streamslr.calibration.grams import Gram, offload_grams
from streamslr.calibration.tokens import calibration_windows
from streamslr.config import format_bytes
from streamslr.errors import BudgetError, first_line
from streamslr.io.folder import (
    discard_uncommitted,
    write_auxiliary_files,
    write_block,
    write_index,
    write_non_block,
)
from streamslr.io.shards import WrittenShard
from streamslr.matching import BlockWeights, CompressedBlock
from streamslr.memory import held_to_gpu_budget, is_out_of_memory, retry_on_oom
from streamslr.model.checkpoint import open_checkpoint
from streamslr.run.context import RunContext
from streamslr.run.journal import BlockRecord, Journal, JournalState, LinearRecord, MatchRecord
from streamslr.run.passes import Passes, Streams
from streamslr.run.progress import Display, NoDisplay, PhaseTimer
from streamslr.run.solve_linear import compress_linear
from streamslr.solvers.base import Solver
from streamslr.spec.allocation import Allocation, allocate, as_json, common_pattern, from_json, in_words

log = logging.getLogger("streamslr")


def run(context: RunContext, display: Display | None = None) -> JournalState:
    """Compress context.config.model into context.config.out, or go on where an earlier call stopped.

    Raises a StreamslrError for whatever a user can mend; every block that was committed stays.
    """
    context.require_fit()
    config = context.config
    calibration = calibration_windows(
        context.checkpoint.tokenizer(), config.calibration, config.samples, config.seq_len, config.seed
    )
    blocks = len(context.blockwise.block_names)
    start = JournalState(
        {**context.fingerprint, "tokens": calibration.digest},
        calibration.source,
        blocks,
        context.plan.micro_batch,
        context.plan.solver_workspace,
        model=context.model_name,
        made_with=context.made_with,
        allocation=None if context.config.owl is not None else as_json(context.allocation),
    )
    planned = context.plan.memory(context.host_mem, context.gpu_mem)
    with Journal(config.out, start) as journal:
        done = len(journal.state.blocks)
        if done:
            log.info("%s: %d of %d blocks are done, going on", config.out, done, blocks)
        with (
            PhaseTimer(display or NoDisplay(), context.device, blocks, done, config.host_mem, planned) as timer,
            held_to_gpu_budget(context.device, context.gpu_mem),
            torch.no_grad(),
        ):
            passes = Passes(context, calibration.ids, timer, journal.state.micro_batch)
            try:
                if context.config.owl is not None:
                    context = replace(context, allocation=surveyed(context, journal, timer, passes))
                return Compression(context, journal, timer, passes, context.method.solver).run()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise BudgetError(
                    f"memory ran out: {first_line(error)}. Free some or raise the budget, then start the same "
                    f"line again; finished blocks are kept"
                ) from error


def surveyed(context: RunContext, journal: Journal, timer: PhaseTimer, passes: Passes) -> Allocation:
    """What each linear becomes by OWL: of the journal, or by one dense pass over all blocks, which is noted there."""
    if journal.state.allocation is None:
        blockwise, outliers = context.blockwise, []
        log.info("counting the outliers of %d blocks, which decide their sparsity", len(blockwise.block_names))
        hidden = passes.retry("embed", partial(passes.embed, targets=False)).hidden
        for i in range(len(blockwise.block_names)):
            upcoming, share = passes.retry("survey", partial(passes.survey, i, hidden))
            outliers.append(share)
            hidden.drop()
            hidden = upcoming
            blockwise.evict_block(i)
            context.checkpoint.release(blockwise.block_tensors[i])
        hidden.drop()
        allocation = allocate(context.config, blockwise.linears, outliers)
        for name, linears in zip(blockwise.block_names, blockwise.linears, strict=True):
            log.info("%s becomes %s", name, in_words(allocation[linear] for linear in linears))
        journal.commit_survey(outliers, as_json(allocation), passes.micro_batch, timer.take())
    assert journal.state.allocation is not None
    return from_json(journal.state.allocation, context.blockwise.linears)


@dataclass(frozen=True)
class Compression:
    """One process's work on a run: what `run` opened, and the algorithm."""

    context: RunContext
    journal: Journal
    timer: PhaseTimer
    passes: Passes
    solver: Solver

    def run(self) -> JournalState:
        out, blockwise = self.context.config.out, self.context.blockwise
        self.journal.forget_lost_shards()
        state = self.journal.state
        discard_uncommitted(out, state.shards)
        write_index(out, state.shards)
        if not state.complete:
            streams = self.begin() if state.non_block is None else self.resume()
            for done in (blockwise.non_block_tensors, *blockwise.block_tensors[: len(state.blocks)]):
                self.context.checkpoint.release(done)
            for i in range(len(state.blocks), state.blocks_total):
                streams = self.compress_block(i, blockwise.block_names[i], streams)
        self.context.remove_scratch()
        return self.journal.state

    def begin(self) -> Streams:
        """All before block 0: auxiliary files, the tensors outside the blocks, boundary 0."""
        context, out = self.context, self.context.config.out
        with self.timer.phase("non_block", steps=1):
            rank = max(spec.rank for spec in context.allocation.values())
            auxiliary_files = write_auxiliary_files(out, context.checkpoint, common_pattern(context.allocation), rank)
            non_block = write_non_block(out, context.checkpoint, context.blockwise.non_block_tensors)
        streams = self.passes.retry("embed", self.passes.embed)
        digest = streams.hidden.seal()
        self.journal.commit_non_block(auxiliary_files, non_block, digest, self.passes.micro_batch, self.timer.take())
        write_index(out, self.journal.state.shards)
        return streams

    def resume(self) -> Streams:
        """What enters the next block: from the scratch folder, or by passing the finished blocks once more."""
        state = self.journal.state
        done = len(state.blocks)
        digests = (state.hidden_states, state.hidden_states)  # of boundary 0, which is its own target
        if done:
            digests = (state.blocks[-1].hidden_states, state.blocks[-1].targets)
        if streams := self.passes.reopen(done, digests):
            return streams
        log.warning("hidden states in %s are lost; passing %d finished blocks again", self.context.scratch, done)
        streams = self.passes.replay(done, open_checkpoint(str(self.context.config.out)))
        if any(new not in (None, old) for new, old in zip(streams.seal(), digests, strict=True)):
            log.warning("replayed hidden states differ in their last bits: another machine, torch build or micro-batch")
        return streams

    def compress_block(self, i: int, name: str, streams: Streams) -> Streams:
        """Block i of the checkpoint -> its shard and a journal record; what enters the next block."""
        context, blockwise, passes = self.context, self.context.blockwise, self.passes
        self.timer.take()
        with self.timer.phase("load", steps=1, block=i):
            block = blockwise.load_block(i)
            context.checkpoint.prefetch(context.upcoming_tensors(i))
        grams, targets = passes.retry("grams", lambda: passes.collect(block, streams))
        with self.timer.phase("solve", steps=len(block.linears), block=i) as step:
            packed, solved_linears = self.solve_block(block.linears, grams, step)
        weights = solved = BlockWeights(packed, blockwise.as_stored(i))
        patterns = {linear: context.allocation[linear].pattern for linear in block.linears}
        compressed = CompressedBlock(block, patterns)
        curve: tuple[float, ...] = ()
        if targets:
            match = partial(passes.match, compressed, solved, streams.hidden, targets)
            shrink = partial(passes.halve_micro_batch, context.config.match_batch)
            weights, curve = retry_on_oom(match, shrink, phase="match", device=context.device)
        with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer:
            writing = writer.submit(self.write, i, weights)
            hidden, loss = passes.retry("propagate", lambda: passes.propagate(block, streams.hidden, targets))
            if targets and not loss < curve[0]:
                log.warning("%s: matching did not lower its loss of %.3g (%.3g); kept as solved", name, curve[0], loss)
                compressed.place(solved)
                writing = writer.submit(self.write, i, solved)
                hidden.drop()
                hidden, _ = passes.retry("propagate", lambda: passes.propagate(block, streams.hidden, targets))
            shard = writing.result()
        upcoming = Streams(hidden, targets)
        with self.timer.phase("commit", steps=1, block=i):
            digest, of_targets = upcoming.seal()
        matching = (
            MatchRecord(curve[0], finite_or_none(loss), loss < curve[0], tuple(map(finite_or_none, curve)))
            if targets
            else None
        )
        record = BlockRecord(i, name, shard, digest, tuple(solved_linears), of_targets, matching, self.timer.take())
        self.journal.commit_block(record, passes.micro_batch)
        write_index(context.config.out, self.journal.state.shards)
        streams.drop()
        blockwise.evict_block(i)
        context.checkpoint.release(blockwise.block_tensors[i])
        self.timer.committed(record)
        return upcoming

    def write(self, i: int, weights: BlockWeights) -> WrittenShard:
        """Block i's shard."""
        context, shapes = self.context, self.context.blockwise.linears[i]
        patterns = {linear: context.allocation[linear].pattern for linear in shapes}
        return write_block(context.config.out, i, patterns, weights.packed, shapes, weights.other_tensors)

    def solve_block(
        self, linears: Mapping[str, nn.Linear], grams: list[Gram], step: Callable[[int], None]
    ) -> tuple[dict[str, Mapping[str, Tensor]], list[LinearRecord]]:
        """S + U·V in the place of every weight; what to store of each, and its record. Empties `grams`."""
        packed: dict[str, Mapping[str, Tensor]] = {}
        records = []
        offloaded = offload_grams(grams, self.context.plan.grams_at, self.context.scratch)
        while offloaded:
            gram = offloaded.pop(0)()  # freed once its linears are solved
            matrix = gram.matrix.to(self.context.device)
            for name in gram.linears:
                packed[name], record = self.solve_linear(name, linears[name], matrix)
                records.append(replace(record, rows=gram.rows, warnings=(*gram.warnings(name), *record.warnings)))
                step(1)
            del gram, matrix
        return packed, records

    def solve_linear(self, name: str, linear: nn.Linear, gram: Tensor) -> tuple[Mapping[str, Tensor], LinearRecord]:
        """One linear solved in its place; where memory runs out, once more in tiles of half as many rows."""
        context, workspace = self.context, self.context.plan.solver_workspace
        dtype = context.blockwise.stored_dtype(f"{name}.weight")

        def work() -> tuple[Mapping[str, Tensor], LinearRecord]:
            return compress_linear(context.problem(name, linear.weight, gram, workspace), linear, self.solver, dtype)

        def shrink() -> str | None:
            nonlocal workspace
            workspace = context.smaller_workspace(name, linear, workspace)
            return None if workspace is None else f"the rows of {name} in smaller tiles, {format_bytes(workspace)}"

        return retry_on_oom(work, shrink, phase="solve", device=context.device)


def finite_or_none(loss: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return loss if math.isfinite(loss) else None
