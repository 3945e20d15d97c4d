"""SparseGPT: Optimal Brain Surgeon column by column, with one factorization for all rows (arXiv 2301.00774)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from streamslr.errors import StreamslrError
from streamslr.solvers.scaled import ScaledLinear
from streamslr.spec.pattern import largest_of_rows


@dataclass(frozen=True)
class SparseGPT:
    """Algorithm 1 of the paper on T·diag(s), which it treats as T: OBS is blind to the scale of inputs.

    Columns from left to right: what column j loses is made up for in the columns after it, by the rows of the
    upper Cholesky factor R of G⁻¹ = RᵀR; R_jj² is [(G_{j:, j:})⁻¹]_jj. Blocks of `block` columns (the paper's B and
    B_s, 128) get the updates of earlier blocks in one product. Kept are the largest w² / R_jj²: n of each m when
    their group begins, a share of each block when the block begins, p% of the block as in the paper's code or p%/row of
    each of its rows. The damping is this project's, not the paper's.
    """

    block: int = 128
    full_gram = True

    def prepare(self, linear: ScaledLinear) -> Callable[[Tensor], Tensor]:
        assert linear.G is not None
        R = _factor_of_inverse(linear.G, linear.problem.name)  # [d, d]
        pattern, inverse = linear.problem.pattern, (1 / R.diagonal())[:, None]
        R.mul_(inverse)  # a unit diagonal: what column j loses is then what each row of R spreads

        def prune(T: Tensor) -> Tensor:
            X = T.t().contiguous()  # [d, o]: a column of T is a row
            d = len(X)
            groups = pattern.groups(d)
            m = groups[1] if groups and groups[1] < d else 1
            marker = pattern.marker(T) if m > 1 else None
            block = max(1, self.block // m) * m
            decided = m if marker else block  # columns whose support is chosen at once
            for first in range(0, d, block):
                end = min(first + block, d)
                lost = torch.empty_like(X[first:end])  # [k, o]
                for start in range(first, end, decided):
                    stop = min(start + decided, end)
                    scores = X[start:stop] * inverse[start:stop]
                    if marker:
                        kept = marker.mark_(scores.abs_().t()).t()
                    elif groups:  # rows: of the k that stay of each, what falls to these columns
                        k = groups[0]
                        kept = largest_of_rows(scores.t(), k * stop // d - k * start // d).t().to(X)
                    else:
                        kept = pattern.project(scores.t()).t().to(X)
                    for j in range(start, stop):
                        error = torch.addcmul(X[j], X[j], kept[j - start], value=-1, out=lost[j - first])
                        X[j:stop].addr_(R[j, j:stop], error, alpha=-1)
                    if stop < end:
                        X[stop:end].addmm_(R[start:stop, stop:end].t(), lost[start - first : stop - first], alpha=-1)
                if end < d:
                    X[end:].addmm_(R[first:end, end:].t(), lost, alpha=-1)
            S: Tensor = X.t().contiguous()
            if pattern.check(S != 0) is not None:  # ties in a group, rounding of a block's share
                S.mul_(pattern.project(S))
            return S

        return prune

    def prune_bytes(self, o: int, d: int, *, by_row: bool, gpu: bool) -> int:
        blocks = 4 * self.block * o * 6
        return 8 * o * d + 4 * d * d * (4 if gpu else 3) + blocks

    def prune_flops(self, o: int, d: int) -> float:
        return float(o * d * d + d**3)


def _factor_of_inverse(G: Tensor, name: str) -> Tensor:
    """R upper triangular with RᵀR = G⁻¹; G has a Cholesky factor."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(G))
    R: Tensor
    R, info = torch.linalg.cholesky_ex(inverse, upper=True)
    if int(info):
        raise StreamslrError(f"{name}: the inverse of its damped Gram matrix has no Cholesky factor")
    return R
