"""The block loop: load, Grams, solve, match, propagate, write, commit. Reads as the algorithm."""

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from streamslr.calibration.tokens import Calibration, calibration_windows, ids_digest, window_prefix
from streamslr.config import base_name, default_out
from streamslr.errors import BudgetError, InputError, ResumeError, first_line, says_out_of_memory
from streamslr.gpu import deterministic_libraries, retry_in_any_order
from streamslr.io.durable import is_as_written
from streamslr.io.folder import (
    discard_uncommitted,
    write_auxiliary_files,
    write_index,
    write_non_block,
)
from streamslr.io.safetensors_file import WrittenShard
from streamslr.io.scratch import drop_scratch_of_others, rank_scratch
from streamslr.memory import held_to_gpu_limit
from streamslr.model.blockwise import Block
from streamslr.model.checkpoint import open_checkpoint
from streamslr.model.parameter_names import parts_in_words
from streamslr.ranks import Ranks
from streamslr.run.block_compressor import BlockCompressor
from streamslr.run.block_solver import BlockSolver
from streamslr.run.check import Check
from streamslr.run.context import RunContext, require_fit
from streamslr.run.journal import BlockRecord, CheckWindows, JournalState
from streamslr.run.journal_writer import Journal, made_with
from streamslr.run.passes import Boundary, Passes, load_block
from streamslr.run.progress import Agreed, BlockProgress, Display, NoDisplay, PhaseTimer, WarningsOfRanks
from streamslr.run.quality import describe_quality, warn_of
from streamslr.run.rank_windows import RankWindows
from streamslr.run.samples import require_same_but_for_rounding
from streamslr.run.solve_linear import LinearCompressor
from streamslr.run.survey import allocation_by_outliers
from streamslr.spec.allocation import (
    Allocation,
    as_json,
    common_low_rank_values,
    common_pattern,
    common_values,
    rounds_late,
)

log = logging.getLogger("streamslr")


def run(context: RunContext, display: Display | None = None) -> JournalState:
    """Compress the model into the output folder, or go on where an earlier call stopped.

    The ranks of the context, if there are several, each call it with the same settings, and share the work out.

    Args:
        context: The run, as `open_run` opened it.
        display: Display of progress; None for none.

    Returns:
        The journal of the finished run.

    Raises:
        StreamslrError: Something that a user can mend. Every block that was committed stays.
    """
    require_fit(context)
    config, display, ranks = context.config, display or NoDisplay(), context.ranks
    if config.out == default_out(config.model):
        log.info("the output folder is ./%s", config.out)
    if context.plan.expert_gram_groups:
        log.info("%s", context.plan.expert_grams_in_words)
    tokenizer = context.checkpoint.tokenizer()
    prefix = window_prefix(tokenizer, config.bos)
    calibration = calibration_windows(
        tokenizer,
        config.calibration,
        config.samples,
        config.seq_len,
        config.seed,
        prefix,
        config.held_out,
        config.check_windows,
    )
    context.blockwise.require_windows(config.seq_len, torch.cat([calibration.ids, calibration.check]))
    first_state = _first_state(context, calibration, bos=bool(prefix))
    _require_same_on_all_ranks(ranks, first_state.fingerprint)
    with WarningsOfRanks(ranks) as warnings, Journal(config.out, first_state, ranks) as journal:
        journal.pin(context.checkpoint)
        state = journal.state
        _require_same_check(state.check, first_state.check)
        warn_of_other_means(state.made_with, _made_with(context))
        warn_of_unlike_ranks(ranks.gather(_made_with(context)))
        if calibration.held_out_overlapping:
            log.info(
                "%d of the %d held-out windows share text with others, because the calibration text is short: they may "
                "judge matching too well",
                calibration.held_out_overlapping,
                config.held_out,
            )
        if state.blocks:
            log.info("%s: %d of %d blocks are done, going on", config.out, len(state.blocks), state.blocks_total)
        progress = BlockProgress(display, len(state.blocks), context.plan.kinds)
        with (
            PhaseTimer(
                context.device,
                display,
                config.host_mem,
                context.plan.memory,
                context.gpu.context if context.gpu else 0,
                ranks.traffic if ranks.world > 1 else None,
            ) as timer,
            held_to_gpu_limit(context.device, context.gpu.limit if context.gpu else None),
            deterministic_libraries(context.device),
            torch.no_grad(),
        ):
            plan = context.plan
            sizes = state.micro_batch, plan.in_memory, plan.resident_windows
            windows = RankWindows(config, context.blockwise, calibration.ids, *sizes, ranks, timer.note_retry)
            passes = Passes(windows, timer)
            check = Check(context.blockwise, calibration.check, rank_scratch(config, ranks), plan.in_memory, ranks)
            try:
                allocation = context.allocation
                if allocation is None:
                    allocation = allocation_by_outliers(config, context.blockwise, journal, passes)
                of_linears = LinearCompressor(
                    context.method.solver,
                    allocation,
                    config.seed,
                    state.solver_workspace,
                    config.rounding,
                    rounds_late(config, allocation),
                    timer.note_retry,
                )
                solver = BlockSolver(context, allocation, passes, of_linears)
                compressor = BlockCompressor(context, allocation, passes, solver)
                parts = timer, progress, passes, check, solver, compressor, warnings
                Compression(context, allocation, journal, *parts).run()
            except (MemoryError, RuntimeError) as error:
                if not says_out_of_memory(error):
                    raise
                raise BudgetError(
                    f"memory ran out: {first_line(error)}. Free some or raise the budget, then start the same "
                    f"line again; finished blocks are kept"
                ) from error
            finally:
                check.settle()
        return journal.state


