"""U·V: the best fit of a given rank in the metric of the inputs, without a singular value decomposition."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from streamslr.ranks import ALONE, Ranks

# Columns of the subspace beyond the rank: their energies, not those at the rank, then set the pace of convergence.
_OVERSAMPLING = 8
# Steps from a random start. The loss is then within 0.1 % of that of an SVD in float64 (tests/solvers/
# test_baselines.py, test_the_low_rank_fit_is_the_truncated_svd).
COLD_STEPS = 8
# Steps from the last fit, where E moved little since.
WARM_STEPS = 2
# Largest inner product of rows of an orthonormal basis; float32 leaves 1e-6.
_ORTHONORMAL = 1e-4


class LowRankFit:
    """argmin over rank-r U·V of tr((E − UV) G (E − UV)ᵀ), for one E [o, d] after another of the same linear.

    The optimum is U Uᵀ E, the columns of U the top eigenvectors of E G Eᵀ. Subspace iteration finds them, each fit
    from where the last one ended, with a Rayleigh-Ritz step at the end.
    """

    def __init__(self, W: Tensor, rank: int, times: Callable[[Tensor], Tensor], seed: int) -> None:
        """Draw the first basis on the CPU, so that it is the same on every device.

        Args:
            W: [o, d]; only its shape, type and device are used.
            rank: r, at most min(o, d).
            times: Returns G @ y for y [d, k].
            seed: Seed of the first basis.
        """
        o, d = W.shape
        generator = torch.Generator().manual_seed(seed)
        k = min(rank + _OVERSAMPLING, o, d) if rank else 0
        self.rank, self.times = rank, times
        self.basis = torch.linalg.qr(torch.randn(o, k, generator=generator).to(W)).Q  # [o, k]

    def fit(self, E: Tensor, steps: int = COLD_STEPS) -> tuple[Tensor, Tensor]:
        """Return U [o, r] with orthonormal columns and V [r, d], the best fit of E [o, d]."""
        if not self.rank:
            return E.new_zeros(len(E), 0), E.new_zeros(0, E.shape[1])
        for _ in range(steps):
            self.basis = torch.linalg.qr(E @ self.times(E.t() @ self.basis)).Q
        K = E.t() @ self.basis  # [d, k]
        _, vectors = torch.linalg.eigh((K.t() @ self.times(K)).double())  # ascending
        vectors = vectors[:, -self.rank :].flip(1).to(E)
        return self.basis @ vectors, (K @ vectors).t()


def orthonormal_rows(matrix: Tensor, ranks: Ranks = ALONE, counts: Sequence[int] = ()) -> Tensor:
    """Return an orthonormal basis [r, o] of the rows of a matrix [r, o], r at most o, by Householder's QR.

    Where its columns lie on several ranks, each factors its own, and the triangles, one below the other, are factored
    once more (TSQR; Demmel et al., arXiv 0808.2664). That is as stable as one factorization.

    Args:
        matrix: This rank's columns of the matrix.
        ranks: Ranks that have the columns.
        counts: Columns of each rank, where there are several.
    """
    if not len(matrix):
        return matrix.contiguous()
    basis: Tensor
    basis, triangle = torch.linalg.qr(matrix.t())
    if ranks.world > 1:
        r = len(matrix)
        heights = [min(count, r) for count in counts]
        first = sum(heights[: ranks.rank])
        own = slice(first, first + heights[ranks.rank])
        triangles = matrix.new_zeros(sum(heights), r)
        triangles[own] = triangle
        basis = basis @ _of_rank_0(torch.linalg.qr(ranks.sum_(triangles)).Q, ranks)[own]
    return basis.t().contiguous()


def _of_rank_0(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Return rank 0's tensor: signs of a factorization may be others on another kind of machine."""
    if ranks.world > 1:
        tensor = tensor.contiguous()
        ranks.broadcast_(tensor, 0)
    return tensor


def orthonormal_rows_by_cholesky(matrix: Tensor, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis of the rows of a matrix [r, o] by CholeskyQR2, and whether it is one.

    Householder's QR takes a few small kernels for each of r columns on a GPU, this a dozen in all. It fails where rows
    of unit length are nearly dependent, to 1e-3 or so (Yamamoto et al., ETNA 44, 2015). Nothing here waits for the
    device. Ranks exchange numbers [r, r].

    Args:
        matrix: [r, o], or this rank's columns of it.
        ranks: Ranks that have the columns.

    Returns:
        The basis [r, o], and a bool scalar on the device: False where the basis must not be used.
    """
    basis = matrix / ranks.sum_(matrix.norm(dim=1, keepdim=True))  # at most √world from unit length
    for _ in range(2):
        factor, _ = torch.linalg.cholesky_ex(ranks.sum_(basis @ basis.t()))
        basis = torch.linalg.solve_triangular(factor, basis, upper=False)
    off = ranks.sum_(basis @ basis.t()).sub_(torch.eye(len(basis), device=basis.device)).abs().max()
    return basis, off < _ORTHONORMAL  # False for NaN, too, which a factor that does not exist gives


def balance_factors(U: Tensor, V: Tensor, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """Return factors of the same U·V with UᵀU = V Vᵀ, diagonal, largest first.

    Neither factor then outgrows the other in bfloat16. Directions without energy become zero.

    Args:
        U: [o, r], orthonormal columns, or this rank's rows of it.
        V: [r, d], the same on each rank.
        ranks: Ranks that have the rows of U.
    """
    if not U.shape[1]:
        return U, V.contiguous()
    energy, vectors = torch.linalg.eigh((V @ V.t()).double())
    energy, vectors = _of_rank_0(energy, ranks), _of_rank_0(vectors, ranks)
    energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1).to(U)
    root = energy.sqrt().sqrt().to(U)  # of the singular values
    inverse = torch.where(root > root[0] * 1e-4, 1 / root, 0)
    return (U @ vectors) * root, ((vectors.t() @ V) * inverse[:, None]).contiguous()
