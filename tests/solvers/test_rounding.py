"""S on a grid: what it loses against rounding after the fact and a slow reference, and what it must obey."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from streamslr.io.packing import pack_on_grid
from streamslr.solvers import LinearProblem, SparseLowRank, ThreeBasil, find_method, relative_error
from streamslr.solvers.rounding import OnGrid, nearest_on_grid, peak_bytes, solved_on_grid
from streamslr.spec.allocation import LinearSpec
from streamslr.spec.pattern import parse_pattern
from streamslr.spec.values import spread
from tests import reference
from tests.support.packed_linears import form_of
from tests.support.problems import made_problem, peak_of

PATTERNS = ["2:4", "50%", "60%/row", "dense"]


def error(problem: LinearProblem, result: OnGrid) -> float:
    S = result.codes.float() * spread(result.scales, problem.weight.shape[1])
    return relative_error(problem.weight, problem.gram, S + result.U @ result.V)


def solved(problem: LinearProblem) -> SparseLowRank:
    return ThreeBasil(precision="float32").solve(problem)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("values", ["int4/16", "fp8/16", "int8/64"])
def test_it_obeys_pattern_and_grid_and_loses_less_than_rounding_to_the_nearest(
    pattern: str, rank: int, values: str
) -> None:
    problem, form = made_problem(pattern=pattern, rank=rank), form_of(values)
    nearest = nearest_on_grid(problem, solved(problem), form, torch.bfloat16)
    result = solved_on_grid(problem, solved(problem), form, torch.bfloat16)
    codes = result.codes.float()
    assert torch.equal(form.nearest(codes), codes)
    assert torch.equal(result.scales, result.scales.bfloat16().float())
    assert parse_pattern(pattern).check(codes != 0) is None
    pack_on_grid(codes, result.scales, parse_pattern(pattern), torch.bfloat16, form)
    assert result.U.shape[1] == result.V.shape[0] == rank
    assert error(problem, result) < error(problem, nearest)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_the_loss_of_int4_is_at_most_the_references(pattern: str) -> None:
    ours = theirs = 0.0
    for seed in range(3):
        problem, form = made_problem(pattern=pattern, seed=seed), form_of("int4/16")
        solution = solved(problem)
        support, scales = solution.S != 0, nearest_on_grid(problem, solution, form, torch.float32).scales
        W, H = problem.weight.double(), reference.damped(problem.gram)
        S, UV = reference.on_grid(W, H, support.double(), spread(scales, 64).double(), form.largest, problem.rank)
        ours += error(problem, solved_on_grid(problem, solution, form, torch.float32))
        theirs += relative_error(problem.weight, problem.gram, (S + UV).float())
    assert ours <= 1.02 * theirs


def test_int8_costs_next_to_nothing() -> None:
    problem = made_problem()
    before = relative_error(problem.weight, problem.gram, solved(problem).dense())
    assert error(problem, solved_on_grid(problem, solved(problem), form_of("int8/64"), torch.bfloat16)) < 1.01 * before


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "oats", "eora-wanda"])
def test_any_methods_solution_comes_onto_the_grid(method: str) -> None:
    problem = made_problem(rank=0 if method in ("wanda", "sparsegpt") else 4)
    solution = find_method(method).solver.solve(problem)
    support = solution.S != 0
    nearest = error(problem, nearest_on_grid(problem, solution, form_of("int4/16"), torch.bfloat16))
    result = solved_on_grid(problem, solution, form_of("int4/16"), torch.bfloat16)
    assert not result.codes[~support].any()
    assert error(problem, result) < nearest


def with_dead_inputs(pattern: str, dead: list[int]) -> LinearProblem:
    problem = made_problem(pattern=pattern)
    problem.gram[dead] = 0
    problem.gram[:, dead] = 0
    return problem


def test_dead_inputs_get_nothing() -> None:
    problem = with_dead_inputs("2:4", [3, 17])
    result = solved_on_grid(problem, solved(problem), form_of("int4/16"), torch.bfloat16)
    assert not result.codes[:, [3, 17]].any()
    assert not result.V[:, [3, 17]].any()
    assert error(problem, result) < 0.1


@pytest.mark.parametrize("dead", [[3, 17], list(range(16))])  # in two groups; a whole group
def test_dead_inputs_keep_their_weights_in_pattern_dense(dead: list[int]) -> None:
    problem = with_dead_inputs("dense", dead)
    W = problem.weight
    kept = SparseLowRank(W.clone(), W.new_zeros(len(W), 4), W.new_zeros(4, W.shape[1]), 0, 1.0)
    result = solved_on_grid(problem, kept, form_of("int4/16"), torch.bfloat16)
    of_dead = (result.codes.float() * spread(result.scales, W.shape[1]))[:, dead]
    assert (of_dead - W[:, dead]).square().sum() < 0.05 * W[:, dead].square().sum()
    assert not result.V[:, dead].any()
    assert error(problem, result) < 0.1


def test_nearest_fits_a_low_rank_that_the_solution_left_empty() -> None:
    problem, form = made_problem(pattern="dense", rank=4), form_of("int4/16")
    W = problem.weight
    kept = SparseLowRank(W.clone(), W.new_zeros(len(W), 4), W.new_zeros(4, W.shape[1]), 0, 1.0)
    result = nearest_on_grid(problem, kept, form, torch.bfloat16)
    S = result.codes.float() * spread(result.scales, W.shape[1])
    best = reference.best_low_rank((W - S).double(), reference.damped(problem.gram), 4)
    lost = relative_error(W, problem.gram, S + best.float())
    assert error(problem, result) <= 1.02 * lost < 0.9 * relative_error(W, problem.gram, S)


def test_a_weight_of_zeros_stays_zero() -> None:
    problem = made_problem()
    problem = dataclasses.replace(problem, weight=torch.zeros_like(problem.weight))
    result = solved_on_grid(problem, solved(problem), form_of("int4/16"), torch.bfloat16)
    assert error(problem, result) == 0.0
    assert (result.scales > 0).all()


@pytest.mark.parametrize("values", ["int8/1", "fp8/8", "int4/8"])
@pytest.mark.parametrize("rank", [0, 4])
def test_rows_of_zeros_do_no_harm_however_small_the_inputs_are(values: str, rank: int) -> None:
    problem = made_problem(pattern="4:8", rank=rank)
    problem.weight[:8] = 0
    found = {}
    for size in (1.0, 1e-8):
        scaled = dataclasses.replace(problem, gram=problem.gram * size**2)
        result = solved_on_grid(scaled, solved(scaled), form_of(values), torch.bfloat16)
        found[size] = error(problem, result)
    assert found[1e-8] == pytest.approx(found[1.0], rel=0.05)


def test_a_weight_of_the_least_numbers_of_float16_keeps_its_values() -> None:
    problem = made_problem()
    problem.weight.mul_(2e-6 / problem.weight.abs().max())
    result = solved_on_grid(problem, solved(problem), form_of("int8/16"), torch.float16)
    assert error(problem, result) < 0.1


def test_the_same_problem_gives_the_same_bits() -> None:
    one, two = (
        solved_on_grid(problem, solved(problem), form_of("int4/16"), torch.bfloat16)
        for problem in (made_problem(), made_problem())
    )
    for part in ("codes", "scales", "U", "V"):
        assert torch.equal(getattr(one, part), getattr(two, part))


@pytest.mark.parametrize(("o", "d"), [(256, 768), (768, 256), (8192, 256)])
@pytest.mark.parametrize(
    ("pattern", "way"), [("2:4", solved_on_grid), ("dense", solved_on_grid), ("dense", nearest_on_grid)]
)
def test_planned_memory_is_what_it_takes(o: int, d: int, pattern: str, way: Callable[..., OnGrid]) -> None:
    problem = made_problem(o, d, pattern=pattern, rank=16)
    W = problem.weight
    kept = SparseLowRank(W.clone(), W.new_zeros(o, 16), W.new_zeros(16, d), 0, 1.0)
    solution = kept if pattern == "dense" else solved(dataclasses.replace(problem))
    taken = peak_of(lambda: way(problem, solution, form_of("int4/128"), torch.bfloat16))
    spec = LinearSpec(problem.pattern, 16, form_of("int4/128"))
    planned = peak_bytes(ThreeBasil(), spec, o, d, None, gpu=False)
    assert taken + solution.S.nbytes <= planned
