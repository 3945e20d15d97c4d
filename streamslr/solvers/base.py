"""The seam between a linear and a method: problem, solution, damping, and the relative error of a solution."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from streamslr.errors import InputError, StreamslrError
from streamslr.ranks import ALONE, Ranks
from streamslr.spec.pattern import SparsityPattern
from streamslr.tensors import count_not_finite, is_finite, tf32_products

# Default of the official 3BASiL code (arXiv 2603.01376), for both terms of `damping_diagonal`.
DAMPING = 0.005
# Multiplier beyond which a Gram matrix without a Cholesky factor is refused: it is not positive semidefinite.
_DAMPING_LIMIT = 1e6
# Rows and columns of the tiles in which errors are computed.
_TILE = 1024

_Factorized = TypeVar("_Factorized")


@dataclass
class GramCache:
    """Work that linears with one Gram matrix share, to be done only once.

    A solver keeps here what follows from the Gram matrix and its own settings alone, so a solution has the same bits
    with and without it. It belongs to one solver and one Gram matrix, and is dropped with that.

    Attributes:
        keep_bytes: Bytes of matrices that may stay in memory from one solve to the next, beside `peak_bytes`.
        kept: What the solver kept; None before the first solve.
    """

    keep_bytes: int = 0
    kept: Any = None


@dataclass(frozen=True)
class LinearProblem:
    """One linear to compress: the S and U·V that change its outputs least.

    A solution is measured by tr(R H Rᵀ) for R = weight − S − U·V and H the damped Gram matrix: without damping, the
    squared change of the linear's outputs on the calibration inputs X (3BASiL, arXiv 2603.01376).

    Attributes:
        name: Name of the linear, for messages.
        weight: [o, d] float32, for o outputs and d inputs.
        gram: [d, d] float32, Xᵀ X over all calibration tokens, undamped.
        pattern: Sparsity pattern of S.
        rank: Columns of U; 0 for pure sparsity.
        seed: Seed of the solver's random start.
        workspace: Bytes the solver may take beside weight and gram, where it can do with less; None for no limit.
        cache: What earlier linears with this Gram matrix left to this one; None to share nothing.
        ranks: The ranks that solve the linear together. `weight` has this rank's rows, in the order of ranks; gram,
            pattern, rank and seed are the same on each, and so are V, the iterations, damping and warnings of the
            solution, whose S and U have this rank's rows. Only methods with `by_rows` get more than one.
    """

    name: str
    weight: Tensor
    gram: Tensor
    pattern: SparsityPattern
    rank: int
    seed: int = 0
    workspace: int | None = None
    cache: GramCache | None = None
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class SparseLowRank:
    """Solution of a problem: weight ≈ S + U·V, all float32.

    Attributes:
        S: [o, d], exactly zero outside the pattern's support.
        U: [o, r]; r is the problem's rank, or min(o, d) where that is less.
        V: [r, d].
        iterations: Iterations that the method took.
        damping: Multiplier on the default damping; above 1 when a factorization had failed.
        warnings: Sentences for the user about this linear.
    """

    S: Tensor
    U: Tensor
    V: Tensor
    iterations: int
    damping: float = 1.0
    warnings: tuple[str, ...] = ()

    def dense(self) -> Tensor:
        """Return S + U·V, [o, d] float32."""
        return torch.addmm(self.S, self.U, self.V)


@runtime_checkable
class Solver(Protocol):
    """The solver of a method: tensors in, tensors out, on the device of the problem, whose tensors stay unchanged."""

    def solve(self, problem: LinearProblem) -> SparseLowRank:
        """Return S, U and V for the problem; the same bits for the same problem, device and thread count.

        Raises:
            InputError: The problem has no solution; the message names the linear.
        """
        ...

    def peak_bytes(
        self, o: int, d: int, rank: int, workspace: int | None = None, *, pattern: SparsityPattern, gpu: bool = False
    ) -> int:
        """Return the most bytes that one solve takes beside its weight and Gram matrix; S, U and V are among them.

        Args:
            o: Outputs of the linear.
            d: Inputs of the linear.
            rank: Rank of U·V.
            workspace: Bytes the solve should do with if it can (`LinearProblem.workspace`).
            pattern: Pattern of S.
            gpu: True for a solve on a GPU.
        """
        ...

    def flops(self, o: int, d: int, rank: int, *, gpu: bool = False) -> float:
        """Return the floating point operations of a typical solve, for the plan; arguments as of `peak_bytes`."""
        ...


class SolverByRows(Solver, Protocol):
    """Solver that solves a linear whose rows lie on several ranks (`LinearProblem.ranks`)."""

    def flops(self, o: int, d: int, rank: int, *, gpu: bool = False, ranks: int = 1) -> float:
        """Return the operations of each of `ranks` ranks that solve o rows together; else as of `Solver`."""
        ...


@dataclass(frozen=True)
class Damping:
    """Addition to the diagonal of a Gram matrix H [d, d] that makes it positive definite.

    Attributes:
        multiplier: Factor on the default damping.
        added: [d], added to the diagonal of H.
        dead: [d] bool, the inputs that are always zero.
        scale: [d], square roots of the damped diagonal.
    """

    multiplier: float
    added: Tensor
    dead: Tensor
    scale: Tensor


def damping_diagonal(gram: Tensor, multiplier: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the damping of a Gram matrix, and its dead inputs.

    A live input gets DAMPING · multiplier · (H_jj + mean of the live H_jj), as in the official 3BASiL code
    (arXiv 2603.01376). The mean is over live inputs, so that scaling H by a constant scales the damping with it. A dead
    input (H_jj = 0) gets 1, which makes its H_jj 1.

    Args:
        gram: H [d, d], undamped.
        multiplier: Factor on the default damping.

    Returns:
        What to add to the diagonal [d], and the dead inputs [d] bool.
    """
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    live_mean = diagonal.sum() / (~dead).sum().clamp_min(1)
    added = DAMPING * multiplier * (diagonal + live_mean)
    return torch.where(dead, 1 - diagonal, added), dead


