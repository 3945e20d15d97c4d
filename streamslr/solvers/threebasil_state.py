"""State of 3BASiL's iteration: its tensors in tiles of rows, and the two updates of an iteration."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from streamslr.solvers.base import LinearProblem
from streamslr.solvers.low_rank import balance_factors, orthonormal_rows, orthonormal_rows_by_cholesky
from streamslr.solvers.threebasil_fused import fused_state
from streamslr.solvers.threebasil_metric import Metric, StageInverses
from streamslr.spec.selection import row_slices

# Elements of a slice of the elementwise passes: on the CPU five float32 slices stay in a 2 MiB cache; on a GPU
# they fill the device, and the temporaries of the projection stay small (size chosen, not measured).
_SLICE_ELEMENTS, _SLICE_ELEMENTS_ON_GPU = 1 << 16, 1 << 22
# Subspace steps where accuracy is worth more than time: for the start and for the last fit of U·V.
_CAREFUL_STEPS = 4


def slice_elements(gpu: bool) -> int:
    """Return the elements of a slice of the elementwise passes."""
    return _SLICE_ELEMENTS_ON_GPU if gpu else _SLICE_ELEMENTS


@dataclass(frozen=True)
class Tile:
    """Rows of W, t of them, transposed like all of the state. X, input and C are memory that the tiles share.

    Attributes:
        rows: The t rows of W.
        X: [d, t] T = Y − D + W between iterations where the tile is the whole linear; T − Bᵀ U within one.
        input: [d, t] X in the precision of the products; X itself at float32.
        C: [d, t] the product M (T − Bᵀ U), in that precision.
        held: [d, t] W where the tile is the whole linear, else D − Y; lasts from one iteration to the next.
        slices: The same in slices of inputs.
    """

    rows: slice
    X: Tensor
    input: Tensor
    C: Tensor
    held: Tensor
    slices: list["Slice"]


class Slice(NamedTuple):
    """Inputs of a tile, k of its d in whole groups of the pattern, for the elementwise passes.

    Attributes:
        X: [k, t], part of the tile's.
        input: [k, t], part of the tile's.
        C: [k, t], part of the tile's.
        D: [k, t] the projection; lasts where the tile is the whole linear, else scratch memory.
        held: [k, t], part of the tile's.
        support: [k, t] bool, D ≠ 0 where D does not last; None where it does.
        scale: [k, 1], the scale of the inputs.
    """

    X: Tensor
    input: Tensor
    C: Tensor
    D: Tensor
    held: Tensor
    support: Tensor | None
    scale: Tensor


class AdmmState:
    """W, D, Y, U·V and M of the iteration (`ThreeBasil`), with the updates of U·V and of S, D and Y.

    All is in the scale of the metric and transposed, [d, o], so that a group of weights is a group of rows: rows are
    contiguous, and comparing the members of a group runs at the speed of memory. (U·V)ᵀ = Bᵀ U with B [r, d] and
    U [r, o] of orthonormal rows: few long rows, because products with few columns are slow on a CPU (tools/results/
    solver.md, "Time"). S is never stored: with T = Y − D + W, the correction D − Y − E is −(T − Bᵀ U).
    """

    def __init__(
        self,
        problem: LinearProblem,
        metric: Metric,
        rank: int,
        inverses: StageInverses,
        tile_rows: int | None = None,
    ) -> None:
        """Start from U·V the best fit of W, D the projection of W − U·V, Y = 0.

        Args:
            problem: The linear to compress.
            metric: Its metric.
            rank: Rank of U·V, at most min(o, d).
            inverses: M of each stage; its precision is that of the products with the weight's size.
            tile_rows: Rows of W worked on at a time; None for all.
        """
        self.name, self.pattern, self.metric, self.inverses = problem.name, problem.pattern, metric, inverses
        self.ranks, self.counts = problem.ranks, problem.ranks.gather(len(problem.weight))  # rows of each rank
        self.product_dtype, self.iterations = inverses.dtype, 0
        self.weight = problem.weight  # [o, d], not scaled; o counts this rank's rows
        self.scale = metric.scale.masked_fill(metric.dead, 0)
        o, d = self.weight.shape
        generator = torch.Generator().manual_seed(problem.seed)
        U = torch.randn(sum(self.counts), rank, generator=generator)  # on the CPU: the same start on every device
        first = sum(self.counts[: self.ranks.rank])
        self.U = self._orthonormal_rows(U[first : first + o].to(self.weight).t())  # [r, o]
        self.B = self.weight.new_zeros(rank, d)
        self.rest: Tensor | None = None  # B − B M, where it is known
        self._fit_low_rank()
        self.store = torch.mul(self.weight, self.scale).addmm_(self.U.t(), self.B, alpha=-1)  # [o, d] E, for now
        self.marker = problem.pattern.marker(self.store)
        self.whole = tile_rows is None or tile_rows >= o
        self.fused = fused_state(self.weight, self.scale, self.store, self.pattern, self.product_dtype, tile_rows)
        self.tiles = [] if self.fused else self._make_tiles(o if tile_rows is None else min(tile_rows, o))
        for tile in self.tiles:
            tile.X.copy_(self.store[tile.rows].t())
            if self.whole:
                tile.held.copy_(self.weight.t()).mul_(self.scale[:, None])
            for part in tile.slices:
                torch.mul(part.X, self.marker.mark_(part.X.abs().t(), tile.rows).t(), out=part.D)
                torch.neg(part.D, out=part.X)
                self._keep(part)
        self.marker.end_pass()
        self.qr_by_cholesky, self.qr_gave_up = self.weight.is_cuda, False
        # Times since the support was last looked at, on all ranks alike.
        self.qr_failed = torch.zeros((), device=self.weight.device)
        self.M = self.weight.new_empty(0, d)  # ρ (G + ρI)⁻¹ [d, d], after enter_stage

    def _make_tiles(self, tile_rows: int) -> list[Tile]:
        """Return tiles over the store, each in slices that are small enough for the cache."""
        o, d = self.weight.shape
        elements = slice_elements(gpu=self.weight.device.type != "cpu")
        k = min(d, max(1, elements // (tile_rows * self.marker.group)) * self.marker.group)
        shared_X = self.weight.new_empty(d * tile_rows)
        shared_D = self.weight.new_empty((d if self.whole else k) * tile_rows)
        shared_C = torch.empty_like(shared_X, dtype=self.product_dtype)
        shared_input = shared_X if self.product_dtype == torch.float32 else torch.empty_like(shared_C)
        tiles = []
        for first in range(0, o, tile_rows):
            rows = slice(first, min(first + tile_rows, o))
            t = rows.stop - first
            X, product_input, C = (shared[: d * t].view(d, t) for shared in (shared_X, shared_input, shared_C))
            D = shared_D[: shared_D.numel() // tile_rows * t].view(-1, t)
            held = self.store[rows].view(d, t)
            support = None if self.whole else torch.empty_like(X, dtype=torch.bool)
            slices = []
            for at in (slice(first, min(first + k, d)) for first in range(0, d, k)):
                part_D = D[at] if self.whole else D[: at.stop - at.start]
                part_support = None if support is None else support[at]
                scale = self.scale[at, None]
                slices.append(Slice(X[at], product_input[at], C[at], part_D, held[at], part_support, scale))
            tiles.append(Tile(rows, X, product_input, C, held, slices))
        return tiles

    def _keep(self, part: Slice) -> None:
        """Keep Y − D, which is in X, and D until the next iteration: as T, or in `held` and `support`."""
        if part.support is None:
            part.X.add_(part.held)
            if part.input.dtype != part.X.dtype:
                part.input.copy_(part.X)
        else:
            torch.neg(part.X, out=part.held)
            part.support.copy_(part.D)

    def _projection(self, part: Slice) -> Tensor:
        """Return D as the last iteration left it."""
        return part.D if part.support is None else torch.mul(part.held, part.support, out=part.D)

    def enter_stage(self, stage: int) -> None:
        """Set M to that of a stage, counted from 0."""
        self.rest = None
        self.M = self.weight.new_empty(0, 0)  # frees it before the next is made
        self.M = self.inverses.at(stage, self.name)

    def update_low_rank(self) -> None:
        """Update U·V by one subspace step towards the best fit of T in the metric G M: U for the last V, then V."""
        if not len(self.U):
            return
        y = self._rest_of_low_rank()  # B G M / ρ, for G M = ρ (I − M)
        if self.fused or self.whole:
            T, dtype = self.fused.input.t() if self.fused else self.tiles[0].input, self.product_dtype
            self._turn((y.to(dtype) @ T).float())
            B = (self.U.to(dtype) @ T.t()).float()
        else:  # T = W − held, never formed for all rows at once
            product = (y * self.scale) @ self.weight.t()  # [r, o]
            for tile in self.tiles:
                product[:, tile.rows].addmm_(y, tile.held, alpha=-1)
            self._turn(product)
            B = (self.U @ self.weight).mul_(self.scale)
            for tile in self.tiles:
                B.addmm_(self.U[:, tile.rows], tile.held.t(), alpha=-1)
        self.B, self.rest = self.ranks.sum_(B), None

    def _rest_of_low_rank(self) -> Tensor:
        """Return B − B M [r, d]; computed once for each B and M."""
        if self.rest is None:
            self.rest = self.B - self.times_inverse(self.B)
        return self.rest

    def _turn(self, matrix: Tensor) -> None:
        """Set U to an orthonormal basis of the rows of a matrix [r, o]; keep it where CholeskyQR2 fails."""
        if self.qr_by_cholesky:
            basis, succeeded = orthonormal_rows_by_cholesky(matrix, self.ranks)
            self.U = torch.where(succeeded, basis, self.U)
            self.qr_failed += ~succeeded
        else:
            self.U = self._orthonormal_rows(matrix)

    def _orthonormal_rows(self, matrix: Tensor) -> Tensor:
        return orthonormal_rows(matrix, self.ranks, self.counts)

    def times_inverse(self, y: Tensor) -> Tensor:
        """Return y M for y [r, d] float32."""
        return (y.to(self.product_dtype) @ self.M).float()

    def update_sparse(self, dual_scale: float = 1.0, count_moved: bool = False) -> float:
        """Update S, D and Y, tile by tile, and return the fraction of the support that moved, 0 if not counted.

        Where it is counted, U is from then on found by Householder's QR if CholeskyQR2 has failed.

        Args:
            dual_scale: ρ / (the ρ of the next iteration), by which Y is rescaled.
            count_moved: Count the positions of the support that moved.
        """
        if self.fused:
            self.iterations += 1
            Q = self._rest_of_low_rank().t()
            return self._read(self.fused.step(self.M, self.U.t(), Q, dual_scale, count_moved))
        moved = num_kept = torch.zeros((), dtype=torch.int64, device=self.weight.device)
        for tile in self.tiles:
            if not self.whole:  # X ← T
                tile.X.copy_(self.weight[tile.rows].t())
                for part in tile.slices:
                    part.X.mul_(part.scale).sub_(part.held)
            if len(self.U):
                tile.X.addmm_(self.B.t(), self.U[:, tile.rows], alpha=-1)
            if tile.input.dtype != tile.X.dtype:
                tile.input.copy_(tile.X)
            torch.mm(self.M, tile.input, out=tile.C)  # S = E − C
            for part in tile.slices:
                D = self._projection(part)
                Z = part.X.add_(D).sub_(part.C)  # S + Y
                mask = self.marker.mark_(Z.abs().t(), tile.rows).t()
                if count_moved:  # bool(), 9 times as fast as != 0; not sum(), which casts a whole mask to int64
                    support = mask.bool()
                    moved = moved + (D.bool() ^ support).count_nonzero()
                    num_kept = num_kept + support.count_nonzero()
                torch.mul(Z, mask, out=part.D)  # D ← the projection of S + Y
                if dual_scale != 1.0:
                    Z.mul_(dual_scale)
                Z.sub_(part.D, alpha=1 + dual_scale)  # dual_scale·Y − D, for Y = Z − D
                self._keep(part)
        self.marker.end_pass()
        self.iterations += 1
        return self._read(torch.stack((moved, num_kept)) if count_moved else None)

    def _read(self, counts: Tensor | None) -> float:
        """Return the fraction that moved; find U by Householder's QR from now on if CholeskyQR2 has failed.

        Args:
            counts: [2], this rank's positions that moved and that are kept; None where they were not counted.
        """
        if counts is None:
            return 0.0
        if self.ranks.world > 1:  # float64 on each: a rank may take the fused step, and another torch's passes
            counts = self.ranks.sum_(counts.double())
        fraction = counts[0] / counts[1].clamp_min(1)
        moved, failed = torch.stack((fraction, self.qr_failed.to(fraction))).tolist()  # one wait for both
        if failed:
            self.qr_by_cholesky, self.qr_gave_up = False, True
            self.qr_failed.zero_()
        return float(moved)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return S [o, d] exactly in the pattern, and U [o, r], V [r, d] fitted to it, in the problem's own scale."""
        S, scale, dead = self._collect_sums(), self.metric.scale, self.metric.dead
        parts = row_slices(S) if self.fused else [tile.rows for tile in self.tiles]
        projected_together = parts if self.pattern.by_row else [slice(None)]
        self.inverses.end_solve()
        del self.fused, self.tiles, self.inverses, self.M
        for rows in projected_together:
            S[rows].masked_fill_(self.pattern.project(S[rows]).logical_not_(), 0)
        S.div_(scale)
        S[:, dead] = 0
        self._fit_low_rank(S)
        V = self.B / scale
        V[:, dead] = 0
        return S, *balance_factors(self.U.t(), V, self.ranks)

    def _collect_sums(self) -> Tensor:
        """Return S + Y [o, d], row by row, in the memory of the store: what is held of a tile is not needed again."""
        for tile in self.tiles:
            for part in tile.slices:
                if self.whole:
                    part.X.sub_(part.held)
                else:
                    torch.neg(part.held, out=part.X)
                part.X.add_(self._projection(part), alpha=2)
            self.store[tile.rows].copy_(tile.X.t())
        return self.store

    def _fit_low_rank(self, S: Tensor | None = None) -> None:
        """Set U, B to the best rank-r Bᵀ U for (W − S)ᵀ in the metric G, by subspace iteration from the current U.

        S [o, d] is in the problem's own scale, like the weight: the scale then falls on slim factors alone.
        """

        def times_residual(y: Tensor) -> Tensor:  # [r, o] -> [r, d]
            product = y @ self.weight
            return self.ranks.sum_((product if S is None else product.sub_(y @ S)).mul_(self.scale))

        if len(self.U):
            for _ in range(_CAREFUL_STEPS):
                y = self.metric.times(times_residual(self.U)).mul_(self.scale)
                product = y @ self.weight.t()
                self.U = self._orthonormal_rows(product if S is None else product.sub_(y @ S.t()))
            self.B = times_residual(self.U)
