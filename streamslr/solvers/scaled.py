"""A linear scaled by the energy of its inputs, where most methods work, and the way back to its own scale."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamslr.solvers.base import (
    Damping,
    LinearProblem,
    SparseLowRank,
    damp_until_positive_definite,
    keep_weight,
    obeys_already,
    require_finite,
    validate,
)
from streamslr.solvers.low_rank import balance_factors
from streamslr.spec.pattern import SparsityPattern


@dataclass(frozen=True)
class ScaledLinear:
    """W·diag(s) and G = diag(1/s) H diag(1/s) for the damped Gram matrix H and s_j = H_jj^½.

    G has a unit diagonal, and tr(R H Rᵀ) = tr(R' G R'ᵀ) for R' = R·diag(s).

    Attributes:
        problem: The problem, in its own scale.
        rank: Rank of U·V, at most min(o, d).
        W: [o, d], the weight times s; zero in the columns of dead inputs.
        G: [d, d], or None for a method that uses only the diagonal of H.
        scale: [d], s.
        dead: [d] bool, inputs that are always zero.
        damping: Multiplier on the default damping.
        warnings: Sentences for the user; a solver adds to them.
    """

    problem: LinearProblem
    rank: int
    W: Tensor
    G: Tensor | None
    scale: Tensor
    dead: Tensor
    damping: float
    warnings: list[str]

    def times(self, y: Tensor) -> Tensor:
        """Return G @ y for y [d, k]; y itself for a method that uses only the diagonal of H."""
        return y if self.G is None else self.G @ y


class Pruner(Protocol):
    """Pure sparsity for any matrix: a method of its own, or a step of methods that alternate with a low-rank fit."""

    @property
    def full_gram(self) -> bool:
        """True when it needs G; False when the diagonal of H is enough."""
        ...

    def prepare(self, linear: ScaledLinear) -> Callable[[Tensor], Tensor]:
        """Return the function that prunes matrices in the metric of a linear.

        Work that does not depend on the matrix, such as a factorization of G, is done here, once.

        Args:
            linear: The linear whose Gram matrix and pattern apply.

        Returns:
            A function of T [o, d] that returns S [o, d], in the pattern and near T in the metric G. Both are in the
            scale of the linear. T is left unchanged.
        """
        ...

    def prune_bytes(self, o: int, d: int, *, pattern: SparsityPattern, gpu: bool) -> int:
        """Return the most bytes that `prepare` and one pruning take beside T [o, d] and G [d, d]; S is among them."""
        ...

    def prune_flops(self, o: int, d: int, *, gpu: bool = False) -> float:
        """Return the floating point operations of pruning one T [o, d]."""
        ...


def solve_scaled(
    problem: LinearProblem,
    solve: Callable[[ScaledLinear], tuple[Tensor, Tensor, Tensor, int]],
    full_gram: bool,
) -> SparseLowRank:
    """Validate and scale a problem, solve it by `solve`, and return the solution in the problem's own scale.

    Args:
        problem: The linear to compress.
        solve: Returns S [o, d], U [o, r] with orthonormal columns, V [r, d] and the number of iterations.
        full_gram: False leaves G out.

    Raises:
        InputError: The problem has no solution; the message names the linear.
    """
    rank, warnings = validate(problem)
    if obeys_already(problem):
        return keep_weight(problem, rank, warnings)
    linear = _scale_linear(problem, rank, full_gram, warnings)
    S, U, V, iterations = solve(linear)
    S.div_(linear.scale)
    S[:, linear.dead] = 0
    V = V / linear.scale
    V[:, linear.dead] = 0
    U, V = balance_factors(U, V)
    require_finite(problem, S, U, V)
    return SparseLowRank(S, U, V, iterations, linear.damping, tuple(warnings))


def _scale_linear(problem: LinearProblem, rank: int, full_gram: bool, warnings: list[str]) -> ScaledLinear:
    """Return the scaled linear, with the least damping that gives G a Cholesky factor where G is needed."""

    def scale_by(damping: Damping) -> ScaledLinear | None:
        scale, dead = damping.scale, damping.dead
        G = None
        if full_gram:
            G = (problem.gram / scale).div_(scale[:, None])
            G.diagonal().add_(damping.added / scale.square())
            if int(torch.linalg.cholesky_ex(G).info):
                return None
        W = problem.weight * scale
        W[:, dead] = 0
        return ScaledLinear(problem, rank, W, G, scale, dead, damping.multiplier, warnings)

    return damp_until_positive_definite(problem, scale_by, warnings)


def scaled_bytes(o: int, d: int, rank: int, *, full_gram: bool, gpu: bool) -> int:
    """Return the bytes of a scaled linear, its check of G, and with a rank those of E = W − S and its factors."""
    low_rank = 4 * o * d + 4 * 10 * (o + d) * (rank + 8) if rank else 0
    return 4 * o * d + 4 * d * d * full_gram * (3 if gpu else 2) + low_rank + 64 * (o + d)


def pruning_bytes(
    pruner: Pruner, o: int, d: int, rank: int, *, full_gram: bool, pattern: SparsityPattern, gpu: bool
) -> int:
    """Return the bytes of a scaled linear and of one pruning of it."""
    linear = scaled_bytes(o, d, rank, full_gram=full_gram, gpu=gpu)
    return linear + pruner.prune_bytes(o, d, pattern=pattern, gpu=gpu)
