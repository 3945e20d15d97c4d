"""Samples of a boundary: values at fixed places, taken when it is committed, compared after a replay."""

import logging
import math
from collections.abc import Sequence
from itertools import zip_longest
from statistics import median

import torch

from streamslr.calibration.hidden_states import HiddenStates
from streamslr.errors import StreamslrError
from streamslr.run.journal import Sample

log = logging.getLogger("streamslr")

SAMPLED_WINDOWS, SAMPLED_VALUES = 8, 4
"""Windows of a boundary that its sample is taken from, and values of each."""


def take_sample(states: HiddenStates, window: int, number: int, width: int) -> tuple[float | None, ...]:
    """Return values of a window's last tokens, which all earlier tokens act on.

    Args:
        states: the boundary.
        window: the window.
        number: its number among the sampled windows.
        width: width of the hidden states, the first columns of the boundary.
    """
    values: list[float | None] = []
    (hidden,) = states.read(window, window + 1).float()  # [T, w]
    tokens = len(hidden)
    for k in range(SAMPLED_VALUES):
        # multiples of the golden ratio spread evenly over the width, however many there are
        column = int((number * SAMPLED_VALUES + k) * 0.618034 % 1 * width)
        value = float(hidden[max(0, tokens - 1 - k), column])
        values.append(value if math.isfinite(value) else None)
    return tuple(values)


def median_difference(before: Sequence[float | None], now: Sequence[float | None]) -> float:
    """Return the median difference between two samples of a stream, relative to the median size of a value."""
    pairs = [pair for pair in zip_longest(before, now) if pair != (None, None)]
    if not pairs:
        return 0.0
    difference = median(math.inf if a is None or b is None else abs(a - b) for a, b in pairs)
    size = median(abs(a or 0.0) for a, _ in pairs)
    return difference / size if size else (math.inf if difference else 0.0)


def require_same_but_for_rounding(before: Sample | None, now: Sample, dtype: torch.dtype) -> None:
    """Warn that replayed hidden states are not bit for bit what they were; refuse what rounding cannot explain.

    Where a block chooses experts, rounding may send a token to another one and change it wholly, hence the median over
    the sample. It is held against sqrt(eps) of the dtype, for rounding grows from block to block.

    Args:
        before: Sample of the boundary when it was committed; None where the journal has none.
        now: Sample of the same boundary, replayed.
        dtype: Dtype that hidden states are computed in.

    Raises:
        StreamslrError: They differ by more than rounding.
    """
    difference = max(map(median_difference, before, now), default=0.0) if before else 0.0
    if difference > torch.finfo(dtype).eps ** 0.5:
        raise StreamslrError(
            f"replayed hidden states differ from those of the first pass by {difference:.2g} of their size, more than "
            f"rounding in {dtype}: transformers, torch or the machine compute another model than before. Go on where "
            f"the run began (streamslr.json says which versions under made_with), or give another --out"
        )
    message = "replayed hidden states differ in their last bits%s: another machine, torch build or micro-batch"
    log.warning(message, f" (by {difference:.1g} of their size)" if before else "")
