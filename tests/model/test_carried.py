"""What is carried into a block comes back from the columns of a boundary bit for bit."""

import pytest
import torch

from streamslr.model.carried import Carried, Layout

T = 5


def example(windows: int) -> Carried:
    """Return values of several dtypes, with windows and tokens on several axes, and odd numbers of bytes."""
    draw = torch.Generator().manual_seed(windows)
    keys = torch.randn(windows, 2, T, 3, generator=draw).bfloat16()
    flags = torch.rand(windows, T, 3, generator=draw) < 0.5
    return Carried(
        given={4: torch.randint(-9, 2**40, (windows, T), generator=draw)},
        written={0: {"full": (keys, keys + 1)}, 1: {"streams": torch.randn(4, windows, T, generator=draw)}},
        beside={1: flags, 2: None},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_come_back_as_they_were(dtype: torch.dtype) -> None:
    layout = Layout.of(example(1), example(2), T, dtype)
    columns = layout.pack(example(3), 3)
    assert columns.shape == (3, T, layout.width)
    assert columns.dtype == dtype
    before, after = example(3).flatten(), layout.unpack(columns).flatten()
    assert before[1] == after[1]
    for value, other in zip(before[0], after[0], strict=True):
        if value is None:
            assert other is None
        else:
            assert value.dtype == other.dtype
            assert torch.equal(value, other)


def test_the_columns_of_one_token_of_one_window_come_back() -> None:
    """A slice of so few numbers is contiguous wherever it begins, which need not fit wider numbers."""
    values = {0: torch.ones(1, 1, 3).bfloat16(), 1: torch.tensor([[2**40]])}
    two = {number: torch.cat([value, value]) for number, value in values.items()}
    layout = Layout.of(Carried(values), Carried(two), 1, torch.bfloat16)
    assert layout.unpack(layout.pack(Carried(values), 1)).given[1].item() == 2**40


def test_a_value_that_windows_have_in_common_comes_back_as_one() -> None:
    """RoFormer hands its blocks positions [1, 1, T, d] that it takes from a table of the checkpoint."""
    positions = torch.randn(1, 1, T, 4, generator=torch.Generator().manual_seed(0))
    layout = Layout.of(Carried({0: positions}), Carried({0: positions}), T, torch.bfloat16)
    columns = layout.pack(Carried({0: positions}), 3)
    assert columns.shape == (3, T, layout.width)
    assert torch.equal(layout.unpack(columns[1:]).given[0], positions)
    columns[2] += 1
    with pytest.raises(ValueError, match="depends on which windows pass together"):
        layout.unpack(columns)


def test_a_value_that_is_not_for_each_token_is_refused() -> None:
    shared = Carried(given={0: torch.ones(7, 3)})
    with pytest.raises(ValueError, match=r"blocks hand on a tensor .*, which has no part for each of 5 tokens"):
        Layout.of(shared, shared, T, torch.float32)


def test_a_value_of_another_dtype_than_laid_out_is_refused() -> None:
    one, two = (Carried({0: torch.ones(windows, T, 2)}) for windows in (1, 2))
    layout = Layout.of(one, two, T, torch.float32)
    with pytest.raises(ValueError, match=r"a block hands on torch.float16 \[3, 5, 2\]"):
        layout.pack(Carried({0: torch.ones(3, T, 2).half()}), 3)
