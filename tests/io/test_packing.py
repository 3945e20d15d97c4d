"""Packing: exact round trips, the pinned bytes of each layout, and damage that is found and named."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamslr.errors import InputError
from streamslr.io.packed_check import check_packed
from streamslr.io.packed_layout import packed_bytes
from streamslr.io.packing import merge, pack, unpack
from streamslr.spec.pattern import NofM, Unstructured, UnstructuredRows, parse_pattern

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


def random_sparse(pattern, o, d, seed, zeros=0.3):
    """A matrix in the pattern whose kept slots hold zeros, negative zeros and values that underflow, too."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(o, d, generator=generator)
    draw = torch.rand(o, d, generator=generator)
    S = torch.where(draw < zeros, torch.where(draw < zeros / 2, -0.0, 1e-43), W)
    S = torch.where(pattern.project(W), S, 0.0)
    S[torch.rand(o, generator=generator) < 0.2] = 0.0  # whole rows
    return S


@st.composite
def sparse_matrices(draw):
    pattern = parse_pattern(draw(st.sampled_from(PATTERNS)))
    m = pattern.m if isinstance(pattern, NofM) else 1
    o, d = draw(st.integers(1, 20)), m * draw(st.integers(1, 9))
    d += 10 * isinstance(pattern, UnstructuredRows)  # of 90% one in ten must be left
    S = random_sparse(pattern, o, d, draw(st.integers(0, 2**32)), draw(st.sampled_from([0.0, 0.4, 1.0])))
    return pattern, S, draw(st.sampled_from(DTYPES))


def reference_pack(S, pattern):
    """The layouts as the documentation words them, an element at a time; S float32 without -0.0."""
    d = S.shape[1]
    values, meta = [], []
    for row in S.tolist():
        kept = [value != 0 for value in row]
        if not isinstance(pattern, Unstructured):
            rows = isinstance(pattern, UnstructuredRows)
            n, m = (round(d * pattern.density), d) if rows else (pattern.n, pattern.m)
            for start in range(0, d, m):
                for j in range(start, start + m):
                    kept[j] = kept[j] or sum(kept[start : start + m]) < n
        values.append([value for value, keep in zip(row, kept, strict=True) if keep])
        row_meta = [0] * d
        if per_byte := GROUPS_PER_BYTE.get(str(pattern)):
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
def test_round_trip_is_exact_and_sound(case):
    pattern, S, dtype = case
    packed = pack(S, pattern, dtype)
    assert torch.equal(unpack(packed, pattern, tuple(S.shape)), S.to(dtype))
    assert unpack(packed, pattern, tuple(S.shape)).dtype == dtype
    assert check_packed(packed, pattern, tuple(S.shape)) == []
    assert not (packed["values"].signbit() & (packed["values"] == 0)).any(), "-0.0 was stored"


@settings(max_examples=60, deadline=None)
@given(sparse_matrices())
def test_bytes_follow_the_documented_layout(case):
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


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_size_is_what_the_layout_promises(pattern, dtype):
    pattern = parse_pattern(pattern)
    o, d = 32, 240
    packed = pack(pattern.project(torch.randn(o, d)).float(), pattern, dtype)
    assert sum(tensor.nbytes for tensor in packed.values()) == packed_bytes(pattern, (o, d), 0, dtype.itemsize)


def test_2_4_in_bfloat16_takes_8_and_two_thirds_bits_a_weight():
    pattern = NofM(2, 4)
    packed = pack(random_sparse(pattern, 64, 240, 0), pattern, torch.bfloat16)
    assert 8 * sum(tensor.nbytes for tensor in packed.values()) == (8 + 2 / 3) * 64 * 240


def test_pinned_bytes_of_2_4():
    packed = pack(TINY, NofM(2, 4), torch.float32)
    assert set(packed) == {"values", "meta"}
    # Digits: 0 2 -> 1, 0 1 -> 0, 1 3 -> 4 and 0 2 -> 1, 0 1 -> 0, 2 3 -> 5; 1 + 6·0 + 36·4 and 1 + 6·0 + 36·5.
    assert packed["meta"].tolist() == [[145], [181]]
    assert packed["values"].tolist() == [[1, 2, 0, 0, -3, 4], [0, 5, 7, 0, 0.5, 0.25]]
    assert packed["values"].shape == (2, 6)
    bits = pack(TINY, NofM(2, 4), torch.bfloat16)["values"].view(torch.uint8).numpy().tobytes().hex(" ")
    assert bits == "80 3f 00 40 00 00 00 00 40 c0 80 40 00 00 a0 40 e0 40 00 00 00 3f 80 3e"


def test_pinned_bytes_of_other_n_m():
    packed = pack(TINY, NofM(3, 4), torch.float32)
    # 0 1 2 -> 0, 0 1 2 -> 0, 0 1 3 -> 1 and 0 1 2 -> 0, 0 1 2 -> 0, 0 2 3 -> 2, to the base 4.
    assert packed["meta"].tolist() == [[16], [32]]
    assert packed["values"].tolist() == [[1, 0, 2, 0, 0, 0, 0, -3, 4], [0, 0, 5, 7, 0, 0, 0, 0.5, 0.25]]


