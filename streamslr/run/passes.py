"""The calibration windows on their way through the blocks: embed, the dense pass, the compressed pass, replay."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from streamslr.calibration.grams import Gram, GramCollector
from streamslr.calibration.hidden_states import HiddenStates, Span, read_batches, spans
from streamslr.matching import BlockWeights, CompressedBlock, Loss, Matching
from streamslr.memory import release_memory, why_out_of_memory
from streamslr.model.blockwise import Block
from streamslr.model.checkpoint import Checkpoint
from streamslr.run.context import RunContext
from streamslr.run.progress import PhaseTimer
from streamslr.spec.owl import DEFAULT_OUTLIER_FACTOR, outlier_fraction

log = logging.getLogger("streamslr")

T = TypeVar("T")


@dataclass(frozen=True)
class Streams:
    """One boundary: what enters a block, and what should.

    The targets are what matching leads blocks to: the dense block's output on the hidden states that there are,
    and on top what these have lost so far (times --match-recover), as if the block passed that on unchanged. It
    nearly does, since blocks add to their input; a second stream through the dense model gives the same
    perplexity (48.83 and 48.82, tools/results/matching.md) and takes a pass more.
    """

    hidden: HiddenStates  # what the compressed blocks so far have made of the windows
    targets: HiddenStates | None  # None where blocks are not matched

    def seal(self) -> tuple[str, str | None]:
        return self.hidden.seal(), self.targets.seal() if self.targets else None

    def drop(self) -> None:
        self.hidden.drop()
        if self.targets:
            self.targets.drop()


class Passes:
    """Passes of all windows through a live block, `micro_batch` at a time; half as many once memory ran out."""

    def __init__(self, context: RunContext, ids: Tensor, timer: PhaseTimer, micro_batch: int) -> None:
        """ids: the windows, [samples, T] int64."""
        self.context, self.ids, self.timer, self.micro_batch = context, ids, timer, micro_batch

    def embed(self, targets: bool = True) -> Streams:
        """Boundary 0, twice where blocks are matched (and targets are wanted)."""
        blockwise = self.context.blockwise
        names = ("hidden", "targets") if targets and self.context.config.match else ("hidden",)
        with self.timer.phase("embed", steps=len(self.ids)) as step, ExitStack() as stack:
            streams = [stack.enter_context(self._new(name, 0)) for name in names]
            stack.callback(blockwise.evict_non_block)
            blockwise.load_non_block()
            for start, stop in self._spans():
                hidden = blockwise.embed(self.ids[start:stop].to(self.context.device))
                for stream in streams:
                    stream.write(start, hidden)
                step(stop - start)
        return Streams(streams[0], streams[1] if len(streams) > 1 else None)

    def reopen(self, index: int, digests: tuple[str | None, str | None]) -> Streams | None:
        """Boundary `index` as an earlier process sealed it; None where any of it is lost."""
        hidden = self.context.stream("hidden").reopen(index, digests[0] or "")
        if not self.context.config.match:
            return Streams(hidden, None) if hidden else None
        targets = self.context.stream("targets").reopen(index, digests[1] or "")
        return Streams(hidden, targets) if hidden and targets else None

    def replay(self, blocks: int, finished: Checkpoint) -> Streams:
        """Boundary `blocks`, from the embeddings on: the finished blocks, and for targets the dense ones."""
        blockwise = self.context.blockwise
        streams = self.embed()
        for i in range(blocks):
            targets = None
            if streams.targets:
                dense = blockwise.load_block(i)
                with self.timer.phase("targets", steps=len(self.ids), block=i) as step:
                    targets = self._dense_pass(i, streams, lambda _, x: dense.run(x), step)
            block = blockwise.load_block(i, finished)
            upcoming = Streams(self.propagate(block, streams.hidden, None)[0], targets)
            blockwise.evict_block(i)
            streams.drop()
            streams = upcoming
        return streams

    def survey(self, i: int, hidden: HiddenStates) -> tuple[HiddenStates, float]:
        """Dense block i: boundary i + 1 of the dense model, and the share of the block's outliers (OWL)."""
        blockwise = self.context.blockwise
        with (
            self.timer.phase("survey", steps=len(self.ids), block=i) as step,
            self._new("hidden", i + 1) as upcoming,
        ):
            block = blockwise.load_block(i)
            self.context.checkpoint.prefetch(self.context.upcoming_tensors(i))
            with GramCollector(block, diagonal=True) as collector:
                for first, x in self._batches(hidden, step):
                    upcoming.write(first, collector.run(first, x))
            # per token, since experts see different numbers of them; one that saw none has no outliers
            energies = [(gram.linears, gram.matrix * (1 / gram.rows if gram.rows else 0)) for gram in collector.grams()]
            scored = [(block.linears[name].weight, energy) for names, energy in energies for name in names]
            return upcoming, outlier_fraction(scored, self.context.config.owl_outlier or DEFAULT_OUTLIER_FACTOR)

    def collect(self, block: Block, streams: Streams) -> tuple[list[Gram], HiddenStates | None]:
        """The dense pass: Gram matrices of the block, and the targets of what leaves it."""
        with (
            self.timer.phase("grams", steps=len(self.ids), block=block.index) as step,
            GramCollector(block) as collector,
        ):
            targets = self._dense_pass(block.index, streams, collector.run, step)
            return collector.grams(), targets

    def match(
        self, block: CompressedBlock, solved: BlockWeights, hidden: HiddenStates, targets: HiddenStates
    ) -> tuple[BlockWeights, tuple[float, ...]]:
        """The live block refined from `solved` towards its targets, and the loss of each epoch."""
        config = self.context.config
        settings = Matching(config.match_epochs, config.match_batch, config.match_lr, seed=config.seed)
        with self.timer.phase("match", steps=settings.epochs * len(self.ids), block=block.index) as step:

            def batches(wanted: Sequence[Span]) -> Iterator[tuple[Tensor, Tensor]]:
                outputs = self._batches(targets, wanted=wanted)
                for _, x in self._batches(hidden, step, wanted):
                    yield x, next(outputs)[1]

            micro_batch = min(self.micro_batch, settings.batch)
            refined = block.refine(solved, settings, batches, len(self.ids), micro_batch)
        release_memory(self.context.device)  # Adam's first step in a process leaves masters and moments in a cycle
        return refined

    def propagate(self, block: Block, hidden: HiddenStates, targets: HiddenStates | None) -> tuple[HiddenStates, float]:
        """The hidden states that leave the block, and their loss against the targets."""
        loss = Loss()
        with (
            self.timer.phase("propagate", steps=len(self.ids), block=block.index) as step,
            self._new("hidden", block.index + 1) as upcoming,
        ):
            outputs = self._batches(targets) if targets else None
            for start, x in self._batches(hidden, step):
                output = block.run(x)
                upcoming.write(start, output)
                if outputs:
                    loss.add(output, next(outputs)[1])
        return upcoming, loss.relative

    def retry_on_oom(self, phase: str, work: Callable[[], T], shrink: Callable[[], str | None] | None = None) -> T:
        """What `work` returns; where memory runs out in it, what it returns once more, cut smaller.

        shrink: makes the next attempt smaller and says how, or None where that cannot be; by itself it halves the
        micro-batch. Raises MemoryError where nothing can be cut, and whatever the second attempt raises.
        """
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            why = why_out_of_memory(error)
        # After the except clause, because the traceback holds what the phase had allocated.
        release_memory(self.context.device)
        smaller = (shrink or self.halve_micro_batch)()
        if smaller is None:
            raise MemoryError(f"phase {phase}, as small as it can be: {why}")
        log.warning("phase %s ran out of memory (%s): once more with %s", phase, why, smaller)
        return work()

    def halve_micro_batch(self, at_most: int | None = None) -> str | None:
        """Half the micro-batch, or half of `at_most` where no more passed at a time."""
        passing = min(self.micro_batch, at_most or self.micro_batch)
        if passing == 1:
            return None
        self.micro_batch = passing // 2
        return f"windows {self.micro_batch} at a time"

    @contextmanager
    def _new(self, stream: str, index: int) -> Iterator[HiddenStates]:
        """A boundary to write; dropped if that fails, so that no writer is left when it is tried again."""
        states = self.context.stream(stream).new(index)
        try:
            yield states
        except BaseException:
            states.drop()
            raise

    def _dense_pass(
        self, i: int, streams: Streams, run: Callable[[int, Tensor], Tensor], step: Callable[[int], None]
    ) -> HiddenStates | None:
        """Pass the hidden states through dense block i by `run`(first window, x); return the targets of block i."""
        if not streams.targets:
            for first, x in self._batches(streams.hidden, step):
                run(first, x)
            return None
        recover = self.context.config.match_recover
        earlier = self._batches(streams.targets)
        with self._new("targets", i + 1) as targets:
            for first, x in self._batches(streams.hidden, step):
                output = run(first, x)
                _, target = next(earlier)
                # what earlier blocks lost is carried along the residual stream
                targets.write(first, output + recover * (target - x))
        return targets

    def _spans(self) -> list[Span]:
        return spans([(0, len(self.ids))], self.micro_batch)

    def _batches(
        self, states: HiddenStates, step: Callable[[int], None] | None = None, wanted: Sequence[Span] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(first sample, hidden [b, T, h] on the compute device) over a boundary, or over the spans wanted."""
        for start, x in read_batches(states, wanted or self._spans()):
            yield start, x.to(self.context.device, non_blocking=True)
            if step:
                step(len(x))
