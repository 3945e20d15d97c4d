"""Value formats: the nearest code, how codes are stored, groups of columns, and the text form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamslr.errors import InputError
from streamslr.spec.values import (
    Float8,
    Int4,
    Int8,
    ValueFormat,
    format_of,
    group_columns,
    group_count,
    parse_values,
    same_values,
    spread,
    values_text,
)

FORMATS: list[ValueFormat] = [Int8(), Int4(), Float8()]


def all_codes(values: ValueFormat) -> Tensor:
    """Return every number that a code can be, ascending."""
    if values.name == "fp8":
        numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        finite: Tensor = numbers[numbers.isfinite()].unique()
        return finite
    return torch.arange(-values.largest, values.largest + 1)


@pytest.mark.parametrize("values", FORMATS, ids=str)
def test_the_nearest_code_is_none_farther_than_any_other(values: ValueFormat) -> None:
    codes = all_codes(values)
    numbers = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * values.largest / 2
    found = values.nearest(numbers)
    assert torch.isin(found, codes).all()
    least = (numbers[:, None] - codes).abs().amin(1)
    torch.testing.assert_close((numbers - found).abs(), least)


@pytest.mark.parametrize("values", FORMATS, ids=str)
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 4), count=st.integers(0, 9), seed=st.integers(0, 2**32))
def test_stored_codes_come_back(values: ValueFormat, rows: int, count: int, seed: int) -> None:
    some = torch.randint(len(all_codes(values)), (rows, count), generator=torch.Generator().manual_seed(seed))
    codes = all_codes(values)[some]
    stored = values.encode(codes)
    assert (stored.dtype, stored.shape) == (values.dtype, (rows, values.stored_width(count)))
    assert torch.equal(values.decode(stored, count).float(), codes)


def test_two_codes_of_int4_lie_in_a_byte_the_first_in_its_low_half() -> None:
    assert Int4().encode(torch.tensor([[1.0, -1.0, 7.0, -7.0, 3.0]])).tolist() == [[0xF1, 0x97, 0x03]]


@given(d=st.integers(1, 2000), group=st.integers(1, 2500))
def test_groups_cover_the_columns_and_are_no_wider_than_asked(d: int, group: int) -> None:
    groups = group_count(d, group)
    size = group_columns(d, groups)
    assert size <= group
    assert (groups - 1) * size < d <= groups * size
    assert group_count(d, size) == groups
    assert spread(torch.arange(groups)[None], d)[0].tolist() == [j // size for j in range(d)]


def test_a_text_names_a_format_and_comes_back() -> None:
    assert parse_values("int4", 64) == Int4(64)
    assert parse_values("int8/32", 64) == Int8(32)
    assert parse_values("stored") is None
    every: list[ValueFormat | None] = [*FORMATS, None]
    for values in every:
        assert parse_values(values_text(values)) == values


@pytest.mark.parametrize("text", ["int5", "int4/", "int4/0", "INT4", "int4 /64", ""])
def test_a_text_that_names_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"int8, int4, fp8|columns that share a scale"):
        parse_values(text)


def test_stored_tensors_tell_their_format() -> None:
    for values in FORMATS:
        assert format_of(torch.empty(2, 2, dtype=values.dtype), torch.empty(2, 3), 384) == parse_values(str(values))
    assert format_of(torch.empty(2, 2), torch.empty(2, 3), 384) is None
    assert same_values(Int4(118), "int4/128", 704)
    assert not same_values(Int4(118), "int4/64", 704)
    assert not same_values(None, "int4/64", 704)
