"""S packed by its pattern, S unpacked, and S + U·V merged to a dense matrix. io/packed_layout.py has the layout."""

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.gpu import in_any_order
from streamslr.io.low_rank import exact_product
from streamslr.io.packed_layout import (
    MetaCode,
    low_rank_misfits,
    max_values,
    meta_code,
    meta_width,
    part_shapes,
    pattern_misfit,
    sparse_misfits,
    value_format,
)
from streamslr.spec.pattern import Dense, NofM, SparsityPattern
from streamslr.spec.values import ValueFormat, spread
from streamslr.tensors import is_finite

_CHUNK = 1 << 22
"""Elements of S worked on at once. Bounds the temporaries at about 100 MB, for a linear of any size."""


def pack_on_grid(
    codes: Tensor, scales: Tensor, pattern: SparsityPattern, dtype: torch.dtype, values: ValueFormat
) -> dict[str, Tensor]:
    """Pack S whose values lie on a grid; `unpack` returns each code times the scale of its column, in float32.

    Args:
        codes: [o, d] codes of S, zero where nothing is kept.
        scales: [o, groups] scale of each group.
        pattern: pattern that the codes obey.
        dtype: dtype to store scales in.
        values: format of the values.

    Returns:
        values, meta, scales and, where rows differ in their number of values, row_offsets, on the device of the codes.

    Raises:
        ValueError: the codes break the pattern or are not finite.
        InputError: a scale overflows `dtype`.
    """
    o, d = codes.shape
    stored_scales = _cast(scales, slice(0, o), dtype)
    if pattern.groups(d) is None:
        packed = pack(codes.bfloat16(), pattern, torch.bfloat16)  # which holds every code
        return packed | {"values": values.encode(packed["values"]), "scales": stored_scales}
    shapes = part_shapes(pattern, (o, d), values=values)
    encoded = torch.empty(shapes["values"], dtype=values.dtype, device=codes.device)
    meta = torch.empty(shapes["meta"], dtype=torch.uint8, device=codes.device)
    for rows in row_chunks(o, d):
        packed = pack(codes[rows].bfloat16(), pattern, torch.bfloat16)
        encoded[rows], meta[rows] = values.encode(packed["values"]), packed["meta"]
    return {"values": encoded, "meta": meta, "scales": stored_scales}


