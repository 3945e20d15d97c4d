"""Passes of the calibration windows through the blocks: embed, survey, dense pass, matching, compressed, replay."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import zip_longest
from statistics import median
from typing import TypeVar

from torch import Tensor

from streamslr.calibration.grams import Gram, GramCollector
from streamslr.calibration.hidden_states import (
    HiddenStates,
    HiddenStateStream,
    Span,
    boundary_bytes,
    read_batches,
    spans,
)
from streamslr.calibration.transfers import Resident, Transfers, pinned_windows
from streamslr.config import RunConfig
from streamslr.gpu import retry_in_any_order
from streamslr.matching import BlockWeights, CompressedBlock, Loss, MatchSettings
from streamslr.memory import release_memory, retry_on_oom
from streamslr.model.blockwise import Block, BlockwiseModel
from streamslr.model.checkpoint import Checkpoint
from streamslr.run.journal import Sample
from streamslr.run.progress import PhaseTimer
from streamslr.spec.owl import DEFAULT_OUTLIER_FACTOR, outlier_fraction

T = TypeVar("T")

_SAMPLED_WINDOWS, _SAMPLED_VALUES = 8, 4
"""Windows of a boundary that its sample is taken from, and values of each."""


@dataclass(frozen=True)
class Boundary:
    """One boundary: what enters a block, and where blocks are matched, the targets of the block before it.

    targets of block i = dense_block_i(hidden) + match_recover · (targets of block i - 1 - hidden). The second term
    carries earlier errors along the residual stream. Targets from a second stream through the dense model give the
    same perplexity and cost a pass more (tools/results/matching.md).
    """

    hidden: HiddenStates  # as the compressed blocks before have made it of the windows
    targets: HiddenStates | None

    def seal(self) -> tuple[str, str | None]:
        """Wait for all writes; return the digests of both."""
        return self.hidden.seal(), self.targets.seal() if self.targets else None

    def sample(self) -> Sample:
        """Return values at fixed places of both, once sealed, so that a replay can be compared with them."""
        return tuple(_sample(states) for states in (self.hidden, self.targets) if states)

    def drop(self) -> None:
        self.hidden.drop()
        if self.targets:
            self.targets.drop()


@dataclass
class Passes:
    """Passes of all windows through a live block, `micro_batch` windows at a time."""

    config: RunConfig
    blockwise: BlockwiseModel
    ids: Tensor  # the calibration windows, [windows, T] int64
    timer: PhaseTimer
    micro_batch: int  # halved for good when memory runs out
    in_memory: bool  # whether boundaries are kept in host memory beside the disk (Plan.in_memory)
    resident_windows: int = 0  # windows of a boundary that `resident` keeps on the GPU; none once memory has run out
    _resident: dict[HiddenStates, Resident] = field(default_factory=dict)

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
        hidden = self._stream("hidden", index).reopen(index, digests[0] or "")
        if not self.config.match:
            return Boundary(hidden, None) if hidden else None
        targets = self._stream("targets", index).reopen(index, digests[1] or "")
        return Boundary(hidden, targets) if hidden and targets else None

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

    def survey(self, i: int, hidden: HiddenStates) -> tuple[HiddenStates, float]:
        """Pass dense block i; return the dense model's boundary i + 1, and the block's fraction of outliers."""
        with (
            self.timer.phase("survey", steps=len(self.ids), block=i) as step,
            self._new("hidden", i + 1) as leaving,
            self._writing(leaving) as write,
        ):
            block = load_block(self.blockwise, i)
            with GramCollector(block, diagonal=True) as collector:
                for first, x in self._batches(hidden, step):
                    write(first, collector.run(first, x))
            # Per token, since experts see different numbers of them; an expert that saw none has no outliers.
            energies = [(gram.linears, gram.matrix * (1 / gram.rows if gram.rows else 0)) for gram in collector.grams()]
            scored = [(block.linears[name].weight, energy) for names, energy in energies for name in names]
            return leaving, outlier_fraction(scored, self.config.owl_outlier or DEFAULT_OUTLIER_FACTOR)

    def collect(self, block: Block, boundary: Boundary) -> tuple[list[Gram], HiddenStates | None]:
        """Pass the dense block; return the Gram matrices of its linears' inputs, and the block's targets."""
        with (
            self.timer.phase("grams", steps=len(self.ids), block=block.index) as step,
            GramCollector(block) as collector,
        ):

            def run(first: int, x: Tensor) -> Tensor:
                if first < self.fitted:
                    return collector.run(first, x)
                return collector.pass_by(x)

            targets = self._dense_pass(block, boundary, run, step)
            return collector.grams(), targets

    def match(
        self, block: CompressedBlock, solved: BlockWeights, hidden: HiddenStates, targets: HiddenStates
    ) -> tuple[BlockWeights, tuple[float, ...], tuple[float, ...]]:
        """Refine the live block from `solved` towards its targets.

        Returns:
            Its weights, the loss of each epoch, and the loss on the held-out windows after each epoch.
        """
        config = self.config
        settings = MatchSettings(config.match_epochs, config.match_batch, config.match_lr, seed=config.seed)
        steps = settings.epochs * len(self.ids) + config.match_held_out
        with self.timer.phase("match", steps=steps, block=block.index) as step:

            def batches(wanted: Sequence[Span]) -> Iterator[tuple[Tensor, Tensor]]:
                outputs = self._batches(targets, wanted=wanted)
                for _, x in self._batches(hidden, step, wanted):
                    yield x, next(outputs)[1]

            micro_batch = min(self.micro_batch, settings.batch)
            refined = block.refine(solved, settings, batches, len(self.ids), micro_batch, config.match_held_out)
        release_memory(self.blockwise.device)  # Adam's first step in a process leaves masters and moments in a cycle
        return refined

    def propagate(self, block: Block, hidden: HiddenStates, targets: HiddenStates | None) -> tuple[HiddenStates, float]:
        """Pass the block as it is now; return what leaves it, and its loss against the targets (0 without any).

        Held-out windows do not count in the loss.
        """
        loss = Loss()
        with (
            self.timer.phase("propagate", steps=len(self.ids), block=block.index) as step,
            self._new("hidden", block.index + 1) as leaving,
            self._writing(leaving) as write,
        ):
            outputs = self._batches(targets) if targets else None
            for start, x in self._batches(hidden, step):
                output = block.run(x)
                write(start, output)
                if outputs:
                    _, target = next(outputs)
                    if start < self.fitted:
                        loss.add(output, target)
        return leaving, loss.relative

    def retry(self, phase: str, work: Callable[[], T]) -> T:
        """Call `work`, a pass; where memory runs out in it, call it once more with half the micro-batch.

        Where the model has an operator without a deterministic form, call it once more with that allowed.
        """
        return self._retry(phase, work, None)

    def retry_match(self, work: Callable[[], T]) -> T:
        """Do the same for `work`, a matching, which passes no more windows at a time than a step has."""
        return self._retry("match", work, self.config.match_batch)

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
        """Bytes of one window in the widest dtype of a stream."""
        widest = max(self.blockwise.dtype.itemsize, self.blockwise.stream_dtype.itemsize)
        return boundary_bytes(1, self.config.seq_len, self.blockwise.hidden_size, widest)

    def _stream(self, name: str, index: int) -> HiddenStateStream:
        """Return the boundaries called `name`, "hidden" or "targets", of the dtype that boundary `index` has.

        Targets are stored as blocks return them, since the compute dtype would round off what one block of many loses.
        Hidden states are stored in the compute dtype, as the whole model hands them on, and so are the targets of
        boundary 0, which equal them.
        """
        config, blockwise = self.config, self.blockwise
        shape = (config.samples, config.seq_len, blockwise.hidden_size)
        dtype = blockwise.stream_dtype if name == "targets" and index else blockwise.dtype
        writers = 1 if blockwise.device.type == "cpu" else pinned_windows(self._window_bytes)
        return HiddenStateStream(config.scratch_folder, name, shape, dtype, self.in_memory, writers)

    @contextmanager
    def _new(self, stream: str, index: int) -> Iterator[HiddenStates]:
        """Yield a boundary to write; drop it if that fails, so that no writer is left when it is tried again."""
        states = self._stream(stream, index).new(index)
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
        recover = self.config.match_recover
        earlier = self._batches(boundary.targets)
        with self._new("targets", block.index + 1) as targets, self._writing(targets) as write:
            for first, x in self._batches(boundary.hidden, step):
                output = run(first, x)
                _, target = next(earlier)
                write(first, output + recover * (target - x))
        return targets

    @property
    def fitted(self) -> int:
        """Number of windows that Grams and matching see; the held-out ones stand behind them."""
        return len(self.ids) - (self.config.match_held_out if self.config.match else 0)

    def _spans(self) -> list[Span]:
        return spans([(0, self.fitted), (self.fitted, len(self.ids))], self.micro_batch)

    def _batches(
        self, states: HiddenStates, step: Callable[[int], None] | None = None, wanted: Sequence[Span] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (first window, hidden [b, T, h] on the device) over a boundary, or over the spans wanted.

        A tensor may be changed; it may be used until the next one is asked for.
        """
        batches = wanted or self._spans()
        transfers = self._transfers
        reading = transfers.read(states, batches, self._resident.get(states)) if transfers else None
        for start, x in reading or read_batches(states, batches):
            yield start, x
            if step:
                step(len(x))


