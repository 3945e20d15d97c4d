"""The C library unpacks the bytes that torch's path does and multiplies as float64 does, or is left aside and why."""

import ctypes
import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from streamslr.io.packing import pack, unpack_codes, unpack_rows
from streamslr.runtime import packed_rows as module
from streamslr.runtime.linear import SparseLowRankLinear
from streamslr.runtime.packed_rows import MOST_TOKENS, multiply_native, unpack_native, why_not_native
from streamslr.spec.pattern import NofM, parse_pattern
from streamslr.spec.values import spread
from tests.support.packed_linears import form_of, grid_linear

PATTERNS = ["2:4", "1:4", "4:8", "8:16", "3:16", "1:3", "2:3", "1:8", "1:16", "50%/row", "50%", "97%"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = {"1:3": 33, "2:3": 33, "4:8": 72, "1:8": 72, "8:16": 144, "3:16": 144, "1:16": 80}
"""Columns that the pattern fits and that leave the last byte of a row in part unused, where it can be; else 20."""

needs_library = pytest.mark.skipif(
    why_not_native(NofM(2, 4), torch.float32) is not None, reason=str(why_not_native(NofM(2, 4), torch.float32))
)


@pytest.fixture(autouse=True)
def no_verdicts_kept() -> Iterator[None]:
    module._verdict.cache_clear()
    module._library.cache_clear()
    yield
    module._verdict.cache_clear()
    module._library.cache_clear()


def packed(pattern: str, dtype: torch.dtype, o: int, d: int) -> dict[str, Tensor]:
    parsed = parse_pattern(pattern)
    W = torch.randn(o, d, generator=torch.Generator().manual_seed(o * d))
    return pack(W * parsed.project(W), parsed, dtype)


def assert_same_bytes(got: Tensor, expected: Tensor) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_unpacks_the_same_bytes(pattern: str, dtype: torch.dtype) -> None:
    narrow = WIDTHS.get(pattern, 20)
    for d in (narrow, 31 * narrow):
        parts, parsed = packed(pattern, dtype, 21, d), parse_pattern(pattern)
        for rows in (slice(0, 21), slice(3, 4), slice(7, 21)):
            assert_same_bytes(unpack_native(parts, parsed, (21, d), rows), unpack_rows(parts, parsed, (21, d), rows))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens", [1, MOST_TOKENS])
def test_multiplies_as_float64_does(pattern: str, dtype: torch.dtype, tokens: int) -> None:
    parsed = parse_pattern(pattern)
    for d in (WIDTHS.get(pattern, 20), 101 * WIDTHS.get(pattern, 20)):
        parts = packed(pattern, dtype, 9, d)
        x = torch.randn(tokens, d).to(dtype)
        y = multiply_native(x, parts, parsed, (9, d))
        expected = x.double() @ unpack_rows(parts, parsed, (9, d), slice(0, 9)).double().t()
        assert y.dtype == dtype
        assert (y.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_need_not_be_aligned(dtype: torch.dtype) -> None:
    parts, pattern, shape = packed("2:4", dtype, 13, 100), parse_pattern("2:4"), (13, 100)
    memory = torch.zeros(parts["values"].nbytes + 1, dtype=torch.uint8)
    memory[1:] = parts["values"].view(torch.uint8).view(-1)
    odd = torch.frombuffer(memory.numpy(), dtype=dtype, offset=1, count=parts["values"].numel()).view(13, 50)
    unaligned = {"values": odd, "meta": parts["meta"]}
    assert odd.data_ptr() % 2
    assert_same_bytes(
        unpack_native(unaligned, pattern, shape, slice(0, 13)), unpack_rows(parts, pattern, shape, slice(0, 13))
    )


@needs_library
@pytest.mark.parametrize(("pattern", "values"), [("2:4", None), ("1:16", None), ("50%", None), ("50%", "int4")])
def test_threads_do_not_change_a_byte(pattern: str, values: str | None) -> None:
    parsed, shape = parse_pattern(pattern), (300, 960)
    if values is None:
        parts = packed(pattern, torch.bfloat16, *shape)
    else:
        parts = grid_linear(parsed, form_of(values), *shape, 0, torch.bfloat16)
    x, threads = torch.randn(2, 960).bfloat16(), torch.get_num_threads()
    got = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            got.append((unpack_native(parts, parsed, shape, slice(0, 300)), multiply_native(x, parts, parsed, shape)))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*got, strict=True):
        assert_same_bytes(two, one)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_damage_reaches_no_memory_past_the_values(pattern: str, dtype: torch.dtype) -> None:
    d, parsed = 11 * WIDTHS.get(pattern, 20), parse_pattern(pattern)
    parts = packed(pattern, dtype, 17, d)
    used = len(parts["values"].view(-1))
    memory = torch.full((used + 512,), float("nan"), dtype=dtype)  # what lies past the values shows where it is read
    memory[256 : 256 + used] = parts["values"].view(-1)
    values = memory[256 : 256 + used].view(parts["values"].shape)
    for meta in (torch.full_like(parts["meta"], 255), torch.randint_like(parts["meta"], 256)):
        damaged = {**parts, "values": values, "meta": meta}
        if "row_offsets" in damaged:
            damaged["row_offsets"] = torch.randint_like(parts["row_offsets"], -(2**62), 2**62)
            damaged["row_offsets"][::2] %= used
        assert unpack_native(damaged, parsed, (17, d), slice(0, 17)).isfinite().all()
        assert multiply_native(torch.ones(1, d, dtype=dtype), damaged, parsed, (17, d)).isfinite().all()
    assert memory[:256].isnan().all()
    assert memory[256 + used :].isnan().all()


@needs_library
def test_refuses_meta_of_another_width() -> None:
    parts, pattern = packed("2:4", torch.float32, 4, 24), parse_pattern("2:4")
    with pytest.raises(ValueError, match=r"meta \[4, 2\] does not describe"):
        unpack_native(parts, pattern, (4, 240), slice(0, 4))


# Codes


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("pattern", [*PATTERNS, "dense"])
def test_unpacks_codes_to_the_same_bytes(pattern: str, values: str, dtype: torch.dtype) -> None:
    parsed, narrow = parse_pattern(pattern), WIDTHS.get(pattern, 20)
    for d, group in ((narrow, 7), (31 * narrow, 96), (101 * narrow, 128)):
        parts = grid_linear(parsed, form_of(values, group), 13, d, 0, dtype)
        parts["scales"][2] *= -1
        for rows in (slice(0, 13), slice(3, 4), slice(7, 13)):
            assert_same_bytes(unpack_native(parts, parsed, (13, d), rows), unpack_rows(parts, parsed, (13, d), rows))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("pattern", ["2:4", "1:3", "1:16", "50%/row", "97%", "dense"])
def test_multiplies_codes_as_float64_does(pattern: str, values: str, dtype: torch.dtype) -> None:
    parsed, narrow, o = parse_pattern(pattern), WIDTHS.get(pattern, 20), 9
    for d, group in ((narrow, 7), (101 * narrow, 32), (101 * narrow, 116)):
        parts = grid_linear(parsed, form_of(values, group), o, d, 0, dtype)
        S = unpack_codes(parts, parsed, (o, d)).double() * spread(parts["scales"].double(), d)
        x = torch.randn(MOST_TOKENS, d).to(dtype)
        got, expected = multiply_native(x, parts, parsed, (o, d)), x.double() @ S.t()
        # At worst every product and sum rounds once, whatever the order; the result rounds once more.
        of_sums = (d + 3) * torch.finfo(torch.float32).eps * (x.double().abs() @ S.abs().t())
        of_result = torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).tiny
        assert ((got.double() - expected).abs() <= of_sums + of_result).all()


