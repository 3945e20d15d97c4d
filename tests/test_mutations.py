"""No mutated file gives a traceback, a hang or another result in silence, whatever the command."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from streamslr.errors import InputError
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import open_checkpoint
from streamslr.results.report.page import render_page
from streamslr.results.verify import verify
from streamslr.run.journal import read_journal
from streamslr.spec.allocation import file_digest
from tests.support.attacks import (
    TARGETS,
    Ground,
    Outcome,
    Target,
    attacked,
    judge,
    make_ground,
    outcome,
    sound_outcome,
)

SEEDS = st.integers(0, 2**32)
ids = [target.name for target in TARGETS]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return make_ground(tmp_path_factory.mktemp("mutations") / "ground")


@pytest.fixture(scope="module")
def sound() -> dict[str, Outcome]:
    """Outcomes on sound files, by command, filled as they are needed."""
    return {}


def a_few(examples: int) -> settings:
    """Return settings for as many examples, the same each time; a seed has nothing to shrink."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        report_multiple_bugs=False,
    )


def open_model(ground: Ground) -> None:
    checkpoint = open_checkpoint(str(ground.dense))
    model = BlockwiseModel(checkpoint, torch.float32, torch.device("cpu"))
    model.run_on_meta(0)
    checkpoint.tokenizer()
    checkpoint.auxiliary_files()


def open_folder(ground: Ground) -> None:
    verify(ground.finished)
    state = read_journal(ground.finished)
    assert state is not None
    render_page(ground.finished, state)
    open_checkpoint(str(ground.finished))


def read_allocation(ground: Ground) -> None:
    file_digest(ground.allocation)


PARSERS: tuple[tuple[str, Callable[[Ground], None]], ...] = (
    ("config.json of a model", open_model),
    ("index of a model", open_model),
    ("header of a model's shard", open_model),
    ("tokenizer.json of a model", open_model),
    ("tokenizer_config.json of a model", open_model),
    ("allocation file", read_allocation),
    ("journal", open_folder),
    ("config.json of a folder", open_folder),
    ("index of a folder", open_folder),
    ("header of a folder's shard", open_folder),
)


@pytest.mark.parametrize(("name", "parse"), PARSERS, ids=[name for name, _ in PARSERS])
@a_few(20)
@given(seed=SEEDS)
def test_a_mutated_file_is_read_or_refused(
    ground: Ground, tmp_path: Path, name: str, parse: Callable[[Ground], None], seed: int
) -> None:
    target = TARGETS[ids.index(name)]
    with attacked(ground, target, seed, tmp_path / "attack") as (copy, _), suppress(InputError):
        parse(copy)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=ids)
@a_few(8)
@given(seed=SEEDS, data=st.data())
def test_every_command_holds(
    ground: Ground, sound: dict[str, Outcome], tmp_path: Path, target: Target, seed: int, data: st.DataObject
) -> None:
    command = data.draw(st.sampled_from(target.commands))
    if command not in sound:
        sound[command] = sound_outcome(ground, command, tmp_path / "sound")
    with attacked(ground, target, seed, tmp_path / "attack") as (copy, done):
        changed = (copy.folder / target.file).read_bytes() != (ground.folder / target.file).read_bytes()
        found = outcome(copy, command, tmp_path / "attack")
    verdict, reason = judge(target, command, found, sound[command], changed)
    assert verdict not in ("failed", "silent"), f"{command}, {done}: {reason}"


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({command for target in TARGETS for command in target.commands}))
def test_a_pipe_or_folder_in_the_place_of_a_file_is_refused(ground: Ground, tmp_path: Path, command: str) -> None:
    files = {target.file for target in TARGETS if command in target.commands}
    for number, file in enumerate(sorted(files)):
        copy = Ground(Path(shutil.copytree(ground.folder, tmp_path / f"{number}" / "ground")))
        path = copy.folder / file
        for make in (os.mkfifo, os.mkdir):
            path.unlink()
            make(path)
            found = outcome(copy, command, tmp_path / f"{number}-{make.__name__}")
            assert found.failure is None, f"{make.__name__} {file}: {found.failure}"
