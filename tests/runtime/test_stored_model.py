"""A folder whose tensors are not what the model needs is refused by name, never filled with other numbers."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import streamslr
from streamslr.errors import InputError, StreamslrError
from tests.support.compressed_folders import BLOCK, rewrite_block

LINEAR = "model.layers.0.mlp.up_proj"
NORM = "model.layers.0.input_layernorm.weight"
INDEX = "model.safetensors.index.json"
OUTSIDE = "model-outside.safetensors"


@pytest.fixture
def folder(compressed: Path, tmp_path: Path) -> Path:
    """A copy to damage; its journal records what was changed in BLOCK by `rewrite_block`."""
    return shutil.copytree(compressed, tmp_path / "slr")


@pytest.fixture
def without_journal(folder: Path) -> Path:
    (folder / "streamslr.json").unlink()
    return folder


def rewrite(folder: Path, file: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a shard, and the index with them."""
    with safe_open(folder / file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata)
    index = json.loads((folder / INDEX).read_text())
    kept = {name: shard for name, shard in index["weight_map"].items() if shard != file}
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": kept | dict.fromkeys(tensors, file)}))


def refusals(folder: Path) -> Iterator[str]:
    """Yield what `load` and `from_pretrained` say."""
    for load in (streamslr.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(InputError) as refused:
            load(folder)
        yield str(refused.value)


def drop(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[name]

    return change


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def replace(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def set_byte(row: int, value: int) -> Callable[[Tensor], Tensor]:
    def change(meta: Tensor) -> Tensor:
        meta[row, 0] = value
        return meta

    return change


DEEP = (
    b'{"model_type": "llama", "num_hidden_layers": 1000000, "quantization_config": '
    b'{"quant_method": "streamslr", "format_version": 3, "pattern": "2:4", "rank": 4}}'
)
"""Content of a config.json that asks for a million blocks."""

CHANGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "a part of a linear": (BLOCK, drop(f"{LINEAR}.V"), f"{LINEAR}: U is there without V"),
    "values": (BLOCK, drop(f"{LINEAR}.values"), f"{LINEAR}: values is missing"),
    "meta": (BLOCK, drop(f"{LINEAR}.meta"), f"{LINEAR}.meta is missing"),
    "a norm": (BLOCK, drop(NORM), f"{NORM} is missing"),
    "the head": (OUTSIDE, drop("lm_head.weight"), "lm_head.weight is missing"),
    "a renamed norm": (BLOCK, rename(NORM, f"{NORM}_"), f"{NORM} is missing"),
    "a renamed V": (BLOCK, rename(f"{LINEAR}.V", f"{LINEAR}.v"), f"{LINEAR}: U is there without V"),
    "one too many": (BLOCK, lambda tensors: tensors.update({"model.x": torch.ones(2)}), "model.x is unexpected"),
    "row_offsets": (BLOCK, rename(NORM, f"{LINEAR}.row_offsets"), "row_offsets does not belong to a 2:4 linear"),
    "a shape": (BLOCK, replace(NORM, lambda t: t[:-1].clone()), f"{NORM} in {BLOCK} is [63]"),
    "the shape of V": (
        BLOCK,
        replace(f"{LINEAR}.V", lambda t: t[:, :-1].clone()),
        "U [128, 4] and V [4, 63]",
    ),
    "a dtype": (BLOCK, replace(NORM, lambda t: t.to(torch.int32)), f"{NORM} in {BLOCK} is torch.int32"),
    "the dtype of U": (BLOCK, replace(f"{LINEAR}.U", lambda t: t.float()), f"{LINEAR}: U is torch.float32"),
    "the dtype of meta": (BLOCK, replace(f"{LINEAR}.meta", lambda t: t.int()), f"{LINEAR}: meta is torch.int32"),
    "a code of meta": (
        BLOCK,
        replace(f"{LINEAR}.meta", set_byte(3, 216)),
        f"{BLOCK}: meta: row 3, group 0",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_model_does_not_need_or_lacks_is_named(without_journal: Path, change: str) -> None:
    file, made, message = CHANGES[change]
    rewrite(without_journal, file, made)
    for refused in refusals(without_journal):
        assert message in refused


def test_a_dropped_low_rank_part_is_known_from_the_journal(folder: Path) -> None:
    rewrite_block(folder, drop(f"{LINEAR}.U", f"{LINEAR}.V"))
    for refused in refusals(folder):
        assert f"{LINEAR} is stored as 2:4 of 128x64 at rank 0, the journal says 2:4 of 128x64 at rank 4" in refused


def test_without_a_journal_a_dropped_low_rank_part_is_warned_about(
    without_journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(without_journal, BLOCK, drop(f"{LINEAR}.U", f"{LINEAR}.V"))
    streamslr.load(without_journal, device="cpu")
    assert f"{LINEAR} (1 such linears) has no U and V" in caplog.text


def test_every_low_rank_part_dropped(without_journal: Path) -> None:
    for shard in without_journal.glob("model-block-*"):
        names = [name for name in load_file(shard) if name.endswith((".U", ".V"))]
        rewrite(without_journal, shard.name, drop(*names))
    for refused in refusals(without_journal):
        assert "no linear has U and V, config.json says rank 4" in refused


@pytest.mark.parametrize("header", ["1:4 128x64", "2:4 64x128", None])
def test_a_header_of_another_pattern_or_shape_or_none(without_journal: Path, header: str | None) -> None:
    with safe_open(without_journal / BLOCK, "pt") as opened:
        metadata = opened.metadata()
    if header is None:
        del metadata[LINEAR]
    else:
        metadata[LINEAR] = header
    save_file(load_file(without_journal / BLOCK), without_journal / BLOCK, metadata)
    for refused in refusals(without_journal):
        assert LINEAR in refused


def test_index_and_shards_that_disagree(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.x"] = BLOCK
    (folder / INDEX).write_text(json.dumps(index))
    for refused in refusals(folder):
        assert f"{INDEX} places model.x in {BLOCK}, but no shard holds it" in refused


def test_a_file_that_takes_the_place_of_the_shards(folder: Path) -> None:
    shutil.copy(folder / BLOCK, folder / "model.safetensors")
    for refused in refusals(folder):
        assert "streamslr.json does not name model.safetensors" in refused or "places" in refused


def test_an_adapter_beside_the_shards_is_not_put_on_top(folder: Path) -> None:
    entry = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(entry))
    for refused in refusals(folder):
        assert "adapter_config.json makes transformers put an adapter on the model" in refused


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "llama", "quantization_config": "x"}'),
        ("config.json", b'{"model_type": 3}'),
        ("config.json", DEEP),
        ("config.json", b"[" * 2000),
        (INDEX, b"{"),
        (INDEX, b"[]"),
        (INDEX, b'{"weight_map": {"a": 3}}'),
        (INDEX, b'{"weight_map": {"a": "../config.json"}}'),
        (INDEX, b'{"metadata": {}, "weight_map": {}}'),
        ("streamslr.json", b"{"),
        (BLOCK, b""),
        (BLOCK, b"\xff" * 64),
        (BLOCK, None),
        (INDEX, None),
        ("config.json", None),
    ],
)
def test_damaged_and_missing_files_are_errors_of_streamslr(folder: Path, file: str, content: bytes | None) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(StreamslrError):
        streamslr.load(folder, device="cpu")


@pytest.mark.parametrize("file", [BLOCK, OUTSIDE, "config.json", "tokenizer.json"])
def test_verify_reads_every_file(folder: Path, file: str) -> None:
    assert streamslr.load(folder, device="cpu", verify=True)
    content = bytearray((folder / file).read_bytes())
    content[-3] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=f"{file} is damaged or was changed: its sha256"):
        streamslr.load(folder, device="cpu", verify=True)


def test_verify_needs_a_journal(without_journal: Path) -> None:
    with pytest.raises(InputError, match=r"no streamslr\.json to verify it against"):
        streamslr.load(without_journal, verify=True)


def test_the_head_of_another_task_may_be_new(compressed: Path, tmp_path: Path) -> None:
    streamslr.load(compressed, device="cpu").save_pretrained(tmp_path / "saved")
    for folder in (compressed, tmp_path / "saved"):
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.score.weight.shape == (2, 64)
    tensors = load_file(tmp_path / "saved/model.safetensors")
    with safe_open(tmp_path / "saved/model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    del tensors[NORM]
    save_file(tensors, tmp_path / "saved/model.safetensors", metadata)
    with pytest.raises(InputError, match=f"{NORM} is missing"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")


def test_a_tensor_that_the_source_had_for_nothing_is_warned_about(
    without_journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(without_journal, OUTSIDE, lambda tensors: tensors.update({"model.x": torch.ones(2)}))
    with caplog.at_level(logging.WARNING, "streamslr"):
        streamslr.load(without_journal, device="cpu")
    assert "has no place for these parts: model.x (1 tensor)" in caplog.text


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_changed_setting_is_warned_about(folder: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(settings))
    streamslr.load(folder, device="cpu")
    assert f"{name} is not as it was written" in caplog.text
