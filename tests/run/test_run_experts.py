"""Mixtures of experts end to end: what is written, said, loaded, exported, trained and resumed; one expert starves."""

import html
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import streamslr
from streamslr.config import RunConfig
from streamslr.errors import InputError
from streamslr.finetune import finetune
from streamslr.memory import free_host_memory
from streamslr.model.checkpoint import open_checkpoint
from streamslr.results.evaluate import evaluate
from streamslr.results.export import export
from streamslr.results.inspect import read_run, summary
from streamslr.results.report.page import write_report
from streamslr.results.verify import verify
from streamslr.run.block_solver import BlockSolver, WaitingGrams
from streamslr.run.context import open_run
from streamslr.run.loop import run
from streamslr.run.passes import Passes
from streamslr.runtime.loader import packed_modules
from tests.support.compressed_folders import dense_model, run_contents
from tests.support.killing import compress_in_child
from tests.support.markers import slow
from tests.support.tiny_models import starved_checkpoint, tiny_checkpoint

ARCHITECTURES = ["mixtral", *slow("qwen3_moe", "deepseek_v2", "deepseek_v3")]
RUN: dict[str, Any] = {
    "samples": 6,
    "match_held_out": 0,
    "seq_len": 16,
    "rank": 4,
    "device": "cpu",
    "method": "eora-sparsegpt",
    "match_epochs": 8,
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return starved_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param, blocks=2)


