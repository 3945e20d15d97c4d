"""Checks of one packed linear: each problem is a sentence with the first damaged row or value and their number."""

from collections.abc import Mapping

import torch
from torch import Tensor

from streamslr.io.packed_layout import PACKED_PARTS, low_rank_misfits, max_values, pattern_misfit, sparse_misfits
from streamslr.io.packing import decode_mask, describes_more, row_chunks
from streamslr.spec.pattern import SparsityPattern
from streamslr.tensors import count_not_finite, is_finite


def check_packed(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> list[str]:
    """Return what is wrong with one packed linear, a sentence each; [] when it is sound.

    Args:
        tensors: all that is stored of the linear, by part (values, meta, row_offsets, U, V).
        pattern: pattern of S.
        shape: (o, d) of the dense weight.
    """
    if problem := pattern_misfit(pattern, shape):
        return [problem]
    misfits = sparse_misfits(tensors, pattern, shape)
    groups = pattern.groups(shape[1])
    known = set(PACKED_PARTS) - ({"row_offsets"} if groups else set())
    problems = misfits + low_rank_misfits(tensors, shape)
    problems += [f"{name} does not belong to a {pattern} linear" for name in sorted(tensors.keys() - known)]
    for name in ("values", "U", "V"):
        if name in tensors and tensors[name].is_floating_point():
            problems += _non_finite(name, tensors[name])
    if misfits:
        return problems
    problems += _padding_problems(tensors["meta"], pattern, shape[1])
    if groups:
        return problems + _group_problems(tensors["meta"], pattern, groups, shape[1])
    return problems + _offset_problems(tensors, pattern, shape)


def _non_finite(name: str, tensor: Tensor) -> list[str]:
    if is_finite(tensor):
        return []
    index = (~tensor.isfinite()).nonzero()[0].tolist()
    value, count = tensor[tuple(index)].item(), count_not_finite(tensor)
    return [f"{name}{index} is {value}: {count} of {tensor.numel()} values are not finite"]


def _padding_problems(meta: Tensor, pattern: SparsityPattern, d: int) -> list[str]:
    rows = describes_more(meta, pattern, d).nonzero()
    if not len(rows):
        return []
    return [f"meta describes more than {d} columns in row {int(rows[0])} ({len(rows)} of {len(meta)} rows)"]


def _group_problems(meta: Tensor, pattern: SparsityPattern, groups: tuple[int, int], d: int) -> list[str]:
    """Name the groups (n, m) that do not store exactly n columns."""
    first, count = "", 0
    n, m = groups
    for rows in row_chunks(len(meta), d):
        mask = decode_mask(meta[rows], pattern)[:, :d].reshape(-1, d // m, m)
        found = mask.sum(dim=2, dtype=torch.int32)  # [rows, groups]
        wrong = (found != n).nonzero()
        if len(wrong) and not count:
            row, group = wrong[0].tolist()
            first = f"row {rows.start + row}, group {group}"
            first += f" keeps {int(found[row, group])} of {m} columns, not {n}"
        count += len(wrong)
    return [f"meta: {first} (first of {count} wrong groups)"] if count else []


def _offset_problems(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> list[str]:
    """Name disagreements between meta, row offsets and values where rows differ."""
    o, d = shape
    meta, offsets, values = tensors["meta"], tensors["row_offsets"], tensors["values"]
    counts = torch.zeros(o, dtype=torch.int64, device=meta.device)
    for rows in row_chunks(o, d):
        counts[rows] = decode_mask(meta[rows], pattern)[:, :d].sum(dim=1)
    total, allowed = int(counts.sum()), max_values(pattern, shape)
    problems = []
    if total > allowed:
        problems.append(f"meta keeps {total} of {o * d} columns, {pattern} allows {allowed}")
    if len(values) != total:
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
