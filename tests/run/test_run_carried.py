"""Runs of models whose blocks hand on more than hidden states (Gemma 3n, Gemma 4, GLM-5), or share a layer (Zamba)."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import streamslr
from streamslr.calibration.tokens import text_windows
from streamslr.config import RunConfig
from streamslr.memory import free_host_memory
from streamslr.results.evaluate import evaluate
from streamslr.results.export import export
from streamslr.results.inspect import read_run
from streamslr.results.verify import verify
from streamslr.run.block_solver import BlockSolver
from streamslr.run.context import open_run
from tests.support.compressed_folders import run_contents
from tests.support.killing import compress_by_ranks, compress_in_child
from tests.support.markers import long, slow
from tests.support.tiny_models import tiny_checkpoint

SETTINGS: dict[str, Any] = {"samples": 6, "seq_len": 16, "rank": 4, "device": "cpu", "method": "eora-wanda"}
SETTINGS |= {"match_epochs": 8, "owl": 0.08, "pattern": "50%"}
WINDOWS = 3


@pytest.fixture(scope="module", params=["gemma3n_text", *slow("zamba"), *long("gemma4_text", "glm_moe_dsa")])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tie = tmp_path_factory.mktemp("models") / request.param, request.param == "zamba"
    return tiny_checkpoint(folder, request.param, shards=3, tie=tie)


@pytest.fixture(scope="module")
def compressed(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run. Read only."""
    out = tmp_path_factory.mktemp("compressed") / "out"
    assert compress_in_child({"model": model, "out": out, "calibration": text, **SETTINGS}) == 0
    return out


def perplexity(model: torch.nn.Module, folder: Path, text: Path) -> float:
    """Return the perplexity of a whole model, as `evaluate` defines it."""
    ids = text_windows(AutoTokenizer.from_pretrained(folder), text, 24, WINDOWS)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_matching_lowers_the_loss_of_every_block(compressed: Path) -> None:
    assert verify(compressed).problems == ()
    blocks = read_run(compressed).blocks
    matching = [block.matching for block in blocks if block.matching]
    assert len(matching) == 3
    assert all(match.loss_after is not None and match.loss_after < match.loss_before for match in matching)


@pytest.mark.parametrize("lost", [False, True])
def test_a_killed_run_goes_on_to_the_same_bytes(
    model: Path, compressed: Path, text: Path, tmp_path: Path, lost: bool
) -> None:
    """From the hidden states in the scratch folder, or where these are lost from the embeddings on."""
    settings = {"model": model, "out": tmp_path / "out", "calibration": text, **SETTINGS}
    assert compress_in_child(settings, die_at=15) == -9
    if lost:
        shutil.rmtree(tmp_path / "out/.scratch")
    assert compress_in_child(settings) == 0
    assert run_contents(tmp_path / "out") == run_contents(compressed)


def test_streamed_loaded_and_exported_models_agree(compressed: Path, text: Path, tmp_path: Path) -> None:
    free = free_host_memory()
    streamed = evaluate(str(compressed), text, 24, windows=WINDOWS, device="cpu", free_memory=free).perplexity
    on_disk = evaluate(str(compressed), text, 24, windows=WINDOWS, device="cpu", free_memory=0).perplexity
    export(compressed, tmp_path / "dense", "dense", torch.float32)
    loaded = streamslr.load(compressed, device="cpu", dtype="float32")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert on_disk == streamed
    assert perplexity(loaded, compressed, text) == pytest.approx(streamed, rel=1e-4)
    assert perplexity(exported, compressed, text) == pytest.approx(streamed, rel=1e-4)


def test_what_is_carried_is_planned(model: Path, text: Path, tmp_path: Path) -> None:
    config = RunConfig(model=str(model), out=tmp_path / "out", calibration=text, **SETTINGS)
    context = open_run(config)
    widths, h = context.blockwise.widths(config.seq_len), context.blockwise.hidden_size
    windows = config.samples + config.held_out
    assert max(widths) > h == widths[-1]
    assert context.plan.scratch_bytes >= 2 * windows * config.seq_len * 4 * (max(widths) + h)


def test_tensors_outside_the_linears_have_the_sources_names(model: Path, compressed: Path) -> None:
    source = {name for file in model.glob("*.safetensors") for name in load_file(file)}
    written = {name for file in compressed.glob("*.safetensors") for name in load_file(file)}
    packed = {name.rpartition(".")[0] for name in written if name.endswith(".values")}
    assert source == {name for name in written if name.rpartition(".")[0] not in packed} | {
        f"{name}.weight" for name in packed
    }


@pytest.mark.slow
def test_a_run_in_bf16_resumes_to_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU: what is carried is in bf16, float32 or integers, boundaries in bf16."""
    where = torch.device("cpu"), torch.bfloat16
    monkeypatch.setattr("streamslr.run.context.pick_device", lambda name, gpu_required=True, index=0: where)
    settings: dict[str, Any] = {"model": model, "calibration": text, **SETTINGS}
    streamslr.compress(**settings, out=tmp_path / "whole")
    original = BlockSolver.solve

    def interrupted(self: BlockSolver, live: Any, *arguments: Any) -> Any:
        if live.index == 2:
            raise KeyboardInterrupt
        return original(self, live, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(BlockSolver, "solve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            streamslr.compress(**settings, out=tmp_path / "out")
    streamslr.compress(**settings, out=tmp_path / "out")
    assert "are lost" not in caplog.text
    assert run_contents(tmp_path / "out") == run_contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_share_the_windows(model: Path, compressed: Path, text: Path, tmp_path: Path) -> None:
    settings = {"model": model, "out": tmp_path / "out", "calibration": text, **SETTINGS}
    compress_by_ranks(2, settings)
    assert verify(tmp_path / "out").problems == ()
    assert read_run(tmp_path / "out").hidden_states == read_run(compressed).hidden_states
