"""A run shared out over ranks: it gives what one process gives, and survives what befalls a rank."""

import itertools
import random
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import streamslr
from streamslr.calibration.hidden_states import OnDisk
from streamslr.config import RunConfig
from streamslr.io.durable import lock_folder
from streamslr.matching import CompressedBlock
from streamslr.memory import free_host_memory
from streamslr.model.blockwise import BlockwiseModel
from streamslr.ranks import Ranks
from streamslr.results.evaluate import evaluate
from streamslr.results.inspect import read_run
from streamslr.results.verify import verify
from streamslr.run.block_compressor import BlockCompressor
from streamslr.run.block_solver import BlockSolver
from streamslr.run.context import open_run
from streamslr.run.journal import BlockRecord
from streamslr.run.journal_writer import Journal
from streamslr.run.loop import Compression, run
from streamslr.run.passes import Passes
from streamslr.run.solve_linear import LinearCompressor
from streamslr.solvers.threebasil import ThreeBasil
from tests.support.compressed_folders import run_contents
from tests.support.killing import Fault, compress_as_rank, compress_by_ranks, compress_in_child
from tests.support.markers import long, slow
from tests.support.started_ranks import StartedRanks
from tests.support.tiny_models import TEXT, starved_checkpoint, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = 2
BASICS: dict[str, Any] = {"samples": 7, "seq_len": 16, "rank": 4, "device": "cpu", "method": "eora-wanda"}
BASICS |= {"match_epochs": 2, "match_batch": 4, "match_held_out": 2}  # 5 windows are fitted, 2 held out
MAIN: dict[str, Any] = {"method": "3basil", "match_epochs": 4, "samples": 24, "match_held_out": 0}
ROUNDING_AMPLIFIED = {"error": 0.1, "loss": 0.15}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama", blocks=BLOCKS, shards=3)


@pytest.fixture
def settings(model: Path, text: Path, tmp_path: Path) -> dict[str, Any]:
    return {"model": model, "out": tmp_path / "out", "calibration": text, **BASICS}


@pytest.fixture(scope="module")
def by_two(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run of the settings by two ranks. Read only."""
    out = tmp_path_factory.mktemp("by_two") / "out"
    require_done(compress_by_ranks(2, {"model": model, "out": out, "calibration": text, **BASICS}))
    return out


@pytest.fixture(scope="module")
def unbroken(by_two: Path) -> dict[str, bytes]:
    """Bytes of the files that an unbroken run of the settings by two ranks writes."""
    return run_contents(by_two)


@pytest.fixture(scope="module")
def alone(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the settings by one process. Read only."""
    out = tmp_path_factory.mktemp("alone") / "out"
    streamslr.compress(model, out, calibration=text, **BASICS)
    return out


def require_done(results: list[Any]) -> None:
    assert all(isinstance(result, list) for result in results), results


def blocks_of(folder: Path) -> tuple[BlockRecord, ...]:
    return read_run(folder).blocks


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def require_alike(one: Path, other: Path, error: float = 0.02, loss: float = 0.05) -> None:
    """Assert that two runs found the same but for rounding, which 3basil amplifies until supports differ."""
    for a, b in zip(blocks_of(one), blocks_of(other), strict=True):
        assert [linear.name for linear in a.linears] == [linear.name for linear in b.linears]
        assert [linear.rows for linear in a.linears] == [linear.rows for linear in b.linears]
        assert [linear.error for linear in a.linears] == pytest.approx(
            [linear.error for linear in b.linears], rel=error
        )
        if a.matching or b.matching:
            assert a.matching
            assert b.matching
            assert a.matching.curve == pytest.approx(b.matching.curve, rel=loss)
            assert a.matching.held_out == pytest.approx(b.matching.held_out, rel=loss)
            assert a.matching.applied == b.matching.applied


# What is the same as by one process


@pytest.mark.parametrize("world", [2, *long(3)])
def test_ranks_find_what_one_process_finds(
    settings: dict[str, Any], by_two: Path, alone: Path, text: Path, world: int
) -> None:
    out = by_two if world == 2 else settings["out"]
    if world != 2:
        require_done(compress_by_ranks(world, settings))
    require_alike(out, alone)
    assert verify(out).problems == ()
    assert not (out / ".scratch").exists()
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()}
    perplexity = [
        evaluate(str(folder), text, 16, windows=6, device="cpu", free_memory=free_host_memory()).perplexity
        for folder in (out, alone)
    ]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=0.01)
    assert all(len(seconds) == world for block in blocks_of(out) for seconds in block.seconds_by_rank.values())


