"""Runs that put S on a grid, end to end: what is stored, loaded, evaluated, exported, shown, and refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import streamslr
from streamslr.config import RunConfig
from streamslr.errors import InputError, ResumeError
from streamslr.finetune import finetune
from streamslr.io.packed_layout import value_format
from streamslr.results.export import export
from streamslr.results.verify import verify
from streamslr.run.context import open_run
from streamslr.spec.values import same_values
from tests.support.compressed_folders import dense_model, perplexities_as_saved, rewrite_block, run_contents
from tests.support.killing import compress_in_child
from tests.support.markers import slow
from tests.support.tiny_models import tiny_checkpoint

IDS = torch.arange(24).view(2, 12) % 50
INT4 = {"values": "int4", "group": 16, "pattern": "2:4"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama", blocks=2, shards=1)


@pytest.fixture
def settings(model: Path, text: Path, tmp_path: Path) -> dict[str, Any]:
    sizes = {"samples": 4, "seq_len": 16, "rank": 4, "match_epochs": 3, "device": "cpu", "method": "eora-wanda"}
    return {"model": model, "out": tmp_path / "out", "calibration": text, **sizes}


@pytest.fixture(scope="module")
def finished(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with int4. Read only."""
    out = tmp_path_factory.mktemp("int4") / "out"
    sizes = {"samples": 4, "seq_len": 16, "rank": 4, "match_epochs": 3, "device": "cpu", "method": "eora-wanda"}
    assert compress_in_child({"model": model, "out": out, "calibration": text, **sizes, **INT4}) == 0
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("method", ["eora-wanda", *slow("3basil")])
@pytest.mark.parametrize(
    ("pattern", "values", "rank"),
    [("2:4", "int4", 4), ("dense", "int4/32", 4), *slow(("50%", "int4", 0), ("4:8", "int8", 4), ("50%/row", "fp8", 4))],
)
def test_each_format_reaches_the_disk_and_loads(
    settings: dict[str, Any], method: str, pattern: str, values: str, rank: int
) -> None:
    out = settings["out"]
    changes = {"pattern": pattern, "values": values, "rank": rank, "method": method}
    state = streamslr.compress(**settings | changes)
    assert verify(out).problems == ()
    for block in state.blocks:
        tensors = load_file(out / block.shard.file)
        for linear in block.linears:
            parts = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{linear.name}.")}
            assert same_values(value_format(parts, linear.shape[1]), linear.values, linear.shape[1])
            assert linear.values.startswith(values)
            assert linear.nbytes == sum(part.nbytes for part in parts.values())
            assert linear.rounding_error is not None
            assert linear.unrounded_error is None
        assert block.matching_off_grid is not None
    whole = dense_model(out)
    expected = logits(whole)
    loaded = streamslr.load(out, device="cpu", dtype="float32")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    dense = streamslr.load(out, device="cpu", dtype="float32", keep_dense=True)
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)


def test_solving_on_the_grid_loses_less_than_rounding_to_the_nearest(settings: dict[str, Any], tmp_path: Path) -> None:
    change = {"match": False, **INT4, "group": 32}
    solved = streamslr.compress(**settings | change)
    nearest = streamslr.compress(**settings | change | {"rounding": "nearest", "out": tmp_path / "nearest"})
    for one, other in zip(solved.blocks, nearest.blocks, strict=True):
        for ours, theirs in zip(one.linears, other.linears, strict=True):
            assert ours.error < theirs.error


@pytest.mark.parametrize("change", [{"match": False}, {"rounding": "nearest"}])
def test_s_comes_onto_its_grid_as_it_is_solved_where_no_matching_of_numbers_is_wanted(
    settings: dict[str, Any], change: dict[str, Any]
) -> None:
    for block in streamslr.compress(**settings | INT4 | change).blocks:
        assert block.matching_off_grid is None
        for linear in block.linears:
            assert linear.unrounded_error is not None
            assert linear.rounding_error is None


