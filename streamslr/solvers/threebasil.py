"""3BASiL in the fast form: one product an iteration finds S and U·V together (arXiv 2603.01376)."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from streamslr.errors import InputError, StreamslrError
from streamslr.solvers.base import (
    Damping,
    LinearProblem,
    SparseLowRank,
    damp_until_positive_definite,
    keep_weight,
    require_finite,
    validate,
)
from streamslr.solvers.low_rank import balance_factors

# Elements of a slice of the elementwise passes: on the CPU five float32 slices stay in a 2 MiB cache; on a GPU
# they fill the device, and the temporaries of the projection stay small (size chosen, not measured).
_SLICE, _SLICE_ON_GPU = 1 << 16, 1 << 22
# Rows of the smallest tile, and the step between tile sizes.
SMALLEST_TILE = 64
# Subspace steps where accuracy is worth more than time: for the start and for the last fit of U·V.
_CAREFUL_STEPS = 4
# Bytes that MKL and oneDNN pack operands into, and that malloc leaves between buffers (measured, 1024 to 4096).
_LIBRARY_SCRATCH = 32 << 20
# The support is looked at every so many iterations.
_CHECK_EVERY = 5


@dataclass(frozen=True)
class ThreeBasil:
    """Sparse plus low rank by ADMM in two blocks, (S, U·V) and D, in the metric of the linear's inputs.

    Per iteration, with D the projection of S + Y on the pattern, G the scaled Gram matrix, M = ρ (G + ρI)⁻¹:
    U·V is the best rank-r fit of W − D + Y in the metric G M; S = E + (D − Y − E) M for E = W − UV; then D and Y.
    ρ is constant in stages and grows from one to the next, so it never falls and Σ 1/ρ converges, as the paper's
    proof asks. Where this leaves the paper (numbers: mean loss ours / official code over every sixth linear of
    the 8 M reference model at 2:4 + 16 and 1:4 + 8; as it is: 0.51 and 0.86):

    - S and U·V are minimised together. The paper fits U·V to W − S after S has taken its share, so that U·V
      creeps (0.79 and 0.91; at the pace of `stage_iterations` 8 and `rho_growth` 1.35 0.98 and 0.97, ours
      0.56 and 0.88). What the minimum over S leaves of the augmented Lagrangian for U·V is ρ tr(R G (G + ρI)⁻¹ Rᵀ),
      R = W − D + Y − UV; one warm subspace step an iteration fits it as well as two.
    - U·V starts as the best fit of W alone (from a random start: 0.55 and 0.86).
    - Inputs are scaled by s_j = [H⁻¹]_jj^-½, the saliency of Optimal Brain Surgeon, where the paper takes
      H_jj^½ (0.53 and 0.87). ρ then means the same in every linear and pattern: supports settle between
      ρ = 1 and 3.

    rho_start, rho_growth, stage_iterations: ρ in units of that saliency, its factor between stages, and how
    many iterations a stage has; slower is better (tools/results/solver.md has the frontier). stop_share: stop
    once fewer of the kept positions than this share moved in one iteration. precision: of the products with the
    weight's size, "bfloat16" or "float32"; "auto" takes bfloat16 where the hardware multiplies it several times
    faster (AMX, CUDA 8.0 on).

    tile_rows: rows of the weight that are worked on at a time, None for all: less memory, more time, the same
    steps but for rounding. U·V makes much of rounding (a weight changed by 1e-7 ends with 14 % of its support
    elsewhere and a loss within 0.2 % at 640×256 and 2:4 + 16); without U·V the result is the same.

    Deterministic for a seed on one device, precision, tile and thread count. Memory: `solve_bytes`.
    """

    rho_start: float = 0.2
    rho_growth: float = 1.25
    stage_iterations: int = 20
    stop_share: float = 5e-4
    max_iterations: int = 1000
    precision: str = "auto"
    tile_rows: int | None = None

    def solve(self, problem: LinearProblem) -> SparseLowRank:
        """Raises InputError, naming the linear, for a problem that has no solution (shapes, NaN, no Gram)."""
        if self.tile_rows is not None and self.tile_rows < 1:
            raise InputError(f"tile_rows {self.tile_rows} must be at least 1; use None for all rows at once")
        rank, warnings = validate(problem)
        if problem.pattern.check(problem.weight != 0) is None:
            return keep_weight(problem, rank, warnings)
        metric = _metric(problem, warnings)
        low = torch.bfloat16 if self._low_precision(problem.weight.device) else torch.float32
        state = _Admm(problem, metric, rank, low, self._tile_rows(problem, rank))
        if not self._iterate(state):
            warnings.append(f"{problem.name}: the support had not settled after {state.iterations} iterations")
        S, U, V = state.finish()
        require_finite(problem, S, U, V)
        return SparseLowRank(S, U, V, state.iterations, metric.damping, tuple(warnings))

    def peak_bytes(
        self, o: int, d: int, rank: int, workspace: int | None = None, *, by_row: bool = False, gpu: bool = False
    ) -> int:
        """`solve_bytes` of the tiles that the solver takes for this workspace."""
        tile = self.tile_rows
        if tile is None and workspace is not None:
            tile = tile_rows_for(o, d, rank, workspace, by_row=by_row, gpu=gpu)
        return solve_bytes(o, d, rank, tile, by_row=by_row, gpu=gpu)

    def flops(self, o: int, d: int, rank: int) -> float:
        """Of a typical linear: means of 220 to 280 iterations were seen on the reference model."""
        return float(solve_flops(o, d, rank, 250))

    def _iterate(self, state: "_Admm") -> bool:
        """Runs until the support has settled; False if it has not."""
        rho = self.rho_start
        state.set_inverse(rho)
        while state.iterations < self.max_iterations:
            stage_ends = (state.iterations + 1) % self.stage_iterations == 0
            state.low_rank_step()
            looks = (state.iterations + 1) % _CHECK_EVERY == 0
            moved = state.sparse_step(shrink=1 / self.rho_growth if stage_ends else 1.0, counts=looks)
            if looks and moved < self.stop_share:
                return True
            if stage_ends:
                rho *= self.rho_growth
                state.set_inverse(rho)
        return False

    def _tile_rows(self, problem: LinearProblem, rank: int) -> int | None:
        if self.tile_rows is not None or problem.workspace is None:
            return self.tile_rows
        o, d = problem.weight.shape
        gpu = problem.weight.device.type == "cuda"
        return tile_rows_for(o, d, rank, problem.workspace, by_row=problem.pattern.by_row, gpu=gpu)

    def _low_precision(self, device: torch.device) -> bool:
        if self.precision not in ("auto", "bfloat16", "float32"):
            raise InputError(f'precision {self.precision!r} is not known; use "auto", "bfloat16" or "float32"')
        return self.precision == "bfloat16" or (self.precision == "auto" and _multiplies_bfloat16(device))


def solve_bytes(
    o: int,
    d: int,
    rank: int,
    tile_rows: int | None = None,
    *,
    by_row: bool = False,
    gpu: bool = False,
) -> int:
    """Peak bytes that one solve of a weight [o, d] takes beside its weight and Gram matrix; its S is among them.

    All rows at once: 4 float32 copies of the weight (scaled W, the correction's input X, the projection D, and
    the product with its input at bfloat16, or the product alone at float32). In tiles: of all rows the state
    and the support, 5 bytes a weight; of one tile X, the product and its input, 8. The last projection of a
    pattern that couples rows (any that is not `by_row`) takes 10 bytes a weight. Besides: the inverse
    [d, d], on a GPU with two more while it is built; the factors of U·V and what turns them; a slice's temporaries;
    what the libraries pack into. The defaults are what takes most on a CPU.
    """
    t = o if tile_rows is None else min(tile_rows, o)
    state = 16 * o * d if t == o else 5 * o * d + 8 * t * d
    inverse = 4 * d * d * (3 if gpu else 1)
    factors = 4 * 8 * (o + d) * max(rank, 1)
    temporaries = 5 * 4 * min(t * d, _SLICE_ON_GPU if gpu else _SLICE)
    scratch = min(_LIBRARY_SCRATCH, 4 * d * (t + d))
    projecting = 0 if by_row else 10 * o * d
    return max(state + inverse + temporaries + factors, projecting + factors // 4) + scratch


def tile_rows_for(
    o: int,
    d: int,
    rank: int,
    workspace: int,
    *,
    by_row: bool = False,
    gpu: bool = False,
) -> int | None:
    """The most rows a tile, a multiple of 64, with which one solve takes at most `workspace` bytes; None for all.

    64 also where that still takes more: compare with `solve_bytes`, whose other arguments these are.
    """

    def fits(tile_rows: int | None) -> bool:
        return solve_bytes(o, d, rank, tile_rows, by_row=by_row, gpu=gpu) <= workspace

    if fits(None) or o <= SMALLEST_TILE:
        return None
    low, high = 1, (o - 1) // SMALLEST_TILE  # in steps; a tile takes more with every row
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * SMALLEST_TILE) else (low, middle - 1)
    return low * SMALLEST_TILE


def solve_flops(o: int, d: int, rank: int, iterations: int) -> int:
    """Floating point operations of one solve: products, the inverse of each stage, and the elementwise work."""
    product = 2 * o * d * d
    low_rank = 6 * o * d * rank + 4 * d * d * rank + 8 * o * rank * rank
    stages = math.ceil(iterations / ThreeBasil.stage_iterations) + 1
    return iterations * (product + low_rank + 20 * o * d) + stages * d**3


@dataclass(frozen=True)
class _Metric:
    """G = diag(1/scale) (gram + diag(added)) diag(1/scale), [d, d], never formed but inside `inverse`."""

    gram: Tensor  # [d, d] undamped, the problem's own
    added: Tensor  # [d]
    scale: Tensor  # [d]
    dead: Tensor  # [d] bool
    damping: float

    def times(self, y: Tensor) -> Tensor:
        """G @ y for y [d, k]."""
        y = y / self.scale[:, None]
        return torch.addcmul(self.gram @ y, self.added[:, None], y).div_(self.scale[:, None])

    def inverse(self, rho: float, out: Tensor | None = None) -> Tensor | None:
        """ρ (G + ρI)⁻¹, float32 [d, d], for ρ > 0, G⁻¹ for 0; None without a Cholesky factor."""
        matrix = torch.div(self.gram, self.scale, out=out)
        matrix.div_(self.scale[:, None])
        matrix.diagonal().add_(self.added / self.scale.square() + rho)
        inverse = _inverse_(matrix)
        return inverse if inverse is None or rho == 0 else inverse.mul_(rho)


@dataclass(frozen=True)
class _Tile:
    """t rows of W, transposed like all of the state; X, input, C and D are memory that the tiles share."""

    rows: slice
    X: Tensor  # [d, t] T = Y − D + W between steps where the tile is the whole linear; T − B Uᵀ within one
    input: Tensor  # [d, t] X in the precision of the products
    C: Tensor  # [d, t] the product (T − B Uᵀ) M, in that precision
    held: Tensor  # [d, t] W where the tile is the whole linear, else D − Y, from step to step
    slices: list["_Slice"]


class _Slice(NamedTuple):
    """Whole groups of a tile, k of its d inputs, for the elementwise passes."""

    X: Tensor  # [k, t] as are all but the last
    input: Tensor
    C: Tensor
    D: Tensor  # the projection; stays where the tile is the whole linear, else scratch
    held: Tensor
    support: Tensor | None  # bool, where D does not stay to tell
    scale: Tensor  # [k, 1]


class _Admm:
    """The iteration's state, transposed: [d, o], so that a group of weights is a group of rows.

    Rows are contiguous, and comparing the members of a group runs at the speed of memory. T = Y − D + W, and
    T − B Uᵀ with B Uᵀ = (U·V)ᵀ is the negated correction D − Y − E.
    """

    def __init__(
        self, problem: LinearProblem, metric: _Metric, rank: int, low: torch.dtype, tile_rows: int | None = None
    ) -> None:
        self.name, self.pattern, self.metric, self.low = problem.name, problem.pattern, metric, low
        self.iterations = 0
        self.weight = problem.weight  # [o, d], not scaled
        self.scale = metric.scale.masked_fill(metric.dead, 0)
        o, d = self.weight.shape
        generator = torch.Generator().manual_seed(problem.seed)
        U = torch.randn(o, rank, generator=generator).to(self.weight)  # on the CPU: the same start on every device
        self.U = torch.linalg.qr(U).Q if rank else U  # [o, r], orthonormal
        self.B = self.weight.new_zeros(d, rank)
        self._fit()
        self.store = torch.mul(self.weight, self.scale).addmm_(self.U, self.B.t(), alpha=-1)  # [o, d] E, for now
        self.marker = problem.pattern.marker(self.store)
        self.whole = tile_rows is None or tile_rows >= o
        self.tiles = self._tiles(o if tile_rows is None else min(tile_rows, o))
        for tile in self.tiles:
            tile.X.copy_(self.store[tile.rows].t())
            if self.whole:
                tile.held.copy_(self.weight.t()).mul_(self.scale[:, None])
            for part in tile.slices:
                torch.mul(part.X, self.marker.mark_(part.X.abs().t(), tile.rows).t(), out=part.D)
                torch.neg(part.D, out=part.X)
                self._lay_down(part)
        self.marker.settle()
        self.buffer = torch.empty(d, d, device=self.weight.device)
        self.M = self.buffer  # ρ (G + ρI)⁻¹, after set_inverse

    def _tiles(self, tile_rows: int) -> list[_Tile]:
        """Tiles over the store, each in slices that are small enough for the cache."""
        o, d = self.weight.shape
        elements = _SLICE if self.weight.device.type == "cpu" else _SLICE_ON_GPU
        k = min(d, max(1, elements // (tile_rows * self.marker.group)) * self.marker.group)
        shared_X = self.weight.new_empty(d * tile_rows)
        shared_D = self.weight.new_empty((d if self.whole else k) * tile_rows)
        shared_C = torch.empty_like(shared_X, dtype=self.low)
        shared_input = shared_X if self.low == torch.float32 else torch.empty_like(shared_C)
        tiles = []
        for first in range(0, o, tile_rows):
            rows = slice(first, min(first + tile_rows, o))
            t = rows.stop - first
            X, low_X, C = (shared[: d * t].view(d, t) for shared in (shared_X, shared_input, shared_C))
            D = shared_D[: shared_D.numel() // tile_rows * t].view(-1, t)
            held = self.store[rows].view(d, t)
            support = None if self.whole else torch.empty_like(X, dtype=torch.bool)
            slices = []
            for at in (slice(first, min(first + k, d)) for first in range(0, d, k)):
                part_D = D[at] if self.whole else D[: at.stop - at.start]
                part_support = None if support is None else support[at]
                slices.append(_Slice(X[at], low_X[at], C[at], part_D, held[at], part_support, self.scale[at, None]))
            tiles.append(_Tile(rows, X, low_X, C, held, slices))
        return tiles

    def _lay_down(self, part: _Slice) -> None:
        """Keeps what is in X, Y − D, and the support of D until the next step: as T, or in what is held."""
        if part.support is None:
            part.X.add_(part.held)
            if part.input.dtype != part.X.dtype:
                part.input.copy_(part.X)
        else:
            torch.neg(part.X, out=part.held)
            part.support.copy_(part.D)

    def _projection(self, part: _Slice) -> Tensor:
        """D as the last step left it."""
        return part.D if part.support is None else torch.mul(part.held, part.support, out=part.D)

    def set_inverse(self, rho: float) -> None:
        inverse = self.metric.inverse(rho, self.buffer)
        if inverse is None:  # G has a factor, so G + ρI has one
            raise StreamslrError(f"{self.name}: G + {rho:g}·I lost its Cholesky factor; report this as a bug")
        if self.low == torch.float32:
            self.M = inverse
        else:  # into the front of its own memory, behind the rows that are still to be read
            self.M = self.buffer.view(self.low).view(-1)[: inverse.numel()].view_as(inverse)
            for rows in range(0, len(inverse), 64):
                self.M[rows : rows + 64] = inverse[rows : rows + 64].to(self.low)

    def low_rank_step(self) -> None:
        """U·V ← the best fit of T in the metric G M: U for the V of before, then V for this U."""
        if not self.U.shape[1]:
            return
        y = self.metric.times((self.M @ self.B.to(self.low)).float())  # [d, r]
        if self.whole:
            T = self.tiles[0].input
            self.U = torch.linalg.qr((T.t() @ y.to(self.low)).float()).Q
            self.B = (T @ self.U.to(self.low)).float()
        else:  # T = W − held, never formed for all rows at once
            turned = self.weight @ (y * self.scale[:, None])
            for tile in self.tiles:
                turned[tile.rows].addmm_(tile.held.t(), y, alpha=-1)
            self.U = torch.linalg.qr(turned).Q
            self.B = (self.weight.t() @ self.U).mul_(self.scale[:, None])
            for tile in self.tiles:
                self.B.addmm_(tile.held, self.U[tile.rows], alpha=-1)

    def sparse_step(self, shrink: float = 1.0, counts: bool = False) -> float:
        """S, then D and Y, tile by tile; the share of kept positions that moved, if it counts them, else 0.

        shrink: ρ / (the ρ of the next iteration), which rescales the dual.
        """
        moved = kept_now = torch.zeros((), dtype=torch.int64, device=self.weight.device)
        for tile in self.tiles:
            if not self.whole:
                tile.X.copy_(self.weight[tile.rows].t())
                for part in tile.slices:
                    part.X.mul_(part.scale).sub_(part.held)
            if self.U.shape[1]:
                tile.X.addmm_(self.B, self.U[tile.rows].t(), alpha=-1)
            if tile.input.dtype != tile.X.dtype:
                tile.input.copy_(tile.X)
            torch.mm(self.M, tile.input, out=tile.C)
            for part in tile.slices:
                D = self._projection(part)
                Z = part.X.add_(D).sub_(part.C)  # S + Y, for S = E − C
                kept = self.marker.mark_(Z.abs().t(), tile.rows).t()
                if counts:  # bool(): on the CPU 9 times faster than != 0. Not sum(): it casts a whole mask to int64
                    now = kept.bool()
                    moved = moved + (D.bool() ^ now).count_nonzero()
                    kept_now = kept_now + now.count_nonzero()
                torch.mul(Z, kept, out=part.D)
                if shrink != 1.0:
                    Z.mul_(shrink)
                Z.sub_(part.D, alpha=1 + shrink)  # shrink·Y − D
                self._lay_down(part)
        self.marker.settle()
        self.iterations += 1
        return float(moved / kept_now.clamp_min(1)) if counts else 0.0

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """S [o, d] exactly in the pattern, and U [o, r], V [r, d] fitted to it, in the problem's own scale."""
        S, scale, dead = self._sums(), self.metric.scale, self.metric.dead
        together = [tile.rows for tile in self.tiles] if self.pattern.by_row else [slice(None)]
        del self.tiles, self.buffer, self.M
        for rows in together:
            S[rows].masked_fill_(self.pattern.project(S[rows]).logical_not_(), 0)
        S.div_(scale)
        S[:, dead] = 0
        self._fit(S)
        V = (self.B / scale[:, None]).t()
        V[:, dead] = 0
        U, V = balance_factors(self.U, V)
        return S, U, V

    def _sums(self) -> Tensor:
        """S + Y [o, d], row by row, in the memory of the store: what is held of a tile is not needed again."""
        for tile in self.tiles:
            for part in tile.slices:
                if self.whole:
                    part.X.sub_(part.held)
                else:
                    torch.neg(part.held, out=part.X)
                part.X.add_(self._projection(part), alpha=2)
            self.store[tile.rows].copy_(tile.X.t())
        return self.store

    def _fit(self, S: Tensor | None = None) -> None:
        """U, B ← the best rank-r B Uᵀ for W − S in the metric, by subspace iteration from the current U.

        S [o, d] in the problem's own scale, like the weight: the scale then falls on slim factors alone.
        """

        def rest_times(y: Tensor) -> Tensor:  # [o, r] -> [d, r]
            product = self.weight.t() @ y
            return (product if S is None else product.sub_(S.t() @ y)).mul_(self.scale[:, None])

        if self.U.shape[1]:
            for _ in range(_CAREFUL_STEPS):
                y = self.metric.times(rest_times(self.U)).mul_(self.scale[:, None])
                turned = self.weight @ y
                self.U = torch.linalg.qr(turned if S is None else turned.sub_(S @ y)).Q
            self.B = rest_times(self.U)


