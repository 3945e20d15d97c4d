"""The compressed folder: its index, its texts, what a killed process leaves in it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streamslr.errors import InputError, StreamslrError
from streamslr.io.durable import file_sha256
from streamslr.io.folder import (
    copy_auxiliary_file,
    discard_uncommitted,
    index_json,
    require_as_written,
    write_auxiliary_files,
    write_block,
    write_index,
)
from streamslr.io.packed_layout import packed_linears, quantization_config
from streamslr.io.packing import pack
from streamslr.io.safetensors_file import shard_header
from streamslr.spec.pattern import NofM


def test_index_is_as_transformers_reads_it() -> None:
    index = index_json({"b": "model-block-00001.safetensors", "a": "model-outside.safetensors"}, 12)
    assert json.dumps(index) == (
        '{"metadata": {"total_size": 12}, '
        '"weight_map": {"a": "model-outside.safetensors", "b": "model-block-00001.safetensors"}}'
    )


def test_a_block_and_its_index_hold_what_was_given(tmp_path: Path) -> None:
    W = torch.randn(4, 8)
    pattern = NofM(2, 4)
    parts = pack(W * pattern.project(W), pattern, torch.bfloat16)
    norm = torch.ones(8)
    shard = write_block(tmp_path, 3, {"layers.3.q": (parts, pattern, (4, 8))}, {"layers.3.norm.weight": norm})
    assert shard.file == "model-block-00003.safetensors"
    stored = load_file(tmp_path / shard.file)
    assert stored.keys() == {"layers.3.q.values", "layers.3.q.meta", "layers.3.norm.weight"}
    assert torch.equal(stored["layers.3.q.meta"], parts["meta"])
    assert packed_linears(shard_header(tmp_path / shard.file).metadata) == {"layers.3.q": (pattern, (4, 8))}
    write_index(tmp_path, [shard])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(stored), shard.file)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())


def test_config_names_the_format_and_files_are_copied(tmp_path: Path) -> None:
    config = {"model_type": "llama"}
    (tmp_path / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    digests = write_auxiliary_files(out, config, [tmp_path / "tokenizer.json"], NofM(2, 4), 8)
    written = json.loads((out / "config.json").read_text())
    assert written == {"model_type": "llama", "quantization_config": quantization_config(NofM(2, 4), 8)}
    assert config == {"model_type": "llama"}
    assert digests == {path.name: file_sha256(path) for path in out.iterdir()}


def test_only_uncommitted_shards_and_partial_files_are_discarded(tmp_path: Path) -> None:
    kept = write_block(tmp_path, 0, {}, {})
    write_block(tmp_path, 1, {}, {})
    for name in (
        "model-outside.safetensors",
        "model-block-00002.safetensors.partial",
        "config.json",
        "mine.safetensors",
    ):
        (tmp_path / name).touch()
    discard_uncommitted(tmp_path, [kept])
    assert {path.name for path in tmp_path.iterdir()} == {kept.file, "config.json", "mine.safetensors"}


def copied(folder: Path, name: str, content: bytes) -> bytes:
    (folder / "to").mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    assert copy_auxiliary_file(folder / name, folder / "to") == file_sha256(folder / "to" / name)
    return (folder / "to" / name).read_bytes()


def test_a_folder_in_place_of_a_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "model-block-00000.safetensors").mkdir()
    with pytest.raises(StreamslrError, match=r"model-block-00000\.safetensors is in the way .* move it away"):
        discard_uncommitted(tmp_path, ())


def test_auto_map_is_dropped_where_it_names_code_and_kept_where_it_is_a_word(tmp_path: Path) -> None:
    named = b'{"auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}, "bos_token": "a"}'
    assert json.loads(copied(tmp_path, "tokenizer_config.json", named)) == {"bos_token": "a"}
    for content in (b'{"auto_map": 17}', b'{"model": {"vocab": {"auto_map": {}}}}', b'["auto_map"', b'["auto_map"]'):
        assert copied(tmp_path, "tokenizer.json", content) == content
    assert copied(tmp_path, "notes.txt", named) == named


@pytest.mark.parametrize("kind", ["missing", "a folder", "changed"])
def test_a_file_that_is_not_as_written_is_named_with_what_to_do(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tokenizer.json"
    if kind == "a folder":
        path.mkdir()
    if kind == "changed":
        path.write_bytes(b"other")
    with pytest.raises(InputError, match=r"tokenizer\.json.*journal.*copy it again from where the folder came from"):
        require_as_written(path, "0" * 64)
