"""The main job from a hub: shards one at a time, evicted on request, default calibration, resume."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import streamslr
from streamslr.errors import HubError, InputError
from streamslr.ranks import Ranks
from streamslr.results.verify import verify
from tests.support.hub_server import Hub, serve_hub
from tests.support.killing import compress_as_rank
from tests.support.markers import long, slow
from tests.support.started_ranks import StartedRanks
from tests.support.tiny_models import TEXT, tiny_checkpoint

BLOCKS = 4
RUN: dict[str, Any] = {
    "samples": 4,
    "seq_len": 16,
    "rank": 4,
    "device": "cpu",
    "method": "eora-wanda",
    "match_epochs": 2,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_hub() as server:
        server.use(monkeypatch, tmp_path / "cache")
        server.add("org/model", tiny_checkpoint(tmp_path / "model", blocks=BLOCKS, shards=4))
        yield server


def add_c4(hub: Hub, folder: Path) -> None:
    shard = folder / "en" / "c4-train.00000-of-01024.json.gz"
    shard.parent.mkdir(parents=True)
    lines = [json.dumps({"text": f"{i} " + TEXT, "url": "x"}) for i in range(12)]
    shard.write_bytes(gzip.compress("\n".join(lines).encode()))
    hub.add("allenai/c4", folder, kind="dataset")


def run(out: Path, **more: object) -> None:
    streamslr.compress("org/model", out, **RUN | more)


def weights(cache: Path) -> list[str]:
    return [p.name for p in cache.rglob("model*.safetensors")]


def test_a_hub_model_gives_what_its_folder_gives(hub: Hub, text: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", calibration=text)
    streamslr.compress(tmp_path / "model", tmp_path / "b", calibration=text, **RUN)
    assert verify(tmp_path / "a").problems == ()
    for shard in (tmp_path / "b").glob("*.safetensors"):
        assert (tmp_path / "a" / shard.name).read_bytes() == shard.read_bytes()


def test_evicted_shards_are_fetched_once_and_gone_at_the_end(hub: Hub, text: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", calibration=text, evict_shards=True)
    fetched = hub.downloads(".safetensors")
    assert len(fetched) == len(set(fetched)) >= 3
    assert weights(tmp_path / "cache") == []
    assert verify(tmp_path / "out").problems == ()


def run_as_rank(ranks: Ranks, url: str, cache: Path, settings: dict[str, Any]) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        Hub(url).use(patch, cache)
        return compress_as_rank(ranks, settings)


@pytest.mark.parametrize("settings", [*slow({}), *long({"owl": 0.1, "pattern": "50%", "match": False})])
@pytest.mark.parametrize("evict", [True, *long(False)])
def test_ranks_of_a_machine_fetch_a_shard_once(
    hub: Hub, text: Path, tmp_path: Path, evict: bool, settings: dict[str, Any]
) -> None:
    settings = RUN | {"model": "org/model", "calibration": text, "evict_shards": evict} | settings
    line = (hub.url, tmp_path / "cache", settings | {"out": tmp_path / "out"})
    results = StartedRanks(2, tmp_path, run_as_rank, *line).results()
    assert all(isinstance(result, list) for result in results), results
    fetched = hub.downloads(".safetensors")
    most = 2 if evict and settings.get("owl") else 1  # a survey reads all before block 0
    assert max(Counter(fetched).values()) == most
    assert len(set(fetched)) >= 3
    assert bool(weights(tmp_path / "cache")) is not evict
    assert verify(tmp_path / "out").problems == ()


@pytest.mark.slow
def test_without_evict_the_shards_stay(hub: Hub, text: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", calibration=text)
    assert len(weights(tmp_path / "cache")) >= 3


def test_c4_is_the_default_calibration(hub: Hub, tmp_path: Path) -> None:
    add_c4(hub, tmp_path / "c4")
    run(tmp_path / "out")
    journal = json.loads((tmp_path / "out" / "streamslr.json").read_text())
    assert journal["calibration"] == "allenai/c4/en/c4-train.00000-of-01024.json.gz"


def test_c4_out_of_reach_says_how_to_go_on(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="--calibration FILE"):
        run(tmp_path / "out")


def test_a_plan_downloads_no_weights(hub: Hub, tmp_path: Path) -> None:
    from streamslr.config import RunConfig
    from streamslr.run.context import open_run

    plan = open_run(RunConfig.of(model="org/model", out=tmp_path / "out", device="cpu")).plan
    assert hub.downloads(".safetensors") == []
    assert plan.download_bytes == sum(p.stat().st_size for p in (tmp_path / "model").glob("*.safetensors"))


@pytest.mark.slow
def test_a_moved_branch_is_another_model_for_a_resume(hub: Hub, text: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", calibration=text)
    hub.add("org/model", tiny_checkpoint(tmp_path / "newer", blocks=BLOCKS, shards=4, seed=1))
    with pytest.raises(streamslr.errors.ResumeError, match=r"model: 'hub:org/model@.* there, 'hub:org/model@.* now"):
        run(tmp_path / "out", calibration=text)


def test_a_model_that_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises((InputError, HubError), match="org/other"):
        streamslr.compress("org/other", tmp_path / "out", device="cpu")
