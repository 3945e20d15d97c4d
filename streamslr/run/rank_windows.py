"""A rank's windows: which of all they are, where their boundaries lie, and how many of them pass a block together."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from streamslr.calibration.hidden_states import (
    HiddenStates,
    HiddenStateStream,
    Span,
    boundary_bytes,
    read_batches,
    spans,
)
from streamslr.calibration.routed_inputs import InputRecorder
from streamslr.calibration.transfers import Resident, Transfers, pinned_windows
from streamslr.config import RunConfig
from streamslr.io.scratch import rank_scratch
from streamslr.memory import retry_on_oom
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.experts import Experts
from streamslr.ranks import Ranks

T = TypeVar("T")


@dataclass
class RankWindows:
    """Windows of this rank, of which `micro_batch` pass a block at a time.

    Windows are dealt to ranks in turn, and so are those that are held out.
    """

    config: RunConfig
    blockwise: BlockwiseModel
    all_ids: Tensor  # the calibration windows of all ranks, [windows, T] int64
    micro_batch: int  # halved for good when memory runs out
    in_memory: bool  # whether boundaries are kept in host memory beside the disk (Plan.in_memory)
    resident_windows: int  # windows of a boundary that `resident` keeps on the GPU; none once memory has run out
    ranks: Ranks
    note: Callable[[str, str], None]  # of a retry: phase, and what it does without
    _resident: dict[HiddenStates, Resident] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """Numbers, among all, of this rank's windows: those that Grams and matching see, then those held out."""
        fitted = self.ranks.share(self._all_fitted, "windows that are not held out")
        held_out = range(self._all_fitted + self.ranks.rank, len(self.all_ids), self.ranks.world)
        return (*fitted, *held_out)

    @cached_property
    def ids(self) -> Tensor:
        """This rank's windows, [windows, T] int64."""
        return self.all_ids if self.ranks.world == 1 else self.all_ids[list(self.numbers)]

    @property
    def fitted(self) -> int:
        """Number of this rank's windows that Grams and matching see."""
        return len(self.ranks.share(self._all_fitted, "windows that are not held out"))

    def in_order(self, of_windows: Sequence[T]) -> list[T]:
        """Return something of every window, given that of this rank's, in the order of all windows."""
        if self.ranks.world == 1:
            return list(of_windows)
        of_rank = self.ranks.gather(dict(zip(self.numbers, of_windows, strict=True)))
        found = {window: value for of_windows in of_rank for window, value in of_windows.items()}
        return [found[window] for window in range(len(self.all_ids))]

    def all_spans(self) -> list[Span]:
        """Return the windows that pass together, fitted and held-out ones apart."""
        return self.fitted_spans() + spans([(self.fitted, len(self))], self.micro_batch)

    def fitted_spans(self) -> list[Span]:
        """Return the fitted windows that pass together."""
        return spans([(0, self.fitted)], self.micro_batch)

    @property
    def most_of_step(self) -> int:
        """The most windows that a rank has of a step of matching."""
        return -(-self.config.match_batch // self.ranks.world)

    def boundaries(self, name: str, index: int) -> HiddenStateStream:
        """Return the boundaries called `name`, "hidden" or "targets", of the dtype that boundary `index` has.

        Targets are stored as blocks return them, since the compute dtype would round off what one block of many loses.
        Hidden states are stored in the compute dtype, as the whole model hands them on, and so are the targets of
        boundary 0, which equal them.
        """
        blockwise, seq_len = self.blockwise, self.config.seq_len
        of_targets = name == "targets" and index > 0
        width = blockwise.hidden_size if of_targets else blockwise.widths(seq_len)[index]
        shape = (len(self), seq_len, width)
        dtype = blockwise.stream_dtype if of_targets else blockwise.dtype
        return HiddenStateStream(self._scratch, name, shape, dtype, self.in_memory, self._writers)

    @contextmanager
    def new_boundary(self, stream: str, index: int) -> Iterator[HiddenStates]:
        """Yield a boundary to write; drop it if that fails."""
        with self._dropped_if_it_fails(self.boundaries(stream, index).new(index)) as states:
            yield states

    @contextmanager
    def recording(self, number: int, experts: Experts) -> Iterator[InputRecorder]:
        """Yield a recorder of what a module of experts, of this number in its block, receives of the fitted windows."""
        shape = (self.fitted, self.config.seq_len, self.blockwise.hidden_size)
        stream = HiddenStateStream(self._scratch, f"routed-{number}", shape, self.blockwise.dtype, False, self._writers)
        with self._dropped_if_it_fails(stream.new(0)) as states, self.writing(states) as write:
            yield InputRecorder(experts, states, write)

    @contextmanager
    def writing(self, states: HiddenStates) -> Iterator[Callable[[int, Tensor], None]]:
        """Yield a function of (first window, hidden [b, T, h] on the device) that stores windows of a boundary."""
        if self._transfers:
            with self._transfers.writing(states, self.micro_batch) as write:
                yield write
        else:
            yield states.write

    def batches(
        self, states: HiddenStates, step: Callable[[int], None] | None = None, wanted: Sequence[Span] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (first window, hidden [b, T, h] on the device) over a boundary, or over the spans wanted.

        A tensor may be changed; it may be used until the next one is asked for.
        """
        batches = self.all_spans() if wanted is None else wanted
        transfers = self._transfers
        reading = transfers.read(states, batches, self._resident.get(states)) if transfers else None
        for start, x in reading or read_batches(states, batches):
            yield start, x
            if step:
                step(len(x))

    @contextmanager
    def resident(self, *boundaries: HiddenStates) -> Iterator[None]:
        """Keep windows of these boundaries on the GPU while entered, as many as `resident_windows` says."""
        device = self.blockwise.device

        def allocate() -> dict[HiddenStates, Resident]:
            kept = boundaries if device.type == "cuda" and self.resident_windows else ()
            return {states: Resident(states, self.resident_windows, device) for states in kept}

        self._resident = retry_on_oom(allocate, self._keep_none_resident, phase="match", device=device, note=self.note)
        try:
            yield
        finally:
            self._resident = {}

    def halve(self, at_most: int | None = None) -> str | None:
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

    def _keep_none_resident(self) -> str:
        self._resident, self.resident_windows = {}, 0
        return "no hidden states kept on the GPU"

    @contextmanager
    def _dropped_if_it_fails(self, states: HiddenStates) -> Iterator[HiddenStates]:
        """Yield hidden states to write; drop them if that fails, so that no writer is left when it is tried again."""
        try:
            yield states
        except BaseException:
            states.drop()
            raise

    @cached_property
    def _transfers(self) -> Transfers | None:
        """Reads and writes by a GPU; None on a CPU."""
        device = self.blockwise.device
        return Transfers(device, self._window_bytes) if device.type == "cuda" else None

    @property
    def _all_fitted(self) -> int:
        """Number of windows of all ranks that Grams and matching see; the held-out ones stand behind them."""
        return len(self.all_ids) - self.config.held_out

    @property
    def _window_bytes(self) -> int:
        """Bytes of the largest window of a boundary."""
        blockwise, seq_len = self.blockwise, self.config.seq_len
        sizes = (max(blockwise.widths(seq_len)), blockwise.dtype), (blockwise.hidden_size, blockwise.stream_dtype)
        return max(boundary_bytes(1, seq_len, width, dtype.itemsize) for width, dtype in sizes)

    @property
    def _scratch(self) -> Path:
        """Folder of this rank's hidden states."""
        return rank_scratch(self.config, self.ranks)

    @property
    def _writers(self) -> int:
        """Threads that write a boundary to the disk."""
        return 1 if self.blockwise.device.type == "cpu" else pinned_windows(self._window_bytes)
