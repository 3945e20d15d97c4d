"""Folders and texts with hostile names: every command works, and its output holds nothing that does not print."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.forkserver import streamslr_command as call

HOSTILE = "[/b]\x1b[31m\n<b>\u202e</script>"


@pytest.fixture(scope="module")
def place(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of such a name, with a model, a text and the folder that `run` makes of them."""
    place = tmp_path_factory.mktemp("names") / HOSTILE
    place.mkdir(parents=True)
    shutil.copytree(llama, place / "[bold]")
    shutil.copy(text, place / "text\x1b.txt")
    done = call(*run_line(place), "--log-file", place / "run.log")
    assert done.returncode == 0, done.stderr
    assert_printable(done.stdout + done.stderr + (place / "run.log").read_text())
    assert r"\x1b[31m\n<b>\u202e" in done.stdout
    return place


def run_line(place: Path) -> list[str]:
    line = ["run", "--model", str(place / "[bold]"), "--out", str(place / "out[/x]")]
    line += ["--calibration", str(place / "text\x1b.txt"), "--samples", "4", "--seq-len", "16", "--rank", "4"]
    return [*line, "--method", "eora-wanda", "--match-epochs", "2", "--device", "cpu"]


def assert_printable(output: str) -> None:
    assert output.replace("\n", "").isprintable(), repr(output)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (["inspect", "out[/x]"], 0),
        (["inspect", "out[/x]", "--block", "1"], 0),
        (["verify", "out[/x]"], 0),
        (["verify", "nothing[/x]\x1b"], 2),
        (["inspect", "[bold]"], 2),
        pytest.param(["report", "out[/x]"], 0, marks=pytest.mark.slow),
        pytest.param(["export", "out[/x]", "exported[/x]", "--to", "dense"], 0, marks=pytest.mark.slow),
        pytest.param(["export", "out[/x]", "adapter\x1b", "--to", "peft"], 0, marks=pytest.mark.slow),
        pytest.param(["eval", "out[/x]", "--text", "text\x1b.txt", "--seq-len", "16"], 0, marks=pytest.mark.slow),
        pytest.param(
            ["finetune", "out[/x]", "--data", "text\x1b.txt", "--out", "tuned\x1b", "--seq-len", "16", "--steps", "1"],
            0,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_output_holds_only_what_prints(place: Path, line: list[str], code: int) -> None:
    names = {"out[/x]", "nothing[/x]\x1b", "[bold]", "exported[/x]", "adapter\x1b", "text\x1b.txt", "tuned\x1b"}
    done = call(*(place / part if part in names else part for part in line))
    assert done.returncode == code, done.stderr
    assert_printable(done.stdout + done.stderr)


def test_json_says_the_name_as_it_is(place: Path) -> None:
    shown = call("inspect", place / "out[/x]", "--json").stdout
    assert shown.isascii()
    assert json.loads(shown)["folder"] == str(place / "out[/x]")


def test_an_output_folder_that_safetensors_cannot_open_is_refused_before_work(llama: Path, tmp_path: Path) -> None:
    done = call("run", "--model", llama, "--out", tmp_path / "n\udcff")
    assert done.returncode == 2
    assert r"n\udcff is no path in UTF-8, which safetensors needs" in done.stderr
    assert list(tmp_path.iterdir()) == []