def damp_until_positive_definite(
    problem: LinearProblem, factorize: Callable[[Damping], _Factorized | None], warnings: list[str]
) -> _Factorized:
    """Return what `factorize` makes with the least damping for which the Gram matrix has a Cholesky factor.

    The damping starts at the default and is raised tenfold after each failure, on any of the problem's ranks. If it was
    raised, one warning is added.

    Args:
        problem: The linear, already validated.
        factorize: Factorizes the damped Gram matrix; returns None where it has no Cholesky factor.
        warnings: Sentences for the user.

    Raises:
        InputError: The Gram matrix has no factor even with the largest damping.
    """
    multiplier = 1.0
    while multiplier <= _DAMPING_LIMIT:
        added, dead = damping_diagonal(problem.gram, multiplier)
        scale = (problem.gram.diagonal() + added).sqrt()
        factorized = factorize(Damping(multiplier, added, dead, scale))
        failures = problem.ranks.sum(factorized is None)
        if factorized is not None and not failures:
            if multiplier > 1:
                warnings.append(damping_warning(problem.name, multiplier))
            return factorized
        multiplier *= 10
    raise InputError(
        f"{problem.name}: its Gram matrix is not positive semidefinite, even with {_DAMPING_LIMIT:g} times the "
        f"damping; was it summed over real inputs?"
    )


def damping_warning(name: str, multiplier: float) -> str:
    """Return what a user is told of a damping that was raised."""
    return f"{name}: the Gram matrix had no Cholesky factor; its damping was raised {multiplier:g} times"


def validate(problem: LinearProblem) -> tuple[int, list[str]]:
    """Return the rank to use, at most min(o, d), and the warnings so far; o counts the rows of all ranks.

    Raises:
        InputError: The problem has no solution: shapes that do not fit, a value that is NaN or infinite, a negative
            diagonal or rank; or a pattern that compares rows which lie on several ranks.
    """
    name, (o, d) = problem.name, problem.weight.shape
    if tuple(problem.gram.shape) != (d, d):
        shape = "×".join(map(str, problem.gram.shape))
        raise InputError(f"{name}: the weight is {o}×{d}, so its Gram matrix must be {d}×{d}, not {shape}")
    problem.pattern.require_fits(name, (o, d))
    for noun, tensor in (("weight", problem.weight), ("Gram matrix", problem.gram)):
        if not is_finite(tensor):
            raise InputError(
                f"{name}: {count_not_finite(tensor)} of {tensor.numel()} values of its {noun} are NaN or infinite; "
                f"check the checkpoint, and the calibration for overflow"
            )
    if bool((problem.gram.diagonal() < 0).any()):
        lowest = float(problem.gram.diagonal().min())
        raise InputError(f"{name}: its Gram matrix has {lowest:g} on the diagonal; sums of squares cannot be negative")
    if problem.rank < 0:
        raise InputError(f"{name}: rank {problem.rank} is negative; use 0 for no low-rank part")
    if problem.ranks.world > 1 and not problem.pattern.by_row:
        raise InputError(
            f"{name}: pattern {problem.pattern} compares weights of all rows, so {problem.ranks.world} ranks cannot "
            f"each solve some of them; solve the linear on one rank, or choose a pattern such as 50%/row"
        )
    o = sum(problem.ranks.gather(o))
    rank = min(problem.rank, o, d)
    if rank < problem.rank:
        return rank, [f"{name}: rank {problem.rank} is more than a {o}×{d} weight can have; used {rank}"]
    return rank, []


def obeys_already(problem: LinearProblem) -> bool:
    """Return True where the whole weight is in the pattern already, on all ranks."""
    return not problem.ranks.sum(problem.pattern.check(problem.weight != 0) is not None)


