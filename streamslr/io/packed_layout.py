"""The stored layout of a packed linear, and what headers and config.json say of it.

A linear P of o outputs and d inputs, W ≈ S + U·V, is stored as tensors `P.values`, `P.meta` … Where the values are
numbers as the checkpoint has them:

    pattern   values         meta (uint8)                                                   row_offsets
    2:4       [o, d/2]       [o, ceil(d/12)]: three groups a byte, c0 + 6·c1 + 36·c2        -
    n:m       [o, d·n/m]     [o, ceil(d/(k·m))]: k groups a byte, digits to base C(m, n)    -
    4:8 …     [o, d·n/m]     [o, ceil(d/8)]: a bitmask, a bit a column, 1 for a stored one  -
    50%/row   [o, k]         [o, ceil(d/8)]: a bitmask                                      -
    50%       [nnz]          [o, ceil(d/8)]: a bitmask                                      int64 [o + 1]
    dense     [o, d]         [o, 0]                                                         -

and at rank r > 0 also U [o, r] and V [r, d], both in one floating-point dtype, or int8 codes from -127 to 127 with
`P.low_rank_scales` [r], the scale of each component: U·V is then the sum over k of U[:, k] · low_rank_scales[k] · V[k].

Where the values lie on a grid, they are codes, and `P.scales` [o, groups] has the scale of each group of ceil(d /
groups) columns of a row: a value is its code times the scale of its column. Codes are int8
(int8), float8_e4m3fn (fp8), or two a byte in uint8 (int4): of each row's k codes, or of all nnz for 50%, the first in
the low half of a byte, as two's complement. The rest is as above.

Values run row by row, columns ascending. A group's digit is C(p1, 1) + … + C(pn, n) for its stored columns
p1 < … < pn, counted from 0: the combinatorial number system. For 2:4, digits 0 to 5 are columns 01 02 12 03 13 23.
k is the most digits that a byte holds; where k·m is no more than 8 columns, meta is a bitmask. n:m patterns store
exactly n columns of each group: a group with fewer non-zeros also stores its lowest free columns, at value 0. For
50%/row, a row is one such group. The first group is the lowest digit, the first column the lowest bit; digits and bits
past column d are 0.
"""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from math import comb, prod
from typing import Any

import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.spec.pattern import MIXED, Dense, NofM, SparsityPattern, Unstructured, UnstructuredRows, parse_pattern
from streamslr.spec.values import (
    STORED,
    ValueFormat,
    Values,
    format_of,
    grid_of,
    group_count,
    parse_low_rank_values,
    parse_values,
    same_values,
    values_text,
)

FORMAT_VERSION = 4
"""Version that is written. 4: values on a grid, with scales; without them, the same bytes of shards as in 3; 3: new
names in the journal (`linears`, `wanda_error`, `non_block` …); 2: metadata of n:m in digits, the same bytes of shards
as in 3; 1: a nibble for a group of 2:4."""
READABLE_VERSIONS = (2, 3, 4)
QUANT_METHOD = "streamslr"

BLOCK_FILE = "model-block-{:05d}.safetensors"
NON_BLOCK_FILE = "model-outside.safetensors"
INDEX_FILE = "model.safetensors.index.json"

PACKED_PARTS = ("values", "meta", "scales", "row_offsets", "U", "V", "low_rank_scales")
"""Names of the tensors of a packed linear. Not every linear has the last five."""
LOW_RANK_PARTS = ("U", "V", "low_rank_scales")
_PART_DTYPES: Mapping[str, torch.dtype] = {"meta": torch.uint8, "row_offsets": torch.int64}
"""Dtypes of parts; all others have the dtype that the linear's factors have, but for values on a grid."""

Linears = dict[str, tuple[SparsityPattern, tuple[int, int]]]
"""Module path of a packed linear -> its pattern and dense shape (o, d)."""


# Parts


