"""The check of a run: its figures are those of plain transformers, survive a kill, and change no shard."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import streamslr
from streamslr.calibration.hidden_states import OnDisk
from streamslr.calibration.tokens import calibration_windows
from streamslr.cli import main
from streamslr.config import RunConfig
from streamslr.errors import InputError, ResumeError
from streamslr.memory import free_host_memory
from streamslr.model.blockwise import BlockwiseModel
from streamslr.results.check import Checked, check
from streamslr.results.inspect import read_run, run_table, summary
from streamslr.run.check import Check
from streamslr.run.context import open_run
from streamslr.run.journal import JournalState
from streamslr.run.passes import Passes
from streamslr.run.quality import WindowFigures, judge
from tests.support.compressed_folders import dense_model, edit_journal, rewrite_block, run_contents
from tests.support.killing import compress_by_ranks, compress_in_child
from tests.support.markers import long
from tests.support.tiny_models import tiny_checkpoint

BLOCKS, SEQ_LEN, WINDOWS = 3, 24, 5
BASICS: dict[str, Any] = {"samples": 6, "seq_len": SEQ_LEN, "rank": 4, "device": "cpu", "check_windows": WINDOWS}
BASICS |= {"method": "eora-wanda", "match_epochs": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is sure of its predictions, since its head is large: what compression changes then shows."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama", blocks=BLOCKS, shards=1, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def settings(model: Path, text: Path, tmp_path: Path) -> dict[str, Any]:
    return {"model": model, "out": tmp_path / "out", "calibration": text, **BASICS}


@pytest.fixture(scope="module")
def finished(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the settings. Read only."""
    out = tmp_path_factory.mktemp("finished") / "out"
    streamslr.compress(model, out, calibration=text, **BASICS)
    return out


