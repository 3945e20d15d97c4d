"""Tensors in the dtype they are stored in, also where the live block holds them rounded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import open_checkpoint
from tests.support.tiny_models import tiny_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_weight_to_solve_is_the_stored_one(stored: torch.dtype, compute: torch.dtype, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", blocks=2, shards=1, dtype=stored)
    weights = load_file(folder / "model.safetensors")
    blockwise = BlockwiseModel(open_checkpoint(str(folder)), compute, CPU)
    block = blockwise.load_block(1)
    for name in block.linears:
        weight = blockwise.stored_weight(name)
        assert weight.dtype == torch.float32
        assert torch.equal(weight, weights[f"{name}.weight"].float())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["gpt_oss", "granitemoe", "mixtral"])
def test_fused_tensors_are_written_as_stored(architecture: str, compute: torch.dtype, tmp_path: Path) -> None:
    """Whether transformers fuses what the checkpoint stores, renames it, or keeps it."""
    folder = tiny_checkpoint(tmp_path / "m", architecture, blocks=2, shards=1, dtype=torch.float32)
    exact = BlockwiseModel(open_checkpoint(str(folder)), torch.float32, CPU)
    blockwise = BlockwiseModel(open_checkpoint(str(folder)), compute, CPU)
    exact.load_block(1)
    live = {name: p.clone() for name, p in blockwise.load_block(1).parameters().items()}
    expected, others = exact.as_stored(1), blockwise.as_stored(1)
    assert expected.keys() == others.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in others.items())
    now = blockwise.load_block(1).parameters()
    assert all(torch.equal(now[name], tensor) for name, tensor in live.items())


def test_a_fused_tensor_is_converted_anew_and_the_live_block_stays(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "mixtral", blocks=2, shards=1, dtype=torch.float32)
    blockwise = BlockwiseModel(open_checkpoint(str(folder)), torch.bfloat16, CPU)
    block = blockwise.load_block(1)
    name, parameter = next((n, p) for n, p in block.parameters().items() if p.dim() > 1)
    exact = blockwise.checkpoint.read_one(name)
    (path,) = (p for p in blockwise.sources if p.startswith("model.layers.1") and blockwise.sources[p] == (name,))
    converted = blockwise._stored._convert(path, torch.float32)
    assert torch.equal(converted, exact)
    assert torch.equal(parameter, exact.bfloat16())
