"""Sparsity patterns: which weights may be kept, whether a support obeys, and the text form."""

import re
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.spec.selection import (
    GroupMarker,
    LevelMarker,
    Marker,
    kth_largest,
    largest_of_rows,
    nth_of_rows,
    row_slices,
)

MIXED = "mixed"
"""Name of the pattern, and of the values, in config.json for a model whose linears differ in them."""


class SparsityPattern(Protocol):
    """The sparsity that S may have; solver, matching, packing and results ask it, so that they agree.

    A pattern is a frozen value. Its text, `str(pattern)`, is what files keep of it, and `parse_pattern` reads it.
    """

    @property
    def density(self) -> float:
        """Fraction of the weights that are kept, in (0, 1)."""
        ...

    @property
    def by_row(self) -> bool:
        """True when each row is decided apart from the others."""
        ...

    def project(self, scores: Tensor) -> Tensor:
        """Return the mask of the largest magnitudes, exactly as many as the pattern allows.

        Of equal magnitudes the lower index is kept, on every device.

        Args:
            scores: [o, d].

        Returns:
            Bool [o, d], True where a weight is kept; its strides follow those of `scores`.
        """
        ...

    def marker(self, scores: Tensor) -> Marker:
        """Return the projection for iterations, tuned to the first `scores` [o, d]."""
        ...

    def check(self, support: Tensor) -> str | None:
        """Return None when `support` (bool [o, d]) keeps at most what the pattern allows, else what is wrong."""
        ...

    def require_fits(self, name: str, shape: tuple[int, int]) -> None:
        """Raise InputError, naming the linear, when a weight of `shape` (o, d) cannot have this pattern."""
        ...

    def with_density(self, density: float) -> "SparsityPattern":
        """Return the pattern of this kind with the nearest density that its text can say.

        Raises:
            InputError: The kind has no pattern near that density.
        """
        ...

    def short_text(self) -> str:
        """Return the text for tables, with at most four digits."""
        ...

    def groups(self, d: int) -> tuple[int, int] | None:
        """Return (n, m) where exactly n of every m neighbours of a row of d are stored; None where rows differ."""
        ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class NofM:
    """Keep n of every m neighbours in a row; sparse tensor cores run 2:4."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise InputError(
                f"pattern {self.n}:{self.m} keeps {self.n} of every {self.m} weights; "
                f"n must be at least 1 and below m, as in 2:4"
            )

    @property
    def density(self) -> float:
        return self.n / self.m

    @property
    def by_row(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def short_text(self) -> str:
        return str(self)

    def with_density(self, density: float) -> "NofM":
        return NofM(round(density * self.m), self.m)

    def project(self, scores: Tensor) -> Tensor:
        o, d = scores.shape
        mask = GroupMarker(self.n, self.m).mark_(scores.abs()).bool()
        if int(mask.count_nonzero()) > o * (d // self.m) * self.n:  # magnitudes tie for a group's last place
            groups, mask_groups = (tensor.view(o, d // self.m, self.m) for tensor in (scores, mask))
            for rows in row_slices(scores):
                row, group = (mask_groups[rows].sum(2, dtype=torch.int16) > self.n).nonzero(as_tuple=True)
                mask_groups[rows][row, group] = largest_of_rows(groups[rows][row, group], self.n)
        return mask

    def marker(self, scores: Tensor) -> Marker:
        return GroupMarker(self.n, self.m)

    def check(self, support: Tensor) -> str | None:
        rows, d = support.shape
        if d % self.m:
            return f"{d} columns are not a multiple of {self.m}"
        counts = support.view(rows, d // self.m, self.m).sum(2, dtype=torch.int16)  # [o, d/m]
        worst = int(counts.max()) if counts.numel() else 0
        if worst <= self.n:
            return None
        over = (counts > self.n).nonzero()
        row, group = (int(x) for x in over[0])
        return (
            f"{len(over)} of {counts.numel()} groups keep more than {self.n} of {self.m} weights; the first "
            f"is row {row}, columns {group * self.m} to {group * self.m + self.m - 1}, which keeps "
            f"{int(counts[row, group])}"
        )

    def require_fits(self, name: str, shape: tuple[int, int]) -> None:
        o, d = shape
        if d % self.m:
            raise InputError(
                f"{name}: pattern {self} needs an input width that is a multiple of {self.m}, but the weight "
                f"is {o}×{d}; choose another --pattern, such as 50%"
            )

    def groups(self, d: int) -> tuple[int, int] | None:
        return self.n, self.m


@dataclass(frozen=True)
class _FractionPattern:
    """Zero the fraction `sparsity` of the weights; a subclass says over what they are compared and its `unit`."""

    sparsity: float
    unit: ClassVar[str] = "%"

    def __post_init__(self) -> None:
        if not 0.0 < self.sparsity < 1.0:
            raise InputError(f"pattern {self}: its sparsity must lie between 0% and 100%")

    @property
    def density(self) -> float:
        return 1.0 - self.sparsity

    def __str__(self) -> str:
        return f"{100 * self.sparsity:.10g}{self.unit}"

    def short_text(self) -> str:
        percent = float(f"{100 * self.sparsity:.10g}")  # as the full text has it, which then rounds alike
        return f"{percent:.4g}{self.unit}"

    def with_density(self, density: float) -> SparsityPattern:
        # through a text of six digits: files keep only the text, and read back the same pattern
        return parse_pattern(f"{100 * (1 - density):.6g}{self.unit}")


@dataclass(frozen=True)
class Unstructured(_FractionPattern):
    """Zero the fraction `sparsity` of a linear's weights, the smallest of all."""

    @property
    def by_row(self) -> bool:
        return False

    def num_kept(self, o: int, d: int) -> int:
        """Return the number of weights kept of o×d."""
        return round(o * d * self.density)

    def project(self, scores: Tensor) -> Tensor:
        k = self.num_kept(*scores.shape)
        magnitudes = scores.abs()
        if k == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        threshold = kth_largest(magnitudes, k)
        mask = magnitudes >= threshold
        surplus = int(mask.count_nonzero()) - k
        for rows in reversed(list(row_slices(scores))):  # of ties at the threshold the last ones leave, row by row
            if not surplus:
                break
            ties = (magnitudes[rows] == threshold).nonzero()[-surplus:]
            mask[rows][ties[:, 0], ties[:, 1]] = False
            surplus -= len(ties)
        return mask

    def marker(self, scores: Tensor) -> Marker:
        k = self.num_kept(*scores.shape)
        return LevelMarker(kth_largest(scores.abs(), k)[None], k)

    def check(self, support: Tensor) -> str | None:
        o, d = support.shape
        found, allowed = int(support.count_nonzero()), self.num_kept(o, d)
        if found <= allowed:
            return None
        return f"keeps {found} of {o * d} weights; {self} allows {allowed}"

    def require_fits(self, name: str, shape: tuple[int, int]) -> None:
        o, d = shape
        if self.num_kept(o, d) == 0:
            raise InputError(f"{name}: pattern {self} keeps none of the {o}×{d} weights; lower the sparsity")

    def groups(self, d: int) -> tuple[int, int] | None:
        return None


