"""Whole runs in which linears become different things: by outliers, by fraction of parameters, by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import streamslr
from streamslr.config import RunConfig
from streamslr.errors import InputError, ResumeError
from streamslr.finetune import finetune
from streamslr.io.packed_layout import FORMAT_VERSION, packed_linears
from streamslr.results.evaluate import evaluate
from streamslr.results.export import export
from streamslr.results.inspect import get_allocation, run_table
from streamslr.results.report.page import render_page
from streamslr.results.verify import verify
from streamslr.run.context import open_run
from streamslr.run.journal import JournalState, read_journal
from streamslr.run.loop import run
from streamslr.run.passes import Passes
from streamslr.spec.pattern import NofM
from tests.support.compressed_folders import dense_model, run_contents
from tests.support.killing import compress_in_child
from tests.support.markers import slow
from tests.support.tiny_models import tiny_checkpoint

BLOCKS = 3
BASICS: dict[str, Any] = {"samples": 6, "seq_len": 16, "device": "cpu", "match_epochs": 3}
BASICS |= {"method": "eora-wanda"}  # it solves at once, and no allocation depends on the method
IDS = torch.arange(5, 45).view(2, 20)
OWL = {"compression": "60%", "rank_ratio": 0.25, "owl": 0.1, "owl_outlier": 3.0}
BY_NAME = {
    "*": {"pattern": "4:8", "rank": 6},
    "q_proj": {"rank": 0},
    "layers.1.mlp.*": {"pattern": "30%", "rank": 3},
    "down_proj": {"pattern": "2:4"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks differ in their number of outliers."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama", blocks=BLOCKS, shards=1)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for i, power in enumerate((3.0, 1.0, 2.0)):
        for name in [name for name in tensors if f"layers.{i}." in name and tensors[name].dim() == 2]:
            heavy = tensors[name].float().abs().pow(power) * tensors[name].float().sign()
            tensors[name] = (heavy * tensors[name].float().std() / heavy.std()).bfloat16()
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture
def settings(model: Path, text: Path, tmp_path: Path) -> dict[str, Any]:
    return {"model": model, "out": tmp_path / "out", "calibration": text, **BASICS}


@pytest.fixture(scope="module")
def by_owl(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run by outliers."""
    out = tmp_path_factory.mktemp("owl") / "out"
    assert compress_in_child({"model": model, "out": out, "calibration": text, **BASICS, **OWL}) == 0
    return out


