"""The fused step of 3BASiL against torch's passes: on a GPU as compiled, elsewhere through Triton's interpreter."""

import importlib.util
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from streamslr.solvers import ThreeBasil, threebasil_fused
from streamslr.solvers.threebasil_fused import FusedState, check_kernels, describe, fused_state, step_in_torch
from streamslr.solvers.threebasil_metric import Pace, StageInverses, build_metric
from streamslr.solvers.threebasil_state import AdmmState
from streamslr.spec.pattern import NofM, parse_pattern
from tests import reference
from tests.support.fused_step import StepInTorch
from tests.support.markers import slow
from tests.support.problems import assert_valid, error, made_problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed, so the fused step was not run"
)
CPU, BFLOAT16 = torch.device("cpu"), ThreeBasil(precision="bfloat16")


@pytest.fixture(autouse=True)
def _no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test check the kernel anew."""
    monkeypatch.setattr(threebasil_fused, "_verdicts", {})


@pytest.fixture
def _on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the fused step on the CPU too."""
    monkeypatch.setattr(threebasil_fused, "DEVICES", {"cuda", "cpu"})


def made_step(o: int, d: int, rank: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Make Z, W, the product, U and Q of a step."""
    generator = torch.Generator().manual_seed(seed)
    Z, W, C, U, Q = (
        torch.randn(shape, generator=generator) for shape in ((o, d), (o, d), (o, d), (o, rank), (d, rank))
    )
    return tuple(tensor.to(DEVICE) for tensor in (Z, W, C.bfloat16(), U, Q))


@needs_triton
@pytest.mark.parametrize(
    ("o", "d", "rank"),
    [(64, 64, 32), *slow((1, 64, 0), (3, 192, 1), (130, 64, 5), (65, 320, 64)), (70, 160, 40)],
)
@pytest.mark.parametrize("pattern", ["2:4", *slow("1:4", "3:4", "1:2", "7:8", "1:16", "5:32"), "4:8"])
def test_the_kernel_does_the_step_of_torch(pattern: str, o: int, d: int, rank: int) -> None:
    Z, W, product, U, Q = made_step(o, d, rank)
    n_of_m = parse_pattern(pattern)
    assert isinstance(n_of_m, NofM)
    scale = torch.linspace(0.5, 2, d, device=DEVICE)
    state = FusedState(W, scale, Z.clone(), n_of_m)
    state.Z.copy_(Z)
    counts = state.update_rows(slice(0, o), product, U, Q, 0.8, True).sum(0)
    expected_Z, expected_T, expected_counts = step_in_torch(Z, W * scale, product, U, Q, n_of_m, 0.8)
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(state.Z, expected_Z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.input, expected_T, rtol=2**-7, atol=1e-5)  # the interpreter cuts off, so one place


@needs_triton
@pytest.mark.parametrize("pattern", ["2:4", *slow("1:4", "4:8", "9:16")])
@pytest.mark.parametrize("weight_dtype", [torch.float32, *slow(torch.bfloat16, torch.float16)])
def test_equal_magnitudes_are_kept_as_in_torch(pattern: str, weight_dtype: torch.dtype) -> None:
    n_of_m = parse_pattern(pattern)
    assert isinstance(n_of_m, NofM)
    assert threebasil_fused._fault_of_kernel(n_of_m, torch.device(DEVICE), weight_dtype) is None


@needs_triton
def test_factors_may_be_stored_either_way() -> None:
    Z, W, product, U, Q = made_step(70, 96, 24)
    scale = torch.ones(96, device=DEVICE)
    found = []
    for left, right in ((U, Q), (U.t().contiguous().t(), Q.t().contiguous().t())):
        state = FusedState(W, scale, Z.clone(), NofM(2, 4))
        state.update_rows(slice(0, 70), product, left, right, 1.0, False)
        found.append(state.Z)
    assert torch.equal(*found)


# In a solve


def fused_admm(rank: int, tile_rows: int | None = None, o: int = 48) -> AdmmState:
    problem = made_problem(o=o, rank=rank)
    problem = type(problem)(problem.name, problem.weight.to(DEVICE), problem.gram.to(DEVICE), problem.pattern, rank)
    metric = build_metric(problem, [])
    inverses = StageInverses(metric, Pace(0.7, 1.25), torch.bfloat16, by_series=False)
    state = AdmmState(problem, metric, rank, inverses, tile_rows)
    assert state.fused
    state.enter_stage(0)
    return state


def projection_and_dual(state: AdmmState) -> tuple[Tensor, Tensor]:
    """Return D and Y [o, d] in float64 of the state between two steps."""
    assert state.fused
    Z = state.fused.Z.cpu()
    D = Z * state.pattern.project(Z)
    return D.double(), (Z - D).double()


@needs_triton
@pytest.mark.usefixtures("_on_any_device")
def test_the_fused_step_is_the_textbook_step() -> None:
    state = fused_admm(rank=4)
    G = state.metric.times(torch.eye(64, device=DEVICE)).double().cpu()
    W = (state.weight * state.scale).double().cpu()
    D, Y = projection_and_dual(state)
    assert not Y.any()
    for _ in range(4):
        state.update_low_rank()
        S = reference.sparse_step(W, (state.U.t() @ state.B).double().cpu(), D, Y, G, 0.7)
        sums, before = S + Y, D
        moved = state.update_sparse(count_moved=True)
        D, Y = projection_and_dual(state)
        assert (D + Y - sums).norm() < 0.01 * sums.norm()  # bfloat16 has 8 bits
        assert moved == pytest.approx(((before != 0) != (D != 0)).sum().item() / (D != 0).sum().item())


@needs_triton
@pytest.mark.usefixtures("_on_any_device")
def test_the_dual_is_rescaled_when_rho_changes() -> None:
    plain, shrunk = fused_admm(rank=0), fused_admm(rank=0)
    for state, dual_scale in ((plain, 1.0), (shrunk, 0.8)):
        state.update_sparse()
        state.update_sparse(dual_scale=dual_scale)
    (D, Y), (D_shrunk, Y_shrunk) = projection_and_dual(plain), projection_and_dual(shrunk)
    assert torch.equal(D_shrunk, D)
    torch.testing.assert_close(Y_shrunk, 0.8 * Y, rtol=1e-6, atol=0)


@needs_triton
@pytest.mark.usefixtures("_on_any_device")
def test_rows_multiplied_in_parts_give_the_same_steps() -> None:
    whole, parts = fused_admm(rank=4), fused_admm(rank=4, tile_rows=20)
    for state in (whole, parts):
        state.update_low_rank()
        state.update_sparse()
    assert whole.fused
    assert parts.fused
    assert len(parts.fused.rows) == 3
    torch.testing.assert_close(parts.fused.Z, whole.fused.Z, rtol=0, atol=0.01 * whole.fused.Z.abs().max().item())


@pytest.mark.usefixtures("_on_any_device")
@pytest.mark.parametrize("pattern", ["2:4", *slow("1:4", "4:8")])
@pytest.mark.parametrize("rank", [4, *slow(0)])
def test_the_fused_step_costs_no_loss(pattern: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `step_in_torch` in the kernel's place: whole solves would take minutes in the interpreter.

    One problem alone differs by 4 %, either way.
    """
    monkeypatch.setattr(threebasil_fused, "import_module", lambda name: StepInTorch())
    problems = [made_problem(pattern=pattern, rank=rank, seed=seed) for seed in range(8)]
    fused = [BFLOAT16.solve(problem) for problem in problems]
    assert describe(CPU) == {pattern: "fused"}
    for problem, result in zip(problems, fused, strict=True):
        assert_valid(problem, result)
    monkeypatch.setattr(threebasil_fused, "DEVICES", set())
    plain = [BFLOAT16.solve(problem) for problem in problems]
    ours, theirs = (sum(map(error, problems, results)) for results in (fused, plain))
    assert ours <= 1.03 * theirs


@needs_triton
@pytest.mark.usefixtures("_on_any_device")
def test_a_fused_solve_is_deterministic_and_leaves_the_problem_as_it_was() -> None:
    problem = made_problem()
    weight, gram = problem.weight.clone(), problem.gram.clone()
    solver = ThreeBasil(precision="bfloat16", max_iterations=7)
    first, second = solver.solve(problem), solver.solve(problem)
    for name in ("S", "U", "V"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert torch.equal(problem.weight, weight)
    assert torch.equal(problem.gram, gram)


# Where torch's passes do it


def state_for(pattern: str, dtype: torch.dtype = torch.bfloat16, tile_rows: int | None = None) -> FusedState | None:
    weight = made_problem(o=512).weight
    return fused_state(weight, torch.ones(64), weight.clone(), parse_pattern(pattern), dtype, tile_rows)


@pytest.mark.usefixtures("_on_any_device")
@pytest.mark.parametrize(
    ("pattern", "dtype", "tile_rows"),
    [
        ("50%", torch.bfloat16, None),
        ("50%/row", torch.bfloat16, None),
        ("3:6", torch.bfloat16, None),
        ("2:64", torch.bfloat16, None),
        ("2:4", torch.float32, None),
        ("2:4", torch.bfloat16, 64),  # tiles that take less than the fused state
    ],
)
def test_other_solves_take_the_passes_of_torch(pattern: str, dtype: torch.dtype, tile_rows: int | None) -> None:
    assert state_for(pattern, dtype, tile_rows) is None
    assert describe(CPU) == {}


def test_a_cpu_takes_the_passes_of_torch() -> None:
    assert state_for("2:4") is None
    assert describe(CPU) == {}


@pytest.mark.usefixtures("_on_any_device")
def test_without_triton_torch_does_it_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def import_module(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(threebasil_fused, "import_module", import_module)
    with caplog.at_level(logging.WARNING, "streamslr"):
        assert state_for("2:4") is None
        assert state_for("2:4") is None
    assert caplog.messages == [
        "3basil at 2:4: the fused step is not used, so a solve takes longer: Triton is not installed"
    ]
    assert describe(CPU) == {"2:4": "torch: Triton is not installed"}


class BrokenKernel:
    """A module of kernels that raise, or that do nothing."""

    def __init__(self, fault: Exception | None) -> None:
        self.fault, self.sparse_step = fault, self

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **settings: Any) -> None:
            if self.fault:
                raise self.fault

        return launch


@pytest.mark.usefixtures("_on_any_device")
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (RuntimeError("Failed to find C compiler\nset CC"), "RuntimeError: Failed to find C compiler"),
        (None, "gave other values than torch"),
    ],
)
def test_a_kernel_that_fails_its_check_is_not_used(
    monkeypatch: pytest.MonkeyPatch, fault: Exception | None, reason: str
) -> None:
    monkeypatch.setattr(threebasil_fused, "import_module", lambda name: BrokenKernel(fault))
    problem = made_problem()
    assert_valid(problem, BFLOAT16.solve(problem))
    assert reason in describe(CPU)["2:4"]


@pytest.mark.usefixtures("_on_any_device")
def test_memory_that_ran_out_in_the_check_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threebasil_fused, "import_module", lambda name: BrokenKernel(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        state_for("2:4")
    assert describe(CPU) == {}


# What the plan knows of it


def planned(pattern: str) -> int:
    return ThreeBasil().peak_bytes(4096, 1024, 16, pattern=parse_pattern(pattern), gpu=True)


def test_a_gpu_that_is_only_planned_for_has_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert planned("2:4") < planned("3:6") == planned("50%/row")


@pytest.mark.usefixtures("_on_any_device")
def test_a_kernel_that_failed_its_check_is_not_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(threebasil_fused, "_fault_of_kernel", lambda pattern, *_: "broken" if pattern.m == 8 else None)
    check_kernels(torch.device("cuda", 0), map(parse_pattern, ("2:4", "4:8", "50%")))
    assert describe(torch.device("cuda", 0)) == {"2:4": "fused", "4:8": "torch: broken"}
    assert planned("2:4") < planned("4:8") == planned("50%/row")