def test_a_block_whose_values_are_matched_before_they_are_rounded_ends_nearer_to_its_targets(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    change = INT4 | {"match_epochs": 10, "samples": 16}
    before = streamslr.compress(**settings | change)
    nearest = streamslr.compress(**settings | change | {"rounding": "nearest", "out": tmp_path / "nearest"})
    for one, other in zip(before.blocks, nearest.blocks, strict=True):
        assert one.matching is not None
        assert other.matching is not None
        assert one.matching.loss_after is not None
        assert other.matching.loss_after is not None
        assert one.matching.loss_after < other.matching.loss_after


def test_a_single_step_of_matching_numbers_is_judged_by_what_comes_behind_it(settings: dict[str, Any]) -> None:
    for block in streamslr.compress(**settings | INT4 | {"match_epochs": 2, "match_held_out": 0}).blocks:
        record = block.matching_off_grid
        assert record is not None
        assert record.loss_after is not None
        assert record.curve == (record.loss_before, record.loss_before)
        assert record.loss_after < record.loss_before
        assert record.applied


def test_numbers_that_lose_nothing_are_not_matched(settings: dict[str, Any]) -> None:
    first, second = streamslr.compress(**settings | INT4 | {"pattern": "dense", "samples": 16}).blocks
    assert first.matching_off_grid is not None
    assert first.matching_off_grid.curve == (0,)
    assert second.matching_off_grid is not None
    assert len(second.matching_off_grid.curve) == 3  # it makes up for what the grid has cost the first block


def test_only_linears_with_a_grid_come_onto_one(settings: dict[str, Any], tmp_path: Path) -> None:
    allocation = tmp_path / "allocation.json"
    allocation.write_text(json.dumps({"*": {"values": "int4/16"}, "model.layers.1.*": {"values": "stored"}}))
    state = streamslr.compress(**settings | {"pattern": "2:4", "allocation": allocation})
    first, second = state.blocks
    assert first.matching_off_grid is not None
    assert second.matching_off_grid is None
    assert {linear.values for linear in first.linears} == {"int4/16"}
    assert {linear.values for linear in second.linears} == {"stored"}
    allocation.write_text(json.dumps({"*": {"values": "int4/16"}, "v_proj": {"values": "stored"}}))
    state = streamslr.compress(**settings | {"pattern": "2:4", "allocation": allocation, "out": tmp_path / "mixed"})
    assert verify(tmp_path / "mixed").problems == ()
    for linear in state.blocks[0].linears:
        assert (linear.rounding_error is None) == (linear.values == "stored") == linear.name.endswith("v_proj")


def test_a_run_killed_after_its_first_block_goes_on_to_the_same_bytes(settings: dict[str, Any], finished: Path) -> None:
    assert compress_in_child(settings | INT4, die_at=13) == -9
    streamslr.compress(**settings | INT4)
    assert run_contents(settings["out"]) == run_contents(finished)


def test_a_resume_with_another_format_is_refused(settings: dict[str, Any]) -> None:
    streamslr.compress(**settings | INT4)
    with pytest.raises(ResumeError, match=r"values: 'int4/16' there, 'int8/16' now"):
        streamslr.compress(**settings | INT4 | {"values": "int8"})


def test_a_resume_with_the_group_in_the_format_goes_on(settings: dict[str, Any]) -> None:
    first = streamslr.compress(**settings | INT4 | {"match": False})
    again = streamslr.compress(**settings | INT4 | {"match": False, "values": "int4/16", "group": 128})
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("changes", "entries", "said"),
    [
        ({"group": 64}, None, ["--group 64 has no effect"]),
        ({"rounding": "nearest"}, None, ["--rounding nearest has no effect"]),
        ({"rounding": "nearest", "group": 64, "values": "int4"}, None, []),
        ({"group": 64, "values": "int4/32"}, None, ["--group 64 has no effect"]),
        ({"rounding": "nearest", "group": 64}, {"q_proj": {"rank": 2}}, ["--group 64 has", "--rounding nearest has"]),
        ({"rounding": "nearest", "group": 64}, {"q_proj": {"values": "int4"}}, []),
        ({"rounding": "nearest", "group": 64}, {"q_proj": {"values": "int4/32"}}, ["--group 64 has no effect"]),
    ],
)
def test_a_group_or_rounding_without_effect_is_named(
    settings: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    entries: dict[str, Any] | None,
    said: list[str],
) -> None:
    if entries:
        (tmp_path / "some.json").write_text(json.dumps(entries))
        settings["allocation"] = tmp_path / "some.json"
    open_run(RunConfig.of(**settings | changes))
    found = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert len(found) == len(said)
    assert all(start in sentence for start, sentence in zip(said, found, strict=True))


def test_exports_compute_the_same(finished: Path, tmp_path: Path) -> None:
    expected = logits(dense_model(finished))
    export(finished, tmp_path / "dense", to="dense", dtype=torch.float32)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)
    export(finished, tmp_path / "peft", to="peft", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "peft" / "base")
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "peft" / "adapter"))
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)


def test_saved_it_evaluates_as_the_folder_does(finished: Path, tmp_path: Path) -> None:
    first, second = perplexities_as_saved(finished, tmp_path)
    assert first == second


def test_finetuning_trains_u_v_and_scales_and_leaves_codes(finished: Path, text: Path, tmp_path: Path) -> None:
    finetune(finished, text, tmp_path / "tuned", seq_len=32, batch=8, lr=0.05, steps=3, device="cpu")
    assert verify(tmp_path / "tuned").problems == ()
    for shard in finished.glob("model-block-*.safetensors"):
        before, after = load_file(shard), load_file(tmp_path / "tuned" / shard.name)
        changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"U", "V", "scales"}


def test_an_allocation_gives_some_linears_a_format(settings: dict[str, Any], tmp_path: Path) -> None:
    entries = {"down_proj": {"values": "int8/32"}, "q_proj": {"pattern": "dense", "values": "int4", "rank": 0}}
    (tmp_path / "some.json").write_text(json.dumps(entries))
    state = streamslr.compress(**settings, allocation=tmp_path / "some.json")
    assert verify(settings["out"]).problems == ()
    found = {linear.name.rpartition(".")[2]: linear for linear in state.blocks[1].linears}
    assert {name: linear.values for name, linear in found.items() if linear.values != "stored"} == {
        "down_proj": "int8/32",
        "q_proj": "int4/128",
    }
    assert (found["q_proj"].pattern, found["q_proj"].rank) == ("dense", 0)
    config = json.loads((settings["out"] / "config.json").read_text())
    assert config["quantization_config"]["values"] == "mixed"
    expected = logits(dense_model(settings["out"]))
    torch.testing.assert_close(
        logits(streamslr.load(settings["out"], device="cpu", dtype="float32")), expected, rtol=1e-4, atol=1e-4
    )


def test_dense_with_values_as_stored_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="would change nothing; give --values"):
        streamslr.compress(**settings | {"pattern": "dense"})
    assert not settings["out"].exists()


def test_a_shard_with_another_format_than_the_journals_is_found(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "other")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj"
        tensors[f"{name}.scales"] = tensors[f"{name}.scales"][:, :1].clone()

    rewrite_block(tmp_path / "other", change)
    problems = [problem for _, problem in verify(tmp_path / "other").problems]
    assert any("has values as int4/64, the journal says int4/16" in problem for problem in problems)
