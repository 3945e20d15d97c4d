"""GPT-2, whose linears are stored transposed: compressed as [o, d], exported as the source stores them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import streamslr
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import open_checkpoint
from streamslr.results.export import export
from streamslr.results.verify import verify
from tests.support.compressed_folders import run_contents
from tests.support.killing import compress_in_child
from tests.support.tiny_models import tiny_checkpoint

SETTINGS: dict[str, Any] = {"samples": 6, "seq_len": 16, "rank": 4, "device": "cpu", "method": "eora-wanda"}
SETTINGS |= {"match_epochs": 2}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the keys of openai-community/gpt2: without the base model's prefix, and with masks."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("models") / "gpt2", "gpt2", blocks=2, shards=1, tie=True)
    path = folder / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    save_file(bare | masks, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def compressed(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run. Read only."""
    out = tmp_path_factory.mktemp("compressed") / "out"
    assert compress_in_child({"model": model, "out": out, "calibration": text, **SETTINGS}) == 0
    return out


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(torch.arange(2, 42).view(2, 20)).logits
    return result


def test_linears_are_packed_under_their_own_names(compressed: Path) -> None:
    assert verify(compressed).problems == ()
    linears = open_checkpoint(str(compressed)).packed_linears
    assert linears["h.1.mlp.c_fc"][1] == (256, 64)
    assert {name.removeprefix("h.0.") for name in linears if name.startswith("h.0.")} == {
        *("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_a_killed_run_goes_on_to_the_same_bytes(model: Path, compressed: Path, text: Path, tmp_path: Path) -> None:
    settings = {"model": model, "out": tmp_path / "out", "calibration": text, **SETTINGS}
    assert compress_in_child(settings, die_at=13) == -9
    assert compress_in_child(settings) == 0
    assert run_contents(tmp_path / "out") == run_contents(compressed)


def test_loaded_and_exported_models_agree(compressed: Path, tmp_path: Path) -> None:
    expected = logits(streamslr.load(compressed, device="cpu", dtype="float32"))
    export(compressed, tmp_path / "dense", "dense", torch.float32)
    export(compressed, tmp_path / "peft", "peft")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft/adapter", dtype=torch.float32)
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)


def test_a_dense_export_has_the_sources_names_and_shapes(model: Path, compressed: Path, tmp_path: Path) -> None:
    export(compressed, tmp_path / "dense", "dense")
    before = open_checkpoint(str(model)).tensors
    after = open_checkpoint(str(tmp_path / "dense")).tensors
    assert {name: info.shape for name, info in after.items()} == {name: info.shape for name, info in before.items()}


def test_a_transposed_linear_that_stays_dense_is_written_as_stored(tmp_path: Path) -> None:
    """Cross-attention that no token passes: its linears are not packed."""
    folder = tiny_checkpoint(tmp_path / "m", "gpt2", blocks=1, shards=1, add_cross_attention=True)
    blockwise = BlockwiseModel(open_checkpoint(str(folder)), torch.float32, CPU)
    blockwise.require_compressible()
    stored = load_file(folder / "model.safetensors")
    blockwise.load_block(0)
    written = blockwise.by_key(blockwise.as_stored(0))
    name = "transformer.h.0.crossattention.c_attn.weight"
    assert name.removesuffix(".weight") in blockwise.dense[0]
    assert torch.equal(written[name], stored[name])
