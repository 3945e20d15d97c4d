"""The calibration windows on their way through the blocks: embed, the dense pass, the compressed pass, replay."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from streamslr.calibration.grams import Gram, collect_grams
from streamslr.calibration.hidden_states import HiddenStates, Span, read_batches, spans
from streamslr.matching import BlockWeights, CompressedBlock, Loss, Matching
from streamslr.memory import release_memory, why_out_of_memory
from streamslr.model.checkpoint import Checkpoint
from streamslr.run.context import RunContext
from streamslr.run.progress import PhaseTimer
from streamslr.spec.allocation import OUTLIER, outlier_share

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
                blockwise.load_block(i)
                with (
                    self.timer.phase("targets", steps=len(self.ids), block=i) as step,
                    self._teaching(i, streams.targets) as (targets, teach),
                ):
                    for _, x in self._batches(streams.hidden, step):
                        teach(x)
            blockwise.load_block(i, finished)
            upcoming = Streams(self.propagate(i, streams.hidden, None)[0], targets)
            blockwise.evict_block(i)
            streams.drop()
            streams = upcoming
        return streams

    def survey(self, i: int, hidden: HiddenStates) -> tuple[HiddenStates, float]:
        """Dense block i: boundary i + 1 of the dense model, and the share of the block's outliers (OWL)."""
        blockwise, passed = self.context.blockwise, 0
        with self.timer.phase("survey", steps=len(self.ids), block=i) as step, self._new("hidden", i + 1) as upcoming:
            blockwise.load_block(i)
            self.context.checkpoint.prefetch(self.context.upcoming_tensors(i))
            linears = {name: blockwise.linear(name) for name in blockwise.linears[i]}

            def run(x: Tensor) -> Tensor:
                nonlocal passed
                output = blockwise.run_block(i, x)
                upcoming.write(passed, output)
                passed += len(x)
                return output

            batches = self._batches(hidden, step)
            seen = collect_grams(blockwise.block_names[i], linears, run, batches, blockwise.experts[i], diagonal=True)
            # per token, since experts see different numbers of them; one that saw none has no outliers
            energies = [(gram.linears, gram.matrix * (1 / gram.rows if gram.rows else 0)) for gram in seen]
            scored = [(linears[name].weight, energy) for names, energy in energies for name in names]
            return upcoming, outlier_share(scored, self.context.config.owl_outlier or OUTLIER)

    def collect(
        self, i: int, linears: Mapping[str, nn.Linear], streams: Streams
    ) -> tuple[list[Gram], HiddenStates | None]:
        """The dense pass: Gram matrices of block i, and the targets of what leaves it."""
        blockwise = self.context.blockwise
        collected = partial(collect_grams, blockwise.block_names[i], linears, experts=blockwise.experts[i])
        with self.timer.phase("grams", steps=len(self.ids), block=i) as step:
            batches = self._batches(streams.hidden, step)
            if not streams.targets:
                return collected(partial(blockwise.run_block, i), batches), None
            with self._teaching(i, streams.targets) as (targets, teach):
                return collected(teach, batches), targets

    def match(
        self, i: int, block: CompressedBlock, solved: BlockWeights, hidden: HiddenStates, targets: HiddenStates
    ) -> tuple[BlockWeights, tuple[float, ...]]:
        """Live block i refined from `solved` towards its targets, and the loss of each epoch."""
        config = self.context.config
        settings = Matching(config.match_epochs, config.match_batch, config.match_lr, seed=config.seed)
        with self.timer.phase("match", steps=settings.epochs * len(self.ids), block=i) as step:

            def batches(wanted: Sequence[Span]) -> Iterator[tuple[Tensor, Tensor]]:
                outputs = self._batches(targets, wanted=wanted)
                for _, x in self._batches(hidden, step, wanted):
                    yield x, next(outputs)[1]

            run = partial(self.context.blockwise.run_block, i)
            micro_batch = min(self.micro_batch, settings.batch)
            refined = block.refine(solved, settings, run, batches, len(self.ids), micro_batch)
        release_memory(self.context.device)  # Adam's first step in a process leaves masters and moments in a cycle
        return refined

    def propagate(self, i: int, hidden: HiddenStates, targets: HiddenStates | None) -> tuple[HiddenStates, float]:
        """Boundary i + 1 of the hidden states, and its loss against the targets."""
        loss = Loss()
        with (
            self.timer.phase("propagate", steps=len(self.ids), block=i) as step,
            self._new("hidden", i + 1) as upcoming,
        ):
            outputs = self._batches(targets) if targets else None
            for start, x in self._batches(hidden, step):
                output = self.context.blockwise.run_block(i, x)
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

    @contextmanager
    def _teaching(self, i: int, entering: HiddenStates) -> Iterator[tuple[HiddenStates, Callable[[Tensor], Tensor]]]:
        """Boundary i + 1 of the targets, and what passes the next batch through dense block i and writes it there."""
        targets, recover = self._batches(entering), self.context.config.match_recover
        with self._new("targets", i + 1) as upcoming:

            def teach(x: Tensor) -> Tensor:
                start, target = next(targets)
                output = self.context.blockwise.run_block(i, x)
                upcoming.write(start, output + recover * (target - x))
                return output

            yield upcoming, teach

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
