"""Shards and JSON files: pinned bytes, readable by safetensors, whole or not there at all."""

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig

from streamslr.errors import InputError
from streamslr.io.durable import file_sha256
from streamslr.io.packing import pack
from streamslr.io.shards import (
    DTYPE_NAMES,
    FORMAT_VERSION,
    index_json,
    packed_linears,
    quantization_config,
    read_quantization_config,
    shard_metadata,
    write_shard,
)
from streamslr.spec.pattern import NofM, Unstructured, UnstructuredRows

S = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 0], [0, 0, 5, 0, 7, 0, 0, 0]])


def tiny_block():
    """A block of one linear, 2:4 plus rank 1, and a norm."""
    packed = pack(S, NofM(2, 4), torch.bfloat16)
    return {
        "layers.0.q_proj.meta": packed["meta"],
        "layers.0.q_proj.values": packed["values"],
        "layers.0.q_proj.U": torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16),
        "layers.0.q_proj.V": torch.ones(1, 8, dtype=torch.bfloat16),
        "layers.0.norm.weight": torch.tensor([0.5, 1.5]),
    }


METADATA = shard_metadata({"layers.0.q_proj": (NofM(2, 4), (2, 8))})


def test_the_bytes_of_a_whole_shard_are_pinned(tmp_path):
    written = write_shard(tmp_path / "block.safetensors", tiny_block(), METADATA)
    content = (tmp_path / "block.safetensors").read_bytes()
    header = (
        b'{"__metadata__":{"format":"pt","layers.0.q_proj":"2:4 2x8"},'
        b'"layers.0.norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"layers.0.q_proj.U":{"dtype":"BF16","shape":[2,1],"data_offsets":[8,12]},'
        b'"layers.0.q_proj.V":{"dtype":"BF16","shape":[1,8],"data_offsets":[12,28]},'
        b'"layers.0.q_proj.values":{"dtype":"BF16","shape":[2,4],"data_offsets":[28,44]},'
        b'"layers.0.q_proj.meta":{"dtype":"U8","shape":[2,1],"data_offsets":[44,46]}}'
    )
    header += b" " * (-len(header) % 8)
    data = bytes.fromhex(
        "0000003f 0000c03f"  # norm: 0.5, 1.5
        "803f 80bf"  # U: 1, -1
        "803f803f803f803f803f803f803f803f"  # V: ones
        "803f 0040 0000 0000  0000 a040 e040 0000"  # values: 1 2 0 0, 0 5 7 0
        "01 01"  # meta: columns 0 2 and 0 1 of each row, 1 + 6·0
    )
    assert content == len(header).to_bytes(8, "little") + header + data
    assert written.file == "block.safetensors" and written.nbytes == len(content)
    assert written.sha256 == "a803906b359d8d9082bdf5c4dd8879bb3c1c3170240ace21c87a6af19cdf9e2f"
    assert hashlib.sha256(content).hexdigest() == written.sha256 == file_sha256(tmp_path / written.file)


