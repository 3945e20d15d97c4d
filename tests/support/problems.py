"""Small linears with the structure of trained ones, and checks for every solution."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from streamslr.solvers import LinearProblem, Solver, SparseLowRank, parse_pattern, relative_error


def made_problem(o: int = 48, d: int = 64, pattern: str = "2:4", rank: int = 4, seed: int = 0) -> LinearProblem:
    """Make a problem of correlated inputs with outlier channels and weights with a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spectrum = torch.arange(1, d + 1).float().rsqrt()
    basis = torch.linalg.qr(normal(d, d)).Q
    channels = torch.exp(0.5 * normal(d))
    X = ((normal(6 * d, d) * spectrum) @ basis.T + 0.1) * channels
    low = normal(o, 6) @ torch.diag(torch.tensor([3.0, 2.0, 1.5, 1.0, 0.7, 0.5])) @ normal(6, d)
    W = 0.02 * (low / 3 + normal(o, d) * torch.exp(0.3 * normal(o, d)))
    return LinearProblem(f"layers.{seed}.made", W, X.T @ X / len(X), parse_pattern(pattern), rank, seed)


def assert_valid(problem: LinearProblem, result: SparseLowRank) -> None:
    o, d = problem.weight.shape
    rank = min(problem.rank, o, d)
    assert result.S.shape == (o, d)
    assert result.U.shape == (o, rank)
    assert result.V.shape == (rank, d)
    for part in (result.S, result.U, result.V):
        assert part.dtype == torch.float32
        assert part.is_contiguous()
        assert part.isfinite().all()
    assert problem.pattern.check(result.S != 0) is None


def error(problem: LinearProblem, result: SparseLowRank) -> float:
    return relative_error(problem.weight, problem.gram, result.dense())


def allocated_peak(solver: Solver, problem: LinearProblem) -> int:
    """Return the most bytes that the tensors of one solve take together."""
    return peak_of(lambda: solver.solve(problem))


def peak_of(work: Callable[[], object]) -> int:
    """Return the most bytes that the tensors made in `work` take together, from the events of the allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return int(max(held))
