"""S on a grid: the solution of any method rounded to the nearest, or solved again on its support by ADMM."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from streamslr.solvers.base import LinearProblem, Solver, SparseLowRank, damping_diagonal
from streamslr.solvers.low_rank import balance_factors, orthonormal_rows
from streamslr.solvers.threebasil import ThreeBasil
from streamslr.solvers.threebasil_costs import solve_flops
from streamslr.solvers.threebasil_metric import Metric, Pace, StageInverses, build_metric
from streamslr.spec.allocation import LinearSpec
from streamslr.spec.pattern import Dense
from streamslr.spec.values import ValueFormat, group_count, in_groups, spread, sum_groups

# Pace of ADMM on a grid, its stages, and iterations of each (tools/results/rounding.md, "Pace").
_PACE, _STAGES, _ITERATIONS = Pace(1.0, 1.25), 15, 8
# Stages after which scales stay: codes settle only while their grid does.
_FITTED_STAGES = 10
# Steps of the last fit of U·V, and of the only one.
_CAREFUL_STEPS, _STEPS_FROM_RANDOM = 4, 16
# Factors tried on the scale that makes the largest value of a group the largest code, from the least on.
_FACTORS, _LEAST_FACTOR = 26, 0.5
# Elements of the tiles of rows: on a CPU as many as its caches hold, but no fewer rows than a product needs to be fast.
_TILE, _TILE_ON_GPU = 1 << 17, 1 << 24
_LEAST_ROWS = 128


@dataclass(frozen=True)
class OnGrid:
    """A solution whose S is codes times scales.

    Attributes:
        codes: [o, d] in a dtype that holds them, zero where S keeps nothing.
        scales: [o, groups] float32, each a number of the dtype that it is stored in.
        U: [o, r].
        V: [r, d].
        damping: Multiplier on the default damping of the Gram matrix.
        warnings: Sentences for the user about this linear, beside those of the solution that it was made from.
    """

    codes: Tensor
    scales: Tensor
    U: Tensor
    V: Tensor
    damping: float = 1.0
    warnings: tuple[str, ...] = ()


@torch.no_grad()
def nearest_on_grid(problem: LinearProblem, solution: SparseLowRank, values: ValueFormat, dtype: torch.dtype) -> OnGrid:
    """Return the solution with each value of S rounded to the nearest of its grid: rounding after the fact.

    The scale of a group is the one of some that changes its values least, weighted by the energy of their inputs. U·V
    stays, but where the solution left nothing to it (S = W: pattern dense, or W has the pattern already), it is fitted
    to what rounding changed; S is then overwritten.

    Args:
        problem: The linear.
        solution: Its solution.
        values: Format of the values of S.
        dtype: Dtype of the stored scales.
    """
    scales = _searched_scales(problem, solution, values, dtype)
    codes = _nearest_codes(solution.S, scales, values)
    U, V, damping, warnings = solution.U, solution.V, solution.damping, list[str]()
    if U.shape[1] and not _has_low_rank(problem, solution):
        for rows in _tiles(solution.S):
            solution.S[rows] = _numbers(codes, scales, rows)
        metric, counts = build_metric(problem, warnings), problem.ranks.gather(len(U))
        basis = orthonormal_rows(_random_basis(problem, U, counts), problem.ranks, counts)
        U, V = _fit(problem, solution.S, basis, metric, counts, _STEPS_FROM_RANDOM)
        damping = metric.damping
    return OnGrid(codes, scales, U, V, damping, _new_of(warnings, solution))


def _nearest_codes(S: Tensor, scales: Tensor, values: ValueFormat) -> Tensor:
    """Return the codes [o, d] that are nearest to S with these scales [o, groups]."""
    codes = torch.empty_like(S, dtype=values.code_dtype)
    for rows in _tiles(S):
        codes[rows] = values.nearest(S[rows] / spread(scales[rows], codes.shape[1])).to(codes.dtype)
    return codes


@torch.no_grad()
def solved_on_grid(problem: LinearProblem, solution: SparseLowRank, values: ValueFormat, dtype: torch.dtype) -> OnGrid:
    """Return S on the grid and U·V fitted to it, from a solution with float S: ADMM as in `ThreeBasil`, support fixed.

    The step of D is the nearest point of the grid on the support of the solution, so that S + Y says which way each
    value should be rounded, given all the others and U·V. At the end of each of the first stages a scale becomes the
    best for the codes of its group (least squares).

    Args:
        problem: The linear.
        solution: Its solution; S is overwritten.
        values: Format of the values of S.
        dtype: Dtype of the stored scales.
    """
    W, ranks = problem.weight, problem.ranks
    admm = ThreeBasil()
    warnings: list[str] = []
    metric = build_metric(problem, warnings)
    inverses = StageInverses(metric, _PACE, admm.product_dtype(W.device), admm.by_series(W.device), ranks=ranks)
    dense = isinstance(problem.pattern, Dense)
    support = torch.ones_like(W, dtype=torch.bool) if dense else solution.S != 0
    support[:, metric.dead] = False
    if not dense:
        solution.S[:, metric.dead] = 0
    scales = _searched_scales(problem, solution, values, dtype)
    solution.S[:, metric.dead] = 0  # in pattern dense until the end
    codes, (o, d) = _nearest_codes(solution.S, scales, values), W.shape
    counts = ranks.gather(o)
    first = solution.U.t() if _has_low_rank(problem, solution) else _random_basis(problem, solution.U, counts)
    basis = orthonormal_rows(first, ranks, counts)  # [r, o]
    held = solution.S  # D − Y, scaled as all is
    for rows in _tiles(W):
        torch.mul(_numbers(codes, scales, rows), metric.scale, out=held[rows])
    B = _best_factor(W, held, basis, metric, problem)
    for stage in range(_STAGES):
        M = inverses.at(stage, problem.name)
        for iteration in range(1, _ITERATIONS + 1):
            if len(basis):  # one subspace step towards the best fit of T = W − (D − Y)
                y = B - (B.to(M.dtype) @ M).float()
                basis = orthonormal_rows((y * metric.scale) @ W.t() - y @ held.t(), ranks, counts)
                B = _best_factor(W, held, basis, metric, problem)
            stage_ends = iteration == _ITERATIONS
            for rows in _tiles(W):
                D = _numbers(codes, scales, rows).mul_(metric.scale)
                X = torch.mul(W[rows], metric.scale).sub_(held[rows]).addmm_(basis[:, rows].t(), B, alpha=-1)
                Z = D.add_(X).sub_((X.to(M.dtype) @ M).float())  # S + Y
                del X
                if stage_ends and stage < _FITTED_STAGES:
                    scales[rows] = _fitted_scales(Z, codes[rows], scales[rows], metric, dtype)
                grid = spread(scales[rows], d) * metric.scale
                new = values.nearest(Z / grid).mul_(support[rows])
                codes[rows] = new.to(codes.dtype)
                D = new.mul_(grid)
                Y = Z.sub_(D).mul_(1 / _PACE.growth if stage_ends else 1.0)
                torch.sub(D, Y, out=held[rows])
    inverses.end_solve()
    del M, inverses
    for rows in _tiles(W):
        held[rows] = _numbers(codes, scales, rows)
    U, V = _fit(problem, held, basis, metric, counts, _CAREFUL_STEPS)
    if dense and bool(metric.dead.any()):  # nothing was learned of these columns of W
        for rows in _tiles(W):
            nearest = values.nearest(W[rows] / spread(scales[rows], d))
            codes[rows] = torch.where(metric.dead, nearest, codes[rows].to(nearest.dtype)).to(codes.dtype)
    return OnGrid(codes, scales, U, V, metric.damping, _new_of(warnings, solution))


def peak_bytes(solver: Solver, spec: LinearSpec, o: int, d: int, workspace: int | None, gpu: bool) -> int:
    """Return the most bytes that a solve takes (`Solver.peak_bytes`), coming onto a grid included."""
    if isinstance(spec.pattern, Dense):  # S begins as the weight
        solve = 4 * (o * d + (o + d) * min(spec.rank, o, d))
    else:
        solve = solver.peak_bytes(o, d, spec.rank, workspace, pattern=spec.pattern, gpu=gpu)
    return max(solve, rounding_bytes(spec, o, d, gpu))


def rounding_bytes(spec: LinearSpec, o: int, d: int, gpu: bool) -> int:
    """Return the most bytes that coming onto a grid takes beside the weight and its Gram matrix; 0 without one."""
    if spec.grid is None:
        return 0
    tile = 4 * 7 * d * min(o, _tile_rows(d, gpu))
    factors = 4 * 8 * (o + d) * max(1, min(spec.rank, o, d))
    state = 4 * o * d + (1 + spec.grid.code_dtype.itemsize) * o * d
    unrounded = 8 * o * d  # S beside S + U·V, whose error is recorded
    return max(unrounded + factors, state + tile + factors + 4 * d * d * (3 if gpu else 1))


def flops(o: int, d: int, rank: int, *, gpu: bool = False, ranks: int = 1) -> float:
    """Return the floating point operations of coming onto a grid, of each of `ranks` ranks; as of `Solver.flops`."""
    grown = _STAGES - 1 if ThreeBasil().by_series(torch.device("cuda" if gpu else "cpu")) else 0
    factored = _STAGES + 1 - grown  # with that of the metric
    return float(solve_flops(o, d, rank, _STAGES * _ITERATIONS, factored, grown, gpu=gpu, ranks=ranks))


def _tiles(W: Tensor) -> list[slice]:
    """Return slices of the rows of a matrix [o, d]."""
    step = _tile_rows(W.shape[1], W.is_cuda)
    return [slice(first, min(first + step, len(W))) for first in range(0, len(W), step)]


def _tile_rows(d: int, gpu: bool) -> int:
    """Return the rows of a tile of d columns."""
    return max(_LEAST_ROWS, (_TILE_ON_GPU if gpu else _TILE) // d)


def _numbers(codes: Tensor, scales: Tensor, rows: slice) -> Tensor:
    """Return codes times scales of these rows, float32."""
    return codes[rows].float().mul_(spread(scales[rows], codes.shape[1]))


def _new_of(warnings: list[str], solution: SparseLowRank) -> tuple[str, ...]:
    """Return the warnings that the solution does not have yet."""
    return tuple(warning for warning in warnings if warning not in solution.warnings)


def _has_low_rank(problem: LinearProblem, solution: SparseLowRank) -> bool:
    """Return False where the solution leaves nothing to U·V, on all ranks."""
    return bool(problem.ranks.sum(bool(solution.U.any())))


def _random_basis(problem: LinearProblem, U: Tensor, counts: list[int]) -> Tensor:
    """Return random columns for U as rows [r, o], this rank's part of those of all ranks."""
    generator = torch.Generator().manual_seed(problem.seed)
    drawn = torch.randn(sum(counts), U.shape[1], generator=generator)
    first = sum(counts[: problem.ranks.rank])
    return drawn[first : first + len(U)].to(U).t()


