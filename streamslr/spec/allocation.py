"""Allocation: pattern, rank and value format of each linear: for all, by parameters, by outliers or by name."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import floor
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
import torch

from streamslr.config import LARGEST, RunConfig
from streamslr.errors import InputError
from streamslr.outside import parse_json, read_bounded
from streamslr.spec.owl import vary_by_outliers
from streamslr.spec.pattern import MIXED, Dense, NofM, SparsityPattern, parse_pattern
from streamslr.spec.values import (
    STORED,
    ValueFormat,
    Values,
    grid_of,
    low_rank_text,
    parse_low_rank_values,
    parse_values,
    values_text,
)

DEFAULT_PATTERN, DEFAULT_RANK = "2:4", 64


@dataclass(frozen=True)
class LinearSpec:
    """The pattern, the rank and the value format that a linear gets.

    Attributes:
        pattern: Sparsity pattern of S.
        rank: Rank of U·V; 0 for none.
        values: Values of S; None for numbers as the checkpoint stores them.
        low_rank_values: Dtype that U and V are stored in: bfloat16, or int8 for codes; None for that of the checkpoint.
    """

    pattern: SparsityPattern
    rank: int
    values: Values = None
    low_rank_values: torch.dtype | None = None

    @property
    def grid(self) -> ValueFormat | None:
        """Grid of the values of S; None for numbers."""
        return grid_of(self.values)

    @property
    def off_grid(self) -> "LinearSpec":
        """The spec before S comes onto its grid: S, U and V as the checkpoint stores numbers; itself without one."""
        return self if self.grid is None else replace(self, values=None, low_rank_values=None)

    def num_parameters(self, shape: tuple[int, int]) -> int:
        """Return the parameters of S, U and V together, for a weight of `shape` (o, d)."""
        o, d = shape
        return round(self.pattern.density * o * d) + min(self.rank, o, d) * (o + d)

    def require_fits(self, name: str, shape: tuple[int, int]) -> None:
        """Raise InputError, naming the linear, when a weight of `shape` (o, d) cannot have this spec."""
        self.pattern.require_fits(name, shape)
        if isinstance(self.pattern, Dense) and self.grid is None:
            raise InputError(
                f"{name}: pattern dense without values on a grid would change nothing; give --values int4 or the like, "
                f"or another --pattern"
            )


class SpecEntry(TypedDict):
    """A `LinearSpec` in JSON."""

    pattern: str
    values: NotRequired[str]
    low_rank_values: NotRequired[str]
    rank: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


Linears = Mapping[str, tuple[int, int]]
"""Name of each linear of a block -> its weight's shape (o, d)."""

Allocation = Mapping[str, LinearSpec]
"""Name of every linear of a model -> its spec."""


def allocate(
    config: RunConfig, blocks: Sequence[Linears], outliers: Sequence[float] | None = None
) -> dict[str, LinearSpec]:
    """Return the spec of every linear of a model.

    Args:
        config: The settings of the run.
        blocks: The linears of each block.
        outliers: `outlier_fraction` of each block, which --owl follows. While it is not known (None), every block is
            at its densest, since a plan must hold for that.

    Raises:
        InputError: Settings contradict each other or are impossible, no linear has a name that is given, or a linear
            cannot have its pattern.
    """
    patterns = [parse_mean_pattern(config)] * len(blocks)
    if config.owl is not None:
        sizes = [sum(o * d for o, d in linears.values()) for linears in blocks]
        patterns = vary_by_outliers(patterns[0], config.owl, outliers, sizes)
    specs = {
        name: _linear_spec(config, pattern, shape)
        for pattern, linears in zip(patterns, blocks, strict=True)
        for name, shape in linears.items()
    }
    for glob, entry in _read_entries(config).items():
        named = [name for name in specs if fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}")]
        if not named:
            last = sorted({name.rpartition(".")[2] for name in specs})
            raise InputError(
                f"no linear is named {glob!r}; there are {', '.join(last)}, each by its whole name, like "
                f"{next(iter(specs))}, or the end of it, with * and ? as in a shell"
            )
        specs |= {name: replace(specs[name], **entry) for name in named}
    for linears in blocks:
        for name, shape in linears.items():
            specs[name].require_fits(name, shape)
    return specs


