"""The seam between a linear and a method: the problem, its solution, and how good a solution is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.spec.pattern import SparsityPattern
from streamslr.tensors import count_not_finite, is_finite

# The official 3BASiL defaults (arXiv 2603.01376): a share of each input's own energy, and of the mean one.
DAMPING = 0.005
# Rows and columns of what errors are computed on at once.
_TILE = 1024


@dataclass(frozen=True)
class LinearProblem:
    """Replace `weight` by S + U·V so that outputs on inputs with Gram matrix `gram` change least.

    name: the linear, for messages. weight: [o, d] float32. gram: [d, d] float32, Xᵀ X over all calibration
    rows, undamped. rank: columns of U; 0 for pure sparsity. seed: of the solver's random start. workspace: bytes the
    solver may take beside weight and gram, where it can do with less; None: as many as it likes.
    """

    name: str
    weight: Tensor
    gram: Tensor
    pattern: SparsityPattern
    rank: int
    seed: int = 0
    workspace: int | None = None


@dataclass(frozen=True)
class SparseLowRank:
    """weight ≈ S + U·V: S [o, d] with exact zeros off the pattern's support, U [o, r], V [r, d], all float32.

    damping: the multiplier that was finally used on the damping; above 1 a factorization had failed.
    warnings: what the user should know about this linear, a sentence each.
    """

    S: Tensor
    U: Tensor
    V: Tensor
    iterations: int
    damping: float = 1.0
    warnings: tuple[str, ...] = ()

    def dense(self) -> Tensor:
        """S + U·V, [o, d]."""
        return torch.addmm(self.S, self.U, self.V)


@runtime_checkable
class Solver(Protocol):
    """A method: tensors in, tensors out, on the device of the problem's tensors, which stay as they are."""

    def solve(self, problem: LinearProblem) -> SparseLowRank:
        """Raises InputError, naming the linear, when the problem cannot be solved."""
        ...

    def peak_bytes(
        self, o: int, d: int, rank: int, workspace: int | None = None, *, by_row: bool = False, gpu: bool = False
    ) -> int:
        """The most that one solve of a weight [o, d] takes beside its weight and Gram matrix, its S included.

        workspace: what it should do with if it can (LinearProblem.workspace). by_row, of the pattern; gpu: where it runs.
        """
        ...

    def flops(self, o: int, d: int, rank: int) -> float:
        """Floating point operations of a typical solve, for the plan."""
        ...


def damping_diagonal(gram: Tensor, multiplier: float = 1.0) -> tuple[Tensor, Tensor]:
    """What to add to the diagonal of `gram` [d, d] before anything is solved in it, and the dead inputs.

    Returns ([d], bool [d]). Live inputs get DAMPING·(H_jj + mean of the live H_jj)·multiplier, dead ones
    (H_jj = 0: always zero) what makes their H_jj 1. The mean is over live inputs, so that scaling H by a
    constant scales the damping with it.
    """
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    live_mean = diagonal.sum() / (~dead).sum().clamp_min(1)
    added = DAMPING * multiplier * (diagonal + live_mean)
    return torch.where(dead, 1 - diagonal, added), dead


def validate(problem: LinearProblem) -> tuple[int, list[str]]:
    """The rank to use, at most min(o, d), and the warnings so far. Raises InputError for a problem without solution."""
    name, (o, d) = problem.name, problem.weight.shape
    if tuple(problem.gram.shape) != (d, d):
        shape = "×".join(map(str, problem.gram.shape))
        raise InputError(f"{name}: the weight is {o}×{d}, so its Gram matrix must be {d}×{d}, not {shape}")
    problem.pattern.require_fits(name, (o, d))
    for what, tensor in (("weight", problem.weight), ("Gram matrix", problem.gram)):
        if not is_finite(tensor):
            raise InputError(
                f"{name}: {count_not_finite(tensor)} of {tensor.numel()} values of its {what} are NaN or infinite; check the "
                f"checkpoint, and the calibration for overflow"
            )
    if bool((problem.gram.diagonal() < 0).any()):
        lowest = float(problem.gram.diagonal().min())
        raise InputError(f"{name}: its Gram matrix has {lowest:g} on the diagonal; sums of squares cannot be negative")
    if problem.rank < 0:
        raise InputError(f"{name}: rank {problem.rank} is negative; use 0 for no low-rank part")
    rank = min(problem.rank, o, d)
    if rank < problem.rank:
        return rank, [f"{name}: rank {problem.rank} is more than a {o}×{d} weight can have; used {rank}"]
    return rank, []


def keep_weight(problem: LinearProblem, rank: int, warnings: list[str]) -> SparseLowRank:
    """The solution for a weight that is in the pattern already, all zeros included: itself."""
    o, d = problem.weight.shape
    U, V = problem.weight.new_zeros(o, rank), problem.weight.new_zeros(rank, d)
    return SparseLowRank(problem.weight.clone(), U, V, 0, 1.0, tuple(warnings))


def relative_error(weight: Tensor, gram: Tensor, approximation: Tensor) -> float:
    """tr(R H Rᵀ) / tr(W H Wᵀ) for R = weight − approximation, all [o, d], and H the damped `gram` [d, d].

    Dead inputs count in neither: nothing that happens in their columns reaches an output. 0 for a perfect
    approximation, also of an all-zero weight; inf for an imperfect one of an all-zero weight.
    """
    return _relative(weight, gram, lambda rows: approximation[rows].float())


def pruning_error(problem: LinearProblem) -> float:
    """The relative error of plain pruning by |W_ij|·‖X_j‖ (Wanda, arXiv 2306.11695): what solving must beat."""
    added, _ = damping_diagonal(problem.gram)
    scale = (problem.gram.diagonal() + added).sqrt()
    weight, pattern = problem.weight, problem.pattern
    if pattern.by_row:
        return _relative(weight, problem.gram, lambda rows: weight[rows] * pattern.project(weight[rows] * scale))
    kept = pattern.project(weight * scale)
    return _relative(weight, problem.gram, lambda rows: weight[rows] * kept[rows])


def _relative(weight: Tensor, gram: Tensor, approximation: Callable[[slice], Tensor]) -> float:
    """relative_error of what `approximation` gives for slices of rows: nothing as large as the weight is made."""
    added, dead = damping_diagonal(gram)
    numerator = denominator = 0.0
    for start in range(0, len(weight), _TILE):
        rows = slice(start, start + _TILE)
        numerator += _energy(weight[rows] - approximation(rows), gram, added, dead)
        denominator += _energy(weight[rows].clone(), gram, added, dead)
    if numerator == 0.0:
        return 0.0
    return numerator / denominator if denominator > 0.0 else float("inf")


def _energy(rows: Tensor, gram: Tensor, added: Tensor, dead: Tensor) -> float:
    """tr(M (gram + diag(added)) Mᵀ) for M = `rows` [t, d] without the dead columns; overwrites `rows`."""
    rows[:, dead] = 0
    # Small residuals sit where H is small, so the product cancels: float64 where it is not far slower.
    precise = torch.float64 if rows.device.type == "cpu" else torch.float32
    total = (rows.square().sum(0, dtype=torch.float64) * added).sum(dtype=torch.float64)
    wide = rows.to(precise)
    for column in range(0, gram.shape[1], _TILE):
        columns = slice(column, column + _TILE)
        total += ((wide @ gram[:, columns].to(precise)) * wide[:, columns]).sum(dtype=torch.float64)
    return float(total)