def _metric(problem: LinearProblem, warnings: list[str]) -> _Metric:
    """Return the metric, its inputs scaled by Optimal Brain Surgeon's saliency, with the least damping that works."""

    def scale_by_saliency(damping: Damping) -> _Metric | None:
        metric = _Metric(problem.gram, damping.added, damping.scale, damping.dead, damping.multiplier)
        inverse = metric.inverse(0)
        if inverse is None:
            return None
        # Leaving out w_j costs w_j² / [H⁻¹]_jj when the others adapt.
        return replace(metric, scale=damping.scale * inverse.diagonal().rsqrt())

    return damp_until_positive_definite(problem, scale_by_saliency, warnings)


def _inverse_(matrix: Tensor) -> Tensor | None:
    """The inverse of a symmetric [d, d], None when it is not positive definite; overwrites `matrix`."""
    if matrix.device.type == "cpu":  # LAPACK factors and inverts in place, in column-major storage
        columns = matrix.mT
        info = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(columns, out=(columns, info))
        if int(info):
            return None
        torch.cholesky_inverse(columns, out=columns)
        inverse = matrix
    else:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            return None
        inverse = torch.cholesky_inverse(factor, out=matrix.mT).mT  # with a working copy of the factor
    return inverse if bool((inverse.diagonal() > 0).all()) else None


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run several times faster than float32 (5 times with AMX, measured)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and has_amx is not None and bool(has_amx())
