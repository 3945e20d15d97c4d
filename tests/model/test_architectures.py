"""Tiny models of many architectures through all that streamslr does: equal at each step, or refused with the reason.

`tools/sweep_architectures.py` takes every architecture of transformers, and writes what came of it into the
models guide; here is a part of them.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Mistral3ForConditionalGeneration

import streamslr
from tests.support.architectures import BEGIN, END, GUIDE, cell, save, shrunk_config, sweep
from tests.support.markers import slow
from tests.support.tiny_models import tiny_model

FAST = ["falcon_h1", "gpt_bigcode", "mamba", "mistral3", "gpt2", "rwkv"]
"""Buffers that another module fills; weights that are read; no attention; a vision part; and two refusals."""
SLOW = [
    *("deepseek_v32", "nanochat", "llava", "bart", "bert", "ctrl", "gemma3_text", "granitemoehybrid", "jamba"),
    *("kimi_linear", "longcat_flash", "olmo_hybrid", "qwen2", "qwen3_5_text", "qwen3_next", "qwen4_exp_text"),
    *("recurrent_gemma", "xlstm", "zaya", "gemma4_text", "nemotron_h", "inkling2_text"),
]


@pytest.mark.parametrize("architecture", [*FAST, *slow(*SLOW)])
def test_equal_or_refused_as_the_guide_says(architecture: str, tmp_path: Path) -> None:
    outcome = sweep(architecture, tmp_path)
    made = GUIDE.read_text().partition(BEGIN)[2].partition(END)[0]
    if outcome.result == "equal":
        assert f"`{architecture}`" in made.partition("|")[0], outcome
    else:
        assert outcome.result in ("evaluated", "refused"), outcome
        assert f"| `{architecture}` | {cell(outcome.reason)} |" in made


@pytest.mark.slow
def test_the_decoder_of_a_model_with_vision_is_compressed_and_the_rest_passed_through(
    tmp_path: Path, text: Path
) -> None:
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    save(tiny_model(shrunk_config("mistral3")), dense)
    settings: dict[str, Any] = {"samples": 4, "seq_len": 16, "rank": 4, "device": "cpu", "match": False}
    journal = streamslr.compress(dense, packed, calibration=text, **settings)
    assert all(linear.name.startswith("language_model.") for block in journal.blocks for linear in block.linears)
    before, rest = load_file(dense / "model.safetensors"), load_file(packed / "model-outside.safetensors")
    others = {name for name in before if "vision" in name or "projector" in name}
    assert others
    assert others <= rest.keys()
    assert all(torch.equal(before[name], rest[name]) for name in others)
    model = streamslr.load(packed, device="cpu")
    assert type(model) is Mistral3ForConditionalGeneration
    loaded = model.state_dict()
    assert {name for name in others if not torch.equal(loaded[f"model.{name}"], before[name])} == set()
