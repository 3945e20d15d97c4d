"""Questions about one tensor, and the precision of products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Return True when no value is NaN or infinite.

    The smallest and the largest value carry any NaN or infinity, so no mask of the tensor's size is made.
    """
    if not tensor.numel():
        return True
    if tensor.is_floating_point() and tensor.itemsize == 1:  # aminmax does not take float8
        tensor = tensor.float()
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())


def count_not_finite(tensor: Tensor) -> int:
    """Return how many values are NaN or infinite. It takes a mask of the tensor's size: ask `is_finite` first."""
    return int((~tensor.isfinite()).sum())


@contextmanager
def tf32_products() -> Iterator[None]:
    """Let float32 products on a GPU round their factors to TF32 within the context, and only there."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = before