def pack(S: Tensor, pattern: SparsityPattern, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pack S; `unpack` returns exactly S.to(dtype).

    What rounds to zero in `dtype` counts as zero, and so does -0.0, which comes back as 0.0.

    Args:
        S: sparse matrix [o, d].
        pattern: pattern that S obeys.
        dtype: dtype to store values in.

    Returns:
        values, meta and, where rows differ in their number of values, row_offsets, on the device of S.

    Raises:
        ValueError: S breaks the pattern or is not finite.
        InputError: a value overflows `dtype`.
    """
    o, d = S.shape
    if problem := pattern_misfit(pattern, (o, d)):
        raise ValueError(problem)
    meta = torch.empty(o, meta_width(pattern, d), dtype=torch.uint8, device=S.device)
    if groups := pattern.groups(d):
        n, m = groups
        values = torch.empty(o, d // m * n, dtype=dtype, device=S.device)
        for rows in row_chunks(o, d):
            part = _cast(S, rows, dtype)  # [rows, d]
            mask = _fill_groups(part.view(-1, d // m, m) != 0, n, pattern, rows.start).view_as(part)
            values[rows] = part[mask].view(-1, values.shape[1])
            meta[rows] = _encode(mask, pattern)
        return {"values": values, "meta": meta}

    pieces = [torch.empty(0, dtype=dtype, device=S.device)]
    counts = torch.zeros(o + 1, dtype=torch.int64, device=S.device)
    for rows in row_chunks(o, d):
        part = _cast(S, rows, dtype)
        mask = part != 0
        pieces.append(part[mask])
        counts[rows.start + 1 : rows.stop + 1] = mask.sum(dim=1)
        meta[rows] = _encode(mask, pattern)
    row_offsets = counts.cumsum(0)
    allowed = max_values(pattern, (o, d))
    if int(row_offsets[-1]) > allowed:
        raise ValueError(f"S [{o}, {d}] breaks {pattern}: {int(row_offsets[-1])} non-zeros, {allowed} allowed")
    return {"values": torch.cat(pieces), "meta": meta, "row_offsets": row_offsets}


def unpack(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> Tensor:
    """Unpack S [o, d] in the dtype of the values, of a grid in float32, with exact zeros elsewhere.

    Args:
        tensors: values, meta, of a grid scales and, where rows differ, row_offsets.
        pattern: pattern of S.
        shape: (o, d).

    Raises:
        InputError: the tensors do not fit together; `check_packed` says how.
    """
    _require_layout(tensors, pattern, shape)
    dtype = torch.float32 if "scales" in tensors else tensors["values"].dtype
    S = torch.empty(shape, dtype=dtype, device=tensors["values"].device)
    for rows in row_chunks(*shape):
        S[rows] = _unpack_rows_checked(tensors, pattern, shape, rows)
    return S


def unpack_codes(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> Tensor:
    """Unpack the codes [o, d] of values on a grid, in bfloat16, which holds all exactly; arguments as of `unpack`."""
    form = value_format(tensors, shape[1])
    if form is None:
        raise ValueError("the values are numbers as they are, not codes")
    groups = pattern.groups(shape[1])
    count = shape[1] // groups[1] * groups[0] if groups else int(tensors["row_offsets"][-1])
    positions = {part: tensor for part, tensor in tensors.items() if part in ("meta", "row_offsets")}
    return unpack({**positions, "values": form.decode(tensors["values"], count)}, pattern, shape)


def unpack_rows(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int], rows: slice) -> Tensor:
    """Unpack S[rows] of a linear that `check_packed` found sound: no checks, and for 2:4 much faster than `unpack`."""
    d = shape[1]
    values, meta = _values_of(tensors, pattern, d, rows), tensors["meta"][rows]
    if pattern == NofM(2, 4):
        S = _expand_pairs(values, meta, d)
    else:
        mask = stored_columns(meta, pattern, d)
        S = torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter_(mask, values)
    return _scaled(S, tensors, rows)


@torch.no_grad()
def merge(
    tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Merge a packed linear to the dense S + U·V [o, d] in `dtype`.

    No other function turns a packed linear into a dense one, so that propagation, replay after a crash and evaluation
    see the same bits. The sum is formed in float64, which is exact for bf16 factors of ordinary range: neither the
    order of a BLAS, nor threads, nor TF32 or autocast settings show in the result.

    Args:
        tensors: parts of the linear. Without U [o, r] and V [r, d] the rank is 0.
        pattern: pattern of S.
        shape: (o, d).
        dtype: dtype of the result.

    Raises:
        InputError: the tensors do not fit together; `check_packed` says how.
    """
    _require_layout(tensors, pattern, shape)
    if problems := low_rank_misfits(tensors, shape):
        raise InputError(f"cannot merge a {shape[0]}x{shape[1]} linear: {problems[0]}; `streamslr verify` tells more")
    values = tensors["values"]
    dense = torch.empty(shape, dtype=dtype, device=values.device)
    low_rank = exact_product(tensors)
    for rows in row_chunks(*shape):
        total = _unpack_rows_checked(tensors, pattern, shape, rows).double()
        if low_rank is not None:
            total.addmm_(low_rank[0][rows], low_rank[1])
        dense[rows] = total
    return dense


def row_chunks(o: int, d: int) -> Iterator[slice]:
    """Yield slices of the rows of an [o, d] matrix, each of a bounded number of elements."""
    step = max(16, _CHUNK // max(d, 1))
    return (slice(start, min(start + step, o)) for start in range(0, o, step))


def decode_mask(meta: Tensor, pattern: SparsityPattern) -> Tensor:
    """Decode meta [rows, width] to the mask of stored columns, bool [rows, d or more].

    A byte that is no number of the code's digits stores nothing.
    """
    flags = _flags_of_byte(meta_code(pattern), meta.device)
    return flags[meta.int()].view(meta.shape[0], -1)


def stored_columns(meta: Tensor, pattern: SparsityPattern, d: int) -> Tensor:
    """Return the mask of stored columns, bool [rows, d]; bytes of `meta` past column d are left out."""
    if isinstance(pattern, Dense):
        return torch.ones(len(meta), d, dtype=torch.bool, device=meta.device)
    return decode_mask(meta, pattern)[:, :d]


def describes_more(meta: Tensor, pattern: SparsityPattern, d: int) -> Tensor:
    """Return which rows of meta [rows, width] have bits or digits past column d, bool [rows]."""
    if isinstance(pattern, Dense):
        return meta.any(dim=1)
    code = meta_code(pattern)
    used = (d // code.columns - 1) % code.count + 1  # digits of the last byte
    return meta[:, -1].int() >= code.base**used if used < code.count else meta[:, :0].any(dim=1)


def _cast(S: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Return S[rows] in `dtype`, contiguous, without -0.0."""
    part = S[rows].to(dtype) + 0.0
    if not is_finite(part):
        row, column = (~part.isfinite()).nonzero()[0].tolist()
        value = S[rows.start + row, column].item()
        if part.dtype == S.dtype or value != value or abs(value) == float("inf"):
            raise ValueError(f"S[{rows.start + row}, {column}] is {value}: only finite values can be stored")
        raise InputError(
            f"S[{rows.start + row}, {column}] = {value:g} does not fit {dtype}, which ends at "
            f"{torch.finfo(dtype).max:g}: store in bfloat16 or float32"
        )
    return part.contiguous()


def _fill_groups(nonzero: Tensor, n: int, pattern: SparsityPattern, first_row: int) -> Tensor:
    """Return the mask of stored columns, n a group: non-zeros [rows, groups, m] and the lowest free columns."""
    spare = n - nonzero.sum(dim=2, keepdim=True, dtype=torch.int32)  # [rows, groups, 1]
    if (spare < 0).any():
        row, group, _ = (spare < 0).nonzero()[0].tolist()
        m = nonzero.shape[2]
        raise ValueError(
            f"S breaks {pattern}: row {first_row + row}, group {group} (columns {group * m} to "
            f"{group * m + m - 1}) has {n - int(spare[row, group])} non-zeros"
        )
    if not spare.any():
        return nonzero
    free = ~nonzero
    return nonzero | (free & (free.cumsum(dim=2, dtype=torch.int32) <= spare))


def _encode(mask: Tensor, pattern: SparsityPattern) -> Tensor:
    """Encode the mask of stored columns [rows, d] bool as meta [rows, width] uint8."""
    if isinstance(pattern, Dense):
        return mask[:, :0].byte()
    code = meta_code(pattern)
    if code.group is None:
        bits = _bytes_of_columns(mask.byte(), 8)
        return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(2, dtype=torch.uint8)
    ranks = _rank_groups(mask.view(len(mask), -1, code.columns), code.group)  # [rows, groups]
    digits = _bytes_of_columns(ranks, code.count)
    return (digits * code.base ** torch.arange(digits.shape[2], device=mask.device)).sum(2).byte()


def _bytes_of_columns(row: Tensor, count: int) -> Tensor:
    """Split [rows, n] into [rows, ceil(n/count), count], with zeros past n."""
    return torch.nn.functional.pad(row, (0, -row.shape[1] % count)).view(len(row), -1, count)


def _rank_groups(mask: Tensor, group: NofM) -> Tensor:
    """Return the digit of each group: mask [rows, groups, m] bool -> [rows, groups] int32."""
    choose = torch.tensor([[comb(j, i) for i in range(group.n + 1)] for j in range(group.m)], device=mask.device)
    seen = torch.zeros(mask.shape[:2], dtype=torch.int32, device=mask.device)
    rank = torch.zeros_like(seen)
    for j in range(group.m):
        stored = mask[..., j].int()
        seen += stored
        rank += choose[j].int()[seen] * stored
    return rank


# The tables name their device, because transformers builds models, and so may call this, under torch.device("meta").


def _groups_of_byte(code: MetaCode, group: NofM) -> list[list[tuple[int, ...]]]:
    """Return each byte's groups, each as its stored columns; () for a byte that is no number of so many digits."""
    columns = sorted(combinations(range(group.m), group.n), key=lambda columns: columns[::-1])  # by their digit
    base, count = code.base, code.count
    return [
        [columns[byte // base**i % base] if byte < base**count else () for i in range(count)] for byte in range(256)
    ]


@cache
def _flags_of_byte(code: MetaCode, device: torch.device) -> Tensor:
    """Return the columns that each byte stores, [256, columns of a byte] bool."""
    if code.group is None:
        return torch.tensor([[byte >> j & 1 for j in range(8)] for byte in range(256)], device=device).bool()
    of_byte = _groups_of_byte(code, code.group)
    flags = [[j in columns for columns in groups for j in range(code.columns)] for groups in of_byte]
    return torch.tensor(flags, device=device)


@cache
def _shifts_of_byte(device: torch.device) -> Tensor:
    """Return idx0 << 4 | idx1 - 1 << 2 for each of a byte's groups of 2:4, [256, 3] uint8; 0 for what is no byte."""
    pattern = NofM(2, 4)
    of_byte = _groups_of_byte(meta_code(pattern), pattern)
    shifts = [[g[0] << 4 | g[1] - 1 << 2 if g else 0 for g in groups] for groups in of_byte]
    return torch.tensor(shifts, dtype=torch.uint8, device=device)


def _unpack_rows_checked(
    tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int], rows: slice
) -> Tensor:
    """Unpack S[rows] of tensors that fit the layout; check the bytes of meta."""
    mask = stored_columns(tensors["meta"][rows], pattern, shape[1])
    values = _values_of(tensors, pattern, shape[1], rows)
    if groups := pattern.groups(shape[1]):
        n, m = groups
        sound = (mask.reshape(-1, shape[1] // m, m).sum(dim=2, dtype=torch.int32) == n).all()
    else:
        offsets = tensors["row_offsets"][rows.start : rows.stop + 1]
        sound = (mask.sum(dim=1) == offsets.diff()).all() & (len(values) == offsets[-1] - offsets[0])
    if not sound or describes_more(tensors["meta"][rows], pattern, shape[1]).any():
        raise InputError(
            f"a packed {shape[0]}x{shape[1]} linear is damaged: in rows {rows.start} to {rows.stop - 1} meta "
            f"does not describe {pattern}; `streamslr verify` names the file to copy or to make again"
        )
    S = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return _scaled(S.masked_scatter_(mask, values), tensors, rows)


def _values_of(tensors: Mapping[str, Tensor], pattern: SparsityPattern, d: int, rows: slice) -> Tensor:
    """Return the values of these rows, or their codes, one after another."""
    values, form = tensors["values"], value_format(tensors, d)
    if groups := pattern.groups(d):  # as many in each row
        n, m = groups
        values = values[rows]
        return (values if form is None else form.decode(values, d // m * n)).reshape(-1)
    start, stop = (int(tensors["row_offsets"][i]) for i in (rows.start, rows.stop))
    if not 0 <= start <= stop:
        return values[:0] if form is None else form.decode(values[:0], 0)
    if form is None:
        return values[start:stop]
    first = start // (codes_an_entry := 8 * values.element_size() // form.bits)
    return form.decode(values[first : form.stored_width(stop)], stop - first * codes_an_entry)[
        start - first * codes_an_entry :
    ]


def _scaled(S: Tensor, tensors: Mapping[str, Tensor], rows: slice) -> Tensor:
    """Return S [rows, d] of values as they are; of codes, times their scales, in float32."""
    return S.float().mul_(spread(tensors["scales"][rows], S.shape[1])) if "scales" in tensors else S


def _expand_pairs(values: Tensor, meta: Tensor, d: int) -> Tensor:
    """Unpack 2:4: values [rows · d/2], meta [rows, ceil(d/12)] -> S [rows, d].

    Four values of 2 bytes are one integer of 8. A group's pair, read as an integer, has each half shifted to where
    its index says. These passes vectorise: 1.3 ns a weight on one core, where a scatter takes 2 and a mask 6.
    """
    shifts = _shifts_of_byte(meta.device).index_select(0, meta.reshape(-1).int())  # [bytes, 3]
    codes = shifts.view(len(meta), -1)[:, : d // 4].reshape(-1)  # [groups], idx0 << 4 | idx1 - 1 << 2
    if values.element_size() != 2:
        columns = torch.stack((codes >> 4, (codes >> 2 & 3) + 1), dim=1).long()  # [groups, 2]
        S = torch.zeros(len(codes), 4, dtype=values.dtype, device=values.device)
        with in_any_order():  # no column twice
            return S.scatter_(1, columns, values.view(-1, 2)).view(-1, d)
    if values.storage_offset() % 2:  # a view of a mapped file, where pairs need not be aligned
        values = values.clone()
    low = values.view(torch.int32).long()  # [groups]
    high = low & 0xFFFF0000
    low &= 0xFFFF
    low <<= (codes & 0x30).long()
    high <<= ((codes & 0xC) << 2).long()
    low |= high
    return low.view(values.dtype).view(-1, d)


def _require_layout(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> None:
    misfit = pattern_misfit(pattern, shape)
    if problems := [misfit] if misfit else sparse_misfits(tensors, pattern, shape):
        raise InputError(f"cannot unpack a {shape[0]}x{shape[1]} linear: {problems[0]}; `streamslr verify` tells more")
