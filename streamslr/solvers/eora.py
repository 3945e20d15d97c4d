"""EoRA: prune, then the best low-rank correction of what pruning lost (arXiv 2410.21271)."""

from dataclasses import dataclass

from torch import Tensor

from streamslr.solvers.base import LinearProblem, SparseLowRank
from streamslr.solvers.low_rank import LowRankFit
from streamslr.solvers.scaled import Pruner, ScaledLinear, pruning_bytes, solve_scaled
from streamslr.spec.pattern import SparsityPattern


@dataclass(frozen=True)
class Eora:
    """S by any pruner, then U·V the best rank-r fit of W − S in the metric of the inputs.

    The paper's algorithm 1 projects W − S on the eigenvectors of H, weighted by the roots of their eigenvalues, and
    truncates an SVD there. tr(R H Rᵀ) is the squared norm in that space, so `LowRankFit` finds the same minimum.

    Attributes:
        pruner: Makes S.
    """

    pruner: Pruner

    def solve(self, problem: LinearProblem) -> SparseLowRank:
        """Return S, U and V for the problem.

        Raises:
            InputError: The problem has no solution; the message names the linear.
        """

        def prune_and_fit(linear: ScaledLinear) -> tuple[Tensor, Tensor, Tensor, int]:
            S = self.pruner.prepare(linear)(linear.W)
            fit = LowRankFit(S, linear.rank, linear.times, problem.seed)
            return S, *fit.fit(linear.W - S), 1

        return solve_scaled(problem, prune_and_fit, full_gram=True)

    def peak_bytes(
        self, o: int, d: int, rank: int, workspace: int | None = None, *, pattern: SparsityPattern, gpu: bool = False
    ) -> int:
        return pruning_bytes(self.pruner, o, d, rank, full_gram=True, pattern=pattern, gpu=gpu)

    def flops(self, o: int, d: int, rank: int, *, gpu: bool = False) -> float:
        return self.pruner.prune_flops(o, d, gpu=gpu) + 8 * (4 * o * d + 2 * d * d) * rank
