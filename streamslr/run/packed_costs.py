"""Bytes of compressed blocks: as their shards store them, and as they wait for that, S on its grid or not yet."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from streamslr.io.packed_layout import packed_bytes
from streamslr.model.shape import BlockShape, ModelShape
from streamslr.spec.allocation import Allocation


@dataclass(frozen=True)
class PackedCosts:
    """Bytes of compressed blocks.

    Attributes:
        model: The model with the blocks of one kind; `shard_bytes` takes any block of the allocation.
        allocation: Spec of each linear.
        rounds_late: S comes onto its grid between two matchings, so that blocks wait before and after.
    """

    model: ModelShape
    allocation: Allocation
    rounds_late: bool

    def shard_bytes(self, block: BlockShape) -> int:
        """Return the bytes of a compressed block as its shard stores it."""
        return self.linears_bytes(block) + self._others(block)

    @cached_property
    def waiting_bytes(self) -> int:
        """Bytes of a compressed block that waits, the largest, on its grids or before that."""
        return max(self.waiting_linears_bytes(block) + self._others(block) for block in self.model.blocks)

    def waiting_linears_bytes(self, block: BlockShape, names: Iterable[str] | None = None) -> int:
        """Return the bytes of a block's packed linears, or of some, on their grids or before that, the larger."""
        on_grid = self.linears_bytes(block, names)
        return max(on_grid, self.linears_bytes(block, names, off_grid=True)) if self.rounds_late else on_grid

    def linears_bytes(self, block: BlockShape, names: Iterable[str] | None = None, off_grid: bool = False) -> int:
        """Return the bytes of a block's packed linears, or of some; with `off_grid`, before S comes onto its grid."""
        packed = 0
        for name in block.linears if names is None else names:
            (o, d), spec = block.linears[name], self.allocation[name]
            spec = spec.off_grid if off_grid else spec
            rank, formats = min(spec.rank, o, d), (spec.values, spec.low_rank_values)
            packed += packed_bytes(spec.pattern, (o, d), rank, self.model.value_bytes, *formats)
        return packed

    def _others(self, block: BlockShape) -> int:
        """Return the bytes of what a compressed block stores beside its linears."""
        return (block.parameters - sum(o * d for o, d in block.linears.values())) * self.model.value_bytes
