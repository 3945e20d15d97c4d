"""A compressed folder is a model of transformers: same logits, generate, save, train, and it stays packed."""

import json
import logging
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

import streamslr
from streamslr.errors import InputError
from streamslr.model.checkpoint import open_checkpoint
from streamslr.model.transformers_compat import HfQuantizer
from streamslr.results.evaluate import evaluate
from streamslr.runtime.linear import SparseLowRankLinear, _choose_gpu_kernel
from streamslr.runtime.loader import packed_modules
from tests.support.compressed_folders import compressed_folder, dense_model, edit_journal
from tests.support.tiny_models import TEXT, VOCABULARY

IDS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed_folder(tmp_path_factory.mktemp("load"))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    out: Tensor = model(IDS.to(model.device)).logits
    return out


def off_by(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("architecture", "tie"),
    [(name, False) for name in ("llama", "opt", "gpt_neox", "phi3", "qwen2", "bloom", "gptj")]
    + [(name, True) for name in ("llama", "opt", "gemma2")],
)
def test_logits_are_those_of_the_dense_sum(architecture: str, tie: bool, tmp_path: Path) -> None:
    made = compressed_folder(tmp_path, architecture, blocks=2, tie=tie)
    model = streamslr.load(made, device="cpu", dtype="float32")
    stored = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(packed_modules(model)) == sum(name.endswith(".meta") for name in stored)
    assert off_by(logits(model), logits(dense_model(made))) < 1e-5


@pytest.mark.parametrize(
    ("pattern", "rank"), [("2:4", 0), ("1:4", 4), ("4:8", 2), ("50%", 0), ("70%", 4), ("70%/row", 4)]
)
def test_every_pattern_and_rank(pattern: str, rank: int, tmp_path: Path) -> None:
    made = compressed_folder(tmp_path, pattern=pattern, rank=rank, blocks=2)
    model = streamslr.load(made, device="cpu", dtype=torch.float32)
    assert off_by(logits(model), logits(dense_model(made))) < 1e-5


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_the_stored_dtype_is_kept_and_rounds_like_the_dense_model(stored: torch.dtype, tmp_path: Path) -> None:
    made = compressed_folder(tmp_path, dtype=stored, blocks=2)
    model = streamslr.load(made, device="cpu")
    assert {t.dtype for t in (*model.parameters(),)} == {stored}
    exact = logits(dense_model(made))
    assert off_by(logits(model), exact) < 2 * off_by(logits(dense_model(made, stored)), exact)


@pytest.mark.skipif(hasattr(HfQuantizer, "get_new_dtype"), reason="transformers 5.21 and newer cast no integers")
def test_a_packed_linear_that_the_model_keeps_in_float32_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules", ["up_proj"])
    with pytest.raises(InputError, match=r"up_proj.*update transformers to 5\.21"):
        streamslr.load(folder, device="cpu", dtype="float16")


def test_from_pretrained_is_the_same_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model.model.layers[0].mlp.up_proj, SparseLowRankLinear)
    assert torch.equal(logits(model), logits(streamslr.load(folder, device="cpu")))


def test_a_base_model_without_its_head(folder: Path) -> None:
    base = AutoModel.from_pretrained(folder)
    whole = streamslr.load(folder, device="cpu")
    assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(folder: Path, device_map: Any) -> None:
    model = streamslr.load(folder, device_map=device_map)
    assert off_by(logits(model), logits(dense_model(folder))) < 0.05


def test_blocks_offloaded_to_disk(folder: Path) -> None:
    devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    devices |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    model = streamslr.load(folder, device_map=devices)
    offloaded = model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(offloaded, SparseLowRankLinear)
    assert {tensor.device.type for tensor in offloaded.packed().values()} == {"meta"}
    assert torch.equal(logits(model), logits(streamslr.load(folder, device="cpu")))
    with pytest.raises(InputError, match="keep_dense"):
        offloaded.keep_dense()
    kernel = _choose_gpu_kernel(offloaded)  # what a GPU would be asked: it must not hold a copy of its own
    assert kernel.weight is None
    assert "offloaded" in kernel.name


