"""Shapes of a model, read from headers and the meta device: all that a plan needs to know of it."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class BlockShape:
    """Shapes of one block and of the linears that are compressed in it."""

    linears: Mapping[str, tuple[int, int]]  # linear -> (o, d) of its weight
    groups: tuple[tuple[str, ...], ...]  # linears that share an input, and so a Gram, which belongs to the first
    parameters: int  # number of all parameters of the block
    source_bytes: int  # of these parameters in the source checkpoint
    routing: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Linear of an expert -> (k, E): each token passes k of E experts."""
    expert_of: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Linear of an expert whose inputs can be kept -> the module of experts that it is in, and the expert's number."""

    @cached_property
    def grams(self) -> Mapping[str, int]:
        """Owner of each Gram [d, d] -> d."""
        return {owner: self.linears[owner][1] for owner, *_ in self.groups}

    def token_fraction(self, linear: str) -> float:
        """Return the fraction of all tokens that reach a linear on average: k/E for an expert's, 1 for any other."""
        chosen, experts = self.routing.get(linear, (1, 1))
        return chosen / experts

    @property
    def active_parameters(self) -> float:
        """Number of parameters that one token passes."""
        return self.parameters - sum((1 - self.token_fraction(name)) * o * d for name, (o, d) in self.linears.items())

    @property
    def expert_grams(self) -> Mapping[str, int]:
        """The part of `grams` that belongs to experts."""
        return {name: d for name, d in self.grams.items() if name in self.routing}

    @cached_property
    def modules_of_experts(self) -> Mapping[str, int]:
        """Module of experts whose inputs can be kept -> experts k that a token passes."""
        return {module: self.routing[name][0] for name, (module, _) in self.expert_of.items()}

    @property
    def expert_sum_bytes(self) -> int:
        """Bytes of one float32 sum [d, d] of the Grams of all E experts for each kind of them; 0 without experts."""
        return round(sum(4 * d * d / self.routing[name][1] for name, d in self.expert_grams.items()))

    @cached_property
    def kind(self) -> Hashable:
        """All shapes of the block without names, which are equal for blocks of one kind.

        Linears and modules of experts stand by their place in the block.
        """
        place = {name: i for i, name in enumerate(self.linears)}
        module_place = {module: i for i, module in enumerate(self.modules_of_experts)}
        return (
            tuple(self.linears.values()),
            tuple(tuple(place[name] for name in group) for group in self.groups),
            self.parameters,
            self.source_bytes,
            tuple((place[name], experts) for name, experts in self.routing.items()),
            tuple((place[name], module_place[module], i) for name, (module, i) in self.expert_of.items()),
        )


@dataclass(frozen=True)
class ModelShape:
    """Shapes of a whole model, and the bytes that its source takes."""

    blocks: tuple[BlockShape, ...]
    hidden_size: int
    non_block_parameters: int  # that the model has
    non_block_bytes: int  # in the source checkpoint, with tensors that the model does not read
    value_bytes: int  # of one weight in the shards
    eager_heads: int = 0  # attention heads where attention writes its scores out; 0 where it is fused
    download_bytes: int = 0
    largest_shard_bytes: int = 0
    vocabulary: int = 0  # tokens that the head ranks; 0 where config.json does not say
    float32_stream: bool = False  # hidden states inside blocks, and targets, are float32 whatever the compute dtype
    carried: int = 0
    """Most numbers of the compute dtype that blocks hand on for a token beside its hidden states."""

    @cached_property
    def block_kinds(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the blocks of each kind; the kind of block 0 comes first."""
        kinds: dict[Hashable, list[int]] = {}
        for i, block in enumerate(self.blocks):
            kinds.setdefault(block.kind, []).append(i)
        return tuple(map(tuple, kinds.values()))
