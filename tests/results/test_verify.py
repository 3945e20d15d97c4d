"""Verify finds whatever can go wrong with a folder, and says where."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from streamslr.errors import InputError
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
    assert f"{name}: is missing" in problems(folder)


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


@pytest.mark.parametrize("weight_map", ["[]", "null", "7"])
def test_an_index_of_another_shape_is_found(folder: Path, weight_map: str) -> None:
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    assert "model.safetensors.index.json: " in problems(folder)


def test_hidden_states_left_in_a_finished_folder_are_named(folder: Path) -> None:
    (folder / ".scratch").mkdir()
    assert ".scratch: is not part of the model" in problems(folder)
