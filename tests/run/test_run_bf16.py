"""A run that computes in bf16, as on a GPU: what it stores of targets, what it solves, and its resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import streamslr
from streamslr.config import RunConfig
from streamslr.run.block_solver import BlockSolver
from streamslr.run.context import open_run
from streamslr.run.solve_linear import LinearCompressor
from tests.support.compressed_folders import run_contents
from tests.support.tiny_models import tiny_checkpoint


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run on the CPU that computes in bf16, of a float32 model of two blocks."""
    where = torch.device("cpu"), torch.bfloat16
    monkeypatch.setattr("streamslr.run.context.pick_device", lambda name, gpu_required=True, index=0: where)
    model = tiny_checkpoint(tmp_path / "m", blocks=2, shards=1, dtype=torch.float32)
    sizes = {"samples": 4, "seq_len": 16, "rank": 4, "method": "eora-wanda", "match_epochs": 2}
    return {"model": model, "out": tmp_path / "out", "calibration": text, "device": "cpu", **sizes}


def interrupt_at(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = BlockSolver.solve

    def solve(self: BlockSolver, live: Any, *arguments: Any) -> Any:
        if live.index == block:
            raise KeyboardInterrupt
        return original(self, live, *arguments)

    monkeypatch.setattr(BlockSolver, "solve", solve)


@pytest.mark.parametrize("block", [0, 1])
def test_a_resume_reopens_hidden_states_and_targets(
    settings: dict[str, Any],
    block: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    streamslr.compress(**settings)
    with monkeypatch.context() as patch:
        interrupt_at(block, patch)
        with pytest.raises(KeyboardInterrupt):
            streamslr.compress(**settings | {"out": tmp_path / "again"})
    streamslr.compress(**settings | {"out": tmp_path / "again"})
    assert "are lost" not in caplog.text
    assert run_contents(tmp_path / "again") == run_contents(settings["out"])


def test_targets_are_stored_as_float32_and_hidden_states_as_bf16(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        streamslr.compress(**settings)

    def dtype(array: str) -> str:
        described = json.loads((settings["out"] / ".scratch" / array / "zarr.json").read_text())
        return str(described["attributes"]["dtype"])

    assert (dtype("hidden-00001.zarr"), dtype("targets-00001.zarr")) == ("bfloat16", "float32")


def test_the_solver_sees_the_stored_weights(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stored, seen = load_file(settings["model"] / "model.safetensors"), list[str]()
    compress = LinearCompressor.compress

    def spy(self: LinearCompressor, name: str, linear: Any, weight: Callable[[], Tensor], *rest: Any) -> Any:
        assert linear.weight.dtype == torch.bfloat16
        assert torch.equal(weight(), stored[f"{name}.weight"])
        seen.append(name)
        return compress(self, name, linear, weight, *rest)

    monkeypatch.setattr(LinearCompressor, "compress", spy)
    streamslr.compress(**settings)
    assert len(seen) == 14


def test_the_plan_counts_targets_in_float32(settings: dict[str, Any]) -> None:
    matched = open_run(RunConfig.of(**settings | {"match_held_out": 0})).plan.scratch_bytes
    plain = open_run(RunConfig.of(**settings | {"match": False})).plan.scratch_bytes
    assert plain == (2 * 4 + 4 * 4) * 16 * 64 * 2  # four check windows, two boundaries of two streams
    assert matched == plain + 2 * 4 * 16 * 64 * 4
