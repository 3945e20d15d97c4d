"""Bytes of a context, told from headers: those that transformers keeps in a real pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from streamslr.model.checkpoint import open_checkpoint
from streamslr.model.context_size import context_bytes
from tests.support.tiny_models import tiny_checkpoint

TOKENS = 40
HAS_EXPERTS_ON_META = hasattr(PreTrainedModel, "get_experts_implementation")  # since 5.23; before, an estimate


def bytes_of_a_pass(folder: Path) -> int:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    output = model(input_ids=torch.ones(1, TOKENS, dtype=torch.int64), use_cache=True)
    cache = output.get("past_key_values", output.get("cache_params"))
    assert isinstance(cache, DynamicCache)
    kept = 0
    for layer in cache.layers:
        kept += sum(getattr(layer, part).nbytes for part in ("keys", "values") if hasattr(layer, part))
        for states in ("conv_states", "recurrent_states"):
            kept += sum(state.nbytes for state in getattr(layer, states, {}).values())
    return kept


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("gemma3_text", {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        *([("deepseek_v3", {})] if HAS_EXPERTS_ON_META else []),
        ("falcon", {"multi_query": True}),
        *([("qwen3_next", {})] if HAS_EXPERTS_ON_META else []),
        ("mamba", {}),
    ],
)
def test_the_bytes_are_those_of_a_real_pass(tmp_path: Path, architecture: str, config: dict[str, Any]) -> None:
    folder = tiny_checkpoint(tmp_path / "model", architecture, blocks=4, **config)
    assert context_bytes(open_checkpoint(str(folder)), 2, TOKENS) == bytes_of_a_pass(folder) > 0


@pytest.mark.parametrize(
    ("architecture", "module", "expected", "said"),
    [
        ("llama", "LlamaModel", 2 * 4 * 2 * 16 * TOKENS * 2, "are estimated from config.json"),
        ("mamba", "MambaModel", 0, "are not counted"),
    ],
)
def test_a_model_that_cannot_tell_is_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    module: str,
    expected: int,
    said: str,
) -> None:
    heads: dict[str, Any] = (
        {"num_attention_heads": None, "num_key_value_heads": None} if architecture == "mamba" else {}
    )
    folder = tiny_checkpoint(tmp_path / "model", architecture, blocks=4, **heads)
    monkeypatch.setattr(f"transformers.{module}.forward", lambda *_, **__: {"last_hidden_state": torch.zeros(1)})
    assert context_bytes(open_checkpoint(str(folder)), 2, TOKENS) == expected
    assert f"keys and values of a context {said}" in caplog.text
