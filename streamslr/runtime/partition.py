"""Rows or columns of a stored linear, as tensor parallel ranks hold them, and stored linears one below the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.io.packing import pack, unpack
from streamslr.spec.pattern import NofM, SparsityPattern, Unstructured

_ANY_NUMBER = Unstructured(1e-6)
"""Pattern of columns of S whose rows differ in their number of values: a slice may have more than the whole's share.
Files and operators keep the text, which parse_pattern would not read of a smaller number."""


@dataclass(frozen=True)
class StoredLinear:
    """A linear of o outputs and d inputs as the folder stores it, or some of its rows or columns."""

    parts: Mapping[str, Tensor]
    """values, meta[, row_offsets][, U, V]; of a dense linear, weight [o, d]."""
    pattern: SparsityPattern | None
    """Pattern of S; None for a dense linear."""
    shape: tuple[int, int]
    """(o, d)."""

    def unpacked(self) -> "StoredLinear":
        """Return the linear with S dense, as `weight`; U and V stay."""
        if self.pattern is None:
            return self
        low_rank = {part: tensor for part, tensor in self.parts.items() if part in ("U", "V")}
        return StoredLinear({"weight": unpack(self.parts, self.pattern, self.shape)} | low_rank, None, self.shape)


def take_rows(linear: StoredLinear, rows: Sequence[slice]) -> StoredLinear:
    """Return these rows of a linear, one slice below the other; V is shared."""
    o, d = linear.shape
    rows = [slice(*part.indices(o)) for part in rows]
    if rows == [slice(0, o, 1)]:
        return linear
    parts = dict(linear.parts)
    for name in ("weight", "meta", "U"):
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
    parts = {part: tensor for part, tensor in linear.parts.items() if part in ("weight", "U", "V")}
    for part in ("weight", "V"):
        if part in parts:
            parts[part] = parts[part][:, columns].contiguous()
    if linear.pattern is None:
        return StoredLinear(parts, None, (o, width))
    pattern = linear.pattern if isinstance(linear.pattern, NofM) else _ANY_NUMBER
    if isinstance(pattern, NofM) and (columns.start % pattern.m or width % pattern.m):
        raise InputError(
            f"{name}: columns {columns.start} to {columns.stop - 1} of its {d} cut a group of {pattern.m} that "
            f"{pattern} prunes together; choose another number of tensor parallel ranks"
        )
    S = unpack(linear.parts, linear.pattern, linear.shape)[:, columns]
    return StoredLinear(parts | pack(S, pattern, S.dtype), pattern, (o, width))


def stack(linears: Sequence[StoredLinear]) -> dict[str, Tensor]:
    """Return S of linears of one pattern, one below the other: weight, or values, meta[, row_offsets]."""
    parts = [linear.parts for linear in linears]
    stacked = {
        name: torch.cat([each[name] for each in parts]) for name in ("weight", "values", "meta") if name in parts[0]
    }
    if "row_offsets" in parts[0]:
        stacked["row_offsets"] = _offsets_of(torch.cat([each["row_offsets"].diff() for each in parts]))
    return stacked


def _offsets_of(counts: Tensor) -> Tensor:
    """Return where each row's values begin, and the end: int64 [o + 1] of counts [o]."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
