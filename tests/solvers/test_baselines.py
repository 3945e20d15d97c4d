"""The methods beside 3BASiL against their slow float64 references, and against every support there is."""

import dataclasses

import pytest
import torch

from streamslr.solvers import LinearProblem, find_method, parse_pattern
from streamslr.solvers.alps import Alps, refit_
from streamslr.solvers.hassle_free import HassleFree
from streamslr.solvers.low_rank import LowRankFit
from streamslr.solvers.oats import Oats
from streamslr.solvers.pruning import Pruned
from streamslr.solvers.sparsegpt import SparseGPT
from streamslr.solvers.threebasil import ThreeBasil
from tests import reference
from tests.support.problems import error, made_problem

PATTERNS = ["2:4", "1:4", "3:8", "50%", "70%/row"]


def doubles(problem: LinearProblem) -> tuple[torch.Tensor, torch.Tensor]:
    return problem.weight.double(), reference.damped(problem.gram)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_plain_pruning_is_the_references(name: str, pattern: str) -> None:
    problem = made_problem(pattern=pattern, rank=0)
    W, H = doubles(problem)
    S = getattr(reference, name)(W, problem.gram.double() if name == "wanda" else H, pattern)
    torch.testing.assert_close(find_method(name).solver.solve(problem).S.double(), S, rtol=1e-5, atol=0)


@pytest.mark.parametrize("d", [64, 240])  # one block, and two of which the second is short
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_is_obs_column_by_column(pattern: str, d: int) -> None:
    problem = made_problem(32, d, pattern, rank=0)
    S = Pruned(SparseGPT()).solve(problem).S.double()
    expected = reference.sparsegpt(*doubles(problem), pattern)
    assert ((S != 0) != (expected != 0)).float().mean() < 0.01  # near ties, float32
    agreeing = ((S != 0) == (expected != 0)).all(1)
    torch.testing.assert_close(S[agreeing], expected[agreeing], rtol=1e-2, atol=1e-4)
    assert agreeing.float().mean() > 0.5


def test_blocks_are_bookkeeping_only() -> None:
    problem = made_problem(32, 240, rank=0)
    one, many = (Pruned(SparseGPT(block)).solve(problem) for block in (10**6, 16))
    assert error(problem, many) == pytest.approx(error(problem, one), rel=0.01)


def test_alps_says_that_its_support_had_not_settled_and_hassle_free_goes_on_from_there() -> None:
    hurried = Alps(ThreeBasil(max_iterations=3))
    said = ("layers.0.made: the support had not settled after 3 iterations",)
    assert Pruned(hurried).solve(made_problem(rank=0)).warnings == said
    assert HassleFree(hurried, iterations=2).solve(made_problem()).warnings == ()
    assert HassleFree(hurried).solve(made_problem(rank=0)).warnings == said, "without U·V there is no next turn"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_alps_loses_no_more_than_the_reference(pattern: str) -> None:
    ours = theirs = 0.0
    for seed in range(3):
        problem = made_problem(pattern=pattern, rank=0, seed=seed)
        ours += error(problem, find_method("alps").solver.solve(problem))
        theirs += reference.loss(problem.weight, problem.gram, reference.alps(*doubles(problem), pattern))
    assert ours <= 1.02 * theirs


def test_the_refit_reaches_the_least_loss_of_the_support_and_never_leaves_it() -> None:
    problem = made_problem(rank=0)
    W, H = doubles(problem)
    scale = H.diagonal().sqrt()
    G, T = H / scale[:, None] / scale, W * scale
    best = reference.refitted(T, G, reference.project(T, "2:4"))
    S, losses = (T * reference.project(T, "2:4")).float(), []
    for _ in range(8):
        R = T - S.double()
        losses.append((R @ G * R).sum().item())
        refit_(S, T.float(), G.float(), 5)
    assert losses == sorted(losses, reverse=True)
    assert ((S != 0) == (best != 0)).all()
    torch.testing.assert_close(S.double(), best, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("name", "factor"), [("alps", 1.05), ("sparsegpt", 2.0)])
