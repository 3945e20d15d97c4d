"""One linear: solve it, pack the result, put S + U·V as stored in its place, and measure how good it is."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from streamslr.config import format_bytes
from streamslr.errors import InputError, StreamslrError, first_line
from streamslr.io.low_rank import pack_low_rank
from streamslr.io.packing import merge, pack, pack_on_grid, row_chunks
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
from streamslr.solvers.rounding import nearest_on_grid, peak_bytes, solved_on_grid
from streamslr.spec.allocation import Allocation, LinearSpec
from streamslr.spec.pattern import Dense
from streamslr.spec.values import grid_of, low_rank_text, values_text
from streamslr.tensors import is_finite

_CHECK_MODEL = "check the model's weights, or download it again"

log = logging.getLogger("streamslr")


@dataclass
class LinearCompressor:
    """Solver of a run's linears, one at a time, in a workspace that shrinks for good when memory runs out."""

    solver: Solver
    allocation: Allocation
    seed: int
    workspace: int | None  # bytes that one solve may take; None: as many as it likes
    rounding: str = "solved"  # how S comes onto the grid of its values (`RunConfig.rounding`)
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
            name: solve_bytes(self.solver, self.allocation[name], linears[name], self.workspace) for name in linears
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
    ) -> tuple[Mapping[str, Tensor], LinearRecord]:
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
        spec = self.allocation[name]

        def work() -> tuple[Mapping[str, Tensor], LinearRecord]:
            W = weight()
            if ranks.world > 1:
                W = W[rows_of_ranks(len(W), ranks.world)[ranks.rank]].clone()  # and the other rows are freed
            problem = LinearProblem(name, W, gram, spec.pattern, spec.rank, self.seed, self.workspace, cache, ranks)
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
    shape = (linear.out_features, linear.in_features)
    values, low_rank = (spec.values, spec.low_rank_values) if spec else (None, None)
    grid = grid_of(values)
    number_dtype = values if isinstance(values, torch.dtype) else dtype
    parts = rows_of_ranks(shape[0], ranks.world)
    errors = RelativeError(weight, problem.gram, ranks)
    pruned = errors.of_wanda(pattern)
    extreme = f"{problem.name}: its weights or inputs are so large or small that"
    try:
        solution = _keep_weight(problem) if isinstance(pattern, Dense) else solver.solve(problem)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, but not in torch's stubs
        raise InputError(f"{extreme} the solver fails ({first_line(error)}); {_CHECK_MODEL}") from error
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
            chunks = row_chunks(*on_grid.codes.shape)
            kept = sum(int(on_grid.codes[rows].bfloat16().count_nonzero()) for rows in chunks)
            tensors = pack_on_grid(on_grid.codes, on_grid.scales, pattern, dtype, grid)
            del on_grid
    except ValueError as error:
        raise StreamslrError(
            f"{problem.name}: {type(solver).__name__} returned no valid solution: {error}; tell the method's author"
        ) from error
    rank = U.shape[1]
    if ranks.world > 1:  # before U is rounded: its columns' largest numbers may be another rank's
        U, V = _collect("U", U, parts, ranks), _collect("V", V, parts, ranks)
        tensors = {part: _collect(part, tensor, parts, ranks) for part, tensor in tensors.items()}
    tensors |= pack_low_rank(U, V, dtype, low_rank)
    if not all(is_finite(part) for part in tensors.values() if part.is_floating_point() and part.dtype.itemsize > 1):
        raise InputError(f"{problem.name}: its factors overflow {dtype}; give the model in bf16 or fp32")
    density = int(ranks.sum(kept)) / linear.weight.numel()
    iterations, damping, warnings = solution.iterations, solution.damping, solution.warnings
    del solution, U, V  # S is as large as the weight, and so is `merged`
    merged = merge(tensors, pattern, shape, linear.weight.dtype)
    lost = errors.of(merged[parts[ranks.rank]])
    if not (math.isfinite(lost) and math.isfinite(pruned)):
        raise InputError(f"{extreme} its error is {lost}; {_CHECK_MODEL}")
    for warning in warnings if ranks.rank == 0 else ():
        log.warning("%s", warning)
    record = LinearRecord(
        name=problem.name,
        shape=shape,
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
        nbytes=sum(t.nbytes for t in tensors.values()),
        dense_nbytes=linear.weight.numel() * dtype.itemsize,
        warnings=warnings,
    )
    linear.weight.copy_(merged)
    return tensors, record


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
