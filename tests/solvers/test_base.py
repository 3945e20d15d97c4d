"""The loss that solutions are judged by."""

import pytest
import torch

from streamslr.errors import InputError, StreamslrError
from streamslr.solvers import relative_error
from streamslr.solvers.base import (
    Damping,
    SparseLowRank,
    damp_until_positive_definite,
    damping_diagonal,
    require_finite,
)
from tests import reference
from tests.support.problems import made_problem


def test_relative_error_is_the_reference_loss() -> None:
    problem = made_problem()
    approximation = problem.weight + 0.01 * torch.randn(48, 64)
    error = relative_error(problem.weight, problem.gram, approximation)
    assert error == pytest.approx(reference.loss(problem.weight, problem.gram, approximation), rel=1e-6)


def test_relative_error_crosses_its_tiles_unchanged() -> None:
    torch.manual_seed(0)
    weight, approximation = torch.randn(1030, 1100), torch.randn(1030, 1100)
    X = torch.randn(64, 1100)
    gram = X.T @ X
    added, _ = damping_diagonal(gram)
    H = gram.double() + torch.diag(added.double())
    R, W = (weight - approximation).double(), weight.double()
    expected = ((R @ H) * R).sum() / ((W @ H) * W).sum()
    assert relative_error(weight, gram, approximation) == pytest.approx(expected.item(), rel=1e-6)


def test_relative_error_leaves_its_arguments_alone() -> None:
    problem = made_problem()
    weight, gram = problem.weight.clone(), problem.gram.clone()
    gram[0] = 0
    gram[:, 0] = 0
    before = gram.clone()
    relative_error(weight, gram, torch.zeros_like(weight))
    assert torch.equal(weight, problem.weight)
    assert torch.equal(gram, before)


def test_dead_inputs_count_in_neither_energy() -> None:
    problem = made_problem()
    gram = problem.gram.clone()
    gram[5] = 0
    gram[:, 5] = 0
    approximation = problem.weight.clone()
    approximation[:, 5] = 100
    assert relative_error(problem.weight, gram, approximation) == 0
    approximation[0, 0] = 0
    assert relative_error(problem.weight, gram, approximation) == pytest.approx(
        reference.loss(problem.weight, gram, approximation), rel=1e-6
    )


def test_nothing_and_everything() -> None:
    problem = made_problem()
    zero = torch.zeros_like(problem.weight)
    assert relative_error(problem.weight, problem.gram, zero) == pytest.approx(1)
    assert relative_error(problem.weight, problem.gram, problem.weight) == 0
    assert relative_error(zero, problem.gram, zero) == 0
    assert relative_error(zero, problem.gram, problem.weight) == float("inf")


def test_damping_scales_with_the_gram_matrix() -> None:
    gram = made_problem().gram
    gram[3] = 0
    gram[:, 3] = 0
    added, dead = damping_diagonal(gram)
    scaled, _ = damping_diagonal(1000 * gram)
    assert dead.nonzero().flatten().tolist() == [3]
    assert added[3] == scaled[3] == 1
    live = ~dead
    torch.testing.assert_close(scaled[live], 1000 * added[live])
    torch.testing.assert_close(torch.diag(gram)[live] + added[live], reference.damped(gram).diag()[live].float())


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_damping_is_raised_tenfold_until_there_is_a_factor(failures: int) -> None:
    problem = made_problem()
    warnings: list[str] = []
    tried: list[float] = []

    def factorize(damping: Damping) -> Damping | None:
        tried.append(damping.multiplier)
        return damping if len(tried) > failures else None

    damping = damp_until_positive_definite(problem, factorize, warnings)
    assert tried == [10.0**i for i in range(failures + 1)]
    assert damping.multiplier == 10**failures
    assert torch.equal(damping.added, damping_diagonal(problem.gram, damping.multiplier)[0])
    assert torch.equal(damping.scale, (problem.gram.diagonal() + damping.added).sqrt())
    said = f"layers.0.made: the Gram matrix had no Cholesky factor; its damping was raised {10**failures} times"
    assert warnings == ([said] if failures else [])


def test_a_gram_that_no_damping_helps_is_refused() -> None:
    with pytest.raises(InputError, match=r"layers\.0\.made: its Gram matrix is not positive semidefinite, even with"):
        damp_until_positive_definite(made_problem(), lambda _: None, [])


def test_a_solution_that_overflowed_is_refused_with_its_sizes() -> None:
    problem = made_problem()
    S = problem.weight.clone()
    require_finite(problem, S, S, S)
    S[2, 3:5] = float("inf")
    with pytest.raises(StreamslrError, match=r"layers\.0\.made: 2 values of S, U and V are NaN .* largest weight is 0"):
        require_finite(problem, problem.weight, problem.weight, S)


def test_dense_is_the_sum() -> None:
    S, U, V = torch.randn(3, 4), torch.randn(3, 2), torch.randn(2, 4)
    torch.testing.assert_close(SparseLowRank(S, U, V, 1).dense(), S + U @ V)
    none = SparseLowRank(S, torch.zeros(3, 0), torch.zeros(0, 4), 1)
    assert torch.equal(none.dense(), S)