def rounds_late(config: RunConfig, allocation: Allocation) -> bool:
    """Return True where S comes onto its grid when blocks have been matched once, to be matched once more on it."""
    return config.match and config.rounding == "solved" and any(spec.grid for spec in allocation.values())


def parse_mean_pattern(config: RunConfig) -> SparsityPattern:
    """Return the mean pattern over all blocks: of S, or with --compression of S, U and V together.

    Raises:
        InputError: The text names no pattern, or --compression is n:m.
    """
    text = DEFAULT_PATTERN if config.pattern is None else config.pattern
    pattern = parse_pattern(text if config.compression is None else config.compression)
    if config.compression and isinstance(pattern, NofM | Dense):
        raise InputError(
            f"--compression is {config.compression}; give the percentage to leave out, like 50%, or {pattern} as "
            f"--pattern"
        )
    return pattern


def as_json(allocation: Allocation) -> dict[str, SpecEntry]:
    """Return what --allocation reads and the journal keeps: an entry a linear, or one for all where they are alike."""
    if len(alike := set(allocation.values())) == 1:
        allocation = {"*": alike.pop()}
    entries: dict[str, SpecEntry] = {}
    for name, spec in allocation.items():
        entries[name] = {"pattern": str(spec.pattern), "rank": spec.rank}
        if spec.values is not None:
            entries[name]["values"] = values_text(spec.values)
        if spec.low_rank_values is not None:
            entries[name]["low_rank_values"] = low_rank_text(spec.low_rank_values)
    return entries


def from_json(entries: Mapping[str, SpecEntry], blocks: Iterable[Linears]) -> dict[str, LinearSpec]:
    """Return the allocation that `as_json` wrote, for every linear of `blocks`.

    Raises:
        InputError: A linear has no entry, or cannot have its pattern.
    """
    specs = {
        name: LinearSpec(
            parse_pattern(entry["pattern"]),
            entry["rank"],
            parse_values(entry.get("values", STORED)),
            parse_low_rank_values(entry.get("low_rank_values", STORED)),
        )
        for name, entry in entries.items()
    }
    shapes = {name: shape for linears in blocks for name, shape in linears.items()}
    if missing := [name for name in shapes if name not in specs and "*" not in specs]:
        raise InputError(f"the journal's allocation has no entry for {missing[0]}: it is of another model")
    allocation = {name: specs.get(name) or specs["*"] for name in shapes}
    for name, spec in allocation.items():
        spec.require_fits(name, shapes[name])
    return allocation


def common_pattern(allocation: Allocation) -> SparsityPattern | None:
    """Return the pattern of all linears, None where they differ."""
    patterns = {spec.pattern for spec in allocation.values()}
    return next(iter(patterns)) if len(patterns) == 1 else None


def common_values(allocation: Allocation) -> str:
    """Return the value format of all linears as text, "mixed" where they differ."""
    texts = {values_text(spec.values) for spec in allocation.values()}
    return next(iter(texts)) if len(texts) == 1 else MIXED


def common_low_rank_values(allocation: Allocation) -> str:
    """Return the dtype that U and V of all linears are stored in as text, "mixed" where they differ."""
    texts = {low_rank_text(spec.low_rank_values) for spec in allocation.values()}
    return next(iter(texts)) if len(texts) == 1 else MIXED


def parameter_fraction(allocation: Allocation, blocks: Iterable[Linears]) -> float:
    """Return the fraction of all linears' parameters that S, U and V have."""
    shapes = [(allocation[name], shape) for linears in blocks for name, shape in linears.items()]
    return sum(spec.num_parameters(shape) for spec, shape in shapes) / sum(o * d for _, (o, d) in shapes)


def in_words(specs: Iterable[LinearSpec]) -> str:
    """Return patterns, values and ranks for a table: "2:4 + rank 64", "50% int4/128 + rank 4", "52%–68% + rank 4–9"."""
    chosen = set(specs)
    by_density = sorted({spec.pattern for spec in chosen}, key=lambda pattern: (-pattern.density, str(pattern)))
    patterns = [pattern.short_text() for pattern in by_density]
    ranks = [str(rank) for rank in sorted({spec.rank for spec in chosen})]
    formats = sorted({values_text(spec.values) for spec in chosen if spec.values is not None})
    some_stored = [STORED] if formats and any(spec.values is None for spec in chosen) else []
    shown = "–".join(dict.fromkeys((patterns[0], patterns[-1])))
    shown = " ".join([shown, *([", ".join([*formats, *some_stored])] if formats else [])])
    factors = {low_rank_text(spec.low_rank_values) for spec in chosen if spec.rank}
    of_factors = f" in {', '.join(sorted(factors))}" if factors - {STORED} else ""
    return f"{shown} + rank {'–'.join(dict.fromkeys((ranks[0], ranks[-1])))}{of_factors}"


