"""A linear in units of its inputs' energy, where most methods work, and the way back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamslr.errors import InputError, StreamslrError
from streamslr.solvers.base import LinearProblem, SparseLowRank, damping_diagonal, keep_weight, validate
from streamslr.solvers.low_rank import balance_factors
from streamslr.tensors import is_finite

# A Gram matrix that still has no Cholesky factor with this much damping is no Gram matrix.
_DAMPING_LIMIT = 1e6


@dataclass(frozen=True)
class ScaledLinear:
    """W·diag(s) and G = diag(1/s) H diag(1/s), H the damped Gram matrix, s_j = H_jj^½: G has a unit diagonal.

    W [o, d], zero in the columns of dead inputs. G [d, d], or None where the diagonal is all that was asked for.
    scale [d]: s. dead [d]: bool. warnings: what the user should know, a sentence each; whoever solves adds to it.
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
        """G @ y for y [d, k]; y itself where G is but its diagonal."""
        return y if self.G is None else self.G @ y


class Pruner(Protocol):
    """Pure sparsity for any target: what stands alone, and inside methods that alternate with a low-rank fit."""

    @property
    def full_gram(self) -> bool:
        """Whether it needs G; else the diagonal does."""
        ...

    def prepare(self, linear: ScaledLinear) -> Callable[[Tensor], Tensor]:
        """T [o, d] -> S [o, d] in the pattern, near T in the metric, both scaled as the linear; T stays as it is.

        What all targets of a linear share, such as a factorization, is computed here, once.
        """
        ...

    def prune_bytes(self, o: int, d: int, *, by_row: bool, gpu: bool) -> int:
        """The most that `prepare` and one target take beside the target and G, with S."""
        ...

    def prune_flops(self, o: int, d: int) -> float:
        """Of one target."""
        ...


def solve_scaled(
    problem: LinearProblem,
    solve: Callable[[ScaledLinear], tuple[Tensor, Tensor, Tensor, int]],
    full_gram: bool,
) -> SparseLowRank:
    """What is the same for each method: checks before, scale, S, U, V and iterations by `solve`, and back."""
    rank, warnings = validate(problem)
    if problem.pattern.check(problem.weight != 0) is None:
        return keep_weight(problem, rank, warnings)
    linear = _scaled(problem, rank, full_gram, warnings)
    if linear.damping > 1:
        warnings.append(
            f"{problem.name}: the Gram matrix had no Cholesky factor; its damping was raised {linear.damping:g} times"
        )
    S, U, V, iterations = solve(linear)
    S.div_(linear.scale)
    S[:, linear.dead] = 0
    V = V / linear.scale
    V[:, linear.dead] = 0
    U, V = balance_factors(U, V)
    if not (is_finite(S) and is_finite(U) and is_finite(V)):
        raise StreamslrError(f"{problem.name}: values overflowed; report this as a bug, or scale the checkpoint")
    return SparseLowRank(S, U, V, iterations, linear.damping, tuple(warnings))


def _scaled(problem: LinearProblem, rank: int, full_gram: bool, warnings: list[str]) -> ScaledLinear:
    """The linear, its damping raised tenfold until G has a Cholesky factor, where G is asked for."""
    multiplier = 1.0
    while multiplier <= _DAMPING_LIMIT:
        added, dead = damping_diagonal(problem.gram, multiplier)
        scale = (problem.gram.diagonal() + added).sqrt()
        G = None
        if full_gram:
            G = (problem.gram / scale).div_(scale[:, None])
            G.diagonal().add_(added / scale.square())
        if G is None or not int(torch.linalg.cholesky_ex(G).info):
            W = problem.weight * scale
            W[:, dead] = 0
            return ScaledLinear(problem, rank, W, G, scale, dead, multiplier, warnings)
        multiplier *= 10
    raise InputError(
        f"{problem.name}: its Gram matrix is not positive semidefinite, even with {_DAMPING_LIMIT:g} times the "
        f"damping; was it summed over real inputs?"
    )


def scaled_bytes(o: int, d: int, rank: int, *, full_gram: bool, gpu: bool) -> int:
    """What the scaled linear takes, G while it is checked, and where there is a low-rank part E and its factors."""
    low_rank = 4 * o * d + 4 * 10 * (o + d) * (rank + 8) if rank else 0
    return 4 * o * d + 4 * d * d * full_gram * (3 if gpu else 2) + low_rank + 64 * (o + d)
