"""Questions about one tensor."""

import pytest
import torch

from streamslr.tensors import count_not_finite, is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_is_found_and_counted(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.randn(5, 7).to(dtype)
    assert is_finite(tensor)
    assert count_not_finite(tensor) == 0
    tensor[3, 4] = bad
    assert not is_finite(tensor)
    assert count_not_finite(tensor) == 1


def test_an_empty_tensor_and_integers_are_finite() -> None:
    assert is_finite(torch.empty(0, 3))
    assert is_finite(torch.arange(3))
