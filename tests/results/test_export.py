"""Exports load without streamslr as the model of the compressed folder; they resume, and refuse what is not theirs."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import streamslr
from streamslr.calibration.tokens import text_windows
from streamslr.errors import BudgetError, InputError, ResumeError
from streamslr.model.checkpoint import open_checkpoint
from streamslr.results.evaluate import evaluate
from streamslr.results.export import export, vllm_max_lora_rank
from tests.support.compressed_folders import BLOCK, file_contents, rewrite_block
from tests.support.killing import compress_in_child, export_in_child
from tests.support.markers import slow
from tests.support.tiny_models import tiny_checkpoint

SETTINGS: dict[str, Any] = {"samples": 4, "seq_len": 16, "rank": 4, "device": "cpu", "match": False}
SETTINGS |= {"method": "eora-wanda"}  # it solves at once


@pytest.fixture
def folder(compressed: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(compressed, tmp_path / "slr")


def merged(folder: Path) -> torch.nn.Module:
    """Return the dense model that holds S + U·V in float32, built in memory."""
    checkpoint = open_checkpoint(str(folder))
    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict() | {"quantization_config": None})
    weights = {name: tensor.float() for name, tensor in checkpoint.read(checkpoint.tensors).items()}
    assert config.architectures
    architecture = getattr(transformers, config.architectures[0])
    model: torch.nn.Module = architecture.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(2, 42).view(2, 20)
    with torch.inference_mode():
        result: torch.Tensor = model(ids).logits
    return result


@pytest.mark.parametrize("architecture", ["llama", *slow("phi3"), "opt", *slow("gpt_neox")])
def test_every_export_has_the_logits_of_the_merged_model(architecture: str, text: Path, tmp_path: Path) -> None:
    # of 48, a rank that the narrower linears (k_proj of llama: 32x64) cannot have: ranks are mixed
    model = tiny_checkpoint(tmp_path / "model", architecture, blocks=2, tie=architecture == "opt")
    streamslr.compress(model, tmp_path / "slr", calibration=text, **SETTINGS | {"rank": 48})
    export(tmp_path / "slr", tmp_path / "dense", "dense", torch.float32)
    export(tmp_path / "slr", tmp_path / "peft", "peft")
    expected = logits(merged(tmp_path / "slr"))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.dtype == torch.float32
    assert torch.equal(logits(dense), expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="peft")  # missing or unexpected adapter keys, patterns without a match
        adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft/adapter", dtype=torch.float32)
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "peft/base", dtype=torch.float32)
    assert not torch.allclose(logits(base), expected, atol=1e-2), "U·V is in the adapter alone"


def test_ranks_that_differ_and_linears_without_one(folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        attention = "model.layers.0.self_attn"
        del tensors[f"{attention}.q_proj.U"], tensors[f"{attention}.q_proj.V"]
        tensors[f"{attention}.o_proj.U"] = tensors[f"{attention}.o_proj.U"][:, :3].contiguous()
        tensors[f"{attention}.o_proj.V"] = tensors[f"{attention}.o_proj.V"][:3].contiguous()

    rewrite_block(folder, change)
    export(folder, tmp_path / "out", "peft")
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.0.self_attn.o_proj": 3}
    assert "q_proj" not in config["target_modules"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "out/adapter")
    torch.testing.assert_close(logits(model), logits(merged(folder)), rtol=1e-5, atol=1e-5)
    assert {
        name for name, module in model.named_modules() if name.endswith("q_proj") and hasattr(module, "lora_A")
    } == {"base_model.model.model.layers.1.self_attn.q_proj"}


def test_text_and_perplexity_agree_with_the_streamed_evaluation(compressed: Path, text: Path, tmp_path: Path) -> None:
    export(compressed, tmp_path / "dense", "dense", torch.float32)
    export(compressed, tmp_path / "peft", "peft")
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft/adapter", dtype=torch.float32),
    ]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "peft/base")
    ids = text_windows(tokenizer, text, 16, None)
    streamed = evaluate(str(compressed), text, 16, device="cpu", free_memory=10**9).nll
    for model in models:
        with torch.inference_mode():
            log_p = model(ids).logits.double().log_softmax(-1)
        assert -log_p[:, :-1].gather(2, ids[:, 1:, None]).mean().item() == pytest.approx(streamed, abs=1e-5)
    prompt = tokenizer("A language model", return_tensors="pt", return_token_type_ids=False)
    one, other = (model.generate(**prompt, min_new_tokens=64, max_new_tokens=64, do_sample=False) for model in models)
    assert torch.equal(one, other)


def test_by_default_a_dense_export_rounds_the_sum_once_and_keeps_the_rest(compressed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = export(compressed, out, "dense")
    assert (result.shards, result.made, result.rank) == (3, 3, 0)
    checkpoint, exported = open_checkpoint(str(compressed)), open_checkpoint(str(out))
    assert exported.tensors.keys() == checkpoint.tensors.keys()
    for name, tensor in exported.read(exported.tensors).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, checkpoint.read([name])[name].bfloat16()), name
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (compressed / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("to", "die_at"), [("dense", 0), ("dense", 3), ("peft", 5), ("peft", 7), ("peft", 11)])
def test_what_a_kill_left_goes_on_to_the_same_bytes(compressed: Path, tmp_path: Path, to: str, die_at: int) -> None:
    out = tmp_path / "out"
    export(compressed, out, to)
    whole = file_contents(out)
    shutil.rmtree(out)
    assert export_in_child(compressed, out, to, die_at) == -9
    record = out / ".streamslr-export.json"
    done = json.loads(record.read_text())["shards"] if record.exists() else {}
    times = {path: (out / path).stat().st_mtime_ns for path in done}
    result = export(compressed, out, to)
    assert result.made == result.shards - len(done)
    assert {path: (out / path).stat().st_mtime_ns for path in done} == times, "what was finished is not made again"
    assert file_contents(out) == whole


def test_a_finished_export_is_checked_and_what_is_damaged_made_again(
    compressed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    export(compressed, out, "dense")
    whole = file_contents(out)
    shard = out / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    assert export(compressed, out, "dense").made == 1
    assert shard.name in caplog.text
    assert file_contents(out) == whole


@pytest.mark.parametrize("file", [BLOCK, "config.json", "tokenizer.json"])
def test_a_damaged_file_is_named(folder: Path, tmp_path: Path, file: str) -> None:
    content = bytearray((folder / file).read_bytes())
    content[-3] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=f"{file} is damaged"):
        export(folder, tmp_path / "out", "dense")


def test_an_unfinished_run_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    settings = {"model": llama, "out": tmp_path / "slr", "calibration": text, **SETTINGS}
    assert compress_in_child(settings, die_at=9) == -9
    with pytest.raises(InputError, match=r"unfinished: \d of 2 blocks"):
        export(tmp_path / "slr", tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused_and_left_alone(compressed: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ResumeError, match=r"notes\.txt"):
        export(compressed, tmp_path, "dense")
    assert file_contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_folder_of_another_export_is_refused(compressed: Path, tmp_path: Path) -> None:
    export(compressed, tmp_path / "out", "dense")
    with pytest.raises(ResumeError, match="to: 'dense' there, 'peft' now"):
        export(compressed, tmp_path / "out", "peft")
    with pytest.raises(ResumeError, match="dtype: 'as stored' there, 'float32' now"):
        export(compressed, tmp_path / "out", "dense", torch.float32)


def test_an_export_into_the_compressed_folder_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="outside of"):
        export(folder, folder / "dense", "dense")


def test_without_a_low_rank_part_there_is_no_adapter(llama: Path, text: Path, tmp_path: Path) -> None:
    streamslr.compress(llama, tmp_path / "slr", calibration=text, **SETTINGS | {"rank": 0})
    with pytest.raises(InputError, match="--to dense"):
        export(tmp_path / "slr", tmp_path / "out", "peft")
    export(tmp_path / "slr", tmp_path / "dense", "dense")


def test_a_full_disk_is_refused_before_the_first_shard(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Statvfs", (), {"f_bavail": 10, "f_frsize": 4096})()
    monkeypatch.setattr("os.statvfs", lambda path: free)
    with pytest.raises(BudgetError, match=r"41\.0 kB free"):
        export(compressed, tmp_path / "out", "dense")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_what_overflows_the_dtype_asked_for_is_named(folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"].fill_(1e5)

    rewrite_block(folder, change)
    with pytest.raises(InputError, match=r"input_layernorm\.weight does not fit torch\.float16"):
        export(folder, tmp_path / "out", "dense", torch.float16)


def test_the_smallest_rank_that_vllm_takes() -> None:
    assert [vllm_max_lora_rank(rank) for rank in (1, 16, 17, 512, 513)] == [8, 16, 32, 512, None]
