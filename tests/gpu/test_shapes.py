"""Blocks of true shapes through the run's own code, without memory: the plan holds, and so does the limit."""

import logging
from pathlib import Path

import pytest
from pretended_gpu import PretendedGpu
from pretended_gpu.block import SHAPES, run_block, write_sparse_checkpoint

from tests.support.markers import slow

LEAST, MOST = 1.0, 1.15
"""Planned over measured bytes of each phase."""

CASES = [
    ("8b", 24, 2048, True),
    *slow(
        ("8b", 24, 2048, False),
        ("70b", 45, 2048, True),
        ("70b", 45, 2048, False),
        ("70b", 24, 2048, True),
        ("70b", 24, 2048, False),
        ("70b", 20, 2048, True),
        ("70b", 20, 2048, False),
        ("70b", 45, 8192, True),
        ("70b", 45, 16384, True),
        ("405b", 80, 2048, True),
    ),
]


@pytest.mark.parametrize(("shape", "gigabytes", "tokens", "expandable"), CASES)
def test_every_phase_keeps_to_its_plan_and_to_the_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shape: str, gigabytes: int, tokens: int, expandable: bool
) -> None:
    """The card is larger than the budget, so only the limit holds the run; running out of memory is a warning."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_sparse_checkpoint(folder, SHAPES[shape], 16384, blocks=2)
    gpu = PretendedGpu(values=False, total=141 * 10**9, expandable=expandable)
    budgets = {"gpu_mem": gigabytes * 10**9, "host_mem": 100 * 10**9}
    with caplog.at_level(logging.WARNING, logger="streamslr"):
        run = run_block(folder, gpu, iterations=1, samples=2, seq_len=tokens, **budgets)
    assert "ran out of memory" not in caplog.text
    assert all(peak.reserved <= budgets["gpu_mem"] for peak in run.peaks.values())
    ratios = {phase.name: round(run.plan_over_peak(phase.name), 3) for phase in run.plan.phases}
    wrong = {name: ratio for name, ratio in ratios.items() if not LEAST <= ratio <= MOST}
    assert not wrong, ratios
