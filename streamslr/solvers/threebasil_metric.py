"""Metric of 3BASiL, G, and its inverses M = ρ (G + ρI)⁻¹ from one stage of the iteration to the next."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamslr.errors import StreamslrError
from streamslr.ranks import ALONE, Ranks
from streamslr.solvers.base import Damping, LinearProblem, damp_until_positive_definite
from streamslr.tensors import tf32_products

# Error of M, relative to M, beyond which it is factored anew. Rounding M to bfloat16 costs 1e-3.
_TOLERANCE = 1e-3
# Growth of ρ up to which the polynomial in the last M is near enough: its own error is then 1e-4.
_LARGEST_GROWTH = 1.4
# Vectors on which M is checked.
_PROBES = 8
# Blocks of rows of a product whose result is symmetric; half of the blocks are then copied, not computed. Ranks that
# share it have two blocks each.
_BLOCKS = 8


@dataclass(frozen=True)
class Metric:
    """G = diag(1/scale) (gram + diag(added)) diag(1/scale), [d, d]; formed only inside `inverse`.

    Attributes:
        gram: [d, d] undamped, the problem's own.
        added: [d], the damping of its diagonal.
        scale: [d], the scale of the inputs.
        dead: [d] bool, inputs that are always zero.
        damping: Multiplier on the default damping.
    """

    gram: Tensor
    added: Tensor
    scale: Tensor
    dead: Tensor
    damping: float

    def times(self, y: Tensor) -> Tensor:
        """Return y G for y [k, d]."""
        y = y / self.scale
        return torch.addcmul(y @ self.gram, self.added, y).div_(self.scale)

    def inverse(self, rho: float, out: Tensor | None = None) -> Tensor | None:
        """Return ρ (G + ρI)⁻¹, float32 [d, d], or G⁻¹ for ρ = 0; None without a Cholesky factor."""
        matrix = torch.div(self.gram, self.scale, out=out)
        matrix.div_(self.scale[:, None])
        matrix.diagonal().add_(self.added / self.scale.square() + rho)
        inverse = invert_(matrix)
        return inverse if inverse is None or rho == 0 else inverse.mul_(rho)


def build_metric(problem: LinearProblem, warnings: list[str]) -> Metric:
    """Return the metric with inputs scaled by [H⁻¹]_jj^-½, H damped as little as gives it a Cholesky factor.

    Leaving out w_j costs w_j² / [H⁻¹]_jj when the other weights adapt (Optimal Brain Surgeon), so in this scale equal
    magnitudes cost the same.
    """

    def scale_by_saliency(damping: Damping) -> Metric | None:
        metric = Metric(problem.gram, damping.added, damping.scale, damping.dead, damping.multiplier)
        inverse = metric.inverse(0)
        return None if inverse is None else replace(metric, scale=damping.scale * inverse.diagonal().rsqrt())

    return damp_until_positive_definite(problem, scale_by_saliency, warnings)


def invert_(matrix: Tensor) -> Tensor | None:
    """Overwrite a symmetric matrix [d, d] with its inverse and return it; None when it is not positive definite."""
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


@dataclass(frozen=True)
class Pace:
    """ρ of each stage: `start` in stage 0, and `growth` times that of the stage before in each other."""

    start: float
    growth: float

    def rho(self, stage: int) -> float:
        """Return ρ of a stage, counted from 0."""
        rho = self.start
        for _ in range(stage):
            rho *= self.growth
        return rho


class StageInverses:
    """M = ρ (G + ρI)⁻¹ for the stages of one metric, in the precision of the products with the weight.

    M of a stage is factored, or where products are several times faster than a factorization (`by_series`), the
    polynomial in M of the stage before (`grow_`), if that is near enough. It depends on the Gram matrix, the pace, the
    precision and the device alone. So linears that share a Gram matrix get the same M from one object of this class
    as each from its own.

    Attributes:
        dtype: Precision of the products with M.
        ranks: Ranks that ask for the same stages in the same order, and take the same way to each. Those of one machine
            share the products of the series.
        refactored: Stage → relative error, where the series was too far off and M was factored instead.
    """

    def __init__(
        self,
        metric: Metric,
        pace: Pace,
        dtype: torch.dtype,
        by_series: bool,
        keep_bytes: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        """Compute nothing yet.

        Args:
            metric: The metric of the linears.
            pace: ρ of each stage.
            dtype: Precision of the products with M, float32 or bfloat16.
            by_series: Take M from that of the stage before.
            keep_bytes: Bytes of memory that M of earlier stages may take, to be asked for again.
            ranks: See above.
        """
        self.ranks = ranks
        self.refactored: dict[int, float] = {}
        self._metric, self._pace, self.dtype = metric, pace, dtype
        self._by_series = by_series and 1 < pace.growth <= _LARGEST_GROWTH
        d = len(metric.scale)
        self._keep = max(0, keep_bytes // (dtype.itemsize * d * d))  # matrices
        self._kept: list[Tensor] = []  # M of the first stages
        self._buffer: Tensor | None = None  # float32, M of the last stage where it was computed by series
        self._stage = -1  # that stage

    def end_solve(self) -> None:
        """Free the buffer: the next linear begins at stage 0, with what is kept."""
        self._buffer, self._stage = None, -1

    def at(self, stage: int, name: str) -> Tensor:
        """Return M [d, d] of a stage; valid until the next call.

        Args:
            stage: The stage, counted from 0.
            name: Name of the linear, for an error.
        """
        if stage < len(self._kept):
            return self._kept[stage]
        first = stage
        if self._by_series:
            first = self._stage + 1 if self._stage < stage else 0
        for at in range(first, stage + 1):
            M = self._compute(at, name)
        self._stage = stage
        return M

    def _compute(self, stage: int, name: str) -> Tensor:
        """Return M of a stage; by series, the buffer holds that of the stage before."""
        if not self._by_series or stage == 0 or not self._grow(stage):
            self._factor(stage, name)
        M = self._in_precision(stage)
        if stage == len(self._kept) < self._keep:
            self._kept.append(M)
            if M is self._buffer:
                self._buffer = None
        return M

    def _grow(self, stage: int) -> bool:
        """Take the buffer from the stage before to this one; return False where it is too far off."""
        assert self._buffer is not None
        on_tensor_cores = self.dtype != torch.float32 and self._buffer.is_cuda
        with tf32_products() if on_tensor_cores else nullcontext():
            # A stage exchanges two times half a matrix; between machines that may take longer than all products.
            grow_(self._buffer, self._pace.growth, self.ranks if self.ranks.local_world == self.ranks.world else ALONE)
        error = inverse_error(self._metric, self._pace.rho(stage), self._buffer)
        error = self.ranks.sum(error) / self.ranks.world
        if error <= _TOLERANCE:
            return True
        self.refactored[stage] = error
        return False

    def _factor(self, stage: int, name: str) -> None:
        if self._buffer is None:
            self._buffer = torch.empty_like(self._metric.gram)
        rho = self._pace.rho(stage)
        inverse = self._metric.inverse(rho, self._buffer)
        if inverse is None:  # G has a factor, so G + ρI has one
            raise StreamslrError(f"{name}: G + {rho:g}·I lost its Cholesky factor; report this as a bug")
        self._buffer = inverse

    def _in_precision(self, stage: int) -> Tensor:
        """Return the buffer in the precision of the products: a copy where it is still to be read, else in place."""
        inverse = self._buffer
        assert inverse is not None
        kept = stage == len(self._kept) < self._keep
        if self.dtype == torch.float32:
            return inverse.clone() if self._by_series and kept else inverse
        if self._by_series or kept:
            return inverse.to(self.dtype)
        # Into the front of its own memory, behind the rows that are still to be read.
        M = inverse.view(self.dtype).view(-1)[: inverse.numel()].view_as(inverse)
        for rows in range(0, len(inverse), 64):
            M[rows : rows + 64] = inverse[rows : rows + 64].to(self.dtype)
        return M


def grow_(M: Tensor, growth: float, ranks: Ranks = ALONE) -> None:
    """Overwrite M = ρ (G + ρI)⁻¹ [d, d] with that of `growth` · ρ, nearly: its polynomial of degree 4 in M.

    With z = growth − 1, the M wanted is growth · M (I + zM)⁻¹. For m in [0, 1], which holds the eigenvalues of M,
    q(m) of degree 3 has the least possible error |1 − (1 + zm) q(m)| = |T(2m − 1)| / T(1 + 2/z), with T the Chebyshev
    polynomial of degree 4: 1.9e-5 for a growth of 1.25. M² and one more product suffice. Both are symmetric, because
    polynomials in M are, so little more than half of them is computed.

    Args:
        M: The same on each rank.
        growth: Growth of ρ.
        ranks: Ranks that share the products, each some blocks of rows.
    """
    z = growth - 1
    x = 1 + 2 / z
    peak = 8 * x**4 - 8 * x**2 + 1  # T(2m - 1) = 1 - 32 m + 160 m² - 256 m³ + 128 m⁴
    q0 = 1 - 1 / peak
    q1 = 32 / peak - z * q0
    q2 = -160 / peak - z * q1
    q3 = 256 / peak - z * q2
    step = -(-len(M) // (_BLOCKS if ranks.world == 1 else 2 * ranks.world))
    blocks = [slice(first, min(first + step, len(M))) for first in range(0, len(M), step)]
    own = [rows for i, rows in enumerate(blocks) if _owner(i, ranks.world) == ranks.rank]
    square = torch.empty_like(M)
    for rows in own:
        torch.mm(M[rows], M[:, rows.start :], out=square[rows, rows.start :])
    _complete_(square, blocks, ranks)
    for rows in own:  # rows below are read in front of their diagonal, where M is still what it was
        left = M[rows].mul(growth * q2).add_(square[rows], alpha=growth * q3)
        upper = M[rows, rows.start :]
        upper.mul_(growth * q0).add_(square[rows, rows.start :], alpha=growth * q1)
        upper.addmm_(left, square[:, rows.start :])
    _complete_(M, blocks, ranks)


def _owner(block: int, world: int) -> int:
    """Return the rank that computes a block of rows from the diagonal on: of two a rank, a long and a short one."""
    return min(block, 2 * world - 1 - block) if world > 1 else 0


def _complete_(matrix: Tensor, blocks: list[slice], ranks: Ranks) -> None:
    """Complete a symmetric matrix [d, d] of which each rank has its blocks, from the diagonal on."""
    for i, rows in enumerate(blocks):
        if ranks.world > 1:
            block = matrix[rows, rows.start :].contiguous()
            ranks.broadcast_(block, _owner(i, ranks.world))
            matrix[rows, rows.start :] = block
        matrix[rows.stop :, rows] = matrix[rows, rows.stop :].t()


def inverse_error(metric: Metric, rho: float, M: Tensor) -> float:
    """Return the error of an approximate M = ρ (G + ρI)⁻¹ [d, d], relative to M in the Frobenius norm, about.

    For random rows v and their residuals r = v M (G + ρI) / ρ − v, the error of v M is r M to first order, and its
    square has the mean of the squared error of M.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(_PROBES, len(M), generator=generator).to(M)
    product = v @ M
    residual = (metric.times(product) / rho).add_(product).sub_(v)
    return float((residual @ M).norm() / product.norm())
