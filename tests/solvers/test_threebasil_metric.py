"""Inverses of 3BASiL: factored, grown from stage to stage, checked, and shared by linears with one Gram matrix."""

import dataclasses

import pytest
import torch
from torch import Tensor

from streamslr.ranks import Ranks
from streamslr.solvers import LinearProblem, ThreeBasil
from streamslr.solvers.base import GramCache
from streamslr.solvers.threebasil_metric import (
    Metric,
    Pace,
    StageInverses,
    build_metric,
    grow_,
    inverse_error,
    invert_,
)
from tests.support.problems import error, made_problem

PACE = Pace(0.2, 1.25)


def exact(metric: Metric, rho: float) -> Tensor:
    """Return ρ (G + ρI)⁻¹ in float64."""
    G = metric.times(torch.eye(len(metric.scale))).double()
    inverse: Tensor = torch.linalg.inv(G + rho * torch.eye(len(G)).double())
    return rho * inverse


def relative(M: Tensor, expected: Tensor) -> float:
    return float((M.double() - expected).norm() / expected.norm())


def test_the_inverse_is_built_in_place_and_exact() -> None:
    gram = made_problem().gram
    matrix = gram + torch.eye(64)
    expected = torch.linalg.inv(matrix.double())
    inverse = invert_(matrix)
    assert inverse is not None
    assert inverse.data_ptr() == matrix.data_ptr()
    torch.testing.assert_close(inverse.double(), expected, rtol=1e-4, atol=1e-5)
    assert invert_(-torch.eye(4)) is None