def test_pinned_bytes_of_n_m_where_a_bitmask_is_as_small():
    packed = pack(TINY, NofM(6, 12), torch.float32)
    # Columns 0 1 2 3 9 11 and 0 1 2 4 10 11, lowest bit first.
    assert packed["meta"].numpy().tobytes().hex(" ") == "0f 0a 17 0c"
    assert packed["values"].tolist() == [[1, 0, 2, 0, -3, 4], [0, 0, 5, 7, 0.5, 0.25]]


def test_pinned_bytes_of_unstructured():
    packed = pack(TINY, Unstructured(0.5), torch.float32)
    assert packed["meta"].numpy().tobytes().hex(" ") == "05 0a 14 0c"
    assert packed["values"].tolist() == [1, 2, -3, 4, 5, 7, 0.5, 0.25]
    assert packed["row_offsets"].tolist() == [0, 4, 8]
    assert packed["row_offsets"].dtype == torch.int64


def test_pinned_bytes_of_unstructured_rows():
    packed = pack(TINY, UnstructuredRows(0.5), torch.float32)
    assert set(packed) == {"values", "meta"}
    # Six of each row: columns 0 to 3, 9, 11 and 0 to 2, 4, 10, 11.
    assert packed["meta"].numpy().tobytes().hex(" ") == "0f 0a 17 0c"
    assert packed["values"].tolist() == [[1, 0, 2, 0, -3, 4], [0, 0, 5, 7, 0.5, 0.25]]


def test_rows_beyond_one_chunk_round_trip(monkeypatch):
    monkeypatch.setattr("streamslr.io.packing._CHUNK", 1)  # 16 rows at a time
    for text in PATTERNS:
        pattern = parse_pattern(text)
        S = random_sparse(pattern, 70, 48, 3)
        packed = pack(S, pattern, torch.float32)
        assert torch.equal(unpack(packed, pattern, (70, 48)), S.to(torch.float32))
        assert check_packed(packed, pattern, (70, 48)) == []


def test_column_major_input_packs_alike():
    S = random_sparse(NofM(2, 4), 24, 32, 5)
    turned = S.T.contiguous().T
    for name, tensor in pack(S, NofM(2, 4), torch.bfloat16).items():
        assert torch.equal(pack(turned, NofM(2, 4), torch.bfloat16)[name], tensor)


def test_a_broken_pattern_is_a_programming_error_that_names_the_group():
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


def test_values_that_cannot_be_stored_are_named():
    S = torch.zeros(4, 8)
    S[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"S\[2, 3\] is nan"):
        pack(S, NofM(2, 4), torch.float16)
    S[2, 3] = -1e6
    with pytest.raises(InputError, match=r"S\[2, 3\] = -1e\+06 does not fit torch.float16"):
        pack(S, NofM(2, 4), torch.float16)
    assert pack(S, NofM(2, 4), torch.bfloat16)["values"].isfinite().all()


# Merge


