"""Settings that fit a card: their bytes are those that a run writes, and what does not fit is not listed."""

from pathlib import Path
from typing import Any

import pytest
import torch

import streamslr
from streamslr.config import RunConfig
from streamslr.errors import InputError
from streamslr.results.fit import settings_that_fit
from streamslr.run.context import open_shape
from tests.support.tiny_models import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama", blocks=2, shards=1)


def some_config(model: Path, text: Path, folder: Path, **changes: Any) -> RunConfig:
    settings = {"samples": 2, "seq_len": 16, "rank": 4, "device": "cpu"} | changes
    return RunConfig.of(model=model, calibration=text, out=folder / "out", **settings)


def test_the_bytes_are_those_that_a_run_stores(model: Path, text: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": model, "calibration": text, "out": tmp_path / "out", "group": 32}
    settings |= {"samples": 2, "seq_len": 16, "rank": 4, "device": "cpu", "method": "eora-wanda", "match": False}
    settings |= {"pattern": "2:4", "values": "int4"}
    state = streamslr.compress(**settings)
    config = RunConfig.of(**settings)
    (ours,) = settings_that_fit(config, open_shape(config)[1], cache_bytes=0, card=10**12)
    assert (ours.pattern, ours.values) == ("2:4", "int4")
    linears = [linear for block in state.blocks for linear in block.linears]
    weights = sum(o * d for o, d in (linear.shape for linear in linears))
    assert ours.bits == pytest.approx(8 * sum(linear.nbytes for linear in linears) / weights)
    assert ours.weight_bytes <= sum(shard.nbytes for shard in state.shards) < ours.weight_bytes + 40_000  # of headers


def test_what_fits_is_listed_the_dense_first_and_of_each_kind_the_largest(
    model: Path, text: Path, tmp_path: Path
) -> None:
    config = some_config(model, text, tmp_path)
    shape = open_shape(config)[1]
    every = settings_that_fit(config, shape, 0, 10**12)
    dense, sparse = ([fit for fit in every if (fit.pattern == "dense") == kind] for kind in (True, False))
    assert every == dense + sparse
    for kind in (dense, sparse):
        assert [fit.needed_bytes for fit in kind] == sorted((fit.needed_bytes for fit in kind), reverse=True)
    card = sparse[3].needed_bytes
    assert settings_that_fit(config, shape, 0, card) == [fit for fit in every if fit.needed_bytes <= card]
    with pytest.raises(InputError, match=r"no setting fits 1\.0 MB: 1:4 in int4 at rank 4 needs"):
        settings_that_fit(config, shape, 0, 10**6)


def test_without_a_rank_what_fits_only_at_rank_0_is_listed_at_rank_0(model: Path, text: Path, tmp_path: Path) -> None:
    config = some_config(model, text, tmp_path, rank=None, pattern="dense", values="int4")
    shape = open_shape(config)[1]
    (ample,) = settings_that_fit(config, shape, 0, 10**12)
    (tight,) = settings_that_fit(config, shape, 0, ample.needed_bytes - 1)
    assert (ample.rank, tight.rank) == (64, 0)
    with pytest.raises(InputError, match=r"dense in int4 at rank 0 needs .*; give a larger card$"):
        settings_that_fit(config, shape, 0, tight.needed_bytes - 1)


def test_dense_without_a_grid_is_not_listed(model: Path, text: Path, tmp_path: Path) -> None:
    shape = open_shape(some_config(model, text, tmp_path))[1]
    found = settings_that_fit(some_config(model, text, tmp_path, values="bf16"), shape, 0, 10**12)
    assert {(fit.pattern, fit.values) for fit in found} == {("4:8", "bf16"), ("2:4", "bf16"), ("1:4", "bf16")}
    with pytest.raises(InputError, match="can have --pattern dense with --values bf16 with --rank 4"):
        settings_that_fit(some_config(model, text, tmp_path, values="bf16", pattern="dense"), shape, 0, 10**12)


def test_what_the_method_cannot_do_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    shape = open_shape(some_config(model, text, tmp_path))[1]
    with pytest.raises(InputError, match="not every linear of the model can have --rank 4 by --method wanda"):
        settings_that_fit(some_config(model, text, tmp_path, method="wanda"), shape, 0, 10**12)
    assert settings_that_fit(some_config(model, text, tmp_path, method="wanda", rank=0), shape, 0, 10**12)


def test_windows_longer_than_the_models_positions_do_not_matter(text: Path, tmp_path: Path) -> None:
    short = tiny_checkpoint(tmp_path / "gpt2", "gpt2", blocks=1, shards=1)
    assert open_shape(some_config(short, text, tmp_path, seq_len=2048))[1].blocks


def test_a_model_that_no_2_4_fits_has_the_others(text: Path, tmp_path: Path) -> None:
    odd = tiny_checkpoint(tmp_path / "odd", blocks=1, shards=1, intermediate_size=50)
    config = some_config(odd, text, tmp_path)
    found = settings_that_fit(config, open_shape(config)[1], 0, 10**12)
    assert {(fit.pattern, fit.values) for fit in found} == {("dense", "int8"), ("dense", "int4")}


def test_a_pattern_and_values_that_are_given_are_the_only_ones_listed(model: Path, text: Path, tmp_path: Path) -> None:
    shape = open_shape(some_config(model, text, tmp_path))[1]
    found = settings_that_fit(some_config(model, text, tmp_path, pattern="4:8"), shape, 0, 10**12)
    assert {fit.pattern for fit in found} == {"4:8"}
    found = settings_that_fit(some_config(model, text, tmp_path, values="fp8/64"), shape, 0, 10**12)
    assert {(fit.pattern, fit.values) for fit in found} == {(name, "fp8/64") for name in ("dense", "4:8", "2:4", "1:4")}


def test_u_and_v_in_int8_are_refused_of_a_checkpoint_in_float16(text: Path, tmp_path: Path) -> None:
    half = tiny_checkpoint(tmp_path / "half", blocks=1, shards=1, dtype=torch.float16)
    with pytest.raises(InputError, match="U and V in int8 cannot go with float16"):
        open_shape(some_config(half, text, tmp_path, low_rank_values="int8"))
    assert open_shape(some_config(half, text, tmp_path, low_rank_values="int8", rank=0))


def test_settings_by_name_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    shape = open_shape(some_config(model, text, tmp_path))[1]
    with pytest.raises(InputError, match="same for all linears: leave --ranks out"):
        settings_that_fit(some_config(model, text, tmp_path, ranks="q_proj=8"), shape, 0, 10**12)
