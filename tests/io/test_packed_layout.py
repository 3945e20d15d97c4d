"""The layout of a packed linear: shapes and bytes of its parts, and what config.json and headers say of it."""

import json

import pytest
import torch
from transformers import LlamaConfig

from streamslr.errors import InputError
from streamslr.io.packed_layout import (
    FORMAT_VERSION,
    PACKED_PARTS,
    Linears,
    MetaCode,
    PackedFormat,
    linears_among,
    low_rank_bytes,
    max_values,
    meta_code,
    packed_bytes,
    packed_linears,
    part_dtype,
    part_name,
    part_shapes,
    quantization_config,
    read_quantization_config,
    shard_metadata,
    stored_parts,
)
from streamslr.io.packing import pack
from streamslr.spec.pattern import NofM, SparsityPattern, Unstructured, UnstructuredRows, parse_pattern

# Parts


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "5:32", "50%", "12.5%", "50%/row", "30%/row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_dtypes_and_bytes_are_those_of_what_is_packed(text: str, dtype: torch.dtype) -> None:
    pattern, (o, d) = parse_pattern(text), (6, 160)
    W = torch.randn(o, d)
    parts = pack(W * pattern.project(W), pattern, dtype) | {
        "U": torch.zeros(o, 3, dtype=dtype),
        "V": torch.zeros(3, d, dtype=dtype),
    }
    shapes = part_shapes(pattern, (o, d), rank=3)
    assert {part: tuple(tensor.shape) for part, tensor in parts.items()} == shapes
    assert {part: tensor.dtype for part, tensor in parts.items()} == {part: part_dtype(part, dtype) for part in shapes}
    assert [part for part in PACKED_PARTS if part in shapes] == list(shapes)
    assert sum(tensor.nbytes for tensor in parts.values()) == packed_bytes(pattern, (o, d), 3, dtype.itemsize)
    assert parts["U"].nbytes + parts["V"].nbytes == low_rank_bytes((o, d), 3, dtype.itemsize)
    assert parts["values"].numel() == max_values(pattern, (o, d))
    fewer = part_shapes(pattern, (o, d), rank=3, num_values=7)
    assert fewer == (shapes | {"values": (7,)} if "row_offsets" in shapes else shapes)


@pytest.mark.parametrize(
    ("pattern", "bits"),
    [
        (NofM(2, 4), 64 * (96 * 16 + 16 * 8)),  # of a row, 96 values and a byte for 12 columns
        (NofM(1, 4), 64 * (48 * 16 + 12 * 8)),  # 16 columns
        (NofM(4, 8), 64 * (96 * 16 + 24 * 8)),  # 8 columns
        (Unstructured(0.5), 64 * (96 * 16 + 24 * 8) + 65 * 64),
        (UnstructuredRows(0.5), 64 * (96 * 16 + 24 * 8)),
    ],
)
def test_packed_bytes(pattern: SparsityPattern, bits: int) -> None:
    assert 8 * packed_bytes(pattern, (64, 192), 0, 2) == bits
    assert 8 * packed_bytes(pattern, (64, 192), 5, 2) == bits + 5 * (64 + 192) * 16


def test_packed_bytes_round_a_row_of_metadata_up_to_bytes() -> None:
    assert packed_bytes(NofM(2, 4), (3, 16), 0, 2) == 3 * (8 * 2 + 2)


def test_a_byte_of_metadata_holds_digits_where_they_take_less_than_a_bitmask() -> None:
    bitmask = MetaCode(None, base=2, count=8, columns=1)
    assert meta_code(NofM(2, 4)) == MetaCode(NofM(2, 4), base=6, count=3, columns=4)
    assert meta_code(NofM(1, 256)) == MetaCode(NofM(1, 256), base=256, count=1, columns=256)
    for pattern in (NofM(4, 8), NofM(1, 257), NofM(5 * 10**8, 10**9), Unstructured(0.5), UnstructuredRows(0.5)):
        assert meta_code(pattern) == bitmask  # also where C(m, n) could never be computed


def test_parts_are_found_among_stored_names() -> None:
    names = ["a.q.values", "a.q.meta", "a.q.bias", "a.q.V", "a.norm.weight", "b.meta"]
    assert stored_parts("a.q", names) == {"values": "a.q.values", "meta": "a.q.meta", "V": "a.q.V"}
    assert stored_parts("a.k", names) == {}
    assert linears_among(names) == ["a.q", "b"]
    assert part_name("a.q", "U") == "a.q.U"


# What headers and config.json say


@pytest.mark.parametrize(
    "pattern", [NofM(2, 4), NofM(1, 4), Unstructured(0.5), Unstructured(0.625), UnstructuredRows(0.5)]
)
def test_quantization_config_comes_back(pattern: SparsityPattern) -> None:
    entry = quantization_config(pattern, 64)
    assert entry.keys() == {"quant_method", "format_version", "pattern", "rank"}
    stored = json.loads(json.dumps({"quantization_config": entry}))
    for config in (stored, LlamaConfig.from_dict(stored)):
        assert read_quantization_config(config) == PackedFormat(pattern, 64, FORMAT_VERSION)


def test_other_models_have_no_packed_format() -> None:
    assert read_quantization_config({}) is None
    assert read_quantization_config(LlamaConfig()) is None
    assert read_quantization_config({"quantization_config": {"quant_method": "gptq"}}) is None


def test_a_folder_of_the_version_before_is_read() -> None:
    entry = quantization_config(NofM(2, 4), 64) | {"format_version": 2}
    assert read_quantization_config({"quantization_config": entry}) == PackedFormat(NofM(2, 4), 64, 2)


def test_an_unknown_format_version_is_refused() -> None:
    entry = quantization_config(NofM(2, 4), 64)
    with pytest.raises(
        InputError, match="format_version 1, this version reads 2 to 4: use the streamslr that wrote it"
    ):
        read_quantization_config({"quantization_config": entry | {"format_version": 1}})
    with pytest.raises(InputError, match="format_version None"):
        read_quantization_config({"quantization_config": {"quant_method": "streamslr"}})
    with pytest.raises(InputError, match="damaged: pattern '2:4', rank -1"):
        read_quantization_config({"quantization_config": entry | {"rank": -1}})


def test_metadata_of_a_shard_names_its_linears() -> None:
    linears: Linears = {"a.q": (NofM(2, 4), (16, 32)), "a.k": (UnstructuredRows(0.5), (8, 32))}
    metadata = shard_metadata(linears)
    assert metadata == {"format": "pt", "a.q": "2:4 16x32", "a.k": "50%/row 8x32"}
    assert packed_linears(metadata) == linears
    assert packed_linears(None) == {}
    with pytest.raises(InputError, match=r"says '2:4' of a\.q"):
        packed_linears({"a.q": "2:4"})
