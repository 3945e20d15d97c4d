"""OATS: outlier-aware scaling, then alternating thresholding (arXiv 2409.13652)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from streamslr.solvers.base import LinearProblem, SparseLowRank
from streamslr.solvers.low_rank import WARM_STEPS, LowRankFit
from streamslr.solvers.scaled import ScaledLinear, scaled_bytes, solve_scaled
from streamslr.spec.pattern import SparsityPattern


@dataclass(frozen=True)
class Oats:
    """Algorithms 1 and 2 of the paper, on W·diag(s) with s = diag(H)^½.

    U·V ← the truncated SVD of W − S, then S ← the largest values of W − U·V that the pattern allows, `iterations`
    times. Only the diagonal of H is used. Three things differ from the paper: the diagonal is damped; the pattern says
    what is compared, where the paper compares within rows (p%/row); the SVD is subspace iteration from where the last
    turn ended.

    Attributes:
        iterations: Turns; one where the rank is 0. 40 as in the papers that compare with OATS, where OATS takes 80
            (tools/results/solver.md, "OATS").
    """

    iterations: int = 40

    def solve(self, problem: LinearProblem) -> SparseLowRank:
        """Return S, U and V for the problem.

        Raises:
            InputError: The problem has no solution; the message names the linear.
        """

        def alternate(linear: ScaledLinear) -> tuple[Tensor, Tensor, Tensor, int]:
            W, pattern = linear.W, problem.pattern
            fit = LowRankFit(W, linear.rank, linear.times, problem.seed)
            U, V = fit.fit(W)
            E = torch.addmm(W, U, V, alpha=-1)
            S = E.mul_(pattern.project(E))
            if not linear.rank:
                return S, U, V, 1
            for _ in range(self.iterations - 1):
                U, V = fit.fit(W - S, WARM_STEPS)
                torch.addmm(W, U, V, alpha=-1, out=S)
                S.mul_(pattern.project(S))
            return S, U, V, self.iterations

        return solve_scaled(problem, alternate, full_gram=False)

    def peak_bytes(
        self, o: int, d: int, rank: int, workspace: int | None = None, *, pattern: SparsityPattern, gpu: bool = False
    ) -> int:
        return scaled_bytes(o, d, rank, full_gram=False, gpu=gpu) + 4 * o * d + 10 * o * d

    def flops(self, o: int, d: int, rank: int, *, gpu: bool = False) -> float:
        return self.iterations * (14.0 * o * d * rank + 20 * o * d)
