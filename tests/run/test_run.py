"""The main job end to end on tiny checkpoints: what is written, resume after a kill anywhere, refusals."""

import gc
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamslr
from streamslr.calibration.tokens import calibration_windows
from streamslr.config import RunConfig
from streamslr.errors import BudgetError, InputError, ResumeError, StreamslrError
from streamslr.io.packing import unpack
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.carried import Carried
from streamslr.model.checkpoint import open_checkpoint
from streamslr.results.export import export
from streamslr.results.inspect import read_run
from streamslr.results.verify import verify
from streamslr.run.context import RunContext, open_run
from streamslr.run.journal import JournalState
from streamslr.run.loop import run
from streamslr.run.passes import Passes
from streamslr.solvers.base import LinearProblem, SparseLowRank
from streamslr.solvers.methods import BUILT_IN
from streamslr.solvers.threebasil import ThreeBasil
from streamslr.spec.pattern import parse_pattern
from tests.support.compressed_folders import run_contents
from tests.support.killing import compress_in_child
from tests.support.markers import slow
from tests.support.tiny_models import TEXT, tiny_checkpoint

BLOCKS = 3
BASICS: dict[str, Any] = {"samples": 6, "seq_len": 16, "rank": 4, "device": "cpu"}
BASICS |= {"method": "eora-wanda", "match_epochs": 2}  # it solves at once: most tests are of what happens around it
MAIN: dict[str, Any] = {"method": "3basil", "match_epochs": 4}
PARTS = ("values", "meta", "row_offsets", "U", "V")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama", blocks=BLOCKS, shards=3)


@pytest.fixture
def settings(model: Path, text: Path, tmp_path: Path) -> dict[str, Any]:
    return {"model": model, "out": tmp_path / "out", "calibration": text, **BASICS}