def _sample(states: HiddenStates) -> tuple[float | None, ...]:
    """Return values of windows spread evenly over all, of their last tokens, which all earlier tokens act on."""
    values: list[float | None] = []
    count = min(states.windows, _SAMPLED_WINDOWS)
    for number in range(count):
        start = number * states.windows // count
        (window,) = states.read(start, start + 1).float()  # [T, h]
        tokens, width = window.shape
        for k in range(_SAMPLED_VALUES):
            # multiples of the golden ratio spread evenly over the width, however many there are
            column = int((number * _SAMPLED_VALUES + k) * 0.618034 % 1 * width)
            value = float(window[max(0, tokens - 1 - k), column])
            values.append(value if math.isfinite(value) else None)
    return tuple(values)


def median_difference(before: Sequence[float | None], now: Sequence[float | None]) -> float:
    """Return the median difference between two samples of a stream, relative to the median size of a value."""
    pairs = [pair for pair in zip_longest(before, now) if pair != (None, None)]
    if not pairs:
        return 0.0
    difference = median(math.inf if a is None or b is None else abs(a - b) for a, b in pairs)
    size = median(abs(a or 0.0) for a, _ in pairs)
    return difference / size if size else (math.inf if difference else 0.0)


def load_block(blockwise: BlockwiseModel, i: int) -> Block:
    """Load block i, and begin to fetch the shards of the block after it."""
    block = blockwise.load_block(i)
    for names in blockwise.block_tensors[i + 1 : i + 2]:
        blockwise.checkpoint.prefetch(names)
    return block


def drop_block(blockwise: BlockwiseModel, i: int) -> None:
    """Free block i's memory, and with --evict-shards each downloaded shard whose tensors are all done."""
    blockwise.evict_block(i)
    blockwise.checkpoint.release(blockwise.block_tensors[i])
