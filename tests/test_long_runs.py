"""Runs whose terminal, log or memory ends: they go on, or end with one line."""

import os
from pathlib import Path

import pytest

from tests.support.forkserver import python_script
from tests.support.forkserver import streamslr_command as call
from tests.support.markers import slow

# The command, whose standard output cannot be written.
_WITHOUT_OUTPUT = """
import os, sys
how, *line = sys.argv[1:]
if how == "closed":
    os.close(1)
    sys.stdout = sys.__stdout__ = None
elif how == "full":
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
else:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
from streamslr.cli import main
main(line)
"""

# The command under `ulimit -v`, in kB.
_WITHIN_ADDRESS_SPACE = """
import resource, sys
space, *line = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_AS, (int(space) * 1000,) * 2)
from streamslr.cli import main
main(line)
"""


def run_line(model: Path, text: Path, out: Path) -> list[str]:
    line = ["run", "--model", str(model), "--out", str(out), "--calibration", str(text), "--device", "cpu"]
    return [*line, "--samples", "4", "--seq-len", "16", "--rank", "4", "--method", "eora-wanda", "--no-match"]


@pytest.mark.parametrize("how", ["pipe", *slow("full", "closed")])
def test_a_run_goes_on_when_standard_output_is_gone(how: str, llama: Path, text: Path, tmp_path: Path) -> None:
    script, log = tmp_path / "script.py", tmp_path / "log.txt"
    script.write_text(_WITHOUT_OUTPUT)
    done = python_script(script, how, *run_line(llama, text, tmp_path / "out"), "--log-file", log)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("model-block-*"))) == 2
    assert log.read_text().count("INFO block") == 2
    if how != "closed":  # /dev/null takes everything
        assert done.stderr.count("WARNING") == 1
        assert "going on as with --quiet" in " ".join(done.stderr.split())


@pytest.mark.parametrize(("line", "code"), [(["--help"], 0), (["--version"], 0), (["bogus"], 2), ([], 2)])
@pytest.mark.parametrize("how", ["pipe", "full"])
def test_help_and_usage_need_no_reader(how: str, line: list[str], code: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_WITHOUT_OUTPUT.replace("from streamslr", "os.dup2(1, 2)\nfrom streamslr"))
    assert python_script(script, how, *line).returncode == code


@pytest.mark.parametrize("name", ["logs.txt", *slow("logs/today/run.log")])
def test_the_log_may_lie_in_the_new_output_folder(name: str, llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = [*run_line(llama, text, out), "--quiet", "--log-file", str(out / name)]
    for _ in range(2):  # the second one finds it there
        done = call(*line)
        assert (done.returncode, done.stderr) == (0, "")
    assert (out / name).read_text().count("INFO block") == 2
    assert call("verify", out).returncode == 0


@pytest.mark.parametrize("name", ["out/streamslr.json", "out/model-block-00000.safetensors", "text.txt", "out"])
def test_a_log_goes_into_no_file_of_the_run(name: str, llama: Path, text: Path, tmp_path: Path) -> None:
    own = tmp_path / "text.txt"
    own.write_bytes(text.read_bytes())
    done = call(*run_line(llama, own, tmp_path / "out"), "--log-file", tmp_path / name)
    assert done.returncode == 2
    assert "give one of its own, like run.log" in done.stderr
    assert own.read_bytes() == text.read_bytes()


def test_a_pipe_that_nobody_reads_is_no_log(llama: Path, text: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = call(*run_line(llama, text, tmp_path / "out"), "--quiet", "--log-file", tmp_path / "pipe")
    assert done.returncode == 0
    assert "cannot be written: No such device or address" in " ".join(done.stderr.split())


@pytest.mark.parametrize("log", ["/dev/full", "/dev/null/log.txt"])
def test_a_log_that_cannot_be_written_is_one_warning(log: str, llama: Path, text: Path, tmp_path: Path) -> None:
    done = call(*run_line(llama, text, tmp_path / "out"), "--quiet", "--log-file", log)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING") == 1
    assert f"--log-file {log} cannot be written" in " ".join(done.stderr.split())


def test_too_little_address_space_is_one_line(llama: Path, text: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_WITHIN_ADDRESS_SPACE)
    done = python_script(script, "900000", *run_line(llama, text, tmp_path / "out"))
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "`ulimit -v` allows 900.0 MB" in done.stderr


def test_a_cache_that_cannot_be_read_does_not_stop_a_local_run(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / ("no file system has this name " * 20)))
    assert call(*run_line(llama, text, tmp_path / "out"), "--quiet").returncode == 0
