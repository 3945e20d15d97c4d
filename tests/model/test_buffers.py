"""Buffers that no checkpoint holds are computed as transformers does; one that is not filled is refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, initialization
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel, LlamaRotaryEmbedding

import streamslr
from streamslr.errors import InputError
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.buffers import compute_buffers, find_writers
from streamslr.model.checkpoint import open_checkpoint
from streamslr.model.meta_model import build_on_meta, get_tensor
from tests.support.tiny_models import tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "falcon_h1", "gpt_bigcode", "gptj"])
@pytest.mark.parametrize("inference", [True, False])
def test_buffers_are_the_whole_models(architecture: str, inference: bool) -> None:
    """Falcon-H1's mixers have theirs filled by the model around them; GPT-BigCode's and GPT-J's masks are bool."""
    config = tiny_config(architecture)
    whole = AutoModelForCausalLM.from_config(config)
    with torch.inference_mode(inference):
        model = build_on_meta(config, torch.float32, {})
        names = [name for name, _ in model.named_non_persistent_buffers()]
        compute_buffers(model, names, find_writers(model), CPU)
    assert names
    for name in names:
        assert torch.equal(get_tensor(model, name), get_tensor(whole, name)), name


WRONG: dict[str, Callable[[Tensor], object]] = {
    "not filled": lambda table: None,
    "half filled": lambda table: initialization.ones_(table[: len(table) // 2]),
    "made of what memory held": lambda table: table.mul_(2),
    "made of what memory held, if it is a number": lambda table: initialization.copy_(table, table.nan_to_num(1.0)),
    "drawn": lambda table: initialization.normal_(table),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("job", ["evaluate", "load"])
def test_a_buffer_that_is_not_filled_is_refused(
    llama: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch, job: str, wrong: str
) -> None:
    def init_weights(self: PreTrainedModel, module: nn.Module) -> None:
        if isinstance(module, LlamaRotaryEmbedding):
            WRONG[wrong](module.inv_freq)

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", init_weights, raising=False)

    def open_model() -> object:
        if job == "load":
            return streamslr.load(compressed)
        return BlockwiseModel(open_checkpoint(str(llama)), torch.float32, CPU)

    with pytest.raises(InputError, match=r"does not fill model\.rotary_emb\.inv_freq \[8\]"):
        open_model()