def test_saliency_is_the_scale_of_inputs() -> None:
    problem = made_problem()
    metric = build_metric(problem, [])
    G = metric.times(torch.eye(64)).double()
    torch.testing.assert_close(torch.linalg.inv(G).diagonal(), torch.ones(64).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("growth", [1.05, 1.25, 1.4])
def test_one_step_of_the_series_is_near_the_inverse(growth: float) -> None:
    metric = build_metric(made_problem(), [])
    M = exact(metric, 0.5).float()
    grow_(M, growth)
    assert relative(M, exact(metric, 0.5 * growth)) < 1.2e-4
    torch.testing.assert_close(M, M.t())


@pytest.mark.parametrize("d", [1, 2, 7, 8, 9, 100])
def test_the_series_takes_matrices_of_any_size(d: int) -> None:
    torch.manual_seed(0)
    root = torch.randn(d, 2 * d).double()
    G = root @ root.t() / d
    eye = torch.eye(d).double()
    M = (0.3 * torch.linalg.inv(G + 0.3 * eye)).float()
    grow_(M, 1.25)
    assert relative(M, 0.375 * torch.linalg.inv(G + 0.375 * eye)) < 3e-5


def test_the_series_stays_near_the_inverse_over_all_stages() -> None:
    metric = build_metric(made_problem(), [])
    inverses = StageInverses(metric, PACE, torch.float32, by_series=True)
    errors = [relative(inverses.at(k, "made"), exact(metric, PACE.rho(k))) for k in range(25)]
    assert max(errors) < 2e-4
    assert not inverses.refactored


def test_the_error_of_an_inverse_is_estimated_well() -> None:
    metric = build_metric(made_problem(), [])
    expected = exact(metric, 0.5)
    for size in (1e-4, 1e-2):
        noise = torch.randn(64, 64).double()
        M = expected + (noise + noise.t()) * size * expected.norm() / (noise + noise.t()).norm()
        assert inverse_error(metric, 0.5, M.float()) == pytest.approx(size, rel=0.5)


def test_an_inverse_that_drifted_is_factored_anew_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def grow_badly(M: Tensor, growth: float, ranks: Ranks) -> None:
        grow_(M, growth, ranks)
        M.mul_(1.01)

    monkeypatch.setattr("streamslr.solvers.threebasil_metric.grow_", grow_badly)
    problem = made_problem()
    result = ThreeBasil(inverses="series", precision="float32").solve(problem)
    assert result.warnings[0] == (
        "layers.0.made: stage 1 needed a Cholesky factor; the inverse grown from the last stage's was off by 0.01"
    )
    factored = ThreeBasil(inverses="factor", precision="float32").solve(problem)
    assert torch.equal(result.S, factored.S)


def test_an_inverse_with_nan_is_factored_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamslr.solvers.threebasil_metric.grow_", lambda M, *_: M.fill_(float("nan")))
    metric = build_metric(made_problem(), [])
    inverses = StageInverses(metric, PACE, torch.float32, by_series=True)
    assert relative(inverses.at(2, "made"), exact(metric, PACE.rho(2))) < 1e-4
    assert list(inverses.refactored) == [1, 2]


def test_a_pace_too_fast_for_the_series_is_factored() -> None:
    metric = build_metric(made_problem(), [])
    pace = Pace(0.2, 1.6)
    by_series, factored = (StageInverses(metric, pace, torch.float32, by_series=how) for how in (True, False))
    assert torch.equal(by_series.at(3, "made"), factored.at(3, "made"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_series_costs_no_loss(precision: str) -> None:
    problems = [made_problem(seed=seed) for seed in range(8)]
    series = sum(error(p, ThreeBasil(precision=precision, inverses="series").solve(p)) for p in problems)
    factored = sum(error(p, ThreeBasil(precision=precision, inverses="factor").solve(p)) for p in problems)
    assert series < 1.02 * factored


# Linears that share a Gram matrix


def sharing() -> tuple[LinearProblem, ...]:
    """Return three problems on one Gram matrix, of which the second takes the most stages."""
    first = made_problem()
    others = (made_problem(seed=1, rank=2, pattern="1:4"), made_problem(o=16, seed=2))
    return first, *(dataclasses.replace(other, gram=first.gram) for other in others)


@pytest.mark.parametrize("matrices", [0, 1, 2, 5, 100])
@pytest.mark.parametrize("inverses", ["series", "factor"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sharing_changes_no_bit(precision: str, inverses: str, matrices: int) -> None:
    solver = ThreeBasil(precision=precision, inverses=inverses)
    cache = GramCache(matrices * 4 * 64 * 64)
    for problem in sharing():
        alone = solver.solve(problem)
        shared = solver.solve(dataclasses.replace(problem, cache=cache))
        for part in ("S", "U", "V", "warnings", "iterations"):
            ours, expected = getattr(shared, part), getattr(alone, part)
            assert torch.equal(ours, expected) if isinstance(ours, Tensor) else ours == expected


def test_linears_that_share_a_gram_matrix_factor_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    factored = []

    def counted(matrix: Tensor) -> Tensor | None:
        factored.append(len(matrix))
        return invert_(matrix)

    monkeypatch.setattr("streamslr.solvers.threebasil_metric.invert_", counted)
    solver, cache = ThreeBasil(inverses="factor"), GramCache(10**9)
    alone = []
    for problem in sharing():
        factored.clear()
        solver.solve(problem)
        alone.append(len(factored))
    factored.clear()
    for problem in sharing():
        solver.solve(dataclasses.replace(problem, cache=cache))
    assert len(factored) == max(alone)


def test_a_cache_keeps_no_more_bytes_than_it_may() -> None:
    metric = build_metric(made_problem(), [])
    size = 4 * 64 * 64
    inverses = StageInverses(metric, PACE, torch.float32, by_series=False, keep_bytes=3 * size)
    held = [inverses.at(stage, "made") for stage in range(6)]
    assert len({matrix.data_ptr() for matrix in held}) == 3 + 1  # and one that all later stages share
    inverses.end_solve()
    for stage in range(3):
        assert inverses.at(stage, "made") is held[stage]


def test_raised_damping_is_said_for_every_linear_that_shares_it() -> None:
    problem = made_problem()
    values, vectors = torch.linalg.eigh(problem.gram)
    values[:3] = -0.01 * problem.gram.diagonal().mean()
    indefinite = dataclasses.replace(problem, gram=vectors @ torch.diag(values) @ vectors.T)
    cache = GramCache()
    for name in ("first", "second"):
        result = ThreeBasil().solve(dataclasses.replace(indefinite, name=name, cache=cache))
        assert result.damping >= 10
        assert result.warnings[0].startswith(f"{name}: the Gram matrix had no Cholesky factor")