def keep_weight(problem: LinearProblem, rank: int, warnings: list[str]) -> SparseLowRank:
    """Return the solution for a weight that is in the pattern already, all zeros included: S = weight, U·V = 0."""
    o, d = problem.weight.shape
    U, V = problem.weight.new_zeros(o, rank), problem.weight.new_zeros(rank, d)
    return SparseLowRank(problem.weight.clone(), U, V, 0, 1.0, tuple(warnings))


def require_finite(problem: LinearProblem, S: Tensor, U: Tensor, V: Tensor) -> None:
    """Raise StreamslrError, naming the linear, when a value of the solution is NaN or infinite."""
    if is_finite(S) and is_finite(U) and is_finite(V):
        return
    count = sum(count_not_finite(part) for part in (S, U, V))
    largest, energy = float(problem.weight.abs().max()), float(problem.gram.diagonal().max())
    raise StreamslrError(
        f"{problem.name}: {count} values of S, U and V are NaN or infinite; its largest weight is {largest:.3g}, the "
        f"largest value of its Gram matrix {energy:.3g}. If these are too large for float32, check the checkpoint; "
        f"else try another --method, and report this as a bug"
    )


def relative_error(weight: Tensor, gram: Tensor, approximation: Tensor) -> float:
    """Return `RelativeError(weight, gram).of(approximation)`, for one approximation of a weight."""
    return RelativeError(weight, gram).of(approximation)


class RelativeError:
    """tr(R H Rᵀ) / tr(W H Wᵀ) of approximations of one weight, for R = W − approximation and the damped Gram matrix H.

    Dead inputs count in neither trace: nothing in their columns reaches an output. The error is 0 for a perfect
    approximation, also of an all-zero weight, and inf for an imperfect one of an all-zero weight. On a GPU its factors
    are rounded to TF32, and three digits are right (tools/results/solver.md, "Errors"). Where ranks have some rows
    each, all of them must ask for the same errors in the same order, and the traces are summed over them.
    """

    def __init__(self, weight: Tensor, gram: Tensor, ranks: Ranks = ALONE) -> None:
        """Compute the denominator.

        Args:
            weight: W [o, d] float32, or this rank's rows of it.
            gram: [d, d] float32, undamped.
            ranks: Ranks that have the rows.
        """
        self._weight, self._gram, self._ranks = weight, gram, ranks
        self._added, self._dead = damping_diagonal(gram)
        self._whole = ranks.sum(sum(self._energy(weight[rows].clone()) for rows in self._row_tiles()))

    def of(self, approximation: Tensor) -> float:
        """Return the error of an approximation [o, d], of the same rows."""
        return self._of(lambda rows: approximation[rows].float())

    def of_wanda(self, pattern: SparsityPattern) -> float:
        """Return the error of pruning by |W_ij|·‖X_j‖, ‖X_j‖ damped: the yardstick (Wanda, arXiv 2306.11695).

        A pattern that is not by row needs all rows on one rank.
        """
        weight = self._weight
        scale = (self._gram.diagonal() + self._added).sqrt()
        if pattern.by_row:
            return self._of(lambda rows: weight[rows] * pattern.project(weight[rows] * scale))
        mask = pattern.project(weight * scale)
        return self._of(lambda rows: weight[rows] * mask[rows])

    def _of(self, approximation: Callable[[slice], Tensor]) -> float:
        """Return the error of an approximation made in slices of rows; make no tensor of the weight's size here."""
        energies = (self._energy(self._weight[rows] - approximation(rows)) for rows in self._row_tiles())
        lost = self._ranks.sum(sum(energies))
        if lost == 0.0:
            return 0.0
        return lost / self._whole if self._whole > 0.0 else float("inf")

    def _row_tiles(self) -> list[slice]:
        return [slice(start, start + _TILE) for start in range(0, len(self._weight), _TILE)]

    def _energy(self, rows: Tensor) -> float:
        """Return tr(M H Mᵀ) for M = `rows` [t, d] without the dead columns; overwrites `rows`.

        H is symmetric, so for each slice of its columns what lies above the diagonal counts twice.
        """
        rows[:, self._dead] = 0
        # Small residuals sit where H is small, so the product cancels: float64 where it is not far slower.
        precise = torch.float64 if rows.device.type == "cpu" else torch.float32
        total = (rows.square().sum(0, dtype=torch.float64) * self._added).sum(dtype=torch.float64)
        wide, d = rows.to(precise), len(self._gram)
        step = min(_TILE, max(64, -(-d // 8)))
        with tf32_products() if rows.is_cuda else nullcontext():
            for first in range(0, d, step):
                columns, end = slice(first, first + step), min(first + step, d)
                upper = self._gram[:end, columns].to(precise, copy=True)
                upper[:first].mul_(2)
                total += ((wide[:, :end] @ upper) * wide[:, columns]).sum(dtype=torch.float64)
        return float(total)
