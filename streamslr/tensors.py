"""Questions about one tensor."""

from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Return True when no value is NaN or infinite; without a mask as large as the tensor."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())


def count_not_finite(tensor: Tensor) -> int:
    """Return how many values are NaN or infinite."""
    return int((~tensor.isfinite()).sum())
