"""The table of methods, methods of other packages, and one contract for all solvers."""

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from streamslr.errors import InputError
from streamslr.solvers import LinearProblem, Solver, SparseLowRank, all_methods, find_method, parse_pattern
from streamslr.solvers.methods import BUILT_IN, ENTRY_POINTS, Method
from streamslr.spec.pattern import SparsityPattern
from tests import reference
from tests.support.markers import slow
from tests.support.problems import allocated_peak, assert_valid, error, made_problem

LOW_RANK = [name for name, method in BUILT_IN.items() if method.low_rank]
FULL_GRAM = [name for name, method in BUILT_IN.items() if not method.diagonal_only]


def problem_for(name: str, o: int = 48, d: int = 64, pattern: str = "2:4", rank: int = 4) -> LinearProblem:
    return made_problem(o, d, pattern, rank if BUILT_IN[name].low_rank else 0)


def solved(name: str, problem: LinearProblem) -> SparseLowRank:
    result = find_method(name).solver.solve(problem)
    assert_valid(problem, result)
    return result


# The table


def test_the_nine_methods_and_eora_on_each_pruner_are_there() -> None:
    pure = {"magnitude", "wanda", "sparsegpt", "alps"}
    low_rank = {"3basil", "hassle-free-alps", "hassle-free-sparsegpt", "oats"} | {f"eora-{name}" for name in pure}
    assert set(BUILT_IN) == pure | low_rank
    assert {name for name in BUILT_IN if name not in LOW_RANK} == pure


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match="method 'prune' is not known; there are 3basil, hassle-free-alps, "):
        find_method("prune")


def test_rank_for_a_method_without_u_v_is_refused() -> None:
    find_method("wanda").require(parse_pattern("2:4"), 0)
    with pytest.raises(InputError, match=r"wanda is pure sparsity, it has no U·V for --rank 16; give --rank 0.*3basil"):
        find_method("wanda").require(parse_pattern("2:4"), 16)


def test_a_pattern_that_the_method_cannot_do_is_refused() -> None:
    only = dataclasses.replace(find_method("oats"), patterns=(type(parse_pattern("2:4")),))
    with pytest.raises(InputError, match="oats cannot do the pattern 50%, only n:m"):
        only.require(parse_pattern("50%"), 4)


# Methods of other packages


