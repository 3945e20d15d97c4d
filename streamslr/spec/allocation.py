"""What each linear is to become: pattern and rank for all, by share of parameters, by outliers, by name."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamslr.config import RunConfig
from streamslr.errors import InputError
from streamslr.spec.pattern import NofM, SparsityPattern, parse_pattern

DEFAULT_PATTERN, DEFAULT_RANK = "2:4", 64

OUTLIER = 5.0
"""How often the mean score makes an outlier: M of OWL's paper."""

SCORED_ROWS = 1024
"""Rows of a weight whose scores exist at once."""


@dataclass(frozen=True)
class LinearSpec:
    """What a linear is to become: the pattern of S, and the rank of U·V (0: none)."""

    pattern: SparsityPattern
    rank: int

    def num_parameters(self, shape: tuple[int, int]) -> int:
        """Parameters that stay of a weight of `shape` (o, d): of S, U and V together."""
        o, d = shape
        return round(self.pattern.density * o * d) + min(self.rank, o, d) * (o + d)


Linears = Mapping[str, tuple[int, int]]
"""Name of each linear of a block -> its weight's shape (o, d)."""

Allocation = Mapping[str, LinearSpec]
"""Name of every linear of a model -> what it is to become."""


def allocate(
    config: RunConfig, blocks: Sequence[Linears], outliers: Sequence[float] | None = None
) -> dict[str, LinearSpec]:
    """What every linear of `blocks` is to become.

    outliers: the `outlier_share` of each block, from which --owl follows; while it is not known (None), every block
    is as dense as it can come to be, which is what a plan must hold.
    Raises InputError for contradictory or impossible settings, a name that no linear has, and a linear that cannot
    have its pattern.
    """
    shares = [share_of_all(config)] * len(blocks)
    if config.owl is not None:
        sizes = [sum(o * d for o, d in linears.values()) for linears in blocks]
        shares = by_outliers(shares[0], config.owl, outliers, sizes)
    specs = {
        name: _linear_spec(config, share, shape)
        for share, linears in zip(shares, blocks, strict=True)
        for name, shape in linears.items()
    }
    for pattern, entry in _by_name(config).items():
        named = [name for name in specs if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
        if not named:
            last = sorted({name.rpartition(".")[2] for name in specs})
            raise InputError(
                f"no linear is named {pattern!r}; there are {', '.join(last)}, each by its whole name, like "
                f"{next(iter(specs))}, or the end of it, with * and ? as in a shell"
            )
        specs |= {name: replace(specs[name], **entry) for name in named}
    for linears in blocks:
        for name, shape in linears.items():
            specs[name].pattern.require_fits(name, shape)
    return specs


def share_of_all(config: RunConfig) -> SparsityPattern:
    """The mean over all blocks of what stays: of S, or with --compression of S, U and V together."""
    pattern = DEFAULT_PATTERN if config.pattern is None else config.pattern
    share = parse_pattern(pattern if config.compression is None else config.compression)
    if config.compression and isinstance(share, NofM):
        raise InputError(
            f"--compression is {config.compression}; give the share to leave out, like 50%, or {share} as --pattern"
        )
    return share


def by_outliers(
    mean: SparsityPattern, spread: float, outliers: Sequence[float] | None, sizes: Sequence[int]
) -> list[SparsityPattern]:
    """`mean` at a density of its own for each block: the more outliers, the denser (OWL, arXiv 2310.05175).

    Densities are linear in the blocks' `outliers`, differ from the mean one by `spread` (λ) at most, which one block
    reaches, and their mean weighted by the blocks' `sizes` is the mean's. (The paper's code has a range of 2λ in all,
    wherever the mean lies in it.) Of n:m it is n that varies, in whole steps within λ, and the mean is the nearest
    below that such steps allow. outliers None: each at the densest. Raises InputError where λ leaves no room.
    """
    total = sum(sizes)
    lean = [0.0] * len(sizes)  # from -1 to 1
    if outliers is not None:
        exact = [Fraction(share) for share in outliers]  # rounding would show where blocks are nearly alike
        average = sum((size * share for size, share in zip(sizes, exact, strict=True)), Fraction()) / total
        most = max(abs(share - average) for share in exact)
        lean = [float((share - average) / most) if most else 0.0 for share in exact]
    if isinstance(mean, NofM):
        n, m = mean.n, mean.m
        steps = min(floor(spread * m + 1e-9), n - 1, m - 1 - n)
        if steps < 1:
            raise InputError(
                f"--owl {spread:g} cannot vary {mean}: n goes in steps of 1/{m} = {1 / m:.3g} and stays between 1 and "
                f"{m - 1}; give a larger --owl, a pattern with more room such as 8:16, or a share such as 50%"
            )
        if outliers is None:
            return [NofM(n + steps, m)] * len(sizes)
        wanted = [round(n + steps * part, 9) for part in lean]
        counts = [floor(number) for number in wanted]
        spare = n * total - sum(size * count for size, count in zip(sizes, counts, strict=True))
        for i in sorted(range(len(sizes)), key=lambda i: counts[i] - wanted[i]):  # the largest fraction first
            if sizes[i] <= spare and wanted[i] > counts[i]:
                counts[i], spare = counts[i] + 1, spare - sizes[i]
        return [NofM(count, m) for count in counts]
    if not spread < min(mean.density, 1 - mean.density):
        raise InputError(
            f"--owl {spread:g} is too much around {mean}: the sparsity of every block must lie between 0% and 100%"
        )
    if outliers is None:
        return [mean.with_density(mean.density + spread)] * len(sizes)
    return [mean.with_density(mean.density + spread * part) for part in lean]


@torch.no_grad()
def outlier_share(linears: Iterable[tuple[Tensor, Tensor]], times: float) -> float:
    """OWL's score of a block: the share of A_ij = ‖X_j‖·|W_ij| above `times` (M) their mean over all its linears.

    linears: of each W [o, d], and Σ x² over its calibration inputs [d].
    """
    scored = [(weight, energy.sqrt()) for weight, energy in linears]
    count = sum(weight.numel() for weight, _ in scored)
    columns = [(torch.linalg.vector_norm(weight, 1, dim=0, dtype=torch.float32), norms) for weight, norms in scored]
    level = times * sum(float(column.double() @ norms.double()) for column, norms in columns) / count
    above = sum(
        int((weight[start : start + SCORED_ROWS].abs() * norms > level).count_nonzero())
        for weight, norms in scored
        for start in range(0, len(weight), SCORED_ROWS)
    )
    return above / count


def as_json(allocation: Allocation) -> dict[str, dict[str, Any]]:
    """As --allocation reads it, and the journal keeps it: an entry a linear, or one for all where they are alike."""
    if len(alike := set(allocation.values())) == 1:
        allocation = {"*": alike.pop()}
    return {name: {"pattern": str(spec.pattern), "rank": spec.rank} for name, spec in allocation.items()}


def from_json(entries: Mapping[str, Mapping[str, Any]], blocks: Iterable[Linears]) -> dict[str, LinearSpec]:
    """What `as_json` wrote, for every linear."""
    specs = {name: LinearSpec(parse_pattern(entry["pattern"]), entry["rank"]) for name, entry in entries.items()}
    return {name: specs.get(name) or specs["*"] for linears in blocks for name in linears}


def common_pattern(allocation: Allocation) -> SparsityPattern | None:
    """The pattern of all linears, None where they differ."""
    patterns = {spec.pattern for spec in allocation.values()}
    return next(iter(patterns)) if len(patterns) == 1 else None


def parameter_fraction(allocation: Allocation, blocks: Iterable[Linears]) -> float:
    """The share of all linears' parameters that S, U and V keep."""
    shapes = [(allocation[name], shape) for linears in blocks for name, shape in linears.items()]
    return sum(spec.num_parameters(shape) for spec, shape in shapes) / sum(o * d for _, (o, d) in shapes)


def in_words(specs: Iterable[LinearSpec]) -> str:
    """Return patterns and ranks for a table: "2:4 + rank 64", "52%–68% + rank 4–17"."""
    chosen = set(specs)
    by_density = sorted({spec.pattern for spec in chosen}, key=lambda pattern: (-pattern.density, str(pattern)))
    patterns = [pattern.short_text() for pattern in by_density]
    ranks = [str(rank) for rank in sorted({spec.rank for spec in chosen})]
    return " + rank ".join("–".join(dict.fromkeys((some[0], some[-1]))) for some in (patterns, ranks))


def file_digest(path: Path | None) -> str | None:
    """Of what an allocation file says, whatever its layout; None without a file."""
    return None if path is None else hashlib.sha256(json.dumps(_read(path)).encode()).hexdigest()


def _linear_spec(config: RunConfig, share: SparsityPattern, shape: tuple[int, int]) -> LinearSpec:
    """One linear of a block that keeps `share`.

    By share of parameters (OATS, arXiv 2409.13652): of the (1 - ρ)·od that stay at compression ρ, U and V take the
    share κ, so r = ⌊κ(1 - ρ)·od/(o + d)⌋, and S the rest, so its sparsity is ρ + κ - ρκ.
    """
    if config.rank_ratio is None:
        return LinearSpec(share, DEFAULT_RANK if config.rank is None else config.rank)
    ratio = config.rank_ratio
    kept, pattern = share.density, share
    if config.compression:
        pattern = share.with_density((1 - ratio) * kept)
    else:  # S alone has the pattern's density
        kept /= 1 - ratio
    o, d = shape
    return LinearSpec(pattern, floor(ratio * kept * o * d / (o + d) + 1e-9))  # 16 may come out as 15.999…


def _by_name(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What --allocation, then --ranks say: pattern of names -> fields of a LinearSpec."""
    entries = _read(config.allocation) if config.allocation else {}
    found: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        found[name] = entry | ({"pattern": parse_pattern(entry["pattern"])} if "pattern" in entry else {})
    for part in [] if config.ranks is None else config.ranks.split(","):
        name, equals, rank = part.strip().rpartition("=")
        if not (name and equals and rank.isdecimal()):
            raise InputError(f"--ranks is {config.ranks!r}; write it like q_proj=32,down_proj=128")
        found[name] = found.pop(name, {}) | {"rank": int(rank)}
    return found


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """An allocation file as it stands. Raises InputError, naming the entry that is wrong."""
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--allocation {path} cannot be read as JSON: {error}") from error
    form = 'like {"q_proj": {"pattern": "2:4", "rank": 32}}, with pattern, rank or both'
    if not isinstance(entries, dict):
        raise InputError(f"--allocation {path} holds no names of linears; write it {form}")
    for name, entry in entries.items():
        sound = isinstance(entry, dict) and entry and entry.keys() <= {"pattern", "rank"}
        if sound and "pattern" in entry:
            sound = isinstance(entry["pattern"], str)
        if sound and "rank" in entry:
            sound = type(entry["rank"]) is int and entry["rank"] >= 0
        if not sound:
            raise InputError(f"--allocation {path} says {entry!r} of {name}; write it {form}")
    return entries
