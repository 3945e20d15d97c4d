"""One linear: solve it, pack the result, put S + U·V as stored in its place, and say how good it is."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from streamslr.errors import InputError, StreamslrError
from streamslr.io.packing import merge, pack
from streamslr.run.journal import LinearRecord
from streamslr.solvers.base import LinearProblem, Solver, SparseLowRank, pruning_error, relative_error

log = logging.getLogger("streamslr")


@torch.no_grad()
def compress_linear(
    problem: LinearProblem, linear: nn.Linear, solver: Solver, dtype: torch.dtype
) -> tuple[Mapping[str, Tensor], LinearRecord]:
    """What to store of the linear, values and factors in `dtype`, and its record; its weight is replaced.

    Errors are those of what is stored, rounding included. Raises InputError when a factor overflows `dtype`,
    StreamslrError when the solver returns what is no solution.
    """
    weight, pattern = problem.weight, problem.pattern  # [o, d]
    shape = (weight.shape[0], weight.shape[1])
    pruned = pruning_error(problem)
    solution = solver.solve(problem)
    try:
        _require_shapes(problem, solution)
        tensors = pack(solution.S, pattern, dtype)
    except ValueError as error:
        raise StreamslrError(
            f"{problem.name}: {type(solver).__name__} returned what is no solution: {error}; tell the method's author"
        ) from error
    if rank := solution.U.shape[1]:
        tensors |= {"U": solution.U.to(dtype), "V": solution.V.to(dtype)}
    if not all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point()):
        raise InputError(f"{problem.name}: its factors overflow {dtype}; give the model in bf16 or fp32")
    density = int(solution.S.count_nonzero()) / weight.numel()
    iterations, damping, warnings = solution.iterations, solution.damping, solution.warnings
    del solution  # S is as large as the weight, and so is what comes now
    merged = merge(tensors, pattern, shape, linear.weight.dtype)
    for warning in warnings:
        log.warning("%s", warning)
    record = LinearRecord(
        name=problem.name,
        shape=shape,
        pattern=str(pattern),
        density=density,
        rank=rank,
        wanda_error=pruned,
        error=relative_error(weight, problem.gram, merged),
        iterations=iterations,
        damping=damping,
        nbytes=sum(t.nbytes for t in tensors.values()),
        dense_nbytes=weight.numel() * dtype.itemsize,
        warnings=warnings,
    )
    linear.weight.copy_(merged)
    return tensors, record


def _require_shapes(problem: LinearProblem, solution: SparseLowRank) -> None:
    """Raises ValueError for S, U, V that are no solution [o, d], [o, r], [r, d] of the rank asked for."""
    (o, d), shapes = problem.weight.shape, [tuple(part.shape) for part in (solution.S, solution.U, solution.V)]
    r = shapes[1][-1]
    if shapes != [(o, d), (o, r), (r, d)] or r > problem.rank:
        S, U, V = map(list, shapes)
        raise ValueError(f"S {S}, U {U}, V {V} for a {o}×{d} weight at rank {problem.rank}")
