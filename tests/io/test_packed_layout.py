"""The packed layout as config.json and the headers of shards say it."""

import json

import pytest
from transformers import LlamaConfig

from streamslr.errors import InputError
from streamslr.io.shards import (
    FORMAT_VERSION,
    index_json,
    packed_linears,
    quantization_config,
    read_quantization_config,
    shard_metadata,
)
from streamslr.spec.pattern import NofM, Unstructured, UnstructuredRows


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
