"""The C library decodes to the bits of torch's way, whatever codes, scales and shapes, or is left aside and why."""

import ctypes
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamslr.model import decode_codes as module
from streamslr.model.decode_codes import decode, decode_native, why_not_native
from streamslr.model.dequantize import Codes, Kind, Layout, Scales, dequantize

ODD_SCALES = [0.0, -0.0, 1e-44, 2.0**-127, 2.0**-91, -1e-30, 65504.0, 2.0**91, 3e38, float("inf"), float("nan")]
STORED = [
    (Kind.FP8, Layout.ROWS),
    (Kind.INT8, Layout.ROWS),
    (Kind.FP4, Layout.ROWS),
    (Kind.TABLE, Layout.UPPER_FIRST),
    *((Kind.UINT8, layout) for layout in (Layout.ROWS, Layout.COLUMNS)),
    *((Kind.UINT4, layout) for layout in (Layout.ROWS, Layout.COLUMNS, Layout.AWQ)),
]
reason = why_not_native(Kind.INT8, Layout.ROWS, torch.bfloat16)
needs_library = pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture(autouse=True)
def no_verdicts_kept() -> Iterator[None]:
    module.why_not_native.cache_clear()
    module._library.cache_clear()
    yield
    module.why_not_native.cache_clear()
    module._library.cache_clear()


def random_codes(kind: Kind, layout: Layout, o: int, d: int, random: torch.Generator) -> Codes:
    stored = torch.randint(0, 256, (o * d * kind.bits // 8,), generator=random, dtype=torch.uint8)
    if kind == Kind.FP8:
        stored = stored.view(torch.float8_e4m3fn)
    elif kind == Kind.INT8:
        stored = stored.view(torch.int8)
    elif kind not in (Kind.FP4, Kind.TABLE):
        stored = stored.view(torch.int32)
    shapes = {Layout.ROWS: (o, -1), Layout.COLUMNS: (-1, o), Layout.AWQ: (d, -1), Layout.UPPER_FIRST: (o, -1)}
    table = torch.randn(16, generator=random) if kind == Kind.TABLE else None
    return Codes(stored.view(shapes[layout]), kind, layout, table)


def make(
    kind: Kind,
    layout: Layout,
    o: int,
    d: int,
    block: tuple[int, int] = (1, 32),
    zeros: bool = False,
    order: bool = False,
    seed: int = 0,
) -> tuple[Codes, Scales]:
    """Return random codes and scales of a weight [o, d], a scale for each block."""
    random = torch.Generator().manual_seed(seed)
    codes = random_codes(kind, layout, o, d, random)
    grid = -(-o // block[0]), -(-d // block[1])
    if kind == Kind.FP4:
        return codes, Scales(torch.randint(0, 256, grid, generator=random, dtype=torch.uint8), *block)
    scales = torch.randn(grid, generator=random) / 100
    columns = torch.randint(0, grid[1], (d,), generator=random) if order else block[1]
    points = torch.randint(-8, 9, grid, generator=random) if zeros else None
    return codes, Scales(scales, block[0], columns, points)


def decoded(way: Any, codes: Codes, scales: Scales, shape: tuple[int, int], dtype: torch.dtype, via: Any) -> Tensor:
    """Return the weight that a way decodes, of fp4 through a transposed view, as experts are."""
    o, d = shape
    weight = torch.zeros(d, o, dtype=dtype).t() if codes.kind == Kind.FP4 else torch.zeros(o, d, dtype=dtype)
    way(codes, scales, weight, via)
    return weight.contiguous()


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "layout"), STORED)
def test_nothing_is_left_to_torch(kind: Kind, layout: Layout, dtype: torch.dtype) -> None:
    assert why_not_native(kind, layout, dtype) is None


@needs_library
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_decodes_to_the_same_bits(data: st.DataObject) -> None:
    kind, layout = data.draw(st.sampled_from(STORED))
    o, d = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 300))
    if kind not in (Kind.FP8, Kind.INT8):
        d = 2 * d if kind == Kind.TABLE else -(-d // 32) * 32
    o = -(-o // 8) * 8 if layout == Layout.AWQ else o
    block, zeros, order = (1, 32), False, False
    if kind != Kind.FP4:
        in_words = kind in (Kind.UINT4, Kind.UINT8)
        block = 1 if in_words else data.draw(st.integers(1, 2 * o)), data.draw(st.integers(1, 2 * d))
        zeros, order = kind != Kind.TABLE and data.draw(st.booleans()), in_words and data.draw(st.booleans())
    codes, scales = make(kind, layout, o, d, block, zeros, order, data.draw(st.integers(0, 1000)))
    if kind != Kind.FP4:
        for odd in data.draw(st.lists(st.sampled_from(ODD_SCALES), max_size=3)):
            scales.scales.view(-1)[data.draw(st.integers(0, scales.scales.numel() - 1))] = odd
        scales = replace(scales, scales=scales.scales.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16]))))
    if kind == Kind.INT8:
        scales = replace(scales, unit=data.draw(st.sampled_from([1.0, 1 / 127, -1e30])))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    via = data.draw(st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]))
    expected = decoded(dequantize, codes, scales, (o, d), dtype, via)
    assert_same_bits(decoded(decode_native, codes, scales, (o, d), dtype, via), expected)


@needs_library
@pytest.mark.parametrize("scale", [0.02, -3.0, *ODD_SCALES])
def test_every_code_of_fp8_with_every_scale(scale: float) -> None:
    codes = Codes(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 256), Kind.FP8)
    scales = Scales(torch.tensor([[scale]]), 1, 256)
    expected = decoded(dequantize, codes, scales, (1, 256), torch.bfloat16, None)
    assert_same_bits(decoded(decode_native, codes, scales, (1, 256), torch.bfloat16, None), expected)


