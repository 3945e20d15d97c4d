"""Packing: exact round trips, the pinned bytes of each layout, merging, and damage that is never unpacked."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamslr.errors import InputError
from streamslr.io.packed_check import check_packed
from streamslr.io.packed_layout import packed_bytes
from streamslr.io.packing import merge, pack, unpack
from streamslr.spec.pattern import NofM, SparsityPattern, Unstructured, UnstructuredRows, parse_pattern
from tests.support.packed_linears import low_rank_linear, random_sparse

PATTERNS = ["2:4", "4:8", "1:4", "3:4", "2:3", "1:2", "2:16", "50%", "90%", "50%/row", "90%/row"]
GROUPS_PER_BYTE = {"2:4": 3, "1:4": 4, "3:4": 4, "2:3": 5, "1:2": 8, "2:16": 1}  # of the others a bitmask
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Row 0: two non-zeros, none, two. Row 1: one, one beside a -0.0, two. d/4 = 3 is odd.
TINY = torch.tensor(
    [
        [1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -3.0, 0.0, 4.0],
        [0.0, 0.0, 5.0, 0.0, 7.0, -0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.25],
    ]
)


@st.composite
def sparse_matrices(draw: st.DrawFn) -> tuple[SparsityPattern, Tensor, torch.dtype]:
    pattern = parse_pattern(draw(st.sampled_from(PATTERNS)))
    m = pattern.m if isinstance(pattern, NofM) else 1
    o, d = draw(st.integers(1, 20)), m * draw(st.integers(1, 9))
    d += 10 * isinstance(pattern, UnstructuredRows)  # of 90% one in ten must be left
    S = random_sparse(pattern, o, d, draw(st.integers(0, 2**32)), draw(st.sampled_from([0.0, 0.4, 1.0])))
    return pattern, S, draw(st.sampled_from(DTYPES))


def reference_pack(S: Tensor, pattern: SparsityPattern) -> tuple[list[list[float]], list[list[int]]]:
    """Pack S, float32 without -0.0, element by element as the documentation says."""
    d = S.shape[1]
    values, meta = [], []
    for row in S.tolist():
        kept = [value != 0 for value in row]
        if not isinstance(pattern, Unstructured):
            n, m = (pattern.n, pattern.m) if isinstance(pattern, NofM) else (round(d * pattern.density), d)
            for start in range(0, d, m):
                for j in range(start, start + m):
                    kept[j] = kept[j] or sum(kept[start : start + m]) < n
        values.append([value for value, keep in zip(row, kept, strict=True) if keep])
        row_meta = [0] * d
        per_byte = GROUPS_PER_BYTE.get(str(pattern))
        if per_byte and isinstance(pattern, NofM):
            base = math.comb(pattern.m, pattern.n)
            for group in range(d // pattern.m):
                places = [j for j in range(pattern.m) if kept[pattern.m * group + j]]
                digit = sum(math.comb(place, i) for i, place in enumerate(places, start=1))
                row_meta[group // per_byte] += digit * base ** (group % per_byte)
            meta.append(row_meta[: math.ceil(d / pattern.m / per_byte)])
        else:
            for j in range(d):
                row_meta[j // 8] |= kept[j] << j % 8
            meta.append(row_meta[: math.ceil(d / 8)])
    return values, meta


@settings(max_examples=120, deadline=None)
@given(sparse_matrices())
def test_round_trip_is_exact_and_sound(case: tuple[SparsityPattern, Tensor, torch.dtype]) -> None:
    pattern, S, dtype = case
    packed = pack(S, pattern, dtype)
    shape = S.shape[0], S.shape[1]
    assert torch.equal(unpack(packed, pattern, shape), S.to(dtype))
    assert unpack(packed, pattern, shape).dtype == dtype
    assert check_packed(packed, pattern, shape) == []
    assert not (packed["values"].signbit() & (packed["values"] == 0)).any(), "-0.0 was stored"


@settings(max_examples=60, deadline=None)
@given(sparse_matrices())
def test_bytes_follow_the_documented_layout(case: tuple[SparsityPattern, Tensor, torch.dtype]) -> None:
    pattern, S, _ = case
    S = S + 0.0
    packed = pack(S, pattern, torch.float32)
    values, meta = reference_pack(S, pattern)
    assert packed["meta"].tolist() == meta
    if not isinstance(pattern, Unstructured):
        assert packed["values"].tolist() == values
    else:
        assert packed["values"].tolist() == [value for row in values for value in row]
        assert packed["row_offsets"].tolist() == [sum(map(len, values[:i])) for i in range(len(values) + 1)]


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_size_is_what_the_layout_promises(text: str, dtype: torch.dtype) -> None:
    pattern = parse_pattern(text)
    o, d = 32, 240
    packed = pack(pattern.project(torch.randn(o, d)).float(), pattern, dtype)
    assert sum(tensor.nbytes for tensor in packed.values()) == packed_bytes(pattern, (o, d), 0, dtype.itemsize)


def test_2_4_in_bfloat16_takes_8_and_two_thirds_bits_a_weight() -> None:
    pattern = NofM(2, 4)
    packed = pack(random_sparse(pattern, 64, 240, 0), pattern, torch.bfloat16)
    assert 8 * sum(tensor.nbytes for tensor in packed.values()) == (8 + 2 / 3) * 64 * 240


def test_pinned_bytes_of_2_4() -> None:
    packed = pack(TINY, NofM(2, 4), torch.float32)
    assert set(packed) == {"values", "meta"}
    # Digits: 0 2 -> 1, 0 1 -> 0, 1 3 -> 4 and 0 2 -> 1, 0 1 -> 0, 2 3 -> 5; 1 + 6·0 + 36·4 and 1 + 6·0 + 36·5.
    assert packed["meta"].tolist() == [[145], [181]]
    assert packed["values"].tolist() == [[1, 2, 0, 0, -3, 4], [0, 5, 7, 0, 0.5, 0.25]]
    assert packed["values"].shape == (2, 6)
    bits = pack(TINY, NofM(2, 4), torch.bfloat16)["values"].view(torch.uint8).numpy().tobytes().hex(" ")
    assert bits == "80 3f 00 40 00 00 00 00 40 c0 80 40 00 00 a0 40 e0 40 00 00 00 3f 80 3e"


def test_pinned_bytes_of_other_n_m() -> None:
    packed = pack(TINY, NofM(3, 4), torch.float32)
    # 0 1 2 -> 0, 0 1 2 -> 0, 0 1 3 -> 1 and 0 1 2 -> 0, 0 1 2 -> 0, 0 2 3 -> 2, to the base 4.
    assert packed["meta"].tolist() == [[16], [32]]
    assert packed["values"].tolist() == [[1, 0, 2, 0, 0, 0, 0, -3, 4], [0, 0, 5, 7, 0, 0, 0, 0.5, 0.25]]


def test_pinned_bytes_of_n_m_where_a_bitmask_is_as_small() -> None:
    packed = pack(TINY, NofM(6, 12), torch.float32)
    # Columns 0 1 2 3 9 11 and 0 1 2 4 10 11, lowest bit first.
    assert packed["meta"].numpy().tobytes().hex(" ") == "0f 0a 17 0c"
    assert packed["values"].tolist() == [[1, 0, 2, 0, -3, 4], [0, 0, 5, 7, 0.5, 0.25]]


def test_pinned_bytes_of_unstructured() -> None:
    packed = pack(TINY, Unstructured(0.5), torch.float32)
    assert packed["meta"].numpy().tobytes().hex(" ") == "05 0a 14 0c"
    assert packed["values"].tolist() == [1, 2, -3, 4, 5, 7, 0.5, 0.25]
    assert packed["row_offsets"].tolist() == [0, 4, 8]
    assert packed["row_offsets"].dtype == torch.int64


def test_pinned_bytes_of_unstructured_rows() -> None:
    packed = pack(TINY, UnstructuredRows(0.5), torch.float32)
    assert set(packed) == {"values", "meta"}
    # Six of each row: columns 0 to 3, 9, 11 and 0 to 2, 4, 10, 11.
    assert packed["meta"].numpy().tobytes().hex(" ") == "0f 0a 17 0c"
    assert packed["values"].tolist() == [[1, 0, 2, 0, -3, 4], [0, 0, 5, 7, 0.5, 0.25]]


def test_rows_beyond_one_chunk_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamslr.io.packing._CHUNK", 1)  # 16 rows at a time
    for text in PATTERNS:
        pattern = parse_pattern(text)
        S = random_sparse(pattern, 70, 48, 3)
        packed = pack(S, pattern, torch.float32)
        assert torch.equal(unpack(packed, pattern, (70, 48)), S.to(torch.float32))
        assert check_packed(packed, pattern, (70, 48)) == []


def test_column_major_input_packs_alike() -> None:
    S = random_sparse(NofM(2, 4), 24, 32, 5)
    turned = S.T.contiguous().T
    for name, tensor in pack(S, NofM(2, 4), torch.bfloat16).items():
        assert torch.equal(pack(turned, NofM(2, 4), torch.bfloat16)[name], tensor)


def test_a_broken_pattern_is_a_programming_error_that_names_the_group() -> None:
    S = random_sparse(NofM(2, 4), 8, 16, 0)
    S[5, 8:12] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    with pytest.raises(ValueError, match=r"row 5, group 2 \(columns 8 to 11\) has 3 non-zeros"):
        pack(S, NofM(2, 4), torch.float32)
    with pytest.raises(ValueError, match="128 non-zeros, 64 allowed"):
        pack(torch.ones(8, 16), Unstructured(0.5), torch.float32)
    with pytest.raises(ValueError, match=r"row 0, group 0 \(columns 0 to 15\) has 16 non-zeros"):
        pack(torch.ones(8, 16), UnstructuredRows(0.5), torch.float32)
    with pytest.raises(ValueError, match="multiple of 4"):
        pack(torch.zeros(8, 18), NofM(2, 4), torch.float32)


def test_values_that_cannot_be_stored_are_named() -> None:
    S = torch.zeros(4, 8)
    S[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"S\[2, 3\] is nan"):
        pack(S, NofM(2, 4), torch.float16)
    S[2, 3] = -1e6
    with pytest.raises(InputError, match=r"S\[2, 3\] = -1e\+06 does not fit torch.float16"):
        pack(S, NofM(2, 4), torch.float16)
    assert pack(S, NofM(2, 4), torch.bfloat16)["values"].isfinite().all()


# Merge


@pytest.mark.parametrize("text", ["2:4", "1:4", "50%"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_is_s_plus_uv(text: str, dtype: torch.dtype) -> None:
    pattern = parse_pattern(text)
    tensors = low_rank_linear(pattern, 40, 48, 5, dtype)
    exact = unpack(tensors, pattern, (40, 48)).double() + tensors["U"].double() @ tensors["V"].double()
    merged = merge(tensors, pattern, (40, 48), torch.float32)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(merge(tensors, pattern, (40, 48), dtype), merged.to(dtype))


def test_merge_without_low_rank_is_unpack() -> None:
    packed = pack(random_sparse(NofM(2, 4), 16, 32, 1), NofM(2, 4), torch.bfloat16)
    unpacked = unpack(packed, NofM(2, 4), (16, 32))
    assert torch.equal(merge(packed, NofM(2, 4), (16, 32), torch.bfloat16), unpacked)


def test_merge_gives_the_same_bits_whatever_the_process_is_set_to() -> None:
    tensors = low_rank_linear(NofM(2, 4), 96, 128, 32, torch.bfloat16)
    expected = merge(tensors, NofM(2, 4), (96, 128), torch.float32)
    factors = (tensors[name].double() for name in "UV")
    exact = unpack(tensors, NofM(2, 4), (96, 128)).double() + torch.matmul(*factors)
    assert torch.equal(expected, exact.float())
    # Mapped from a file, tensors sit at odd multiples of their element size.
    moved = {
        name: torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)
        for name, tensor in tensors.items()
    }
    assert torch.equal(merge(moved, NofM(2, 4), (96, 128), torch.float32), expected)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(merge(tensors, NofM(2, 4), (96, 128), torch.float32), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def test_merge_refuses_tensors_that_do_not_fit() -> None:
    tensors = low_rank_linear(NofM(2, 4), 16, 32, 4, torch.float32)
    with pytest.raises(InputError, match=r"U \[16, 4\] and V \[4, 31\]"):
        merge(tensors | {"V": tensors["V"][:, 1:]}, NofM(2, 4), (16, 32), torch.float32)
    with pytest.raises(InputError, match="a 50% linear needs one dimension"):
        merge(tensors, Unstructured(0.5), (16, 32), torch.float32)
    with pytest.raises(InputError, match=r"values has shape \[16, 16\]"):
        unpack(tensors, NofM(2, 4), (16, 64))