@dataclass(frozen=True)
class UnstructuredRows(_FractionPattern):
    """Zero the fraction `sparsity` of each row, its smallest weights; every row keeps the same number.

    Wanda and OATS call this unstructured (arXiv 2306.11695, 2409.13652).
    """

    unit: ClassVar[str] = "%/row"

    @property
    def by_row(self) -> bool:
        return True

    def num_kept(self, d: int) -> int:
        """Return the number of weights kept of a row of d."""
        return round(d * self.density)

    def project(self, scores: Tensor) -> Tensor:
        return largest_of_rows(scores, self.num_kept(scores.shape[1]))

    def marker(self, scores: Tensor) -> Marker:
        n = self.num_kept(scores.shape[1])
        levels = [nth_of_rows(scores[rows].abs(), n) for rows in row_slices(scores)]
        return LevelMarker(torch.cat(levels), n)

    def check(self, support: Tensor) -> str | None:
        o, d = support.shape
        counts, allowed = torch.cat([support[rows].sum(1) for rows in row_slices(support)]), self.num_kept(d)
        over = (counts > allowed).nonzero()
        if not len(over):
            return None
        row = int(over[0])
        return f"row {row} keeps {int(counts[row])} of {d} weights; {self} allows {allowed} ({len(over)} of {o} rows)"

    def require_fits(self, name: str, shape: tuple[int, int]) -> None:
        if self.num_kept(shape[1]) == 0:
            raise InputError(f"{name}: pattern {self} keeps none of a row's {shape[1]} weights; lower the sparsity")

    def groups(self, d: int) -> tuple[int, int] | None:
        return self.num_kept(d), d


@dataclass(frozen=True)
class Dense:
    """Keep every weight: S is dense, for values on a grid."""

    @property
    def density(self) -> float:
        return 1.0

    @property
    def by_row(self) -> bool:
        return True

    def __str__(self) -> str:
        return "dense"

    def short_text(self) -> str:
        return str(self)

    def with_density(self, density: float) -> "Dense":
        raise InputError(f"pattern dense keeps every weight, not {density:.0%} of them; give 50% or the like")

    def project(self, scores: Tensor) -> Tensor:
        return torch.ones_like(scores, dtype=torch.bool)

    def marker(self, scores: Tensor) -> Marker:
        return GroupMarker(1, 1)

    def check(self, support: Tensor) -> str | None:
        return None

    def require_fits(self, name: str, shape: tuple[int, int]) -> None:
        return None

    def groups(self, d: int) -> tuple[int, int] | None:
        return 1, 1


def parse_pattern(text: str) -> SparsityPattern:
    """Return the pattern that a text names.

    Args:
        text: "2:4" keeps 2 of every 4 neighbours, "50%" zeroes half of each linear, "50%/row" half of each row, and
            "dense" keeps all.

    Raises:
        InputError: The text names no pattern, or an impossible one.
    """
    if match := re.fullmatch(r"\s*(\d{1,9}):(\d{1,9})\s*", text):
        return NofM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,30})?)\s*%\s*(/\s*row\s*)?", text):
        return (UnstructuredRows if match[2] else Unstructured)(float(match[1]) / 100)
    if text.strip() == "dense":
        return Dense()
    raise InputError(
        f'pattern {text!r} is not known; write n:m to keep n of every m weights ("2:4"), or the sparsity in percent, '
        f'of a linear ("50%") or of each of its rows ("50%/row"), or "dense" to keep all'
    )
