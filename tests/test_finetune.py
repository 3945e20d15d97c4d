"""Fine-tuning: U and V learn a text, all else stays as it was; a training that is cut off can only go on."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file

import streamslr
from streamslr.errors import InputError, ResumeError, StreamslrError
from streamslr.finetune import finetune
from streamslr.memory import free_host_memory
from streamslr.results.evaluate import evaluate
from streamslr.results.export import export
from streamslr.results.inspect import read_run, run_table
from streamslr.results.report.page import write_report
from streamslr.results.verify import verify
from tests.support.compressed_folders import edit_journal, file_contents
from tests.support.killing import finetune_in_child
from tests.support.markers import slow

RUN: dict[str, Any] = {"samples": 4, "seq_len": 16, "rank": 4, "device": "cpu", "match": False}
SETTINGS: dict[str, Any] = {"seq_len": 32, "batch": 8, "lr": 0.05, "steps": 10, "device": "cpu"}


@pytest.fixture(scope="module")
def tuned(compressed: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Result of fine-tuning the compressed folder. Read only."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    finetune(compressed, text, out, **SETTINGS)
    return out


def perplexity(folder: Path, text: Path) -> float:
    return evaluate(str(folder), text, 32, windows=8, device="cpu", free_memory=free_host_memory()).perplexity


def test_the_loss_falls_on_windows_held_out_and_the_journal_says_so(compressed: Path, tuned: Path, text: Path) -> None:
    (record,) = read_run(tuned).finetuned
    assert read_run(tuned).quality is None, "the run's check was of the weights before"
    assert record.loss_after < record.loss_before
    assert (record.data, record.steps, record.lr, record.batch) == ("text.txt", 10, 0.05, 8)
    assert perplexity(tuned, text) < perplexity(compressed, text)


def test_u_and_v_alone_change_and_keep_their_dtype(compressed: Path, tuned: Path) -> None:
    for shard in compressed.glob("*.safetensors"):
        before, after = load_file(shard), load_file(tuned / shard.name)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            same = tensor.dtype == after[name].dtype and torch.equal(tensor, after[name])
            assert same != name.endswith((".U", ".V")), name
            assert tensor.dtype == after[name].dtype
        with safe_open(shard, "pt") as one, safe_open(tuned / shard.name, "pt") as other:
            assert one.metadata() == other.metadata()


def test_scales_of_values_on_a_grid_are_trained_too(llama: Path, text: Path, tmp_path: Path) -> None:
    grid = RUN | {"values": "int4", "group": 16, "rank": 0}
    streamslr.compress(llama, tmp_path / "slr", calibration=text, **grid)
    finetune(tmp_path / "slr", text, tmp_path / "out", **SETTINGS)
    for shard in (tmp_path / "slr").glob("*.safetensors"):
        before, after = load_file(shard), load_file(tmp_path / "out" / shard.name)
        changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert changed == {name for name in before if name.endswith(".scales")}
        assert all(tensor.dtype == after[name].dtype for name, tensor in before.items())
    assert not verify(tmp_path / "out").problems
    (record,) = read_run(tmp_path / "out").finetuned
    assert record.loss_after < record.loss_before
    assert perplexity(tmp_path / "out", text) < perplexity(tmp_path / "slr", text)


def test_every_command_takes_the_result(tuned: Path, text: Path, tmp_path: Path) -> None:
    assert verify(tuned).problems == ()
    assert "fine-tuned on text.txt, 10 steps" in str(run_table(tuned, read_run(tuned)).caption)
    assert "10 steps of 8 windows" in write_report(tuned, tmp_path / "report.html").read_text()
    finetune(tuned, text, tmp_path / "again", **SETTINGS | {"steps": 1})
    assert [record.steps for record in read_run(tmp_path / "again").finetuned] == [10, 1]


def test_its_peft_export_is_the_same_model_and_trains_with_peft(tuned: Path, tmp_path: Path) -> None:
    export(tuned, tmp_path / "peft", "peft")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft/adapter", dtype=torch.float32, is_trainable=True)
    ids = torch.arange(2, 42).view(2, 20)
    found = model(ids, labels=ids)
    torch.testing.assert_close(
        found.logits, streamslr.load(tuned, device="cpu", dtype="float32")(ids).logits, rtol=1e-4, atol=1e-4
    )
    found.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_the_source_stays_and_two_trainings_give_the_same_bytes(
    compressed: Path, tuned: Path, text: Path, tmp_path: Path
) -> None:
    before = file_contents(compressed)
    finetune(compressed, text, tmp_path / "out", **SETTINGS)
    assert file_contents(compressed) == before
    assert file_contents(tmp_path / "out") == file_contents(tuned)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Before the settings, the second file, the journal and the folder itself take their names, and after 6 of 10 steps.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("counting", "die_at"), [*slow(("renames", 0), ("renames", 2)), ("renames", -2), ("renames", -1), ("steps", 6)]
)
def test_what_is_killed_passes_for_nothing_and_goes_on(
    compressed: Path, tuned: Path, text: Path, tmp_path: Path, counting: str, die_at: int
) -> None:
    if die_at < 0:
        die_at += len(file_contents(tuned)) + 2  # the settings, each file of the result, the result
    assert finetune_in_child(compressed, text, tmp_path / "out", SETTINGS, counting, die_at) == -9
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError):
        read_run(tmp_path / "out.partial")
    finetune(compressed, text, tmp_path / "out", **SETTINGS)
    assert file_contents(tmp_path / "out") == file_contents(tuned)
    assert not (tmp_path / "out.partial").exists()


def test_going_on_begins_at_the_last_checkpoint(
    compressed: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert finetune_in_child(compressed, text, tmp_path / "out", SETTINGS, "steps", 6) == -9
    with pytest.raises(ResumeError, match="other settings \\(lr\\)"):
        finetune(compressed, text, tmp_path / "out", **SETTINGS | {"lr": 0.01})
    with caplog.at_level("INFO", logger="streamslr"):
        finetune(compressed, text, tmp_path / "out", **SETTINGS)
    assert "continuing from step 6 of 10" in caplog.text


@pytest.mark.parametrize("damage", ["trainer_state.json", "optimizer.pt", "digests.json", "before digests.json"])
def test_a_checkpoint_that_was_cut_off_is_passed_over(
    compressed: Path, tuned: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    assert finetune_in_child(compressed, text, tmp_path / "out", SETTINGS, "steps", 6) == -9
    last = tmp_path / "out.partial" / "checkpoint-6"
    if damage.startswith("before"):
        (last / "digests.json").unlink()
    else:
        (last / damage).write_bytes((last / damage).read_bytes()[:-9])
    with caplog.at_level("INFO", logger="streamslr"):
        finetune(compressed, text, tmp_path / "out", **SETTINGS)
    assert "checkpoint-6 was not written to its end, or has changed; it is deleted" in caplog.text
    assert "continuing from step 5 of 10" in caplog.text
    assert file_contents(tmp_path / "out") == file_contents(tuned)


def test_a_training_without_a_whole_checkpoint_begins_anew(
    compressed: Path, tuned: Path, text: Path, tmp_path: Path
) -> None:
    assert finetune_in_child(compressed, text, tmp_path / "out", SETTINGS, "steps", 6) == -9
    for path in (tmp_path / "out.partial").glob("checkpoint-*/digests.json"):
        path.unlink()
    finetune(compressed, text, tmp_path / "out", **SETTINGS)
    assert file_contents(tmp_path / "out") == file_contents(tuned)


def test_one_step_is_a_step(compressed: Path, text: Path, tmp_path: Path) -> None:
    record = finetune(compressed, text, tmp_path / "out", **SETTINGS | {"steps": 1})
    assert record.loss_after < record.loss_before


def test_the_same_line_on_the_finished_result_says_that_it_is_done(
    compressed: Path, text: Path, tuned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = shutil.copytree(tuned, tmp_path / "out")
    (tmp_path / "out.partial").mkdir()  # killed before it was removed
    with caplog.at_level("INFO", logger="streamslr"):
        assert finetune(compressed, text, out, **SETTINGS) == read_run(tuned).finetuned[-1]
    assert "holds the result of this fine-tuning already" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert file_contents(out) == file_contents(tuned)
    with pytest.raises(ResumeError, match="is there already"):
        finetune(compressed, text, out, **SETTINGS | {"seed": 1})
    (out / "model-block-00000.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="model-block-00000"):
        finetune(compressed, text, out, **SETTINGS)


def test_a_run_does_not_go_on_in_the_result(llama: Path, tuned: Path, text: Path) -> None:
    with pytest.raises(ResumeError, match="fine-tuned"):
        streamslr.compress(llama, tuned, calibration=text, **RUN)


def test_a_training_that_diverges_leaves_nothing(compressed: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(StreamslrError, match="Lower --lr"):
        finetune(compressed, text, tmp_path / "out", **SETTINGS | {"lr": 1e30})
    assert not list(tmp_path.iterdir())


def test_bad_input_is_refused_before_any_work(compressed: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"nowhere\.txt does not exist"):
        finetune(compressed, tmp_path / "nowhere.txt", out, **SETTINGS)
    with pytest.raises(InputError, match="less than a batch of 8000"):
        finetune(compressed, text, out, **SETTINGS | {"batch": 8000})
    with pytest.raises(InputError, match="holds no streamslr"):
        finetune(llama, text, out, **SETTINGS)
    with pytest.raises(InputError, match="outside of"):
        finetune(compressed, text, compressed / "out", **SETTINGS)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ResumeError, match="is there already"):
        finetune(compressed, text, out, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_that_are_unfinished_damaged_or_of_rank_0(compressed: Path, text: Path, tmp_path: Path) -> None:
    def journal(change: Any) -> Path:
        copy = shutil.copytree(compressed, tmp_path / "slr", dirs_exist_ok=True)
        with edit_journal(copy) as state:
            change(state)
        return copy

    def no_rank(state: Any) -> None:
        for linear in (linear for block in state["blocks"] for linear in block["linears"]):
            linear["rank"] = 0

    with pytest.raises(InputError, match="unfinished: 1 of 2"):
        finetune(journal(lambda state: state["blocks"].pop()), text, tmp_path / "out", **SETTINGS)
    with pytest.raises(InputError, match="rank 0"):
        finetune(journal(no_rank), text, tmp_path / "out", **SETTINGS)
    copy = journal(lambda state: None)
    path = copy / "model-block-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(InputError, match=r"model-block-00001\.safetensors has sha256"):
        finetune(copy, text, tmp_path / "out", **SETTINGS)


def test_a_link_out_of_the_folder_is_not_copied(compressed: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slr"
    shutil.copytree(compressed, folder)
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere")
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"tokenizer\.json in .* is a link to .*elsewhere"):
        finetune(folder, text, tmp_path / "out", seq_len=32, steps=1)
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_during_the_training_is_refused(
    compressed: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(compressed, tmp_path / "slr")

    def damage(*_: Any) -> None:
        shard = folder / "model-block-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")

    monkeypatch.setattr("streamslr.finetune.train", damage)
    with pytest.raises(InputError, match=r"model-block-00001\.safetensors is damaged or was changed"):
        finetune(folder, text, tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()
