"""One linear solved by rows on two and three ranks, against the solve of one process."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from streamslr.errors import InputError
from streamslr.io.packing import merge, pack, unpack
from streamslr.ranks import ALONE, Ranks
from streamslr.run.dealing import rows_of_ranks
from streamslr.run.journal import LinearRecord
from streamslr.run.solve_linear import LinearCompressor
from streamslr.solvers import LinearProblem, Solver, SparseLowRank, ThreeBasil, threebasil_fused, threebasil_state
from streamslr.solvers.base import GramCache
from streamslr.solvers.low_rank import orthonormal_rows_by_cholesky
from streamslr.solvers.methods import find_method
from streamslr.solvers.threebasil_metric import grow_
from streamslr.solvers.threebasil_state import AdmmState
from streamslr.spec.allocation import LinearSpec
from tests.support.fused_step import StepInTorch
from tests.support.markers import long
from tests.support.problems import assert_valid, error, made_problem
from tests.support.started_ranks import StartedRanks

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = ThreeBasil(precision="float32", max_iterations=20)
SETTLED = ThreeBasil(precision="float32")
BFLOAT16 = ThreeBasil(precision="bfloat16")


class Case(NamedTuple):
    """A problem, and how it is solved."""

    problem: Callable[[], LinearProblem]
    solver: Solver = FLOAT32
    patch: Callable[[pytest.MonkeyPatch, Ranks], None] | None = None
    tolerance: float = 1e-3
    """Largest relative difference from the loss of one process. Products in bfloat16 round differently in parts, which
    moves some of the support, to the better or to the worse."""


def sparse_already(whole: bool) -> LinearProblem:
    """Return a problem whose weight obeys, or obeys but for its last row."""
    problem = made_problem(o=49)
    weight = problem.weight * problem.pattern.project(problem.weight)
    if not whole:
        weight[-1] = problem.weight[-1]
    return replace(problem, weight=weight)


def indefinite() -> LinearProblem:
    problem = made_problem(o=49)
    values, vectors = torch.linalg.eigh(problem.gram)
    values[:3] = -0.01 * problem.gram.diagonal().mean()
    return replace(problem, gram=vectors @ torch.diag(values) @ vectors.T)


def with_dead_inputs_and_rows() -> LinearProblem:
    problem = made_problem(o=49)
    gram, weight = problem.gram.clone(), problem.weight.clone()
    gram[8:12] = 0
    gram[:, 8:12] = 0
    weight[3:7] = 0
    return replace(problem, gram=gram, weight=weight)


def by_cholesky(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    """Find U by CholeskyQR2, as on a GPU."""
    enter_stage = AdmmState.enter_stage

    def start_with_cholesky(self: AdmmState, stage: int) -> None:
        self.qr_by_cholesky |= stage == 0
        enter_stage(self, stage)

    patch.setattr(AdmmState, "enter_stage", start_with_cholesky)


def by_cholesky_that_fails(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    by_cholesky(patch, ranks)

    def fail(matrix: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        return orthonormal_rows_by_cholesky(matrix * torch.tensor([[1.0], [0.0], [1.0], [1.0]]), ranks)

    patch.setattr(threebasil_state, "orthonormal_rows_by_cholesky", fail)


def tiles_on_rank_0(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    patch.setattr(ThreeBasil, "_tile_rows", lambda *_: 10 if ranks.rank == 0 else None)


def fused(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    patch.setattr(threebasil_fused, "DEVICES", {"cpu"})
    patch.setattr(threebasil_fused, "import_module", lambda name: StepInTorch())
    patch.setattr(threebasil_fused, "_verdicts", {})


def fused_on_rank_0(patch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    if ranks.rank == 0:
        fused(patch, ranks)


made = functools.partial(functools.partial, made_problem, o=49)
CASES = {
    "until it settles": Case(made(), ThreeBasil(precision="float32")),
    "1:4": Case(made(pattern="1:4", seed=1)),
    "60%/row": Case(made(pattern="60%/row")),
    "wide": Case(made(o=96, d=192, rank=16)),
    "rank 0": Case(made(rank=0)),
    "fewer rows on a rank than columns of U": Case(made(o=13, rank=9)),
    "a row or two each": Case(made(o=4, rank=3)),
    "rank above o": Case(made(o=4, rank=9)),
    "sparse already": Case(functools.partial(sparse_already, whole=True)),
    "sparse but for one row": Case(functools.partial(sparse_already, whole=False)),
    "dead inputs and rows": Case(with_dead_inputs_and_rows),
    "raised damping": Case(indefinite),
    "bfloat16": Case(made(), BFLOAT16, tolerance=0.15),
    "fused": Case(made(), BFLOAT16, fused, 0.15),
    "fused on one rank": Case(made(), BFLOAT16, fused_on_rank_0, 0.15),
    "series": Case(made(), replace(FLOAT32, inverses="series")),
    "CholeskyQR2": Case(made(), patch=by_cholesky),
    "CholeskyQR2 that fails": Case(made(), patch=by_cholesky_that_fails),
    "tiles on one rank": Case(made(), patch=tiles_on_rank_0),
    "magnitude": Case(made(rank=0), find_method("magnitude").solver),
    "wanda": Case(made(rank=0, pattern="60%/row"), find_method("wanda").solver),
    "sparsegpt": Case(made(rank=0), find_method("sparsegpt").solver),
}
PACKED = ("2:4", "1:4", "4:8", "2:5", "60%/row")


def solve(case: Case, ranks: Ranks = ALONE) -> SparseLowRank:
    """Solve this rank's rows of a case."""
    return solve_rows(case.problem(), case, ranks)


