"""The dense model of a run: the same weights from the first start to the last, or the run names what has changed."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import streamslr
from streamslr.errors import ResumeError, StreamslrError
from streamslr.model.blockwise import BlockwiseModel
from streamslr.results.inspect import read_run
from streamslr.run.loop import Compression
from streamslr.run.samples import median_difference
from tests.support.compressed_folders import edit_journal, run_contents
from tests.support.tiny_models import tiny_checkpoint

BASICS: dict[str, Any] = {"samples": 4, "seq_len": 16, "rank": 4, "device": "cpu", "match_epochs": 2}
BASICS |= {"method": "eora-wanda"}


@pytest.fixture
def settings(text: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of a model that a test may change."""
    model = tiny_checkpoint(tmp_path / "model", blocks=3, shards=3)
    return {"model": model, "out": tmp_path / "out", "calibration": text, **BASICS}


def retrain(model: Path) -> str:
    """Save other weights to the folder of a model, as training does; return the name of the last shard."""
    other = tiny_checkpoint(model.with_name("retrained"), blocks=3, shards=3, seed=1)
    for shard in sorted(other.glob("*.safetensors")):
        shutil.copy(shard, model)
    return shard.name


def stop_at_block(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the next run as Ctrl-C would, before it works on a block."""
    compress_block = Compression.compress_block

    def stopped(self: Compression, i: int, boundary: Any) -> Any:
        if i == number:
            raise KeyboardInterrupt
        return compress_block(self, i, boundary)

    monkeypatch.setattr(Compression, "compress_block", stopped)


def begin(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, blocks: int = 1) -> None:
    """Run the settings up to so many blocks."""
    with monkeypatch.context() as patch:
        stop_at_block(blocks, patch)
        with pytest.raises(KeyboardInterrupt):
            streamslr.compress(**settings)


def test_a_model_that_was_trained_on_is_refused_when_all_is_complete(settings: dict[str, Any]) -> None:
    streamslr.compress(**settings)
    before = run_contents(settings["out"])
    retrain(settings["model"])
    with pytest.raises(ResumeError, match=r"model-0000\d-of-\d+\.safetensors has changed since this run first read it"):
        streamslr.compress(**settings)
    assert run_contents(settings["out"]) == before


def test_a_model_that_was_trained_on_is_refused_in_the_middle(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(settings, monkeypatch)
    retrain(settings["model"])
    with pytest.raises(ResumeError, match=r"mix of two models"):
        streamslr.compress(**settings)


@pytest.mark.slow
def test_blocks_that_are_made_again_are_not_made_of_another_model(settings: dict[str, Any]) -> None:
    streamslr.compress(**settings)
    retrain(settings["model"])
    (settings["out"] / "model-block-00002.safetensors").unlink()
    with pytest.raises(ResumeError, match=r"has changed since"):
        streamslr.compress(**settings)


def test_a_shard_that_is_swapped_while_the_run_works_ends_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_block = BlockwiseModel.load_block

    def swapping(self: BlockwiseModel, i: int, *more: Any) -> Any:
        block = load_block(self, i, *more)
        if i == 2:
            retrain(settings["model"])
        return block

    monkeypatch.setattr(BlockwiseModel, "load_block", swapping)
    with pytest.raises(ResumeError, match=r"has changed since this run first read it"):
        streamslr.compress(**settings)
    assert not read_run(settings["out"]).complete


@pytest.mark.slow
def test_a_model_with_new_times_goes_on_to_the_same_bytes(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    streamslr.compress(**settings)
    unbroken = run_contents(settings["out"])
    shutil.rmtree(settings["out"])
    begin(settings, monkeypatch)
    shutil.move(settings["model"], settings["model"].with_name("moved"))
    settings["model"] = settings["model"].with_name("moved")
    for shard in settings["model"].glob("*.safetensors"):
        os.utime(shard, (1, 1))
    streamslr.compress(**settings)
    assert run_contents(settings["out"]) == unbroken
    streamslr.compress(**settings)


def test_every_shard_of_the_model_is_in_the_journal(settings: dict[str, Any]) -> None:
    state = streamslr.compress(**settings)
    shards = sorted(settings["model"].glob("*.safetensors"))
    assert sorted(state.dense_shards) == sorted(state.dense_times) == [shard.name for shard in shards]


def lose_hidden_states(settings: dict[str, Any]) -> None:
    shutil.rmtree(settings["out"] / ".scratch")


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_replay_that_gives_other_hidden_states_ends_the_run(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    begin(settings, monkeypatch, blocks)
    lose_hidden_states(settings)
    embed = BlockwiseModel.embed
    monkeypatch.setattr(BlockwiseModel, "embed", lambda self, ids: 1.01 * embed(self, ids))
    with pytest.raises(StreamslrError, match=r"differ from those of the first pass by 0\.\d+ of their size"):
        streamslr.compress(**settings)
    assert len(read_run(settings["out"]).blocks) == blocks


def test_a_replay_that_differs_by_rounding_goes_on(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin(settings, monkeypatch, 2)
    lose_hidden_states(settings)
    embed = BlockwiseModel.embed
    monkeypatch.setattr(BlockwiseModel, "embed", lambda self, ids: (1 + 3e-7) * embed(self, ids))
    assert streamslr.compress(**settings).complete
    assert "replayed hidden states differ in their last bits (by " in caplog.text


def test_a_replay_of_a_journal_without_samples_goes_on(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin(settings, monkeypatch, 1)
    lose_hidden_states(settings)
    with edit_journal(settings["out"]) as journal:
        for part in (journal, *journal["blocks"]):
            del part["sample"]
    embed = BlockwiseModel.embed
    monkeypatch.setattr(BlockwiseModel, "embed", lambda self, ids: (1 + 3e-7) * embed(self, ids))
    assert streamslr.compress(**settings).complete
    assert "replayed hidden states differ in their last bits: " in caplog.text


@pytest.mark.parametrize(
    ("before", "now", "difference"),
    [
        ((1.0, -2.0, 3.0), (1.0, -2.0, 3.0), 0.0),
        ((1.0, -2.0, 3.0), (1.02, -2.02, 3.02), 0.01),
        ((1.0, -2.0, 3.0), (1.0, -2.0, 300.0), 0.0),  # one token went to another expert
        ((1.0, None, 3.0), (1.0, None, 3.0), 0.0),
        ((1.0, 2.0, 3.0), (None, None, 3.0), math.inf),
        ((1.0,), (1.0, 2.0, 3.0), math.inf),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0.0),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), math.inf),
        ((), (), 0.0),
    ],
)
def test_samples_differ_by_the_median_of_their_values(
    before: tuple[float | None, ...], now: tuple[float | None, ...], difference: float
) -> None:
    assert median_difference(before, now) == pytest.approx(difference)
