"""Rows or columns of a stored linear, as tensor parallel ranks hold them, and stored linears one below the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.io.packed_layout import LOW_RANK_PARTS, number_dtype, value_format
from streamslr.io.packing import pack, pack_on_grid, unpack, unpack_codes
from streamslr.spec.pattern import Dense, NofM, SparsityPattern, Unstructured
from streamslr.spec.values import ValueFormat, group_columns, spread

_ANY_NUMBER = Unstructured(1e-6)
"""Pattern of columns of S whose rows differ in their number of values: a slice may have more than the whole's share.
Files and operators keep the text, which parse_pattern would not read of a smaller number."""


@dataclass(frozen=True)
class StoredLinear:
    """A linear of o outputs and d inputs as the folder stores it, or some of its rows or columns."""

    parts: Mapping[str, Tensor]
    """values, meta[, scales][, row_offsets][, U, V[, low_rank_scales]]; of a dense linear, weight [o, d]."""
    pattern: SparsityPattern | None
    """Pattern of S; None for a dense linear."""
    shape: tuple[int, int]
    """(o, d)."""

    def unpacked(self) -> "StoredLinear":
        """Return the linear with S dense, as `weight`; U and V stay."""
        if self.pattern is None:
            return self
        low_rank = {part: tensor for part, tensor in self.parts.items() if part in LOW_RANK_PARTS}
        S = unpack(self.parts, self.pattern, self.shape).to(number_dtype(self.parts))
        return StoredLinear({"weight": S} | low_rank, None, self.shape)

    @property
    def values(self) -> ValueFormat | None:
        """Format of the values; None for numbers as they are, and for a dense linear."""
        return None if self.pattern is None else value_format(self.parts, self.shape[1])

    def codes(self) -> Tensor:
        """Return the codes of values on a grid, [o, d]."""
        assert self.pattern is not None
        return unpack_codes(self.parts, self.pattern, self.shape)

    @property
    def stacks_with(self) -> object:
        """Key that linears share which `stack` takes together."""
        halves = "row_offsets" in self.parts and self.values is not None and self.values.bits < 8
        return self.pattern, str(self.values), id(self) if halves else None


def take_rows(linear: StoredLinear, rows: Sequence[slice]) -> StoredLinear:
    """Return these rows of a linear, one slice below the other; V is shared."""
    o, d = linear.shape
    rows = [slice(*part.indices(o)) for part in rows]
    if rows == [slice(0, o, 1)]:
        return linear
    parts = dict(linear.parts)
    if "row_offsets" in parts and linear.pattern is not None and (form := linear.values):
        codes, scales = (torch.cat([part[r] for r in rows]) for part in (linear.codes(), parts["scales"]))
        packed = pack_on_grid(codes, scales, _ANY_NUMBER, scales.dtype, form)
        low_rank = {part: tensor for part, tensor in parts.items() if part in LOW_RANK_PARTS}
        if "U" in parts:
            low_rank["U"] = torch.cat([parts["U"][r] for r in rows])
        return StoredLinear(packed | low_rank, linear.pattern, (len(codes), d))
    for name in ("weight", "meta", "scales", "U"):
        if name in parts:
            parts[name] = torch.cat([parts[name][part] for part in rows])
    if "row_offsets" in parts:
        offsets = parts["row_offsets"]
        counts = torch.cat([offsets.diff()[part] for part in rows])
        ends = [(int(offsets[part.start]), int(offsets[part.stop])) for part in rows]
        parts["values"] = torch.cat([parts["values"][start:stop] for start, stop in ends])
        parts["row_offsets"] = _offsets_of(counts)
    elif "values" in parts:
        parts["values"] = torch.cat([parts["values"][part] for part in rows])
    return StoredLinear(parts, linear.pattern, (sum(part.stop - part.start for part in rows), d))


def take_columns(linear: StoredLinear, columns: slice, name: str) -> StoredLinear:
    """Return these columns of a linear, S packed anew: a byte of `meta` may span the cut. U is shared.

    Args:
        linear: the linear.
        columns: the columns.
        name: name of the linear, for the error.

    Raises:
        InputError: the cut goes through a group of the pattern.
    """
    o, d = linear.shape
    columns = slice(*columns.indices(d))
    width = columns.stop - columns.start
    if width == d:
        return linear
    parts = {part: tensor for part, tensor in linear.parts.items() if part in ("weight", *LOW_RANK_PARTS)}
    for part in ("weight", "V"):
        if part in parts:
            parts[part] = parts[part][:, columns].contiguous()
    if linear.pattern is None:
        return StoredLinear(parts, None, (o, width))
    pattern = linear.pattern if isinstance(linear.pattern, NofM | Dense) else _ANY_NUMBER
    if isinstance(pattern, NofM) and (columns.start % pattern.m or width % pattern.m):
        raise InputError(
            f"{name}: columns {columns.start} to {columns.stop - 1} of its {d} cut a group of {pattern.m} that "
            f"{pattern} prunes together; choose another number of tensor parallel ranks"
        )
    if form := linear.values:
        scales = linear.parts["scales"]
        group = gcd(group_columns(d, scales.shape[1]), columns.start, width)  # of which the cut leaves whole ones
        fine = spread(scales, d)[:, columns][:, ::group].contiguous()
        packed = pack_on_grid(linear.codes()[:, columns], fine, pattern, scales.dtype, form)
        return StoredLinear(parts | packed, pattern, (o, width))
    S = unpack(linear.parts, linear.pattern, linear.shape)[:, columns]
    return StoredLinear(parts | pack(S, pattern, S.dtype), pattern, (o, width))


def stack(linears: Sequence[StoredLinear]) -> dict[str, Tensor]:
    """Return S of linears that stack, one below the other: weight, or values, meta[, scales][, row_offsets]."""
    parts = [linear.parts for linear in linears]
    names = [name for name in ("weight", "values", "meta", "scales") if name in parts[0]]
    stacked = {name: _joined([each[name] for each in parts]) for name in names}
    if "row_offsets" in parts[0]:
        stacked["row_offsets"] = _offsets_of(torch.cat([each["row_offsets"].diff() for each in parts]))
    return stacked


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors one below the other, of numbers in the widest of their dtypes; float8 by its bytes."""
    dtype = tensors[0].dtype
    if dtype.itemsize > 1:
        return torch.cat(list(tensors))
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(dtype)


def _offsets_of(counts: Tensor) -> Tensor:
    """Return where each row's values begin, and the end: int64 [o + 1] of counts [o]."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
