"""Checkpoints on the hub, over real HTTP against support/hub_server.py."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import load_file, save_file

from streamslr.errors import HubError, InputError, StreamslrError
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import Checkpoint, open_checkpoint
from tests.support.hub_server import Hub, serve_hub
from tests.support.tiny_models import TEXT, tiny_checkpoint

SHARD = "model-0000{}-of-00002.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("made") / "llama", shards=2)
    (folder / "README.md").write_text("never needed")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def names_in(checkpoint: Checkpoint, shard: str) -> list[str]:
    return [name for name, info in checkpoint.tensors.items() if info.shard == shard]


def cached(name: str) -> list[Path]:
    return [path for path in Path(constants.HF_HUB_CACHE).rglob(name) if path.exists()]


def blobs() -> set[int]:
    """Return the sizes of the files that the cache holds."""
    return {path.stat().st_size for path in Path(constants.HF_HUB_CACHE).rglob("blobs/*")}


def failure(model: str, revision: str | None = None) -> StreamslrError:
    with pytest.raises(StreamslrError) as caught:
        open_checkpoint(model, revision)
    return caught.value


# What is fetched, and when


def test_headers_alone_are_read_at_first(hub: Hub, made: Path) -> None:
    commit = hub.add("org/llama", made)
    checkpoint = open_checkpoint("org/llama")
    assert checkpoint.identity == f"hub:org/llama@{commit}"
    assert checkpoint.tensors == open_checkpoint(str(made)).tensors
    assert hub.downloads(".safetensors") == []
    BlockwiseModel(checkpoint, torch.float32, torch.device("cpu")).require_compressible()
    assert hub.downloads(".safetensors") == []
    assert not cached("*.safetensors")


def test_shards_come_one_at_a_time_as_they_are_read(hub: Hub, made: Path) -> None:
    hub.add("org/llama", made)
    checkpoint = open_checkpoint("org/llama")
    for n in (2, 1):
        shard = SHARD.format(n)
        read = checkpoint.read(names_in(checkpoint, shard))
        assert all(torch.equal(read[name], tensor) for name, tensor in load_file(made / shard).items())
        checkpoint.read(names_in(checkpoint, shard))
        assert hub.downloads(".safetensors") == [SHARD.format(2), SHARD.format(1)][: 3 - n]
    assert "README.md" not in hub.downloads()


def test_blocks_stream_from_the_hub_as_from_a_folder(hub: Hub, made: Path) -> None:
    hub.add("org/llama", made)
    ids = torch.arange(20).view(2, 10)

    def logits(model: str) -> torch.Tensor:
        checkpoint = open_checkpoint(model, evict=True)
        blockwise = BlockwiseModel(checkpoint, torch.float32, torch.device("cpu"))
        blockwise.load_non_block()
        hidden = blockwise.embed(ids)
        for i, names in enumerate(blockwise.block_tensors):
            blockwise.load_block(i)
            checkpoint.prefetch(blockwise.block_tensors[min(i + 1, len(blockwise.block_tensors) - 1)])
            _, hidden = blockwise.pass_block(i, hidden)
            blockwise.evict_block(i)
            checkpoint.release(names)
        return blockwise.logits(ids, hidden)

    assert torch.equal(logits("org/llama"), logits(str(made)))


def test_what_is_still_to_download(hub: Hub, made: Path) -> None:
    hub.add("org/llama", made)
    checkpoint = open_checkpoint("org/llama")
    sizes = [(made / SHARD.format(n)).stat().st_size for n in (1, 2)]
    assert checkpoint.download_bytes == sum(sizes)
    checkpoint.read(names_in(checkpoint, SHARD.format(1)))
    assert checkpoint.download_bytes == sizes[1]
    assert open_checkpoint(str(made)).download_bytes == 0


def test_prefetch_fetches_in_the_background_and_only_once(hub: Hub, made: Path) -> None:
    hub.add("org/llama", made)
    checkpoint = open_checkpoint("org/llama")
    names = names_in(checkpoint, SHARD.format(1))
    checkpoint.prefetch(names)
    checkpoint.prefetch(names)
    checkpoint.read(names)
    assert hub.downloads(".safetensors") == [SHARD.format(1)]


def test_what_prefetch_cannot_fetch_read_reports(hub: Hub, made: Path) -> None:
    hub.add("org/llama", made)
    checkpoint = open_checkpoint("org/llama")
    hub.repositories.clear()
    checkpoint.prefetch(checkpoint.tensors)
    with pytest.raises(InputError, match="no model org/llama"):
        checkpoint.read(checkpoint.tensors)


def test_the_commit_is_pinned(hub: Hub, made: Path, tmp_path: Path) -> None:
    commit = hub.add("org/llama", made)
    checkpoint = open_checkpoint("org/llama")
    moved = tiny_checkpoint(tmp_path / "moved", seed=1)
    assert hub.add("org/llama", moved) != commit
    read = checkpoint.read(checkpoint.tensors)
    expected = open_checkpoint(str(made)).read(checkpoint.tensors)
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    assert open_checkpoint("org/llama").identity != checkpoint.identity
    assert open_checkpoint("org/llama", revision=commit).identity == checkpoint.identity


def test_a_revision_by_its_name(hub: Hub, made: Path, tmp_path: Path) -> None:
    old = hub.add("org/llama", made, refs=("main", "v1"))
    hub.add("org/llama", tiny_checkpoint(tmp_path / "new", seed=1))
    assert open_checkpoint("org/llama", revision="v1").identity == f"hub:org/llama@{old}"


def test_a_header_longer_than_the_first_range(hub: Hub, made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "long"))
    tensors = load_file(folder / SHARD.format(1))
    save_file(tensors, folder / SHARD.format(1), metadata={"note": "x" * 300_000})
    hub.add("org/long", folder)
    assert open_checkpoint("org/long").tensors == open_checkpoint(str(folder)).tensors
    assert hub.downloads(".safetensors") == []


def test_a_truncated_shard_is_found_before_it_is_downloaded(hub: Hub, made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "cut"))
    path = folder / SHARD.format(2)
    path.write_bytes(path.read_bytes()[:-500])
    hub.add("org/cut", folder)
    assert f"{SHARD.format(2)} in org/cut at" in str(failure("org/cut"))
    assert hub.downloads(".safetensors") == []


def test_tokenizer_and_auxiliary_files(hub: Hub, made: Path) -> None:
    hub.add("org/llama", made)
    checkpoint = open_checkpoint("org/llama")
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    names = [path.name for path in checkpoint.auxiliary_files()]
    assert names == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert all(path.read_bytes() == (made / path.name).read_bytes() for path in checkpoint.auxiliary_files())
    assert hub.downloads(".safetensors") == []


def test_datasets_are_served_too(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "c4/en").mkdir(parents=True)
    (tmp_path / "c4/en/part.json.gz").write_bytes(b"compressed")
    hub.add("allenai/c4", tmp_path / "c4", kind="dataset")
    path = hf_hub_download("allenai/c4", "en/part.json.gz", repo_type="dataset")
    assert Path(path).read_bytes() == b"compressed"


# Eviction


def test_eviction_deletes_a_shard_once_all_of_it_is_done(hub: Hub, made: Path) -> None:
    hub.add("org/llama", made)
    checkpoint = open_checkpoint("org/llama", evict=True)
    first, second = (names_in(checkpoint, SHARD.format(n)) for n in (1, 2))
    size = (made / SHARD.format(1)).stat().st_size
    tensors = checkpoint.read([*first, *second])
    checkpoint.release(first[:-1])
    assert cached(SHARD.format(1))
    checkpoint.release(first[-1:])
    assert not cached(SHARD.format(1))
    assert size not in blobs()
    assert cached(SHARD.format(2))
    assert tensors[first[0]].isfinite().all()  # what was read stays readable
    again = checkpoint.read(first[:1])
    assert torch.equal(again[first[0]], tensors[first[0]])
    checkpoint.release(first)
    assert not cached(SHARD.format(1))


def test_a_tensor_needed_again_is_not_done(hub: Hub, made: Path) -> None:
    hub.add("org/llama", made)
    checkpoint = open_checkpoint("org/llama", evict=True)
    names = names_in(checkpoint, SHARD.format(1))
    checkpoint.read(names)
    checkpoint.release(names[:-1])
    checkpoint.prefetch(names[:1])
    checkpoint.release(names[-1:])
    assert cached(SHARD.format(1))


def test_without_evict_nothing_is_deleted(hub: Hub, made: Path) -> None:
    hub.add("org/llama", made)
    checkpoint = open_checkpoint("org/llama")
    checkpoint.read(checkpoint.tensors)
    checkpoint.release(checkpoint.tensors)
    assert len(cached("*.safetensors")) == 2


def test_what_was_cached_before_stays(hub: Hub, made: Path) -> None:
    hub.add("org/llama", made)
    hf_hub_download("org/llama", SHARD.format(1))
    checkpoint = open_checkpoint("org/llama", evict=True)
    checkpoint.read(checkpoint.tensors)
    checkpoint.release(checkpoint.tensors)
    assert cached(SHARD.format(1))
    assert not cached(SHARD.format(2))


def test_what_another_revision_uses_stays(hub: Hub, made: Path, tmp_path: Path) -> None:
    hub.add("org/llama", made, refs=("main", "v1"))
    old = open_checkpoint("org/llama", revision="v1")
    old.read(old.tensors)
    newer = Path(shutil.copytree(made, tmp_path / "newer"))
    shutil.copy(tiny_checkpoint(tmp_path / "other", seed=1) / SHARD.format(1), newer)
    hub.add("org/llama", newer)
    new = open_checkpoint("org/llama", evict=True)
    assert new.identity != old.identity
    new.read(new.tensors)
    new.release(new.tensors)
    assert len(cached(SHARD.format(1))) == len(cached(SHARD.format(2))) == 1
    downloads = len(hub.downloads())
    assert old.read(old.tensors)
    assert len(hub.downloads()) == downloads


# Errors, each with what to do


def test_a_missing_model(hub: Hub) -> None:
    error = failure("org/nothing")
    assert isinstance(error, InputError)
    assert "no folder org/nothing" in str(error)
    assert "check the name" in str(error)


def test_a_private_model_looks_missing(hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/mine", made, private=True)
    assert "log in with `hf auth login`" in str(failure("org/mine"))
    hub.tokens.add("secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert open_checkpoint("org/mine").tensors


def test_a_gated_model(hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/gated", made, gated=True)
    for token in ("", "wrong"):
        monkeypatch.setenv("HF_TOKEN", token)
        error = failure("org/gated")
        assert isinstance(error, HubError)
        assert f"ask for access on {hub.url}/org/gated" in str(error)
    hub.tokens.add("secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    checkpoint = open_checkpoint("org/gated")
    assert checkpoint.read(checkpoint.tensors)


def test_a_wrong_revision(hub: Hub, made: Path) -> None:
    hub.add("org/llama", made)
    error = failure("org/llama", "no-such-branch")
    assert isinstance(error, InputError)
    assert "org/llama has no revision no-such-branch" in str(error)


def test_a_repository_without_a_file(hub: Hub, made: Path, tmp_path: Path) -> None:
    for name in (SHARD.format(2), "model.safetensors.index.json", "config.json"):
        folder = Path(shutil.copytree(made, tmp_path / name))
        (folder / name).unlink()
        hub.add(f"org/{name}", folder)
        error = failure(f"org/{name}")
        assert isinstance(error, InputError)
        assert name in str(error)


def test_a_hub_that_is_down(hub: Hub, made: Path) -> None:
    hub.add("org/llama", made)
    hub.status = 503
    error = failure("org/llama")
    assert isinstance(error, HubError)
    assert "503" in str(error)
    assert "check the network" in str(error)


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens there
    error = failure("org/llama")
    assert isinstance(error, HubError)
    assert "check the network" in str(error)


def test_offline_with_and_without_a_cache(hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/llama", made)
    online = open_checkpoint("org/llama")
    online.read(online.tensors)
    online.auxiliary_files()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(hub.requests)
    offline = open_checkpoint("org/llama")
    assert offline.identity == online.identity
    assert offline.read(offline.tensors).keys() == online.tensors.keys()
    assert offline.tokenizer()
    assert len(hub.requests) == requests
    error = failure("org/another")
    assert isinstance(error, HubError)
    assert "unset HF_HUB_OFFLINE" in str(error)
    for path in cached(SHARD.format(2)):
        path.unlink()
    assert f"{SHARD.format(2)} of org/llama is not in the cache" in str(failure("org/llama"))


@pytest.mark.slow
def test_the_environment_says_where_the_hub_is(hub: Hub, made: Path, tmp_path: Path) -> None:
    commit = hub.add("org/llama", made)
    script = (
        "from streamslr.model.checkpoint import open_checkpoint\n"
        "checkpoint = open_checkpoint('org/llama')\n"
        "checkpoint.read(checkpoint.tensors)\n"
        "print(checkpoint.identity)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | hub.environment(tmp_path / "elsewhere"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"hub:org/llama@{commit}"
    assert len(list((tmp_path / "elsewhere").rglob("*.safetensors"))) == 2