def test_generate_as_the_dense_model(folder: Path) -> None:
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    models: list[Any] = [streamslr.load(folder, device="cpu", dtype="float32"), dense_model(folder)]
    written, expected = (model.generate(IDS[:, :5], **settings) for model in models)
    assert written.shape == (2, 21)
    assert torch.equal(written, expected)


def test_keep_dense(folder: Path) -> None:
    packed = streamslr.load(folder, device="cpu", dtype="float32")
    dense = streamslr.load(folder, device="cpu", dtype="float32", keep_dense=True)
    assert off_by(logits(dense), logits(packed)) < 1e-5


@pytest.mark.parametrize("shard_size", ["5GB", "200KB"])
def test_saved_it_loads_again_with_the_same_logits(folder: Path, tmp_path: Path, shard_size: str) -> None:
    model = streamslr.load(folder, device="cpu")
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard_size)
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (shard_size != "5GB")
    assert torch.equal(logits(streamslr.load(tmp_path / "saved", device="cpu")), logits(model))


def test_a_saved_folder_evaluates_as_the_one_that_run_wrote(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "saved", ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    streamslr.load(folder, device="cpu").save_pretrained(tmp_path / "saved")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    first, second = (
        evaluate(str(one), tmp_path / "text.txt", 16, device="cpu", free_memory=1 << 30).perplexity
        for one in (folder, tmp_path / "saved")
    )
    assert first == second


def test_a_linear_split_between_shards_loads_but_is_refused_elsewhere(folder: Path, tmp_path: Path) -> None:
    model = streamslr.load(folder, device="cpu")
    model.save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    assert torch.equal(logits(streamslr.load(tmp_path / "saved", device="cpu")), logits(model))
    with pytest.raises(InputError, match=r"in another shard.*larger max_shard_size"):
        open_checkpoint(str(tmp_path / "saved"))


def test_trained_factors_are_saved(folder: Path, tmp_path: Path) -> None:
    model = streamslr.load(folder, device="cpu", dtype="float32").train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(IDS, labels=IDS).loss
    first.backward()
    optimizer.step()
    model.eval()
    assert model(IDS, labels=IDS).loss < first
    model.save_pretrained(tmp_path / "tuned")
    after = streamslr.load(tmp_path / "tuned", device="cpu")
    assert torch.equal(logits(after), logits(model))
    changed = {name.rpartition(".")[2] for name, t in after.state_dict().items() if not torch.equal(t, before[name])}
    assert {"U", "V"} <= changed
    assert not {"values", "meta"} & changed


@pytest.mark.slow
def test_a_compiled_model(folder: Path) -> None:
    model = streamslr.load(folder, device="cpu", dtype="float32")
    expected = logits(model)
    with torch.no_grad():
        assert off_by(torch.compile(model, backend="aot_eager")(IDS).logits, expected) < 1e-5


def test_what_multiplies_is_logged_once_a_model(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "streamslr"):
        streamslr.load(folder, device="cpu")
    logged = [message for message in caplog.messages if message.startswith("packed linears: ")]
    assert [message.partition(" by ")[0] for message in logged] == ["packed linears: 21 unpacked in tiles"]


def test_memory_on_a_grid_is_that_of_the_file(llama: Path, text: Path, tmp_path: Path) -> None:
    run: dict[str, Any] = {"samples": 2, "seq_len": 16, "rank": 4, "device": "cpu", "method": "eora-wanda"}
    run |= {"match": False, "values": "int4", "group": 32, "low_rank_values": "int8"}
    state = streamslr.compress(llama, tmp_path / "slr", calibration=text, **run)
    linears = packed_modules(streamslr.load(tmp_path / "slr", device="cpu")).values()
    held = sum(t.nbytes for linear in linears for t in (*linear.parameters(), *linear.buffers()))
    assert held == pytest.approx(sum(linear.nbytes for block in state.blocks for linear in block.linears), rel=0.02)


def test_memory_in_bf16_at_2_4_is_what_the_format_takes(tmp_path: Path) -> None:
    made = compressed_folder(tmp_path, blocks=1, hidden=256, rank=16)
    linears = packed_modules(streamslr.load(made, device="cpu")).values()
    held = sum(t.nbytes for linear in linears for t in (*linear.parameters(), *linear.buffers()))
    dense = sum(2 * linear.in_features * linear.out_features for linear in linears)
    factors = sum(2 * 16 * (linear.in_features + linear.out_features) for linear in linears)
    meta = sum(linear.out_features * math.ceil(linear.in_features / 12) for linear in linears)
    assert held == 0.5 * dense + meta + factors


# What loading takes

_PEAK = """
import sys, threading
import psutil, torch, streamslr
from streamslr.memory import anonymous
uss = lambda: psutil.Process().memory_full_info().uss
torch.set_grad_enabled(False)
# After a first model, what the libraries themselves take is there.
streamslr.load(sys.argv[1], device="cpu")(torch.zeros(1, 4, dtype=torch.long))
# Cast while it is read, a model lies beside the mapped pages of its shards, which the system takes back at will.
for dtype, taken in ("bfloat16", uss), ("float32", anonymous):
    before, readings, done = taken(), [], threading.Event()
    watcher = threading.Thread(target=lambda: [readings.append(taken()) for _ in iter(lambda: done.wait(0.002), True)])
    watcher.start()
    model = streamslr.load(sys.argv[2], device="cpu", dtype=dtype)
    model(torch.zeros(1, 4, dtype=torch.long))  # a mapped page counts once it is read
    readings.append(taken())
    done.set(); watcher.join()
    print(sum(t.nbytes for t in (*model.parameters(), *model.buffers())), max(readings) - before)
    del model
"""


@pytest.mark.slow
def test_loading_takes_the_packed_model_and_a_shard(tmp_path: Path, folder: Path) -> None:
    sizes: dict[str, Any] = {"hidden": 512, "intermediate_size": 4096, "blocks": 4, "rank": 8, "shards": 1}
    made = compressed_folder(tmp_path, **sizes)
    line = [sys.executable, "-c", _PEAK, str(folder), str(made)]
    out = subprocess.run(line, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    shard = max(file.stat().st_size for file in made.glob("*.safetensors"))
    for reading in out.stdout.splitlines():  # dense linears would take 54 MB in bfloat16, 109 MB in float32
        held, peak = map(int, reading.split())
        assert held / 2 < peak < held + shard + 15e6, f"{peak / 1e6:.0f} MB for {held / 1e6:.0f} MB"


# Refusals


def test_an_unfinished_folder(folder: Path, tmp_path: Path) -> None:
    made = compressed_folder(tmp_path, done=2)
    for load in (streamslr.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(InputError, match=r"no model\.layers\.2\.\S+ \(7 such linears\).*unfinished"):
            load(made)


@pytest.mark.slow
def test_an_unfinished_run_is_named_by_its_journal(llama: Path, text: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"calibration": text, "samples": 2, "seq_len": 16, "rank": 2, "device": "cpu"}
    streamslr.compress(llama, tmp_path / "out", **settings, match=False)
    assert streamslr.load(tmp_path / "out", device="cpu")
    with edit_journal(tmp_path / "out") as journal:
        journal["blocks"].pop()
    with pytest.raises(InputError, match="1 of 2 blocks are done; the `streamslr run` line that began it goes on"):
        streamslr.load(tmp_path / "out", device="cpu")


def test_folders_that_streamslr_did_not_write(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was not written by streamslr"):
        streamslr.load(folder.parent / "dense")
    with pytest.raises(InputError, match="no model that transformers knows"):
        streamslr.load(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [({"format_version": 99}, "format_version 99"), ({"pattern": 24}, "is damaged: pattern 24")],
)
def test_a_config_of_another_version_or_damaged(
    folder: Path, tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    made = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"] |= entry
    (made / "config.json").write_text(json.dumps(config))
    for load in (streamslr.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(InputError, match=message):
            load(made)


def test_a_truncated_shard(folder: Path, tmp_path: Path) -> None:
    made = shutil.copytree(folder, tmp_path / "copy")
    shard = made / "model-block-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model-block-00001.safetensors .*truncated"):
        streamslr.load(made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cpu", "device_map": "auto"}, "give one of them"),
        ({"dtype": "float99"}, "dtype 'float99' is none of torch's; give bfloat16"),
        pytest.param(
            {"device": "cuda"},
            "torch sees no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_arguments_that_cannot_hold(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        streamslr.load(folder, **arguments)