def test_safetensors_reads_it_back(tmp_path):
    path = tmp_path / "block.safetensors"
    tensors = tiny_block() | {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "naïve": torch.tensor([True, False, True]),
        "turned": torch.arange(6.0).view(2, 3).T,
        "offsets": torch.arange(3),
    }
    write_shard(path, tensors, METADATA)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    with safe_open(path, "pt") as file:
        assert packed_linears(file.metadata()) == {"layers.0.q_proj": (NofM(2, 4), (2, 8))}


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable()),
        st.tuples(st.sampled_from(list(DTYPE_NAMES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    st.randoms(),
)
def test_bytes_depend_on_content_not_on_order(tmp_path_factory, declared, random):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {
        name: torch.full(shape, 1).to(dtype) if shape else torch.tensor(1).to(dtype)
        for name, (dtype, shape) in declared.items()
    }
    shuffled = list(tensors.items())
    random.shuffle(shuffled)
    one = write_shard(folder / "one.safetensors", tensors, {"format": "pt", "a": "1", "b": "2"})
    sources = [(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in shuffled]
    two = write_shard(folder / "two.safetensors", sources, {"b": "2", "a": "1", "format": "pt"})
    assert one.sha256 == two.sha256 and one.nbytes == (folder / "one.safetensors").stat().st_size
    loaded = load_file(folder / "two.safetensors")
    assert {name: (t.dtype, list(t.shape)) for name, t in loaded.items()} == {
        name: (dtype, list(shape)) for name, (dtype, shape) in declared.items()
    }


def test_tensors_are_fetched_one_at_a_time(tmp_path):
    """The next tensor is asked for when the one before is in the file, so never two are needed."""
    path = tmp_path / "lazy.safetensors"
    sizes = []

    def fetch():
        sizes.append((tmp_path / "lazy.safetensors.partial").stat().st_size)
        return torch.ones(1000)

    written = write_shard(path, [(name, torch.float32, (1000,), fetch) for name in "abc"], {})
    start = written.nbytes - 3 * 4000
    assert sizes == [start, start + 4000, start + 8000]


def test_a_source_that_is_not_as_declared_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a was declared torch.float32 \[2\], but is torch.float32 \[3\]"):
        write_shard(tmp_path / "x", [("a", torch.float32, (2,), lambda: torch.ones(3))], {})
    with pytest.raises(ValueError, match="unique"):
        write_shard(tmp_path / "x", [("a", torch.float32, (1,), lambda: torch.ones(1))] * 2, {})
    with pytest.raises(InputError, match=r"c: a shard cannot hold torch.complex64"):
        write_shard(tmp_path / "x", {"c": torch.ones(1, dtype=torch.complex64)}, {})
    assert list(tmp_path.iterdir()) == []


# What config.json says


def test_index_is_as_transformers_reads_it():
    index = index_json({"b": "model-block-00001.safetensors", "a": "model-outside.safetensors"}, 12)
    assert json.dumps(index) == (
        '{"metadata": {"total_size": 12}, '
        '"weight_map": {"a": "model-outside.safetensors", "b": "model-block-00001.safetensors"}}'
    )


@pytest.mark.parametrize(
    "pattern", [NofM(2, 4), NofM(1, 4), Unstructured(0.5), Unstructured(0.625), UnstructuredRows(0.5)]
)
def test_quantization_config_comes_back(pattern):
    entry = quantization_config(pattern, 64)
    assert entry.keys() == {"quant_method", "format_version", "pattern", "rank"}
    for config in ({"quantization_config": entry}, LlamaConfig(quantization_config=entry)):
        read = read_quantization_config(json.loads(json.dumps(config)) if type(config) is dict else config)
        assert (read.pattern, read.rank, read.format_version) == (pattern, 64, FORMAT_VERSION)


def test_other_models_have_no_packed_format():
    assert read_quantization_config({}) is None
    assert read_quantization_config(LlamaConfig()) is None
    assert read_quantization_config({"quantization_config": {"quant_method": "gptq"}}) is None


def test_a_folder_of_the_version_before_is_read():
    entry = quantization_config(NofM(2, 4), 64) | {"format_version": 2}
    read = read_quantization_config({"quantization_config": entry})
    assert (read.pattern, read.rank, read.format_version) == (NofM(2, 4), 64, 2)


def test_an_unknown_format_version_is_refused():
    entry = quantization_config(NofM(2, 4), 64)
    with pytest.raises(
        InputError, match="format_version 1, this version reads 2 and 3: use the streamslr that wrote it"
    ):
        read_quantization_config({"quantization_config": entry | {"format_version": 1}})
    with pytest.raises(InputError, match="format_version None"):
        read_quantization_config({"quantization_config": {"quant_method": "streamslr"}})
    with pytest.raises(InputError, match="damaged: pattern '2:4', rank -1"):
        read_quantization_config({"quantization_config": entry | {"rank": -1}})


def test_metadata_of_a_shard_names_its_linears():
    linears = {"a.q": (NofM(2, 4), (16, 32)), "a.k": (UnstructuredRows(0.5), (8, 32))}
    metadata = shard_metadata(linears)
    assert metadata == {"format": "pt", "a.q": "2:4 16x32", "a.k": "50%/row 8x32"}
    assert packed_linears(metadata) == linears
    assert packed_linears(None) == {}
    with pytest.raises(InputError, match=r"says '2:4' of a\.q"):
        packed_linears({"a.q": "2:4"})
