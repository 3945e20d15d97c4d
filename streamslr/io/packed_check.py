"""Checks of one packed linear: each problem is a sentence with the first damaged row or value and their number."""

from collections.abc import Mapping

import torch
from torch import Tensor

from streamslr.io.low_rank import LARGEST_CODE
from streamslr.io.packed_layout import (
    PACKED_PARTS,
    low_rank_misfits,
    max_values,
    meta_code,
    pattern_misfit,
    sparse_misfits,
    value_format,
)
from streamslr.io.packing import describes_more, row_chunks, stored_columns
from streamslr.spec.pattern import SparsityPattern
from streamslr.spec.values import ValueFormat
from streamslr.tensors import count_not_finite, is_finite

_CODES_AT_ONCE = 1 << 22
"""Entries of `values` whose codes are looked at together."""


def check_packed(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> list[str]:
    """Return what is wrong with one packed linear, a sentence each; [] when it is sound.

    Args:
        tensors: all that is stored of the linear, by part (values, meta, scales, row_offsets, U, V, low_rank_scales).
        pattern: pattern of S.
        shape: (o, d) of the dense weight.
    """
    problems = check_layout(tensors, pattern, shape)
    for name in ("values", "scales", "U", "V", "low_rank_scales"):
        if name in tensors and tensors[name].is_floating_point():
            wide = tensors[name].bfloat16() if tensors[name].dtype.itemsize == 1 else tensors[name]
            problems += _non_finite(name, wide)
    for name in tensors.keys() & {"U", "V"}:
        if tensors[name].dtype == torch.int8 and (beyond := int((tensors[name] < -LARGEST_CODE).count_nonzero())):
            problems.append(f"{beyond} codes of {name} are beyond {LARGEST_CODE}, the largest of int8")
    if pattern_misfit(pattern, shape) or sparse_misfits(tensors, pattern, shape):
        return problems
    if form := value_format(tensors, shape[1]):
        problems += _code_problems(tensors["values"], form)
    return problems + check_positions(tensors, pattern, shape)


def check_layout(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> list[str]:
    """Return what is wrong with the names, shapes and dtypes of a linear's parts; no value is read.

    Args:
        tensors: all that is stored of the linear, by part; they may be on meta.
        pattern: pattern of S.
        shape: (o, d) of the dense weight.
    """
    if problem := pattern_misfit(pattern, shape):
        return [problem]
    known = set(PACKED_PARTS) - ({"row_offsets"} if pattern.groups(shape[1]) else set())
    problems = sparse_misfits(tensors, pattern, shape) + low_rank_misfits(tensors, shape)
    return problems + [f"{name} does not belong to a {pattern} linear" for name in sorted(tensors.keys() - known)]


def check_positions(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> list[str]:
    """Return what is wrong with the columns that `meta` and `row_offsets` name, of parts without a wrong layout.

    Args:
        tensors: the parts; of `values` and `scales` only shapes and dtypes are looked at, so they may be on meta.
        pattern: pattern of S.
        shape: (o, d) of the dense weight.
    """
    problems = _padding_problems(tensors["meta"], pattern, shape[1])
    if groups := pattern.groups(shape[1]):
        return problems + _group_problems(tensors["meta"], pattern, groups, shape[1])
    return problems + _offset_problems(tensors, pattern, shape)


def _non_finite(name: str, tensor: Tensor) -> list[str]:
    if is_finite(tensor):
        return []
    index = (~tensor.isfinite()).nonzero()[0].tolist()
    value, count = tensor[tuple(index)].item(), count_not_finite(tensor)
    return [f"{name}{index} is {value}: {count} of {tensor.numel()} values are not finite"]


def _code_problems(values: Tensor, form: ValueFormat) -> list[str]:
    """Name codes beyond the largest of their format, as -128 of int8."""
    per_entry = 8 * values.element_size() // form.bits
    flat, beyond = values.flatten(), 0
    for first in range(0, len(flat), _CODES_AT_ONCE):
        part = flat[first : first + _CODES_AT_ONCE]
        beyond += int((form.decode(part, len(part) * per_entry).abs() > form.largest).count_nonzero())
    return [f"{beyond} codes of values are beyond {form.largest:g}, the largest of {form.name}"] if beyond else []


def _padding_problems(meta: Tensor, pattern: SparsityPattern, d: int) -> list[str]:
    rows = describes_more(meta, pattern, d).nonzero()
    if not len(rows):
        return []
    return [f"meta describes more than {d} columns in row {int(rows[0])} ({len(rows)} of {len(meta)} rows)"]


def _group_problems(meta: Tensor, pattern: SparsityPattern, groups: tuple[int, int], d: int) -> list[str]:
    """Name the groups (n, m) that do not store exactly n columns."""
    n, m = groups
    if not meta.numel() or _describes_groups(meta, pattern, n, m, d):
        return []
    first, count = "", 0
    for rows in row_chunks(len(meta), d):
        mask = stored_columns(meta[rows], pattern, d).reshape(-1, d // m, m)
        found = mask.sum(dim=2, dtype=torch.int32)  # [rows, groups]
        wrong = (found != n).nonzero()
        if len(wrong) and not count:
            row, group = wrong[0].tolist()
            first = f"row {rows.start + row}, group {group}"
            first += f" keeps {int(found[row, group])} of {m} columns, not {n}"
        count += len(wrong)
    return [f"meta: {first} (first of {count} wrong groups)"] if count else []


def _describes_groups(meta: Tensor, pattern: SparsityPattern, n: int, m: int, d: int) -> bool:
    """Return True where bytes alone show that each group of m columns keeps n; it takes no mask of the columns."""
    code = meta_code(pattern)
    if code.group:  # each digit of a byte below base^count describes a group
        return bool(meta.max() < code.base**code.count)
    if m % 8 and m != d:  # a byte holds columns of two groups
        return False
    width = -(-m // 8)  # bytes of a group
    return all(
        bool((_count_ones(meta[rows]).view(-1, width).sum(1, dtype=torch.int32) == n).all())
        for rows in row_chunks(len(meta), d)
    )


def _count_ones(meta: Tensor) -> Tensor:
    """Return the number of ones in each byte."""
    pairs = meta - (meta >> 1 & 0x55)
    nibbles = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return nibbles + (nibbles >> 4) & 0x0F


def _offset_problems(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> list[str]:
    """Name disagreements between meta, row offsets and values where rows differ."""
    o, d = shape
    meta, offsets, values = tensors["meta"], tensors["row_offsets"], tensors["values"]
    counts = torch.zeros(o, dtype=torch.int64, device=meta.device)
    for rows in row_chunks(o, d):  # such patterns have bitmasks
        counts[rows] = _count_ones(meta[rows]).sum(dim=1)
    total, allowed = int(counts.sum()), max_values(pattern, shape)
    problems = []
    if total > allowed:
        problems.append(f"meta keeps {total} of {o * d} columns, {pattern} allows {allowed}")
    form = value_format(tensors, d)
    if len(values) != (total if form is None else form.stored_width(total)):
        problems.append(f"values has {len(values)} entries, but meta keeps {total} columns")
    if offsets[0] != 0:
        problems.append(f"row_offsets starts at {int(offsets[0])}, not at 0")
    rows_wrong = (offsets.diff() != counts).nonzero()
    if len(rows_wrong):
        row = int(rows_wrong[0])
        problems.append(
            f"row_offsets gives row {row} {int(offsets[row + 1] - offsets[row])} values, but meta keeps "
            f"{int(counts[row])} of its columns ({len(rows_wrong)} of {o} rows disagree)"
        )
    return problems
