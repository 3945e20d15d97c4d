"""Packing values on a grid: exact round trips, pinned bytes, merging, and damage that is named."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamslr.io.packed_check import check_packed
from streamslr.io.packed_layout import packed_bytes, value_format
from streamslr.io.packing import merge, pack_on_grid, unpack, unpack_codes, unpack_rows
from streamslr.spec.pattern import NofM, SparsityPattern, UnstructuredRows, parse_pattern
from streamslr.spec.values import ValueFormat, group_count, spread
from tests.support.packed_linears import form_of, grid_linear, random_codes

PATTERNS = ["2:4", "4:8", "1:4", "2:3", "50%", "90%", "50%/row", "dense"]
VALUES = ["int8", "int4", "fp8"]
TINY = torch.tensor([[1.0, 0, -2, 0, 0, 0, 7, -7], [0, 0, 0, 0, 0, 5, 0, 0]])


@st.composite
def cases(draw: st.DrawFn) -> tuple[SparsityPattern, ValueFormat, Tensor, Tensor]:
    pattern, values = parse_pattern(draw(st.sampled_from(PATTERNS))), form_of(draw(st.sampled_from(VALUES)), 1)
    m = pattern.m if isinstance(pattern, NofM) else 1
    o, d = draw(st.integers(1, 12)), m * draw(st.integers(1, 9)) + 10 * isinstance(pattern, UnstructuredRows)
    values = form_of(values.name, draw(st.integers(1, d + 3)))
    codes = random_codes(pattern, values, o, d, draw(st.integers(0, 2**32)))
    scales = torch.rand(o, group_count(d, values.group), generator=torch.Generator().manual_seed(o * d)) + 0.1
    return pattern, values, codes, scales.bfloat16().float()


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_round_trip_is_exact_and_sound(
    case: tuple[SparsityPattern, ValueFormat, Tensor, Tensor], data: st.DataObject
) -> None:
    pattern, values, codes, scales = case
    shape = o, d = codes.shape[0], codes.shape[1]
    packed = pack_on_grid(codes, scales, pattern, torch.bfloat16, values)
    assert check_packed(packed, pattern, shape) == []
    assert torch.equal(unpack(packed, pattern, shape), codes * spread(scales, d))
    assert torch.equal(unpack_codes(packed, pattern, shape).float(), codes)
    found = value_format(packed, d)
    assert found is not None
    assert (found.name, group_count(d, found.group)) == (values.name, scales.shape[1])
    first = data.draw(st.integers(0, o - 1))
    rows = slice(first, data.draw(st.integers(first + 1, o)))
    assert torch.equal(unpack_rows(packed, pattern, shape, rows), (codes * spread(scales, d))[rows])
    assert sum(part.nbytes for part in packed.values()) <= packed_bytes(pattern, shape, 0, 2, values)


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        ("int8", [[1, -2, 7, -7], [0, 0, 0, 5]]),
        ("int4", [[0xE1, 0x97], [0x00, 0x50]]),
        ("fp8", [[1.0, -2.0, 7.0, -7.0], [0.0, 0.0, 0.0, 5.0]]),
    ],
)
def test_the_bytes_of_2_4_are_pinned(values: str, stored: list[list[float]]) -> None:
    """Row 1: its first group is empty, so columns 0 and 1 are stored, its second has column 0 beside column 1."""
    packed = pack_on_grid(TINY, torch.tensor([[0.5, 2.0], [1.0, 4.0]]), NofM(2, 4), torch.bfloat16, form_of(values, 4))
    assert packed["values"].to(torch.float32 if values == "fp8" else torch.int16).tolist() == stored
    assert packed["meta"].tolist() == [[1 + 6 * 5], [0 + 6 * 0]]
    assert packed["scales"].tolist() == [[0.5, 2.0], [1.0, 4.0]]
    assert packed["scales"].dtype == torch.bfloat16


def test_int4_of_rows_that_differ_runs_over_their_ends() -> None:
    packed = pack_on_grid(TINY, torch.ones(2, 1), parse_pattern("50%"), torch.float32, form_of("int4", 8))
    assert packed["values"].tolist() == [0xE1, 0x97, 0x05]
    assert packed["row_offsets"].tolist() == [0, 4, 5]


def test_int4_2_4_takes_less_than_3_bits_a_weight() -> None:
    linear = grid_linear(NofM(2, 4), form_of("int4", 128), 64, 4096, 0, torch.bfloat16)
    assert 8 * sum(part.nbytes for part in linear.values()) / (64 * 4096) < 2.85


@pytest.mark.parametrize("values", VALUES)
def test_merging_is_exact_in_float64(values: str) -> None:
    pattern, shape = NofM(2, 4), (8, 48)
    linear = grid_linear(pattern, form_of(values, 16), *shape, 3, torch.bfloat16)
    S = unpack_codes(linear, pattern, shape).double() * spread(linear["scales"], 48).double()
    assert torch.equal(merge(linear, pattern, shape, torch.float64), S + linear["U"].double() @ linear["V"].double())


@pytest.mark.parametrize(
    ("part", "tensor", "said"),
    [
        ("scales", torch.ones(3, 2), r"scales has shape \[3, 2\], a 8x48 2:4 linear needs \[8, 2\]"),
        ("scales", torch.full((8, 3), torch.nan), "scales.* is nan"),
        ("values", torch.zeros(8, 24, dtype=torch.int16), "values are torch.int16, with scales"),
        (
            "values",
            torch.full((8, 12), 0x80, dtype=torch.uint8),
            "96 codes .* beyond 7, the largest of int4",
        ),
        ("values", torch.zeros(8, 11, dtype=torch.uint8), r"values has shape \[8, 11\], .* needs \[8, 12\]"),
        ("U", torch.zeros(8, 2, dtype=torch.float16), "U is torch.float16, but V is torch.float32"),
    ],
)
def test_damage_is_form_of(part: str, tensor: Tensor, said: str) -> None:
    linear = grid_linear(NofM(2, 4), form_of("int4", 16), 8, 48, 2, torch.float32)
    problems = "; ".join(check_packed(linear | {part: tensor}, NofM(2, 4), (8, 48)))
    assert re.search(said, problems), problems