@needs_library
@pytest.mark.parametrize("values", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("pattern", [*PATTERNS, "dense"])
def test_damage_reaches_no_memory_past_the_codes(pattern: str, values: str) -> None:
    d, parsed, form = 11 * WIDTHS.get(pattern, 20), parse_pattern(pattern), form_of(values, 50)
    parts = grid_linear(parsed, form, 17, d, 0, torch.float32)
    used = parts["values"].numel()
    # What lies past the codes, 127, or 7 in each half, or NaN, shows where it is read.
    memory = torch.full((used + 1024,), 0x77 if values == "int4" else 0x7F, dtype=torch.uint8)
    memory[512 : 512 + used] = 0
    damaged = {**parts, "values": memory[512 : 512 + used].view(form.dtype).view(parts["values"].shape)}
    for meta in (torch.full_like(parts["meta"], 255), torch.randint_like(parts["meta"], 256)):
        damaged["meta"] = meta
        if "row_offsets" in damaged:
            damaged["row_offsets"] = torch.randint_like(parts["row_offsets"], -(2**62), 2**62)
            damaged["row_offsets"][::2] %= used
        assert not unpack_native(damaged, parsed, (17, d), slice(0, 17)).any()
        assert not multiply_native(torch.ones(1, d), damaged, parsed, (17, d)).any()


@needs_library
def test_codes_that_are_no_number_stay_so() -> None:
    parts, pattern = grid_linear(parse_pattern("2:4"), form_of("fp8"), 4, 24, 0, torch.float32), NofM(2, 4)
    parts["values"].view(torch.uint8)[1] = 0x7F
    assert unpack_native(parts, pattern, (4, 24), slice(0, 4)).isnan()[1].sum() == 12
    assert multiply_native(torch.ones(1, 24), parts, pattern, (4, 24)).isnan().tolist() == [[False, True, False, False]]


@needs_library
def test_a_library_of_another_layout_is_left_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wider(module._Packed):
        _fields_ = (("more", ctypes.c_int64),)

    monkeypatch.setattr(module, "_Packed", Wider)
    assert "of another version" in str(why_not_native(NofM(2, 4), torch.float32))


def linear(dtype: torch.dtype = torch.float32) -> SparseLowRankLinear:
    made = SparseLowRankLinear(80, 24, parse_pattern("2:4"), 0, dtype=dtype)
    made.load_state_dict(packed("2:4", dtype, 24, 80))
    return made


def use_wrong_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.unpack_native
    monkeypatch.setattr(module, "unpack_native", lambda *arguments: right(*arguments).neg())


def use_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.multiply_native
    monkeypatch.setattr(module, "multiply_native", lambda *arguments: right(*arguments) * 1.01)


def use_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        pytest.param(use_wrong_bytes, "unpacked a small linear wrongly", marks=needs_library),
        pytest.param(use_wrong_product, "multiplied a small linear wrongly", marks=needs_library),
        (use_no_library, "was not built"),
    ],
)
def test_torch_unpacks_where_the_library_fails_and_the_reason_is_logged_once(
    break_it: object, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(break_it)
    break_it(monkeypatch)
    packed_linear, x = linear(), torch.randn(1, 80)
    with caplog.at_level(logging.WARNING, logger="streamslr"):
        y = packed_linear(x)
        packed_linear(x)
    S = unpack_rows(packed_linear.packed(), parse_pattern("2:4"), (24, 80), slice(0, 24))
    assert torch.allclose(y, x @ S.t(), rtol=1e-5, atol=1e-5)
    assert [record.getMessage().count(reason) for record in caplog.records] == [1]
    assert reason in packed_linear.kernel


@needs_library
def test_a_linear_says_that_the_library_multiplies() -> None:
    assert "by the C library" in linear().kernel


def test_float64_is_left_to_torch() -> None:
    x = torch.randn(1, 80, dtype=torch.float64)
    made = linear(torch.float64)
    assert made(x).dtype == torch.float64
    assert "torch.float64" in made.kernel
