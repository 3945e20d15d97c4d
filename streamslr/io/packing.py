"""The bytes of one sparse plus low-rank linear: S packed by its pattern, and S + U·V back as a dense matrix.

For a linear of o outputs and d inputs, whatever the dtype of the values:

    pattern   values          meta (uint8)                                                  row_offsets
    2:4       [o, d/2]        [o, ceil(d/12)]: a byte three groups, c0 + 6·c1 + 36·c2       -
    n:m       [o, d·n/m]      [o, ceil(d/(k·m))]: a byte k groups, digits to base C(m, n)   -
    4:8 …     [o, d·n/m]      [o, ceil(d/8)]: a bit a column, 1 where a value is kept       -
    50%/row   [o, k]          [o, ceil(d/8)]: the same                                      -
    50%       [nnz]           [o, ceil(d/8)]: the same                                      int64 [o + 1]

Values run row by row, columns ascending. A group's digit is C(p1, 1) + … + C(pn, n) for its kept columns p1 < … < pn,
counted from 0: the combinatorial number system; of 2:4, 0 to 5 are columns 01 02 12 03 13 23. k is the most digits
that a byte holds (`NofM.groups_per_byte`); where those describe no more than 8 columns, meta is a bitmask. n:m patterns
keep exactly n slots a group: a group with fewer non-zeros also keeps its lowest free columns, at value 0; to 50%/row a
row is one such group. The first group is the lowest digit, the first column the lowest bit; digits and bits past column
d are 0.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.spec.pattern import NofM, SparsityPattern, Unstructured

_CHUNK = 1 << 22
"""Elements of S worked on at once: bounds the temporaries at about 100 MB, whatever the linear."""


def pack(S: Tensor, pattern: SparsityPattern, dtype: torch.dtype) -> dict[str, Tensor]:
    """S [o, d] -> {"values", "meta"[, "row_offsets"]}, on S's device.

    `unpack` gives S.to(dtype) back exactly. What rounds to zero in `dtype` counts as zero, and so does -0.0,
    which comes back as 0.0.
    Raises ValueError where S breaks the pattern or is not finite, InputError where a value overflows `dtype`.
    """
    o, d = S.shape
    if wrong := _misfit(pattern, (o, d)):
        raise ValueError(wrong)
    meta = torch.empty(o, pattern.meta_width(d), dtype=torch.uint8, device=S.device)
    if groups := pattern.groups(d):
        n, m = groups
        values = torch.empty(o, d // m * n, dtype=dtype, device=S.device)
        for rows in _row_chunks(o, d):
            part = _cast(S, rows, dtype)  # [rows, d]
            kept = _fill_groups(part.view(-1, d // m, m) != 0, n, pattern, rows.start).view_as(part)
            values[rows] = part[kept].view(-1, values.shape[1])
            meta[rows] = _encode(kept, pattern)
        return {"values": values, "meta": meta}

    pieces = [torch.empty(0, dtype=dtype, device=S.device)]
    counts = torch.zeros(o + 1, dtype=torch.int64, device=S.device)
    for rows in _row_chunks(o, d):
        part = _cast(S, rows, dtype)
        kept = part != 0
        pieces.append(part[kept])
        counts[rows.start + 1 : rows.stop + 1] = kept.sum(dim=1)
        meta[rows] = _encode(kept, pattern)
    row_offsets = counts.cumsum(0)
    if isinstance(pattern, Unstructured) and int(row_offsets[-1]) > pattern.num_kept(o, d):
        raise ValueError(
            f"S [{o}, {d}] breaks {pattern}: {int(row_offsets[-1])} non-zeros, {pattern.num_kept(o, d)} allowed"
        )
    return {"values": torch.cat(pieces), "meta": meta, "row_offsets": row_offsets}


def unpack(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> Tensor:
    """{"values", "meta"[, "row_offsets"]} -> S [o, d] in the dtype of the values, exact zeros elsewhere.

    Raises InputError when the tensors do not fit together; `check_packed` says how.
    """
    _require_layout(tensors, pattern, shape)
    S = torch.empty(shape, dtype=tensors["values"].dtype, device=tensors["values"].device)
    for rows in _row_chunks(*shape):
        S[rows] = _unpack_rows(tensors, pattern, shape, rows)
    return S


def unpack_rows(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int], rows: slice) -> Tensor:
    """S[rows] of a linear that `check_packed` found sound: `unpack` without its checks, and for 2:4 much faster."""
    d = shape[1]
    values, meta = _values_of(tensors, rows), tensors["meta"][rows]
    if pattern == NofM(2, 4):
        return _place_pairs(values, meta, d)
    kept = _decode(meta, pattern)[:, :d]
    S = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
    return S.masked_scatter_(kept, values)


@torch.no_grad()
def merge(
    tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """S + U·V [o, d] in `dtype`; U [o, r] and V [r, d] may be missing (rank 0). Errors as `unpack`.

    The one function that turns a packed linear into a dense one, so that propagation, replay after a crash
    and evaluation see the same bits. The sum is formed in float64: that is exact for bf16 factors of ordinary
    range, so neither the order of a BLAS, nor threads, nor TF32 or autocast settings show in the result.
    """
    _require_layout(tensors, pattern, shape)
    if wrong := _low_rank_misfit(tensors, shape):
        raise InputError(f"cannot merge a {shape[0]}x{shape[1]} linear: {wrong[0]}; `streamslr verify` tells more")
    values = tensors["values"]
    dense = torch.empty(shape, dtype=dtype, device=values.device)
    U = tensors["U"].double() if "U" in tensors else None
    V = tensors["V"].double() if "V" in tensors else None
    for rows in _row_chunks(*shape):
        total = _unpack_rows(tensors, pattern, shape, rows).double()
        if U is not None and V is not None:
            total.addmm_(U[rows], V)
        dense[rows] = total
    return dense


def check_packed(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> list[str]:
    """What is wrong with one packed linear, a sentence each; [] when it is sound.

    `tensors` holds everything stored for the linear by its last name: values, meta, row_offsets, U, V.
    """
    if wrong := _misfit(pattern, shape):
        return [wrong]
    wrongs = _layout_misfit(tensors, pattern, shape)
    wrongs += _low_rank_misfit(tensors, shape)
    known = {"values", "meta", "U", "V"} | (set() if pattern.groups(shape[1]) else {"row_offsets"})
    wrongs += [f"{name} does not belong to a {pattern} linear" for name in sorted(tensors.keys() - known)]
    for name in ("values", "U", "V"):
        if name in tensors and tensors[name].is_floating_point():
            wrongs += _non_finite(name, tensors[name])
    if _layout_misfit(tensors, pattern, shape):
        return wrongs
    wrongs += _wrong_padding(tensors["meta"], pattern, shape[1])
    if groups := pattern.groups(shape[1]):
        return wrongs + _wrong_groups(tensors["meta"], pattern, groups, shape[1])
    if isinstance(pattern, Unstructured):
        wrongs += _wrong_offsets(tensors, pattern, shape)
    return wrongs


def _row_chunks(o: int, d: int) -> Iterator[slice]:
    step = max(16, _CHUNK // max(d, 1))
    return (slice(start, min(start + step, o)) for start in range(0, o, step))


def _cast(S: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """S[rows] in `dtype`, contiguous, without -0.0."""
    part = S[rows].to(dtype) + 0.0
    if not part.isfinite().all():
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
    """Non-zeros [rows, groups, m] -> kept slots, n a group: short groups take their lowest free columns."""
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


def _encode(kept: Tensor, pattern: SparsityPattern) -> Tensor:
    """Kept slots [rows, d] bool -> meta [rows, width] uint8."""
    if digits := _digits(pattern):
        codes = _rank_groups(kept.view(len(kept), -1, digits.m), digits)  # [rows, groups]
        places = _byte_of_columns(codes, digits.groups_per_byte)
        return (places * comb(digits.m, digits.n) ** torch.arange(places.shape[2], device=kept.device)).sum(2).byte()
    eights = _byte_of_columns(kept.byte(), 8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=kept.device)).sum(2, dtype=torch.uint8)


def _byte_of_columns(row: Tensor, count: int) -> Tensor:
    """[rows, n] -> [rows, ceil(n/count), count], zeros past n."""
    return torch.nn.functional.pad(row, (0, -row.shape[1] % count)).view(len(row), -1, count)


def _rank_groups(kept: Tensor, pattern: NofM) -> Tensor:
    """Kept slots [rows, groups, m] bool, n a group -> their digits [rows, groups] int32."""
    choose = torch.tensor([[comb(j, i) for i in range(pattern.n + 1)] for j in range(pattern.m)], device=kept.device)
    seen = torch.zeros(kept.shape[:2], dtype=torch.int32, device=kept.device)
    rank = torch.zeros_like(seen)
    for j in range(pattern.m):
        slot = kept[..., j].int()
        seen += slot
        rank += choose[j].int()[seen] * slot
    return rank


def _decode(meta: Tensor, pattern: SparsityPattern) -> Tensor:
    """meta [rows, width] -> kept slots [rows, d or more] bool; a byte that names no groups keeps nothing."""
    flags = _flags_of_byte(_digits(pattern), meta.device)
    return flags[meta.int()].view(meta.shape[0], -1)


def _digits(pattern: SparsityPattern) -> NofM | None:
    """The pattern, where its metadata is digits; None where it is a bitmask."""
    return pattern if isinstance(pattern, NofM) and pattern.groups_per_byte else None


# The tables name their device, because transformers builds models, and so may call this, under torch.device("meta").


def _groups_of_byte(pattern: NofM) -> list[list[tuple[int, ...]]]:
    """Each byte's groups, each its kept columns; empty for a byte that is no number of so many digits."""
    kept = sorted(combinations(range(pattern.m), pattern.n), key=lambda columns: columns[::-1])  # by their digit
    base, count = len(kept), pattern.groups_per_byte
    return [
        [kept[byte // base**place % base] if byte < base**count else () for place in range(count)]
        for byte in range(256)
    ]


@cache
def _flags_of_byte(digits: NofM | None, device: torch.device) -> Tensor:
    """[256, columns] bool: what a byte of digits, or of a bitmask, keeps."""
    if digits is None:
        return torch.tensor([[byte >> j & 1 for j in range(8)] for byte in range(256)], device=device).bool()
    flags = [[j in group for group in groups for j in range(digits.m)] for groups in _groups_of_byte(digits)]
    return torch.tensor(flags, device=device)


@cache
def _shifts_of_byte(device: torch.device) -> Tensor:
    """[256, 3] uint8: of each of a byte's groups of 2:4 idx0 << 4 | idx1 - 1 << 2; what is no byte shifts nothing."""
    shifts = [[g[0] << 4 | g[1] - 1 << 2 if g else 0 for g in groups] for groups in _groups_of_byte(NofM(2, 4))]
    return torch.tensor(shifts, dtype=torch.uint8, device=device)


def _unpack_rows(
    tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int], rows: slice
) -> Tensor:
    """S[rows]; the layout has been checked, the meta bytes have not."""
    kept = _decode(tensors["meta"][rows], pattern)
    kept = kept[:, : shape[1]]
    values = _values_of(tensors, rows)
    if groups := pattern.groups(shape[1]):
        n, m = groups
        sound = (kept.reshape(-1, shape[1] // m, m).sum(dim=2, dtype=torch.int32) == n).all()
    else:
        offsets = tensors["row_offsets"][rows.start : rows.stop + 1]
        sound = (kept.sum(dim=1) == offsets.diff()).all() & (len(values) == offsets[-1] - offsets[0])
    if not sound or _describes_more(tensors["meta"][rows], pattern, shape[1]).any():
        raise InputError(
            f"a packed {shape[0]}x{shape[1]} linear is damaged: in rows {rows.start} to {rows.stop - 1} meta "
            f"does not describe {pattern}; `streamslr verify` names the file to copy or to make again"
        )
    S = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
    return S.masked_scatter_(kept, values)


def _values_of(tensors: Mapping[str, Tensor], rows: slice) -> Tensor:
    """The values of these rows, one after another."""
    if tensors["values"].dim() == 2:  # as many a row
        return tensors["values"][rows].reshape(-1)
    start, stop = (int(tensors["row_offsets"][i]) for i in (rows.start, rows.stop))
    return tensors["values"][start:stop] if 0 <= start <= stop else tensors["values"][:0]


def _place_pairs(values: Tensor, meta: Tensor, d: int) -> Tensor:
    """2:4 values [rows · d/2], meta [rows, ceil(d/12)] -> S [rows, d].

    Four values of 2 bytes are one integer of 8: a group's pair, read as an integer, has each half shifted to where
    its index says. These passes vectorise: 1.3 ns a weight on one core, where a scatter takes 2 and a mask 6.
    """
    shifts = _shifts_of_byte(meta.device).index_select(0, meta.reshape(-1).int())  # [bytes, 3]
    codes = shifts.view(len(meta), -1)[:, : d // 4].reshape(-1)  # [groups], idx0 << 4 | idx1 - 1 << 2
    if values.element_size() != 2:
        columns = torch.stack((codes >> 4, (codes >> 2 & 3) + 1), dim=1).long()  # [groups, 2]
        S = torch.zeros(len(codes), 4, dtype=values.dtype, device=values.device)
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


def _misfit(pattern: SparsityPattern, shape: tuple[int, int]) -> str | None:
    """Why no S of this shape can have the pattern, or None."""
    groups = pattern.groups(shape[1])
    if groups and shape[1] % groups[1]:
        return f"{pattern} needs rows of a multiple of {groups[1]} columns, not {shape[0]}x{shape[1]}"
    return None


def _layout_misfit(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> list[str]:
    """What is missing, or has the wrong dtype or shape, of values, meta and row_offsets."""
    o, d = shape
    groups = pattern.groups(d)
    expected: dict[str, tuple[torch.dtype | None, tuple[int, ...] | None]] = {
        "values": (None, (o, d // groups[1] * groups[0]) if groups else None),
        "meta": (torch.uint8, (o, pattern.meta_width(d))),
    }
    if not groups:
        expected["row_offsets"] = (torch.int64, (o + 1,))
    wrongs = []
    for name, (dtype, size) in expected.items():
        if name not in tensors:
            wrongs.append(f"{name} is missing")
            continue
        tensor = tensors[name]
        if size is not None and tuple(tensor.shape) != size:
            wrongs.append(f"{name} has shape {list(tensor.shape)}, a {o}x{d} {pattern} linear needs {list(size)}")
        elif size is None and tensor.dim() != 1:
            wrongs.append(f"{name} has shape {list(tensor.shape)}, a {pattern} linear needs one dimension")
        if dtype is not None and tensor.dtype != dtype:
            wrongs.append(f"{name} is {tensor.dtype}, not {dtype}")
        elif dtype is None and not tensor.is_floating_point():
            wrongs.append(f"{name} is {tensor.dtype}, not a floating-point type")
    return wrongs


def _require_layout(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> None:
    misfit = _misfit(pattern, shape)
    if wrong := [misfit] if misfit else _layout_misfit(tensors, pattern, shape):
        raise InputError(f"cannot unpack a {shape[0]}x{shape[1]} linear: {wrong[0]}; `streamslr verify` tells more")


def _low_rank_misfit(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> list[str]:
    """What is wrong with the presence, dtypes and shapes of U and V."""
    if "U" not in tensors and "V" not in tensors:
        return []
    if "U" not in tensors or "V" not in tensors:
        return ["U is there without V" if "U" in tensors else "V is there without U"]
    o, d = shape
    U, V = tensors["U"], tensors["V"]
    wrongs = []
    if U.dim() != 2 or V.dim() != 2 or (U.shape[0], V.shape[1]) != (o, d) or U.shape[1] != V.shape[0]:
        wrongs.append(f"U {list(U.shape)} and V {list(V.shape)} are not the [{o}, r] and [r, {d}] of a {o}x{d} linear")
    values = tensors.get("values", U)
    for name, tensor in (("U", U), ("V", V)):
        if not tensor.is_floating_point() or tensor.dtype != values.dtype:
            wrongs.append(f"{name} is {tensor.dtype}, but values are {values.dtype}")
    return wrongs


def _non_finite(name: str, tensor: Tensor) -> list[str]:
    finite = tensor.isfinite()
    if finite.all():
        return []
    index = (~finite).nonzero()[0].tolist()
    count = int(finite.numel() - finite.sum())
    return [f"{name}{index} is {tensor[tuple(index)].item()}: {count} of {finite.numel()} values are not finite"]


def _describes_more(meta: Tensor, pattern: SparsityPattern, d: int) -> Tensor:
    """[rows] bool: bits or digits past column d in the last byte of meta [rows, width]."""
    digits = _digits(pattern)
    base, count, columns = (comb(digits.m, digits.n), digits.groups_per_byte, digits.m) if digits else (2, 8, 1)
    used = (d // columns - 1) % count + 1  # of the last byte's bits or digits
    return meta[:, -1].int() >= base**used if used < count else meta[:, :0].any(dim=1)


def _wrong_padding(meta: Tensor, pattern: SparsityPattern, d: int) -> list[str]:
    rows = _describes_more(meta, pattern, d).nonzero()
    if not len(rows):
        return []
    return [f"meta describes more than {d} columns in row {int(rows[0])} ({len(rows)} of {len(meta)} rows)"]


def _wrong_groups(meta: Tensor, pattern: SparsityPattern, groups: tuple[int, int], d: int) -> list[str]:
    """Groups (n, m) that do not keep exactly n slots."""
    first, count = "", 0
    n, m = groups
    for rows in _row_chunks(len(meta), d):
        kept = _decode(meta[rows], pattern)[:, :d].reshape(-1, d // m, m)
        found = kept.sum(dim=2, dtype=torch.int32)  # [rows, groups]
        wrong = (found != n).nonzero()
        if len(wrong) and not count:
            row, group = wrong[0].tolist()
            first = f"row {rows.start + row}, group {group}"
            first += f" keeps {int(found[row, group])} of {m} columns, not {n}"
        count += len(wrong)
    return [f"meta: {first} (first of {count} wrong groups)"] if count else []


def _wrong_offsets(tensors: Mapping[str, Tensor], pattern: Unstructured, shape: tuple[int, int]) -> list[str]:
    """Disagreements between the meta, row offsets and values of an unstructured pattern."""
    o, d = shape
    meta, offsets, values = tensors["meta"], tensors["row_offsets"], tensors["values"]
    counts = torch.zeros(o, dtype=torch.int64, device=meta.device)
    for rows in _row_chunks(o, d):
        counts[rows] = _decode(meta[rows], pattern)[:, :d].sum(dim=1)
    total = int(counts.sum())
    wrongs = []
    if total > pattern.num_kept(o, d):
        wrongs.append(f"meta keeps {total} of {o * d} columns, {pattern} allows {pattern.num_kept(o, d)}")
    if len(values) != total:
        wrongs.append(f"values has {len(values)} entries, but meta keeps {total} columns")
    if offsets[0] != 0:
        wrongs.append(f"row_offsets starts at {int(offsets[0])}, not at 0")
    rows_wrong = (offsets.diff() != counts).nonzero()
    if len(rows_wrong):
        row = int(rows_wrong[0])
        wrongs.append(
            f"row_offsets gives row {row} {int(offsets[row + 1] - offsets[row])} values, but meta keeps "
            f"{int(counts[row])} of its columns ({len(rows_wrong)} of {o} rows disagree)"
        )
    return wrongs