def part_shapes(
    pattern: SparsityPattern,
    shape: tuple[int, int],
    rank: int = 0,
    num_values: int | None = None,
    values: ValueFormat | None = None,
    low_rank: torch.dtype | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each part that a packed linear has.

    Args:
        pattern: sparsity pattern of S.
        shape: (o, d) of the dense weight.
        rank: rank of U·V.
        num_values: values where rows differ in their number; None for the most that there can be.
        values: format of the values; None for numbers as the checkpoint has them.
        low_rank: int8 for U and V as codes.
    """
    o, d = shape
    groups = pattern.groups(d)
    most = max_values(pattern, shape) if num_values is None else num_values
    in_run = d // groups[1] * groups[0] if groups else most
    stored = in_run if values is None else values.stored_width(in_run)
    shapes: dict[str, tuple[int, ...]] = {
        "values": (o, stored) if groups else (stored,),
        "meta": (o, meta_width(pattern, d)),
    }
    if values is not None:
        shapes["scales"] = (o, group_count(d, values.group))
    if not groups:
        shapes["row_offsets"] = (o + 1,)  # int64: a linear may hold more than 2^31 values
    if rank:
        shapes |= {"U": (o, rank), "V": (rank, d)}
    if rank and low_rank == torch.int8:
        shapes["low_rank_scales"] = (rank,)
    return shapes


def part_dtype(
    part: str, dtype: torch.dtype | None, values: Values = None, low_rank: torch.dtype | None = None
) -> torch.dtype | None:
    """Return the dtype of a part of a linear whose numbers have this dtype, None for torch's default.

    Args:
        part: name of the part.
        dtype: dtype of numbers that no format decides.
        values: values of S.
        low_rank: dtype of U and V where it is another.
    """
    if part == "values" and values is not None:
        return values if isinstance(values, torch.dtype) else values.dtype
    if part in ("U", "V") and low_rank is not None:
        return low_rank
    return _PART_DTYPES.get(part, dtype)


def number_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of a linear's numbers: scales where values lie on a grid, else values."""
    return tensors["scales" if "scales" in tensors else "values"].dtype


def value_format(tensors: Mapping[str, Tensor], d: int) -> ValueFormat | None:
    """Return the format of a linear's values; None for numbers as the checkpoint has them, or an unknown format."""
    return format_of(tensors["values"], tensors["scales"], d) if "scales" in tensors else None


def max_values(pattern: SparsityPattern, shape: tuple[int, int]) -> int:
    """Return the most values that S [o, d] can have."""
    o, d = shape
    if groups := pattern.groups(d):
        n, m = groups
        return o * (d // m) * n
    return pattern.num_kept(o, d) if isinstance(pattern, Unstructured) else o * d


def count_values(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> int:
    """Return how many values the S [o, d] of a packed linear has."""
    if "scales" not in tensors:
        return tensors["values"].numel()
    return max_values(pattern, shape) if pattern.groups(shape[1]) else int(tensors["row_offsets"][-1])


def packed_bytes(
    pattern: SparsityPattern,
    shape: tuple[int, int],
    rank: int,
    number_bytes: int,
    values: Values = None,
    low_rank: torch.dtype | None = None,
) -> int:
    """Return the most bytes that a packed linear takes in a shard; number_bytes: of a number of the checkpoint."""
    shapes, total = part_shapes(pattern, shape, rank, values=grid_of(values), low_rank=low_rank), 0
    for part, size in shapes.items():
        dtype = part_dtype(part, None, values, low_rank)
        total += prod(size) * (number_bytes if dtype is None else dtype.itemsize)
    return total


def low_rank_bytes(shape: tuple[int, int], rank: int, number_bytes: int, low_rank: torch.dtype | None = None) -> int:
    """Return the bytes of U [o, r] and V [r, d] together, with their scales."""
    if low_rank == torch.int8:
        return rank * (sum(shape) + number_bytes)
    return rank * sum(shape) * (number_bytes if low_rank is None else low_rank.itemsize)


def part_name(linear: str, part: str) -> str:
    """Return the name under which a part is stored."""
    return f"{linear}.{part}"


def without_numbers(name: str) -> str:
    """Return a module path with a star for each number: the same for a linear in every block."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def stored_parts(linear: str, names: Container[str]) -> dict[str, str]:
    """Return part -> stored name, for the parts of one linear that are among `names`."""
    return {part: name for part in PACKED_PARTS if (name := part_name(linear, part)) in names}


def linears_among(names: Iterable[str]) -> list[str]:
    """Return the paths of the packed linears among stored names. Each has a `meta`."""
    return [name.removesuffix(".meta") for name in names if name.endswith(".meta")]


# Bytes of meta


@dataclass(frozen=True)
class MetaCode:
    """Reading of a byte of `meta`: `count` digits to base `base`, each for `columns` neighbouring columns."""

    group: NofM | None
    """Group that a digit describes; None for a bitmask, whose digits are bits and describe one column each."""
    base: int
    count: int
    columns: int


def meta_code(pattern: SparsityPattern) -> MetaCode:
    """Return how a pattern's bytes of `meta` are read.

    Digits take less than a bitmask where those of a byte describe more than 8 columns. For 2:4 a byte holds 3 groups:
    2.67 bits a group, of log2 6 = 2.58 that any code needs; a bitmask takes 4.
    """
    if isinstance(pattern, NofM) and pattern.m <= 256:  # no byte holds a digit of a wider group: C(m, n) ≥ m
        base, count = comb(pattern.m, pattern.n), 0
        while base ** (count + 1) <= 256:
            count += 1
        if count * pattern.m > 8:
            return MetaCode(pattern, base, count, pattern.m)
    return MetaCode(None, base=2, count=8, columns=1)


def of_same_code(pattern: SparsityPattern) -> NofM | UnstructuredRows | Unstructured | Dense:
    """Return the pattern whose tables and checks hold for `pattern` too: a fraction does not show in bytes of meta."""
    if isinstance(pattern, NofM | Dense):
        return pattern
    return UnstructuredRows(0.5) if pattern.by_row else Unstructured(0.5)


def meta_width(pattern: SparsityPattern, d: int) -> int:
    """Return the bytes of `meta` that describe a row of d columns."""
    if isinstance(pattern, Dense):
        return 0
    code = meta_code(pattern)
    return -(-d // (code.count * code.columns))


# Tensors that do not fit the layout


def pattern_misfit(pattern: SparsityPattern, shape: tuple[int, int]) -> str | None:
    """Return why no S of this shape can have the pattern, or None."""
    groups = pattern.groups(shape[1])
    if groups and shape[1] % groups[1]:
        return f"{pattern} needs rows of a multiple of {groups[1]} columns, not {shape[0]}x{shape[1]}"
    return None


def sparse_misfits(tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]) -> list[str]:
    """Return what is missing of values, meta, scales, row_offsets, or has a wrong dtype or shape; a sentence each."""
    o, d = shape
    form = value_format(tensors, d) if "values" in tensors else None
    if form is None and "scales" in tensors and "values" in tensors:
        return [f"values are {tensors['values'].dtype}, with scales {list(tensors['scales'].shape)}: no known format"]
    expected = part_shapes(pattern, shape, values=form)
    problems = []
    for part, size in expected.items():
        if part not in tensors:
            problems.append(f"{part} is missing")
            continue
        tensor, dtype = tensors[part], part_dtype(part, None, form)
        if part == "values" and "row_offsets" in expected:
            if tensor.dim() != 1:
                problems.append(f"{part} has shape {list(tensor.shape)}, a {pattern} linear needs one dimension")
        elif tuple(tensor.shape) != size:
            problems.append(f"{part} has shape {list(tensor.shape)}, a {o}x{d} {pattern} linear needs {list(size)}")
        if dtype is not None and tensor.dtype != dtype:
            problems.append(f"{part} is {tensor.dtype}, not {dtype}")
        elif dtype is None and not (tensor.is_floating_point() and tensor.dtype.itemsize > 1):
            problems.append(f"{part} is {tensor.dtype}, not a floating-point type of 16 bits or more")
    return problems


def low_rank_misfits(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> list[str]:
    """Return what is wrong with the presence, dtypes and shapes of U, V and their scales, a sentence each."""
    scales = tensors.get("low_rank_scales")
    if "U" not in tensors and "V" not in tensors:
        return [] if scales is None else ["low_rank_scales are there without U and V"]
    if "U" not in tensors or "V" not in tensors:
        return ["U is there without V" if "U" in tensors else "V is there without U"]
    o, d = shape
    U, V = tensors["U"], tensors["V"]
    problems = []
    if U.dim() != 2 or V.dim() != 2 or (U.shape[0], V.shape[1]) != (o, d) or U.shape[1] != V.shape[0]:
        problems.append(
            f"U {list(U.shape)} and V {list(V.shape)} are not the [{o}, r] and [r, {d}] of a {o}x{d} linear"
        )
    if scales is not None:
        if scales.dim() != 1 or V.dim() != 2 or len(scales) != len(V):
            problems.append(f"low_rank_scales has shape {list(scales.shape)}, V has {list(V.shape)}")
        if not (scales.is_floating_point() and scales.dtype.itemsize > 1):
            problems.append(f"low_rank_scales is {scales.dtype}, not a floating-point type of 16 bits or more")
    for part, tensor in (("U", U), ("V", V)):
        if scales is not None and tensor.dtype != torch.int8:
            problems.append(f"{part} is {tensor.dtype}, with low_rank_scales it must be torch.int8")
        elif scales is None and not (tensor.is_floating_point() and tensor.dtype.itemsize > 1):
            problems.append(f"{part} is {tensor.dtype}, not a floating-point type of 16 bits or more")
    if U.dtype != V.dtype:
        problems.append(f"U is {U.dtype}, but V is {V.dtype}")
    return problems


def journal_misfit(tensors: Mapping[str, Tensor], d: int, values: str, low_rank: str) -> str | None:
    """Return how a linear's stored parts differ from the texts of its values, of S and of U and V; None for not at all.

    Args:
        tensors: the parts; they may be on meta.
        d: columns of the linear.
        values: text of the values of S.
        low_rank: text of the values of U and V.
    """
    form = value_format(tensors, d) if "values" in tensors else None
    numbers = parse_values(values)
    if not same_values(form, values, d):
        return f"values as {values_text(form)}, the journal says {values}"
    if isinstance(numbers, torch.dtype) and "values" in tensors and tensors["values"].dtype != numbers:
        return f"values as {tensors['values'].dtype}, the journal says {values}"
    expected = parse_low_rank_values(low_rank)
    if ("U" in tensors and (expected or tensors["U"].dtype) != tensors["U"].dtype) or (
        expected is None and "low_rank_scales" in tensors
    ):
        return f"U and V as {tensors['U'].dtype if 'U' in tensors else 'nothing'}, the journal says {low_rank}"
    return None


# Headers of shards


def shard_metadata(linears: Mapping[str, tuple[SparsityPattern, tuple[int, int]]]) -> dict[str, str]:
    """Return the texts of a shard's header: {"format": "pt"}, and "PATTERN OxD" for each packed linear by its path."""
    return {"format": "pt"} | {name: f"{pattern} {o}x{d}" for name, (pattern, (o, d)) in linears.items()}


def packed_linears(metadata: Mapping[str, str] | None) -> Linears:
    """Return the packed linears that the texts of a shard's header name. Raises InputError for a damaged text."""
    linears: Linears = {}
    for name, text in (metadata or {}).items():
        if name == "format":
            continue
        match = re.fullmatch(r"(\S+) (\d{1,12})x(\d{1,12})", text)
        if match is None:
            raise InputError(f'the header of a shard says {text!r} of {name}, not "PATTERN OxD": it is damaged')
        linears[name] = parse_pattern(match[1]), (int(match[2]), int(match[3]))
    return linears


# config.json


@dataclass(frozen=True)
class PackedFormat:
    """Format of a compressed model, from its config.json. The rank of each linear is read off its U."""

    pattern: SparsityPattern | None
    """Pattern of all linears. None where they differ: the header of each shard names the pattern of each linear."""
    rank: int
    """Largest rank asked for; a small linear may have less."""
    format_version: int


def quantization_config(
    pattern: SparsityPattern | None, rank: int, values: str = STORED, low_rank_values: str = STORED
) -> dict[str, Any]:
    """Return the entry of config.json that marks a compressed model. `read_quantization_config` reads it.

    Args:
        pattern: pattern of all linears, None where they differ.
        rank: the largest rank.
        values: format of the values of all linears, `MIXED` where they differ; for people, since shards tell it too.
        low_rank_values: the same of U and V.
    """
    entry = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "pattern": MIXED if pattern is None else str(pattern),
        "rank": rank,
    }
    named = {"values": values, "low_rank_values": low_rank_values}
    return entry | {name: text for name, text in named.items() if text != STORED}


def read_quantization_config(config: object) -> PackedFormat | None:
    """Read the entry that `quantization_config` makes.

    Args:
        config: config.json, parsed to a mapping or to a config of transformers.

    Returns:
        What the entry says; None when streamslr did not compress the model.

    Raises:
        InputError: a format_version that this version cannot read, or a damaged entry.
    """
    entry: Any
    if isinstance(config, Mapping):
        entry = config.get("quantization_config")
    else:
        entry = getattr(config, "quantization_config", None)
    if hasattr(entry, "to_dict"):  # transformers may have parsed it already
        entry = entry.to_dict()
    if not isinstance(entry, Mapping | None):
        raise InputError(
            f"quantization_config in config.json is a {type(entry).__name__}; copy config.json again from where the "
            f"folder came from"
        )
    if entry is None or entry.get("quant_method") != QUANT_METHOD:
        return None
    version = entry.get("format_version")
    if version not in READABLE_VERSIONS:
        raise InputError(
            f"config.json says streamslr format_version {version!r}, this version reads {READABLE_VERSIONS[0]} to "
            f"{READABLE_VERSIONS[-1]}: use the streamslr that wrote it, or compress the model again"
        )
    pattern, rank = entry.get("pattern"), entry.get("rank")
    if not isinstance(pattern, str) or not isinstance(rank, int) or rank < 0:
        raise InputError(
            f"quantization_config in config.json is damaged: pattern {pattern!r}, rank {rank!r}; "
            f"copy config.json again from where the folder came from"
        )
    return PackedFormat(None if pattern == MIXED else parse_pattern(pattern), rank, version)
