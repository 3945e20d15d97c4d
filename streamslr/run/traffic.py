"""Bytes that ranks send each other for one block; guides/many-devices.md explains the formula."""

from streamslr.calibration.grams import grams_bytes
from streamslr.model.shape import BlockShape
from streamslr.run.dealing import Deal


def ring_bytes(nbytes: int, world: int) -> int:
    """Return the bytes that a rank sends, on average over ranks, while a tensor goes round a ring of them once.

    A reduce to one rank, a broadcast, a reduce-scatter and an all-gather are one round, an all-reduce is two.

    Args:
        nbytes: Bytes of the whole tensor.
        world: Number of ranks.
    """
    return nbytes * (world - 1) // world


def gram_traffic(block: BlockShape, deal: Deal, world: int) -> int:
    """Return the bytes that a rank sends for the Grams [d, d] of a block, and for their sums over experts.

    A Gram goes to the rank that needs it; where several do, and for the sums over experts, all get it.
    """
    rounds = [1 if len(deal.needs(group, world)) == 1 else 2 for group in block.groups]
    once = grams_bytes(d for d, count in zip(block.grams.values(), rounds, strict=True) if count == 1)
    twice = grams_bytes(d for d, count in zip(block.grams.values(), rounds, strict=True) if count == 2)
    return ring_bytes(once + 2 * (twice + block.expert_sum_bytes), world)


def match_traffic(masters: int, micro_batches: int, steps: int, world: int) -> int:
    """Return the bytes that a rank sends while a block is matched, all in float32.

    Gradients are sent after each micro-batch, since all of a block would not fit; masters after each step, and once
    more for what is stored.

    Args:
        masters: Numbers that are trained.
        micro_batches: Micro-batches of all epochs with steps, on the rank that has the most.
        steps: Steps of all epochs.
        world: Number of ranks.
    """
    return (micro_batches + steps + 1) * ring_bytes(4 * masters, world)
