"""Weights from codes and scales, (code - zero) · scale, some rows at a time so that each value stays in the cache."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_AT_ONCE = 2**19
"""Values that are decoded together: 2 MiB in float32."""

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
    memory = torch.empty(min(step, o), d, dtype=torch.float32)
    for start in range(0, o, step):
        stop = min(start + step, o)
        values = memory[: stop - start].copy_(codes(start, stop))
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


def fp8_values(codes: Tensor) -> Tensor:
    """Return the values of fp8 e4m3 codes [n, d] in float16, which has them all, by their bits: torch's own is slow."""
    stored, nan = codes.view(torch.int8), 0x7F
    bits = stored.to(torch.int16)  # sign in the 9 upper bits, 4 of the exponent, 3 of the mantissa
    bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    values = bits.view(torch.float16).mul_(2**8)  # biases of the exponents: 15 and 7
    if int((stored & nan).amax()) == nan:
        values[stored & nan == nan] = torch.nan
    return values


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return the unsigned codes in int32 words [n, w], lowest bits first: uint8 [n, w · 32 / bits].

    Args:
        words: the words.
        bits: 4 or 8.
    """
    codes = words.contiguous().view(torch.uint8)
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2) if bits == 4 else codes


def fp4_values(codes: Tensor) -> Tensor:
    """Return the values in float16 of the fp4 e2m1 codes in bytes [n, w], two in each, the lower half first: [n, 2w].

    0, 0.5, 1, 1.5, 2, 3, 4, 6 and the same below zero (OCP Microscaling Formats, version 1.0).
    """
    pairs = codes.view(torch.int8)
    bits = torch.stack((pairs << 4 >> 4, pairs >> 4), -1).flatten(1).to(torch.int16)  # sign in the 13 upper bits
    bits.bitwise_left_shift_(9).bitwise_and_(~(7 << 12))
    return bits.view(torch.float16).mul_(2**14)  # biases of the exponents: 15 and 1


def powers_of_two(exponents: Tensor) -> Tensor:
    """Return 2^(byte - 127) in float32 for bytes: e8m0 scales. 255, its NaN, gives infinity."""
    bits = exponents.int() << 23
    return torch.where(exponents > 0, bits, 1 << 22).view(torch.float32)