def grams_of_block_0(ranks: Ranks, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Return the Grams that this rank solves block 0 in."""
    seen: dict[str, Tensor] = {}
    compress = LinearCompressor.compress

    def watched(self: LinearCompressor, name: str, linear: Any, weight: Any, gram: Tensor, *more: Any) -> Any:
        if ".0." in name:
            seen[name] = gram.clone()
        return compress(self, name, linear, weight, gram, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearCompressor, "compress", watched)
        run(open_run(RunConfig.of(**settings), ranks=ranks))
    return seen


@pytest.mark.parametrize("world", [2, *long(3)])
def test_grams_are_those_of_one_process(settings: dict[str, Any], tmp_path: Path, world: int) -> None:
    settings |= {"match": False}
    whole = grams_of_block_0(Ranks(), settings | {"out": tmp_path / "alone"})
    found = StartedRanks(world, tmp_path, grams_of_block_0, settings).results()
    owned = {name: gram for of_rank in found for name, gram in of_rank.items()}
    assert owned.keys() == whole.keys()
    assert all(of_rank.keys() < whole.keys() for of_rank in found), "each rank solves some"
    for name, gram in whole.items():
        assert (owned[name] - gram).norm() <= 1e-6 * gram.norm(), name


@pytest.mark.parametrize("change", [{}, *long(MAIN, {"method": "wanda", "rank": 0, "match": False})])
def test_ranks_give_the_same_bytes_again_also_with_tiers_on_disk(
    settings: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    settings |= change
    require_done(compress_by_ranks(2, settings))
    on_disk = {"in_memory": False, "grams_at": "disk"}
    require_done(compress_by_ranks(2, settings | {"out": tmp_path / "again"}, plan=on_disk))
    assert run_contents(settings["out"]) == run_contents(tmp_path / "again")
    streamslr.compress(**settings | {"out": tmp_path / "alone"})
    require_alike(settings["out"], tmp_path / "alone", **ROUNDING_AMPLIFIED if change is MAIN else {})


@pytest.mark.slow
def test_a_linear_that_dwarfs_the_rest_is_solved_by_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    wide = tiny_checkpoint(tmp_path / "wide", blocks=1, intermediate_size=768)
    settings |= MAIN | {"model": wide, "match": False}
    require_done(compress_by_ranks(2, settings))
    require_done(compress_by_ranks(2, settings | {"out": tmp_path / "again"}, plan={"grams_at": "disk"}))
    assert run_contents(settings["out"]) == run_contents(tmp_path / "again")
    streamslr.compress(**settings | {"out": tmp_path / "alone"})
    require_alike(settings["out"], tmp_path / "alone", **ROUNDING_AMPLIFIED)
    assert verify(settings["out"]).problems == ()


@pytest.mark.slow
def test_outliers_decide_alike(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"pattern": "50%", "owl": 0.1, "match": False}
    require_done(compress_by_ranks(2, settings))
    streamslr.compress(**settings | {"out": tmp_path / "alone"})
    ours, theirs = read_run(settings["out"]), read_run(tmp_path / "alone")
    assert ours.outliers == pytest.approx(theirs.outliers, rel=1e-3)
    assert ours.allocation == theirs.allocation
    require_alike(settings["out"], tmp_path / "alone")
    assert len({linear.pattern for block in ours.blocks for linear in block.linears}) > 1


ON_GRID: dict[str, Any] = {"values": "int4", "group": 16}


@pytest.mark.slow
def test_values_come_onto_their_grid_by_rows_too(settings: dict[str, Any], tmp_path: Path) -> None:
    wide = tiny_checkpoint(tmp_path / "wide", blocks=1, intermediate_size=768)
    settings |= MAIN | ON_GRID | {"model": wide}
    require_done(compress_by_ranks(2, settings))
    require_done(compress_by_ranks(2, settings | {"out": tmp_path / "again"}, plan={"grams_at": "disk"}))
    assert run_contents(settings["out"]) == run_contents(tmp_path / "again")
    streamslr.compress(**settings | {"out": tmp_path / "alone"})
    require_alike(settings["out"], tmp_path / "alone", **ROUNDING_AMPLIFIED)
    of_rounding = [
        statistics.mean(linear.rounding_error or 0.0 for linear in blocks_of(folder)[0].linears)
        for folder in (settings["out"], tmp_path / "alone")
    ]
    assert of_rounding[0] == pytest.approx(of_rounding[1], rel=0.1)
    assert verify(settings["out"]).problems == ()


@pytest.mark.slow
def test_a_low_rank_beside_nearest_codes_is_fitted_by_rows_too(settings: dict[str, Any], tmp_path: Path) -> None:
    wide = tiny_checkpoint(tmp_path / "wide", blocks=1, intermediate_size=768)
    settings |= MAIN | ON_GRID | {"model": wide, "pattern": "dense", "rounding": "nearest", "match": False}
    require_done(compress_by_ranks(2, settings))
    streamslr.compress(**settings | {"out": tmp_path / "alone"})
    for ours, theirs in zip(
        blocks_of(settings["out"])[0].linears, blocks_of(tmp_path / "alone")[0].linears, strict=True
    ):
        assert ours.error == pytest.approx(theirs.error, rel=0.01)


IN_GROUPS: dict[str, dict[str, Any]] = {
    "passes": {"gram_bytes_at_once": 40_000, "grams_at": "disk"},
    "inputs": {"expert_gram_bytes_at_once": 200_000},
    "inputs on disk": {"expert_gram_bytes_at_once": 1, "grams_at": "disk"},
    "both": {"expert_gram_bytes_at_once": 1, "gram_bytes_at_once": 1, "grams_at": "disk"},
}
"""Plans that cut Grams into groups: each in a pass of the block, or those of experts from their kept inputs."""


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts, one of which no token reaches."""
    return starved_checkpoint(tmp_path_factory.mktemp("models") / "mixtral", "mixtral", blocks=2)


@pytest.mark.slow
def test_experts_are_shared_out_and_rare_ones_blended(settings: dict[str, Any], experts: Path, tmp_path: Path) -> None:
    settings |= {"model": experts}
    require_done(compress_by_ranks(2, settings))
    streamslr.compress(**settings | {"out": tmp_path / "alone"})
    require_alike(settings["out"], tmp_path / "alone")
    ours, theirs = blocks_of(settings["out"]), blocks_of(tmp_path / "alone")
    assert [linear.warnings for linear in ours[0].linears] == [linear.warnings for linear in theirs[0].linears]
    for name, in_groups in IN_GROUPS.items():
        require_done(compress_by_ranks(2, settings | {"out": tmp_path / name}, plan=in_groups))
        assert shards_of(tmp_path / name) == shards_of(settings["out"]), name


@pytest.mark.parametrize("in_groups", IN_GROUPS.values(), ids=IN_GROUPS)
def test_grams_of_experts_in_groups_give_the_bytes_of_all_at_once(
    settings: dict[str, Any], experts: Path, tmp_path: Path, in_groups: dict[str, Any]
) -> None:
    settings |= {"model": experts}
    assert compress_in_child(settings) == 0
    require_done(compress_by_ranks(1, settings | {"out": tmp_path / "groups"}, plan=in_groups))
    assert run_contents(tmp_path / "groups") == run_contents(settings["out"])


@pytest.mark.slow
def test_experts_come_onto_their_grid_over_ranks_and_in_groups(
    settings: dict[str, Any], experts: Path, tmp_path: Path
) -> None:
    settings |= ON_GRID | {"model": experts}
    require_done(compress_by_ranks(2, settings))
    require_done(compress_by_ranks(2, settings | {"out": tmp_path / "groups"}, plan=IN_GROUPS["both"]))
    assert shards_of(tmp_path / "groups") == shards_of(settings["out"])
    for block in blocks_of(settings["out"]):
        assert block.matching_off_grid is not None
        assert all(linear.rounding_error is not None for linear in block.linears)
        assert all(len(set(linear.warnings)) == len(linear.warnings) for linear in block.linears)
    assert verify(settings["out"]).problems == ()


# Resume


@pytest.mark.parametrize(
    ("world", "call"), [(1, 3), *slow((2, 3)), *long((1, 0), (1, 2), (1, 4), (1, 6), (2, 0), (2, 4), (2, 6))]
)
def test_killed_between_groups_the_same_line_goes_on_to_the_bytes_of_all_grams_at_once(
    settings: dict[str, Any], experts: Path, tmp_path: Path, world: int, call: int
) -> None:
    settings |= {"model": experts}
    in_groups = IN_GROUPS["inputs"]  # three in each of two blocks, each collected twice
    fault = Fault(world - 1, Passes, "collect_experts", call=call)
    require_ended(compress_by_ranks(world, settings, fault, plan=in_groups), fault.rank)
    require_done(compress_by_ranks(world, settings, plan=in_groups))
    require_done(compress_by_ranks(world, settings | {"out": tmp_path / "whole"}))
    assert run_contents(settings["out"]) == run_contents(tmp_path / "whole")


def require_ended(results: list[Any], rank: int) -> None:
    """Assert that the rank was killed, and that each other ended in an error that names it."""
    for other, result in enumerate(results):
        if other == rank:
            assert result is None
        else:
            assert isinstance(result, str), f"rank {other} did not end: {result}"
            assert f"RankEndedError: rank {rank} (process " in result
            assert "killed, perhaps for memory. Finished blocks are kept; start the same line again" in result


KILLS = [
    Fault(0, Journal, "_commit", call=1),
    Fault(1, Journal, "_commit", call=1),
    *(
        Fault(rank, Ranks, "_exchange", call=call, phase=phase)
        for rank, phase, call in [(1, "grams", 1), (0, "solve", 9), (1, "solve", 20), (1, "match", 3)]
    ),
    Fault(1, Passes, "propagate", call=1),
]


@pytest.mark.parametrize("fault", [KILLS[3], *slow(KILLS[0]), *long(*KILLS[1:3], *KILLS[4:])], ids=str)
def test_a_rank_is_killed_and_the_same_line_goes_on_to_the_same_bytes(
    settings: dict[str, Any], unbroken: dict[str, bytes], fault: Fault
) -> None:
    require_ended(compress_by_ranks(2, settings, fault), fault.rank)
    require_done(compress_by_ranks(2, settings))
    assert run_contents(settings["out"]) == unbroken


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_at_every_commit_the_same_line_goes_on_to_the_same_bytes(
    settings: dict[str, Any], unbroken: dict[str, bytes], rank: int
) -> None:
    owner, method = ((Path, "replace"), (Journal, "_commit"))[rank]  # rank 0 alone renames what is written
    for call in itertools.count():
        out = settings["out"].with_name(f"out-{call}")
        fault = Fault(rank, owner, method, call=call)
        results = compress_by_ranks(2, settings | {"out": out}, fault)
        if results[rank] is not None:
            break
        require_ended(results, rank)
        require_done(compress_by_ranks(2, settings | {"out": out}))
        assert run_contents(out) == unbroken, fault
    assert call >= BLOCKS + 1


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_killed_again_and_again_three_ranks_end_in_the_same_bytes(settings: dict[str, Any], rank: int) -> None:
    whole = settings | {"out": settings["out"].with_name("whole")}
    require_done(compress_by_ranks(3, whole))
    draw = random.Random(rank)
    for _ in range(8):
        fault = Fault(rank, Ranks, "_exchange", call=draw.randrange(200))
        results = compress_by_ranks(3, settings, fault)
        if results[rank] is not None:
            break
        require_ended(results, rank)
    require_done(compress_by_ranks(3, settings))
    assert run_contents(settings["out"]) == run_contents(whole["out"])


@pytest.fixture(scope="module")
def killed(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the settings by two ranks, one of which was killed in block 1. Read only."""
    out = tmp_path_factory.mktemp("killed") / "out"
    settings = {"model": model, "out": out, "calibration": text, **BASICS}
    require_ended(compress_by_ranks(2, settings, Fault(1, Passes, "collect", call=1)), 1)
    assert len(blocks_of(out)) == 1
    return out


@pytest.fixture
def begun(settings: dict[str, Any], killed: Path) -> dict[str, Any]:
    """The settings, with a copy of the killed run in their folder."""
    shutil.copytree(killed, settings["out"])
    return settings


def test_ranks_keep_their_hidden_states_apart(killed: Path) -> None:
    assert sorted(path.name for path in (killed / ".scratch").iterdir()) == ["rank-0-of-2", "rank-1-of-2"]


@pytest.mark.long
def test_the_lost_scratch_of_one_rank_is_made_again(begun: dict[str, Any], unbroken: dict[str, bytes]) -> None:
    shutil.rmtree(begun["out"] / ".scratch" / "rank-1-of-2")
    said, _ = compress_by_ranks(2, begun)
    assert sum("are lost; passing 1 finished blocks again" in line for line in said) == 1
    assert run_contents(begun["out"]) == unbroken


@pytest.mark.parametrize("world", [*slow(3), *long(1)])
def test_another_number_of_ranks_goes_on_and_says_so(
    begun: dict[str, Any], unbroken: dict[str, bytes], alone: Path, world: int
) -> None:
    said, *others = compress_by_ranks(world, begun, Fault(0, Compression, "compress_block", what="error"))
    assert said == "ZeroDivisionError: a mistake"
    alone_in_it = {f"{kind}-00001.zarr" for kind in ("hidden", "targets", "check-dense", "check-compressed")}
    folders = {f"rank-{rank}-of-3" for rank in range(3)} if world == 3 else alone_in_it
    assert {path.name for path in (begun["out"] / ".scratch").iterdir()} == folders, "that of two ranks is gone"
    said, *others = compress_by_ranks(world, begun)
    require_done([said, *others])
    assert f"ranks: {world}, where the run began with 2; last bits may differ from here on" in said
    require_alike(begun["out"], alone)
    assert verify(begun["out"]).problems == ()
    first, second = ({len(seconds) for seconds in b.seconds_by_rank.values()} for b in blocks_of(begun["out"]))
    assert (first, second) == ({2}, {world} if world > 1 else set())
    block_0 = "model-block-00000.safetensors"
    assert run_contents(begun["out"])[block_0] == unbroken[block_0]


@pytest.mark.long
def test_ranks_go_on_with_what_one_process_began(settings: dict[str, Any], alone: Path) -> None:
    fault = Fault(0, Passes, "collect", call=1)
    assert compress_by_ranks(1, settings, fault) == [None]
    said, *others = compress_by_ranks(2, settings)
    require_done([said, *others])
    assert "ranks: 2, where the run began with 1; last bits may differ from here on" in said
    require_alike(settings["out"], alone)
    assert not (settings["out"] / ".scratch").exists()


# Faults of one rank


@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        (Fault(1, Passes, "collect", "memory"), "grams"),
        *slow((Fault(1, BlockwiseModel, "_run", "memory", call=2, phase="match"), "match")),
        *long(
            (Fault(1, CompressedBlock, "_measure", "memory", phase="match", call=2), "match"),
            (Fault(0, Passes, "propagate", "memory"), "propagate"),
            (Fault(1, Passes, "survey", "memory"), "survey"),
            (Fault(1, Passes, "embed", "memory"), "embed"),
        ),
    ],
    ids=str,
)
def test_a_rank_that_runs_out_of_memory_cuts_for_all_and_says_so(
    settings: dict[str, Any], fault: Fault, phase: str
) -> None:
    if phase == "survey":
        settings |= {"owl": 0.05, "pattern": "50%"}
    said, *others = compress_by_ranks(2, settings, fault)
    require_done([said, *others])
    state = read_run(settings["out"])
    assert state.micro_batch == (1 if phase == "match" else 2), "halved: a rank has 2 of the 4 windows of a step"
    found = (state.retries if phase in ("embed", "survey") else state.blocks[0].retries)[phase]
    sentence = f"ran out of memory: windows {state.micro_batch} at a time"
    ranks = (0, 1) if phase == "match" else (fault.rank,)
    assert found == tuple(f"rank {rank}: {sentence}" for rank in ranks)
    assert all(not block.retries for block in state.blocks[1:])
    once_more = f"phase {phase} ran out of memory ({'rank 1: ' if phase == 'match' else ''}the machine is full)"
    assert sum(once_more in line for line in said) == 1
    assert verify(settings["out"]).problems == ()


@pytest.mark.long
def test_a_solve_that_runs_out_of_memory_on_one_rank_is_done_in_tiles_on_all(settings: dict[str, Any]) -> None:
    """The third solve of rank 1 is of a linear that tiles can divide."""
    said, *others = compress_by_ranks(2, settings | MAIN, Fault(1, ThreeBasil, "solve", "memory", call=3))
    require_done([said, *others])
    state = read_run(settings["out"])
    assert state.solver_workspace
    (sentence,) = state.blocks[0].retries["solve"]
    assert sentence.startswith("rank 1: ran out of memory: a solver workspace of ")
    assert sum("phase solve ran out of memory" in line for line in said) == 1


MEMORY = "memory ran out: phase {}, as small as it can be: {}the machine is full. Free some or raise the budget"
END: list[tuple[Fault, str]] = [
    (Fault(1, BlockwiseModel, "_run", "memory", phase="grams", lasts=True), MEMORY.format("grams", "")),
    (Fault(1, OnDisk, "_store", "disk"), "No space left on device"),
    (Fault(0, Path, "replace", "disk", call=3), "No space left on device"),
    (Fault(0, BlockwiseModel, "_run", "memory", phase="propagate", lasts=True), MEMORY.format("propagate", "")),
    (Fault(1, Passes, "propagate", "error"), "a mistake"),
    (Fault(0, BlockCompressor, "_write", "error"), "a mistake"),
    (Fault(1, BlockSolver, "solve", "error"), "a mistake"),
]


@pytest.mark.parametrize(("fault", "reason"), [END[-1], *slow(END[1]), *long(END[0], *END[2:-1])], ids=str)
def test_a_fault_of_one_rank_ends_all_and_the_same_line_goes_on(
    settings: dict[str, Any], unbroken: dict[str, bytes], fault: Fault, reason: str
) -> None:
    results = compress_by_ranks(2, settings, fault)
    assert reason in results[fault.rank]
    assert "RankEndedError" not in results[fault.rank]
    assert results[1 - fault.rank].startswith(f"RankEndedError: rank {fault.rank} ended: ")
    assert reason in results[1 - fault.rank]
    require_done(compress_by_ranks(2, settings))
    assert run_contents(settings["out"]) == unbroken


@pytest.mark.long
def test_memory_that_runs_out_in_matching_ends_all_with_the_rank_named(settings: dict[str, Any]) -> None:
    fault = Fault(1, BlockwiseModel, "_run", "memory", phase="match", lasts=True)
    results = compress_by_ranks(2, settings, fault)
    assert all(MEMORY.format("match", "rank 1: ") in result for result in results)


def test_a_scratch_folder_that_is_a_file_ends_all_by_name(settings: dict[str, Any]) -> None:
    scratch = settings["out"] / ".scratch"
    scratch.mkdir(parents=True)
    (scratch / "rank-1-of-2").write_text("")
    waiting, ended = compress_by_ranks(2, settings)
    assert "rank-1-of-2" in ended
    assert waiting.startswith("RankEndedError: rank 1 ended: ")


# Refusals


def test_a_second_launch_is_refused(settings: dict[str, Any]) -> None:
    reason = f"another process is writing {settings['out']}; wait for it, or give another --out"
    with lock_folder(settings["out"], ""):
        refused, other = compress_by_ranks(2, settings)
    assert refused == f"ResumeError: {reason}"
    assert other == f"RankEndedError: rank 0 ended: {reason}"


def compress_with_other_settings(ranks: Ranks, settings: dict[str, Any], of_rank_1: dict[str, Any]) -> list[str]:
    return compress_as_rank(ranks, settings | of_rank_1 if ranks.rank else settings)


@pytest.mark.parametrize("change", [{"seed": 5}, *long({"match": False}, {"text": "Something else. "})])
def test_a_rank_started_otherwise_is_refused_by_name(
    settings: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    named = {"seed": "seed: 5, not 0", "match": "match: False, not True", "text": "tokens: '"}
    (what,) = change
    if what == "text":
        other = tmp_path / "other.txt"
        other.write_text(change["text"] + TEXT * 20)
        change = {"calibration": other}
    results = StartedRanks(2, tmp_path, compress_with_other_settings, settings, change).results()
    assert all(result.startswith("InputError: rank 1 differs from rank 0 (") for result in results)
    assert all(named[what] in result for result in results)
    assert not settings["out"].exists()


def compress_on_own_machine(ranks: Ranks, settings: dict[str, Any], models: list[Path]) -> list[str]:
    """Be a rank on a machine of its own, which has a copy of the model of its own."""
    return compress_as_rank(replace(ranks, local_rank=0), settings | {"model": models[ranks.rank]})


def test_a_machine_with_other_weights_is_refused_before_a_block_of_them_is_committed(
    settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    shard = copy / "model-00002-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    results = StartedRanks(2, tmp_path, compress_on_own_machine, settings, [model, copy]).results()
    message = f"InputError: the machine of rank 1 has another {shard.name} than that of rank 0; give all ranks the same"
    assert all(result.startswith(message) for result in results), results
    assert len(blocks_of(settings["out"])) < BLOCKS


def test_fewer_windows_than_ranks_are_refused_before_any_work(settings: dict[str, Any]) -> None:
    results = compress_by_ranks(2, settings | {"samples": 1})
    message = "1 calibration windows cannot be shared out over 2 ranks; start at most 1 ranks"
    assert any(result == f"InputError: {message}" for result in results)
    assert not settings["out"].exists()
