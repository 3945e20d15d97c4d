"""Value formats: the grid of numbers that S may hold, with a scale a group of columns, and their text form."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamslr.errors import InputError

STORED = "stored"
"""Name of numbers as the checkpoint stores them, without a grid."""
BF16 = "bf16"
"""Name of numbers in bfloat16, whatever the checkpoint stores."""
INT8 = "int8"
DEFAULT_GROUP = 128
LARGEST_GROUP = 2**31 - 1


class ValueFormat(Protocol):
    """Grid that the values of S lie on: codes times the scale of their group. A frozen value, as a pattern is.

    A row of d columns has ceil(d / group) groups of equally many columns, but for the last, which may have fewer. Its
    text, `str(format)`, is what settings and journals keep of it, and `parse_values` reads it; shards name it by the
    dtypes and shapes of their tensors.
    """

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> int:
        """Most columns of a row that share a scale."""
        ...

    @property
    def bits(self) -> int:
        """Bits of a stored code."""
        ...

    @property
    def largest(self) -> float:
        """Largest code; the smallest is its negative."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that codes are stored in; no other format has it."""
        ...

    @property
    def code_dtype(self) -> torch.dtype:
        """Dtype of a byte that holds one code."""
        ...

    def nearest(self, numbers: Tensor) -> Tensor:
        """Return the nearest code of each number, in the dtype of `numbers` (float32 or wider)."""
        ...

    def encode(self, codes: Tensor) -> Tensor:
        """Return codes [..., k] as they are stored, [..., `stored_width(k)`]."""
        ...

    def decode(self, stored: Tensor, count: int) -> Tensor:
        """Return the first `count` codes of each row of what `encode` made, in bfloat16, which holds all exactly."""
        ...

    def stored_width(self, count: int) -> int:
        """Return the entries that `encode` makes of `count` codes."""
        ...

    def __str__(self) -> str: ...


class _Grouped:
    """Text form of a format with groups."""

    name: str
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.group <= LARGEST_GROUP:
            raise InputError(f"group {self.group} of {self.name}: give the columns that share a scale, like 128")

    def __str__(self) -> str:
        return f"{self.name}/{self.group}"


class _ByteEach(_Grouped):
    """Storage of a format with a byte a code."""

    dtype: torch.dtype

    def encode(self, codes: Tensor) -> Tensor:
        return codes.to(self.dtype)

    def decode(self, stored: Tensor, count: int) -> Tensor:
        return stored[..., :count].bfloat16()

    def stored_width(self, count: int) -> int:
        return count


@dataclass(frozen=True)
class Int8(_ByteEach):
    """Integers from -127 to 127, a byte each."""

    group: int = DEFAULT_GROUP
    name = "int8"
    bits = 8
    largest = 127.0
    dtype = code_dtype = torch.int8

    def nearest(self, numbers: Tensor) -> Tensor:
        return numbers.round().clamp_(-self.largest, self.largest)


