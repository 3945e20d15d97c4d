"""Work shared out over ranks: what each takes, and commands that torchrun starts."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not in torch's stubs

from streamslr import ranks as ranks_module
from streamslr.errors import InputError, StreamslrError
from streamslr.ranks import Ranks, open_ranks
from streamslr.results.evaluate import evaluate
from streamslr.results.inspect import read_run
from streamslr.results.verify import verify
from tests.support.compressed_folders import run_contents
from tests.support.markers import long, slow
from tests.support.started_ranks import StartedRanks


@given(world=st.integers(1, 40), count=st.integers(0, 500))
def test_each_thing_is_one_ranks_and_shares_differ_by_one_at_most(world: int, count: int) -> None:
    if count < world:
        with pytest.raises(InputError, match=f"{count} windows cannot be shared out over {world} ranks"):
            Ranks(0, world).share(count, "windows")
        return
    shares = [Ranks(rank, world).share(count, "windows") for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_without_torchrun_a_process_is_alone() -> None:
    with open_ranks() as ranks:
        assert ranks == Ranks()
        assert ranks.sum(1 / 3) == 1 / 3


def test_a_rank_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "_LONGEST_START", timedelta(milliseconds=10))
    with pytest.raises(StreamslrError, match=r"rank 1, 2 has not started in .*; its own messages say why"):
        ranks_module._wait_for_start(HashStore(), 0, 3)


def evaluate_own_text(ranks: Ranks, folder: Path, texts: list[Path]) -> float:
    return evaluate(
        str(folder), texts[ranks.rank], seq_len=16, windows=4, device="cpu", free_memory=10**9, ranks=ranks
    ).nll


def test_ranks_that_see_other_texts_are_refused(compressed: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Something else. " + text.read_text())
    results = StartedRanks(2, tmp_path, evaluate_own_text, compressed, [text, other]).results()
    assert results == ["InputError: ranks see different models or texts; give all of them the same"] * 2


STANDALONE = ("--standalone",)


def start(ranks: int, *line: object, fault: tuple[str, str] | None = None, where: tuple[str, ...] = STANDALONE) -> Any:
    """Start a command by torchrun; with a fault, (rank, what), as `run_with_fault` does."""
    launch = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(ranks), "-m"]
    program = ["streamslr"] if fault is None else ["tests.support.killing", *fault]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, *program, *map(str, line)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@dataclass(frozen=True)
class Ended:
    """A command that torchrun ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def said(self) -> list[str]:
        """What streamslr said on standard error: torchrun has many lines of its own."""
        return [line for line in self.stderr.splitlines() if line.startswith("streamslr")]


def wait(started: Any, seconds: float = 120) -> Ended:
    """Wait for its end.

    Raises:
        TimeoutExpired: It still worked after so many seconds, and was killed.
    """
    try:
        stdout, stderr = started.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        started.kill()
        raise
    return Ended(started.returncode, stdout, stderr)


def torchrun(ranks: int, *line: object, fault: tuple[str, str] | None = None) -> Ended:
    return wait(start(ranks, *line, fault=fault))


@pytest.mark.long
def test_perplexity_does_not_depend_on_the_number_of_ranks(compressed: Path, text: Path) -> None:
    line = ("eval", compressed, "--text", text, "--seq-len", 16, "--windows", 7, "--device", "cpu", "--json")
    found = []
    for ranks in (1, 3):
        done = torchrun(ranks, *line)
        assert done.code == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[1].pop("nll") == pytest.approx(found[0].pop("nll"), rel=1e-12)
    assert found[1].pop("perplexity") == pytest.approx(found[0].pop("perplexity"), rel=1e-12)
    assert found[1] == found[0]


@pytest.mark.slow
def test_what_is_not_shared_out_is_refused(compressed: Path, text: Path) -> None:
    refused = {
        "finetune cannot be shared out over 2 ranks yet": ("finetune", compressed, "--data", text, "--out", "none"),
        "1 windows cannot be shared out over 2 ranks": (
            *("eval", compressed, "--text", text, "--seq-len", 16, "--windows", 1, "--device", "cpu"),
        ),
    }
    for message, line in refused.items():
        done = torchrun(2, *line)
        assert done.code == 1  # torchrun's own
        # torchrun ends the others once one has ended, so which rank comes to say it is a matter of time
        assert re.search(rf"streamslr, rank [01]: {re.escape(message)}", done.stderr)