def test_against_every_support_of_tiny_rows(name: str, factor: float) -> None:
    """Among 36 or 256 supports, the one that a method finds is near the best."""
    ours = best = 0.0
    for pattern, d in (("2:4", 8), ("1:4", 16)):
        n, m = map(int, pattern.split(":"))
        for seed in range(6):
            problem = dataclasses.replace(made_problem(1, d, pattern, 0, seed), pattern=parse_pattern(pattern))
            W, H = doubles(problem)
            R = W - find_method(name).solver.solve(problem).S.double()
            found, least = (R @ H @ R.T).item(), reference.best_support(W[0], H, n, m)
            assert found >= least * (1 - 1e-4)
            ours, best = ours + found / (W @ H @ W.T).item(), best + least / (W @ H @ W.T).item()
    assert ours <= factor * best


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_low_rank_fit_is_the_truncated_svd(rank: int) -> None:
    problem = made_problem(rank=rank)
    E, H = doubles(problem)
    fit = LowRankFit(problem.weight, rank, lambda y: problem.gram @ y + (H - problem.gram).float() @ y, 0)
    U, V = fit.fit(problem.weight)
    best = reference.best_low_rank(E, H, rank)
    loss = reference.loss(problem.weight, problem.gram, (U @ V).double())
    assert loss <= 1.001 * reference.loss(problem.weight, problem.gram, best)
    torch.testing.assert_close(U.t() @ U, torch.eye(rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_eora_is_the_best_low_rank_correction_of_what_its_pruner_left(pruner: str, pattern: str) -> None:
    problem = made_problem(pattern=pattern, rank=4)
    result = find_method(f"eora-{pruner}").solver.solve(problem)
    alone = find_method(pruner).solver.solve(dataclasses.replace(problem, rank=0))
    assert torch.equal(result.S, alone.S)
    W, H = doubles(problem)
    _, UV = reference.eora(W, H, pattern, 4, lambda *_: alone.S.double())
    assert error(problem, result) <= 1.002 * reference.loss(problem.weight, problem.gram, alone.S + UV)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "50%"])
def test_hassle_free_sparsegpt_loses_no_more_than_the_reference(pattern: str) -> None:
    ours = theirs = 0.0
    for seed in range(3):
        problem = made_problem(pattern=pattern, seed=seed)
        ours += error(problem, HassleFree(SparseGPT(), 10).solve(problem))
        S, UV = reference.hassle_free(*doubles(problem), pattern, 4, reference.sparsegpt, 10)
        theirs += reference.loss(problem.weight, problem.gram, S + UV)
    assert ours <= 1.03 * theirs


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_hassle_free_alps_loses_no_more_than_the_reference(pattern: str) -> None:
    ours = theirs = 0.0
    for seed in range(2):
        problem = made_problem(pattern=pattern, seed=seed)
        ours += error(problem, find_method("hassle-free-alps").solver.solve(problem))
        S, UV = reference.hassle_free(*doubles(problem), pattern, 4, reference.alps, 10)
        theirs += reference.loss(problem.weight, problem.gram, S + UV)
    assert ours <= 1.03 * theirs


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "50%", "60%/row"])
def test_oats_is_alternating_thresholding(pattern: str) -> None:
    problem = made_problem(pattern=pattern)
    result = Oats(20).solve(problem)
    S, UV = reference.oats(*doubles(problem), pattern, 4, 20)
    theirs = reference.loss(problem.weight, problem.gram, S + UV)
    assert error(problem, result) == pytest.approx(theirs, rel=0.03)
    assert ((result.S != 0) != (S != 0)).float().mean() < 0.03


def test_a_longer_alternation_loses_less() -> None:
    problem = made_problem(pattern="1:4")
    for solver in (HassleFree(SparseGPT()), HassleFree(Alps()), Oats()):
        few, many = (error(problem, dataclasses.replace(solver, iterations=n).solve(problem)) for n in (1, 20))
        assert many < few
