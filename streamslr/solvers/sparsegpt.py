"""SparseGPT: Optimal Brain Surgeon column by column, with one factorization for all rows (arXiv 2301.00774)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from streamslr.errors import StreamslrError
from streamslr.solvers.scaled import ScaledLinear
from streamslr.spec.pattern import SparsityPattern
from streamslr.spec.selection import largest_of_rows


@dataclass(frozen=True)
class SparseGPT:
    """Algorithm 1 of the paper on T·diag(s) in place of T; Optimal Brain Surgeon is blind to the scale of inputs.

    Columns are pruned from left to right. The columns after j make up for what column j loses, by the rows of the
    upper Cholesky factor R of G⁻¹ = RᵀR; R_jj² is [(G_{j:, j:})⁻¹]_jj. A block of columns gets the updates of all
    earlier blocks in one product.

    The weights with the largest w² / R_jj² are kept: n of each m, chosen where their group begins; or a fraction of
    each block, chosen where the block begins, of the whole block for p% as in the paper's code, or of each of its rows
    for p%/row. The damping is this project's, not the paper's.

    Attributes:
        block: Columns of a block, 128 as in the paper (its B and B_s); rounded down to whole groups.
    """

    block: int = 128
    full_gram = True

    def prepare(self, linear: ScaledLinear) -> Callable[[Tensor], Tensor]:
        assert linear.G is not None
        R = _factor_inverse(linear.G, linear.problem.name)  # [d, d]
        pattern, inverse = linear.problem.pattern, (1 / R.diagonal())[:, None]
        R.mul_(inverse)  # a unit diagonal: row j of R spreads what column j loses

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
                        mask = marker.mark_(scores.abs_().t()).t()
                    elif groups:  # rows keep k in all; these columns get what is due by column `stop`
                        k = groups[0]
                        mask = largest_of_rows(scores.t(), k * stop // d - k * start // d).t().to(X)
                    else:
                        mask = pattern.project(scores.t()).t().to(X)
                    for j in range(start, stop):
                        error = torch.addcmul(X[j], X[j], mask[j - start], value=-1, out=lost[j - first])
                        X[j:stop].addr_(R[j, j:stop], error, alpha=-1)
                    if stop < end:
                        X[stop:end].addmm_(R[start:stop, stop:end].t(), lost[start - first : stop - first], alpha=-1)
                if end < d:
                    X[end:].addmm_(R[first:end, end:].t(), lost, alpha=-1)
            S: Tensor = X.t().contiguous()
            if pattern.check(S != 0) is not None:  # ties in a group, or rounding of a block's number of weights
                S.mul_(pattern.project(S))
            return S

        return prune

    def prune_bytes(self, o: int, d: int, *, pattern: SparsityPattern, gpu: bool) -> int:
        blocks = 4 * self.block * o * 6
        return 8 * o * d + 4 * d * d * (4 if gpu else 3) + blocks

    def prune_flops(self, o: int, d: int, *, gpu: bool = False) -> float:
        return float(o * d * d + d**3)


def _factor_inverse(G: Tensor, name: str) -> Tensor:
    """Return R [d, d], upper triangular with RᵀR = G⁻¹, for a G that has a Cholesky factor."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(G))
    R: Tensor
    R, info = torch.linalg.cholesky_ex(inverse, upper=True)
    if int(info):
        raise StreamslrError(
            f"{name}: the inverse of its damped Gram matrix has no Cholesky factor; try another --method, and report "
            f"this as a bug"
        )
    return R
