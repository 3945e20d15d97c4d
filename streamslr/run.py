"""The block loop: load, Grams, solve, propagate, write, commit. Reads as the algorithm (DESIGN, section 4)."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamslr.calibrate.gram import Gram, collect_grams
from streamslr.calibrate.hidden_states import HiddenStates, read_batches
from streamslr.calibrate.tokens import calibration_windows
from streamslr.journal import BlockRecord, Journal, JournalState, LayerRecord
from streamslr.prepare import Prepared
from streamslr.progress import Display, NoDisplay, Phases
from streamslr.solve.problem import LayerProblem, Solver, pruning_error, relative_error
from streamslr.solve.threebasil import ThreeBasil
from streamslr.source.checkpoint import open_checkpoint
from streamslr.store.folder import (
    discard_uncommitted,
    write_block,
    write_description,
    write_index,
    write_outside,
)
from streamslr.store.pack import merge, pack

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
    fingerprint = job.fingerprint | {"calibration": calibration.source, "tokens": calibration.digest}
    blocks = len(job.skeleton.block_names)
    with Journal(config.out, fingerprint, blocks, job.plan.micro_batch) as journal:
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
        out, skeleton, state = self.job.config.out, self.job.skeleton, self.journal.state
        discard_uncommitted(out, state.shards)
        write_index(out, state.shards)
        if not state.complete:
            hidden = self.begin() if state.outside is None else self.resume(len(state.blocks))
            for i in range(len(state.blocks), state.blocks_total):
                hidden = self.compress_block(i, skeleton.block_names[i], hidden)
        self.job.generations.remove()
        return self.journal.state

    def begin(self) -> HiddenStates:
        """All before block 0: the folder's description, the tensors outside the blocks, generation 0."""
        job, out = self.job, self.job.config.out
        with self.phases.phase("outside", steps=1):
            description = write_description(out, job.checkpoint, job.pattern, job.config.rank)
            outside = write_outside(out, job.checkpoint, job.skeleton.outside_tensors)
        hidden = self.embed()
        self.journal.commit_outside(description, outside, hidden.seal())
        job.checkpoint.release(job.skeleton.outside_tensors)
        write_index(out, self.journal.state.shards)
        return hidden

    def resume(self, done: int) -> HiddenStates:
        """Generation `done`: from the scratch folder, or by passing the finished blocks once more."""
        job, state = self.job, self.journal.state
        digest = state.blocks[-1].hidden_states if done else state.hidden_states
        assert digest is not None
        job.checkpoint.release(job.skeleton.outside_tensors)
        for i in range(done):
            job.checkpoint.release(job.skeleton.block_tensors[i])
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
        with self.phases.phase("load", steps=1, block=i):
            skeleton.load_block(i)
            job.checkpoint.prefetch(job.upcoming_tensors(i))
        linears = {linear: skeleton.linear(linear) for linear in skeleton.linears[i]}
        with self.phases.phase("grams", steps=hidden.samples, block=i) as step:
            passes = self.batches(hidden, step)
            grams = collect_grams(name, linears, lambda x: skeleton.run_block(i, x), passes)
        layers: list[LayerRecord] = []
        packed: dict[str, dict[str, Tensor]] = {}
        with self.phases.phase("solve", steps=len(linears), block=i) as step:
            while grams:
                gram = grams.pop(0)  # a Gram is freed once its linears are solved
                for linear in gram.linears:
                    packed[linear], layer = self.compress_layer(linear, linears[linear], gram)
                    layers.append(layer)
                    step(1)
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

    def compress_layer(self, name: str, linear: nn.Linear, gram: Gram) -> tuple[dict[str, Tensor], LayerRecord]:
        """Solve one linear and put S + U·V, as stored, in its place; what to store, and its record."""
        job = self.job
        weight = linear.weight.detach().float()  # [o, d]
        problem = LayerProblem(name, weight, gram.matrix, job.pattern, job.config.rank, job.config.seed)
        solution = self.solver.solve(problem)
        dtype = job.skeleton.stored_dtype(f"{name}.weight")
        tensors = pack(solution.S, job.pattern, dtype)
        if solution.U.shape[1]:
            tensors |= {"U": solution.U.to(dtype), "V": solution.V.to(dtype)}
        shape = (weight.shape[0], weight.shape[1])
        merged = merge(tensors, job.pattern, shape, linear.weight.dtype)
        record = LayerRecord(
            name=name,
            shape=shape,
            pattern=str(job.pattern),
            density=int((solution.S != 0).sum()) / weight.numel(),
            rank=solution.U.shape[1],
            error_before=pruning_error(problem),
            error_after=relative_error(weight, gram.matrix, merged.float()),
            iterations=solution.iterations,
            damping=solution.damping,
            nbytes=sum(t.nbytes for t in tensors.values()),
            dense_nbytes=weight.numel() * dtype.itemsize,
            warnings=solution.warnings,
        )
        for warning in solution.warnings:
            log.warning("%s: %s", name, warning)
        linear.weight.copy_(merged)
        return tensors, record

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
