"""Durable writes: whole or not there at all; folders that one process holds; disks with space."""

import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from streamslr.errors import BudgetError, ResumeError, StreamslrError
from streamslr.io import durable
from streamslr.io.durable import (
    DiskNeed,
    durable_file,
    file_sha256,
    lock_folder,
    require_disk_space,
    write_file,
    write_json,
)
from streamslr.io.safetensors_file import write_shard


def test_digest_and_bytes_are_those_of_all_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_SLICE", 3)
    path = tmp_path / "x"
    with durable_file(path, 12) as file:
        file.write(b"hello ")
        file.write(memoryview(b"world!"))
        assert (tmp_path / "x.partial").read_bytes() == b"hello world!"
        assert not path.exists()
    assert path.read_bytes() == b"hello world!"
    assert file.sha256 == file_sha256(path) == write_file(tmp_path / "y", b"hello world!")


def test_data_reach_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    def replace(source: Path, target: Path) -> None:
        events.append(f"rename to {Path(target).name}")
        real_replace(source, target)

    real_replace = os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_json(tmp_path / "a.json", {})
    write_shard(tmp_path / "b.safetensors", {}, {})
    assert events == ["file", "rename to a.json", "folder", "file", "rename to b.safetensors", "folder"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_shard(tmp_path / "x.safetensors", {}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_full(descriptor: int, *_: Any, **__: Any) -> Any:
        os.close(descriptor)
        return open("/dev/full", "wb", buffering=0)  # noqa: PTH123

    monkeypatch.setattr(os, "fdopen", open_full)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_names_the_file_and_the_bytes_and_leaves_nothing(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "model-block-00000.safetensors"
    path.write_bytes(b"the one before")
    with pytest.raises(BudgetError, match=r"model-block-00000.safetensors: No space left.* \d{3} bytes"):
        write_shard(path, {"a": torch.ones(8), "b": torch.ones(8, 2)}, {"format": "pt"})
    with pytest.raises(BudgetError, match=r"x\.json: No space left on device; it takes 3 bytes"):
        write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"the one before"


def test_a_quota_that_ends_midway_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(BudgetError, match="File too large"):
            write_shard(tmp_path / "x.safetensors", {"a": torch.zeros(1 << 20)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_source_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise RuntimeError("the solver failed")

    with pytest.raises(RuntimeError, match="the solver failed"):
        write_shard(tmp_path / "x.safetensors", [("a", torch.float32, (2,), fail)], {})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StreamslrError, match=r"cannot write .*gone/x.safetensors: No such file or directory"):
        write_shard(tmp_path / "gone" / "x.safetensors", {}, {})
    (tmp_path / "file").touch()
    with pytest.raises(StreamslrError, match=r"cannot write .*file/x.json: Not a directory"):
        write_json(tmp_path / "file" / "x.json", {})


def test_a_kill_leaves_no_file_under_the_final_name_and_does_not_hinder_the_next(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    program = textwrap.dedent("""
        import os, signal, sys, torch
        from pathlib import Path
        from streamslr.io.safetensors_file import write_shard
        def die():
            os.kill(os.getpid(), signal.SIGKILL)
        one = ("a", torch.float32, (4,), lambda: torch.ones(4))
        write_shard(Path(sys.argv[1]), [one, ("b", torch.float32, (4,), die)], {})
    """)
    killed = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists()
    write_shard(path, {"a": torch.ones(4)}, {})
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(load_file(path)["a"], torch.ones(4))


def test_json_is_sorted_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": 1, "a": ["é", None]})
    text = '{\n  "a": [\n    "é",\n    null\n  ],\n  "b": 1\n}\n'
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == text
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})


# The lock of a folder


def _hold(folder: Path, answer: Any) -> None:
    try:
        with lock_folder(folder, "give another --out"):
            answer.put("held")
    except ResumeError as error:
        answer.put(str(error))


def test_a_locked_folder_is_refused_to_another_process_until_the_block_ends(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    folder = tmp_path / "deep" / "out"

    def elsewhere() -> str:
        process = context.Process(target=_hold, args=(folder, answer))
        process.start()
        said: str = answer.get(timeout=30)
        process.join()
        return said

    with lock_folder(folder, "give another --out"):
        assert elsewhere() == f"another process is writing {folder}; wait for it, or give another --out"
    assert elsewhere() == "held"
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ResumeError, match=r"file/out cannot be made or opened: Not a directory; give another --out"),
        lock_folder(tmp_path / "file" / "out", "give another --out"),
    ):
        pass


# Disk space


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    free = type("Statvfs", (), {"f_bavail": 10, "f_frsize": 100})()
    monkeypatch.setattr(os, "statvfs", lambda path: free)


def test_needs_on_one_disk_are_summed_and_each_is_named(tmp_path: Path, small_disk: None) -> None:
    out, scratch = tmp_path / "not" / "there", tmp_path / "scratch"
    scratch.mkdir()
    require_disk_space(DiskNeed(out, "output", 1000, "move it"), DiskNeed(scratch, "nothing", -5, "never said"))
    with pytest.raises(BudgetError) as caught:
        require_disk_space(
            DiskNeed(out, "output", 600, "give --out on another disk"),
            DiskNeed(scratch, "hidden states", 401, "give --scratch on another disk"),
        )
    assert str(caught.value) == (
        f"{tmp_path} has 1.0 kB free; output 600 B and hidden states 401 B do not fit there. "
        f"Free some, or give --out on another disk, or give --scratch on another disk"
    )


def test_needs_on_different_disks_are_held_against_each(
    tmp_path: Path, small_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.stat

    def stat_of(path: Path, **arguments: Any) -> Any:
        found = real(path, **arguments)
        if path == tmp_path / "b":
            return os.stat_result((*found[:2], found.st_dev + 1, *found[3:]))
        return found

    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.setattr(Path, "stat", stat_of)
    require_disk_space(DiskNeed(tmp_path / "a", "one", 900, ""), DiskNeed(tmp_path / "b", "two", 900, ""))