@pytest.fixture(scope="module")
def folder(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "slr"
    streamslr.compress(model, out, calibration=text, **RUN)
    return out


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with the checkpoint and the result of an uninterrupted run."""
    made = tmp_path_factory.mktemp("mixtral")
    starved_checkpoint(made / "model", "mixtral", blocks=2)
    assert compress_in_child({"model": made / "model", "out": made / "slr", "calibration": text, **RUN}) == 0
    return made


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(torch.arange(2, 42).view(2, 20)).logits
    return result


def test_every_expert_is_packed_under_the_checkpoints_names_and_routers_stay(model: Path, folder: Path) -> None:
    assert verify(folder).problems == ()
    source, written = open_checkpoint(str(model)), open_checkpoint(str(folder))
    assert set(written.tensors) == set(source.tensors)
    linears = {linear.name for linear in read_run(folder).blocks[1].linears}
    in_block = {name for name, info in source.tensors.items() if name.startswith("model.layers.1.")}
    dense = {name.removesuffix(".weight") for name in in_block if len(source.tensors[name].shape) == 2} - linears
    assert [name.rpartition(".")[2] for name in dense] == ["gate"], "the router alone"
    (router,) = (f"{name}.weight" for name in dense)
    assert torch.equal(source.read([router])[router], written.read([router])[router])


def test_starved_experts_are_counted_and_said(folder: Path) -> None:
    report = summary(folder, read_run(folder))
    linears = [linear for linear in report["blocks"][1]["linears"] if ".experts." in linear["name"]]
    rows = [linear["rows"] for linear in linears]
    starved = [linear for linear in linears if ".experts.1." in linear["name"]]
    assert len(linears) == 15
    assert sum(rows) == 3 * 2 * 6 * 16, "each token in two experts"
    assert [linear["rows"] for linear in starved] == [0, 0, 0]
    for linear in starved:
        assert linear["warnings"][0].startswith(f"{linear['name']}: 0 calibration tokens reached this expert")
        assert linear["error"] < linear["wanda_error"], "solved in the Gram of all experts"
    assert {linear["rows"] for linear in report["blocks"][1]["linears"] if "_attn" in linear["name"]} == {96}
    assert all(linear["warnings"][0] in report["blocks"][1]["warnings"] for linear in starved)
    write_report(folder, folder.parent / "report.html")
    assert starved[0]["warnings"][0][-40:] in html.unescape((folder.parent / "report.html").read_text())


def test_matching_lowers_the_loss(folder: Path) -> None:
    for block in read_run(folder).blocks:
        assert block.matching is not None
        assert block.matching.applied


def test_the_loaded_model_is_the_dense_one_that_holds_s_plus_uv(folder: Path) -> None:
    loaded = streamslr.load(folder, "cpu", dtype="float32")
    linears = [linear for block in read_run(folder).blocks for linear in block.linears]
    assert len(packed_modules(loaded)) == len(linears)
    torch.testing.assert_close(logits(loaded), logits(dense_model(folder)), rtol=1e-4, atol=1e-4)
    models: list[Any] = [loaded, dense_model(folder)]
    one, other = (m.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False) for m in models)
    assert torch.equal(one, other)


def test_saved_by_transformers_it_loads_and_evaluates_again(folder: Path, text: Path, tmp_path: Path) -> None:
    loaded = streamslr.load(folder, "cpu")
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(streamslr.load(tmp_path / "saved", "cpu")), logits(loaded))
    shutil.copy(folder / "tokenizer.json", tmp_path / "saved")
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "saved")
    figures = [
        evaluate(str(f), text, 16, windows=4, device="cpu", free_memory=free_host_memory()).perplexity
        for f in (folder, tmp_path / "saved")
    ]
    assert figures[0] == figures[1]


def test_the_dense_export_is_what_plain_transformers_loads(model: Path, folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "dense", "dense", torch.float32)
    assert set(open_checkpoint(str(tmp_path / "dense")).tensors) == set(open_checkpoint(str(model)).tensors)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(exported), logits(dense_model(folder)))


def test_peft_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"experts\.0\.\w+ is an expert's: .* --to dense"):
        export(folder, tmp_path / "peft", "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.slow
def test_u_and_v_of_experts_can_be_fine_tuned(mixtral: Path, text: Path, tmp_path: Path) -> None:
    record = finetune(mixtral / "slr", text, tmp_path / "tuned", seq_len=32, batch=4, lr=0.05, steps=6, device="cpu")
    assert record.loss_after < record.loss_before
    assert verify(tmp_path / "tuned").problems == ()
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    before, after = (open_checkpoint(str(f)).read([name])[name] for f in (mixtral / "slr", tmp_path / "tuned"))
    assert not torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize(("die_at", "counting", "lose_scratch"), [*slow((13, "renames", False)), (75, "work", True)])
def test_killed_it_goes_on_to_the_same_bytes(
    mixtral: Path, text: Path, tmp_path: Path, die_at: int, counting: str, lose_scratch: bool
) -> None:
    settings = {"model": mixtral / "model", "out": tmp_path / "slr", "calibration": text, **RUN}
    assert compress_in_child(settings, die_at, counting) == -9
    assert len(json.loads((tmp_path / "slr" / "streamslr.json").read_text())["blocks"]) == 1
    if lose_scratch:  # the finished block is passed again, packed experts taken apart alike
        shutil.rmtree(tmp_path / "slr" / ".scratch")
    assert compress_in_child(settings) == 0
    assert run_contents(tmp_path / "slr") == run_contents(mixtral / "slr")


def test_what_grams_of_experts_were_made_of_is_gone_before_the_block_is_matched(
    mixtral: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = open_run(RunConfig.of(model=mixtral / "model", out=tmp_path / "out", calibration=text, **RUN))
    context = replace(context, plan=replace(context.plan, expert_gram_bytes_at_once=1))  # each expert for itself
    collect, match, collected = BlockSolver.collect, Passes.match, list[WaitingGrams]()

    def collect_and_note(*args: Any, **settings: Any) -> Any:
        collected.append((found := collect(*args, **settings))[0])
        assert collected[-1].expert_sums
        assert collected[-1].kept
        return found

    def match_without_them(*args: Any) -> Any:
        assert not any(waiting.expert_sums or waiting.kept for waiting in collected)
        return match(*args)

    monkeypatch.setattr(BlockSolver, "collect", collect_and_note)
    monkeypatch.setattr(Passes, "match", match_without_them)
    run(context)
    assert len(collected) == 2


def test_the_plan_counts_the_grams_of_every_expert_and_what_they_share(mixtral: Path, text: Path) -> None:
    context = open_run(RunConfig.of(model=mixtral / "model", out=mixtral / "other", calibration=text, **RUN))
    (grams,) = (phase.host_bytes for phase in context.plan.phases if phase.name == "grams")
    (load,) = (phase.host_bytes for phase in context.plan.phases if phase.name == "load")
    assert grams - load > 4 * (2 * 64**2 + 5 * 64**2 + 5 * 128**2 + 128**2) - 2**17


@pytest.mark.slow
def test_outliers_of_experts_decide_the_patterns_of_blocks(mixtral: Path, text: Path, tmp_path: Path) -> None:
    settings = RUN | {"pattern": "50%", "owl": 0.1, "match": False}
    state = streamslr.compress(mixtral / "model", tmp_path / "slr", calibration=text, **settings)
    patterns = [{linear.pattern for linear in block.linears} for block in state.blocks]
    assert all(len(of_block) == 1 for of_block in patterns)
    assert patterns[0] != patterns[1]
    assert verify(tmp_path / "slr").problems == ()


@pytest.fixture(scope="module")
def many_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block of DeepSeek-V3 with its 256 experts, of small widths."""
    routing: dict[str, Any] = {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
    widths: dict[str, Any] = {"hidden": 512, "moe_intermediate_size": 64, "intermediate_size": 64}
    folder = tmp_path_factory.mktemp("models") / "deepseek"
    return tiny_checkpoint(folder, "deepseek_v3", blocks=1, first_k_dense_replace=0, **routing, **widths)


@pytest.mark.long
def test_256_experts_in_groups_take_what_was_planned_and_give_the_bytes_of_all_at_once(
    many_experts: Path, text: Path, tmp_path: Path
) -> None:
    settings = {"model": many_experts, "calibration": text, "samples": 8, "seq_len": 64, "device": "cpu"}
    settings |= {"method": "wanda", "rank": 0, "match": False, "check_windows": 0}
    peaks = {}
    for name, budget in (("whole", "8GB"), ("groups", "800MB")):
        assert compress_in_child({**settings, "out": tmp_path / name, "host_mem": budget}) == 0
        measured = read_run(tmp_path / name).blocks[0].measured
        peaks[name] = measured["grams"]["host_peak_bytes"]
        for phase in ("grams", "solve"):
            assert 1 <= measured[phase]["host_planned_bytes"] / measured[phase]["host_peak_bytes"] <= 1.15, phase
    assert measured["grams"]["expert_gram_groups"] > 1
    assert peaks["whole"] - peaks["groups"] > 0.25 * 256 * 4 * (512**2 + 64**2)
    assert run_contents(tmp_path / "whole") == run_contents(tmp_path / "groups")