class Halve:
    """A solver as another package would write it."""

    def solve(self, problem: LinearProblem) -> SparseLowRank:
        W = problem.weight
        return SparseLowRank(W * problem.pattern.project(W) / 2, W.new_zeros(len(W), 0), W.new_zeros(0, W.shape[1]), 1)

    def peak_bytes(
        self, o: int, d: int, rank: int, workspace: int | None = None, *, pattern: SparsityPattern, gpu: bool = False
    ) -> int:
        return 18 * o * d

    def flops(self, o: int, d: int, rank: int, *, gpu: bool = False) -> float:
        return 20.0 * o * d


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a distribution that offers `value` as a method called `name`."""

    def made(value: object, name: str = "halve", package: str = "halver") -> None:
        module = types.ModuleType(f"{package}_module")
        vars(module)["METHOD"] = value
        monkeypatch.setitem(sys.modules, module.__name__, module)
        info = tmp_path / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{name} = {module.__name__}:METHOD\n")
        monkeypatch.syspath_prepend(tmp_path)

    return made


def test_a_method_of_another_package_is_found_listed_and_told_apart_by_version(install: Callable[..., None]) -> None:
    install(Method("halve", Halve(), "arXiv 0000.00000", diagonal_only=True, low_rank=False))
    method = find_method("halve")
    assert method.identity == "halve (halver 1.2)"
    assert all_methods()[-1] == method
    problem = made_problem(rank=0)
    assert_valid(problem, method.solver.solve(problem))


@pytest.mark.parametrize(
    ("value", "name", "message"),
    [
        (Halve(), "halve", "method 'halve' of halver 1.2 is a Halve, not a Method"),
        (
            Method("x", cast(Solver, object()), ""),
            "halve",
            "'halve' of halver 1.2: its object lacks solve, peak_bytes or flops",
        ),
        (Method("x", Halve(), ""), "wanda", "halver 1.2 registers a method 'wanda', which there is already"),
    ],
)
def test_what_another_package_gets_wrong_is_said(
    install: Callable[..., None], value: object, name: str, message: str
) -> None:
    install(value, name)
    with pytest.raises(InputError, match=message):
        all_methods()
    assert find_method("wanda") is BUILT_IN["wanda"], "ours are found all the same"


def test_a_package_that_cannot_be_imported_is_named(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(None)
    monkeypatch.delitem(sys.modules, "halver_module")
    with pytest.raises(InputError, match=r"'halve' of halver 1.2 cannot be loaded: ModuleNotFoundError"):
        find_method("halve")


# The contract


@pytest.mark.parametrize("pattern", ["2:4", *slow("1:4", "3:5"), "5:16", *slow("50%"), "83%", "66%/row"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_pattern_holds_and_no_method_is_worse_than_pruning_by_magnitude(name: str, pattern: str) -> None:
    problem = problem_for(name, 40, 80, pattern)
    S = reference.magnitude(problem.weight.double(), problem.gram.double(), pattern)
    assert error(problem, solved(name, problem)) <= reference.loss(problem.weight, problem.gram, S) * (1 + 1e-4)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_same_problem_gives_the_same_bits_and_stays_as_it_was(name: str) -> None:
    problem = problem_for(name)
    weight, gram = problem.weight.clone(), problem.gram.clone()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = solved(name, problem)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = solved(name, problem)
    assert all(torch.equal(getattr(first, part), getattr(second, part)) for part in ("S", "U", "V"))
    assert torch.equal(problem.weight, weight)
    assert torch.equal(problem.gram, gram)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_dead_inputs_get_nothing(name: str, pattern: str) -> None:
    problem = problem_for(name, pattern=pattern)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[0, 7, 8, 9, 10, 11, 63]] = True  # a whole group among them
    gram = problem.gram.clone()
    gram[dead] = 0
    gram[:, dead] = 0
    weight = problem.weight.clone()
    if name not in ("magnitude", "eora-magnitude"):  # by magnitude these would be kept and all else lost
        weight[:, dead] = 1e3
    problem = dataclasses.replace(problem, weight=weight, gram=gram)
    result = solved(name, problem)
    assert not result.S[:, dead].any()
    assert not result.V[:, dead].any()
    assert error(problem, result) < 0.3


@pytest.mark.parametrize("name", BUILT_IN)
def test_all_inputs_dead(name: str) -> None:
    problem = dataclasses.replace(problem_for(name), gram=torch.zeros(64, 64))
    assert not solved(name, problem).dense().any()


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("name", BUILT_IN)
def test_grams_of_too_few_rows(name: str, rows: int) -> None:
    torch.manual_seed(0)
    X = torch.randn(rows, 64)
    problem = dataclasses.replace(problem_for(name), gram=X.T @ X)
    assert error(problem, solved(name, problem)) < 0.5


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_gram_that_is_all_but_singular_twice_over(name: str) -> None:
    X = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    X = torch.cat((X, X), 1) * torch.logspace(-4, 4, 64)  # duplicate inputs, eight decades of scale
    solved(name, dataclasses.replace(problem_for(name), gram=X.T @ X))


@pytest.mark.parametrize("name", FULL_GRAM)
def test_a_failed_factorization_raises_the_damping_and_says_so(name: str) -> None:
    problem = problem_for(name)
    values, vectors = torch.linalg.eigh(problem.gram)
    values[:3] = -0.01 * problem.gram.diagonal().mean()
    problem = dataclasses.replace(problem, gram=vectors @ torch.diag(values) @ vectors.T)
    result = solved(name, problem)
    assert result.damping >= 10
    assert f"damping was raised {result.damping:g} times" in result.warnings[0]


@pytest.mark.parametrize("name", FULL_GRAM)
def test_what_is_no_gram_is_refused(name: str) -> None:
    gram = 1e6 * (1 - torch.eye(64)) + torch.eye(64)
    with pytest.raises(InputError, match=r"layers\.0\.made: its Gram matrix"):
        find_method(name).solver.solve(dataclasses.replace(problem_for(name), gram=gram))


@pytest.mark.parametrize("where", ["weight", "gram"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_non_finite_values_are_refused_by_name_of_the_linear(name: str, where: str) -> None:
    problem = problem_for(name)
    broken = getattr(problem, where).clone()
    broken[2, 5] = float("nan")
    with pytest.raises(InputError, match=r"layers\.0\.made: 1 of .*NaN or infinite"):
        find_method(name).solver.solve(dataclasses.replace(problem, **{where: broken}))


@pytest.mark.parametrize("pattern", ["2:4", "50%", "50%/row"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_weight_that_is_sparse_already_is_kept_all_zeros_too(name: str, pattern: str) -> None:
    problem = problem_for(name, pattern=pattern)
    for factor in (0, 1):
        sparse = factor * problem.weight * problem.pattern.project(problem.weight)
        assert torch.equal(solved(name, dataclasses.replace(problem, weight=sparse)).dense(), sparse)


@pytest.mark.parametrize("pattern", ["2:4", "50%/row"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_weight_with_zero_rows_and_columns(name: str, pattern: str) -> None:
    problem = problem_for(name, pattern=pattern)
    weight = problem.weight.clone()
    weight[3] = 0
    weight[:, 20:28] = 0
    problem = dataclasses.replace(problem, weight=weight)
    assert error(problem, solved(name, problem)) < 0.3


@pytest.mark.parametrize("name", LOW_RANK)
def test_rank_beyond_the_shape_is_clipped_with_a_warning_and_leaves_no_error(name: str) -> None:
    problem = problem_for(name, 12, 32, rank=40)
    result = solved(name, problem)
    assert any("rank 40 is more than a 12×32 weight can have; used 12" in w for w in result.warnings)
    assert error(problem, result) < 1e-5


@pytest.mark.parametrize("name", LOW_RANK)
def test_rank_0_is_pure_sparsity(name: str) -> None:
    problem = problem_for(name, rank=0)
    assert solved(name, problem).U.shape == (48, 0)


@pytest.mark.parametrize(("o", "d"), [(1, 8), (2, 4), (200, 8), (3, 320)])
@pytest.mark.parametrize("name", BUILT_IN)
def test_extreme_shapes(name: str, o: int, d: int) -> None:
    torch.manual_seed(0)
    X = torch.randn(50, d)
    rank = 2 if BUILT_IN[name].low_rank else 0
    problem = LinearProblem("odd", torch.randn(o, d), X.T @ X, parse_pattern("2:4"), rank)
    assert error(problem, solved(name, problem)) < 0.4


@pytest.mark.parametrize("factor", [1e-8, 1e8])
@pytest.mark.parametrize("name", BUILT_IN)
def test_loss_is_blind_to_the_scale_of_inputs_and_weights(name: str, factor: float) -> None:
    problem = problem_for(name)
    expected = error(problem, solved(name, problem))
    for scaled in ({"gram": problem.gram * factor}, {"weight": problem.weight * factor**0.5}):
        changed = dataclasses.replace(problem, **scaled)
        assert error(changed, solved(name, changed)) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("pattern", ["2:4", *slow("50%", "50%/row")])
@pytest.mark.parametrize(("o", "d"), [(768, 256), *slow((256, 512))])
@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "3basil"])  # tests/solvers/test_threebasil.py
def test_a_solve_takes_no_more_than_it_says(name: str, o: int, d: int, pattern: str) -> None:
    torch.manual_seed(0)
    X = torch.randn(2 * d, d)
    rank = 16 if BUILT_IN[name].low_rank else 0
    problem = LinearProblem("made", torch.randn(o, d), X.T @ X, parse_pattern(pattern), rank)
    solver: Any = BUILT_IN[name].solver
    if name.startswith(("hassle-free", "oats")):  # a turn is like another
        solver = dataclasses.replace(solver, iterations=2)
    peak = allocated_peak(solver, problem)
    planned = solver.peak_bytes(o, d, rank, pattern=problem.pattern)
    assert 0.4 * planned <= peak <= planned


@pytest.mark.parametrize("pattern", ["2:4", "7:32", "50%"])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_nor_does_it_where_weights_tie_and_groups_are_long(name: str, pattern: str) -> None:
    torch.manual_seed(0)
    X = torch.randn(1024, 512)
    X[:, :384] = 0
    weight = torch.randn(768, 512).bfloat16().float()
    problem = LinearProblem("made", weight, X.T @ X, parse_pattern(pattern), 0)
    solver = BUILT_IN[name].solver
    assert allocated_peak(solver, problem) <= solver.peak_bytes(768, 512, 0, pattern=problem.pattern)
