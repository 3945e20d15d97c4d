"""The block loop: load, Grams, solve, propagate, write, commit. Reads as the algorithm (DESIGN, section 4)."""

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamslr.calibrate.gram import Gram, collect_grams
from streamslr.calibrate.hidden_states import HiddenStates, read_batches
from streamslr.calibrate.tokens import calibration_windows
from streamslr.journal import BlockRecord, Journal, JournalState, LayerRecord
from streamslr.layer import compress_layer
from streamslr.prepare import Prepared
from streamslr.progress import Display, NoDisplay, Phases
from streamslr.solve.problem import Solver
from streamslr.solve.threebasil import ThreeBasil
from streamslr.source.checkpoint import open_checkpoint
from streamslr.store.folder import (
    discard_uncommitted,
    write_block,
    write_description,
    write_index,
    write_outside,
)

log = logging.getLogger("streamslr")


def run(job: Prepared, display: Display | None = None) -> JournalState:
    """Compress job.config.model into job.config.out, or go on where an earlier call stopped.

    Raises a StreamslrError for whatever a user can mend; every block that was committed stays.
    """
    job.require_room()
    config = job.config
    calibration = calibration_windows(
        job.checkpoint.tokenizer(), config.calibration, config.samples, config.seq_len, config.seed
    )
    blocks = len(job.skeleton.block_names)
    start = JournalState(
        {**job.fingerprint, "tokens": calibration.digest}, calibration.source, blocks, job.plan.micro_batch
    )
    with Journal(config.out, start) as journal:
        done = len(journal.state.blocks)
        if done:
            log.info("%s: %d of %d blocks are done, going on", config.out, done, blocks)
        with Phases(display or NoDisplay(), job.device, blocks, done) as phases, torch.no_grad():
            return Compression(job, calibration.ids, journal, phases, ThreeBasil()).run()


