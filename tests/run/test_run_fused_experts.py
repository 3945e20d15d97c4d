"""Experts that a checkpoint stores fused, end to end: compressed, resumed, loaded, exported, saved and evaluated."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import streamslr
from streamslr.memory import free_host_memory
from streamslr.model.checkpoint import open_checkpoint
from streamslr.results.evaluate import evaluate
from streamslr.results.export import export
from streamslr.results.inspect import read_run, summary
from streamslr.results.verify import verify
from streamslr.runtime.loader import packed_modules
from tests.support.architectures import save, shrunk_config
from tests.support.compressed_folders import run_contents
from tests.support.killing import compress_in_child
from tests.support.markers import slow
from tests.support.tiny_models import tiny_model

PLACES = {
    "qwen3_5_moe_text": "mlp",
    "llama4_text": "feed_forward",
    "gpt_oss": "mlp",
    "granitemoehybrid": "block_sparse_moe",
    "aria_text": "mlp",
}
"""Architecture -> the module of a block that holds its experts."""
ARCHITECTURES = [*slow("qwen3_5_moe_text"), "llama4_text", "gpt_oss", *slow("granitemoehybrid", "aria_text")]
EXPERTS = 4
RUN: dict[str, Any] = {
    "samples": 6,
    "match_held_out": 0,
    "seq_len": 16,
    "rank": 4,
    "device": "cpu",
    "method": "eora-sparsegpt",
    "match_epochs": 4,
}


def checkpoint_of(architecture: str, folder: Path) -> Path:
    """Write a tiny checkpoint whose experts are fused, as those on the hub are."""
    model = tiny_model(shrunk_config(architecture), torch.bfloat16)
    save(model, folder)
    if any(".experts.0." in name for name in open_checkpoint(str(folder)).tensors):
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def model(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(architecture, tmp_path_factory.mktemp("models") / architecture)


@pytest.fixture(scope="module")
def folder(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "slr"
    streamslr.compress(model, out, calibration=text, **RUN)
    return out


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(torch.arange(2, 42).view(2, 20), use_cache=False).logits
    return result


def perplexity(folder: Path, text: Path) -> float:
    return evaluate(str(folder), text, 16, windows=4, device="cpu", free_memory=free_host_memory()).perplexity


def test_each_expert_is_packed_under_a_name_of_its_own(architecture: str, folder: Path) -> None:
    assert verify(folder).problems == ()
    linears = {linear.name for linear in read_run(folder).blocks[1].linears}
    experts = {name for name in linears if ".experts." in name}
    head = f"model.layers.1.{PLACES[architecture]}.experts"
    assert experts == {f"{head}.{e}.{name}" for e in range(EXPERTS) for name in ("gate_up_proj", "down_proj")}


def test_what_is_no_weight_of_an_expert_has_the_sources_bytes(model: Path, folder: Path) -> None:
    source = open_checkpoint(str(model))
    kept = {name for name in source.tensors if name.endswith(("router.weight", "gate.weight", "router.layer.weight"))}
    assert kept
    written = open_checkpoint(str(folder)).read(kept)
    assert all(torch.equal(tensor, written[name]) for name, tensor in source.read(kept).items())


def test_tokens_are_counted_for_the_experts_that_they_are_routed_to(architecture: str, folder: Path) -> None:
    linears = summary(folder, read_run(folder))["blocks"][0]["linears"]
    chosen = shrunk_config(architecture).num_experts_per_tok if architecture != "aria_text" else 2
    for kind in ("gate_up_proj", "down_proj"):
        rows = [
            linear["rows"]
            for linear in linears
            if linear["name"].endswith(f".{kind}") and ".experts." in linear["name"]
        ]
        assert len(rows) == EXPERTS
        assert sum(rows) == 6 * 16 * chosen


def test_matching_lowers_the_loss(folder: Path) -> None:
    matching = read_run(folder).blocks[1].matching
    assert matching is not None
    assert matching.applied
    assert matching.loss_after is not None
    assert matching.loss_after < matching.loss_before


def test_loaded_and_exported_it_is_one_model(folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "dense", "dense", torch.float32)
    loaded = streamslr.load(folder, "cpu", dtype="float32")
    assert len(packed_modules(loaded)) == sum(len(block.linears) for block in read_run(folder).blocks)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(exported), rtol=1e-4, atol=1e-4)


def test_the_dense_export_has_the_layout_of_the_source(model: Path, folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "dense", "dense")
    shapes = [
        {name: (info.shape, info.dtype) for name, info in open_checkpoint(str(path)).tensors.items()}
        for path in (model, tmp_path / "dense")
    ]
    assert shapes[0] == shapes[1]


def test_saved_by_transformers_it_loads_and_evaluates_again(folder: Path, text: Path, tmp_path: Path) -> None:
    loaded = streamslr.load(folder, "cpu")
    save(loaded, tmp_path / "saved")
    assert torch.equal(logits(streamslr.load(tmp_path / "saved", "cpu")), logits(loaded))
    assert perplexity(tmp_path / "saved", text) == perplexity(folder, text)


def test_names_of_a_model_inside_another_are_the_sources(text: Path, tmp_path: Path) -> None:
    model = checkpoint_of("llama4", tmp_path / "model")
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    streamslr.compress(model, tmp_path / "slr", calibration=text, **RUN | {"match": False})
    export(tmp_path / "slr", tmp_path / "dense", "dense")
    assert set(open_checkpoint(str(tmp_path / "dense")).tensors) == set(tensors)
    assert verify(tmp_path / "slr").problems == ()


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_bytes(text: Path, tmp_path: Path) -> None:
    model = checkpoint_of("gpt_oss", tmp_path / "model")
    settings = {"model": model, "calibration": text, **RUN}
    assert compress_in_child(settings | {"out": tmp_path / "whole"}) == 0
    assert compress_in_child(settings | {"out": tmp_path / "slr"}, 13, "renames") == -9
    assert len(json.loads((tmp_path / "slr" / "streamslr.json").read_text())["blocks"]) == 1
    shutil.rmtree(tmp_path / "slr" / ".scratch")  # the finished block is passed again, packed experts taken apart alike
    assert compress_in_child(settings | {"out": tmp_path / "slr"}) == 0
    assert run_contents(tmp_path / "slr") == run_contents(tmp_path / "whole")