def warn_of_other_means(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Warn where a resumed run computes with other means than it began with: device, versions, kernels."""
    for what in sorted(before.keys() & now.keys() - {"gpu memory of CUDA itself", "python"}):
        if before[what] != now[what]:
            log.warning(
                "%s: %s, where the run began with %s; last bits may differ from here on", what, now[what], before[what]
            )


def warn_of_unlike_ranks(made_with_of_ranks: Sequence[Mapping[str, str]]) -> None:
    """Warn where ranks compute with other means than rank 0, since their last bits may then differ."""
    first, *others = made_with_of_ranks
    for rank, now in enumerate(others, 1):
        for what in sorted(first.keys() & now.keys() - {"gpu memory of CUDA itself"}):
            if first[what] != now[what]:
                log.warning("rank %d has %s: %s, rank 0 has %s", rank, what, now[what], first[what])


def _require_same_on_all_ranks(ranks: Ranks, fingerprint: Mapping[str, Any]) -> None:
    """Raise InputError, on all ranks, where one was started with other settings or sees another model or text."""
    first, *others = ranks.gather(dict(fingerprint))
    for rank, theirs in enumerate(others, 1):
        if changed := [
            f"{name}: {theirs.get(name)!r}, not {first[name]!r}" for name in first if theirs.get(name) != first[name]
        ]:
            raise InputError(
                f"rank {rank} differs from rank 0 ({'; '.join(changed)}); start all ranks with the same line, where "
                "they see the same model and text"
            )


def _made_with(context: RunContext) -> dict[str, str]:
    return made_with(context.device, context.gpu, context.blockwise.stream_dtype, context.ranks)


def _first_state(context: RunContext, calibration: Calibration, bos: bool) -> JournalState:
    """Return the journal's state at the first start of a run."""
    model = context.config.model
    return JournalState(
        fingerprint={**context.fingerprint, "tokens": calibration.digest},
        calibration=calibration.source,
        bos=bos,
        blocks_total=len(context.blockwise.block_names),
        micro_batch=context.plan.micro_batch,
        solver_workspace=context.plan.solver_workspace,
        model=base_name(model) if Path(model).is_dir() else model,
        made_with=_made_with(context),
        unread=parts_in_words(context.blockwise.unread),
        allocation=None if context.allocation is None else as_json(context.allocation),
        check=_check_windows(calibration),
    )


def _check_windows(calibration: Calibration) -> CheckWindows | None:
    """Return the record of the check windows; None where there are none."""
    windows = len(calibration.check)
    return CheckWindows(windows, ids_digest(calibration.check), calibration.overlapping) if windows else None


def _require_same_check(before: CheckWindows | None, now: CheckWindows | None) -> None:
    """Raise ResumeError where the check windows of a resumed run are others; say where they are not apart."""
    if before != now:
        raise ResumeError(
            "the calibration text has changed since the run began: it gives other check windows. Put the earlier text "
            "back and start the same line again, or give another --out"
        )
    if now and now.overlapping:
        log.info(
            "%d of the %d check windows share text with others, because the calibration text is short: the check may "
            "flatter the result",
            now.overlapping,
            now.windows,
        )


@dataclass(frozen=True)
class Compression:
    """One process's part of a run; every choice is made before."""

    context: RunContext
    allocation: Allocation
    journal: Journal
    timer: PhaseTimer
    progress: BlockProgress
    passes: Passes
    check: Check
    solver: BlockSolver
    compressor: BlockCompressor
    warnings: WarningsOfRanks

    def run(self) -> None:
        """Compress every block that is not committed yet, and remove the scratch folder."""
        config, blockwise, ranks = self.context.config, self.context.blockwise, self.context.ranks
        drop_scratch_of_others(config, ranks)
        self.journal.forget_lost_shards()
        self.restore_auxiliary_files()
        state = self.journal.state
        ranks.on_first(self.tidy_up)
        unchecked = state.check is not None and state.quality is None
        if not state.complete:
            boundary = self.begin() if state.non_block is None else self.resume()
            for done in (blockwise.non_block_tensors, *blockwise.block_tensors[: len(state.blocks)]):
                self.passes.release(done)
            for i in range(len(state.blocks), state.blocks_total):
                boundary = self.compress_block(i, boundary)
            ranks.on_first(self.journal.require_sound_shards)
        elif unchecked:
            self.resume_check()
        if unchecked:
            self.compare_with_dense()
        for scratch in (config.scratch_folder, config.out / ".scratch"):  # an earlier start may have used the default
            if ranks.local_rank == 0:
                shutil.rmtree(scratch, ignore_errors=True)

    def tidy_up(self) -> None:
        """Remove what a killed process left in the output folder, and write its index."""
        discard_uncommitted(self.context.config.out, self.journal.state.shards)
        self.write_index()

    def begin(self) -> Boundary:
        """Write all before block 0: auxiliary files, non-block tensors, boundary 0; return that boundary."""
        context, journal, ranks = self.context, self.journal, self.context.ranks
        with self.timer.phase("non_block", steps=1):
            auxiliary_files = ranks.on_first(self.write_auxiliary_files)
            non_block = ranks.on_first(self.write_non_block)
        boundary = self.passes.retry("embed", partial(self.passes.embed, targets=context.config.match))
        if self.check.windows:
            with self.timer.phase("embed", steps=0):
                self.check.embed()
        digest, _ = self.passes.seal(boundary)
        agreed = self.agree()
        journal.commit_non_block(
            auxiliary_files,
            non_block,
            digest,
            self.passes.sample(boundary),
            self.passes.windows.micro_batch,
            agreed.measured,
            agreed.retries,
        )
        ranks.on_first(self.write_index)
        return boundary

    def write_index(self) -> None:
        write_index(self.context.config.out, self.journal.state.shards)

    def write_non_block(self) -> WrittenShard:
        """Write the tensors outside the blocks."""
        checkpoint, names = self.context.checkpoint, self.context.blockwise.non_block_tensors
        tensors = [checkpoint.tensors[name] for name in names]
        return write_non_block(self.context.config.out, tensors, checkpoint.read_one)

    def write_auxiliary_files(self) -> dict[str, str]:
        """Write config.json and what travels with the weights; return the sha256 of each file."""
        checkpoint, rank = self.context.checkpoint, max(spec.rank for spec in self.allocation.values())
        return write_auxiliary_files(
            self.context.config.out,
            checkpoint.dense_config_json(),
            checkpoint.auxiliary_files(),
            common_pattern(self.allocation),
            rank,
            common_values(self.allocation),
            common_low_rank_values(self.allocation),
        )

    def restore_auxiliary_files(self) -> None:
        """Write config.json and the others anew where one of them is missing or not as it was written."""
        out, files, ranks = self.context.config.out, self.journal.state.auxiliary_files, self.context.ranks
        lost = ranks.on_first(lambda: [name for name, digest in files.items() if not is_as_written(out / name, digest)])
        if lost:
            log.warning("%s is missing or not as it was written: writing it anew", out / lost[0])
            self.journal.commit_auxiliary_files(ranks.on_first(self.write_auxiliary_files))

    def resume(self) -> Boundary:
        """Return what enters the next block: from the scratch folder, or by passing the finished blocks again."""
        state, config = self.journal.state, self.context.config
        done = len(state.blocks)
        digests = (state.hidden_states, state.hidden_states)  # at boundary 0 hidden states and targets are the same
        sample = state.sample
        if done:
            last = state.blocks[-1]
            digests, sample = (last.hidden_states, last.targets), last.sample
        self.resume_check()
        if boundary := self.passes.reopen(done, digests):
            return boundary
        log.warning("hidden states in %s are lost; passing %d finished blocks again", config.scratch_folder, done)
        boundary = self.passes.replay(done, open_checkpoint(str(config.out)))
        if any(new not in (None, old) for new, old in zip(self.passes.seal(boundary), digests, strict=True)):
            require_same_but_for_rounding(sample, self.passes.sample(boundary), self.context.dtype)
        return boundary

    def resume_check(self) -> None:
        """Make the check windows go on behind the last finished block, from the scratch folder or by a replay."""
        check, blocks = self.check, self.journal.state.blocks
        if check.windows and not (blocks and check.reopen(len(blocks), blocks[-1].check)):
            if blocks:
                log.warning("hidden states of the check are lost; passing its windows through %d blocks", len(blocks))
            check.replay(len(blocks), open_checkpoint(str(self.context.config.out)))

    def compare_with_dense(self) -> None:
        """Commit how the finished model predicts the check windows, beside the dense one; warn where it is far off."""
        self.timer.take()  # drop what a replay measured
        with self.timer.phase("compare", steps=0):
            cosines = [block.check.cosine if block.check else None for block in self.journal.state.blocks]
            compare = partial(self.check.compare, cosines, open_checkpoint(str(self.context.config.out)))
            quality = retry_in_any_order(compare, "compare", self.timer.note_retry)
        agreed = self.agree()
        self.journal.commit_quality(quality, agreed.measured, agreed.retries)
        log.info("on %d check windows: %s", quality.windows, describe_quality(quality))
        if quality.verdict == "suspect":
            log.warning("%s", warn_of(quality))

    def check_block(self, block: Block, pass_block: Callable[[Block], None]) -> None:
        """Pass the check windows through a block by `pass_block`."""
        if self.check.windows:
            with self.timer.phase("check", steps=0, block=block.index):
                retry_in_any_order(partial(pass_block, block), "check", self.timer.note_retry)

    def compress_block(self, i: int, boundary: Boundary) -> Boundary:
        """Compress block i into its shard and a journal record; return what enters the next block."""
        blockwise, passes, timer = self.context.blockwise, self.passes, self.timer
        timer.take()  # drop what a replay measured; what its retries cut holds from here on, and stays
        # Load the block, while the shards of the next are fetched.
        with timer.phase("load", steps=1, block=i):
            block = load_block(blockwise, i)
        self.check_block(block, self.check.pass_dense)
        # Collect Gram matrices and targets in one pass of the dense block, on each rank those of its linears.
        grams, targets = self.solver.collect(block, boundary)
        # Solve each linear, match the block to its targets, pass the windows through it, write its shard.
        compressed = self.compressor.compress(block, grams, boundary.hidden, targets)
        upcoming = Boundary(compressed.leaving, targets)
        self.check_block(block, self.check.pass_compressed)
        # Commit: from here on a resume starts behind this block.
        with timer.phase("commit", steps=1, block=i):
            digest, digest_of_targets = passes.seal(upcoming)
            sample = passes.sample(upcoming)
            check = self.check.seal()
        agreed = self.agree()
        record = BlockRecord(
            i,
            block.name,
            compressed.shard,
            digest,
            compressed.linears,
            digest_of_targets,
            compressed.matching,
            agreed.measured,
            sample,
            blockwise.dense[i],
            agreed.retries,
            agreed.seconds_by_rank,
            check,
            compressed.matching_off_grid,
        )
        self.journal.commit_block(record, passes.windows.micro_batch, self.solver.linear_compressor.workspace)
        self.context.ranks.on_first(self.write_index)
        # Drop what only this block needed.
        boundary.drop()
        self.check.go_on()
        passes.drop_block(i)
        self.progress.committed(record)
        return upcoming

    def agree(self) -> Agreed:
        """Take what all ranks measured, and what the tightest of them cut, which holds for all from here on."""
        self.warnings.share()
        compressor = self.solver.linear_compressor
        workspace = min(self.context.ranks.gather(math.inf if compressor.workspace is None else compressor.workspace))
        compressor.workspace = None if workspace == math.inf else int(workspace)
        return self.passes.agree()
