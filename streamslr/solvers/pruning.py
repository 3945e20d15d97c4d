"""Pruning alone: magnitude and Wanda, and the method that any pruner makes."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from streamslr.solvers.base import LinearProblem, SparseLowRank
from streamslr.solvers.scaled import Pruner, ScaledLinear, pruning_bytes, solve_scaled
from streamslr.spec.pattern import SparsityPattern


@dataclass(frozen=True)
class Magnitude:
    """Keep the weights with the largest |W_ij| (Han et al., arXiv 1506.02626)."""

    full_gram = False

    def prepare(self, linear: ScaledLinear) -> Callable[[Tensor], Tensor]:
        pattern, scale = linear.problem.pattern, linear.scale
        return lambda T: T * pattern.project(T / scale)

    def prune_bytes(self, o: int, d: int, *, pattern: SparsityPattern, gpu: bool) -> int:
        return 14 * o * d  # scores, and what their projection takes

    def prune_flops(self, o: int, d: int, *, gpu: bool = False) -> float:
        return 20.0 * o * d


@dataclass(frozen=True)
class Wanda:
    """Keep the weights with the largest |W_ij|·‖X_j‖ (arXiv 2306.11695, equation 1), ‖X_j‖ undamped.

    The pattern says what is compared: groups of m, rows for p%/row as in the paper, or the linear for p%.
    """

    full_gram = False

    def prepare(self, linear: ScaledLinear) -> Callable[[Tensor], Tensor]:
        pattern = linear.problem.pattern
        per_scale = linear.problem.gram.diagonal().clamp_min(0).sqrt() / linear.scale  # [d]
        return lambda T: T * pattern.project(T * per_scale)

    prune_bytes = Magnitude.prune_bytes
    prune_flops = Magnitude.prune_flops


@dataclass(frozen=True)
class Pruned:
    """A pruner as a method: W ≈ S, without U·V.

    Attributes:
        pruner: Makes S of W.
    """

    pruner: Pruner

    def solve(self, problem: LinearProblem) -> SparseLowRank:
        """Return S for the problem, with U [o, 0] and V [0, d].

        Raises:
            InputError: The problem has no solution; the message names the linear.
        """

        def prune(linear: ScaledLinear) -> tuple[Tensor, Tensor, Tensor, int]:
            W = linear.W
            S = self.pruner.prepare(linear)(W)
            return S, W.new_zeros(len(W), 0), W.new_zeros(0, W.shape[1]), 1

        return solve_scaled(problem, prune, self.pruner.full_gram)

    def peak_bytes(
        self, o: int, d: int, rank: int, workspace: int | None = None, *, pattern: SparsityPattern, gpu: bool = False
    ) -> int:
        return pruning_bytes(self.pruner, o, d, 0, full_gram=self.pruner.full_gram, pattern=pattern, gpu=gpu)

    def flops(self, o: int, d: int, rank: int, *, gpu: bool = False, ranks: int = 1) -> float:
        return self.pruner.prune_flops(-(-o // ranks), d, gpu=gpu)
