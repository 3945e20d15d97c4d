"""3BASiL's elementwise step in one kernel on a GPU, with a third of the state: for n:m patterns and bfloat16 products.

An iteration reads and writes 24 bytes a weight: 16 in the kernel, 4 in the product and 4 in the update of U·V. Torch's
passes in threebasil_state.py, which remain the reference, take 119. Instead of T, D and W only the sums Z = S + Y are
kept, 4 bytes a weight: D is their projection P(Z), Y the rest. The product is linear, so it multiplies T as the update
of U·V reads it: (T − B Uᵀ) M = T M − (M B) Uᵀ, and B Uᵀ is never formed.
"""

import contextlib
import logging
from collections.abc import Iterable
from importlib import import_module
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from streamslr.spec.pattern import NofM, SparsityPattern
from streamslr.spec.selection import GroupMarker, row_slices

log = logging.getLogger("streamslr")

# Devices that Triton compiles for; the tests add "cpu", where its interpreter runs the kernel.
DEVICES = {"cuda"}
# Longest group whose projection the kernel unrolls.
_MAX_GROUP = 32
# Rows of one product with M, so that its result takes little memory and still fills a GPU.
_PRODUCT_ROWS = 8192


class Blocks(NamedTuple):
    """Rows, columns and rank that a program of the kernel works on at a time, its warps and stages of prefetching."""

    rows: int = 32
    columns: int = 64
    rank: int = 16
    warps: int = 8
    stages: int = 2


# Small, since registers decide how many programs run side by side, and so how much is read at once: 58 a thread at
# sm_90. On an H200 1.7 TB/s where a copy reached 1.9 (tools/results/fused-h200.json).
BLOCKS = Blocks()


class KernelKey(NamedTuple):
    """Device, pattern and dtype that a kernel is compiled and checked for."""

    device: str
    pattern: str
    weight_dtype: torch.dtype


# Why the kernel is not used, None where it is; a check runs once in a process.
_verdicts: dict[KernelKey, str | None] = {}


def describe(device: torch.device) -> dict[str, str]:
    """Return how solves on a device do the step, by pattern: "fused", or "torch" with the reason.

    Patterns that no solve of this process has asked for, or that the kernel is not made for, are left out.
    """
    found = {key.pattern: reason for key, reason in _verdicts.items() if key.device == str(device)}
    return {pattern: "fused" if reason is None else f"torch: {reason}" for pattern, reason in found.items()}


def may_fuse(pattern: SparsityPattern) -> bool:
    """Return True where solves on a GPU fuse the step, tiles permitting (`fits_fused`).

    Without a check (`check_kernels`), as on a machine that plans for a GPU it lacks, the kernel is taken to work.
    """
    if "cuda" not in DEVICES or not _is_made_for(pattern):
        return False
    text = str(pattern)
    return not any(fault and key.pattern == text and key.device != "cpu" for key, fault in _verdicts.items())


def check_kernels(device: torch.device, patterns: Iterable[SparsityPattern]) -> None:
    """Compile and check the kernels of these patterns on a device, where that is still to be done."""
    if device.type in DEVICES:
        for pattern in patterns:
            if _is_made_for(pattern):
                _verdict(pattern, device, torch.float32)


def fits_fused(o: int, tile_rows: int | None) -> bool:
    """Return True where the fused state takes no more memory than torch's passes over tiles (`solve_bytes`)."""
    return tile_rows is None or tile_rows >= o or o + 2 * product_rows(o, tile_rows) <= 8 * tile_rows


def product_rows(o: int, tile_rows: int | None) -> int:
    """Return the rows of one product with M."""
    return min(o, tile_rows or o, _PRODUCT_ROWS)


