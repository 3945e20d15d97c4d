"""Sparsity of each block by its outliers (OWL, arXiv 2310.05175): the score of a block, and densities from scores."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import floor

import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.spec.pattern import NofM, SparsityPattern

DEFAULT_OUTLIER_FACTOR = 5.0
"""Multiple of the mean score above which a weight is an outlier: M of the paper, 5 in its experiments."""

# Rows of a weight whose scores exist at once.
_SCORED_ROWS = 1024


@torch.no_grad()
def outlier_fraction(linears: Iterable[tuple[Tensor, Tensor]], factor: float) -> float:
    """Return OWL's score of a block: the fraction of A_ij = ‖X_j‖·|W_ij| above `factor` times their mean.

    Args:
        linears: For each linear of the block, W [o, d] and Σ x² over its calibration inputs [d].
        factor: M of the paper.
    """
    scored = [(weight, energy.sqrt()) for weight, energy in linears]
    count = sum(weight.numel() for weight, _ in scored)
    columns = [(torch.linalg.vector_norm(weight, 1, dim=0, dtype=torch.float32), norms) for weight, norms in scored]
    level = factor * sum(float(column.double() @ norms.double()) for column, norms in columns) / count
    above = sum(
        int((weight[start : start + _SCORED_ROWS].abs() * norms > level).count_nonzero())
        for weight, norms in scored
        for start in range(0, len(weight), _SCORED_ROWS)
    )
    return above / count


def scoring_bytes(d: int) -> int:
    """Return the bytes that `outlier_fraction` takes for a linear of d inputs: scores and magnitudes of some rows."""
    return 8 * _SCORED_ROWS * d


def vary_by_outliers(
    mean: SparsityPattern, spread: float, outliers: Sequence[float] | None, sizes: Sequence[int]
) -> list[SparsityPattern]:
    """Return a pattern a block, denser where a block has more outliers; the mean density is that of `mean`.

    Densities are linear in the outliers. The largest difference from the mean density, reached by one block, is
    `spread` (λ of the paper, whose code has a range of 2λ in all, wherever the mean lies in it). Of n:m only n varies,
    in whole steps within λ, and the mean is the nearest below that such steps allow.

    Args:
        mean: Pattern of the mean over all blocks.
        spread: Largest difference of a density from the mean one.
        outliers: `outlier_fraction` of each block; None while it is not known, for each block at its densest.
        sizes: Weights of each block, by which the mean is weighted.

    Raises:
        InputError: The pattern cannot vary by `spread`.
    """
    leanings = [1.0] * len(sizes) if outliers is None else _leanings(outliers, sizes)
    if isinstance(mean, NofM):
        steps = min(floor(spread * mean.m + 1e-9), mean.n - 1, mean.m - 1 - mean.n)
        if steps < 1:
            raise InputError(
                f"--owl {spread:g} cannot vary {mean}: n goes in steps of 1/{mean.m} = {1 / mean.m:.3g} and stays "
                f"between 1 and {mean.m - 1}; give a larger --owl, a pattern with more steps such as 8:16, or a "
                f"percentage such as 50%"
            )
        if outliers is None:
            return [NofM(mean.n + steps, mean.m)] * len(sizes)
        return [NofM(n, mean.m) for n in _whole_steps(mean.n, steps, leanings, sizes)]
    if not spread < min(mean.density, 1 - mean.density):
        raise InputError(
            f"--owl {spread:g} is too much around {mean}: the sparsity of every block must lie between 0% and 100%"
        )
    return [mean.with_density(mean.density + spread * leaning) for leaning in leanings]


def _leanings(outliers: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Return each block's difference from the mean outliers, weighted by size, in units of the largest: -1 to 1."""
    exact = [Fraction(fraction) for fraction in outliers]  # rounding would show where blocks are nearly alike
    mean = sum((size * fraction for size, fraction in zip(sizes, exact, strict=True)), Fraction()) / sum(sizes)
    largest = max(abs(fraction - mean) for fraction in exact)
    return [float((fraction - mean) / largest) if largest else 0.0 for fraction in exact]


def _whole_steps(n: int, steps: int, leanings: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Return n of each block, n + steps · leaning in whole numbers, whose mean by size is at most n.

    All are rounded down. What that leaves over goes to the blocks that lost most by it.
    """
    wanted = [round(n + steps * leaning, 9) for leaning in leanings]
    counts = [floor(number) for number in wanted]
    spare = n * sum(sizes) - sum(size * count for size, count in zip(sizes, counts, strict=True))
    for i in sorted(range(len(sizes)), key=lambda i: counts[i] - wanted[i]):  # the largest fraction first
        if sizes[i] <= spare and wanted[i] > counts[i]:
            counts[i], spare = counts[i] + 1, spare - sizes[i]
    return counts