@pytest.fixture(scope="module")
def finished(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of the settings. Read only."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert compress_in_child({"model": model, "out": out, "calibration": text, **BASICS}) == 0
    return out


@pytest.fixture(scope="module")
def unbroken(finished: Path) -> dict[str, bytes]:
    """Bytes of the files that an uninterrupted run of the settings writes."""
    return run_contents(finished)


@pytest.fixture(scope="module")
def killed(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the settings that was killed after its first block. Read only."""
    out = tmp_path_factory.mktemp("killed") / "out"
    assert compress_in_child({"model": model, "out": out, "calibration": text, **BASICS}, die_at=13) == -9
    return out


@pytest.fixture
def begun(settings: dict[str, Any], killed: Path) -> dict[str, Any]:
    """The settings, with a copy of the killed run in their folder."""
    shutil.copytree(killed, settings["out"])
    return settings


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_run_writes_a_sound_model_folder(settings: dict[str, Any]) -> None:
    state = streamslr.compress(**settings | MAIN)
    out = settings["out"]
    assert state.complete
    assert verify(out).problems == ()
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "tokenizer.json", "model-outside.safetensors", "streamslr.json"} <= names
    assert {f"model-block-{i:05d}.safetensors" for i in range(BLOCKS)} <= names
    assert not (out / ".scratch").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "streamslr",
        "format_version": 4,
        "pattern": "2:4",
        "rank": 4,
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["lm_head.weight"] == "model-outside.safetensors"
    assert index["model.layers.1.mlp.up_proj.meta"] == "model-block-00001.safetensors"


def test_what_the_journal_says_of_a_linear_is_what_the_shard_holds(finished: Path) -> None:
    state = read_run(finished)
    tensors = load_file(finished / "model-block-00002.safetensors")
    (linear,) = (la for la in state.blocks[2].linears if la.name.endswith("mlp.down_proj"))
    parts = {part: tensors[f"{linear.name}.{part}"] for part in ("values", "meta", "U", "V")}
    assert linear.shape == (64, 128)
    assert linear.density == (parts["values"] != 0).sum().item() / (64 * 128)
    assert linear.rank == parts["U"].shape[1] == parts["V"].shape[0] == 4
    assert linear.nbytes == sum(t.nbytes for t in parts.values())
    assert parts["values"].dtype == torch.bfloat16
    assert linear.error < linear.wanda_error


def test_without_matching_all_but_the_linears_is_unchanged(settings: dict[str, Any], model: Path) -> None:
    streamslr.compress(**settings, match=False)
    source = {k: v for file in model.glob("*.safetensors") for k, v in load_file(file).items()}
    written = {k: v for file in settings["out"].glob("*.safetensors") for k, v in load_file(file).items()}
    common = [name for name in source if name in written]
    assert len(common) == 2 * BLOCKS + 3, "two norms a block, embedding, final norm, head"
    assert all(torch.equal(source[name], written[name]) for name in common)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [*slow("2:4", "4:8", "1:4", "50%"), "50%/row"])
@pytest.mark.parametrize("rank", [*slow(0), 4])
def test_each_pattern_and_rank_reaches_the_disk(settings: dict[str, Any], pattern: str, rank: int) -> None:
    state = streamslr.compress(**settings | MAIN | {"pattern": pattern, "rank": rank})
    assert verify(settings["out"]).problems == ()
    checkpoint = open_checkpoint(str(settings["out"]))
    for block in state.blocks:
        for linear in block.linears:
            assert linear.rank == rank
            tensors = load_file(settings["out"] / block.shard.file)
            assert (f"{linear.name}.U" in tensors) == (rank > 0)
            if rank == 0:
                weight = checkpoint.read([f"{linear.name}.weight"])[f"{linear.name}.weight"]
                assert parse_pattern(pattern).check(weight != 0) is None


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rank"), [*slow(("oats", 4)), ("alps", 0)])
def test_other_methods_stream_and_keep_their_folder(settings: dict[str, Any], method: str, rank: int) -> None:
    state = streamslr.compress(**settings | {"method": method, "rank": rank, "pattern": "1:4"})
    assert verify(settings["out"]).problems == ()
    for block in state.blocks:
        assert all(linear.error < linear.wanda_error for linear in block.linears), "better than plain pruning"
    with pytest.raises(ResumeError, match=f"method: '{method}' there, '3basil' now"):
        streamslr.compress(**settings | MAIN | {"rank": rank, "pattern": "1:4"})


DEAD = [3, 17]


@pytest.fixture(scope="module")
def model_with_dead_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one block whose norms give 0 in the columns DEAD of q, k, v, gate and up."""
    folder = tiny_checkpoint(
        tmp_path_factory.mktemp("models") / "dead", blocks=1, hidden=32, shards=1, dtype=torch.float32
    )
    tensors = load_file(folder / "model.safetensors")
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{name}.weight"][DEAD] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "pattern"), [*slow(*((method, "2:4") for method in BUILT_IN)), ("3basil", "50%"), ("oats", "50%/row")]
)
def test_matching_after_any_method_lowers_the_loss_and_changes_no_support(
    settings: dict[str, Any], model_with_dead_inputs: Path, method: str, pattern: str
) -> None:
    rank = 4 if BUILT_IN[method].low_rank else 0
    settings |= {"model": model_with_dead_inputs, "method": method, "pattern": pattern, "rank": rank}
    unmatched, matched = (settings["out"].with_name(name) for name in ("unmatched", "matched"))
    streamslr.compress(**settings | {"out": unmatched, "match": False})
    (block,) = streamslr.compress(**settings | {"out": matched, "match_epochs": 5}).blocks
    assert verify(matched).problems == ()
    assert block.matching is not None
    assert block.matching.applied
    assert block.matching.loss_after is not None
    assert block.matching.loss_after < block.matching.loss_before
    before, after = (load_file(folder / block.shard.file) for folder in (unmatched, matched))
    assert before.keys() == after.keys()
    for linear in block.linears:
        solved, moved = (
            {part: tensors[key] for part in PARTS if (key := f"{linear.name}.{part}") in tensors}
            for tensors in (before, after)
        )
        assert {"U", "V"} & moved.keys() == ({"U", "V"} if rank else set())
        S, refined = (unpack(parts, parse_pattern(pattern), linear.shape) for parts in (solved, moved))
        assert torch.equal(refined != 0, S != 0)
        assert parse_pattern(pattern).check(refined != 0) is None
        assert not torch.equal(refined, S)
        if not linear.name.endswith(("o_proj", "down_proj")):
            assert not refined[:, DEAD].any()
            assert not rank or not moved["V"][:, DEAD].any()


@pytest.mark.slow
def test_the_hidden_states_are_those_of_the_written_model(settings: dict[str, Any], unbroken: Any) -> None:
    """A replay of finished blocks gives the digests that the run recorded, so the written weights are those it ran."""
    assert compress_in_child(settings, die_at=15) == -9
    assert read_run(settings["out"]).blocks
    shutil.rmtree(settings["out"] / ".scratch")
    assert compress_in_child(settings) == 0
    assert run_contents(settings["out"]) == unbroken


def test_a_finished_run_starts_again_and_changes_nothing(
    settings: dict[str, Any], finished: Path, unbroken: dict[str, bytes]
) -> None:
    shutil.copytree(finished, settings["out"])
    assert streamslr.compress(**settings).complete
    assert run_contents(settings["out"]) == unbroken


def test_without_out_the_folder_is_named_after_the_model_and_the_same_call_goes_on_there(
    settings: dict[str, Any], unbroken: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, caplog: Any, tmp_path: Path
) -> None:
    del settings["out"]
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockwiseModel, "evict_block", interrupted)  # block 0 is committed by then
        with pytest.raises(KeyboardInterrupt):
            streamslr.compress(**settings)
    with caplog.at_level("INFO", "streamslr"):
        streamslr.compress(**settings)
    assert "the output folder is ./llama-slr" in caplog.text
    assert "llama-slr: 1 of 3 blocks are done, going on" in caplog.text
    assert run_contents(tmp_path / "llama-slr") == unbroken


