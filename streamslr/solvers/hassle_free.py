"""HASSLE-free: prune W − U·V and fit U·V to W − S in turns, both in the metric of the inputs (arXiv 2502.00899)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamslr.solvers.base import LinearProblem, SparseLowRank
from streamslr.solvers.low_rank import WARM_STEPS, LowRankFit
from streamslr.solvers.scaled import Pruner, ScaledLinear, pruning_bytes, solve_scaled
from streamslr.spec.pattern import SparsityPattern

# Extrapolation of U·V for the pruner: U·V + 0.65 (U·V − last U·V). 24 turns with it reach the loss of 40 without
# (tools/results/solver.md, "HASSLE-free").
_MOMENTUM = 0.65


@dataclass(frozen=True)
class HassleFree:
    """Algorithm 1 of the paper: S ← prune(W − U·V), U·V ← the best rank-r fit of W − S, `iterations` times.

    Three things differ from the official code. The pruner factors H once for all turns. The fit is subspace iteration
    from the last turn's U·V, where the official code takes an SVD. The pruner sees U·V extrapolated (momentum), so 24
    turns do where the official code takes 40.

    Attributes:
        pruner: Makes S.
        iterations: Turns; one where the rank is 0.
    """

    pruner: Pruner
    iterations: int = 24

    def solve(self, problem: LinearProblem) -> SparseLowRank:
        """Return S, U and V for the problem.

        Raises:
            InputError: The problem has no solution; the message names the linear.
        """

        def alternate(linear: ScaledLinear) -> tuple[Tensor, Tensor, Tensor, int]:
            W = linear.W
            # a turn need not settle, since the next continues from it: its warnings are dropped
            prune = self.pruner.prepare(replace(linear, warnings=[]) if linear.rank else linear)
            fit = LowRankFit(W, linear.rank, linear.times, problem.seed)
            S = prune(W)
            U, V = fit.fit(W - S)
            if not linear.rank:
                return S, U, V, 1
            T = torch.addmm(W, U, V, alpha=-1)  # W − U·V
            for _ in range(self.iterations - 1):
                del S
                S = prune(T)
                before = U, V
                U, V = fit.fit(torch.sub(W, S, out=T), WARM_STEPS)
                torch.addmm(W, U, V, alpha=-1 - _MOMENTUM, out=T).addmm_(*before, alpha=_MOMENTUM)
            return S, U, V, self.iterations

        return solve_scaled(problem, alternate, full_gram=True)

    def peak_bytes(
        self, o: int, d: int, rank: int, workspace: int | None = None, *, pattern: SparsityPattern, gpu: bool = False
    ) -> int:
        return pruning_bytes(self.pruner, o, d, rank, full_gram=True, pattern=pattern, gpu=gpu)

    def flops(self, o: int, d: int, rank: int, *, gpu: bool = False) -> float:
        turn = self.pruner.prune_flops(o, d, gpu=gpu) + 2 * (4 * o * d + 2 * d * d) * rank
        return self.iterations * turn if rank else self.pruner.prune_flops(o, d, gpu=gpu)