def fused_state(
    weight: Tensor,
    scale: Tensor,
    residual: Tensor,
    pattern: SparsityPattern,
    product_dtype: torch.dtype,
    tile_rows: int | None,
) -> "FusedState | None":
    """Return the state for the fused step; None where torch's passes have to do it, with a log line if that is a fault.

    Args:
        weight: [o, d], not scaled.
        scale: [d], the scale of the inputs.
        residual: float32 [o, d], E = W − U·V, scaled; becomes part of the state.
        pattern: Pattern of S.
        product_dtype: Precision of the products; the fused step has bfloat16.
        tile_rows: Rows of a tile that the memory was planned for, None for all. Small tiles take less than this state.
    """
    o = len(weight)
    can = product_dtype == torch.bfloat16 and weight.device.type in DEVICES and fits_fused(o, tile_rows)
    if not (can and _is_made_for(pattern)) or _verdict(pattern, weight.device, weight.dtype) is not None:
        return None
    return FusedState(weight, scale, residual, pattern, product_rows(o, tile_rows))


def _is_made_for(pattern: SparsityPattern) -> TypeGuard[NofM]:
    return isinstance(pattern, NofM) and pattern.m <= _MAX_GROUP and pattern.m.bit_count() == 1


def _verdict(pattern: NofM, device: torch.device, weight_dtype: torch.dtype) -> str | None:
    """Return why the kernel is not used, None where it is, after a check if there was none; log a fault once."""
    key = KernelKey(str(device), str(pattern), weight_dtype)
    if key not in _verdicts:
        _verdicts[key] = reason = _fault_of_kernel(pattern, device, weight_dtype)
        if reason is not None:
            log.warning("3basil at %s: the fused step is not used, so a solve takes longer: %s", pattern, reason)
    return _verdicts[key]


class FusedState:
    """Z, and T in the precision of the products, of all rows; not transposed, [o, d].

    Attributes:
        Z: float32 [o, d] the sums S + Y, Y already rescaled for the next iteration. That shrinks it, so the projection
            of Z stays D.
        input: bfloat16 [o, d] T = Y − D + W.
        rows: Parts of the rows that are multiplied with M one after another.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        residual: Tensor,
        pattern: NofM,
        product_rows: int = _PRODUCT_ROWS,
        blocks: Blocks = BLOCKS,
    ) -> None:
        """Start from D the projection of the residual and Y = 0; the arguments are those of `fused_state`."""
        self.weight, self.scale, self.pattern, self.blocks = weight.contiguous(), scale.contiguous(), pattern, blocks
        self.Z = residual
        self.input = torch.empty_like(residual, dtype=torch.bfloat16)
        marker = GroupMarker(pattern.n, pattern.m)
        for rows in row_slices(residual):
            D = self.Z[rows].mul_(marker.mark_(self.Z[rows].abs()))
            self.input[rows] = torch.mul(self.weight[rows], scale).sub_(D)
        o = len(residual)
        self.rows = [slice(first, min(first + product_rows, o)) for first in range(0, o, product_rows)]
        self.product = torch.empty_like(self.input[:product_rows])
        self.kernel = import_module("streamslr.solvers.threebasil_kernels").sparse_step

    def step(self, M: Tensor, U: Tensor, Q: Tensor, dual_scale: float, count_moved: bool) -> Tensor | None:
        """Update S, D and Y; return the positions that moved and that are kept, float64 [2], or None if not counted.

        Args:
            M: bfloat16 [d, d].
            U: float32 [o, r]; like Q, of any strides.
            Q: float32 [d, r], B − M B.
            dual_scale: Factor on Y, at most 1.
            count_moved: Count the positions of the support that moved.
        """
        counts = []
        for rows in self.rows:
            product = self.product[: rows.stop - rows.start]
            torch.mm(self.input[rows], M.t(), out=product)
            counts.append(self.update_rows(rows, product, U[rows], Q, dual_scale, count_moved))
        if not count_moved:
            return None
        return torch.cat(counts).sum(0).double()

    def update_rows(
        self, rows: slice, product: Tensor, U: Tensor, Q: Tensor, dual_scale: float, count_moved: bool
    ) -> Tensor:
        """Run the kernel on rows of the state, with their product and U; return its counts, int32 [programs, 2]."""
        t, d = product.shape
        rank = Q.shape[1]
        blocks = self.blocks
        num_programs = -(-t // blocks.rows) * -(-d // blocks.columns)
        counts = torch.empty(num_programs if count_moved else 0, 2, dtype=torch.int32, device=self.Z.device)
        on_device = torch.cuda.device(self.Z.device) if self.Z.device.type == "cuda" else contextlib.nullcontext()
        with on_device:
            self.kernel[(num_programs,)](
                self.Z[rows],
                self.weight[rows],
                self.scale,
                product,
                U if rank else self.scale,  # an empty tensor has no address
                Q if rank else self.scale,
                self.input[rows],
                counts if count_moved else self.scale,
                t,
                d,
                rank,
                *U.stride(),
                *Q.stride(),
                dual_scale,
                n=self.pattern.n,
                m=self.pattern.m,
                count_moved=count_moved,
                block_rows=blocks.rows,
                block_columns=blocks.columns,
                block_rank=blocks.rank,
                num_rank_blocks=-(-rank // blocks.rank),
                num_warps=blocks.warps,
                num_stages=blocks.stages,
            )
        return counts


def step_in_torch(
    Z: Tensor, W: Tensor, product: Tensor, U: Tensor, Q: Tensor, pattern: NofM, dual_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the kernel makes of Z: the next Z and T, and the moved and kept positions, int64 [2].

    The kernel is held against this function, when it is first used and in the tests.

    Args:
        Z: float32 [o, d], the sums of the last iteration.
        W: float32 [o, d], scaled.
        product: bfloat16 [o, d], C = T M.
        U: float32 [o, r].
        Q: float32 [d, r], B − M B.
        pattern: Pattern of S.
        dual_scale: Factor on Y.
    """
    marker = GroupMarker(pattern.n, pattern.m)
    kept_before = marker.mark_(Z.abs()).bool()
    new = W - U @ Q.t() + Z.masked_fill(kept_before, 0) - product
    kept = marker.mark_(new.abs()).bool()
    support = kept & (new != 0)
    moved = (kept_before & (Z != 0)) ^ support
    new = torch.where(kept, new, dual_scale * new)
    T = W + torch.where(kept, -new, new)
    return new, T.to(torch.bfloat16), torch.stack((moved.count_nonzero(), support.count_nonzero()))