def test_a_gpu_budget_on_a_cpu_is_warned_of_once(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    del settings["match_epochs"]
    streamslr.compress(**settings, gpu_mem="45GB", match=False, match_batch=8)
    assert caplog.messages[:2] == [
        "--gpu-mem 45.0 GB has no effect: the device is cpu (for a GPU: --device cuda)",
        "--match-batch 8 has no effect with --no-match",
    ]
    assert caplog.text.count("has no effect") == 2


def unbroken_run(settings: dict[str, Any]) -> dict[str, bytes]:
    """Run other settings without interruption; return the bytes of the files."""
    whole = settings | {"out": settings["out"].with_name("whole")}
    assert compress_in_child(whole) == 0
    return run_contents(whole["out"])


@pytest.mark.slow
def test_killed_at_every_commit_point_the_same_line_goes_on_to_the_same_bytes(
    settings: dict[str, Any],
) -> None:
    settings |= MAIN
    unbroken = unbroken_run(settings)
    steps = 0
    while compress_in_child(settings | {"out": settings["out"].with_name(f"out-{steps}")}, die_at=steps) == -9:
        out = settings["out"].with_name(f"out-{steps}")
        assert compress_in_child(settings | {"out": out}) == 0
        assert run_contents(out) == unbroken, f"killed at step {steps}"
        steps += 1
    assert steps >= 5 + 3 * BLOCKS, "a shard, a journal record and an index a block, and the start"


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments_a_run_still_ends_in_the_same_bytes(
    settings: dict[str, Any],
) -> None:
    settings |= MAIN
    unbroken = unbroken_run(settings)
    draw = random.Random(0)
    kills = 0
    while compress_in_child(settings, die_at=draw.randrange(2, 40) if kills < 8 else None, counting="work"):
        kills += 1
    assert kills
    assert run_contents(settings["out"]) == unbroken


def test_a_lost_shard_is_made_again(settings: dict[str, Any], finished: Path, unbroken: dict[str, bytes]) -> None:
    shutil.copytree(finished, settings["out"])
    (settings["out"] / "model-block-00001.safetensors").unlink()
    assert compress_in_child(settings) == 0
    assert run_contents(settings["out"]) == unbroken


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_lost_or_changed_auxiliary_file_is_made_again(
    settings: dict[str, Any], finished: Path, unbroken: dict[str, bytes], name: str
) -> None:
    shutil.copytree(finished, settings["out"])
    (settings["out"] / name).write_text("{}")
    streamslr.compress(**settings)
    assert run_contents(settings["out"]) == unbroken


@pytest.mark.slow
def test_another_scratch_on_resume_leaves_nothing_behind(
    begun: dict[str, Any], unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    assert compress_in_child(begun | {"scratch": tmp_path / "scratch"}) == 0
    assert run_contents(begun["out"]) == unbroken


@pytest.mark.slow
def test_grams_are_gone_before_the_block_passes_on(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan does not count them in that phase, and down_proj's is the largest tensor of all."""
    from streamslr.calibration.grams import Gram

    alive: list[int] = []
    propagate = Passes.propagate

    def watched(self: Passes, *args: Any) -> Any:
        alive.append(sum(type(thing) is Gram for thing in gc.get_objects()))
        return propagate(self, *args)

    monkeypatch.setattr(Passes, "propagate", watched)
    streamslr.compress(**settings)
    assert alive == [0] * BLOCKS


def test_a_compressed_model_is_not_compressed_again(settings: dict[str, Any], finished: Path) -> None:
    with pytest.raises(InputError, match="compressed already"):
        streamslr.compress(**settings | {"model": finished})


def test_the_same_text_under_another_name_goes_on(begun: dict[str, Any], tmp_path: Path) -> None:
    copy = shutil.copy(begun["calibration"], tmp_path / "copy.txt")
    assert streamslr.compress(**begun | {"calibration": copy}).complete


def test_changed_windows_are_named_before_memory_is_looked_at(begun: dict[str, Any]) -> None:
    with pytest.raises(ResumeError, match="seq_len: 16 there, 4096 now"):
        streamslr.compress(**begun | {"seq_len": 4096, "host_mem": "1MB"})


@pytest.mark.slow
@pytest.mark.parametrize("host_mem", ["10GB", *slow(None)])
def test_the_tier_of_hidden_states_does_not_show_in_the_bytes(
    settings: dict[str, Any], unbroken: dict[str, bytes], host_mem: str | None, tmp_path: Path
) -> None:
    assert compress_in_child(settings | {"host_mem": host_mem, "scratch": tmp_path / "scratch"}) == 0
    assert run_contents(settings["out"]) == unbroken
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rank": 8}, r"rank: 4 there, 8 now"),
        ({"pattern": "1:4"}, r"pattern: '2:4' there, '1:4' now"),
        ({"seed": 5}, r"seed: 0 there, 5 now"),
        ({"samples": 5}, r"samples: 6 there, 5 now"),
    ],
)
def test_changed_settings_are_refused_naming_both_values(
    begun: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ResumeError, match=named):
        streamslr.compress(**begun | change)


def test_another_model_or_text_is_refused(begun: dict[str, Any], tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", blocks=BLOCKS, intermediate_size=192)
    with pytest.raises(ResumeError, match="model: "):
        streamslr.compress(**begun | {"model": other})
    text = tmp_path / "text.txt"
    text.write_text("Something else. " + TEXT * 20)
    with pytest.raises(ResumeError, match="tokens: "):
        streamslr.compress(**begun | {"calibration": text})


@pytest.mark.slow
def test_a_finished_block_is_kept_when_a_later_one_is_damaged(settings: dict[str, Any], tmp_path: Path) -> None:
    broken = shutil.copytree(settings["model"], tmp_path / "broken")
    for file in broken.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name == "model.layers.2.mlp.up_proj.weight":
                tensors[name][3, 5] = float("nan")
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"model.layers.2.mlp.up_proj.weight"):
        streamslr.compress(**settings | {"model": broken})
    assert len(read_run(settings["out"]).blocks) == 2


def test_other_experts_are_refused_before_any_work(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "moe", "jetmoe")
    with pytest.raises(InputError, match="mixture of experts that cannot be taken apart"):
        streamslr.compress(**settings | {"model": model})
    assert not settings["out"].exists()


def test_a_width_that_the_pattern_does_not_divide_is_refused_before_any_work(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"model.layers.0.self_attn.q_proj"):
        streamslr.compress(**settings | {"pattern": "3:7"})
    assert not settings["out"].exists()


def test_a_budget_that_cannot_hold_is_refused_before_any_work(settings: dict[str, Any]) -> None:
    with pytest.raises(
        BudgetError, match=r"phase \w+.* needs .* of host memory, the budget is 1.0 MB; raise --host-mem"
    ):
        streamslr.compress(**settings | {"host_mem": "1MB"})
    assert not settings["out"].exists()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*slow("qwen2", "gemma2", "opt", "cohere2"), "phi3", "gpt_neox", "bloom"])
