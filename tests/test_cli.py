"""The command line as a user sees it: exit codes, output, Ctrl-C, JSON that is only JSON."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import streamslr
from tests.support.forkserver import python_script
from tests.support.forkserver import streamslr_command as call
from tests.support.killing import compress_in_child
from tests.support.markers import slow
from tests.support.tiny_models import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama", blocks=4, shards=3)


@pytest.fixture(scope="module")
def finished(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    settings: dict[str, Any] = {"samples": 4, "seq_len": 16, "rank": 4, "device": "cpu"}
    streamslr.compress(model, out, calibration=text, method="eora-wanda", match_epochs=3, **settings)
    return out


def run_line(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    """Return a line with a method that solves at once."""
    line = ["run", "--model", str(model), "--out", str(out), "--calibration", str(text), "--device", "cpu"]
    line += ["--samples", "4", "--seq-len", "16", "--rank", "4", "--method", "eora-wanda", "--match-epochs", "3"]
    return [*line, *more]


def test_run_prints_the_plan_a_line_a_block_and_the_result(model: Path, text: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "run.log"
    done = call(*run_line(model, text, tmp_path / "out", "--method", "3basil", "--log-file", str(log)))
    assert done.returncode == 0, done.stderr
    assert "plan: 4 blocks on cpu" in done.stdout
    assert "4 of 4 blocks" in " ".join(done.stdout.split()), "whatever the folder's name does to the lines"
    lines = [line for line in log.read_text().splitlines() if " INFO block " in line]
    assert len(lines) == 4
    assert "left" in lines[0]
    assert "peak" in lines[0]


@pytest.mark.slow
def test_the_command_and_the_api_write_the_same(model: Path, text: Path, finished: Path, tmp_path: Path) -> None:
    assert call(*run_line(model, text, tmp_path / "out", "--quiet")).returncode == 0
    for shard in finished.glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.slow
def test_quiet_says_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    done = call(*run_line(model, text, tmp_path / "out", "--quiet"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_without_out_the_same_line_writes_goes_on_and_says_where(
    model: Path, text: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [part for part in run_line(model, text, tmp_path) if part not in ("--out", str(tmp_path))]
    monkeypatch.chdir(tmp_path)
    done = call(*line)
    assert done.returncode == 0, done.stderr
    assert "the output folder is ./llama-slr" in done.stdout
    (tmp_path / "llama-slr" / "model-block-00003.safetensors").unlink()
    again = call(*line)
    assert again.returncode == 0, again.stderr
    assert "llama-slr: 4 of 4 blocks are done, going on" in again.stdout
    for shard in finished.glob("*.safetensors"):
        assert (tmp_path / "llama-slr" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.slow
def test_a_gpu_budget_on_a_cpu_is_warned_of(model: Path, text: Path, tmp_path: Path) -> None:
    done = call(*run_line(model, text, tmp_path / "out", "--quiet", "--gpu-mem", "45GB"))
    assert (done.returncode, done.stdout) == (0, "")
    assert "--gpu-mem 45.0 GB has no effect: the device is cpu" in " ".join(done.stderr.split())


# The command, which gets a signal right after its first block is committed.
INTERRUPTED = """
import os, signal, sys
from streamslr.cli import main
from streamslr.run.journal_writer import Journal

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without it
how, commit = int(sys.argv.pop()), Journal.commit_block

def commit_and_signal(self, record, *settings):
    commit(self, record, *settings)
    if record.index == 0:
        os.kill(os.getpid(), how)

