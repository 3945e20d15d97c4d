"""Check windows through the dense and the compressed blocks, side by side, for what a run says of its result.

They pass one at a time, whatever the micro-batch, and no calibration window passes with them: the shards have the same
bytes with and without them.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from streamslr.calibration.hidden_states import (
    HiddenStates,
    HiddenStateStream,
    InMemory,
    digest_of,
    read_batches,
    spans,
)
from streamslr.errors import StreamslrError
from streamslr.model.blockwise import Block, BlockwiseModel
from streamslr.model.checkpoint import Checkpoint
from streamslr.ranks import ALONE, Ranks
from streamslr.run.journal import BlockCheck, Quality
from streamslr.run.passes import load_block
from streamslr.run.quality import WindowFigures, compare_window, judge, mean_cosine

T = TypeVar("T")

_DENSE, _COMPRESSED = _STREAMS = ("check-dense", "check-compressed")


@dataclass
class Check:
    """Check windows on their way through both models; each rank has every `world`-th of them, and maybe none."""

    blockwise: BlockwiseModel
    all_ids: Tensor  # the check windows of all ranks, [windows, T] int64
    folder: Path  # scratch folder of this rank
    in_memory: bool  # whether boundaries are kept in host memory beside the disk (Plan.in_memory)
    ranks: Ranks = ALONE
    _entering: dict[str, HiddenStates] = field(default_factory=dict)  # of each stream
    _leaving: dict[str, HiddenStates] = field(default_factory=dict)
    _cosines: list[float] = field(default_factory=list)  # behind the block, of each window of this rank

    @property
    def windows(self) -> int:
        """Number of windows of all ranks."""
        return len(self.all_ids)

    @property
    def ids(self) -> Tensor:
        """This rank's windows, [windows, T] int64."""
        return self.all_ids[self.ranks.rank :: self.ranks.world]

    def embed(self, source: Checkpoint | None = None) -> None:
        """Make boundary 0 of both streams.

        Args:
            source: Checkpoint that has the non-block tensors; None: that of the model.
        """
        self._entering = {name: self._new(name, 0) for name in _STREAMS}
        self.blockwise.load_non_block(source)
        try:
            for window, ids in enumerate(self.ids):
                hidden = self.blockwise.embed(ids[None].to(self.blockwise.device))
                for states in self._entering.values():
                    states.write(window, hidden)
        finally:
            self.blockwise.evict_non_block()

    def pass_dense(self, block: Block) -> None:
        """Pass the windows of the dense model through a block that is dense still."""
        self._pass(_DENSE, block)

    def pass_compressed(self, block: Block) -> None:
        """Pass the windows of the compressed model through the same block, now compressed; compare hidden states."""
        self._pass(_COMPRESSED, block)
        self._cosines = []
        for window in range(len(self.ids)):
            device, h = self.blockwise.device, self.blockwise.hidden_size
            dense, compressed = (self._leaving[name].read(window, window + 1)[..., :h] for name in _STREAMS)
            self._cosines.append(mean_cosine(dense.to(device), compressed.to(device)))

    def seal(self) -> BlockCheck | None:
        """Wait for all writes; return the record of the block that the windows have passed; None without windows."""
        if not self.windows:
            return None
        dense, compressed = (self._digest(self._leaving[name]) for name in _STREAMS)
        return BlockCheck(self._cosine(), dense, compressed)

    def go_on(self) -> None:
        """Drop what entered the block, once what leaves it is committed."""
        self.drop()
        self._entering, self._leaving = self._leaving, {}

    def settle(self) -> None:
        """Wait for all writes, so that nothing is written any more once a run has ended, however it did."""
        for states in (*self._entering.values(), *self._leaving.values()):
            with suppress(StreamslrError, ValueError, CancelledError):  # another error ended the run; some lack windows
                states.seal()

    def drop(self) -> None:
        """Free the memory and the disk space of what enters the next block."""
        for states in self._entering.values():
            states.drop()

    def reopen(self, index: int, record: BlockCheck | None) -> bool:
        """Open boundary `index` as an earlier process sealed it; return False where any of it is lost.

        Args:
            index: Number of the boundary.
            record: Record of the block before it.
        """
        found = [
            self._stream(name, index).reopen(index) if len(self.ids) else self._new(name, index) for name in _STREAMS
        ]
        self._entering = {name: states for name, states in zip(_STREAMS, found, strict=True) if states}
        if record is None or not all(self.ranks.gather(len(self._entering) == len(_STREAMS))):
            return False
        return [self._digest(self._entering[name]) for name in _STREAMS] == [record.dense, record.compressed]

    def replay(
        self, blocks: int, finished: Checkpoint, step: Callable[[int, int], None] = lambda done, total: None
    ) -> list[float | None]:
        """Make boundary `blocks` again, through the dense blocks and the finished ones.

        Args:
            blocks: Number of blocks to pass.
            finished: Checkpoint that has the compressed blocks, and the non-block tensors.
            step: Called with (blocks passed, blocks in all).

        Returns:
            The cosine behind each block, as `BlockCheck` has it.
        """
        self.embed(finished)
        cosines = []
        for i in range(blocks):
            self.pass_dense(load_block(self.blockwise, i))
            self.pass_compressed(self.blockwise.load_block(i, finished))
            cosines.append(self._cosine())
            self.blockwise.evict_block(i)
            self.go_on()
            step(i + 1, blocks)
        return cosines

    def compare(self, cosines: Sequence[float | None], source: Checkpoint | None = None) -> Quality:
        """Compare the predictions of both models, once the windows have passed all blocks, and judge the result.

        Args:
            cosines: Cosine behind each block.
            source: Checkpoint that has the non-block tensors; None: that of the model.
        """
        device, own = self.blockwise.device, list[WindowFigures]()
        self.blockwise.load_non_block(source)
        try:
            for window, ids in enumerate(self.ids):
                dense, compressed = (self._entering[name].read(window, window + 1)[0].to(device) for name in _STREAMS)
                own.append(compare_window(self.blockwise.logits, ids, dense, compressed))
        finally:
            self.blockwise.evict_non_block()
        return judge(self._in_order(own), self.all_ids.shape[1] - 1, cosines)

    def _cosine(self) -> float | None:
        """Return the mean cosine behind the block over all windows; None where it is not finite."""
        cosine = sum(self._in_order(self._cosines)) / self.windows
        return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else None

    def _pass(self, name: str, block: Block) -> None:
        leaving = self._leaving[name] = self._new(name, block.index + 1)
        for window, x in read_batches(self._entering[name], spans([(0, len(self.ids))], 1)):
            leaving.write(window, block.hand_on(x.to(self.blockwise.device))[1])

    def _shape(self, index: int) -> tuple[int, int, int]:
        tokens = self.all_ids.shape[1]
        return len(self.ids), tokens, self.blockwise.widths(tokens)[index]

    def _stream(self, name: str, index: int) -> HiddenStateStream:
        shape = self._shape(index)
        return HiddenStateStream(self.folder, name, shape, self.blockwise.dtype, self.in_memory)

    def _new(self, name: str, index: int) -> HiddenStates:
        if len(self.ids):
            return self._stream(name, index).new(index)
        return InMemory(*self._shape(index), self.blockwise.dtype)

    def _digest(self, states: HiddenStates) -> str:
        return digest_of(self._in_order(states.seal()))

    def _in_order(self, of_windows: Sequence[T]) -> list[T]:
        """Return something of every window, given that of this rank's, in the order of all windows."""
        of_ranks = self.ranks.gather(list(of_windows))
        return [of_ranks[window % self.ranks.world][window // self.ranks.world] for window in range(self.windows)]