def test_other_architectures_compress_and_verify(settings: dict[str, Any], tmp_path: Path, architecture: str) -> None:
    model = tiny_checkpoint(tmp_path / architecture, architecture, blocks=2)
    state = streamslr.compress(**settings | {"model": model})
    assert state.complete
    assert verify(settings["out"]).problems == ()
    source, written = open_checkpoint(str(model)), open_checkpoint(str(settings["out"]))
    assert set(written.tensors) == set(source.tensors)
    BlockwiseModel(written, torch.float32, torch.device("cpu")).load_block(1)


def test_windows_longer_than_the_learned_positions_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "opt", "opt", blocks=2, max_position_embeddings=32)
    with pytest.raises(InputError, match="windows of 64 tokens"):
        streamslr.compress(**settings | {"model": model, "samples": 2, "seq_len": 64})
    assert not settings["out"].exists()


def test_ids_outside_the_vocabulary_are_refused_before_any_work(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "small", blocks=2, vocab_size=260)  # the tokenizer has 384
    with pytest.raises(InputError, match=r"the text has token id \d+, and the vocabulary of .* has 260 ids"):
        streamslr.compress(**settings | {"model": model})
    assert not settings["out"].exists()


@pytest.mark.slow
def test_tied_embeddings_are_written_once(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "tied", tie=True)
    streamslr.compress(**settings | {"model": model})
    assert "lm_head.weight" not in load_file(settings["out"] / "model-outside.safetensors")
    assert verify(settings["out"]).problems == ()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, *slow(torch.float32)])