Journal.commit_block = commit_and_signal
main()
"""


@pytest.mark.parametrize("how", [signal.SIGINT, *slow(signal.SIGTERM)])
def test_an_interrupt_stops_cleanly_says_how_to_go_on_and_the_line_does(
    model: Path, text: Path, finished: Path, tmp_path: Path, how: signal.Signals
) -> None:
    line = run_line(model, text, tmp_path / "out")
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    stopped = python_script(tmp_path / "interrupted.py", *line, str(int(how)))
    assert stopped.returncode == 130, stopped.stderr
    assert "interrupted" in stopped.stderr
    assert f"the same line goes on in {tmp_path / 'out'}" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert call(*line).returncode == 0
    for shard in finished.glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--model", "/nowhere/model"], 2, "/nowhere/model"),
        (["--pattern", "2:3:4"], 2, "2:3:4"),
        (["--samples", "4000"], 2, "tokens"),
        (["--host-mem", "1MB"], 3, "--host-mem"),
        (["--host-mem", "lots"], 2, "'lots' is not a size"),
        (["--calibration", "/nowhere/text.txt"], 2, "/nowhere/text.txt does not exist"),
    ],
)
def test_a_users_mistake_is_one_message_and_an_exit_code(
    model: Path, text: Path, tmp_path: Path, change: list[str], code: int, message: str
) -> None:
    done = call(*run_line(model, text, tmp_path / "out", *change))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_tokenizer_that_links_to_elsewhere_is_refused_before_work(model: Path, text: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "m"))
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").symlink_to("/etc/passwd")
    for command in ("plan", "run"):
        done = call(command, *run_line(copy, text, tmp_path / "out")[1:])
        assert done.returncode == 2
        assert "tokenizer.json" in done.stderr
        assert "is a link to /etc/passwd" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("huge", [["--samples"], ["--seq-len"], ["--samples", "--seq-len", "--rank"]])
def test_a_run_of_any_size_is_planned_and_refused(model: Path, huge: list[str]) -> None:
    settings = [part for flag in huge for part in (flag, "2147483647")]
    done = call("plan", "--model", model, "--device", "cpu", *settings)
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1].startswith("streamslr: ")


def test_changed_settings_exit_with_4(model: Path, text: Path, finished: Path) -> None:
    done = call(*run_line(model, text, finished, "--rank", "8"))
    assert done.returncode == 4
    assert "rank: 4 there, 8 now" in done.stderr


def test_inspect_json_is_only_json_and_holds_every_linear(finished: Path) -> None:
    whole = json.loads(call("inspect", finished, "--json").stdout)
    assert whole["complete"]
    assert [block["index"] for block in whole["blocks"]] == [0, 1, 2, 3]
    linear = whole["blocks"][2]["linears"][0]
    assert {"name", "shape", "pattern", "density", "rank", "wanda_error", "error", "iterations"} <= set(linear)
    assert json.loads(call("inspect", finished, "--block", "2", "--json").stdout) == whole["blocks"][2]


@pytest.mark.slow
def test_matching_shows_in_inspect_and_can_be_left_out(model: Path, text: Path, finished: Path, tmp_path: Path) -> None:
    matching = json.loads(call("inspect", finished, "--json", "--block", "1").stdout)["matching"]
    assert len(matching["curve"]) == 3
    assert f"{matching['loss_before']:.3g} → {matching['loss_after']:.3g}" in call("inspect", finished).stdout
    line = run_line(model, text, tmp_path / "out", "--quiet", "--no-match")
    assert call(*line).returncode == 0
    assert json.loads(call("inspect", tmp_path / "out", "--json", "--block", "1").stdout)["matching"] is None


def test_inspect_shows_a_row_a_block_and_a_row_a_linear(finished: Path) -> None:
    table = call("inspect", finished).stdout
    assert "4 of 4 blocks" in " ".join(table.split())
    linears = call("inspect", finished, "--block", "1").stdout
    assert "mlp.down_proj" in linears
    assert "64×128" in linears


def test_inspect_of_what_is_not_there_exits_with_2(finished: Path, tmp_path: Path) -> None:
    assert call("inspect", finished, "--block", "9").returncode == 2
    done = call("inspect", tmp_path)
    assert done.returncode == 2
    assert "not an output folder" in done.stderr


def test_plan_json_needs_no_output_folder(model: Path) -> None:
    done = call("plan", "--model", model, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["blocks"] == 4
    assert {phase["name"] for phase in plan["phases"]} >= {"grams", "solve", "propagate"}


def test_plan_for_ranks_says_what_each_sends_and_who_solves_what(model: Path) -> None:
    of_ranks = ("--world", "3", "--match-batch", "3")
    line = ("plan", "--model", model, "--device", "cpu", "--samples", "8", "--seq-len", "16", *of_ranks)
    shown = call(*line)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "on each of 3 ranks" in " ".join(shown.stdout.split())
    assert "sent a block" in shown.stdout
    assert "model.layers.0: rank 0: " in shown.stdout
    plan = json.loads(call(*line, "--json").stdout)
    assert (plan["world"], len(plan["deal"]["loads"])) == (3, 3)
    assert plan["sent_bytes"] == sum(phase["sent_bytes"] for phase in plan["phases"]) > 0


def test_plan_warns_of_a_match_batch_that_the_ranks_do_not_divide(model: Path) -> None:
    line = ("plan", "--model", model, "--device", "cpu", "--samples", "8", "--seq-len", "16", "--world", "3")
    done = call(*line, "--match-batch", "4")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "--match-batch 4 is no multiple of the 3 ranks" in done.stderr


def test_plan_for_more_ranks_than_windows_is_refused(model: Path) -> None:
    done = call("plan", "--model", model, "--device", "cpu", "--samples", "8", "--seq-len", "16", "--world", "9")
    assert done.returncode == 2
    assert "8 calibration windows cannot be shared out over 9 ranks; start at most 8 ranks" in done.stderr


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.usefixtures("no_gpu")
def test_plan_for_a_gpu_needs_none(model: Path) -> None:
    line = ("plan", "--model", model, "--device", "cuda", "--samples", "4", "--seq-len", "16")
    shown = call(*line)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "4 blocks on cuda" in shown.stdout
    assert "no gpu budget given" in " ".join(shown.stdout.split())
    plan = json.loads(call(*line, "--json").stdout)
    assert (plan["device"], plan["gpu_budget_bytes"]) == ("cuda", None)
    assert all(phase["gpu_bytes"] > 0 for phase in plan["phases"])
    held = call(*line, "--gpu-mem", "45GB")
    assert (held.returncode, held.stderr) == (0, "")
    assert "gpu budget 45.0 GB" in " ".join(held.stdout.split())


@pytest.mark.usefixtures("no_gpu")
def test_plan_for_a_gpu_is_held_to_its_budget(model: Path) -> None:
    done = call("plan", "--model", model, "--device", "cuda", "--gpu-mem", "10kB")
    assert done.returncode == 3
    assert re.search(r"of gpu memory, .* for CUDA itself, the budget is 10\.0 kB; raise --gpu-mem", done.stderr)


@pytest.mark.usefixtures("no_gpu")
def test_run_on_a_gpu_that_is_not_there_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    done = call(*run_line(model, text, tmp_path / "out", "--device", "cuda"))
    assert done.returncode == 2
    assert "--device cuda, but torch sees no GPU here" in done.stderr
    assert not (tmp_path / "out").exists()


def test_plan_says_what_does_not_fit_and_exits_with_3(model: Path) -> None:
    done = call("plan", "--model", model, "--device", "cpu", "--host-mem", "1MB", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["host_bytes"] > 10**6
    assert "--host-mem" in done.stderr


def test_plan_fit_lists_settings_whatever_run_is_in_the_folder(model: Path, finished: Path) -> None:
    done = call("plan", "--model", model, "--out", finished, "--fit", "48GB", "--values", "int4", "--json")
    assert done.returncode == 0, done.stderr
    assert {(entry["pattern"], entry["values"]) for entry in json.loads(done.stdout)} >= {("dense", "int4")}
    done = call("plan", "--model", model, "--fit", "48GB", "--world", "2")
    assert done.returncode == 2
    assert "leave --world 2 out" in done.stderr


def test_verify_exits_with_1_and_names_what_is_off(finished: Path, tmp_path: Path) -> None:
    assert call("verify", finished).returncode == 0
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "model-block-00001.safetensors").unlink()
    done = call("verify", copy)
    assert done.returncode == 1
    assert "model-block-00001.safetensors: is missing" in done.stdout


def test_verify_says_that_a_killed_run_goes_on(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings: dict[str, Any] = {"samples": 4, "seq_len": 16, "rank": 4, "device": "cpu", "match": False}
    settings |= {"model": model, "out": out, "calibration": text, "method": "eora-wanda"}
    assert compress_in_child(settings, die_at=0) == -9
    assert "a run was stopped here before it began; the same `streamslr run` line begins" in call("verify", out).stderr
    for renames in (1, 3, 8):
        assert compress_in_child(settings, die_at=renames) == -9
        done = call("verify", out)
        assert done.returncode == 0, done.stdout
        assert "no problems" in done.stdout
        assert "unfinished, the same `streamslr run` line goes on" in done.stdout


def test_eval_json_has_the_perplexity(finished: Path, text: Path) -> None:
    done = call("eval", finished, "--text", text, "--seq-len", "16", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["perplexity"] > 1


def test_export_says_how_to_load_and_serve_what_it_made(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "my out"
    done = call("export", finished, out, "--to", "peft")
    assert (done.returncode, done.stderr) == (0, "")
    assert f'from_pretrained("{out}/adapter")' in done.stdout
    assert f"vllm serve '{out}/base' --enable-lora --max-lora-rank 8 --lora-modules slr='{out}/adapter'" in done.stdout
    refused = call("export", finished, out, "--to", "dense")
    assert (refused.returncode, refused.stdout) == (4, "")
    assert "holds another export" in refused.stderr


def test_eval_without_text_and_tasks_is_refused(finished: Path) -> None:
    done = call("eval", finished)
    assert done.returncode == 2
    assert "--tasks" in done.stderr


@pytest.mark.slow
def test_methods_are_listed_for_people_and_programs() -> None:
    script = str(Path(sys.executable).with_name("streamslr"))  # as it is installed
    shown = subprocess.run([script, "methods"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "3basil" in shown.stdout
    listed = {method["name"]: method for method in json.loads(call("methods", "--json").stdout)}
    assert listed["wanda"] == {
        "name": "wanda",
        "paper": "arXiv 2306.11695",
        "gram": "diagonal",
        "patterns": "n:m, p%, p%/row, dense",
        "rank": "0",
        "package": "streamslr",
    }


def test_rank_with_a_method_of_pure_sparsity_is_refused_before_work(model: Path, text: Path, tmp_path: Path) -> None:
    done = call(*run_line(model, text, tmp_path / "out", "--method", "wanda"))
    assert done.returncode == 2
    assert "method wanda is pure sparsity" in done.stderr
    assert not (tmp_path / "out").exists()
