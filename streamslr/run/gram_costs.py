"""Bytes of a block's Grams: of those that are collected at a time, of those that wait, and of inputs kept for them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, starmap

from streamslr.calibration.grams import grams_bytes, group_grams
from streamslr.calibration.routed_inputs import routing_bytes
from streamslr.model.shape import BlockShape
from streamslr.run.dealing import Deal

Groups = list[list[str]]
"""Owners of Grams, by group."""


@dataclass(frozen=True)
class GramCosts:
    """Bytes of the Grams of blocks of one kind, on the rank that has most of them.

    Attributes:
        blocks: The blocks; their shapes are equal, and only names and specs of linears differ.
        deals: Deal of the linears of each block.
        world: Ranks that share the run.
        at_once: Bytes of the Grams that one pass collects; None: one pass collects all.
        of_experts_at_once: Bytes of experts' Grams that are collected from kept inputs; None: passes collect them.
    """

    blocks: Sequence[BlockShape]
    deals: Sequence[Deal]
    world: int
    at_once: int | None
    of_experts_at_once: int | None

    @cached_property
    def in_passes(self) -> list[Groups]:
        """Owners of the Grams that each pass of a block collects, by block."""
        return [in_passes for in_passes, _ in self._groups]

    @cached_property
    def _from_inputs(self) -> list[Groups]:
        """Owners of the Grams that are collected from kept inputs at a time, by block."""
        return [from_inputs for _, from_inputs in self._groups]

    @cached_property
    def _groups(self) -> list[tuple[Groups, Groups]]:
        return [group_grams(block, self.at_once, self.of_experts_at_once) for block in self.blocks]

    @cached_property
    def largest_group_bytes(self) -> int:
        """Bytes of the Grams that one pass collects."""
        return self._largest(self.in_passes[0])

    @cached_property
    def largest_expert_group_bytes(self) -> int:
        """Bytes of the Grams that are collected from kept inputs at a time."""
        return self._largest(self._from_inputs[0])

    @property
    def expert_groups(self) -> int:
        """Groups of experts' Grams that a block is cut into; 0 where no inputs are kept."""
        return len(self._from_inputs[0])

    @cached_property
    def waiting_bytes(self) -> int:
        """Bytes of the Grams of a block that wait for the linears that a rank solves, the most at a time."""
        return max(self.passes_waiting_bytes, self.experts_waiting_bytes)

    @cached_property
    def passes_waiting_bytes(self) -> int:
        """Bytes of the Grams that wait once passes of a block have collected them."""
        owners = [list(chain.from_iterable(groups)) for groups in self.in_passes]
        return max(starmap(self._waiting_bytes, zip(self.blocks, self.deals, owners, strict=True)))

    @cached_property
    def experts_waiting_bytes(self) -> int:
        """Bytes of the Grams of one group that wait once they have been collected from kept inputs."""
        of_blocks = zip(self.blocks, self.deals, self._from_inputs, strict=True)
        owners = ((block, deal, group) for block, deal, groups in of_blocks for group in groups)
        return max(starmap(self._waiting_bytes, owners), default=0)

    @property
    def blends_late(self) -> bool:
        """True where a Gram of an expert is blended as it is solved, with sums over groups and ranks."""
        return self.world > 1 or self.at_once is not None or self.keeps_inputs

    @property
    def has_experts(self) -> bool:
        """True where the blocks have experts whose inputs can be kept."""
        return bool(self.blocks[0].expert_of)

    @property
    def keeps_inputs(self) -> bool:
        """True where the inputs of experts are kept, and their Grams collected from these."""
        return self.of_experts_at_once is not None

    @property
    def modules_kept(self) -> int:
        """Modules of experts in a block whose inputs are kept."""
        return len(self.blocks[0].modules_of_experts) if self.keeps_inputs else 0

    def routing_bytes(self, tokens: int) -> int:
        """Return the bytes of the routing that is kept with the inputs of experts, of so many tokens."""
        return routing_bytes(tokens, sum(self.blocks[0].modules_of_experts.values())) if self.keeps_inputs else 0

    def _largest(self, groups: Groups) -> int:
        return max((grams_bytes(self.blocks[0].grams[owner] for owner in group) for group in groups), default=0)

    def _waiting_bytes(self, block: BlockShape, deal: Deal, owners: Iterable[str]) -> int:
        wanted = frozenset(owners)
        needs = [(deal.needs(g, self.world), block.grams[g[0]]) for g in block.groups if g[0] in wanted]
        return max(grams_bytes(d for ranks, d in needs if rank in ranks) for rank in range(self.world))
