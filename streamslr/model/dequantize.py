"""Weights from codes and scales, (number - zero) · scale, by torch: some rows at a time, to keep them in the cache."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

_AT_ONCE = 2**19
"""Values that are decoded together: 2 MiB in float32."""


class Kind(IntEnum):
    """Numbers that codes are for, with the numbering of decode_codes.c."""

    UINT4 = 0
    FP4 = 1
    """e2m1 (OCP Microscaling Formats, version 1.0)."""
    TABLE = 2
    """Numbers of a table of 16."""
    UINT8 = 3
    INT8 = 4
    FP8 = 5
    """e4m3 without infinities (OCP 8-bit Floating Point Specification)."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self in (Kind.UINT4, Kind.FP4, Kind.TABLE) else 8


class Layout(IntEnum):
    """Order in which codes are stored, with the numbering of decode_codes.c. The lower bits of a byte are the first."""

    ROWS = 0
    """Row by row, in the order of the columns."""
    COLUMNS = 1
    """GPTQ: int32 words [d · bits / 32, o], each with neighbours of a row."""
    AWQ = 2
    """AWQ: int32 words [d, o / 8], each with 8 neighbours of a column, 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits."""
    UPPER_FIRST = 3
    """bitsandbytes: as ROWS, but the upper half of a byte is the first; for TABLE alone."""


@dataclass(frozen=True)
class Codes:
    """Codes of a weight [o, d] as they are stored."""

    stored: Tensor
    """Bytes or words, in memory without gaps."""
    kind: Kind
    layout: Layout = Layout.ROWS
    table: Tensor | None = None
    """Numbers of the codes 0 to 15 of TABLE, float32 [16]."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the numbers of the rows from start to before stop, [n, d], in a dtype that float32 holds exactly."""
        if self.layout == Layout.AWQ:
            words = self.stored[:, start // 8 : -(-stop // 8)]
            return unpack_awq(words).t().contiguous()[: stop - start]
        if self.layout == Layout.COLUMNS:
            return unpack_words(self.stored[:, start:stop].t(), self.kind.bits)
        part = self.stored[start:stop].flatten(1)
        if self.table is not None:
            return _table_values(part, self.table)
        if self.kind == Kind.FP8:
            return _fp8_values(part)
        if self.kind == Kind.FP4:
            return _fp4_values(part)
        return part if self.kind == Kind.INT8 else unpack_words(part, self.kind.bits)


@dataclass(frozen=True)
class Scales:
    """Scale and zero point of each block of a weight [o, d]; the blocks at its edges may be smaller."""

    scales: Tensor
    """[O, D], a floating-point dtype; or uint8, bytes of e8m0 scales."""
    rows: int
    """Rows of a block."""
    columns: int | Tensor
    """Columns of a block; or the scale's column of each column of the weight, int64 [d]."""
    zeros: Tensor | None = None
    """Code that stands for 0 [O, D]; None where that is 0."""
    unit: float = 1.0
    """Factor of all values, by which each is multiplied after its scale. One more rounding tells it from a part of the
    scales."""


def dequantize(codes: Codes, scales: Scales, weight: Tensor, via: torch.dtype | None = None) -> None:
    """Write (number - zero) · scale · unit into a weight [o, d], computed in float32 and rounded to the weight's dtype.

    Args:
        codes: codes of the weight.
        scales: scales and zero points.
        weight: where to write; it may be a transposed view.
        via: dtype that values are rounded to before the weight's.
    """
    o, d = weight.shape
    step = max(8, _AT_ONCE // d // 8 * 8)
    memory = torch.empty(min(step, o), d, dtype=torch.float32)
    rows = weight
    if not weight.is_contiguous():  # slow to write by rows
        rows = torch.empty_like(weight, memory_format=torch.contiguous_format)
    factors = powers_of_two(scales.scales) if scales.scales.dtype == torch.uint8 else scales.scales
    for start in range(0, o, step):
        stop = min(start + step, o)
        values = memory[: stop - start].copy_(codes.rows(start, stop))
        block = torch.arange(start, stop) // scales.rows
        if scales.zeros is not None:
            _apply(values, scales.zeros[block].float(), scales.columns, Tensor.sub_)
        _apply(values, factors[block].float(), scales.columns, Tensor.mul_)
        if scales.unit != 1:
            values.mul_(scales.unit)
        rows[start:stop] = values if via is None else values.to(via)
    if rows is not weight:
        weight.t().copy_(rows.t())  # torch is fast where it writes without gaps


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


def _fp8_values(codes: Tensor) -> Tensor:
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


def unpack_awq(words: Tensor) -> Tensor:
    """Return the codes in AWQ's words [n, w] in the order of the columns: uint8 [n, 8w]."""
    places = unpack_words(words, 4).view(*words.shape, 2, 2, 2)  # column 4b + 2c + a is at place 4a + 2b + c
    return places.permute(0, 1, 3, 4, 2).flatten(1)


def _fp4_values(codes: Tensor) -> Tensor:
    """Return the values in float16 of the fp4 codes in bytes [n, w], two in each: [n, 2w].

    0, 0.5, 1, 1.5, 2, 3, 4, 6 and the same below zero.
    """
    pairs = codes.view(torch.int8)
    bits = torch.stack((pairs << 4 >> 4, pairs >> 4), -1).flatten(1).to(torch.int16)  # sign in the 13 upper bits
    bits.bitwise_left_shift_(9).bitwise_and_(~(7 << 12))
    return bits.view(torch.float16).mul_(2**14)  # biases of the exponents: 15 and 1


def _table_values(codes: Tensor, table: Tensor) -> Tensor:
    """Return the numbers of a table [16] for the codes in bytes [n, w], two in each, the upper one first: [n, 2w]."""
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), -1)  # of each byte
    return pairs.index_select(0, codes.flatten().int()).view(len(codes), -1)


def powers_of_two(exponents: Tensor) -> Tensor:
    """Return 2^(byte - 127) in float32 for bytes: e8m0 scales. 255, its NaN, gives infinity."""
    bits = exponents.int() << 23
    return torch.where(exponents > 0, bits, 1 << 22).view(torch.float32)
