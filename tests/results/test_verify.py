"""Verify finds whatever can go wrong with a folder, and says where."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streamslr.errors import InputError
from streamslr.io.durable import file_sha256
from streamslr.results.inspect import read_run, summary
from streamslr.results.verify import verify
from tests.support.compressed_folders import BLOCK, edit_journal, rewrite_block

LINEAR = "model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(matched: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(matched, tmp_path / "copied elsewhere")


def problems(folder: Path) -> str:
    return "\n".join(f"{file}: {problem}" for file, problem in verify(folder).problems)


def test_a_copied_folder_is_sound_and_inspects_the_same(folder: Path, matched: Path) -> None:
    result = verify(folder)
    assert result.problems == ()
    assert result.complete
    assert summary(folder, read_run(folder))["blocks"] == summary(matched, read_run(matched))["blocks"]


def test_a_flipped_bit_changes_the_digest(folder: Path) -> None:
    content = bytearray((folder / BLOCK).read_bytes())
    content[-100] ^= 1
    (folder / BLOCK).write_bytes(content)
    assert f"{BLOCK}: has sha256" in problems(folder)


def test_a_truncated_shard_is_found(folder: Path) -> None:
    (folder / BLOCK).write_bytes((folder / BLOCK).read_bytes()[:-10])
    assert f"{BLOCK}: has " in problems(folder)
    assert "cannot be read" in problems(folder)


@pytest.mark.parametrize("name", [BLOCK, "model-outside.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert problems(folder) == f"{name}: is missing"


def test_a_missing_file_shows_in_inspect(folder: Path) -> None:
    (folder / BLOCK).unlink()
    assert [block["present"] for block in summary(folder, read_run(folder))["blocks"]] == [False, True]


def test_an_extra_file_is_named(folder: Path) -> None:
    (folder / "model-block-00002.safetensors").write_bytes(b"")
    assert "model-block-00002.safetensors: is not part of the model" in problems(folder)


def test_a_changed_config_is_found(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("64", "65", 1))
    assert "config.json: has changed" in problems(folder)


def test_a_byte_that_describes_no_groups_is_found(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LINEAR}.meta"][3, 2] = 6**3

    rewrite_block(folder, change)
    assert f"{BLOCK}: {LINEAR}:" in problems(folder)


@pytest.mark.parametrize("part", ["values", "U", "V"])
def test_a_value_that_is_not_finite_is_found(folder: Path, part: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LINEAR}.{part}"][1, 1] = float("inf")

    rewrite_block(folder, change)
    assert LINEAR in problems(folder)


def test_a_norm_that_is_not_finite_is_found(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][0] = float("nan")

    rewrite_block(folder, change)
    assert "model.layers.0.input_layernorm.weight holds NaN" in problems(folder)


def test_factors_of_another_rank_are_found(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LINEAR}.U"] = tensors[f"{LINEAR}.U"][:, :2].contiguous()

    rewrite_block(folder, change)
    assert f"{LINEAR}.U has shape (128, 2), the journal says (128, 4)" in problems(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("model.layers.0.extra.weight", torch.ones(2), "has no place for"),
        (f"{LINEAR}.weight", torch.ones(128, 64), "has no place for"),
        ("model.layers.0.input_layernorm.weight", torch.ones(64, dtype=torch.int32), "is I32"),
    ],
)
def test_a_tensor_with_which_the_folder_does_not_load_is_found(
    folder: Path, name: str, tensor: torch.Tensor, problem: str
) -> None:
    rewrite_block(folder, lambda tensors: tensors.update({name: tensor}))
    assert "config.json: and the shards" in problems(folder)
    assert problem in problems(folder)


def test_an_index_that_points_elsewhere_is_found(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = BLOCK
    del index["weight_map"][f"{LINEAR}.meta"]
    path.write_text(json.dumps(index))
    assert f"says lm_head.weight is in {BLOCK}" in problems(folder)
    assert f"says {LINEAR}.meta is in None" in problems(folder)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an output folder"):
        verify(tmp_path)


def test_a_linear_without_a_record_is_found(folder: Path) -> None:
    with edit_journal(folder) as journal:
        dropped = journal["blocks"][0]["linears"].pop()
    assert f"{dropped['name']} has no record in the journal" in problems(folder)


def test_a_damaged_header_is_a_problem_of_its_file(folder: Path) -> None:
    content = (folder / BLOCK).read_bytes()
    (folder / BLOCK).write_bytes(content.replace(b"2:4 128x64", b"2:4 128y64", 1))
    assert f"{BLOCK}: cannot be read" in problems(folder)


@pytest.mark.parametrize(
    "content",
    [
        '{"weight_map": [[1, 2]]}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": null}',
        '{"weight_map": 7}',
        "[]",
        "7",
        "",
        "[" * 5000,
        "\xff",
    ],
)
def test_an_index_of_another_shape_is_found(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    assert "model.safetensors.index.json: " in problems(folder)


def test_what_a_kill_at_the_last_step_left_is_no_problem(folder: Path) -> None:
    (folder / ".scratch").mkdir()
    (folder / "model.safetensors.index.json.partial").write_text("{")
    result = verify(folder)
    assert result.problems == ()
    assert not result.complete
    assert result.leftovers == (".scratch", "model.safetensors.index.json.partial")


def test_an_index_from_before_the_last_commit_is_no_problem(folder: Path) -> None:
    last = "model-block-00001.safetensors"
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != last}
    path.write_text(json.dumps(index))
    assert verify(folder).problems == ()
    assert not verify(folder).complete
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    assert "says lm_head.weight is in None" in problems(folder)


def unfinished(folder: Path) -> None:
    """Make the folder what a kill between the second shard and its commit leaves."""
    with edit_journal(folder) as journal:
        journal["blocks"].pop()
    (folder / ".scratch").mkdir()
    (folder / "streamslr.json.partial").write_text("{")


def test_an_unfinished_folder_is_sound_whatever_is_not_committed(folder: Path) -> None:
    unfinished(folder)
    (folder / "model.safetensors.index.json").unlink()
    result = verify(folder)
    assert result.problems == ()
    assert not result.complete
    assert result.leftovers == (".scratch", "model-block-00001.safetensors", "streamslr.json.partial")


def test_a_committed_shard_of_an_unfinished_folder_is_checked(folder: Path) -> None:
    unfinished(folder)
    (folder / BLOCK).write_bytes((folder / BLOCK).read_bytes()[:-1] + b"\x55")
    assert f"{BLOCK}: has sha256" in problems(folder)


@pytest.mark.parametrize("name", ["README.md", "report.html", "LICENSE", ".gitattributes", ".cache", "run.log"])
def test_files_that_no_reader_takes_for_the_model_are_allowed(folder: Path, name: str) -> None:
    (folder / name).mkdir() if name == ".cache" else (folder / name).write_text("mine")
    assert verify(folder).problems == ()


@pytest.mark.parametrize(
    "name", ["model-block-00099.safetensors", "model.safetensors", "adapter_config.json", "modeling.py", "vocab.txt"]
)
def test_files_that_a_reader_may_take_for_the_model_are_named(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    assert f"{name}: is not part of the model" in problems(folder)


def test_a_tensor_that_the_model_needs_is_missed(folder: Path) -> None:
    norm = "model.layers.0.post_attention_layernorm.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[norm]

    rewrite_block(folder, change)
    assert norm in problems(folder)


def test_a_packed_linear_that_the_model_needs_is_missed(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("values", "meta", "U", "V"):
            del tensors[f"{LINEAR}.{part}"]

    rewrite_block(folder, change)
    assert f"{LINEAR}: values is missing" in problems(folder)


def test_factors_of_a_linear_of_rank_0_are_found(folder: Path) -> None:
    with edit_journal(folder) as journal:
        next(linear for linear in journal["blocks"][0]["linears"] if linear["name"] == LINEAR)["rank"] = 0
    assert f"{LINEAR}.U has shape (128, 4), the journal says (128, 0)" in problems(folder)


def test_a_tensor_in_two_shards_is_found(folder: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    rewrite_block(folder, lambda tensors: tensors.update({name: torch.ones(64)}))
    assert f"model-block-00001.safetensors: holds {name}, as does {BLOCK}" in problems(folder)


def test_a_tensor_in_the_shard_of_another_block_is_found(folder: Path) -> None:
    name, other = "model.layers.1.input_layernorm.weight", folder / "model-block-00001.safetensors"
    with safe_open(other, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(other)
    moved = tensors.pop(name)
    save_file(tensors, other, metadata)
    with edit_journal(folder) as journal:
        journal["blocks"][1]["shard"] |= {"sha256": file_sha256(other), "nbytes": other.stat().st_size}
    rewrite_block(folder, lambda tensors: tensors.update({name: moved}))
    assert f"{BLOCK}: holds {name}, which belongs into model-block-00001.safetensors" in problems(folder)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"rank": 5}, "says pattern 2:4 and rank 5, the journal says 2:4 and 4"),
        ({"pattern": "mixed"}, "says pattern mixed and rank 4"),
        ({"format_version": 9}, "cannot be read: config.json says streamslr format_version 9"),
        ({"quant_method": "other"}, "does not say that streamslr compressed the model"),
    ],
)
def test_a_config_of_another_format_than_the_journal_is_found(
    folder: Path, changed: dict[str, Any], problem: str
) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changed
    path.write_text(json.dumps(config))
    with edit_journal(folder) as journal:
        journal["auxiliary_files"]["config.json"] = file_sha256(path)
    assert f"config.json: {problem}" in problems(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", "[" * 5000, '{"quantization_config": "x"}', '{"num_hidden_layers": 3}']
)
def test_a_config_that_is_none_is_found(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with edit_journal(folder) as journal:
        journal["auxiliary_files"]["config.json"] = file_sha256(folder / "config.json")
    assert "config.json: " in problems(folder)


def test_a_config_of_another_model_is_found(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with edit_journal(folder) as journal:
        journal["auxiliary_files"]["config.json"] = file_sha256(path)
    assert "config.json: and the shards are not of one model" in problems(folder)


def test_a_config_without_a_record_is_found(folder: Path) -> None:
    with edit_journal(folder) as journal:
        del journal["auxiliary_files"]["config.json"]
    assert "config.json: has no record in the journal" in problems(folder)
