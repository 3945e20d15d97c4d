"""Work shared out over ranks: what each takes, and commands that torchrun starts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamslr.errors import InputError
from streamslr.ranks import Ranks, open_ranks


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


def torchrun(ranks: int, *line: object) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, "-m", "streamslr", *map(str, line)], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_perplexity_does_not_depend_on_the_number_of_ranks(compressed: Path, text: Path) -> None:
    line = ("eval", compressed, "--text", text, "--seq-len", 16, "--windows", 7, "--device", "cpu", "--json")
    found = []
    for ranks in (1, 3):
        done = torchrun(ranks, *line)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[1].pop("nll") == pytest.approx(found[0].pop("nll"), rel=1e-12)
    assert found[1].pop("perplexity") == pytest.approx(found[0].pop("perplexity"), rel=1e-12)
    assert found[1] == found[0]


@pytest.mark.slow
def test_what_is_not_shared_out_is_refused(llama: Path, compressed: Path, text: Path) -> None:
    refused = {
        "run cannot be shared out over 2 ranks yet": ("run", "--model", llama),
        "1 windows cannot be shared out over 2 ranks": (
            *("eval", compressed, "--text", text, "--seq-len", 16, "--windows", 1, "--device", "cpu"),
        ),
    }
    for message, line in refused.items():
        done = torchrun(2, *line)
        assert done.returncode == 1  # torchrun's own
        # torchrun ends the others once one has ended, so which rank comes to say it is a matter of time
        assert re.search(rf"streamslr, rank [01]: {re.escape(message)}", done.stderr)
