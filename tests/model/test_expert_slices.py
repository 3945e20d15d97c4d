"""The weight of one expert out of fused tensors is what transformers' conversion of the whole holds of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Concatenate, MergeModulelist, WeightConverter
from transformers.core_model_loading import Interleave, Transpose

from streamslr.model.checkpoint import open_checkpoint
from streamslr.model.expert_slices import Slice, can_convert_slices
from tests.support.tiny_models import tiny_checkpoint

EXPERTS, OUT, IN = 3, 8, 6


def stored(names: list[str], shape: tuple[int, ...]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name in names}


def read_slices(folder: Path, tensors: dict[str, Tensor], converter: Any, transposed: bool) -> list[Tensor]:
    """Write fused tensors beside a tiny model, and read the weight [o, d] of each expert."""
    tiny_checkpoint(folder, blocks=1, shards=1, tokenizer=False)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    parts = {f"{e}.w.weight": Slice(tuple(tensors), e, (OUT, IN), transposed, converter) for e in range(EXPERTS)}
    checkpoint.show_slices(parts)
    assert list(checkpoint.tensors) == list(parts)
    assert all(checkpoint.tensors[name].shape == (OUT, IN) for name in parts)
    return [checkpoint.read_one(name) for name in parts]


@pytest.mark.parametrize("transposed", [False, True])
def test_without_a_conversion_it_is_the_experts_matrix(tmp_path: Path, transposed: bool) -> None:
    tensors = stored(["experts"], (EXPERTS, IN, OUT) if transposed else (EXPERTS, OUT, IN))
    expected = tensors["experts"].transpose(1, 2) if transposed else tensors["experts"]
    made = read_slices(tmp_path / "m", tensors, None, transposed)
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))
    assert all(one.is_contiguous() for one in made)


@pytest.mark.parametrize(
    ("sources", "shape", "steps"),
    [
        (["a"], (EXPERTS, IN, OUT), [Transpose(1, 2)]),
        (["a"], (EXPERTS, OUT, IN), [Interleave(dim=1)]),
        (["b", "a"], (EXPERTS, OUT // 2, IN), [Concatenate(dim=1)]),
    ],
)
def test_a_conversion_gives_each_expert_its_part(
    tmp_path: Path, sources: list[str], shape: tuple[int, ...], steps: list[Any]
) -> None:
    converter = WeightConverter(list(sources), ["whole"], steps)
    tensors = stored(sources, shape)
    found: dict[str, Any] = {name: [tensor] for name, tensor in tensors.items()}
    for step in steps:
        found = step.convert(found, sources, ["whole"])
    made = read_slices(tmp_path / "m", tensors, converter, transposed=False)
    assert can_convert_slices(converter)
    assert all(torch.equal(one, other) for one, other in zip(made, found["whole"], strict=True))


@pytest.mark.parametrize("shape", [(EXPERTS, IN, OUT), (EXPERTS, OUT, IN)])
def test_a_layout_that_transformers_tells_by_its_shape_is_told_alike(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = stored(["a"], shape)
    converter = WeightConverter("a", "a", [Transpose(1, 2, check_dims=True)])
    made = read_slices(tmp_path / "m", tensors, converter, transposed=False)
    expected = tensors["a"] if shape == (EXPERTS, OUT, IN) else tensors["a"].transpose(1, 2)
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))


def test_conversions_that_mix_experts_are_not_cut() -> None:
    for step in (Transpose(0, 1), Concatenate(dim=0), MergeModulelist(dim=0)):
        assert not can_convert_slices(WeightConverter("a", "b", [step]))
