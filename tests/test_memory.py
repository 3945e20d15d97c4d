"""Host memory: what this process holds is told alike on an idle and on a shared machine, and within every limit."""

import resource
import subprocess
import sys

import pytest
import torch

from streamslr.memory import free_host_memory, held, retry_on_oom

_CHILD = """
import sys
import torch
from streamslr.memory import held
for _ in sys.stdin:
    print(held(), flush=True)
"""


def started() -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def reading(child: "subprocess.Popen[str]") -> int:
    assert child.stdin
    assert child.stdout
    child.stdin.write("\n")
    child.stdin.flush()
    return int(child.stdout.readline())


@pytest.mark.slow
def test_what_a_process_holds_does_not_depend_on_its_neighbours() -> None:
    """Two processes that map the same libraries hold each what they held alone."""
    with started() as one:
        alone = reading(one)
        with started() as other:
            reading(other)  # its libraries are mapped
            beside = reading(one)
            other.communicate()
        one.communicate()
    assert beside == pytest.approx(alone, rel=0.02)


def test_free_memory_stays_within_the_address_space(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = free_host_memory()
    space = {resource.RLIMIT_AS: (1, 1)}  # less than the process has mapped
    monkeypatch.setattr(resource, "getrlimit", lambda kind: space[kind])
    assert free_host_memory() == pytest.approx(held(), rel=0.1)
    assert free_host_memory() < unlimited


def test_work_is_cut_and_noted_until_it_fits() -> None:
    pieces, notes = [8], []

    def work() -> int:
        if pieces[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pieces[-1]

    def shrink() -> str | None:
        pieces.append(pieces[-1] // 2)
        return f"windows {pieces[-1]} at a time"

    def note(phase: str, sentence: str) -> None:
        notes.append((phase, sentence))

    assert retry_on_oom(work, shrink, phase="match", device=torch.device("cpu"), note=note) == 2
    assert notes == [("match", f"ran out of memory: windows {left} at a time") for left in (4, 2)]
