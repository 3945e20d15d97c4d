"""Passes of the calibration windows through the blocks: embed, survey, dense pass, matching, compressed, replay."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from streamslr.calibration.expert_grams import blend_experts, warn_of_few_tokens
from streamslr.calibration.grams import (
    Gram,
    GramCollector,
    count_rows,
    sum_grams,
)
from streamslr.calibration.hidden_states import (
    HiddenStates,
    HiddenStateStream,
    Span,
    boundary_bytes,
    digest_of,
    read_batches,
    spans,
)
from streamslr.calibration.routed_inputs import InputRecorder, RoutedInputs
from streamslr.calibration.transfers import Resident, Transfers, pinned_windows
from streamslr.config import RunConfig
from streamslr.errors import BudgetError, first_line, says_out_of_memory
from streamslr.gpu import deterministic_operators, retry_in_any_order
from streamslr.io.scratch import rank_scratch
from streamslr.masters import BlockWeights, MatchSettings
from streamslr.matching import CompressedBlock, LossSums
from streamslr.memory import release_memory, retry_on_oom
from streamslr.model.blockwise import Block, BlockwiseModel
from streamslr.model.checkpoint import Checkpoint
from streamslr.model.experts import Experts
from streamslr.ranks import ALONE, MemoryOfRanksError, Ranks
from streamslr.run.journal import Sample
from streamslr.run.progress import Agreed, PhaseTimer, agreed
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


@dataclass
class Passes:
    """Passes of this rank's windows through a live block, `micro_batch` windows at a time.

    Windows are dealt to ranks in turn, and so are those that are held out.
    """

    config: RunConfig
    blockwise: BlockwiseModel
    all_ids: Tensor  # the calibration windows of all ranks, [windows, T] int64
    timer: PhaseTimer
    micro_batch: int  # halved for good when memory runs out
    in_memory: bool  # whether boundaries are kept in host memory beside the disk (Plan.in_memory)
    resident_windows: int = 0  # windows of a boundary that `resident` keeps on the GPU; none once memory has run out
    ranks: Ranks = ALONE
    _resident: dict[HiddenStates, Resident] = field(default_factory=dict)

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """Numbers, among all, of this rank's windows: those that Grams and matching see, then those held out."""
        fitted = self.ranks.share(self._all_fitted, "windows that are not held out")
        held_out = range(self._all_fitted + self.ranks.rank, len(self.all_ids), self.ranks.world)
        return (*fitted, *held_out)

    @cached_property
    def ids(self) -> Tensor:
        """This rank's windows, [windows, T] int64."""
        return self.all_ids if self.ranks.world == 1 else self.all_ids[list(self.windows)]

    def seal(self, boundary: Boundary) -> tuple[str, str | None]:
        """Wait for all writes; return the digests of a boundary's hidden states and targets over all ranks."""
        hidden, *targets = [digest_of(self._in_order(states.seal())) for states in boundary.streams]
        return hidden, targets[0] if targets else None

    def sample(self, boundary: Boundary) -> Sample:
        """Return values at fixed places of both streams, once sealed, so that a replay can be compared with them."""
        count = min(len(self.all_ids), SAMPLED_WINDOWS)
        sampled = [number * len(self.all_ids) // count for number in range(count)]
        own = {window: place for place, window in enumerate(self.windows)}
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

    def _in_order(self, of_windows: Sequence[T]) -> list[T]:
        """Return something of every window, given that of this rank's, in the order of all windows."""
        if self.ranks.world == 1:
            return list(of_windows)
        of_rank = self.ranks.gather(dict(zip(self.windows, of_windows, strict=True)))
        found = {window: value for of_windows in of_rank for window, value in of_windows.items()}
        return [found[window] for window in range(len(self.all_ids))]

    def agree(self) -> Agreed:
        """Take what all ranks measured, and the micro-batch of the tightest, which holds for all from here on."""
        ours = self.timer.take(), self.timer.take_retries(), self.micro_batch
        measured, retries, micro_batches = zip(*self.ranks.gather(ours), strict=True)
        self.micro_batch = min(micro_batches)
        return agreed(measured, retries)

    def embed(self, targets: bool) -> Boundary:
        """Write boundary 0, and a copy of it as `targets` where they are wanted."""
        names = ("hidden", "targets") if targets else ("hidden",)
        with self.timer.phase("embed", steps=len(self.ids)) as step, ExitStack() as stack:
            written = [stack.enter_context(self._new(name, 0)) for name in names]
            writes = [stack.enter_context(self._writing(states)) for states in written]
            stack.callback(self.blockwise.evict_non_block)
            self.blockwise.load_non_block()
            for start, stop in self._spans():
                hidden = self.blockwise.embed(self.ids[start:stop].to(self.blockwise.device))
                for write in writes:
                    write(start, hidden)
                step(stop - start)
        return Boundary(written[0], written[1] if targets else None)

    def reopen(self, index: int, digests: tuple[str | None, str | None]) -> Boundary | None:
        """Return boundary `index` as an earlier process sealed it under these digests; None where any of it is lost."""
        names = ("hidden", "targets") if self.config.match else ("hidden",)
        streams = [self._stream(name, index).reopen(index) for name in names]
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
            self.timer.phase("survey", steps=len(self.ids), block=i) as step,
            self._new("hidden", i + 1) as leaving,
            self._writing(leaving) as write,
        ):
            block = load_block(self.blockwise, i)
            passing = replace(block, run=lambda x: block.hand_on(x)[1])
            with GramCollector(passing, diagonal=True) as collector:
                for first, x in self._batches(hidden, step):
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
            self.timer.phase("grams", steps=len(self.ids), block=block.index) as step,
            GramCollector(block, only=only) as collector,
            ExitStack() as stack,
        ):
            recorders = [stack.enter_context(self._recording(*each)) for each in enumerate(keep)]
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
            self.timer.phase("grams", steps=self.fitted, block=block.index) as step,
            GramCollector(block, only=only) as collector,
            deterministic_operators(),
        ):
            for inputs in kept:
                parts = [block.expert_of[owner] for owner in only]
                numbers = {number for module, number in parts if module is inputs.experts}
                for first, x in self._batches(inputs.states, step, self._fitted_spans()) if numbers else ():
                    windows = self.windows[first : first + len(x)]
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
        steps = epochs * len(self.ids) + len(self.ids) - self.fitted
        with self.timer.phase("match", steps=steps, block=block.index) as step:

            def batches(wanted: Sequence[Span]) -> Iterator[tuple[Tensor, Tensor]]:
                outputs = self._batches(targets, wanted=wanted)
                for _, x in self._batches(hidden, step, wanted):
                    yield x, next(outputs)[1]

            micro_batch = min(self.micro_batch, self._most_of_step)
            windows = len(self.all_ids)
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
            self.timer.phase("propagate", steps=len(self.ids), block=block.index) as step,
            self._new("hidden", block.index + 1) as leaving,
            self._writing(leaving) as write,
        ):
            outputs = self._batches(targets) if targets else None
            for start, x in self._batches(hidden, step):
                output, upcoming = block.hand_on(x)
                write(start, upcoming)
                if outputs:
                    _, target = next(outputs)
                    if start < self.fitted:
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

        return self._retry("match", noticed, self._most_of_step)

    @property
    def _most_of_step(self) -> int:
        """The most windows that a rank has of a step of matching."""
        return -(-self.config.match_batch // self.ranks.world)

    def _retry(self, phase: str, work: Callable[[], T], at_most: int | None) -> T:
        note = self.timer.note_retry
        return retry_on_oom(
            partial(retry_in_any_order, work, phase, note),
            partial(self.halve_micro_batch, at_most),
            phase=phase,
            device=self.blockwise.device,
            note=note,
        )

    def halve_micro_batch(self, at_most: int | None = None) -> str | None:
        """Halve the windows that passed together, `at_most` so many; say so, or return None where it was one.

        Where windows were kept on the GPU, keep none from now on instead, which changes no bit.
        """
        if self._resident:
            return self._keep_none_resident()
        passing = min(self.micro_batch, at_most or self.micro_batch)
        if passing == 1:
            return None
        self.micro_batch = passing // 2
        return f"windows {self.micro_batch} at a time"

    @contextmanager
    def resident(self, *boundaries: HiddenStates) -> Iterator[None]:
        """Keep windows of these boundaries on the GPU while entered, as many as `resident_windows` says."""
        device = self.blockwise.device

        def allocate() -> dict[HiddenStates, Resident]:
            kept = boundaries if device.type == "cuda" and self.resident_windows else ()
            return {states: Resident(states, self.resident_windows, device) for states in kept}

        self._resident = retry_on_oom(
            allocate, self._keep_none_resident, phase="match", device=device, note=self.timer.note_retry
        )
        try:
            yield
        finally:
            self._resident = {}

    def _keep_none_resident(self) -> str:
        self._resident, self.resident_windows = {}, 0
        return "no hidden states kept on the GPU"

    @cached_property
    def _transfers(self) -> Transfers | None:
        """Reads and writes by a GPU; None on a CPU."""
        device = self.blockwise.device
        return Transfers(device, self._window_bytes) if device.type == "cuda" else None

    @property
    def _window_bytes(self) -> int:
        """Bytes of the largest window of a boundary."""
        blockwise, seq_len = self.blockwise, self.config.seq_len
        sizes = (max(blockwise.widths(seq_len)), blockwise.dtype), (blockwise.hidden_size, blockwise.stream_dtype)
        return max(boundary_bytes(1, seq_len, width, dtype.itemsize) for width, dtype in sizes)

    def _stream(self, name: str, index: int) -> HiddenStateStream:
        """Return the boundaries called `name`, "hidden" or "targets", of the dtype that boundary `index` has.

        Targets are stored as blocks return them, since the compute dtype would round off what one block of many loses.
        Hidden states are stored in the compute dtype, as the whole model hands them on, and so are the targets of
        boundary 0, which equal them.
        """
        blockwise, seq_len = self.blockwise, self.config.seq_len
        of_targets = name == "targets" and index > 0
        width = blockwise.hidden_size if of_targets else blockwise.widths(seq_len)[index]
        shape = (len(self.ids), seq_len, width)
        dtype = blockwise.stream_dtype if of_targets else blockwise.dtype
        return HiddenStateStream(self._scratch, name, shape, dtype, self.in_memory, self._writers)

    @property
    def _scratch(self) -> Path:
        """Folder of this rank's hidden states."""
        return rank_scratch(self.config, self.ranks)

    @property
    def _writers(self) -> int:
        """Threads that write a boundary to the disk."""
        return 1 if self.blockwise.device.type == "cpu" else pinned_windows(self._window_bytes)

    @contextmanager
    def _new(self, stream: str, index: int) -> Iterator[HiddenStates]:
        """Yield a boundary to write; drop it if that fails."""
        with self._dropped_if_it_fails(self._stream(stream, index).new(index)) as states:
            yield states

    @contextmanager
    def _dropped_if_it_fails(self, states: HiddenStates) -> Iterator[HiddenStates]:
        """Yield hidden states to write; drop them if that fails, so that no writer is left when it is tried again."""
        try:
            yield states
        except BaseException:
            states.drop()
            raise

    @contextmanager
    def _writing(self, states: HiddenStates) -> Iterator[Callable[[int, Tensor], None]]:
        """Yield a function of (first window, hidden [b, T, h] on the device) that stores windows of a boundary."""
        if self._transfers:
            with self._transfers.writing(states, self.micro_batch) as write:
                yield write
        else:
            yield states.write

    def _targets(self, dense: Block, boundary: Boundary) -> HiddenStates | None:
        """Return the targets of a dense block whose Gram matrices are not wanted."""
        with self.timer.phase("targets", steps=len(self.ids), block=dense.index) as step:
            return self._dense_pass(dense, boundary, lambda _, x: dense.run(x), step)

    def _dense_pass(
        self, block: Block, boundary: Boundary, run: Callable[[int, Tensor], Tensor], step: Callable[[int], None]
    ) -> HiddenStates | None:
        """Pass the windows through the dense block by `run`(first window, x); return the block's targets."""
        if not boundary.targets:
            for first, x in self._batches(boundary.hidden, step):
                run(first, x)
            return None
        recover, h = self.config.match_recover, self.blockwise.hidden_size
        earlier = self._batches(boundary.targets)
        with self._new("targets", block.index + 1) as targets, self._writing(targets) as write:
            for first, x in self._batches(boundary.hidden, step):
                output = run(first, x)
                _, target = next(earlier)
                write(first, output + recover * (target[..., :h] - x[..., :h]))
        return targets

    @property
    def _all_fitted(self) -> int:
        """Number of windows of all ranks that Grams and matching see; the held-out ones stand behind them."""
        return len(self.all_ids) - self.config.held_out

    @property
    def fitted(self) -> int:
        """Number of this rank's windows that Grams and matching see."""
        return len(self.ranks.share(self._all_fitted, "windows that are not held out"))

    @contextmanager
    def _recording(self, number: int, experts: Experts) -> Iterator[InputRecorder]:
        """Yield a recorder of what a module of experts, of this number in its block, receives of the fitted windows."""
        shape = (self.fitted, self.config.seq_len, self.blockwise.hidden_size)
        stream = HiddenStateStream(self._scratch, f"routed-{number}", shape, self.blockwise.dtype, False, self._writers)
        with self._dropped_if_it_fails(stream.new(0)) as states, self._writing(states) as write:
            yield InputRecorder(experts, states, write)

    def _run_in(
        self, collector: GramCollector, first: int, x: Tensor, recorders: Iterable[InputRecorder] = ()
    ) -> Tensor:
        """Pass windows [b, T, h], from this rank's `first` on, through the block.

        Grams and recorders see those that are fitted.
        """
        if first >= self.fitted:
            return collector.pass_by(x)
        with ExitStack() as stack:
            for recorder in recorders:
                stack.enter_context(recorder.passing(first, x))
            return collector.run(self.windows[first : first + len(x)], x)

    def _spans(self) -> list[Span]:
        return self._fitted_spans() + spans([(self.fitted, len(self.ids))], self.micro_batch)

    def _fitted_spans(self) -> list[Span]:
        return spans([(0, self.fitted)], self.micro_batch)

    def _batches(
        self, states: HiddenStates, step: Callable[[int], None] | None = None, wanted: Sequence[Span] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (first window, hidden [b, T, h] on the device) over a boundary, or over the spans wanted.

        A tensor may be changed; it may be used until the next one is asked for.
        """
        batches = self._spans() if wanted is None else wanted
        transfers = self._transfers
        reading = transfers.read(states, batches, self._resident.get(states)) if transfers else None
        for start, x in reading or read_batches(states, batches):
            yield start, x
            if step:
                step(len(x))


def load_block(blockwise: BlockwiseModel, i: int) -> Block:
    """Load block i, and begin to fetch the shards of the block after it."""
    block = blockwise.load_block(i)
    for names in blockwise.block_tensors[i + 1 : i + 2]:
        blockwise.checkpoint.prefetch(names)
    return block
