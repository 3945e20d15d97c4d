"""Sparsity patterns: which weights may stay, whether a support obeys, and the bits that storing it takes."""

import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamslr.errors import InputError

# Beyond this group length a stable sort is cheaper than comparing every pair of a group.
_PAIRWISE_MAX_M = 16


class SparsityPattern(Protocol):
    """What solver, matcher, packer and inspector ask about sparsity, so that they cannot disagree."""

    @property
    def density(self) -> float:
        """The share of weights that stay, in (0, 1)."""
        ...

    def project(self, scores: Tensor) -> Tensor:
        """Kept positions, bool [o, d]: the largest magnitudes of `scores` [o, d], exactly as many as allowed.

        Equal magnitudes: the lower index stays, on every device. Strides follow those of `scores`.
        """
        ...

    def check(self, support: Tensor) -> str | None:
        """None when `support` (bool [o, d]) keeps at most what the pattern allows, else what is wrong."""
        ...

    def require_fits(self, name: str, shape: tuple[int, int]) -> None:
        """Raises InputError, naming the layer, when a weight of `shape` (o, d) cannot have this pattern."""
        ...

    def packed_bits(self, o: int, d: int, value_bits: int) -> int:
        """Bits that S [o, d] takes in a shard: kept values, metadata and, where rows differ, row offsets."""
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

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def project(self, scores: Tensor) -> Tensor:
        o, d = scores.shape
        if self.m > _PAIRWISE_MAX_M:
            groups = scores.view(o, d // self.m, self.m)
            order = groups.abs().sort(dim=2, descending=True, stable=True).indices
            kept = torch.zeros_like(groups, dtype=torch.bool)
            return kept.scatter_(2, order[..., : self.n], True).flatten(1)
        kept = torch.empty_like(scores, dtype=torch.bool)  # keeps strides: a column-major input stays fast
        members = scores.abs().view(o, d // self.m, self.m).unbind(2)  # m tensors [o, d/m]
        slots = kept.view(o, d // self.m, self.m).unbind(2)
        if (self.n, self.m) == (2, 4):
            _two_of_four(members, slots)
        else:
            _n_of_m(members, slots, self.n)
        return kept

    def check(self, support: Tensor) -> str | None:
        rows, d = support.shape
        if d % self.m:
            return f"{d} columns are not a multiple of {self.m}"
        counts = support.view(rows, d // self.m, self.m).sum(2)  # [o, d/m]
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

    def packed_bits(self, o: int, d: int, value_bits: int) -> int:
        kept = o * (d // self.m) * self.n
        # Both kinds of metadata take a bit a weight: 2:4 a nibble a group of 4, the others a bitmask.
        return kept * value_bits + o * _bytes_of_row(d) * 8


@dataclass(frozen=True)
class Unstructured:
    """Zeroes the share `sparsity` of a whole layer's weights, wherever they are smallest."""

    sparsity: float

    def __post_init__(self) -> None:
        if not 0.0 < self.sparsity < 1.0:
            raise InputError(
                f"pattern {self} zeroes {self.sparsity:.6%} of the weights; the share must lie between 0% and 100%"
            )

    @property
    def density(self) -> float:
        return 1.0 - self.sparsity

    def __str__(self) -> str:
        return f"{100 * self.sparsity:.10g}%"

    def kept(self, o: int, d: int) -> int:
        """How many of o×d weights stay."""
        return round(o * d * self.density)

    def project(self, scores: Tensor) -> Tensor:
        k = self.kept(*scores.shape)
        magnitudes = scores.abs()
        if k == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        threshold = magnitudes.flatten().kthvalue(magnitudes.numel() - k + 1).values
        kept = magnitudes >= threshold
        surplus = int(kept.sum()) - k
        if surplus:  # ties at the threshold: the last ones, in row-major order, leave
            ties = (magnitudes == threshold).nonzero()[-surplus:]
            kept[ties[:, 0], ties[:, 1]] = False
        return kept

    def check(self, support: Tensor) -> str | None:
        o, d = support.shape
        found, allowed = int(support.sum()), self.kept(o, d)
        if found <= allowed:
            return None
        return f"keeps {found} of {o * d} weights; {self} allows {allowed}"

    def require_fits(self, name: str, shape: tuple[int, int]) -> None:
        o, d = shape
        if self.kept(o, d) == 0:
            raise InputError(f"{name}: pattern {self} keeps none of the {o}×{d} weights; lower the sparsity")

    def packed_bits(self, o: int, d: int, value_bits: int) -> int:
        # Row offsets are int64 [o + 1]: a layer may hold more than 2^31 values.
        return self.kept(o, d) * value_bits + o * _bytes_of_row(d) * 8 + (o + 1) * 64


def parse_pattern(text: str) -> SparsityPattern:
    """The pattern that `text` names: "2:4" keeps 2 of every 4, "50%" zeroes half of each layer.

    Raises InputError for anything else.
    """
    if match := re.fullmatch(r"\s*(\d+):(\d+)\s*", text):
        return NofM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text):
        return Unstructured(float(match[1]) / 100)
    raise InputError(
        f'pattern {text!r} is not known; write n:m to keep n of every m weights ("2:4"), or the share to zero ("50%")'
    )


def _bytes_of_row(d: int) -> int:
    """Bytes of a row's metadata at a bit a weight."""
    return (d + 7) // 8


def _two_of_four(members: tuple[Tensor, ...], slots: tuple[Tensor, ...]) -> None:
    """Fills the 4 bool `slots` [o, d/4] with whether each of the 4 magnitudes is among its group's top two.

    Six comparisons and a majority vote each: kept = wins at least two of its three duels.
    """
    a, b, c, d = members
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    torch.logical_or(ab & ac, (ab | ac) & ad, out=slots[0])
    torch.logical_or(bc & bd, (bc | bd) & ~ab, out=slots[1])
    torch.logical_or(~(ac | bc), ~(ac & bc) & cd, out=slots[2])
    # Exactly two stay, so the last is the parity of the others.
    torch.logical_xor(slots[0] ^ slots[1], slots[2], out=slots[3])


def _n_of_m(members: tuple[Tensor, ...], slots: tuple[Tensor, ...], n: int) -> None:
    """Fills the m bool `slots` [o, d/m]: kept = loses fewer than n of its m − 1 duels."""
    losses = [torch.zeros_like(x, dtype=torch.int8) for x in members]
    for i, left in enumerate(members):
        for j in range(i + 1, len(members)):
            left_wins = left >= members[j]
            losses[j] += left_wins
            losses[i] += ~left_wins
    for slot, lost in zip(slots, losses, strict=True):
        torch.lt(lost, n, out=slot)
