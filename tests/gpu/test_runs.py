"""Whole runs of tiny models on the pretended GPU: no mixed devices, and the same bytes on every way to them."""

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pretended_gpu import PretendedGpu

import streamslr
from streamslr.finetune import finetune
from streamslr.results.evaluate import evaluate
from streamslr.results.verify import verify
from streamslr.run.loop import Compression
from tests.support.markers import long, slow
from tests.support.pretended import digests, run_on_gpu
from tests.support.tiny_models import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama", blocks=2, hidden=32)


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "short", blocks=1, hidden=32)


@pytest.fixture(scope="module")
def finished(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of an uninterrupted run, read only, and the digests of its shards."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, digests(run_on_gpu(model, text, out)[0])


@pytest.mark.parametrize(
    "plan",
    [
        {"grams_at": "device", "in_memory": True},
        {"grams_at": "host", "in_memory": False},
        {"solved_at": "host"},
        *slow({"grams_at": "disk", "in_memory": True}),
    ],
    ids=str,
)
def test_where_grams_solved_linears_and_hidden_states_wait_does_not_change_a_byte(
    model: Path, text: Path, tmp_path: Path, finished: tuple[Path, list[str]], plan: dict[str, Any]
) -> None:
    assert digests(run_on_gpu(model, text, tmp_path / "out", plan)[0]) == finished[1]


class StoppedError(Exception):
    """A run that ends between two blocks."""


@pytest.mark.parametrize("lost", [False, True], ids=["resumed", "replayed"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, finished: tuple[Path, list[str]], lost: bool
) -> None:
    """Replayed: the hidden states are lost, so the finished block is passed again."""
    original = Compression.compress_block

    def stop_before_the_second(compression: Compression, i: int, boundary: Any) -> Any:
        if i == 1:
            raise StoppedError
        return original(compression, i, boundary)

    out = tmp_path / "out"
    with mock.patch.object(Compression, "compress_block", stop_before_the_second), pytest.raises(StoppedError):
        run_on_gpu(model, text, out)
    if lost:
        shutil.rmtree(out / ".scratch")
    assert digests(run_on_gpu(model, text, out)[0]) == finished[1]


def test_the_solver_in_tiles_and_unstructured_patterns_mix_no_devices(
    one_block: Path, text: Path, tmp_path: Path
) -> None:
    state, _ = run_on_gpu(one_block, text, tmp_path / "out", {"solver_workspace": 1}, pattern="50%")
    assert len(state.blocks) == 1


@pytest.mark.parametrize(("pattern", "values"), [("2:4", "int4"), *long(("50%", "int4"), ("dense", "fp8"))])
def test_values_on_a_grid_mix_no_devices_and_come_twice_the_same(
    one_block: Path, text: Path, tmp_path: Path, pattern: str, values: str
) -> None:
    one, again = (
        digests(run_on_gpu(one_block, text, tmp_path / name, pattern=pattern, values=values, group=16)[0])
        for name in ("one", "again")
    )
    assert one == again


@pytest.mark.parametrize(
    "method",
    [*slow("eora-wanda", "sparsegpt"), *long("alps", "oats", "hassle-free-sparsegpt", "magnitude")],
)
def test_every_kind_of_method_mixes_no_devices(one_block: Path, text: Path, tmp_path: Path, method: str) -> None:
    rank = 0 if method in ("sparsegpt", "alps", "magnitude") else 4
    state, _ = run_on_gpu(one_block, text, tmp_path / "out", method=method, rank=rank, match=False)
    assert len(state.blocks) == 1


@pytest.mark.parametrize(
    "architecture",
    ["gpt_neox", *slow("mixtral", "gemma2", "opt", "bloom", "falcon", "gptj", "phi3", "deepseek_v3")],
)
def test_other_architectures_mix_no_devices(
    architecture: str, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_checkpoint(tmp_path / "model", architecture, blocks=2 if architecture == "deepseek_v3" else 1)
    state, _ = run_on_gpu(model, text, tmp_path / "out", method="eora-wanda")
    assert state.complete
    assert "no deterministic form" not in caplog.text


@pytest.mark.slow
def test_owl_mixes_no_devices(model: Path, text: Path, tmp_path: Path) -> None:
    state, _ = run_on_gpu(model, text, tmp_path / "out", method="wanda", rank=0, pattern="50%", owl=0.08, match=False)
    assert state.complete


def test_a_folder_is_evaluated_and_loaded_on_the_device(finished: tuple[Path, list[str]], text: Path) -> None:
    with PretendedGpu():
        on_gpu = evaluate(str(finished[0]), text, 16, windows=4, device="cuda", free_memory=10**10)
        loaded = streamslr.load(finished[0], device="cuda")
        logits = loaded(input_ids=torch.zeros(1, 8, dtype=torch.int64, device="cuda")).logits
        assert logits.is_cuda
    on_cpu = evaluate(str(finished[0]), text, 16, windows=4, device="cpu", free_memory=10**10)
    assert on_gpu.nll == pytest.approx(on_cpu.nll, rel=0.02), "bfloat16 against float32"


@pytest.mark.slow
def test_a_folder_is_finetuned_on_the_device(finished: tuple[Path, list[str]], text: Path, tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]

    try:
        with PretendedGpu():
            record = finetune(finished[0], text, tmp_path / "tuned", seq_len=16, steps=2, batch=2, device="cuda")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert record.steps == 2
    assert not verify(tmp_path / "tuned").problems