@needs_library
def test_a_scale_that_is_any_nan_makes_nan() -> None:
    scales = torch.full((1, 2), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    for columns in (128, torch.zeros(256, dtype=torch.int64)):
        codes = Codes(torch.zeros(1, 64, dtype=torch.int32), Kind.UINT8)
        weight = torch.zeros(1, 256, dtype=torch.bfloat16)
        decode_native(codes, Scales(scales, 1, columns), weight, None)
        assert weight.isnan().all()


@needs_library
@pytest.mark.parametrize(("kind", "layout"), STORED)
def test_threads_do_not_change_a_bit(kind: Kind, layout: Layout) -> None:
    codes, scales = make(kind, layout, 520, 416)
    threads, weights = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        weights.append(decoded(decode_native, codes, scales, (520, 416), torch.bfloat16, None))
    torch.set_num_threads(threads)
    assert_same_bits(*weights)


@needs_library
@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        (torch.zeros(8, 31, dtype=torch.int8), Scales(torch.ones(8, 1), 1, 32)),
        (torch.zeros(8, 32, dtype=torch.int8), Scales(torch.ones(7, 1), 1, 32)),
        (torch.zeros(8, 32, dtype=torch.int8), Scales(torch.ones(8, 1), 1, 16)),
        (torch.zeros(8, 32, dtype=torch.int8), Scales(torch.ones(8, 1), 1, 32, torch.ones(8, 2))),
        (torch.zeros(8, 32, dtype=torch.int8), Scales(torch.ones(8, 2), 1, torch.full((32,), 2))),
        (torch.zeros(8, 32, dtype=torch.int8), Scales(torch.ones(8, 2), 1, torch.full((32,), -1))),
        (torch.zeros(8, 32, dtype=torch.int8), Scales(torch.ones(8, 2), 1, torch.zeros(31, dtype=torch.int64))),
    ],
)
def test_parts_that_do_not_fit_are_refused(codes: Tensor, scales: Scales) -> None:
    with pytest.raises(ValueError, match="do not make a weight"):
        decode_native(Codes(codes, Kind.INT8), scales, torch.zeros(8, 32, dtype=torch.bfloat16), None)


@needs_library
@pytest.mark.parametrize(
    ("kind", "layout", "table", "scales"),
    [
        (Kind.TABLE, Layout.UPPER_FIRST, None, Scales(torch.ones(8, 1), 1, 32)),
        (Kind.TABLE, Layout.UPPER_FIRST, torch.ones(15), Scales(torch.ones(8, 1), 1, 32)),
        (Kind.TABLE, Layout.ROWS, torch.ones(16), Scales(torch.ones(8, 1), 1, 32)),
        (Kind.UINT4, Layout.UPPER_FIRST, torch.ones(16), Scales(torch.ones(8, 1), 1, 32)),
        (Kind.UINT4, Layout.ROWS, torch.ones(16), Scales(torch.ones(8, 1), 1, 32)),
        (Kind.TABLE, Layout.UPPER_FIRST, torch.ones(16), Scales(torch.ones(8, 1), 1, 32, torch.ones(8, 1))),
        (Kind.TABLE, Layout.UPPER_FIRST, torch.ones(16), Scales(torch.ones(8, 1), 1, torch.zeros(32).long())),
        (Kind.TABLE, Layout.UPPER_FIRST, torch.ones(16), Scales(torch.ones(8, 1), 1, 32, unit=0.5)),
        (Kind.UINT4, Layout.ROWS, None, Scales(torch.ones(8, 1), 1, 32, unit=0.5)),
    ],
)
def test_a_table_or_unit_in_another_place_is_refused(
    kind: Kind, layout: Layout, table: Tensor | None, scales: Scales
) -> None:
    codes = Codes(torch.zeros(8, 16, dtype=torch.uint8), kind, layout, table)
    with pytest.raises(ValueError, match="do not make a weight"):
        decode_native(codes, scales, torch.zeros(8, 32, dtype=torch.bfloat16), None)


# Where the library is left aside


def use_wrong_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(codes: Codes, scales: Scales, weight: Tensor, via: torch.dtype | None) -> None:
        decode_native(codes, scales, weight, via)
        weight[0, 0] += 1

    monkeypatch.setattr(module, "decode_native", wrong)


def use_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)


def use_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wider(ctypes.Structure):
        _fields_ = (*module._Coded._fields_, ("more", ctypes.c_int64))

    monkeypatch.setattr(module, "_Coded", Wider)


@pytest.mark.parametrize(
    ("break_it", "dtype", "why"),
    [
        pytest.param(use_wrong_bits, torch.bfloat16, "decoded a small weight wrongly", marks=needs_library),
        pytest.param(use_another_layout, torch.bfloat16, "is of another version", marks=needs_library),
        (use_no_library, torch.bfloat16, "was not built"),
        (lambda monkeypatch: None, torch.float32, "writes bfloat16 and float16, not torch.float32"),
    ],
)
def test_torch_decodes_instead_and_the_reason_is_logged_once(
    break_it: Any, dtype: torch.dtype, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_it(monkeypatch)
    codes, scales = make(Kind.INT8, Layout.ROWS, 5, 70)
    with caplog.at_level(logging.WARNING, logger="streamslr"):
        weights = [decoded(decode, codes, scales, (5, 70), dtype, None) for _ in range(2)]
    expected = decoded(dequantize, codes, scales, (5, 70), dtype, None)
    assert all(torch.equal(weight, expected) for weight in weights)
    assert [record.getMessage().count(why) for record in caplog.records] == [1]