@dataclass(frozen=True)
class Int4(_Grouped):
    """Integers from -7 to 7 in two's complement, two a byte, the first in the low half."""

    group: int = DEFAULT_GROUP
    name = "int4"
    bits = 4
    largest = 7.0
    dtype = torch.uint8
    code_dtype = torch.int8

    def nearest(self, numbers: Tensor) -> Tensor:
        return numbers.round().clamp_(-self.largest, self.largest)

    def encode(self, codes: Tensor) -> Tensor:
        halves = torch.nn.functional.pad(codes.to(torch.int8).view(torch.uint8) & 0xF, (0, codes.shape[-1] % 2))
        return halves[..., ::2] | halves[..., 1::2] << 4

    def decode(self, stored: Tensor, count: int) -> Tensor:
        halves = torch.stack((stored << 4, stored & 0xF0), dim=-1).flatten(-2).view(torch.int8)  # sixteenfold
        return halves[..., :count].bfloat16() / 16

    def stored_width(self, count: int) -> int:
        return -(-count // 2)


@dataclass(frozen=True)
class Float8(_ByteEach):
    """Floats of 8 bits, e4m3fn: 3 bits of mantissa, up to 448."""

    group: int = DEFAULT_GROUP
    name = "fp8"
    bits = 8
    largest = 448.0
    dtype = code_dtype = torch.float8_e4m3fn

    def nearest(self, numbers: Tensor) -> Tensor:
        return numbers.clamp(-self.largest, self.largest).to(self.dtype).to(numbers.dtype)


_FORMATS: Mapping[str, type[Int8] | type[Int4] | type[Float8]] = {kind.name: kind for kind in (Int8, Int4, Float8)}


Values = ValueFormat | torch.dtype | None
"""Values of S: on a grid, or numbers of a dtype; None for numbers as the checkpoint stores them."""


def parse_values(text: str, group: int = DEFAULT_GROUP) -> Values:
    """Return the values that a text names; None for "stored", numbers as the checkpoint stores them.

    Args:
        text: "int8", "int4" or "fp8", with the columns of a group behind a stroke where they are not `group`
            ("int4/64"); "bf16" or "stored".
        group: Columns of a group.

    Raises:
        InputError: The text names no format.
    """
    if text in (STORED, BF16):
        return torch.bfloat16 if text == BF16 else None
    match = re.fullmatch(r"([a-z0-9]{1,10})(?:/(\d{1,10}))?", text)
    if match is None or match[1] not in _FORMATS:
        raise InputError(
            f"values {text!r} are not known; there are {', '.join(_FORMATS)}, each with the columns that share a scale "
            f'as in "int4/64", and "bf16" and "stored", as the checkpoint has them'
        )
    return _FORMATS[match[1]](int(match[2]) if match[2] else group)


def values_text(values: Values) -> str:
    """Return the text that `parse_values` reads."""
    if isinstance(values, torch.dtype):
        return BF16
    return STORED if values is None else str(values)


def grid_of(values: Values) -> ValueFormat | None:
    """Return the grid that values lie on; None for numbers."""
    return None if isinstance(values, torch.dtype) else values


def parse_low_rank_values(text: str) -> torch.dtype | None:
    """Return the dtype that U and V are stored in; None for "stored", that of the checkpoint.

    Raises:
        InputError: The text is none of "stored", "bf16" and "int8".
    """
    dtypes = {STORED: None, BF16: torch.bfloat16, INT8: torch.int8}
    if text not in dtypes:
        raise InputError(f"low-rank values {text!r} are not known; there are {', '.join(dtypes)}")
    return dtypes[text]


def low_rank_text(dtype: torch.dtype | None) -> str:
    """Return the text that `parse_low_rank_values` reads."""
    return STORED if dtype is None else INT8 if dtype == torch.int8 else BF16


def same_values(found: ValueFormat | None, text: str, d: int) -> bool:
    """Return True where a text names the format that was found of rows of d columns, which have whole groups."""
    named = grid_of(parse_values(text))
    if found is None or named is None:
        return found is named
    return found.name == named.name and group_count(d, found.group) == group_count(d, named.group)


def format_of(values: Tensor, scales: Tensor, d: int) -> ValueFormat | None:
    """Return the format of stored codes; None where no format has their dtype.

    Args:
        values: Codes; only their dtype is looked at.
        scales: [o, groups]; only their shape is looked at.
        d: Columns of the linear.
    """
    for kind in _FORMATS.values():
        if values.dtype == kind.dtype and scales.dim() == 2 and scales.shape[1]:
            size = group_columns(d, scales.shape[1])
            return kind(size) if 1 <= size <= LARGEST_GROUP else None
    return None


def group_count(d: int, group: int) -> int:
    """Return the groups of a row of d columns."""
    return -(-d // group)


def group_columns(d: int, groups: int) -> int:
    """Return the columns of each of a row's groups, but for the last."""
    return -(-d // max(1, groups))


def sum_groups(numbers: Tensor, groups: int) -> Tensor:
    """Return the sums of numbers [rows, d] over the groups of each row, [rows, groups]."""
    return in_groups(numbers, groups).sum(2)


def in_groups(numbers: Tensor, groups: int) -> Tensor:
    """Return numbers [rows, d] as [rows, groups, columns of a group], with zeros behind the last column."""
    rows, d = numbers.shape
    size = group_columns(d, groups)
    return torch.nn.functional.pad(numbers, (0, groups * size - d)).view(rows, groups, size)


def spread(scales: Tensor, d: int) -> Tensor:
    """Return the scale of each column [o, d], for scales [o, groups]."""
    return scales.repeat_interleave(group_columns(d, scales.shape[1]), dim=1)[:, :d]
