"""Shards that are pinned: each is held to the content that was read first, whatever its size and times say."""

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from streamslr.errors import InputError, ResumeError
from streamslr.model.checkpoint import Checkpoint, open_checkpoint
from streamslr.model.pinned_shards import PinnedShards
from tests.support.tiny_models import tiny_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", blocks=2)


def first_shard(model: Path) -> Path:
    return min(model.glob("*.safetensors"))


def read_and_pinned(model: Path) -> tuple[Checkpoint, PinnedShards]:
    """Open a model and read it whole."""
    checkpoint = open_checkpoint(str(model))
    pinned = checkpoint.pin({}, {})
    checkpoint.read(checkpoint.tensors)
    pinned.check()
    return checkpoint, pinned


def flip_last_byte(path: Path) -> None:
    """Change the file's last byte and nothing else: size and time of writing stay."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_only_shards_that_were_read_have_a_digest(model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    pinned = checkpoint.pin({}, {})
    name = next(info.name for info in checkpoint.tensors.values() if info.shard == first_shard(model).name)
    checkpoint.read([name])
    pinned.check()
    assert list(pinned.digests) == [first_shard(model).name]
    assert sorted(pinned.times) == [path.name for path in sorted(model.glob("*.safetensors"))]


@pytest.mark.parametrize("when", ["before it is read again", "after it was read"])
def test_a_shard_that_changes_while_a_process_works_is_named(model: Path, when: str) -> None:
    checkpoint, pinned = read_and_pinned(model)
    flip_last_byte(first_shard(model))
    if when == "before it is read again":
        checkpoint.read(checkpoint.tensors)
    with pytest.raises(ResumeError, match=rf"{first_shard(model).name} has changed since this run first read it"):
        pinned.check()


def test_a_shard_that_changed_between_two_processes_is_named(model: Path) -> None:
    _, pinned = read_and_pinned(model)
    flip_last_byte(first_shard(model))
    with pytest.raises(ResumeError, match=first_shard(model).name):
        open_checkpoint(str(model)).pin(pinned.digests, pinned.times)


def test_a_change_that_size_and_times_hide_is_found_when_the_shard_is_read(model: Path) -> None:
    _, pinned = read_and_pinned(model)
    flip_last_byte(first_shard(model))
    status = first_shard(model).stat()
    times = {**pinned.times, first_shard(model).name: (status.st_mtime_ns, status.st_ctime_ns)}
    again = open_checkpoint(str(model))
    repinned = again.pin(pinned.digests, times)
    again.read(again.tensors)
    with pytest.raises(ResumeError, match=first_shard(model).name):
        repinned.check()


def test_a_copy_of_the_model_is_the_same_model(model: Path) -> None:
    checkpoint, pinned = read_and_pinned(model)
    for shard in model.glob("*.safetensors"):
        os.utime(shard)
    again = open_checkpoint(str(model)).pin(pinned.digests, pinned.times)
    assert again.digests == pinned.digests
    assert again.times != pinned.times, "so that a later start need not read the shards again"
    checkpoint.read(checkpoint.tensors)
    pinned.check()


def test_a_change_of_what_was_not_read_yet_is_warned_of(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    pinned = open_checkpoint(str(model)).pin({}, {})
    flip_last_byte(first_shard(model))
    open_checkpoint(str(model)).pin(pinned.digests, pinned.times)
    assert f"{first_shard(model)} was written or moved since this run began" in caplog.text
    assert len(caplog.messages) == 1


def test_another_header_than_when_opened_is_refused(model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    checkpoint.pin({}, {})
    path = first_shard(model)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"model.layers.0.mlp.up_proj", b"model.layers.0.mlp.pu_proj", 1))
    with pytest.raises(InputError, match="has another header than when it was opened"):
        checkpoint.read([name for name, info in checkpoint.tensors.items() if info.shard == path.name])


def test_the_index_counts_where_two_shards_hold_a_tensor(model: Path) -> None:
    first, second = sorted(model.glob("*.safetensors"))
    before = open_checkpoint(str(model)).identity
    tensors = load_file(second)
    twice = next(iter(load_file(first)))
    save_file(tensors | {twice: load_file(first)[twice] * 2}, second, {"format": "pt"})
    index = model / "model.safetensors.index.json"
    one = open_checkpoint(str(model)).identity
    text = index.read_text()
    index.write_text(text.replace(f'"{twice}": "{first.name}"', f'"{twice}": "{second.name}"'))
    assert len({before, one, open_checkpoint(str(model)).identity}) == 3