def check_ids(model: Path, text: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(model)
    held_out = RunConfig.of(model=model, **BASICS).held_out
    windows = calibration_windows(tokenizer, text, BASICS["samples"], SEQ_LEN, 0, held_out=held_out, check=WINDOWS)
    return windows.check


def checked(folder: Path, **settings: Any) -> Checked:
    return check(folder, device="cpu", free_memory=free_host_memory(), **settings)


def cosines_of(state: JournalState) -> list[float | None]:
    return [block.check.cosine if block.check else None for block in state.blocks]


@torch.no_grad()
def logits_and_hidden(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return logits [n, T, V] and the output [n, T, h] of each block, in float64."""
    hidden: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: hidden.append(out[0] if isinstance(out, tuple) else out))
        for block in model.model.layers
    ]
    logits = model(input_ids=ids, use_cache=False).logits.double()
    for hook in hooks:
        hook.remove()
    return logits, [states.double() for states in hidden]


def test_the_figures_are_those_of_plain_transformers(model: Path, finished: Path, text: Path) -> None:
    ids = check_ids(model, text)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    (p, dense_hidden), (q, hidden) = (logits_and_hidden(m, ids) for m in (dense, dense_model(finished)))
    state = read_run(finished)
    assert state.quality is not None
    log_p, log_q = (logits[:, :-1].log_softmax(-1) for logits in (p, q))
    following = ids[:, 1:, None]
    assert state.quality.windows == WINDOWS
    assert state.quality.tokens == WINDOWS * (SEQ_LEN - 1)
    assert state.quality.perplexity_dense == pytest.approx(float((-log_p.gather(-1, following)).mean().exp()), rel=1e-4)
    assert state.quality.perplexity == pytest.approx(float((-log_q.gather(-1, following)).mean().exp()), rel=1e-4)
    assert state.quality.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert state.quality.top1_agreement == pytest.approx(float(agreement))
    expected = [
        float(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean())
        for a, b in zip(dense_hidden, hidden, strict=True)
    ]
    assert cosines_of(state) == pytest.approx(expected, abs=1e-5)


def test_more_tokens_than_are_compared_at_once_give_the_same(
    settings: dict[str, Any], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamslr.run.quality.TOKENS_AT_ONCE", 7)
    quality, whole = streamslr.compress(**settings).quality, read_run(finished).quality
    assert quality
    assert whole
    assert quality.kl == pytest.approx(whole.kl)
    assert quality.tokens == whole.tokens


def test_the_check_changes_no_byte_of_what_is_stored(settings: dict[str, Any], finished: Path) -> None:
    state = streamslr.compress(**settings | {"check_windows": 0})
    assert (state.check, state.quality) == (None, None)
    unchecked, with_check = (
        {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
        for folder in (settings["out"], finished)
    )
    assert unchecked == with_check
    assert [b.hidden_states for b in state.blocks] == [b.hidden_states for b in read_run(finished).blocks]


@pytest.mark.parametrize("die_at", [9, 13, 16])
def test_killed_at_any_time_the_same_line_gives_the_same_figures(
    settings: dict[str, Any], finished: Path, die_at: int
) -> None:
    assert compress_in_child(settings, die_at=die_at) == -9
    before = read_run(settings["out"])
    assert before.quality is None
    assert compress_in_child(settings) == 0
    assert run_contents(settings["out"]) == run_contents(finished)


def test_a_run_killed_before_its_last_commit_only_compares(settings: dict[str, Any], finished: Path) -> None:
    kills = iter(range(10, 40))
    while not settings["out"].exists() or not read_run(settings["out"]).complete:
        shutil.rmtree(settings["out"], ignore_errors=True)
        assert compress_in_child(settings, die_at=next(kills)) == -9
    assert read_run(settings["out"]).quality is None
    shutil.rmtree(settings["out"] / ".scratch")
    assert streamslr.compress(**settings).quality == read_run(finished).quality


def test_a_run_that_fails_has_stopped_writing(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_store, embed, store = threading.Event(), threading.Event(), BlockwiseModel.embed, OnDisk._store

    def store_when_allowed(self: OnDisk, *args: Any) -> None:
        if "check-" in self.folder.name:
            begun.set()
            may_store.wait()
        store(self, *args)

    def fail_in_the_check(self: BlockwiseModel, ids: Tensor) -> Tensor:
        if begun.is_set():  # the first check window is being written
            threading.Timer(0.01, may_store.set).start()
            raise KeyboardInterrupt
        return embed(self, ids)

    monkeypatch.setattr(OnDisk, "_store", store_when_allowed)
    monkeypatch.setattr(BlockwiseModel, "embed", fail_in_the_check)
    with pytest.raises(KeyboardInterrupt):  # not that windows are missing
        streamslr.compress(**settings)
    assert may_store.is_set()


def test_lost_hidden_states_are_made_again(settings: dict[str, Any], finished: Path, caplog: Any) -> None:
    assert compress_in_child(settings, die_at=13) == -9
    for left in (settings["out"] / ".scratch").glob("check-*"):
        shutil.rmtree(left)
    state = streamslr.compress(**settings)
    assert "hidden states of the check are lost" in caplog.text
    assert (state.quality, cosines_of(state)) == (read_run(finished).quality, cosines_of(read_run(finished)))


def test_a_resumed_run_keeps_its_check_windows(settings: dict[str, Any], finished: Path, caplog: Any) -> None:
    assert compress_in_child(settings, die_at=13) == -9
    state = streamslr.compress(**settings | {"check_windows": 2})
    assert "--check-windows 2 has no effect: the run began with 5" in caplog.text
    assert state.quality == read_run(finished).quality


def test_a_text_with_other_check_windows_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    assert compress_in_child(settings, die_at=13) == -9
    with pytest.raises(ResumeError, match=r"other check windows|tokens"):
        streamslr.compress(**settings | {"calibration": _written(tmp_path / "b.txt", "other words again " * 400)})


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_ruined_result_is_suspect_and_the_run_ends_well(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    propagate = Passes.propagate

    def ruin(self: Passes, block: Any, *args: Any) -> Any:
        result = propagate(self, block, *args)
        for linear in block.linears.values():
            linear.weight.neg_()
        return result

    monkeypatch.setattr(Passes, "propagate", ruin)
    state = streamslr.compress(**settings | {"match": False})
    assert state.complete
    assert state.quality
    assert state.quality.verdict == "suspect"
    assert "nats a token from those of the dense model" in state.quality.reason
    assert "THE RESULT IS SUSPECT" in caplog.text
    assert "WARNING: the result is suspect" in str(run_table(settings["out"], state).caption)


def test_a_weight_that_overflows_is_suspect(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(self: Check, block: Any) -> None:
        block.linears[next(iter(block.linears))].weight.fill_(float("nan"))
        passing(self, block)

    passing = Check.pass_compressed
    monkeypatch.setattr(Check, "pass_compressed", overflow)
    state = streamslr.compress(**settings | {"match": False})
    assert state.quality
    assert (state.quality.perplexity, state.quality.kl) == (None, None)
    assert cosines_of(state) == [None] * BLOCKS
    assert "not finite" in state.quality.reason
    assert json.loads(json.dumps(summary(settings["out"], state)))["quality"]["verdict"] == "suspect"


SOUND = [0.9992, 0.9991, 0.9990, 0.9988, 0.9987, 0.9983, 0.9980, 0.9979]


@pytest.mark.parametrize(
    ("cosines", "verdict"),
    [
        (SOUND, "good"),
        ([0.78, 0.74, 0.70, 0.65, 0.62, 0.55, 0.51, 0.50], "good"),
        ([*SOUND[:3], 0.9164, 0.9226, 0.9273, 0.9319, 0.9369], "suspect"),
        ([*SOUND[:7], 0.9426], "suspect"),
        ([0.99, 0.90], "good"),
    ],
    ids=["sound", "poor everywhere", "block 3 ruined", "last block ruined", "too few to tell"],
)
def test_a_block_that_falls_out_of_the_row_is_suspect(cosines: list[float], verdict: str) -> None:
    quality = judge([WindowFigures(nll_dense=40.0, nll=41.0, kl=1.0, agreeing=9)], 10, cosines)
    assert quality.verdict == verdict
    assert ("behind block" in quality.reason) == (verdict == "suspect")


def test_the_command_gives_the_figures_of_the_run(model: Path, finished: Path, text: Path) -> None:
    found, state = checked(finished, model=str(model), text=text), read_run(finished)
    assert found.own_windows
    assert found.quality == state.quality
    assert list(found.cosines) == cosines_of(state)


def test_model_and_text_are_found_beside_the_folder(model: Path, finished: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    with pytest.raises(InputError, match=r"was made with the text text\.txt; give it with --text"):
        checked(tmp_path / "out")
    shutil.copy(text, tmp_path / text.name)
    with pytest.raises(InputError, match=f"was made with the model {model.name}; give it with --model"):
        checked(tmp_path / "out")
    shutil.copytree(model, tmp_path / model.name)
    assert checked(tmp_path / "out").quality == read_run(finished).quality


def test_another_text_and_number_of_windows_are_checked_too(model: Path, finished: Path, tmp_path: Path) -> None:
    other = _written(tmp_path / "other.txt", "Something else, of no length to speak of. " * 40)
    found = checked(finished, model=str(model), text=other, windows=2)
    assert (found.own_windows, found.quality.windows) == (False, 2)


def test_a_folder_of_a_version_without_held_out_windows_is_checked(
    model: Path, finished: Path, text: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(finished, tmp_path / "old")
    with edit_journal(old) as journal:
        del journal["fingerprint"]["match_held_out"]
    assert checked(old, model=str(model), text=text, windows=2).quality.windows == 2


def test_a_changed_model_is_refused(model: Path, finished: Path, text: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(model, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="was not made from"):
        checked(finished, model=str(changed), text=text)


def test_a_ruined_folder_is_suspect_and_exit_code_0(
    model: Path, finished: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ruined = shutil.copytree(finished, tmp_path / "ruined")

    def ruin(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith((".U", ".values")):
                tensors[name].mul_(-3)

    rewrite_block(ruined, ruin)
    line = ("check", str(ruined), "--model", str(model), "--text", str(text), "--json")
    done = CliRunner().invoke(main, line)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["quality"]["verdict"] == "suspect"
    assert "THE RESULT IS SUSPECT" in caplog.text


def test_the_check_windows_are_planned_for(settings: dict[str, Any]) -> None:
    plan = open_run(RunConfig.of(**settings)).plan
    without = open_run(RunConfig.of(**settings | {"check_windows": 0})).plan
    assert plan.scratch_bytes - without.scratch_bytes == 4 * WINDOWS * SEQ_LEN * 64 * 4
    assert {phase.name for phase in plan.phases} - {phase.name for phase in without.phases} == {"check", "compare"}


@pytest.mark.parametrize("world", long(2, 7))
def test_ranks_find_the_same_figures(settings: dict[str, Any], finished: Path, world: int) -> None:
    """Of 7 ranks, two have no check window."""
    assert all(isinstance(log, list) for log in compress_by_ranks(world, settings | {"samples": 7}))
    alone = streamslr.compress(**settings | {"samples": 7, "out": settings["out"].with_name("alone")})
    shared = read_run(settings["out"])
    assert shared.quality
    assert alone.quality
    assert shared.check == alone.check
    assert shared.quality.perplexity_dense == pytest.approx(alone.quality.perplexity_dense, rel=1e-6)
    assert shared.quality.perplexity == pytest.approx(alone.quality.perplexity, rel=1e-2)
    assert shared.quality.kl == pytest.approx(alone.quality.kl, rel=5e-2)
    assert cosines_of(shared) == pytest.approx(cosines_of(alone), abs=5e-3)
