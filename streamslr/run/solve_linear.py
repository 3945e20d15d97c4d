"""One linear: solve it, pack the result, put S + U·V as stored in its place, and measure how good it is."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from streamslr.config import format_bytes
from streamslr.errors import InputError, StreamslrError, first_line
from streamslr.io.low_rank import pack_low_rank, unpack_low_rank
from streamslr.io.packing import merge, pack, pack_on_grid, row_chunks, unpack
from streamslr.memory import note_nothing, retry_on_oom
from streamslr.ranks import ALONE, Ranks
from streamslr.run.dealing import rows_of_ranks
from streamslr.run.journal import LinearRecord
from streamslr.solvers.base import (
    GramCache,
    LinearProblem,
    RelativeError,
    Solver,
    SparseLowRank,
    keep_weight,
    validate,
)
from streamslr.solvers.rounding import OnGrid, nearest_on_grid, peak_bytes, solved_on_grid
from streamslr.spec.allocation import Allocation, LinearSpec
from streamslr.spec.pattern import Dense, SparsityPattern
from streamslr.spec.values import grid_of, low_rank_text, values_text
from streamslr.tensors import is_finite

_CHECK_MODEL = "check the model's weights, or download it again"

log = logging.getLogger("streamslr")


Solved = tuple[Mapping[str, Tensor], LinearRecord]
"""A packed linear and its record."""


@dataclass
class LinearCompressor:
    """Solver of a run's linears, one at a time, in a workspace that shrinks for good when memory runs out."""

    solver: Solver
    allocation: Allocation
    seed: int
    workspace: int | None  # bytes that one solve may take; None: as many as it likes
    rounding: str = "solved"  # how S comes onto the grid of its values (`RunConfig.rounding`)
    rounds_late: bool = False  # leave S off its grid in `compress`, for `round` once the block is matched
    note: Callable[[str, str], None] = note_nothing  # of a retry: phase, and what it does without

    def gram_cache(self, linears: Mapping[str, nn.Linear], sharing: Sequence[str]) -> GramCache:
        """Return a cache for linears that share a Gram matrix.

        It may hold what their solves take less than the largest solve of the block, so no block takes more memory.

        Args:
            linears: All linears of the block.
            sharing: Names of those that share the Gram matrix.
        """
        if len(sharing) < 2:
            return GramCache()
        peaks = {
            name: solve_bytes(self.solver, self._solved_spec(name), linears[name], self.workspace) for name in linears
        }
        return GramCache(max(peaks.values()) - max(peaks[name] for name in sharing))

    def compress(
        self,
        name: str,
        linear: nn.Linear,
        weight: Callable[[], Tensor],
        gram: Tensor,
        dtype: torch.dtype,
        cache: GramCache | None = None,
        ranks: Ranks = ALONE,
    ) -> Solved:
        """Replace the weight of `linear` as `compress_linear` does; once more in less memory where it runs out.

        Several ranks solve it by rows, and each gets the whole of it. Memory that runs out on one then ends all: it
        cannot begin anew while the others wait in the midst of an exchange.

        Args:
            name: Name of the linear in the allocation.
            linear: The live linear.
            weight: Returns the weight to solve for, [o, d] float32 on the linear's device.
            gram: Gram matrix of its inputs, [d, d] float32, on the linear's device.
            dtype: Dtype to store values and factors in.
            cache: What earlier linears with this Gram matrix left; emptied where memory runs out.
            ranks: Ranks that solve it together; each passes the same linear, weight and Gram matrix.
        """
        spec = self._solved_spec(name)

        def work() -> Solved:
            W = weight()
            if ranks.world > 1:
                W = W[rows_of_ranks(len(W), ranks.world)[ranks.rank]].clone()  # and the other rows are freed
            problem = self._problem(name, W, gram, cache, ranks)
            return compress_linear(problem, linear, self.solver, dtype, spec, self.rounding)

        if ranks.world > 1:
            return work()

        def shrink() -> str | None:
            smaller = smaller_workspace(self.solver, spec, linear, self.workspace)
            if smaller is None:
                return None
            self.workspace = smaller
            if cache is not None:
                cache.keep_bytes, cache.kept = 0, None
            return f"a solver workspace of {format_bytes(smaller)}, from {name} on"

        return retry_on_oom(work, shrink, phase="solve", device=linear.weight.device, note=self.note)

    def round(
        self, name: str, linear: nn.Linear, gram: Tensor, dtype: torch.dtype, matched: Solved, ranks: Ranks = ALONE
    ) -> Solved:
        """Bring S of a matched linear onto its grid as `round_linear` does; there is no doing so in less memory.

        Args:
            name: Name of the linear in the allocation.
            linear: The live linear, with S + U·V as matched.
            gram: Gram matrix of the inputs that the matched block gives it, [d, d] float32 on the linear's device.
            dtype: Dtype to store factors and scales in.
            matched: The packed linear as matched, and its record as solved.
            ranks: Ranks that round it together; each passes the same.

        Returns:
            The packed linear on the device of the live one, and its record; as matched where its values have no grid.
        """
        spec, (packed, record) = self.allocation[name], matched
        packed = {part: tensor.to(linear.weight.device) for part, tensor in packed.items()}
        if spec.grid is None:
            return packed, record
        return round_linear(
            lambda weight: self._problem(name, weight, gram, None, ranks), (packed, record), linear, dtype, spec, ranks
        )

    def _solved_spec(self, name: str) -> LinearSpec:
        """Return the spec that `compress` solves a linear for."""
        return self.allocation[name].off_grid if self.rounds_late else self.allocation[name]

    def _problem(self, name: str, weight: Tensor, gram: Tensor, cache: GramCache | None, ranks: Ranks) -> LinearProblem:
        spec = self.allocation[name]
        return LinearProblem(name, weight, gram, spec.pattern, spec.rank, self.seed, self.workspace, cache, ranks)


