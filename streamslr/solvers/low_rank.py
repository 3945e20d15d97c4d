"""U·V: the best fit of given rank in the metric of the inputs, without a singular value decomposition."""

from collections.abc import Callable

import torch
from torch import Tensor

# Columns of the subspace beyond the rank: their energies, not those at the rank, then set the pace of convergence.
_OVERSAMPLING = 8
# Steps from a random start; against an SVD in float64 the loss is within 0.1 % (tests/solve/test_low_rank.py).
COLD_STEPS = 8


class LowRankFit:
    """argmin over rank-r U·V of tr((E − UV) G (E − UV)ᵀ), for one E [o, d] after another of the same linear.

    The optimum is U Uᵀ E, the columns of U the top eigenvectors of E G Eᵀ. Subspace iteration finds them, each fit
    from where the last one ended, with a Rayleigh-Ritz step at the end. times: G @ y for y [d, k].
    Deterministic: the first basis is drawn on the CPU from `seed`.
    """

    def __init__(self, W: Tensor, rank: int, times: Callable[[Tensor], Tensor], seed: int) -> None:
        o, d = W.shape
        generator = torch.Generator().manual_seed(seed)
        k = min(rank + _OVERSAMPLING, o, d) if rank else 0
        self.rank, self.times = rank, times
        self.basis = torch.linalg.qr(torch.randn(o, k, generator=generator).to(W)).Q  # [o, k]

    def fit(self, E: Tensor, steps: int = COLD_STEPS) -> tuple[Tensor, Tensor]:
        """U [o, r], orthonormal, and V [r, d] for E [o, d]; two steps do where E moved little since the last fit."""
        if not self.rank:
            return E.new_zeros(len(E), 0), E.new_zeros(0, E.shape[1])
        for _ in range(steps):
            self.basis = torch.linalg.qr(E @ self.times(E.t() @ self.basis)).Q
        K = E.t() @ self.basis  # [d, k]
        _, turn = torch.linalg.eigh((K.t() @ self.times(K)).double())  # ascending
        turn = turn[:, -self.rank :].flip(1).to(E)
        return self.basis @ turn, (K @ turn).t()


def balance_factors(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """The same U·V with UᵀU = V Vᵀ, diagonal, largest first: no factor outgrows the other in bfloat16.

    U [o, r] must be orthonormal. Directions of no energy become zero.
    """
    if not U.shape[1]:
        return U, V.contiguous()
    energy, turn = torch.linalg.eigh((V @ V.t()).double())
    energy, turn = energy.flip(0).clamp_min(0), turn.flip(1).to(U)
    root = energy.sqrt().sqrt().to(U)  # of the singular values
    inverse = torch.where(root > root[0] * 1e-4, 1 / root, 0)
    return (U @ turn) * root, ((turn.t() @ V) * inverse[:, None]).contiguous()