def _best_factor(W: Tensor, held: Tensor, basis: Tensor, metric: Metric, problem: LinearProblem) -> Tensor:
    """Return B [r, d], the best for T − basisᵀ B, T = W − held in the scale of the metric."""
    return problem.ranks.sum_((basis @ W).mul_(metric.scale) - basis @ held)


def _fit(
    problem: LinearProblem, S: Tensor, basis: Tensor, metric: Metric, counts: list[int], steps: int
) -> tuple[Tensor, Tensor]:
    """Return the best U [o, r] and V [r, d] for W − S, by subspace steps from a basis [r, o]."""
    W, ranks = problem.weight, problem.ranks
    for _ in range(steps if len(basis) else 0):
        y = ranks.sum_((basis @ W - basis @ S).mul_(metric.scale))
        y = metric.times(y).mul_(metric.scale)
        basis = orthonormal_rows(y @ W.t() - y @ S.t(), ranks, counts)
    V = ranks.sum_(basis @ W - basis @ S)
    V[:, metric.dead] = 0
    return balance_factors(basis.t(), V, ranks)


def _searched_scales(
    problem: LinearProblem, solution: SparseLowRank, values: ValueFormat, dtype: torch.dtype
) -> Tensor:
    """Return for each group of S the scale of the least error, weighted by the energy of its columns, [o, groups]."""
    S, (added, _) = solution.S, damping_diagonal(problem.gram, solution.damping)
    energy = problem.gram.diagonal() + added
    o, d = S.shape
    groups = group_count(d, values.group)
    scales = S.new_empty(o, groups)
    weights = in_groups(energy[None], groups)
    for rows in _tiles(S):
        parts = in_groups(S[rows], groups)  # [t, groups, columns of a group]
        whole = parts.abs().amax(2) / values.largest
        whole[whole == 0] = 1.0  # of an ordinary size: in a minute scale a group of zeros would saturate
        least, best = torch.full_like(whole, math.inf), _as_stored(whole, dtype)
        for factor in torch.linspace(_LEAST_FACTOR, 1.0, _FACTORS).tolist():
            scale = _as_stored(whole * factor, dtype)
            changed = values.nearest(parts / scale[:, :, None]).mul_(scale[:, :, None]).sub_(parts)
            error = changed.square_().mul_(weights).sum(2)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        scales[rows] = best
    return scales


def _fitted_scales(Z: Tensor, codes: Tensor, scales: Tensor, metric: Metric, dtype: torch.dtype) -> Tensor:
    """Return the scales [t, groups] with which these codes [t, d] come nearest to Z [t, d] in the scale of the metric.

    A group without codes, or whose best scale is not positive, keeps its scale.
    """
    groups, grid = scales.shape[1], codes.float() * metric.scale
    best = sum_groups(grid * Z, groups) / sum_groups(grid.square(), groups)
    return torch.where(best > 0, _as_stored(best, dtype), scales)  # NaN is not


def _as_stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales rounded to their stored dtype, none of them zero."""
    form, compute = torch.finfo(dtype), torch.finfo(torch.float32)
    least = max(form.tiny * form.eps, compute.tiny)  # float16 has subnormals that float32 holds as normal numbers
    return scales.to(dtype).to(scales.dtype).clamp_min(least)