def smaller_workspace(solver: Solver, spec: LinearSpec, linear: nn.Linear, workspace: int | None) -> int | None:
    """Return a smaller workspace: what a solve takes if given half of what it takes now; None if it takes no less."""
    now = solve_bytes(solver, spec, linear, workspace)
    less = solve_bytes(solver, spec, linear, now // 2)
    return less if less < now else None


def solve_bytes(solver: Solver, spec: LinearSpec, linear: nn.Linear, workspace: int | None) -> int:
    """Return the most bytes that the solve of a live linear takes in a workspace."""
    gpu = linear.weight.device.type == "cuda"
    return peak_bytes(solver, spec, linear.out_features, linear.in_features, workspace, gpu)


@torch.no_grad()
def compress_linear(
    problem: LinearProblem,
    linear: nn.Linear,
    solver: Solver,
    dtype: torch.dtype,
    spec: LinearSpec | None = None,
    rounding: str = "solved",
) -> tuple[Mapping[str, Tensor], LinearRecord]:
    """Solve `problem` and put the solution, as it is stored, into the weight of `linear`.

    Args:
        problem: The linear as the solver takes it; on each of several ranks, the rows that `rows_of_ranks` gives it.
        linear: The live linear, its weight [o, d] on the problem's device.
        solver: The method.
        dtype: Dtype of numbers that the spec leaves as the checkpoint stores them, and of scales.
        spec: Spec with the values of S, U and V; None to store them as they are.
        rounding: How S comes onto the grid of the format, "solved" or "nearest".

    Returns:
        The packed linear, and its record; the same on all of the problem's ranks, of all rows. Errors in the record
        are those of what is stored, rounding included.

    Raises:
        InputError: A factor overflows `dtype`, or the weights or inputs are beyond what can be solved.
        StreamslrError: The solver returned no valid solution.
    """
    weight, pattern, ranks = problem.weight, problem.pattern, problem.ranks  # this rank's rows of [o, d]
    values, low_rank = (spec.values, spec.low_rank_values) if spec else (None, None)
    grid = grid_of(values)
    number_dtype = values if isinstance(values, torch.dtype) else dtype
    errors = RelativeError(weight, problem.gram, ranks)
    pruned = errors.of_wanda(pattern)
    try:
        solution = _keep_weight(problem) if isinstance(pattern, Dense) else solver.solve(problem)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, but not in torch's stubs
        raise InputError(f"{_extreme(problem)} the solver fails ({first_line(error)}); {_CHECK_MODEL}") from error
    try:
        _require_shapes(problem, solution)
        unrounded = None
        if grid is None:
            tensors, (U, V) = pack(solution.S, pattern, number_dtype), (solution.U, solution.V)
            kept = int(solution.S.count_nonzero())
        else:
            unrounded = errors.of(solution.dense())
            round_onto = {"solved": solved_on_grid, "nearest": nearest_on_grid}[rounding]
            on_grid = round_onto(problem, solution, grid, dtype)
            solution = replace(  # codes take the place of S
                solution,
                S=solution.S[:0].clone(),
                damping=max(solution.damping, on_grid.damping),
                warnings=(*solution.warnings, *on_grid.warnings),
            )
            U, V = on_grid.U, on_grid.V
            kept, tensors = _count_codes(on_grid), pack_on_grid(on_grid.codes, on_grid.scales, pattern, dtype, grid)
            del on_grid
    except ValueError as error:
        raise StreamslrError(
            f"{problem.name}: {type(solver).__name__} returned no valid solution: {error}; tell the method's author"
        ) from error
    rank, iterations, damping, warnings = U.shape[1], solution.iterations, solution.damping, solution.warnings
    stored = _stored(problem, linear, tensors, U, V, dtype, low_rank)
    density = int(ranks.sum(kept)) / linear.weight.numel()
    del solution, U, V, tensors  # S is as large as the weight, and so is what is merged
    lost = _put_into(linear, problem, stored, errors)
    if not (math.isfinite(lost) and math.isfinite(pruned)):
        raise InputError(f"{_extreme(problem)} its error is {lost}; {_CHECK_MODEL}")
    for warning in warnings if ranks.rank == 0 else ():
        log.warning("%s", warning)
    return stored, LinearRecord(
        name=problem.name,
        shape=(linear.out_features, linear.in_features),
        pattern=str(pattern),
        values=values_text(values),
        low_rank_values=low_rank_text(low_rank if rank else None),
        unrounded_error=unrounded,
        density=density,
        rank=rank,
        wanda_error=pruned,
        error=lost,
        iterations=iterations,
        damping=damping,
        nbytes=sum(t.nbytes for t in stored.values()),
        dense_nbytes=linear.weight.numel() * dtype.itemsize,
        warnings=warnings,
    )


@torch.no_grad()
def round_linear(
    problem_of: Callable[[Tensor], LinearProblem],
    matched: Solved,
    linear: nn.Linear,
    dtype: torch.dtype,
    spec: LinearSpec,
    ranks: Ranks,
) -> Solved:
    """Bring S of a matched linear onto its grid, fit U·V to it, and put what is stored into the weight of `linear`.

    The support of S stays. Numbers are matched more smoothly than codes are, so that the block ends nearer to its
    targets than where codes alone are matched (tools/results/matching.md, "Values on a grid").

    Args:
        problem_of: Returns the problem of the weight S + U·V as matched, with the Gram matrix of the inputs that the
            matched block gives the linear; on each of several ranks, of the rows that `rows_of_ranks` gives it.
        matched: The packed linear as matched, of all rows, and its record as solved.
        linear: The live linear, its weight [o, d] on the problem's device.
        dtype: Dtype of scales, and of U and V where the spec leaves them as the checkpoint stores them.
        spec: Spec with the values of S, U and V.
        ranks: Ranks that round it together.

    Returns:
        As `compress_linear`. The record keeps the error of the solve, and gets that of the rounding beside it.

    Raises:
        InputError: A factor overflows `dtype`, or the weights or inputs are beyond what can be solved.
    """
    (packed, record), grid, pattern = matched, spec.grid, spec.pattern
    assert grid is not None
    solution = _unpacked(packed, pattern, linear, ranks)
    problem = problem_of(solution.dense())
    errors = RelativeError(problem.weight, problem.gram, ranks)
    try:
        on_grid = solved_on_grid(problem, solution, grid, dtype)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, but not in torch's stubs
        raise InputError(f"{_extreme(problem)} the solver fails ({first_line(error)}); {_CHECK_MODEL}") from error
    del solution  # S is as large as the weight
    kept, tensors = _count_codes(on_grid), pack_on_grid(on_grid.codes, on_grid.scales, pattern, dtype, grid)
    stored = _stored(problem, linear, tensors, on_grid.U, on_grid.V, dtype, spec.low_rank_values)
    damping, warnings, rank = on_grid.damping, on_grid.warnings, on_grid.U.shape[1]
    del on_grid, tensors
    lost = _put_into(linear, problem, stored, errors)
    if not math.isfinite(lost):
        raise InputError(f"{_extreme(problem)} its error is {lost}; {_CHECK_MODEL}")
    new_warnings = [warning for warning in warnings if warning not in record.warnings]
    for warning in new_warnings if ranks.rank == 0 else ():
        log.warning("%s", warning)
    return stored, replace(
        record,
        values=values_text(grid),
        low_rank_values=low_rank_text(spec.low_rank_values if rank else None),
        rounding_error=lost,
        density=int(ranks.sum(kept)) / linear.weight.numel(),
        damping=max(record.damping, damping),
        nbytes=sum(t.nbytes for t in stored.values()),
        warnings=(*record.warnings, *new_warnings),
    )


def _unpacked(packed: Mapping[str, Tensor], pattern: SparsityPattern, linear: nn.Linear, ranks: Ranks) -> SparseLowRank:
    """Return S, U and V of a packed linear on the device of the live one, float32; S and U of this rank's rows."""
    o, d = linear.out_features, linear.in_features
    rows, device = rows_of_ranks(o, ranks.world)[ranks.rank], linear.weight.device
    U, V = unpack_low_rank(packed) or (torch.zeros(o, 0, device=device), torch.zeros(0, d, device=device))
    S = unpack(packed, pattern, (o, d))[rows].float()
    return SparseLowRank(S, U[rows].float(), V.float(), iterations=0)


def _extreme(problem: LinearProblem) -> str:
    return f"{problem.name}: its weights or inputs are so large or small that"


def _count_codes(on_grid: OnGrid) -> int:
    """Return the codes that are not zero."""
    chunks = row_chunks(*on_grid.codes.shape)
    return sum(int(on_grid.codes[rows].bfloat16().count_nonzero()) for rows in chunks)


def _stored(
    problem: LinearProblem,
    linear: nn.Linear,
    tensors: Mapping[str, Tensor],
    U: Tensor,
    V: Tensor,
    dtype: torch.dtype,
    low_rank: torch.dtype | None,
) -> dict[str, Tensor]:
    """Return the packed linear of all ranks' rows.

    Args:
        problem: The linear.
        linear: The live linear.
        tensors: S of this rank's rows, packed.
        U: U of these rows.
        V: The whole of V.
        dtype: Dtype of U and V where `low_rank` is None.
        low_rank: Dtype that they are stored in.
    """
    ranks = problem.ranks
    if ranks.world > 1:  # before U is rounded: its columns' largest numbers may be another rank's
        rows = rows_of_ranks(linear.out_features, ranks.world)
        U, V = _collect("U", U, rows, ranks), _collect("V", V, rows, ranks)
        tensors = {part: _collect(part, tensor, rows, ranks) for part, tensor in tensors.items()}
    stored = {**tensors, **pack_low_rank(U, V, dtype, low_rank)}
    if not all(is_finite(part) for part in stored.values() if part.is_floating_point() and part.dtype.itemsize > 1):
        raise InputError(f"{problem.name}: its factors overflow {dtype}; give the model in bf16 or fp32")
    return stored


def _put_into(linear: nn.Linear, problem: LinearProblem, stored: Mapping[str, Tensor], errors: RelativeError) -> float:
    """Put S + U·V as it is stored into the weight of a live linear; return its error."""
    shape = (linear.out_features, linear.in_features)
    merged = merge(stored, problem.pattern, shape, linear.weight.dtype)
    lost = errors.of(merged[rows_of_ranks(shape[0], problem.ranks.world)[problem.ranks.rank]])
    linear.weight.copy_(merged)
    return lost


def _collect(part: str, tensor: Tensor, rows: Sequence[slice], ranks: Ranks) -> Tensor:
    """Return a part of the packed linear: what packing all rows at once gives.

    The rows of a by_row pattern are packed apart, each in whole bytes, so those of the ranks are laid one below the
    other; V is rank 0's.

    Args:
        part: Name of the part.
        tensor: The part of this rank's rows.
        rows: Rows of each rank.
        ranks: Ranks that have the rows.
    """
    if part == "V":
        ranks.broadcast_(whole := tensor.contiguous(), 0)
        return whole
    whole = tensor.new_empty(rows[-1].stop, *tensor.shape[1:])
    whole[rows[ranks.rank]] = tensor
    for source, own in enumerate(rows):
        ranks.broadcast_(whole[own], source)
    return whole


def _keep_weight(problem: LinearProblem) -> SparseLowRank:
    """Return S = W and U·V = 0, what every method has to begin with where the pattern keeps every weight."""
    rank, warnings = validate(problem)
    return keep_weight(problem, rank, warnings)


def _require_shapes(problem: LinearProblem, solution: SparseLowRank) -> None:
    """Raise ValueError where S, U, V are not of the shapes [o, d], [o, r], [r, d] of the problem's rank r or less."""
    (o, d), shapes = problem.weight.shape, [tuple(part.shape) for part in (solution.S, solution.U, solution.V)]
    r = shapes[1][-1]
    if shapes != [(o, d), (o, r), (r, d)] or r > problem.rank:
        S, U, V = map(list, shapes)
        raise ValueError(f"S {S}, U {U}, V {V} for a {o}×{d} weight at rank {problem.rank}")
