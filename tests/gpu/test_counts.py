"""What a block costs beside its arithmetic, pinned as numbers, so that a new wait or copy fails a test.

A number that a change lowers is lowered here too. One that rises needs a reason in the commit.
"""

from collections.abc import Callable, Mapping

import pytest
from pretended_gpu import Cost, PretendedGpu
from pretended_gpu.block import SHAPES, BlockRun, run_block, write_sparse_checkpoint

WINDOWS, TOKENS = 4, 256

SOLVER_WAITS = 36
"""Waits in 20 more iterations of all linears: four looks at each support, and two questions to each Gram's inverse."""

MICRO_BATCH_WAITS = {"grams": 0, "match": 0, "propagate": 0}
"""Waits for one more micro-batch of windows; in matching in the first epoch and one that trains."""

EPOCH_WAITS = 1
"""Waits for one more epoch of matching: its loss."""

COPIES = {"embed": (0, 2), "grams": (2, 2), "match": (3, 0), "propagate": (0, 1)}
"""Copies of each window to the device and from it, in windows of bf16; a target is float32 and counts twice. The ids
and the shard are left out."""

EPOCH_COPIES = (0, 0)
"""Copies of each window in one more epoch of matching: they stay on the device."""

ITERATION_BYTES = 45.6
"""Bytes of device memory a weight and iteration of the solver, in the small shape."""


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int, int], BlockRun]:
    """Run the small shape's block with so many iterations, windows and epochs."""
    folder = tmp_path_factory.mktemp("counts") / "model"
    folder.mkdir()
    write_sparse_checkpoint(folder, SHAPES["small"], 4096)
    sizes = {"samples": 2 * WINDOWS, "match_held_out": 0, "seq_len": TOKENS, "rank": 8, "host_mem": 100 * 10**9}

    def run(iterations: int, windows: int, epochs: int) -> BlockRun:
        made = run_block(folder, PretendedGpu(values=False), iterations, windows, epochs, **sizes)
        assert made.plan.micro_batch == WINDOWS
        return made

    return run


@pytest.fixture(scope="module")
def short(run_of: Callable[[int, int, int], BlockRun]) -> Mapping[str, Cost]:
    return run_of(20, WINDOWS, 2).costs


@pytest.fixture(scope="module")
def more_repetitions(run_of: Callable[[int, int, int], BlockRun], short: Mapping[str, Cost]) -> Mapping[str, Cost]:
    """What 20 more iterations and one more epoch cost."""
    longer = run_of(40, WINDOWS, 3).costs
    return {name: cost.plus(short[name], -1) for name, cost in longer.items()}


@pytest.fixture(scope="module")
def more_windows(run_of: Callable[[int, int, int], BlockRun], short: Mapping[str, Cost]) -> Mapping[str, Cost]:
    """What twice as many windows cost more."""
    wider = run_of(1, 2 * WINDOWS, 2).costs
    return {name: cost.plus(short[name], -1) for name, cost in wider.items() if name != "solve"}


def copies(cost: Cost) -> tuple[int, int]:
    window = WINDOWS * TOKENS * SHAPES["small"].hidden * 2
    return cost.h2d // window, cost.d2h // window


def test_the_solver_waits_only_where_it_looks(more_repetitions: Mapping[str, Cost]) -> None:
    assert more_repetitions["solve"].syncs == SOLVER_WAITS
    assert copies(more_repetitions["solve"]) == (0, 0)


def test_an_iteration_moves_no_more_memory_than_it_did(more_repetitions: Mapping[str, Cost]) -> None:
    small = SHAPES["small"]
    keys = small.hidden * small.kv_heads // small.heads
    weights = small.hidden * (2 * small.hidden + 2 * keys + 3 * small.ffn)
    assert more_repetitions["solve"].bytes / 20 / weights == pytest.approx(ITERATION_BYTES, rel=0.01)


def test_a_micro_batch_waits_as_often_as_it_did(more_windows: Mapping[str, Cost]) -> None:
    assert {name: more_windows[name].syncs for name in MICRO_BATCH_WAITS} == MICRO_BATCH_WAITS


def test_a_window_is_copied_as_often_as_it_was(more_windows: Mapping[str, Cost]) -> None:
    assert {name: copies(more_windows[name]) for name in COPIES} == COPIES


def test_one_more_epoch_of_matching_waits_and_copies_as_it_did(more_repetitions: Mapping[str, Cost]) -> None:
    assert more_repetitions["match"].syncs == EPOCH_WAITS
    assert copies(more_repetitions["match"]) == EPOCH_COPIES


def test_what_does_not_depend_on_repetitions_costs_the_same_again(more_repetitions: Mapping[str, Cost]) -> None:
    unchanged = [name for name in more_repetitions if name not in ("solve", "match")]
    assert {name: more_repetitions[name].syncs for name in unchanged} == dict.fromkeys(unchanged, 0)