@pytest.fixture
def run_line(llama: Path, text: Path, tmp_path: Path) -> tuple[object, ...]:
    """A line of `run` into tmp_path/out."""
    settings = ("--samples", 4, "--seq-len", 16, "--rank", 4, "--method", "eora-wanda", "--match-epochs", 2)
    return ("run", "--model", llama, "--out", tmp_path / "out", "--calibration", text, "--device", "cpu", *settings)


@pytest.fixture(scope="module")
def unbroken(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an unbroken run of that line by two ranks writes."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    settings = ("--samples", 4, "--seq-len", 16, "--rank", 4, "--method", "eora-wanda", "--match-epochs", 2)
    line = ("run", "--model", llama, "--out", out, "--calibration", text, "--device", "cpu", *settings, "--quiet")
    done = torchrun(2, *line)
    assert (done.code, done.stdout, done.said) == (0, "", [])
    return run_contents(out)


@pytest.mark.slow
def test_rank_0_speaks_for_all(run_line: tuple[object, ...], tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    log = tmp_path / "run.log"
    done = torchrun(2, *run_line, "--log-file", log)
    assert done.code == 0, done.stderr
    assert done.said == []
    stdout = " ".join(done.stdout.split())
    for block in ("block 1 of 2, model.layers.0", "block 2 of 2, model.layers.1"):
        assert (log.read_text().count(block), stdout.count(block)) == (1, 1)
    assert (stdout.count("on each of 2 ranks"), stdout.count("2 of 2 blocks")) == (1, 1), "a plan and a result"
    assert verify(tmp_path / "out").problems == ()
    assert run_contents(tmp_path / "out") == unbroken


@pytest.mark.parametrize("rank", [*long("0"), *slow("1")])
def test_a_killed_rank_ends_all_with_one_line_and_the_same_line_goes_on(
    run_line: tuple[object, ...], tmp_path: Path, unbroken: dict[str, bytes], rank: str
) -> None:
    done = wait(start(2, *run_line, fault=(rank, "kill")), seconds=60)
    assert done.code == 1
    (said,) = done.said
    advice = r"killed, perhaps for memory\. Finished blocks are kept; start the same line again"
    other = 1 - int(rank)
    assert re.fullmatch(rf"streamslr, rank {other}: rank {rank} \(process \d+\) ended without a word: {advice}", said)
    assert len(read_run(tmp_path / "out").blocks) == 1
    assert torchrun(2, *run_line).code == 0
    assert run_contents(tmp_path / "out") == unbroken


@pytest.mark.long
def test_ctrl_c_ends_all_with_one_line(run_line: tuple[object, ...], tmp_path: Path) -> None:
    done = wait(start(2, *run_line, fault=("1", "interrupt")), seconds=60)
    assert done.code != 0
    (said,) = done.said
    kept = rf"interrupted; finished blocks are kept, and the same line goes on in {re.escape(str(tmp_path / 'out'))}"
    assert re.fullmatch(rf"streamslr, rank [01]: {kept}", said)


def start_nodes(*line: object, ranks: int = 1, fault: tuple[str, str]) -> list[Any]:
    """Start two agents of torchrun, that meet on a port of this machine; each counts as a node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test")
    return [start(ranks, *line, fault=fault, where=(*meet, "--local-addr", "127.0.0.1")) for _ in range(2)]


@pytest.mark.long
def test_two_nodes_share_a_run_out(run_line: tuple[object, ...], tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    done = [wait(node) for node in start_nodes(*run_line, "--quiet", fault=("none", ""))]
    assert [(node.code, node.stdout, node.said) for node in done] == [(0, "", [])] * 2, done
    assert run_contents(tmp_path / "out") == unbroken


@pytest.mark.parametrize(("ranks", "rank"), long((1, "1"), (1, "0"), (2, "3")))
def test_a_killed_node_ends_the_other_which_says_so(
    run_line: tuple[object, ...], tmp_path: Path, unbroken: dict[str, bytes], ranks: int, rank: str
) -> None:
    done = [wait(node, seconds=60) for node in start_nodes(*run_line, ranks=ranks, fault=(rank, "kill node"))]
    killed, (left,) = ([node for node in done if (node.code == -9) == gone] for gone in (True, False))
    assert len(killed) == 1
    assert left.code == 1
    (said,) = left.said
    assert re.match(r"streamslr, rank \d: a rank on another machine ended \(.*\)\. Finished blocks are kept", said)
    assert len(read_run(tmp_path / "out").blocks) == 1
    done = [wait(node) for node in start_nodes(*run_line, ranks=ranks, fault=("none", ""))]
    assert [node.code for node in done] == [0, 0], done
    if ranks == 1:
        assert run_contents(tmp_path / "out") == unbroken