def test_values_are_stored_in_the_models_dtype(settings: dict[str, Any], tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_checkpoint(tmp_path / "m", dtype=dtype)
    streamslr.compress(**settings | {"model": model})
    tensors = load_file(settings["out"] / "model-block-00000.safetensors")
    floats = {t.dtype for t in tensors.values() if t.is_floating_point()}
    assert floats == {dtype}


def matching_losses(state: JournalState) -> list[tuple[float, float | None]]:
    """Return the losses before and after matching of each block that was matched."""
    return [(b.matching.loss_before, b.matching.loss_after) for b in state.blocks if b.matching]


@pytest.mark.slow
def test_matching_brings_each_block_nearer_to_the_dense_model(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= MAIN | {"pattern": "1:4", "samples": 16, "match_epochs": 8}
    losses = matching_losses(streamslr.compress(**settings))
    assert len(losses) == BLOCKS
    assert all(after is not None and after < before for before, after in losses)
    unmatched = settings | {"out": tmp_path / "unmatched", "match": False}
    assert matching_losses(streamslr.compress(**unmatched)) == []
    tokenizer = open_checkpoint(str(settings["model"])).tokenizer()
    ids = calibration_windows(tokenizer, settings["calibration"], num_windows=16, seq_len=16, seed=0).ids
    dense, matched, plain = (
        streamed_logits(folder, ids) for folder in (settings["model"], settings["out"], unmatched["out"])
    )
    assert (matched - dense).square().mean() < 0.9 * (plain - dense).square().mean()


def streamed_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    blockwise = BlockwiseModel(open_checkpoint(str(folder)), torch.float32, torch.device("cpu"))
    blockwise.load_non_block()
    with torch.no_grad():
        hidden = blockwise.embed(ids)
        for i in range(len(blockwise.block_names)):
            blockwise.load_block(i)
            _, hidden = blockwise.pass_block(i, hidden)
            blockwise.evict_block(i)
        return blockwise.logits(ids, hidden)


@pytest.mark.slow
def test_norms_are_matched_too_and_non_block_tensors_are_not(settings: dict[str, Any], model: Path) -> None:
    streamslr.compress(**settings | {"pattern": "1:4", "match_epochs": 6})
    source = {k: v for file in model.glob("*.safetensors") for k, v in load_file(file).items()}
    written = {k: v for file in settings["out"].glob("*.safetensors") for k, v in load_file(file).items()}
    changed = {name for name in source if name in written and not torch.equal(source[name], written[name])}
    assert changed == {
        f"model.layers.{i}.{norm}.weight"
        for i in range(BLOCKS)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }


def test_a_block_that_loses_nothing_is_not_matched(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a model whose weights keep to the pattern already."""
    streamslr.compress(**settings | {"rank": 0, "match": False})
    export(settings["out"], tmp_path / "sparse", to="dense")
    again = settings | {"model": tmp_path / "sparse", "out": tmp_path / "again", "rank": 0, "match_held_out": 2}
    for block in streamslr.compress(**again).blocks:
        assert block.matching is not None
        assert (block.matching.curve, block.matching.held_out, block.matching.applied) == ((0,), (0,), False)
    assert "did not lower" not in caplog.text
    for shard in settings["out"].glob("model-block-*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()


@pytest.mark.slow
def test_a_block_that_matching_makes_worse_stays_as_it_was_solved(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = streamslr.compress(**settings | {"match_lr": 1e4})
    assert [b.matching and b.matching.applied for b in state.blocks] == [False] * BLOCKS
    assert "model.layers.0: matching did not lower its loss" in caplog.text
    unmatched = tmp_path / "unmatched"
    streamslr.compress(**settings | {"out": unmatched, "match": False})
    for shard in settings["out"].glob("*.safetensors"):
        assert shard.read_bytes() == (unmatched / shard.name).read_bytes()
    assert verify(settings["out"]).problems == ()


def test_held_out_windows_reach_no_gram_and_judge_matching(settings: dict[str, Any]) -> None:
    state = streamslr.compress(**settings | {"samples": 4, "match_held_out": 2, "match_epochs": 3})
    for block in state.blocks:
        assert {linear.rows for linear in block.linears} == {4 * settings["seq_len"]}
        assert block.matching
        assert len(block.matching.held_out) == len(block.matching.curve)
        first, last = block.matching.held_out[0], block.matching.held_out[-1]
        assert first is not None
        assert last is not None
        assert last < first or not block.matching.applied


def test_held_out_windows_count_no_outliers(settings: dict[str, Any]) -> None:
    folders = [settings["out"].with_name(f"{count} held out") for count in (0, 4)]
    counted = [
        streamslr.compress(
            **settings | {"out": out, "match_held_out": held_out, "pattern": "50%", "owl": 0.1, "match_epochs": 2}
        ).outliers
        for out, held_out in zip(folders, (0, 4), strict=True)
    ]
    assert counted[0] == counted[1]


@pytest.mark.slow
def test_tiers_on_disk_do_not_show_in_the_bytes(settings: dict[str, Any], unbroken: dict[str, bytes]) -> None:
    context = open_run(RunConfig.of(**settings))
    run(replace(context, plan=replace(context.plan, in_memory=False, grams_at="disk")))
    assert run_contents(settings["out"]) == unbroken


def test_a_scratch_folder_that_vanishes_stops_the_run_and_the_same_line_goes_on(
    settings: dict[str, Any], unbroken: dict[str, bytes]
) -> None:
    context = open_run(RunConfig.of(**settings))
    context = replace(context, plan=replace(context.plan, in_memory=False, grams_at="disk"))
    release = context.checkpoint.release

    def vanish(names: tuple[str, ...]) -> None:
        if names == context.blockwise.block_tensors[0]:  # block 0 is committed by then
            shutil.rmtree(settings["out"] / ".scratch")
        release(names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context.checkpoint, "release", vanish)
        with pytest.raises(StreamslrError, match=r"hidden states in .*\.scratch.* start the same line again"):
            run(context)
    assert len(read_run(settings["out"]).blocks) == 1
    streamslr.compress(**settings)
    assert run_contents(settings["out"]) == unbroken


@pytest.mark.slow
def test_the_smallest_pieces_give_the_same_result_but_for_rounding(settings: dict[str, Any], tmp_path: Path) -> None:
    """Rank 0, because with U·V a solve amplifies rounding until it finds other supports, as good."""
    settings |= MAIN | {"rank": 0}
    whole = streamslr.compress(**settings)
    context = open_run(RunConfig.of(**settings | {"out": tmp_path / "pieces"}))
    pieces = run(
        replace(
            context, plan=replace(context.plan, micro_batch=1, solver_workspace=0, in_memory=False, grams_at="disk")
        )
    )
    for a, b in zip(whole.blocks, pieces.blocks, strict=True):
        whole_errors, pieces_errors = ([linear.error for linear in block.linears] for block in (a, b))
        assert sum(whole_errors) == pytest.approx(sum(pieces_errors), rel=0.05)
        assert whole_errors == pytest.approx(pieces_errors, rel=0.1)
    after, in_pieces = ([loss for _, loss in matching_losses(state)] for state in (whole, pieces))
    assert after == pytest.approx(in_pieces, rel=0.15)


@pytest.mark.slow
def test_a_pass_that_runs_out_of_memory_is_cut_once_and_says_so(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings |= {"match_held_out": 0}
    whole = streamslr.compress(**settings | {"out": settings["out"].with_name("whole")})
    run = BlockwiseModel._run

    def small(self: BlockwiseModel, i: int, hidden: torch.Tensor) -> tuple[Any, Carried]:
        if len(hidden) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(self, i, hidden)

    monkeypatch.setattr(BlockwiseModel, "_run", small)
    state = streamslr.compress(**settings)
    assert (whole.micro_batch, state.micro_batch) == (6, 3)
    assert caplog.text.count("phase grams ran out of memory") == 1
    assert "once more with windows 3 at a time" in caplog.text
    assert state.blocks[0].retries == {"grams": ("ran out of memory: windows 3 at a time",)}
    assert verify(settings["out"]).problems == ()
    before, cut = ([loss for loss, _ in matching_losses(made)] for made in (whole, state))
    assert before == pytest.approx(cut, rel=0.2)


def workspaces_of_solves(patch: pytest.MonkeyPatch, fails: bool) -> list[tuple[str, int | None]]:
    """Record (linear, workspace) of each solve from now on; if it `fails`, up_proj's runs out of memory without one."""
    solve, seen = ThreeBasil.solve, []

    def watched(self: ThreeBasil, problem: LinearProblem) -> SparseLowRank:
        seen.append((problem.name, problem.workspace))
        if fails and problem.workspace is None and problem.name.endswith("up_proj"):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
        return solve(self, problem)

    patch.setattr(ThreeBasil, "solve", watched)
    return seen


@pytest.mark.slow
def test_a_solve_that_runs_out_of_memory_is_done_in_tiles_and_so_are_all_after_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = workspaces_of_solves(monkeypatch, fails=True)
    state = streamslr.compress(**settings | MAIN | {"match": False})
    assert state.solver_workspace is not None
    failed = seen.index(("model.layers.0.mlp.up_proj", None))
    assert {workspace for _, workspace in seen[: failed + 1]} == {None}
    assert {workspace for _, workspace in seen[failed + 1 :]} == {state.solver_workspace}
    assert len(seen) == 7 * BLOCKS + 1, "each linear once, and one of them again"
    assert caplog.text.count("phase solve ran out of memory") == 1
    assert verify(settings["out"]).problems == ()


@pytest.mark.slow
def test_a_run_goes_on_in_the_workspace_that_running_out_of_memory_left_it(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= MAIN | {"match": False}
    with pytest.MonkeyPatch.context() as patch:
        workspaces_of_solves(patch, fails=True)
        streamslr.compress(**settings | {"out": tmp_path / "unbroken"})

    broken = open_run(RunConfig.of(**settings))
    with pytest.MonkeyPatch.context() as patch:
        workspaces_of_solves(patch, fails=True)
        patch.setattr(broken.blockwise, "evict_block", interrupted)  # block 0 is committed by then
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    state = read_run(settings["out"])
    assert len(state.blocks) == 1
    with pytest.MonkeyPatch.context() as patch:
        seen = workspaces_of_solves(patch, fails=False)  # there is memory enough now
        streamslr.compress(**settings)
    assert len(seen) == 7 * (BLOCKS - 1)
    assert {workspace for _, workspace in seen} == {state.solver_workspace} != {None}
    assert run_contents(settings["out"]) == run_contents(tmp_path / "unbroken")


@pytest.mark.slow
def test_memory_that_runs_out_again_ends_the_run_and_keeps_finished_blocks(
    settings: dict[str, Any], unbroken: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        run = BlockwiseModel._run

        def full(self: BlockwiseModel, i: int, hidden: torch.Tensor) -> tuple[Any, Carried]:
            if i == 1 and torch.is_grad_enabled():
                raise MemoryError("the machine is full")
            return run(self, i, hidden)

        patch.setattr(BlockwiseModel, "_run", full)
        with pytest.raises(BudgetError, match=r"memory ran out: .*full.* finished blocks are kept"):
            streamslr.compress(**settings)
    assert len(read_run(settings["out"]).blocks) == 1
    streamslr.compress(**settings)
    assert run_contents(settings["out"]) == unbroken


def test_a_host_budget_is_held_while_a_phase_runs(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    context = open_run(RunConfig.of(**settings | {"host_mem": "100GB"}))
    with pytest.raises(BudgetError, match=r"holds .* of host memory, --host-mem is 1.0 MB"):
        run(replace(context, host_mem=10**11, config=replace(context.config, host_mem=10**6)))


@pytest.mark.parametrize("method", ["load_block", "embed"])
def test_memory_that_runs_out_anywhere_is_no_traceback(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(BlockwiseModel, method, full)
    with pytest.raises(BudgetError, match=r"memory ran out: .*CUBLAS_STATUS_ALLOC_FAILED.* finished blocks are kept"):
        streamslr.compress(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["match", *slow("propagate")])
def test_matching_and_propagation_are_cut_too(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, phase: str
) -> None:
    method = getattr(Passes, phase)
    failed: list[int] = []

    def once(self: Passes, *args: Any) -> Any:
        if not failed:
            failed.append(self.windows.micro_batch)
            method(self, *args)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return method(self, *args)

    monkeypatch.setattr(Passes, phase, once)
    state = streamslr.compress(**settings | {"match_held_out": 0})
    half = {"match": 2, "propagate": 3}[phase]  # a step of matching has 4 windows
    assert (failed, state.micro_batch) == ([6], half)
    again = f"phase {phase} ran out of memory (CUDA out of memory): once more with windows {half} at a time"
    assert again in caplog.text
    assert verify(settings["out"]).problems == ()


@pytest.mark.slow
def test_a_run_begun_under_a_tight_budget_goes_on_in_its_pieces_under_a_generous_one(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= MAIN

    def tight(out: Path) -> RunContext:
        context = open_run(RunConfig.of(**settings | {"out": out}))
        return replace(context, plan=replace(context.plan, micro_batch=2, solver_workspace=0))

    run(tight(tmp_path / "unbroken"))
    broken = tight(settings["out"])

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(broken.blockwise, "evict_block", stop)  # block 0 is committed by then
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    streamslr.compress(**settings | {"host_mem": "100GB"})
    assert run_contents(settings["out"]) == run_contents(tmp_path / "unbroken")


def test_a_full_disk_under_the_gram_matrices_names_the_way_out(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def full(path: Path, *arguments: Any, **settings: Any) -> Any:
        if path.name.startswith("gram-"):
            raise OSError(28, "No space left on device")
        return opened(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", full)
    context = open_run(RunConfig.of(**settings))
    with pytest.raises(BudgetError, match=r"Gram matrix of model.layers.0.* No space left .* --scratch"):
        run(replace(context, plan=replace(context.plan, grams_at="disk")))
