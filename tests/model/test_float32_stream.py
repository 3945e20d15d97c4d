"""A float32 residual stream in blocks that compute in bf16: as near to the exact block as products allow."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from streamslr.calibration.grams import GramCollector
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import open_checkpoint
from streamslr.model.float32_stream import find_float32_stream
from tests.support.markers import slow
from tests.support.tiny_models import tiny_checkpoint

CPU = torch.device("cpu")
ARCHITECTURES = ["llama", "bloom", "mixtral", "olmo", *slow("gemma2", "opt", "gpt_neox", "falcon", "phi3", "cohere2")]
ARCHITECTURES += slow("qwen3_moe", "deepseek_v3", "gptj", "olmo2", "qwen3")


def opened(folder: Path, dtype: torch.dtype, wide: bool = True) -> BlockwiseModel:
    blockwise = BlockwiseModel(open_checkpoint(str(folder)), dtype, CPU)
    if wide:
        blockwise.require_compressible()
    return blockwise


@torch.no_grad()
def error(blockwise: BlockwiseModel, hidden: Tensor, exact: Tensor) -> float:
    output = blockwise.load_block(1).run(hidden).double()
    blockwise.evict_block(1)
    return float((output - exact).square().sum() / (exact - hidden.double()).square().sum())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_block_adds_is_not_rounded_beside_a_large_residual(architecture: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", architecture, blocks=2)
    hidden = 16 * torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain, wide = opened(folder, torch.bfloat16, wide=False), opened(folder, torch.bfloat16)
    assert (plain.stream_dtype, wide.stream_dtype) == (torch.bfloat16, torch.float32)
    with torch.no_grad():
        exact = opened(folder, torch.float64, wide=False).load_block(1).run(hidden.double())
    assert wide.load_block(1).run(hidden).dtype == torch.float32
    assert error(wide, hidden, exact) < 0.2 * error(plain, hidden, exact)


@pytest.mark.parametrize("architecture", ["llama", "olmo", *slow("falcon", "mixtral", "olmo2")])
def test_linears_share_a_gram_of_the_inputs_that_they_multiply(architecture: str, tmp_path: Path) -> None:
    """OLMo has norms without weights: their float32 output is cast at the linears."""
    folder = tiny_checkpoint(tmp_path / "m", architecture, blocks=2)
    hidden = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    groups = []
    for wide in (False, True):
        blockwise = opened(folder, torch.bfloat16, wide)
        block = blockwise.load_block(1)
        seen: list[torch.dtype] = []
        with GramCollector(block) as collector:
            for linear in block.linears.values():
                linear.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].dtype))
            collector.run(range(len(hidden)), hidden)
        groups.append([gram.linears for gram in collector.grams()])
        assert set(seen) == {torch.bfloat16}
    assert groups[0] == groups[1]


def test_norms_are_float32_and_linears_are_not(tmp_path: Path) -> None:
    blockwise = opened(tiny_checkpoint(tmp_path / "m", "llama", blocks=2, dtype=torch.float32), torch.bfloat16)
    block = blockwise.load_block(1)
    stored = open_checkpoint(str(tmp_path / "m"))
    for name, parameter in block.parameters().items():
        norm = "norm" in name
        assert parameter.dtype == (torch.float32 if norm else torch.bfloat16)
        assert torch.equal(parameter, stored.read_one(name)) or not norm


def test_in_float32_nothing_is_cast(tmp_path: Path) -> None:
    blockwise = opened(tiny_checkpoint(tmp_path / "m", blocks=2), torch.float32)
    assert blockwise.stream_dtype == torch.float32
    assert not any(linear._forward_pre_hooks for linear in blockwise.load_block(1).linears.values())


def test_a_model_whose_blocks_end_in_a_norm_keeps_its_stream(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "streamslr")
    folder = tiny_checkpoint(tmp_path / "m", "opt", blocks=2, do_layer_norm_before=False)
    blockwise, plain = opened(folder, torch.bfloat16), opened(folder, torch.bfloat16, wide=False)
    assert blockwise.stream_dtype == torch.bfloat16
    assert "hidden states stay torch.bfloat16 inside the blocks: block 0 does not take float32" in caplog.text
    hidden = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(blockwise.load_block(1).run(hidden), plain.load_block(1).run(hidden))


class _Multiplies(nn.Module):
    """A block that multiplies the stream with a matrix itself."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(8, 8, dtype=torch.bfloat16, device="meta"))
        self.norm = nn.LayerNorm(8, dtype=torch.bfloat16, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = torch.matmul(x, self.matrix) + self.norm(x)
        return x + added


def test_a_product_of_two_dtypes_is_found_though_meta_allows_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "streamslr")
    block = _Multiplies()
    assert block(torch.empty(2, 3, 8, device="meta")).dtype == torch.float32
    names = SimpleNamespace(meta=dict(block.state_dict()))

    def run(_: int, dtype: torch.dtype) -> Any:
        return block(torch.empty(2, 3, 8, dtype=dtype, device="meta"))

    assert find_float32_stream(cast(Any, block), cast(Any, names), [block], torch.bfloat16, run) is None
    assert "aten.mm.default takes torch.bfloat16 and torch.float32" in caplog.text
    assert block.norm.weight.dtype == torch.bfloat16
    assert not block.norm._forward_hooks