def low_rank_linear(pattern, o, d, r, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    packed = pack(random_sparse(pattern, o, d, seed), pattern, dtype)
    U = torch.randn(o, r, generator=generator).to(dtype)
    V = torch.randn(r, d, generator=generator).to(dtype)
    return packed | {"U": U, "V": V}


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "50%"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_is_s_plus_uv(pattern, dtype):
    pattern = parse_pattern(pattern)
    tensors = low_rank_linear(pattern, 40, 48, 5, dtype)
    exact = unpack(tensors, pattern, (40, 48)).double() + tensors["U"].double() @ tensors["V"].double()
    merged = merge(tensors, pattern, (40, 48), torch.float32)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(merge(tensors, pattern, (40, 48), dtype), merged.to(dtype))


def test_merge_without_low_rank_is_unpack():
    packed = pack(random_sparse(NofM(2, 4), 16, 32, 1), NofM(2, 4), torch.bfloat16)
    unpacked = unpack(packed, NofM(2, 4), (16, 32))
    assert torch.equal(merge(packed, NofM(2, 4), (16, 32), torch.bfloat16), unpacked)


def test_merge_gives_the_same_bits_whatever_the_process_is_set_to():
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


def test_merge_refuses_tensors_that_do_not_fit():
    tensors = low_rank_linear(NofM(2, 4), 16, 32, 4, torch.float32)
    with pytest.raises(InputError, match=r"U \[16, 4\] and V \[4, 31\]"):
        merge(tensors | {"V": tensors["V"][:, 1:]}, NofM(2, 4), (16, 32), torch.float32)
    with pytest.raises(InputError, match="a 50% linear needs one dimension"):
        merge(tensors, Unstructured(0.5), (16, 32), torch.float32)
    with pytest.raises(InputError, match=r"values has shape \[16, 16\]"):
        unpack(tensors, NofM(2, 4), (16, 64))


# Damage


def damaged(pattern, **changes):
    """What check_packed says, and that unpack never answers with a wrong matrix, after `changes`."""
    tensors = low_rank_linear(pattern, 20, 20, 3, torch.float32)
    assert check_packed(tensors, pattern, (20, 20)) == []
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, change in changes.items():
        tensors[name] = change(tensors[name]) if name in tensors else change(None)
    return tensors, check_packed({k: t for k, t in tensors.items() if t is not None}, pattern, (20, 20))


def setting(*index, to):
    def change(tensor):
        tensor[index] = to
        return tensor

    return change


@pytest.mark.parametrize(
    ("pattern", "changes", "sentence"),
    [
        (
            "2:4",
            {"meta": setting(7, 0, to=216)},
            "row 7, group 0 keeps 0 of 4 columns, not 2",
        ),
        ("10:20", {"meta": setting(3, 1, to=0xFF)}, "row 3, group 0 keeps"),
        ("10:20", {"meta": setting(3, to=1)}, "row 3, group 0 keeps 3 of 20 columns, not 10"),
        ("50%/row", {"meta": setting(3, 1, to=0)}, "row 3, group 0 keeps"),
        ("50%/row", {"values": lambda values: values.flatten()}, "a 20x20 50%/row linear needs [20, 10]"),
        ("50%", {"meta": setting(0, 0, to=0)}, "row_offsets gives row 0"),
        ("50%", {"row_offsets": setting(4, to=999)}, "row_offsets gives row 3"),
        ("50%", {"values": lambda values: values[:-1]}, "entries, but meta keeps"),
        ("50%", {"values": lambda values: values[None]}, "a 50% linear needs one dimension"),
        (
            "2:4",
            {"meta": lambda meta: meta[:, :1]},
            "meta has shape [20, 1], a 20x20 2:4 linear needs [20, 2]",
        ),
        ("2:4", {"meta": lambda meta: meta.short()}, "meta is torch.int16, not torch.uint8"),
        ("2:4", {"values": lambda values: values[:-1]}, "values has shape [19, 10]"),
        ("2:4", {"values": lambda values: values.int()}, "values is torch.int32, not a floating-point type"),
        ("2:4", {"values": lambda values: None}, "values is missing"),
    ],
)
def test_damage_is_named_and_never_unpacked(pattern, changes, sentence):
    tensors, wrongs = damaged(parse_pattern(pattern), **changes)
    assert any(sentence in wrong for wrong in wrongs), wrongs
    with pytest.raises(InputError):
        unpack({k: t for k, t in tensors.items() if t is not None}, parse_pattern(pattern), (20, 20))


@pytest.mark.parametrize(
    ("pattern", "changes", "sentence"),
    [
        ("2:4", {"meta": setting(9, 1, to=36)}, "describes more than 20 columns in row 9 (1 of 20 rows)"),
        ("1:4", {"meta": setting(9, 1, to=4)}, "describes more than 20 columns in row 9 (1 of 20 rows)"),
        ("50%", {"meta": setting(9, 2, to=0x81)}, "describes more than 20 columns in row 9 (1 of 20 rows)"),
        ("2:4", {"values": setting(1, 2, to=float("inf"))}, "values[1, 2] is inf: 1 of 200 values"),
        ("2:4", {"U": setting(4, 1, to=float("nan"))}, "U[4, 1] is nan"),
        ("2:4", {"V": lambda V: None}, "U is there without V"),
        ("2:4", {"U": lambda U: U[:, :2]}, "U [20, 2] and V [3, 20] are not the [20, r] and [r, 20]"),
        ("2:4", {"V": lambda V: V.half()}, "V is torch.float16, but values are torch.float32"),
        ("2:4", {"row_offsets": lambda _: torch.zeros(21)}, "row_offsets does not belong to a 2:4 linear"),
    ],
)
def test_other_damage_is_named(pattern, changes, sentence):
    _, wrongs = damaged(parse_pattern(pattern), **changes)
    assert any(sentence in wrong for wrong in wrongs), wrongs


def test_too_dense_is_named():
    packed = pack(torch.ones(20, 20), Unstructured(1e-9), torch.float32)
    wrongs = check_packed(packed, Unstructured(0.5), (20, 20))
    assert wrongs == ["meta keeps 400 of 400 columns, 50% allows 200"]
    assert check_packed(packed, NofM(2, 4), (20, 18)) == ["2:4 needs rows of a multiple of 4 columns, not 20x18"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["2:4", "1:4", "2:3", "4:6", "50%", "50%/row"]), st.integers(0, 10**6), st.integers(0, 255))
def test_any_changed_meta_byte_is_found_or_harmless(pattern, where, byte):
    """A changed byte either is reported, or describes another matrix of the same pattern."""
    pattern = parse_pattern(pattern)
    packed = pack(random_sparse(pattern, 6, 12, 1), pattern, torch.float32)
    packed["meta"].view(-1)[where % packed["meta"].numel()] = byte
    if check_packed(packed, pattern, (6, 12)) == []:
        S = unpack(packed, pattern, (6, 12))
        assert pattern.check(S != 0) is None
        assert sorted(S[S != 0].tolist()) == sorted(packed["values"][packed["values"] != 0].tolist())
