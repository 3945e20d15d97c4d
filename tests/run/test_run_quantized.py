"""Whole runs of models stored in 8 or 4 bits: equal, byte for byte, to runs of the same weights in bf16."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import streamslr
from streamslr.config import RunConfig
from streamslr.model.checkpoint import open_checkpoint
from streamslr.results.evaluate import evaluate
from streamslr.results.export import export
from streamslr.run.context import open_run
from tests.support.quantized import LAYOUTS, mxfp4_experts, quantize_checkpoint
from tests.support.tiny_models import tiny_checkpoint

LAYOUT_OF_EACH_FAMILY = (
    *("fp8 blocks", "float channel", "int8 groups, zeros", "int4 groups, zeros", "gptq", "awq"),
    *("nf4 nested", "llm.int8"),
)
FREE = 10**10


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "m", blocks=2, shards=1)


def settings(model: Path, out: Path, text: Path, **more: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"samples": 4, "seq_len": 16, "rank": 4, "match_epochs": 2, "match_batch": 2}
    return {"model": model, "out": out, "calibration": text, "device": "cpu", "host_mem": "4GB", **sizes, **more}


@pytest.mark.parametrize("layout", LAYOUT_OF_EACH_FAMILY)
def test_a_run_makes_the_shards_of_the_dense_twin(source: Path, text: Path, tmp_path: Path, layout: str) -> None:
    quantize_checkpoint(source, tmp_path / "quantized", tmp_path / "twin", LAYOUTS[layout])
    for name in ("quantized", "twin"):
        streamslr.compress(**settings(tmp_path / name, tmp_path / f"{name}-out", text))
    shards = {path.name: path.read_bytes() for path in (tmp_path / "twin-out").glob("*.safetensors*")}
    assert len(shards) == 4
    assert {path.name: path.read_bytes() for path in (tmp_path / "quantized-out").glob("*.safetensors*")} == shards
    configs = [(tmp_path / f"{name}-out" / "config.json").read_text() for name in ("quantized", "twin")]
    assert configs[0] == configs[1]
    assert json.loads(configs[0])["quantization_config"]["quant_method"] == "streamslr"
    export(tmp_path / "quantized-out", tmp_path / "dense", "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_reads_what_the_dense_twin_has(source: Path, text: Path, tmp_path: Path, layout: str) -> None:
    quantize_checkpoint(source, tmp_path / "quantized", tmp_path / "twin", LAYOUTS[layout])
    found = [evaluate(str(tmp_path / name), text, 16, windows=4, free_memory=FREE) for name in ("quantized", "twin")]
    assert found[0].nll == found[1].nll


@pytest.mark.parametrize("layout", ["int4 groups", "nf4"])
def test_the_plan_counts_decoded_bytes(source: Path, text: Path, tmp_path: Path, layout: str) -> None:
    quantize_checkpoint(source, tmp_path / "quantized", tmp_path / "twin", LAYOUTS[layout])
    plans = []
    for name in ("quantized", "twin"):
        config = RunConfig(**settings(tmp_path / name, tmp_path / f"{name}-out", text) | {"host_mem": 4 * 10**9})
        plans.append(open_run(config).plan)
    assert plans[0].source_bytes == plans[1].source_bytes
    assert plans[0].output_bytes == plans[1].output_bytes


def test_the_plan_holds_no_tensors_that_the_model_does_not_run(source: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "more")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": torch.ones(10**6)}, tmp_path / "more/model.safetensors", {"format": "pt"})
    configs = [settings(model, tmp_path / "out", text, host_mem=4 * 10**9) for model in (source, tmp_path / "more")]
    plans = [open_run(RunConfig(**config)).plan for config in configs]
    assert plans[1].output_bytes - plans[0].output_bytes == 4 * 10**6
    bytes_of = [{phase.name: phase.host_bytes for phase in plan.phases} for plan in plans]
    # What the process holds before the run is in all phases.
    assert bytes_of[0]["embed"] - bytes_of[0]["load"] == bytes_of[1]["embed"] - bytes_of[1]["load"]


def test_files_of_the_quantizer_do_not_travel(source: Path, text: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "quantized", tmp_path / "twin", LAYOUTS["gptq"])
    (tmp_path / "quantized/quantize_config.json").write_text('{"bits": 4}')
    names = {path.name for path in open_checkpoint(str(tmp_path / "quantized")).auxiliary_files()}
    assert "tokenizer.json" in names
    assert "quantize_config.json" not in names


def test_nf4_goes_from_plan_to_load_and_eval_as_the_dense_twin(source: Path, text: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "quantized", tmp_path / "twin", LAYOUTS["nf4"])
    ids, logits, losses = torch.arange(24).view(2, 12), [], []
    for name in ("quantized", "twin"):
        config = settings(tmp_path / name, tmp_path / f"{name}-out", text)
        assert open_run(RunConfig(**config | {"host_mem": 4 * 10**9})).plan.phases
        streamslr.compress(**config)
        with torch.no_grad():
            logits.append(streamslr.load(tmp_path / f"{name}-out")(ids).logits)
        losses.append(evaluate(str(tmp_path / f"{name}-out"), text, 16, windows=4, free_memory=FREE).nll)
    assert torch.equal(logits[0], logits[1])
    assert losses[0] == losses[1]


def test_a_mixture_in_fp8_is_decoded_expert_by_expert(text: Path, tmp_path: Path) -> None:
    made = tiny_checkpoint(tmp_path / "m", "deepseek_v3", blocks=2, shards=1)
    quantize_checkpoint(made, tmp_path / "quantized", tmp_path / "twin", LAYOUTS["fp8 blocks"])
    for name in ("quantized", "twin"):
        streamslr.compress(**settings(tmp_path / name, tmp_path / f"{name}-out", text, match=False))
    shards = {path.name: path.read_bytes() for path in (tmp_path / "twin-out").glob("*.safetensors")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "quantized-out").glob("*.safetensors")} == shards


def test_gpt_oss_in_mxfp4_is_evaluated_and_compressed_as_its_dense_twin(text: Path, tmp_path: Path) -> None:
    made = tiny_checkpoint(tmp_path / "m", "gpt_oss", blocks=2, shards=1)
    tensors, random = load_file(made / "model.safetensors"), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, d, o = tensors.pop(name).shape
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"], _ = mxfp4_experts(experts, d, o, random)
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    config = json.loads((made / "config.json").read_text())
    twin = tmp_path / "twin"
    twin.mkdir()
    for path in made.glob("*.json"):
        (twin / path.name).write_text(path.read_text())
    (made / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    checkpoint = open_checkpoint(str(made))
    save_file(checkpoint.read(checkpoint.tensors), twin / "model.safetensors", {"format": "pt"})
    found = [evaluate(str(folder), text, 16, windows=4, free_memory=FREE) for folder in (made, twin)]
    assert found[0].nll == found[1].nll
    for folder in (made, twin):
        streamslr.compress(**settings(folder, tmp_path / f"{folder.name}-out", text, match=False))
    shards = {path.name: path.read_bytes() for path in (tmp_path / "twin-out").glob("*.safetensors")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "m-out").glob("*.safetensors")} == shards
