"""Weights from codes and scales, (code - zero) · scale, some rows at a time so that each value stays in the cache."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_AT_ONCE = 2**18
"""Values that are decoded together: 1 MiB in float32."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each code of fp4 e2m1 (OCP Microscaling Formats, version 1.0)."""

Rows = Callable[[int, int], Tensor]
"""Returns the codes of the rows from one to before another, [n, d], in a dtype that float32 holds exactly."""


@dataclass(frozen=True)
class Scales:
    """Scale and zero point of each block of a weight [o, d]; the blocks at its edges may be smaller."""

    scales: Tensor
    """[O, D], a floating-point dtype."""
    rows: int
    """Rows of a block."""
    columns: int | Tensor
    """Columns of a block; or the scale's column of each column of the weight, int64 [d]."""
    zeros: Tensor | None = None
    """Code that stands for 0 [O, D]; None where that is 0."""


def dequantize(codes: Rows, scales: Scales, weight: Tensor, via: torch.dtype | None = None) -> None:
    """Write (code - zero) · scale into a weight [o, d], computed in float32 and rounded to the weight's dtype.

    Args:
        codes: codes of the weight.
        scales: scales and zero points.
        weight: where to write; it may be a transposed view.
        via: dtype that values are rounded to before the weight's.
    """
    o, d = weight.shape
    step = max(8, _AT_ONCE // d // 8 * 8)
    for start in range(0, o, step):
        stop = min(start + step, o)
        values = torch.empty(stop - start, d, dtype=torch.float32).copy_(codes(start, stop))
        block = torch.arange(start, stop) // scales.rows
        if scales.zeros is not None:
            _apply(values, scales.zeros[block].float(), scales.columns, Tensor.sub_)
        _apply(values, scales.scales[block].float(), scales.columns, Tensor.mul_)
        weight[start:stop] = values if via is None else values.to(via)


def _apply(
    values: Tensor, factors: Tensor, columns: int | Tensor, operation: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Apply an operation to values [n, d] in place, with a factor [n, D] for each block of columns."""
    if isinstance(columns, Tensor):
        operation(values, factors[:, columns])
        return
    whole = values.shape[1] // columns  # blocks that the edge does not cut
    operation(values[:, : whole * columns].view(len(values), whole, columns), factors[:, :whole, None])
    if whole * columns < values.shape[1]:
        operation(values[:, whole * columns :], factors[:, whole:])


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return the unsigned codes in int32 words [n, w], lowest bits first: uint8 [n, w · 32 / bits].

    Args:
        words: the words.
        bits: 4 or 8.
    """
    codes = words.contiguous().view(torch.uint8)
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2) if bits == 4 else codes


def fp4_values(codes: Tensor) -> Tensor:
    """Return the values in float32 of the fp4 codes in bytes [n, w], two in each, the lower half first: [n, 2w]."""
    values = torch.tensor(_FP4, dtype=torch.float32, device=codes.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), 1)  # [256, 2]
    return pairs[codes.int()].flatten(1)


def powers_of_two(exponents: Tensor) -> Tensor:
    """Return 2^(byte - 127) in float32 for bytes: e8m0 scales. 255, its NaN, gives infinity."""
    bits = exponents.int() << 23
    return torch.where(exponents > 0, bits, 1 << 22).view(torch.float32)