def _fault_of_kernel(pattern: NofM, device: torch.device, weight_dtype: torch.dtype) -> str | None:
    """Compile the kernel and run it on a small problem; return None when it does as `step_in_torch`, else why not.

    All values are multiples of a small power of two, so that every sum is exact in any order and ties are ties.
    """
    try:
        import_module("triton")
    except ImportError:
        return "Triton is not installed"
    o, d, rank = 80, 96, 48  # multiples of 16, as real shapes are, and of no block

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(-high, high + 1, shape, generator=generator).float()

    for count_moved in (False, True):
        generator = torch.Generator().manual_seed(0)
        weight, scale = integers(3, o, d), 2.0 ** torch.randint(-1, 2, (d,), generator=generator)
        Z, product, U, Q = integers(3, o, d), integers(2, o, d), integers(2000, o, rank) / 1024, integers(3, d, rank)
        U[: o // 2] = 0  # so that magnitudes tie there
        weight, product = weight.to(device, weight_dtype), product.to(device, torch.bfloat16)
        scale, Z, U, Q = (tensor.to(device) for tensor in (scale, Z, U, Q))
        expected = step_in_torch(Z, weight * scale, product, U, Q, pattern, 0.5)
        try:
            state = FusedState(weight, scale, Z.clone(), pattern)
            state.Z.copy_(Z)
            counts = state.update_rows(slice(0, o), product, U, Q, 0.5, count_moved).sum(0)
            found = state.Z.cpu(), state.input.cpu(), counts.cpu()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the compiler, the driver or the kernel: torch's passes need none of them
            return f"its kernel failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        right = torch.equal(found[0], expected[0].cpu())
        right &= torch.allclose(found[1].float(), expected[1].cpu().float(), rtol=2**-7, atol=0)  # one last place
        right &= not count_moved or torch.equal(found[2], expected[2].cpu())
        if not right:
            return "its kernel gave other values than torch in a check"
    return None