def file_digest(path: Path | None) -> str | None:
    """Return a digest of the entries of an allocation file, whatever its layout; None without a file."""
    return None if path is None else hashlib.sha256(json.dumps(_read_file(path)).encode()).hexdigest()


def _linear_spec(config: RunConfig, pattern: SparsityPattern, shape: tuple[int, int]) -> LinearSpec:
    """Return the spec of a linear in a block with this pattern.

    With --compression ρ, (1 - ρ)·od parameters are kept (OATS, arXiv 2409.13652). U and V take the fraction κ of them
    (--rank-ratio), so r = ⌊κ(1 - ρ)·od/(o + d)⌋, and S the rest, so its sparsity is ρ + κ - ρκ. Without --compression
    the pattern is that of S alone.
    """
    values, low_rank = parse_values(config.values, config.group), parse_low_rank_values(config.low_rank_values)
    if config.rank_ratio is None:
        return LinearSpec(pattern, DEFAULT_RANK if config.rank is None else config.rank, values, low_rank)
    ratio, density = config.rank_ratio, pattern.density  # density: of S, U and V together
    if config.compression:
        pattern = pattern.with_density((1 - ratio) * density)
    else:
        density /= 1 - ratio
    o, d = shape
    rank = floor(ratio * density * o * d / (o + d) + 1e-9)  # 16 may come out as 15.999…
    return LinearSpec(pattern, rank, values, low_rank)


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """Entry of an allocation file."""

    pattern: str | msgspec.UnsetType = msgspec.UNSET
    rank: Annotated[int, msgspec.Meta(ge=0, le=LARGEST)] | msgspec.UnsetType = msgspec.UNSET
    values: str | msgspec.UnsetType = msgspec.UNSET
    low_rank_values: str | msgspec.UnsetType = msgspec.UNSET


def _read_entries(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the entries of --allocation, then those of --ranks: glob of names -> fields of a LinearSpec."""
    entries = _read_file(config.allocation) if config.allocation else {}
    found: dict[str, dict[str, Any]] = {}
    for glob, entry in entries.items():
        found[glob] = dict(entry)
        if "pattern" in entry:
            found[glob]["pattern"] = parse_pattern(entry["pattern"])
        if "values" in entry:
            found[glob]["values"] = parse_values(entry["values"], config.group)
        if "low_rank_values" in entry:
            found[glob]["low_rank_values"] = parse_low_rank_values(entry["low_rank_values"])
    for part in [] if config.ranks is None else config.ranks.split(","):
        glob, equals, rank = part.strip().rpartition("=")
        if not (glob and equals and rank.isdecimal() and len(rank) <= 10 and int(rank) <= LARGEST):
            raise InputError(f"--ranks is {config.ranks!r}; write it like q_proj=32,down_proj=128")
        found[glob] = found.pop(glob, {}) | {"rank": int(rank)}
    return found


def _read_file(path: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of an allocation file. Raise InputError, naming the entry that is wrong."""
    form = (
        'like {"q_proj": {"pattern": "2:4", "rank": 32, "values": "int4", "low_rank_values": "int8"}}, with one of the '
        "four or more"
    )
    try:
        entries = parse_json(read_bounded(path), dict[str, Any])
    except InputError as error:
        raise InputError(f"--allocation: {error}") from error
    except ValueError as error:
        raise InputError(f"--allocation {path} cannot be read ({error}); write it {form}") from error
    for glob, entry in entries.items():
        try:
            msgspec.convert(entry, _Entry)
            if not entry:
                raise ValueError("neither pattern nor rank nor values nor low_rank_values")
        except (ValueError, msgspec.MsgspecError) as error:
            raise InputError(
                f"--allocation {path} says {str(entry)[:100]} of {glob} ({error}); write it {form}"
            ) from error
    return entries