def solve_rows(problem: LinearProblem, case: Case, ranks: Ranks) -> SparseLowRank:
    rows = rows_of_ranks(len(problem.weight), ranks.world)[ranks.rank]
    with pytest.MonkeyPatch.context() as patch:
        if case.patch:
            case.patch(patch, ranks)
        return case.solver.solve(replace(problem, weight=problem.weight[rows], ranks=ranks))


class Compressed(NamedTuple):
    """A linear as `LinearCompressor.compress` leaves it."""

    tensors: dict[str, Tensor]
    record: LinearRecord
    live: Tensor


def compress(pattern: str, ranks: Ranks = ALONE, weight: Callable[[], Tensor] | None = None) -> Compressed:
    problem = made_problem(o=49, d=120, pattern=pattern)
    linear = nn.Linear(120, 49, bias=False, dtype=torch.bfloat16)
    specs: Any = {problem.name: LinearSpec(problem.pattern, problem.rank)}
    compressor = LinearCompressor(SETTLED, specs, seed=0, workspace=None)
    tensors, record = compressor.compress(
        problem.name, linear, weight or problem.weight.clone, problem.gram, torch.bfloat16, ranks=ranks
    )
    return Compressed(dict(tensors), record, linear.weight.detach())


def solve_sharing(ranks: Ranks) -> list[SparseLowRank]:
    """Solve three linears of one Gram matrix by rows; rank 0 solves another alone before each."""
    cache, found = GramCache(10**6), []
    for seed in range(3):
        problem = replace(made_problem(o=49, seed=seed), gram=made_problem().gram, cache=cache)
        if ranks.rank == 0 and seed != 1:
            FLOAT32.solve(problem)
        rows = rows_of_ranks(49, ranks.world)[ranks.rank]
        found.append(FLOAT32.solve(replace(problem, weight=problem.weight[rows], ranks=ranks)))
    return found


def count_flops(ranks: Ranks = ALONE) -> int:
    """Return the operations of products in 20 iterations on a 256×704 weight."""
    case, counter = Case(made(o=256, d=704, rank=16)), FlopCounterMode(display=False)
    problem = case.problem()
    with counter:
        solve_rows(problem, case, ranks)
    return int(counter.get_total_flops())


class Grown(NamedTuple):
    """An inverse that grew, its exact value, and the operations it took."""

    M: Tensor
    exact: Tensor
    flops: int


