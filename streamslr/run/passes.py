"""Passes of the calibration windows through the blocks: embed, survey, dense pass, matching, compressed, replay."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from streamslr.calibration.expert_grams import blend_experts, warn_of_few_tokens
from streamslr.calibration.grams import Gram, GramCollector, count_rows, sum_grams
from streamslr.calibration.hidden_states import HiddenStates, Span, digest_of
from streamslr.calibration.routed_inputs import InputRecorder, RoutedInputs
from streamslr.config import RunConfig
from streamslr.errors import BudgetError, first_line, says_out_of_memory
from streamslr.gpu import deterministic_operators, retry_in_any_order
from streamslr.masters import BlockWeights, MatchSettings
from streamslr.matching import CompressedBlock, LossSums
from streamslr.memory import release_memory, retry_on_oom
from streamslr.model.blockwise import Block, BlockwiseModel
from streamslr.model.checkpoint import Checkpoint
from streamslr.model.experts import Experts
from streamslr.ranks import MemoryOfRanksError, Ranks
from streamslr.run.journal import Sample
from streamslr.run.progress import Agreed, PhaseTimer, agreed
from streamslr.run.rank_windows import RankWindows
from streamslr.run.samples import SAMPLED_WINDOWS, take_sample
from streamslr.spec.owl import DEFAULT_OUTLIER_FACTOR, outlier_fraction

T = TypeVar("T")


@dataclass(frozen=True)
class Boundary:
    """One boundary: what enters a block, and where blocks are matched, the targets of the block before it.

    Beside hidden states, `hidden` holds what blocks hand on with them (`model/carried.py`); so do the targets of
    boundary 0, which are a copy of it, and no others.

    targets of block i = dense_block_i(hidden) + match_recover · (targets of block i - 1 - hidden). The second term
    carries earlier errors along the residual stream. Targets from a second stream through the dense model give the
    same perplexity and cost a pass more (tools/results/matching.md).
    """

    hidden: HiddenStates  # as the compressed blocks before have made it of the windows
    targets: HiddenStates | None

    @property
    def streams(self) -> tuple[HiddenStates, ...]:
        return (self.hidden, self.targets) if self.targets else (self.hidden,)

    def drop(self) -> None:
        for states in self.streams:
            states.drop()


@dataclass(frozen=True)
class Collected:
    """Grams and targets that a pass of a dense block collected of this rank's windows.

    grams: Grams that were asked for.
    seen: All Grams of the block, their matrices on meta.
    targets: Targets of the block, if these are wanted.
    kept: Inputs of the modules of experts that were to be kept.
    """

    grams: list[Gram]
    seen: Sequence[Gram]
    targets: HiddenStates | None
    kept: Sequence[RoutedInputs]


@dataclass(frozen=True)
class Passes:
    """Passes of this rank's windows through a live block."""

    windows: RankWindows
    timer: PhaseTimer

    @property
    def config(self) -> RunConfig:
        return self.windows.config

    @property
    def blockwise(self) -> BlockwiseModel:
        return self.windows.blockwise

    @property
    def ranks(self) -> Ranks:
        return self.windows.ranks

    def seal(self, boundary: Boundary) -> tuple[str, str | None]:
        """Wait for all writes; return the digests of a boundary's hidden states and targets over all ranks."""
        hidden, *targets = [digest_of(self.windows.in_order(states.seal())) for states in boundary.streams]
        return hidden, targets[0] if targets else None

    def sample(self, boundary: Boundary) -> Sample:
        """Return values at fixed places of both streams, once sealed, so that a replay can be compared with them."""
        count = min(len(self.windows.all_ids), SAMPLED_WINDOWS)
        sampled = [number * len(self.windows.all_ids) // count for number in range(count)]
        own = {window: place for place, window in enumerate(self.windows.numbers)}
        streams = []
        for states in boundary.streams:
            values = {
                window: take_sample(states, own[window], number, self.blockwise.hidden_size)
                for number, window in enumerate(sampled)
                if window in own
            }
            found = {window: v for of_rank in self.ranks.gather(values) for window, v in of_rank.items()}
            streams.append(tuple(value for window in sampled for value in found[window]))
        return tuple(streams)

    def agree(self) -> Agreed:
        """Take what all ranks measured, and the micro-batch of the tightest, which holds for all from here on."""
        ours = self.timer.take(), self.timer.take_retries(), self.windows.micro_batch
        measured, retries, micro_batches = zip(*self.ranks.gather(ours), strict=True)
        self.windows.micro_batch = min(micro_batches)
        return agreed(measured, retries)

    def embed(self, targets: bool) -> Boundary:
        """Write boundary 0, and a copy of it as `targets` where they are wanted."""
        names = ("hidden", "targets") if targets else ("hidden",)
        with self.timer.phase("embed", steps=len(self.windows)) as step, ExitStack() as stack:
            written = [stack.enter_context(self.windows.new_boundary(name, 0)) for name in names]
            writes = [stack.enter_context(self.windows.writing(states)) for states in written]
            stack.callback(self.blockwise.evict_non_block)
            self.blockwise.load_non_block()
            for start, stop in self.windows.all_spans():
                hidden = self.blockwise.embed(self.windows.ids[start:stop].to(self.blockwise.device))
                for write in writes:
                    write(start, hidden)
                step(stop - start)
        return Boundary(written[0], written[1] if targets else None)

    def reopen(self, index: int, digests: tuple[str | None, str | None]) -> Boundary | None:
        """Return boundary `index` as an earlier process sealed it under these digests; None where any of it is lost."""
        names = ("hidden", "targets") if self.config.match else ("hidden",)
        streams = [self.windows.boundaries(name, index).reopen(index) for name in names]
        found = [states for states in streams if states]
        if not all(self.ranks.gather(len(found) == len(names))):
            return None
        boundary = Boundary(*found, *[None] * (2 - len(found)))
        return boundary if self.seal(boundary) == digests else None

    def replay(self, blocks: int, finished: Checkpoint) -> Boundary:
        """Make boundary `blocks` again: hidden states through the finished blocks, targets through the dense ones."""
        boundary = self.retry("embed", partial(self.embed, self.config.match))
        for i in range(blocks):
            targets = None
            if boundary.targets:
                dense = self.blockwise.load_block(i)
                targets = self.retry("targets", partial(self._targets, dense, boundary))
            block = self.blockwise.load_block(i, finished)
            hidden, _ = self.retry("propagate", partial(self.propagate, block, boundary.hidden, None))
            upcoming = Boundary(hidden, targets)
            self.blockwise.evict_block(i)
            boundary.drop()
            boundary = upcoming
        return boundary

    def survey(self, i: int, hidden: HiddenStates) -> tuple[HiddenStates, Block, list[Gram]]:
        """Pass dense block i; return the dense model's boundary i + 1, the block, and the diagonals of its Grams."""
        with (
            self.timer.phase("survey", steps=len(self.windows), block=i) as step,
            self.windows.new_boundary("hidden", i + 1) as leaving,
            self.windows.writing(leaving) as write,
        ):
            block = load_block(self.blockwise, i)
            passing = replace(block, run=lambda x: block.hand_on(x)[1])
            with GramCollector(passing, diagonal=True) as collector:
                for first, x in self.windows.batches(hidden, step):
                    write(first, self._run_in(collector, first, x))
            return leaving, block, collector.grams()

    def count_outliers(self, block: Block, diagonals: list[Gram]) -> float:
        """Return the fraction of outliers of a dense block, given the diagonals of its Grams on this rank."""
        everyone = frozenset(range(self.ranks.world))
        summed = sum_grams(count_rows(diagonals, self.ranks), lambda _: everyone, self.ranks)
        warn_of_few_tokens(block, summed)
        summed = blend_experts(summed, block.experts)
        # Per token, since experts see different numbers of them; an expert that saw none has no outliers.
        energies = [(gram.linears, gram.matrix * (1 / gram.rows if gram.rows else 0)) for gram in summed]
        scored = [(block.linears[name].weight, energy) for names, energy in energies for name in names]
        return outlier_fraction(scored, self.config.owl_outlier or DEFAULT_OUTLIER_FACTOR)

    def collect(
        self,
        block: Block,
        boundary: Boundary,
        only: Collection[str] | None = None,
        blend: bool = True,
        keep: Collection[Experts] = (),
        warn: bool = True,
    ) -> Collected:
        """Pass the live block; collect the Grams of this rank's windows, and the block's targets if these are wanted.

        Args:
            block: Live block, dense where targets are wanted.
            boundary: What enters it, without targets where those of the block are not wanted.
            only: Owners of the Grams to collect; None for all.
            blend: Blend the Grams of experts with few tokens.
            keep: Modules of experts whose inputs are kept, to collect the Grams of their experts later.
            warn: Warn of experts with few tokens.
        """
        with (
            self.timer.phase("grams", steps=len(self.windows), block=block.index) as step,
            GramCollector(block, only=only) as collector,
            ExitStack() as stack,
        ):
            recorders = [stack.enter_context(self.windows.recording(*each)) for each in enumerate(keep)]
            run = partial(self._run_in, collector, recorders=recorders)
            targets = self._dense_pass(block, boundary, run, step)
            grams = collector.grams()
            if blend:
                if warn:
                    warn_of_few_tokens(block, grams)
                grams = blend_experts(grams, block.experts)
            return Collected(grams, collector.seen(), targets, [recorder.recorded() for recorder in recorders])

    def collect_experts(self, block: Block, kept: Sequence[RoutedInputs], only: Collection[str]) -> list[Gram]:
        """Return the Grams with these owners, of this rank's windows, from the kept inputs of their experts.

        These experts must be as they were when the inputs were kept; others may be compressed already.
        """
        with (
            self.timer.phase("grams", steps=self.windows.fitted, block=block.index) as step,
            GramCollector(block, only=only) as collector,
            deterministic_operators(),
        ):
            spans = self.windows.fitted_spans()
            for inputs in kept:
                parts = [block.expert_of[owner] for owner in only]
                numbers = {number for module, number in parts if module is inputs.experts}
                for first, x in self.windows.batches(inputs.states, step, spans) if numbers else ():
                    windows = self.windows.numbers[first : first + len(x)]
                    collector.add(windows, partial(inputs.replay, first, x, numbers))
            return collector.grams()

    def match(
        self, block: CompressedBlock, solved: BlockWeights, hidden: HiddenStates, targets: HiddenStates, epochs: int
    ) -> tuple[BlockWeights, tuple[float, ...], tuple[float, ...]]:
        """Refine the live block from `solved` towards its targets, in so many epochs.

        Returns:
            Its weights, the loss of each epoch, and the loss on the held-out windows after each epoch.
        """
        config = self.config
        settings = MatchSettings(epochs, config.match_batch, config.match_lr, seed=config.seed)
        steps = epochs * len(self.windows) + len(self.windows) - self.windows.fitted
        with self.timer.phase("match", steps=steps, block=block.index) as step:

            def batches(wanted: Sequence[Span]) -> Iterator[tuple[Tensor, Tensor]]:
                outputs = self.windows.batches(targets, wanted=wanted)
                for _, x in self.windows.batches(hidden, step, wanted):
                    yield x, next(outputs)[1]

            micro_batch = min(self.windows.micro_batch, self.windows.most_of_step)
            windows = len(self.windows.all_ids)
            refined = block.refine(solved, settings, batches, windows, micro_batch, config.held_out, self.ranks)
        release_memory(self.blockwise.device)  # Adam's first step in a process leaves masters and moments in a cycle
        return refined

    def propagate(
        self, block: Block, hidden: HiddenStates, targets: HiddenStates | None
    ) -> tuple[HiddenStates, LossSums]:
        """Pass the block as it is now; return what leaves it, and this rank's loss against the targets, if any.

        Held-out windows do not count in the loss.
        """
        loss = LossSums()
        with (
            self.timer.phase("propagate", steps=len(self.windows), block=block.index) as step,
            self.windows.new_boundary("hidden", block.index + 1) as leaving,
            self.windows.writing(leaving) as write,
        ):
            outputs = self.windows.batches(targets) if targets else None
            for start, x in self.windows.batches(hidden, step):
                output, upcoming = block.hand_on(x)
                write(start, upcoming)
                if outputs:
                    _, target = next(outputs)
                    if start < self.windows.fitted:
                        loss.add(output, target)
        return leaving, loss

    def drop_block(self, i: int) -> None:
        """Free block i's memory, and release its shards."""
        self.blockwise.evict_block(i)
        self.release(self.blockwise.block_tensors[i])

    def release(self, names: Sequence[str]) -> None:
        """With --evict-shards, delete the downloads that no rank needs any more; all ranks must call it.

        One rank of a machine deletes what any of them has downloaded.
        """
        ranks, checkpoint = self.ranks, self.blockwise.checkpoint
        handed_over = frozenset(checkpoint.downloaded)
        downloads = ranks.gather(handed_over)
        if ranks.local_rank:
            checkpoint.downloaded.difference_update(handed_over)
        else:
            checkpoint.downloaded.update(*(downloads[rank] for rank in ranks.neighbours()))
            checkpoint.release(names)

    def retry(self, phase: str, work: Callable[[], T]) -> T:
        """Call `work`, a pass; where memory runs out in it, call it once more with half the micro-batch.

        Where the model has an operator without a deterministic form, call it once more with that allowed.
        """
        return self._retry(phase, work, None)

    def retry_match(self, work: Callable[[], T]) -> T:
        """Do the same for `work`, a matching, which passes no more windows at a time than a step has.

        Ranks try again together. One that lacks memory where the others do not notice ends: they wait in an exchange.

        Raises:
            BudgetError: Memory ran out there.
        """

        def noticed() -> T:
            try:
                return work()
            except MemoryOfRanksError:
                raise
            except (MemoryError, RuntimeError) as error:
                if self.ranks.world == 1 or not says_out_of_memory(error):
                    raise
                raise BudgetError(
                    f"memory ran out while {self.ranks.world} ranks matched a block: {first_line(error)}. Free some or "
                    "raise the budget, then start the same line again; finished blocks are kept"
                ) from error

        return self._retry("match", noticed, self.windows.most_of_step)

    def _retry(self, phase: str, work: Callable[[], T], at_most: int | None) -> T:
        note = self.timer.note_retry
        return retry_on_oom(
            partial(retry_in_any_order, work, phase, note),
            partial(self.windows.halve, at_most),
            phase=phase,
            device=self.blockwise.device,
            note=note,
        )

    def _targets(self, dense: Block, boundary: Boundary) -> HiddenStates | None:
        """Return the targets of a dense block whose Gram matrices are not wanted."""
        with self.timer.phase("targets", steps=len(self.windows), block=dense.index) as step:
            return self._dense_pass(dense, boundary, lambda _, x: dense.run(x), step)

    def _dense_pass(
        self, block: Block, boundary: Boundary, run: Callable[[int, Tensor], Tensor], step: Callable[[int], None]
    ) -> HiddenStates | None:
        """Pass the windows through the dense block by `run`(first window, x); return the block's targets."""
        if not boundary.targets:
            for first, x in self.windows.batches(boundary.hidden, step):
                run(first, x)
            return None
        recover, h = self.config.match_recover, self.blockwise.hidden_size
        earlier = self.windows.batches(boundary.targets)
        with self.windows.new_boundary("targets", block.index + 1) as targets, self.windows.writing(targets) as write:
            for first, x in self.windows.batches(boundary.hidden, step):
                output = run(first, x)
                _, target = next(earlier)
                write(first, output + recover * (target[..., :h] - x[..., :h]))
        return targets

    def _run_in(
        self, collector: GramCollector, first: int, x: Tensor, recorders: Iterable[InputRecorder] = ()
    ) -> Tensor:
        """Pass windows [b, T, h], from this rank's `first` on, through the block.

        Grams and recorders see those that are fitted.
        """
        if first >= self.windows.fitted:
            return collector.pass_by(x)
        with ExitStack() as stack:
            for recorder in recorders:
                stack.enter_context(recorder.passing(first, x))
            return collector.run(self.windows.numbers[first : first + len(x)], x)


def load_block(blockwise: BlockwiseModel, i: int) -> Block:
    """Load block i, and begin to fetch the shards of the block after it."""
    block = blockwise.load_block(i)
    for names in blockwise.block_tensors[i + 1 : i + 2]:
        blockwise.checkpoint.prefetch(names)
    return block