@pytest.fixture(scope="module")
def by_name(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    (folder / "allocation.json").write_text(json.dumps(BY_NAME))
    streamslr.compress(model, folder / "out", calibration=text, allocation=folder / "allocation.json", **BASICS)
    return folder / "out"


def state_of(folder: Path) -> JournalState:
    state = read_journal(folder)
    assert state is not None
    return state


@pytest.mark.slow
def test_blocks_with_more_outliers_keep_more_and_all_together_what_was_asked_for(by_owl: Path) -> None:
    state = state_of(by_owl)
    assert verify(by_owl).problems == ()
    assert state.outliers is not None
    assert state.outliers[0] > state.outliers[2] > state.outliers[1]
    sizes = [
        sum(
            linear.density * linear.shape[0] * linear.shape[1] + linear.rank * sum(linear.shape)
            for linear in block.linears
        )
        for block in state.blocks
    ]
    assert sizes[0] > sizes[2] > sizes[1]
    dense = sum(linear.shape[0] * linear.shape[1] for block in state.blocks for linear in block.linears)
    ranks = sum(sum(linear.shape) for block in state.blocks for linear in block.linears)  # each rounded down
    assert 0.4 * dense - ranks < sum(sizes) <= 0.4 * dense + 1


def test_each_linear_becomes_what_the_file_says(by_name: Path) -> None:
    state = state_of(by_name)
    assert verify(by_name).problems == ()
    became = {linear.name: (linear.pattern, linear.rank) for block in state.blocks for linear in block.linears}
    assert became["model.layers.0.self_attn.q_proj"] == ("4:8", 0)
    assert became["model.layers.0.self_attn.k_proj"] == ("4:8", 6)
    assert became["model.layers.0.mlp.down_proj"] == ("2:4", 6)
    assert became["model.layers.1.mlp.up_proj"] == ("30%", 3)
    assert became["model.layers.1.mlp.down_proj"] == ("2:4", 3)
    with safe_open(by_name / "model-block-00001.safetensors", "pt") as shard:
        headers = packed_linears(shard.metadata())
    assert headers["model.layers.1.self_attn.v_proj"] == (NofM(4, 8), (32, 64))
    config = json.loads((by_name / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "streamslr", "format_version": FORMAT_VERSION, "pattern": "mixed", "rank": 6}
    assert all(block.matching is not None for block in state.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("made", ["by_owl", "by_name"])
@torch.no_grad()
def test_every_reader_has_the_same_model(made: str, tmp_path: Path, text: Path, request: Any) -> None:
    folder: Path = request.getfixturevalue(made)
    expected = dense_model(folder)(IDS).logits
    loaded = streamslr.load(folder, device="cpu", dtype="float32")
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    streamslr.load(folder, device="cpu").save_pretrained(tmp_path / "saved")
    saved = streamslr.load(tmp_path / "saved", device="cpu", dtype="float32")
    assert torch.equal(saved(IDS).logits, loaded(IDS).logits)
    export(folder, tmp_path / "dense", "dense", torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(dense(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    export(folder, tmp_path / "peft", "peft")
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft/adapter", dtype=torch.float32)
    torch.testing.assert_close(adapted(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    perplexities = [
        evaluate(str(one), text, 16, device="cpu", free_memory=10**9).perplexity for one in (folder, tmp_path / "dense")
    ]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)
    assert "4:8–30%" not in render_page(folder, state_of(folder)), "densest first"
    assert run_table(folder, state_of(folder)).columns[2].header == "pattern + rank"


@pytest.mark.slow
def test_a_mixed_folder_can_be_finetuned(by_name: Path, text: Path, tmp_path: Path) -> None:
    finetune(by_name, text, tmp_path / "tuned", seq_len=16, steps=2, batch=2, device="cpu")
    assert verify(tmp_path / "tuned").problems == ()
    assert get_allocation(state_of(tmp_path / "tuned")) == get_allocation(state_of(by_name))


@pytest.mark.slow
@pytest.mark.parametrize("die_at", [1, 2, 9])
def test_killed_at_a_commit_point_the_same_line_goes_on_to_the_same_bytes(
    settings: dict[str, Any], by_owl: Path, die_at: int
) -> None:
    """Kills before the result of the survey is written, right after, and among the blocks."""
    assert compress_in_child(settings | OWL, die_at=die_at) == -9
    assert compress_in_child(settings | OWL) == 0
    assert run_contents(settings["out"]) == run_contents(by_owl)


@pytest.mark.slow
def test_killed_in_the_survey_it_begins_again(settings: dict[str, Any], by_owl: Path) -> None:
    assert compress_in_child(settings | OWL, die_at=6, counting="work") == -9
    assert state_of(settings["out"]).outliers is None
    assert compress_in_child(settings | OWL) == 0
    assert run_contents(settings["out"]) == run_contents(by_owl)


@pytest.mark.slow
def test_a_survey_that_is_done_is_not_done_again(
    settings: dict[str, Any], by_owl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compress_in_child(settings | OWL, die_at=2) == -9
    found = get_allocation(state_of(settings["out"]))
    assert found == get_allocation(state_of(by_owl))
    plan = open_run(RunConfig.of(**settings | OWL)).plan
    assert "on average" not in plan.linears
    monkeypatch.delattr(Passes, "survey")
    streamslr.compress(**settings | OWL)
    assert run_contents(settings["out"]) == run_contents(by_owl)


@pytest.mark.slow
def test_what_inspect_prints_is_a_file_for_another_run(settings: dict[str, Any], by_owl: Path, tmp_path: Path) -> None:
    file = tmp_path / "allocation.json"
    file.write_text(json.dumps(get_allocation(state_of(by_owl))))
    streamslr.compress(**settings, allocation=file)
    for shard in by_owl.glob("*.safetensors"):
        assert (settings["out"] / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.slow
def test_another_allocation_is_refused_and_another_layout_of_the_file_is_not(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    file, other = tmp_path / "a.json", tmp_path / "b.json"
    file.write_text(json.dumps(BY_NAME))
    other.write_text(json.dumps(BY_NAME, indent=4))
    settings |= {"match": False}
    assert compress_in_child(settings | {"allocation": file}, die_at=9) == -9
    assert streamslr.compress(**settings, allocation=other).complete
    other.write_text(json.dumps(BY_NAME | {"q_proj": {"rank": 1}}))
    with pytest.raises(ResumeError, match="allocation: "):
        streamslr.compress(**settings, allocation=other)


def test_a_rank_or_pattern_that_every_name_overrides_is_warned_of(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(BY_NAME))
    open_run(RunConfig.of(**settings, allocation=file, pattern="2:4", rank=64))
    assert [message.split(" has no effect")[0] for message in caplog.messages] == ["--pattern 2:4", "--rank 64"]
    caplog.clear()
    file.write_text(json.dumps({"q_proj": {"pattern": "4:8", "rank": 6}}))
    open_run(RunConfig.of(**settings, allocation=file, pattern="2:4", rank=64))
    open_run(RunConfig.of(**settings, ranks="q_proj=2", rank=64))
    assert caplog.messages == []


def test_values_that_every_name_overrides_are_warned_of(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.json"
    given = {"values": "int4", "low_rank_values": "int8", "allocation": file}
    entry = {"pattern": "dense", "values": "int8", "low_rank_values": "bf16"}
    file.write_text(json.dumps({"*": entry}))
    open_run(RunConfig.of(**settings, **given))
    found = [message.split(" has no effect")[0] for message in caplog.messages]
    assert found == ["--values int4", "--low-rank-values int8"]
    caplog.clear()
    file.write_text(json.dumps({"q_proj": entry}))
    open_run(RunConfig.of(**settings, **given))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("change", "named"),
    [({"owl": 0.05}, "owl: 0.1 there, 0.05 now"), ({"compression": "50%"}, "compression: '60%' there, '50%' now")],
)
def test_changed_fractions_are_refused(
    settings: dict[str, Any], by_owl: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ResumeError, match=named):
        streamslr.compress(**settings | OWL | {"out": by_owl} | change)


def test_a_linear_that_cannot_have_its_pattern_is_refused_before_any_work(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text('{"layers.2.mlp.down_proj": {"pattern": "3:7"}}')
    with pytest.raises(InputError, match=r"model.layers.2.mlp.down_proj: pattern 3:7"):
        streamslr.compress(**settings, allocation=tmp_path / "a.json")
    with pytest.raises(InputError, match=r"method wanda is pure sparsity"):
        streamslr.compress(**settings | {"method": "wanda", "rank": 0, "ranks": "q_proj=4"})
    assert not settings["out"].exists()


@pytest.mark.slow
@pytest.mark.parametrize("match", [True, *slow(False)])
def test_the_plan_holds_whatever_the_survey_finds(settings: dict[str, Any], match: bool) -> None:
    settings |= OWL | {"method": "3basil"}
    context = open_run(RunConfig.of(**settings, match=match))
    state = run(context)
    after = open_run(RunConfig.of(**settings, match=match)).plan
    for phase, before in zip(after.phases, context.plan.phases, strict=True):
        assert phase.flops <= before.flops, phase.name
    written = sum(linear.nbytes for block in state.blocks for linear in block.linears)
    assert written <= after.output_bytes <= context.plan.output_bytes
    survey = state.measured["survey"]
    assert survey["host_peak_bytes"] <= survey["host_planned_bytes"]


def test_n_of_m_varies_by_block(settings: dict[str, Any]) -> None:
    state = streamslr.compress(**settings, pattern="4:8", rank=2, owl=0.13, owl_outlier=3.0, match=False)
    assert [{linear.pattern for linear in block.linears} for block in state.blocks] == [{"5:8"}, {"3:8"}, {"4:8"}]
    assert verify(settings["out"]).problems == ()