def grow(ranks: Ranks = ALONE) -> Grown:
    gram, eye = made_problem(d=100).gram.double(), torch.eye(100).double()
    M, exact = (rho * torch.linalg.inv(gram + rho * eye) for rho in (0.3, 0.375))
    M, counter = M.float(), FlopCounterMode(display=False)
    with counter:
        grow_(M, 1.25, ranks)
    return Grown(M, exact, int(counter.get_total_flops()))


def work_of_a_rank(ranks: Ranks) -> dict[str, Any]:
    """Return everything that a rank finds."""
    return {
        "solved": {name: solve(case, ranks) for name, case in CASES.items()},
        "again": solve(CASES["until it settles"], ranks),
        "sharing": solve_sharing(ranks),
        "packed": {pattern: compress(pattern, ranks) for pattern in PACKED},
        "flops": count_flops(ranks),
        "grown": grow(ranks),
    }


Found = list[dict[str, Any]]
"""What each rank found."""


@pytest.fixture(scope="module", params=long(2, 3))
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return StartedRanks(request.param, tmp_path_factory.mktemp("by_rows"), work_of_a_rank).results()


@pytest.fixture(scope="module")
def alone() -> dict[str, SparseLowRank]:
    """What one process finds."""
    return {name: solve(case) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_rows_together_are_as_good_as_the_whole(found: Found, alone: dict[str, SparseLowRank], name: str) -> None:
    parts = [rank["solved"][name] for rank in found]
    case, first = CASES[name], parts[0]
    problem = case.problem()
    together = replace(first, S=torch.cat([part.S for part in parts]), U=torch.cat([part.U for part in parts]))
    assert_valid(problem, together)
    assert error(problem, together) == pytest.approx(error(problem, alone[name]), rel=case.tolerance, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_of_rows_is_the_same_on_every_rank(found: Found, name: str) -> None:
    first, *others = (rank["solved"][name] for rank in found)
    for other in others:
        assert torch.equal(other.V, first.V)
        assert (other.iterations, other.damping, other.warnings) == (first.iterations, first.damping, first.warnings)


@pytest.mark.parametrize("name", CASES)
def test_the_user_is_told_what_one_process_tells(found: Found, alone: dict[str, SparseLowRank], name: str) -> None:
    solved = found[0]["solved"][name]
    assert solved.warnings == alone[name].warnings
    assert solved.damping == alone[name].damping


def test_factors_are_balanced_over_all_rows(found: Found) -> None:
    parts = [rank["solved"]["until it settles"] for rank in found]
    U, V = torch.cat([part.U for part in parts]), parts[0].V
    torch.testing.assert_close(U.t() @ U, V @ V.t(), rtol=1e-3, atol=1e-4 * float((V @ V.t()).max()))


def test_a_second_solve_gives_the_same_bits(found: Found) -> None:
    for rank in found:
        first, second = rank["solved"]["until it settles"], rank["again"]
        for part in ("S", "U", "V"):
            assert torch.equal(getattr(first, part), getattr(second, part))


def test_what_one_rank_left_in_its_cache_changes_nothing(found: Found) -> None:
    for seed in range(3):
        parts = [rank["sharing"][seed] for rank in found]
        problem = replace(made_problem(o=49, seed=seed), gram=made_problem().gram)
        S, U = torch.cat([part.S for part in parts]), torch.cat([part.U for part in parts])
        together = replace(parts[0], S=S, U=U)
        assert error(problem, together) == pytest.approx(error(problem, FLOAT32.solve(problem)), rel=1e-3)


def test_a_rank_multiplies_its_rows_only(found: Found) -> None:
    """Beside them only slim matrices [r, d] are multiplied with the Gram matrix and its inverse on each."""
    whole = count_flops()
    for rank in found:
        assert rank["flops"] < 1.3 * whole / len(found)


def test_ranks_share_the_products_of_the_series(found: Found) -> None:
    whole = grow()
    for rank in found:
        ours = rank["grown"]
        assert torch.equal(ours.M, found[0]["grown"].M)
        assert (ours.M.double() - ours.exact).norm() < 3e-5 * ours.exact.norm()
        assert ours.flops < 1.15 * whole.flops / len(found)


# Packed


@pytest.mark.parametrize("pattern", PACKED)
def test_every_rank_has_the_whole_packed_linear(found: Found, pattern: str) -> None:
    first, *others = (rank["packed"][pattern] for rank in found)
    for other in others:
        assert other.record == first.record
        assert torch.equal(other.live, first.live)
        assert other.tensors.keys() == first.tensors.keys()
        assert all(torch.equal(other.tensors[part], tensor) for part, tensor in first.tensors.items())


@pytest.mark.parametrize("pattern", PACKED)
def test_rows_packed_apart_are_what_packing_the_whole_gives(found: Found, pattern: str) -> None:
    compressed = found[0]["packed"][pattern]
    spec, shape = made_problem(pattern=pattern, d=120).pattern, (49, 120)
    whole = pack(unpack(compressed.tensors, spec, shape), spec, torch.bfloat16)
    assert all(torch.equal(compressed.tensors[part], tensor) for part, tensor in whole.items())
    assert torch.equal(compressed.live, merge(compressed.tensors, spec, shape, torch.bfloat16))


@pytest.mark.parametrize("pattern", PACKED)
def test_the_record_is_that_of_the_whole(found: Found, pattern: str) -> None:
    ours, alone = found[0]["packed"][pattern].record, compress(pattern).record
    assert ours.error == pytest.approx(
        alone.error, rel=1e-2 if pattern == "1:4" else 2e-3
    )  # last bits alone move 1:4 by 2.4e-3
    assert ours.wanda_error == pytest.approx(alone.wanda_error, rel=1e-9)
    assert ours.density == pytest.approx(alone.density, abs=1e-3)
    for field in ("name", "shape", "pattern", "rank", "damping", "nbytes", "dense_nbytes", "warnings"):
        assert getattr(ours, field) == getattr(alone, field)


def compress_one(ranks: Ranks) -> Compressed:
    return compress("2:4", ranks)


def test_two_ranks_compress_one_linear(tmp_path: Path) -> None:
    """The tests above in brief, for those who leave out the long ones."""
    first, second = StartedRanks(2, tmp_path, compress_one).results()
    assert first.record == second.record
    assert torch.equal(first.live, second.live)
    assert first.record.error == pytest.approx(compress("2:4").record.error, rel=2e-3)


# What is refused


def test_a_pattern_that_compares_rows_is_not_solved_by_rows() -> None:
    problem = replace(made_problem(pattern="50%"), ranks=Ranks(0, 2))
    with pytest.raises(InputError, match=r"made: pattern 50% compares weights of all rows, so 2 ranks cannot"):
        ThreeBasil().solve(problem)


def solve_with_a_bad_weight(ranks: Ranks) -> None:
    problem = made_problem()
    weight = problem.weight[rows_of_ranks(48, ranks.world)[ranks.rank]].clone()
    if ranks.rank == 1:
        weight[2, 5] = float("nan")
    FLOAT32.solve(replace(problem, weight=weight, ranks=ranks))


def test_a_bad_weight_on_one_rank_ends_all(tmp_path: Path) -> None:
    waiting, refused = StartedRanks(2, tmp_path, solve_with_a_bad_weight).results()
    reason = "layers.0.made: 1 of 1536 values of its weight are NaN or infinite"
    assert refused.startswith(f"InputError: {reason}")
    assert waiting.startswith(f"RankEndedError: rank 1 ended: {reason}")


def compress_without_memory(ranks: Ranks) -> None:
    def weight() -> Tensor:
        if ranks.rank == 1:
            raise MemoryError("no more")
        return made_problem(o=49, d=120).weight

    compress("2:4", ranks, weight)


def test_memory_that_runs_out_on_one_rank_ends_all(tmp_path: Path) -> None:
    """A rank that began anew would exchange other numbers than the others, which are in the midst of the solve."""
    waiting, ended = StartedRanks(2, tmp_path, compress_without_memory).results()
    assert ended == "MemoryError: no more"
    assert waiting.startswith("RankEndedError: rank 1 ended: no more")
