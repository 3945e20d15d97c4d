"""Pretended ranks: exchanges leave tensors as they are and count what a ring would send."""

import torch
from pretended_gpu.ranks import PretendedRanks


def test_each_exchange_counts_its_rounds_of_the_ring() -> None:
    ranks, tensor = PretendedRanks(0, 4), torch.ones(100)
    ranks.reduce_(tensor, 1)
    ranks.broadcast_(tensor, 0)
    ranks.sum_into_shares(tensor)()
    ranks.collect_shares(tensor)()
    ranks.sum_(tensor)
    assert ranks.sent == {"reduce": 300, "broadcast": 300, "sum into shares": 300, "collect shares": 300, "sum": 600}
    assert ranks.traffic.nbytes == 5 * tensor.nbytes
    assert torch.equal(tensor, torch.ones(100))


def test_other_ranks_hold_what_this_one_does() -> None:
    ranks = PretendedRanks(0, 4)
    assert (ranks.sum(2.5), ranks.gather("a"), ranks.tell("a", source=3)) == (10.0, ["a"] * 4, "a")
