"""Output to a terminal or a log: names that hold escape sequences, newlines and markup of rich are shown as text."""

import errno
import json
import logging
from pathlib import Path

import pytest
from rich.table import Table
from safetensors import SafetensorError

from streamslr.errors import InputError
from streamslr.printable import printable
from streamslr.terminal import print_json, print_table, report_errors, say, send_log

HOSTILE = "[/b]\x1b[31m\u202egnp\r\n\x9b31m\ud83d[red]"
SHOWN = r"[/b]\x1b[31m\u202egnp\r\n\x9b31m\ud83d[red]"

log = logging.getLogger("streamslr")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Llama-3 größer 模型 ≈", "Llama-3 größer 模型 ≈"),
        (HOSTILE, SHOWN),
        ("\u2028\u2066\u200f\x7f\0", r"\u2028\u2066\u200f\x7f\x00"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_only_what_prints_is_left(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert shown.isprintable()


def test_messages_and_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    assert capsys.readouterr().out == f"{SHOWN}\n"
    with pytest.raises(SystemExit) as ended, report_errors():
        raise InputError(f"{HOSTILE} is no model")
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"streamslr: {SHOWN} is no model\n"
    with pytest.raises(SystemExit), report_errors():
        raise FileNotFoundError(2, "No such file", HOSTILE)
    assert capsys.readouterr().err.count("\n") == 1
    say("x" * 10**6)
    assert len(capsys.readouterr().out) < 5000


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (SafetensorError("I/O error: File too large (os error 27)"), 3, "free some space"),
        (OSError(errno.ENOSPC, "No space left on device", "checkpoint"), 3, "free some space"),
        (
            RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/3: file write failed"),
            3,
            "space",
        ),
        (RuntimeError("unable to open file <a> in read-only mode: Too many open files (24)"), 1, "Too many open files"),
    ],
)
def test_limits_of_the_system_are_one_line(
    error: Exception, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, report_errors():
        raise error
    printed = capsys.readouterr().err
    assert (ended.value.code, printed.count("\n")) == (code, 1)
    assert words in printed


def test_a_table_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=HOSTILE, caption=f"two\nlines {HOSTILE}")
    table.add_column("two\nlines", no_wrap=True)
    table.add_row(HOSTILE)
    print_table(table)
    shown = capsys.readouterr().out
    assert shown.count(SHOWN) == 2
    assert shown.replace("\n", "").isprintable()


@pytest.mark.parametrize("quiet", [True, False])
def test_log_lines_are_single_lines_on_the_terminal_and_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    monkeypatch.setattr(log, "propagate", False)  # pytest's report of the test cannot hold such a line
    with send_log(quiet, tmp_path / "run.log"):
        log.warning("%s: a warning", HOSTILE)
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert (tmp_path / "run.log").read_text().splitlines()[0].endswith(f"WARNING {SHOWN}: a warning")


def test_warnings_of_commands_without_a_log_are_single_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", False)  # pytest listens at the root
    with report_errors():
        log.warning("%s: a warning", HOSTILE)
    assert capsys.readouterr().err == f"{SHOWN}: a warning\n"


def test_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"name": HOSTILE, "loss": float("nan"), "path": Path("/a")})
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert json.loads(shown, parse_constant=lambda name: pytest.fail(name)) == {
        "name": HOSTILE,
        "loss": None,
        "path": "/a",
    }
