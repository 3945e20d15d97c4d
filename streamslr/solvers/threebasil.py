"""3BASiL in a fast form: one product of the weight's size an iteration finds S and U·V together (2603.01376)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from streamslr.errors import InputError
from streamslr.solvers.base import (
    LinearProblem,
    SparseLowRank,
    damping_warning,
    keep_weight,
    obeys_already,
    require_finite,
    validate,
)
from streamslr.solvers.threebasil_costs import solve_bytes, solve_flops, tile_rows_for
from streamslr.solvers.threebasil_fused import check_kernels, may_fuse
from streamslr.solvers.threebasil_metric import Metric, Pace, StageInverses, build_metric
from streamslr.solvers.threebasil_state import AdmmState
from streamslr.spec.pattern import SparsityPattern

# Iterations between two looks at the support.
_CHECK_EVERY = 5
# Iterations and stages of a typical linear at the default pace (tools/results/solver.md, "Pace").
_TYPICAL_ITERATIONS, _TYPICAL_STAGES = 225, 13
# ρ below which the support hardly moves yet, while U·V does: stages have fewer iterations there, each with two
# subspace steps (tools/results/solver.md, "Time").
_EARLY_RHO = 0.45
_EARLY_FRACTION, _EARLY_STEPS = 0.7, 2
# Device of a solve that is only planned, by `gpu`.
_DEVICES = {False: torch.device("cpu"), True: torch.device("cuda")}


@dataclass(frozen=True)
class ThreeBasil:
    """Sparse plus low rank by ADMM over two groups of variables, (S, U·V) and D (3BASiL, arXiv 2603.01376).

    Scaled by the inputs' saliency, with G the Gram matrix, Y the scaled dual and M = ρ (G + ρI)⁻¹, an iteration is

        U·V ← one subspace step towards the best rank-r fit of W − D + Y in the metric G M
        S   ← E + (D − Y − E) M,  E = W − U·V
        D   ← the projection of S + Y on the pattern
        Y   ← S + Y − D

    ρ is constant in a stage and grows from one stage to the next, and Y is divided by its growth. So ρ never falls and
    Σ 1/ρ converges, as the paper's proof asks. The iteration ends when the support D ≠ 0 has settled. The result is
    the projection of S + Y, and U·V the best fit of the rest of W.

    Three things differ from the paper; tools/results/solver.md ("Against the paper") has what each gains:

    - S and U·V are minimised together. Minimised over S, the augmented Lagrangian is ρ tr(R G (G + ρI)⁻¹ Rᵀ) with
      R = W − D + Y − U·V, a quadratic in U·V alone, so the fit above and then the step of S reach the minimum over
      both. The paper fits U·V to W − S after S, which leaves U·V only what S did not take. One subspace step an
      iteration, or two, from the last U·V, stands for the fit.
    - U·V starts as the best fit of W.
    - Inputs are scaled by s_j = [H⁻¹]_jj^-½, the saliency of Optimal Brain Surgeon; the paper takes H_jj^½. ρ then
      means the same in every linear and pattern: supports settle between ρ = 1 and 3.

    Deterministic for one seed, device, precision, tile and thread count.

    Ranks that solve a linear by rows have all state of their rows. They sum matrices of the size of U·V's factors and
    smaller, and the counts of the support. Each factors the Gram matrix for itself; on one machine they share the
    products of the series.

    Attributes:
        rho_start: First ρ, in units of the saliency.
        rho_growth: Factor on ρ from one stage to the next.
        stage_iterations: Iterations of a stage, 0.7 of them below ρ = 0.45 where there is U·V; more of them, or a
            smaller growth, lower the loss and take longer.
        stop_fraction: The support has settled when one iteration moves less than this fraction of it.
        max_iterations: Iterations after which a support that has not settled is taken as it is, with a warning.
        precision: Precision of the products with the weight's size, "bfloat16" or "float32"; "auto" takes bfloat16
            where the hardware multiplies it several times faster (AMX, CUDA from compute capability 8.0).
        inverses: How M comes from one stage to the next, by a "series" in the last M or a Cholesky "factor"; "auto"
            takes the series on CUDA (tools/results/solver.md, "Inverses").
        tile_rows: Rows of the weight worked on at a time, None for all: less memory, more time, the same steps but for
            rounding (tools/results/solver.md, "Rounding and precision"). `LinearProblem.workspace` chooses them where
            this is None.
    """

    rho_start: float = 0.2
    rho_growth: float = 1.25
    stage_iterations: int = 20
    stop_fraction: float = 5e-4
    max_iterations: int = 1000
    precision: str = "auto"
    tile_rows: int | None = None
    inverses: str = "auto"

    def solve(self, problem: LinearProblem) -> SparseLowRank:
        """Return S, U and V for the problem.

        Raises:
            InputError: The problem has no solution, or a setting of this solver is impossible.
        """
        if self.tile_rows is not None and self.tile_rows < 1:
            raise InputError(f"tile_rows {self.tile_rows} must be at least 1; use None for all rows at once")
        rank, warnings = validate(problem)
        if obeys_already(problem):
            return keep_weight(problem, rank, warnings)
        device, (o, d) = problem.weight.device, problem.weight.shape
        metric, inverses = self._metric_and_inverses(problem)
        if metric.damping > 1:
            warnings.append(damping_warning(problem.name, metric.damping))
        self.check_kernels(device, [problem.pattern])
        tile_rows = self._tile_rows(o, d, rank, problem.workspace, problem.pattern, device.type == "cuda")
        state = AdmmState(problem, metric, rank, inverses, tile_rows)
        settled, last_stage = self._iterate(state)
        if state.qr_gave_up:
            warnings.append(f"{problem.name}: directions of U·V were nearly dependent; they needed Householder's QR")
        if not settled:
            warnings.append(f"{problem.name}: the support had not settled after {state.iterations} iterations")
        for stage, error in inverses.refactored.items():
            if stage <= last_stage:
                warnings.append(
                    f"{problem.name}: stage {stage} needed a Cholesky factor; the inverse grown from the last stage's "
                    f"was off by {error:.2g}"
                )
        S, U, V = state.finish()
        require_finite(problem, S, U, V)
        return SparseLowRank(S, U, V, state.iterations, metric.damping, tuple(warnings))

    def _metric_and_inverses(self, problem: LinearProblem) -> tuple[Metric, StageInverses]:
        """Return the metric and M of its stages: those of an earlier linear with the same Gram matrix, if any."""
        cache, ranks = problem.cache, problem.ranks
        kept: tuple[Metric, StageInverses] | None = None if cache is None else cache.kept
        if kept and kept[1].ranks != ranks:
            kept = None
        missing = ranks.sum(kept is None)
        if kept and not missing:
            return kept
        device, pace = problem.gram.device, Pace(self.rho_start, self.rho_growth)
        keep_bytes = min(ranks.gather(0 if cache is None else cache.keep_bytes))
        metric = build_metric(problem, [])
        inverses = StageInverses(metric, pace, self.product_dtype(device), self.by_series(device), keep_bytes, ranks)
        if cache is not None:
            cache.kept = metric, inverses
        return metric, inverses

    def _iterate(self, state: AdmmState) -> tuple[bool, int]:
        """Iterate until the support has settled, or `max_iterations`; return whether it has, and the last stage."""
        rho, stage, first = self.rho_start, 0, 0  # first: iterations before the stage
        state.enter_stage(stage)
        while state.iterations < self.max_iterations:
            early = rho < _EARLY_RHO and len(state.U) > 0  # without U·V only more iterations help
            iteration = state.iterations + 1
            length = math.ceil(_EARLY_FRACTION * self.stage_iterations) if early else self.stage_iterations
            stage_ends = iteration - first == length
            checks = iteration % _CHECK_EVERY == 0

            for _ in range(_EARLY_STEPS if early else 1):
                state.update_low_rank()
            moved = state.update_sparse(dual_scale=1 / self.rho_growth if stage_ends else 1.0, count_moved=checks)
            if checks and moved < self.stop_fraction:
                return True, stage
            if stage_ends:
                rho, stage, first = rho * self.rho_growth, stage + 1, iteration
                state.enter_stage(stage)
        return False, stage

    def peak_bytes(
        self, o: int, d: int, rank: int, workspace: int | None = None, *, pattern: SparsityPattern, gpu: bool = False
    ) -> int:
        """Return `solve_bytes` for the tiles that the solver takes in this workspace."""
        tile_rows = self._tile_rows(o, d, rank, workspace, pattern, gpu)
        return solve_bytes(o, d, rank, tile_rows, by_row=pattern.by_row, gpu=gpu, fused=self._fuses(pattern, gpu))

    def flops(self, o: int, d: int, rank: int, *, gpu: bool = False, ranks: int = 1) -> float:
        """Return the floating point operations of a typical linear at the default pace, of each of `ranks` ranks."""
        grown = _TYPICAL_STAGES - 1 if self.by_series(_DEVICES[gpu]) else 0
        factored = _TYPICAL_STAGES + 1 - grown  # with that of the metric
        return float(solve_flops(o, d, rank, _TYPICAL_ITERATIONS, factored, grown, gpu=gpu, ranks=ranks))

    def check_kernels(self, device: torch.device, patterns: Iterable[SparsityPattern]) -> None:
        """Compile and check the kernels of these patterns on a device, so that `peak_bytes` knows which are used."""
        if self.product_dtype(device) == torch.bfloat16:
            check_kernels(device, patterns)

    def _tile_rows(
        self, o: int, d: int, rank: int, workspace: int | None, pattern: SparsityPattern, gpu: bool
    ) -> int | None:
        if self.tile_rows is not None or workspace is None:
            return self.tile_rows
        fused = self._fuses(pattern, gpu)
        return tile_rows_for(o, d, rank, workspace, by_row=pattern.by_row, gpu=gpu, fused=fused)

    def _fuses(self, pattern: SparsityPattern, gpu: bool) -> bool:
        return gpu and self.product_dtype(_DEVICES[gpu]) == torch.bfloat16 and may_fuse(pattern)

    def by_series(self, device: torch.device) -> bool:
        """Return True where M comes from that of the stage before."""
        if self.inverses not in ("auto", "series", "factor"):
            raise InputError(f'inverses {self.inverses!r} is not known; use "auto", "series" or "factor"')
        return self.inverses == "series" or (self.inverses == "auto" and device.type == "cuda")

    def product_dtype(self, device: torch.device) -> torch.dtype:
        """Return the precision of the products with the weight's size on a device."""
        if self.precision not in ("auto", "bfloat16", "float32"):
            raise InputError(f'precision {self.precision!r} is not known; use "auto", "bfloat16" or "float32"')
        low = self.precision == "bfloat16" or (self.precision == "auto" and _multiplies_bfloat16_faster(device))
        return torch.bfloat16 if low else torch.float32


def _multiplies_bfloat16_faster(device: torch.device) -> bool:
    """Return True where bfloat16 products run several times faster than float32 (AMX: 5 times, solver.md).

    A GPU that this machine lacks is taken to do so.
    """
    if device.type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and has_amx is not None and bool(has_amx())
