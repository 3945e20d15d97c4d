"""The largest magnitudes of groups, rows or a whole linear: exact selections, and fast markers for iterations."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

# Group length up to which insertion by minimum and maximum beats a selection in each group.
_INSERTION_MAX_M = 16
# Elements of a slice of rows in which torch selects; that takes 12 bytes an element.
_SLICE, _SLICE_ON_GPU = 1 << 16, 1 << 22


class Marker(Protocol):
    """A projection on a pattern for the inside of iterations: several times faster than `project`, almost exact.

    Attributes:
        group: Columns that are decided together.
    """

    group: int

    def mark_(self, magnitudes: Tensor, rows: slice = slice(None)) -> Tensor:
        """Overwrite magnitudes with the mask, 1 where a weight is kept and 0 elsewhere, and return them.

        Args:
            magnitudes: [t, k], k a multiple of `group`.
            rows: The t rows of the linear that these are.
        """
        ...

    def end_pass(self) -> None:
        """Adapt to the numbers marked; to be called when every column has been marked once."""
        ...


class GroupMarker:
    """Marker of n:m by the n-th largest magnitude of each group; members that tie with it are all kept."""

    def __init__(self, n: int, m: int) -> None:
        self.n, self.group = n, m

    def mark_(self, magnitudes: Tensor, rows: slice = slice(None)) -> Tensor:
        o, k = magnitudes.shape
        groups = magnitudes.view(o, k // self.group, self.group)
        members = groups.unbind(2)  # m tensors [o, k/m]
        if self.group > _INSERTION_MAX_M:
            rank = self.group - self.n + 1
            threshold = torch.cat([groups[rows].kthvalue(rank, dim=2).values for rows in row_slices(magnitudes)])
        else:
            threshold = _nth_largest(members, self.n)
        for member in members:
            member.ge_(threshold)
        return magnitudes

    def end_pass(self) -> None:
        pass


class LevelMarker:
    """Marker by a level, one for the whole linear or one a row, that follows the number marked in the last pass.

    A selection would cost more than the rest of an iteration. After each pass

        level ← level · (num_marked / num_kept)^step,

    with step = 1 close to Newton's step for bell-shaped weights of which half are kept. Below half density the full
    step overshoots and the level would oscillate. Each time the number crosses the one wanted, the step is halved, to
    no less than 1/4, so that the level still follows the weights; else it grows by a fifth, to 1 at most
    (tools/results/solver.md, "Level marker").
    """

    group = 1

    def __init__(self, level: Tensor, num_kept: int) -> None:
        """Start from exact levels.

        Args:
            level: [1] for the linear, or [o], one a row.
            num_kept: Weights to mark by each level.
        """
        self.num_kept = num_kept
        self.lowest = 1e-6 * level.mean()  # a level of 0, from a row of zeros, could never rise
        self.level = level.clamp(min=self.lowest)
        self.num_marked, self.surplus = torch.zeros_like(level), torch.zeros_like(level)
        self.step = torch.ones_like(level)

    def mark_(self, magnitudes: Tensor, rows: slice = slice(None)) -> Tensor:
        if len(self.level) == 1:
            magnitudes.ge_(self.level)
            self.num_marked += magnitudes.sum()
        else:
            magnitudes.ge_(self.level[rows, None])
            self.num_marked[rows] += magnitudes.sum(1)
        return magnitudes

    def end_pass(self) -> None:
        surplus = self.num_marked - self.num_kept
        crossed = surplus * self.surplus < 0
        self.step = torch.where(crossed, self.step / 2, self.step * 1.2).clamp_(0.25, 1)
        self.level *= (self.num_marked / self.num_kept).clamp_(0.5, 2).pow_(self.step)
        self.level.clamp_(min=self.lowest)
        self.surplus = surplus
        self.num_marked.zero_()


def largest_of_rows(scores: Tensor, n: int) -> Tensor:
    """Return the mask, bool [o, k], of the n largest magnitudes of each row of `scores` [o, k].

    Of equal magnitudes the lower index is kept.
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for rows in row_slices(scores) if n else ():
        magnitudes = scores[rows].abs()
        threshold = nth_of_rows(magnitudes, n)[:, None]
        part = mask[rows]
        torch.ge(magnitudes, threshold, out=part)
        surplus = part.sum(1, keepdim=True) - n  # [t, 1]
        if bool(surplus.any()):
            ties = magnitudes == threshold
            part &= ~(ties & (ties.cumsum(1) > ties.sum(1, keepdim=True) - surplus))
    return mask


def row_slices(scores: Tensor) -> Iterator[slice]:
    """Return slices of the rows of `scores` [o, d], small enough for what torch takes to select in them."""
    o, d = scores.shape
    step = max(1, (_SLICE if scores.device.type == "cpu" else _SLICE_ON_GPU) // d)
    return (slice(start, start + step) for start in range(0, o, step))


def kth_largest(magnitudes: Tensor, k: int) -> Tensor:
    """Return the k-th largest of all magnitudes [o, d] (float32, ≥ 0), exactly, as a scalar tensor.

    The range of bit patterns, which sort as the values do, is halved 31 times. This takes a byte an element, where
    torch's kthvalue and topk take 12 and more (tools/results/solver.md, "Selection").
    """
    bits = magnitudes.view(torch.int32)
    low, high = torch.zeros_like(bits[0, 0]), bits.max()
    for _ in range(31):
        middle = low + (high - low + 1) // 2
        enough = torch.count_nonzero(bits >= middle) >= k
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    return low.view(torch.float32)


def nth_of_rows(magnitudes: Tensor, n: int) -> Tensor:
    """Return the n-th largest of each row of `magnitudes` [t, k], [t]."""
    return magnitudes.kthvalue(magnitudes.shape[1] - n + 1, dim=1).values


def _nth_largest(members: tuple[Tensor, ...], n: int) -> Tensor:
    """Return the n-th largest of equally shaped tensors, elementwise; holds the n largest so far, in order."""
    largest = [members[0]]
    for count, entering in enumerate(members[1:], start=1):
        last = count == len(members) - 1
        for rank in range(min(count, n)):
            held = largest[rank]
            if not (last and rank < n - 1):  # at the last member only the n-th is still of interest
                largest[rank] = torch.maximum(held, entering)
            if rank < n - 1:
                entering = torch.minimum(held, entering)
        if count < n:
            largest.append(entering)
    return largest[-1]
