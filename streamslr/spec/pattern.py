"""Sparsity patterns: which weights may stay, whether a support obeys, and the bits that storing it takes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamslr.errors import InputError

# Up to this group length insertion by minimum and maximum beats a selection in each group.
_INSERTION_MAX_M = 16
# Elements of a slice of rows in each of which is selected: what torch takes for that is 12 bytes an element.
_SLICE, _SLICE_ON_GPU = 1 << 16, 1 << 22


class Marker(Protocol):
    """A projection for the inside of iterations: several times faster than `project`, and all but exact."""

    group: int  # columns that are decided together

    def mark_(self, magnitudes: Tensor, rows: slice = slice(None)) -> Tensor:
        """Overwrites `magnitudes` [t, k], k a multiple of `group`, with 1 where they stay and 0 elsewhere.

        rows: which t rows of the linear these are.
        """
        ...

    def settle(self) -> None:
        """Called when every column has been marked once."""
        ...


class SparsityPattern(Protocol):
    """What solver, matcher, packer and inspector ask about sparsity, so that they cannot disagree."""

    @property
    def density(self) -> float:
        """The share of weights that stay, in (0, 1)."""
        ...

    @property
    def by_row(self) -> bool:
        """Whether each row is decided apart from the others."""
        ...

    def project(self, scores: Tensor) -> Tensor:
        """Kept positions, bool [o, d]: the largest magnitudes of `scores` [o, d], exactly as many as allowed.

        Equal magnitudes: the lower index stays, on every device. Strides follow those of `scores`.
        """
        ...

    def marker(self, scores: Tensor) -> Marker:
        """The projection for iterations, tuned to the first `scores` [o, d]."""
        ...

    def check(self, support: Tensor) -> str | None:
        """None when `support` (bool [o, d]) keeps at most what the pattern allows, else what is wrong."""
        ...

    def require_fits(self, name: str, shape: tuple[int, int]) -> None:
        """Raises InputError, naming the linear, when a weight of `shape` (o, d) cannot have this pattern."""
        ...

    def groups(self, d: int) -> tuple[int, int] | None:
        """(n, m) where exactly n of every m neighbours of a row of d are stored; None where rows differ."""
        ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class NofM:
    """Keeps n of every m neighbours in a row (2:4 is what sparse tensor cores run)."""

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

    def project(self, scores: Tensor) -> Tensor:
        o, d = scores.shape
        kept = _Groups(self).mark_(scores.abs()).bool()
        if int(kept.count_nonzero()) > o * (d // self.m) * self.n:  # magnitudes tie for a group's last place
            groups, kept_groups = (tensor.view(o, d // self.m, self.m) for tensor in (scores, kept))
            for rows in _row_slices(scores):
                row, group = (kept_groups[rows].sum(2, dtype=torch.int16) > self.n).nonzero(as_tuple=True)
                kept_groups[rows][row, group] = largest_of_rows(groups[rows][row, group], self.n)
        return kept

    def marker(self, scores: Tensor) -> Marker:
        return _Groups(self)

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
class _Share:
    """Zeroes the share `sparsity`, whatever it is compared over; a bit of metadata a weight."""

    sparsity: float

    def __post_init__(self) -> None:
        if not 0.0 < self.sparsity < 1.0:
            raise InputError(f"pattern {self}: the share to zero must lie between 0% and 100%")

    @property
    def density(self) -> float:
        return 1.0 - self.sparsity


@dataclass(frozen=True)
class Unstructured(_Share):
    """Zeroes the share `sparsity` of a whole linear's weights, wherever they are smallest."""

    @property
    def by_row(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{100 * self.sparsity:.10g}%"

    def num_kept(self, o: int, d: int) -> int:
        """How many of o×d weights stay."""
        return round(o * d * self.density)

    def project(self, scores: Tensor) -> Tensor:
        k = self.num_kept(*scores.shape)
        magnitudes = scores.abs()
        if k == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        threshold = _kth_largest(magnitudes, k)
        kept = magnitudes >= threshold
        surplus = int(kept.count_nonzero()) - k
        for rows in reversed(list(_row_slices(scores))):  # ties at the threshold: the last ones, row by row, leave
            if not surplus:
                break
            ties = (magnitudes[rows] == threshold).nonzero()[-surplus:]
            kept[rows][ties[:, 0], ties[:, 1]] = False
            surplus -= len(ties)
        return kept

    def marker(self, scores: Tensor) -> Marker:
        wanted = self.num_kept(*scores.shape)
        return _Levels(_kth_largest(scores.abs(), wanted)[None], wanted)

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
class UnstructuredRows(_Share):
    """Zeroes the share `sparsity` of each row, wherever it is smallest: every row keeps the same number.

    What Wanda and OATS prune by when they say unstructured (arXiv 2306.11695, 2409.13652).
    """

    @property
    def by_row(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"{100 * self.sparsity:.10g}%/row"

    def num_kept(self, d: int) -> int:
        """How many of a row of d stay."""
        return round(d * self.density)

    def project(self, scores: Tensor) -> Tensor:
        return largest_of_rows(scores, self.num_kept(scores.shape[1]))

    def marker(self, scores: Tensor) -> Marker:
        n = self.num_kept(scores.shape[1])
        levels = [_nth_of_rows(scores[rows].abs(), n) for rows in _row_slices(scores)]
        return _Levels(torch.cat(levels), n)

    def check(self, support: Tensor) -> str | None:
        o, d = support.shape
        counts, allowed = torch.cat([support[rows].sum(1) for rows in _row_slices(support)]), self.num_kept(d)
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


def parse_pattern(text: str) -> SparsityPattern:
    """The pattern that `text` names: "2:4" keeps 2 of every 4, "50%" zeroes half of each linear, "50%/row" of each row.

    Raises InputError for anything else.
    """
    if match := re.fullmatch(r"\s*(\d+):(\d+)\s*", text):
        return NofM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*(/\s*row\s*)?", text):
        return (UnstructuredRows if match[2] else Unstructured)(float(match[1]) / 100)
    raise InputError(
        f'pattern {text!r} is not known; write n:m to keep n of every m weights ("2:4"), or the share to zero, of a '
        f'linear ("50%") or of each of its rows ("50%/row")'
    )


def largest_of_rows(scores: Tensor, n: int) -> Tensor:
    """Bool [o, k]: the n largest magnitudes of each row of `scores` [o, k]; of equal ones the lower index."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for rows in _row_slices(scores) if n else ():
        magnitudes = scores[rows].abs()
        threshold = _nth_of_rows(magnitudes, n)[:, None]
        part = kept[rows]
        torch.ge(magnitudes, threshold, out=part)
        surplus = part.sum(1, keepdim=True) - n  # [t, 1]
        if bool(surplus.any()):
            ties = magnitudes == threshold
            part &= ~(ties & (ties.cumsum(1) > ties.sum(1, keepdim=True) - surplus))
    return kept


def _row_slices(scores: Tensor) -> Iterator[slice]:
    o, d = scores.shape
    step = max(1, (_SLICE if scores.device.type == "cpu" else _SLICE_ON_GPU) // d)
    return (slice(start, start + step) for start in range(0, o, step))


class _Groups:
    """Marks by the n-th largest magnitude of each group; members that tie with it all stay."""

    def __init__(self, pattern: NofM) -> None:
        self.n, self.group = pattern.n, pattern.m

    def mark_(self, magnitudes: Tensor, rows: slice = slice(None)) -> Tensor:
        o, k = magnitudes.shape
        groups = magnitudes.view(o, k // self.group, self.group)
        members = groups.unbind(2)  # m tensors [o, k/m]
        if self.group > _INSERTION_MAX_M:
            place = self.group - self.n + 1
            threshold = torch.cat([groups[rows].kthvalue(place, dim=2).values for rows in _row_slices(magnitudes)])
        else:
            threshold = _nth_largest(members, self.n)
        for member in members:
            member.ge_(threshold)
        return magnitudes

    def settle(self) -> None:
        pass


class _Levels:
    """Marks by a level, one for the whole linear or one a row, that follows the count from one pass to the next.

    A selection costs more than the rest of an iteration. Scaling the level by (share marked / share wanted) is close
    to Newton's step for bell-shaped weights of which half stay. Of fewer it goes too far (from 80 % sparsity on more
    than twice as far, and would swing for ever): where too many turn to too few or back, the step is halved, but to no
    less than a quarter, for it must follow weights that move. Loss of 3BASiL on made linears at 90 %/row without U·V:
    0.117, where the step stays whole 0.118, and where it may shrink to nothing 0.138 (at 50 %/row 0.008, 0.008, 0.028).
    """

    group = 1

    def __init__(self, level: Tensor, wanted: int) -> None:
        """level: [1] for the linear, or [o]. wanted: how many should be marked by each."""
        self.wanted = wanted
        self.least = 1e-6 * level.mean()  # from 0, the level of a row of zeros, none could rise
        self.level = level.clamp(min=self.least)
        self.marked, self.surplus = torch.zeros_like(level), torch.zeros_like(level)
        self.step = torch.ones_like(level)

    def mark_(self, magnitudes: Tensor, rows: slice = slice(None)) -> Tensor:
        if len(self.level) == 1:
            magnitudes.ge_(self.level)
            self.marked += magnitudes.sum()
        else:
            magnitudes.ge_(self.level[rows, None])
            self.marked[rows] += magnitudes.sum(1)
        return magnitudes

    def settle(self) -> None:
        surplus = self.marked - self.wanted
        swung = surplus * self.surplus < 0
        self.step = torch.where(swung, self.step / 2, self.step * 1.2).clamp_(0.25, 1)
        self.level *= (self.marked / self.wanted).clamp_(0.5, 2).pow_(self.step)
        self.level.clamp_(min=self.least)
        self.surplus = surplus
        self.marked.zero_()


def _kth_largest(magnitudes: Tensor, k: int) -> Tensor:
    """The k-th largest of all `magnitudes` (float32, ≥ 0), exactly, as a scalar tensor.

    Halves the range of bit patterns, which sort as the values do. Takes a byte an element, where torch's
    kthvalue and topk take 12 and more, in twice the time of the one and half of the other (CPU, 4096 squared).
    """
    bits = magnitudes.view(torch.int32)
    low, high = torch.zeros_like(bits[0, 0]), bits.max()
    for _ in range(31):
        middle = low + (high - low + 1) // 2
        enough = torch.count_nonzero(bits >= middle) >= k
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    return low.view(torch.float32)


def _nth_of_rows(magnitudes: Tensor, n: int) -> Tensor:
    """The n-th largest of each row of `magnitudes` [t, k], [t]."""
    return magnitudes.kthvalue(magnitudes.shape[1] - n + 1, dim=1).values


def _nth_largest(members: tuple[Tensor, ...], n: int) -> Tensor:
    """The n-th largest of equally shaped tensors, elementwise: keeps the n largest so far in order."""
    largest = [members[0]]
    for count, entering in enumerate(members[1:], start=1):
        last = count == len(members) - 1
        for place in range(min(count, n)):
            held = largest[place]
            if not (last and place < n - 1):  # at the last member only the n-th place is still of interest
                largest[place] = torch.maximum(held, entering)
            if place < n - 1:
                entering = torch.minimum(held, entering)
        if count < n:
            largest.append(entering)
    return largest[-1]