@dataclass(frozen=True)
class Compression:
    """One process's work on a run: what `compress` opened, and the algorithm."""

    job: Prepared
    ids: Tensor  # [samples, T] int64
    journal: Journal
    phases: Phases
    solver: Solver

    def run(self) -> JournalState:
        out, skeleton = self.job.config.out, self.job.skeleton
        self.journal.forget_lost_shards()
        state = self.journal.state
        discard_uncommitted(out, state.shards)
        write_index(out, state.shards)
        if not state.complete:
            hidden = self.begin() if state.outside is None else self.resume(len(state.blocks))
            for done in (skeleton.outside_tensors, *skeleton.block_tensors[: len(state.blocks)]):
                self.job.checkpoint.release(done)
            for i in range(len(state.blocks), state.blocks_total):
                hidden = self.compress_block(i, skeleton.block_names[i], hidden)
        self.job.remove_scratch()
        return self.journal.state

    def begin(self) -> HiddenStates:
        """All before block 0: the folder's description, the tensors outside the blocks, generation 0."""
        job, out = self.job, self.job.config.out
        with self.phases.phase("outside", steps=1):
            description = write_description(out, job.checkpoint, job.pattern, job.config.rank)
            outside = write_outside(out, job.checkpoint, job.skeleton.outside_tensors)
        hidden = self.embed()
        self.journal.commit_outside(description, outside, hidden.seal(), self.phases.take())
        write_index(out, self.journal.state.shards)
        return hidden

    def resume(self, done: int) -> HiddenStates:
        """Generation `done`: from the scratch folder, or by passing the finished blocks once more."""
        job, state = self.job, self.journal.state
        digest = state.blocks[-1].hidden_states if done else state.hidden_states
        assert digest is not None
        if hidden := job.generations.reopen(done, digest):
            return hidden
        log.warning("hidden states in %s are lost; passing %d finished blocks again", job.scratch, done)
        finished = open_checkpoint(str(job.config.out))
        hidden = self.embed()
        for i in range(done):
            job.skeleton.load_block(i, finished)
            upcoming = self.propagate(i, hidden)
            job.skeleton.evict_block(i)
            hidden.drop()
            hidden = upcoming
        if hidden.seal() != digest:
            log.warning("replayed hidden states differ in their last bits: another machine or torch build")
        return hidden

    def embed(self) -> HiddenStates:
        """Generation 0: what enters the first block."""
        skeleton = self.job.skeleton
        hidden = self.job.generations.new(0)
        with self.phases.phase("embed", steps=len(self.ids)) as step:
            skeleton.load_outside()
            for start in range(0, len(self.ids), self.journal.state.micro_batch):
                ids = self.ids[start : start + self.journal.state.micro_batch]
                hidden.write(start, skeleton.embed(ids.to(self.job.device)))
                step(len(ids))
            skeleton.evict_outside()
        return hidden

    def compress_block(self, i: int, name: str, hidden: HiddenStates) -> HiddenStates:
        """Block i of the checkpoint -> its shard and a journal record; the hidden states that leave it."""
        job, skeleton = self.job, self.job.skeleton
        self.phases.take()
        with self.phases.phase("load", steps=1, block=i):
            skeleton.load_block(i)
            job.checkpoint.prefetch(job.upcoming_tensors(i))
        linears = {linear: skeleton.linear(linear) for linear in skeleton.linears[i]}
        with self.phases.phase("grams", steps=hidden.samples, block=i) as step:
            passes = self.batches(hidden, step)
            grams = collect_grams(name, linears, lambda x: skeleton.run_block(i, x), passes)
        with self.phases.phase("solve", steps=len(linears), block=i) as step:
            packed, layers = self.solve_block(linears, grams, step)
        with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer:
            writing = writer.submit(
                write_block, job.config.out, i, job.pattern, packed, skeleton.linears[i], skeleton.as_stored(i)
            )
            upcoming = self.propagate(i, hidden)
            shard = writing.result()
        with self.phases.phase("commit", steps=1, block=i):
            digest = upcoming.seal()
        record = BlockRecord(i, name, shard, digest, tuple(layers), measured=self.phases.take())
        self.journal.commit_block(record)
        write_index(job.config.out, self.journal.state.shards)
        hidden.drop()
        skeleton.evict_block(i)
        job.checkpoint.release(skeleton.block_tensors[i])
        self.phases.committed(record)
        return upcoming

    def solve_block(
        self, linears: Mapping[str, nn.Linear], grams: list[Gram], step: Callable[[int], None]
    ) -> tuple[dict[str, Mapping[str, Tensor]], list[LayerRecord]]:
        """S + U·V in the place of every weight; what to store of each, and its record. Empties `grams`."""
        packed: dict[str, Mapping[str, Tensor]] = {}
        layers = []
        while grams:
            gram = grams.pop(0)  # freed once its linears are solved
            for name in gram.linears:
                dtype = self.job.skeleton.stored_dtype(f"{name}.weight")
                problem = self.job.problem(name, linears[name].weight, gram.matrix)
                packed[name], layer = compress_layer(problem, linears[name], self.solver, dtype)
                layers.append(layer)
                step(1)
        return packed, layers

    def propagate(self, i: int, hidden: HiddenStates) -> HiddenStates:
        """Generation i + 1: the hidden states after compressed block i."""
        upcoming = self.job.generations.new(i + 1)
        with self.phases.phase("propagate", steps=hidden.samples, block=i) as step:
            for start, x in self.batches(hidden, step):
                upcoming.write(start, self.job.skeleton.run_block(i, x))
        return upcoming

    def batches(self, hidden: HiddenStates, step: Callable[[int], None]) -> Iterator[tuple[int, Tensor]]:
        """(first sample, hidden [b, T, h] on the compute device) over a generation."""
        for start, x in read_batches(hidden, self.journal.state.micro_batch):
            yield start, x.to(self.job.device, non_blocking=True)
            step(len(x))
