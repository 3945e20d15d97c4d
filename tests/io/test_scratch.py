"""Scratch folders: removed at the end, and by the next one where a kill left them; nothing else is."""

import os
from contextlib import suppress
from pathlib import Path

from streamslr.io.scratch import scratch_folder
from tests.support.forkserver import exit_code

PREFIX = "streamslr-test-"


def die_in_a_scratch_folder(parent: Path) -> None:
    with scratch_folder(PREFIX, parent) as folder:
        (folder / "0.zarr").mkdir()
        os._exit(9)


def test_a_scratch_folder_is_removed_at_the_end_whatever_happens(tmp_path: Path) -> None:
    with suppress(ValueError), scratch_folder(PREFIX, tmp_path) as folder:
        assert folder.parent == tmp_path
        raise ValueError
    assert not list(tmp_path.iterdir())


def test_a_folder_that_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    assert exit_code(die_in_a_scratch_folder, tmp_path) == 9
    (left,) = tmp_path.iterdir()
    with scratch_folder(PREFIX, tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]
        assert folder != left


def test_a_living_folder_a_link_and_other_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "kept")
    (tmp_path / f"{PREFIX}file").write_text("x")
    with scratch_folder(PREFIX, tmp_path) as living, scratch_folder(PREFIX, tmp_path):
        assert living.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"kept", f"{PREFIX}link", f"{PREFIX}file"}
