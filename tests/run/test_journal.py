"""The journal: its content, its lock, and what it refuses."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from streamslr.errors import InputError, ResumeError, StreamslrError
from streamslr.io.safetensors_file import WrittenShard
from streamslr.run.journal import (
    JOURNAL_FILE,
    BlockRecord,
    JournalState,
    LinearRecord,
    MatchRecord,
    read_journal,
)
from streamslr.run.journal_writer import Journal
from tests.support.compressed_folders import edit_journal

SAMPLE = ((0.5, -1.25), (0.5, None))
NON_BLOCK = WrittenShard("model-outside.safetensors", "a" * 64, 5)


def start(blocks: int = 2, micro_batch: int = 1, **changed: object) -> JournalState:
    return JournalState(FINGERPRINT | changed, "text.txt", blocks, micro_batch)


FINGERPRINT = {"model": "abc", "method": "3basil", "pattern": "2:4", "rank": 16, "tokens": "f00"}


def block(index: int) -> BlockRecord:
    linear = LinearRecord("m.q", (4, 8), "2:4", 0.5, 2, 0.1, 0.01, 40, 1.0, 100, 64, ("damping raised",))
    shard = WrittenShard(f"model-block-{index:05d}.safetensors", "d" * 64, 123)
    measured = {"solve": {"seconds": 1.5, "host_peak_bytes": 10}}
    return BlockRecord(index, f"model.layers.{index}", shard, "e" * 64, (linear,), measured=measured)


def test_what_is_committed_is_read_back_by_the_next_process(tmp_path: Path) -> None:
    with Journal(tmp_path, start(micro_batch=8)) as journal:
        journal.commit_non_block({"config.json": "c" * 64}, NON_BLOCK, "b" * 64, SAMPLE, 8, {})
        journal.commit_block(block(0), 8, None)
        written = journal.state
    assert not written.complete
    with Journal(tmp_path, start()) as journal:
        assert journal.state == written
        assert journal.state.micro_batch == 8, "the first start's choice stays"
        journal.commit_block(block(1), 1, None)
    state = read_journal(tmp_path)
    assert state is not None
    assert state.complete
    assert state.blocks == (block(0), block(1))
    assert state.shards == (NON_BLOCK, block(0).shard, block(1).shard)


def test_every_changed_setting_is_named_with_both_values(tmp_path: Path) -> None:
    Journal(tmp_path, start()).close()
    with pytest.raises(ResumeError, match=r"pattern: '2:4' there, '4:8' now; rank: 16 there, 64 now"):
        Journal(tmp_path, start(rank=64, pattern="4:8"))


def test_a_journal_of_a_model_with_other_blocks_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, start(2)).close()
    with pytest.raises(ResumeError, match=r"streamslr\.json counts 2 blocks, the model has 3"):
        Journal(tmp_path, start(3))


def test_the_folder_is_locked_until_the_journal_is_closed(tmp_path: Path) -> None:
    with Journal(tmp_path, start()), pytest.raises(ResumeError, match="another process is writing"):
        Journal(tmp_path, start())
    Journal(tmp_path, start()).close()


def test_a_folder_with_somebodys_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ResumeError, match=r"model.safetensors.*empty or new folder"):
        Journal(tmp_path, start())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_process_killed_while_it_claimed_the_folder_does_not_block_it(tmp_path: Path) -> None:
    (tmp_path / f"{JOURNAL_FILE}.partial").write_text('{"form')
    Journal(tmp_path, start()).close()
    assert read_journal(tmp_path) is not None


def test_the_newer_version_is_named(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_text(json.dumps({"format_version": 99}))
    with pytest.raises(InputError, match=r"format_version 99; streamslr .* reads 2 and 3"):
        read_journal(tmp_path)


def test_blocks_are_committed_in_order(tmp_path: Path) -> None:
    with Journal(tmp_path, start(3)) as journal, pytest.raises(ValueError, match="block 1 committed"):
        journal.commit_block(block(1), 1, None)


def test_a_folder_of_format_version_2_is_read_under_its_new_names(tmp_path: Path) -> None:
    with Journal(tmp_path, start(1)) as journal:
        journal.commit_non_block({"config.json": "c" * 64}, NON_BLOCK, "b" * 64, SAMPLE, 1, {})
        journal.commit_block(replace(block(0), matching=MatchRecord(0.2, 0.1, True, (0.2, 0.1))), 1, None)
        written = journal.state
    path = tmp_path / JOURNAL_FILE
    old = json.loads(path.read_text()) | {"format_version": 2}
    del old["sha256"]
    for before, now in (
        ("description", "auxiliary_files"),
        ("outside", "non_block"),
        ("solver_room", "solver_workspace"),
    ):
        old[before] = old.pop(now)
    (entry,) = old["blocks"]
    entry["matching"]["kept"] = entry["matching"].pop("applied")
    (linear,) = entry["layers"] = entry.pop("linears")
    linear["error_before"], linear["error_after"] = linear.pop("wanda_error"), linear.pop("error")
    path.write_text(json.dumps(old))
    assert read_journal(tmp_path) == written


def test_a_folder_of_format_version_3_is_read_and_its_digest_checked(tmp_path: Path) -> None:
    with Journal(tmp_path, start(1)) as journal:
        journal.commit_non_block({"config.json": "c" * 64}, NON_BLOCK, "b" * 64, SAMPLE, 1, {})
        journal.commit_block(block(0), 1, None)
        written = journal.state
    path = tmp_path / JOURNAL_FILE
    old = json.loads(path.read_text()) | {"format_version": 3}
    for later in ("check", "quality", "unread"):
        del old[later]
    del old["sha256"]
    digest = hashlib.sha256(json.dumps(old, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps(old | {"sha256": digest}))
    assert read_journal(tmp_path) == written
    path.write_text(json.dumps(old | {"sha256": digest, "blocks_total": 2}))
    with pytest.raises(InputError, match="was changed after it was written"):
        read_journal(tmp_path)


@pytest.mark.parametrize(
    "name", ["../../.bashrc", "/etc/passwd", "..", "", "a/b", "a\0b", ".bashrc", "x.py", "a\x1b[31m.json", 3]
)
@pytest.mark.parametrize("place", ["auxiliary_files", "non_block", "blocks"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, place: str, name: Any) -> None:
    with Journal(tmp_path, start(1)) as journal:
        journal.commit_non_block({"config.json": "c" * 64}, NON_BLOCK, "b" * 64, SAMPLE, 1, {})
        journal.commit_block(block(0), 1, None)
    with edit_journal(tmp_path) as data:
        if place == "auxiliary_files":
            data[place] = {str(name): "c" * 64} if isinstance(name, str) else {"": "c" * 64}
        else:
            shard = data[place] if place == "non_block" else data[place][0]["shard"]
            shard["file"] = name
    with pytest.raises(
        InputError,
        match=r"is damaged: .*(is no file name|which is no auxiliary file|its shard is|Expected `str`, got `int`)",
    ):
        read_journal(tmp_path)


def on_disk(folder: Path, shard: WrittenShard) -> WrittenShard:
    """Write a file for the shard, and return the shard with that file's digest."""
    content = bytes(shard.nbytes)
    (folder / shard.file).write_bytes(content)
    return replace(shard, sha256=hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_a_lost_shard_sends_the_run_back_to_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    non_block = on_disk(tmp_path, WrittenShard("model-outside.safetensors", "", 5))
    blocks = [replace(block(i), shard=on_disk(tmp_path, block(i).shard)) for i in range(3)]
    (tmp_path / JOURNAL_FILE).write_text(json.dumps(asdict(start(3))))
    with Journal(tmp_path, start(3)) as journal:
        journal.commit_non_block({}, non_block, "b" * 64, SAMPLE, 1, {})
        for record in blocks:
            journal.commit_block(record, 1, None)
        journal.forget_lost_shards()
        journal.require_sound_shards()
        assert len(journal.state.blocks) == 3
        path = tmp_path / block(1).shard.file
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(b"short" if damage == "short" else path.read_bytes()[:-1] + b"x")
        with pytest.raises(StreamslrError, match=r"model-block-00001\.safetensors is missing or not .*1 of 4 shards"):
            journal.require_sound_shards()
        journal.forget_lost_shards()
    assert "model-block-00001.safetensors is missing or not as it was written" in caplog.text
    state = read_journal(tmp_path)
    assert state is not None
    assert [b.index for b in state.blocks] == [0]
