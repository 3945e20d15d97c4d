"""Fused experts taken apart: the same numbers, the checkpoint's names, and what is left alone."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import open_checkpoint
from streamslr.model.experts import Experts, unfuse
from tests.support.architectures import shrunk_config
from tests.support.tiny_models import starved_checkpoint, tiny_checkpoint, tiny_config, tiny_model

NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


def pair(architecture: str, dtype: torch.dtype = torch.float32, top_k: int = 3) -> tuple[nn.Module, Experts]:
    """Return an experts module of transformers and the module that replaces it, with the same weights."""
    config = tiny_config(architecture, blocks=1)
    model, other = tiny_model(config, dtype), tiny_model(config, dtype)
    (path,) = (name for name, module in model.named_modules() if type(module).__name__.endswith("Experts"))
    fused = model.get_submodule(path)
    names = NAMES[architecture]
    stored = [f"{path}.{number}.{name}.weight" for number in range(4) for name in names]
    made = unfuse(other, get_model_conversion_mapping(other), stored).experts[path].to_empty(device="cpu")
    for number in range(4):
        parts = (*fused.get_parameter("gate_up_proj")[number].chunk(2), fused.get_parameter("down_proj")[number])
        for name, part in zip(names, parts, strict=True):
            made.get_submodule(f"{number}.{name}").load_state_dict({"weight": part})
    return fused, made


def routed(tokens: int, top_k: int, experts: range, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(len(experts), generator=draw)[:top_k] for _ in range(tokens)]) + experts.start
    x, weights = torch.randn(tokens, 64, generator=draw), torch.rand(tokens, top_k, generator=draw)
    return x.to(dtype), chosen, weights.to(dtype)


@pytest.mark.parametrize("count", [1, 2])
def test_few_experts_are_taken_apart_too(count: int, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "m", "mixtral", num_local_experts=count, num_experts_per_tok=count)
    blockwise = BlockwiseModel(open_checkpoint(str(model)), torch.float32, torch.device("cpu"))
    blockwise.require_compressible()
    assert len(blockwise.experts[0]) == 3 * count


def test_large_experts_are_taken_apart_where_there_are_as_many_as_each_is_wide() -> None:
    config = tiny_config("qwen3_moe", blocks=1, hidden_size=2048, moe_intermediate_size=512, num_experts=512)
    with torch.device("meta"):  # the shapes of Qwen3-Next
        model = AutoModelForCausalLM.from_config(config)
    stored = [f"model.layers.0.mlp.experts.0.{name}.weight" for name in NAMES["qwen3_moe"]]
    apart = unfuse(model, get_model_conversion_mapping(model), stored)
    assert not apart.refused
    assert [len(experts.weights["down_proj"]) for experts in apart.experts.values()] == [512]


def test_large_experts_are_taken_apart_where_parameters_have_different_numbers_of_them() -> None:
    config = shrunk_config("longcat_flash")
    config.num_layers = 1
    config.hidden_size, config.expert_ffn_hidden_size, config.n_routed_experts = 2048, 1024, 16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert len({len(parameter) for parameter in experts.parameters(recurse=False)}) > 1
    stored = [f"model.layers.0.mlp.experts.0.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    assert not unfuse(model, get_model_conversion_mapping(model), stored).refused


@pytest.mark.parametrize("architecture", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", [range(4), range(1, 4)])  # or the first has no token
@torch.no_grad()
def test_both_give_the_same_bits(architecture: str, dtype: torch.dtype, used: range) -> None:
    fused, made = pair(architecture, dtype)
    assert torch.equal(made(*routed(50, 3, used, dtype)), fused(*routed(50, 3, used, dtype)))


def test_gradients_are_those_of_the_fused_module_and_none_reaches_an_expert_without_tokens() -> None:
    fused, made = pair("mixtral")
    for module in (fused, made):
        (module(*routed(20, 2, range(1, 4), torch.float32)).square().sum()).backward()
    down = fused.get_parameter("down_proj").grad
    assert down is not None
    for number in (1, 2, 3):
        torch.testing.assert_close(made.get_parameter(f"{number}.w2.weight").grad, down[number])
    assert made.get_parameter("0.w2.weight").grad is None


def test_hooks_meet_every_expert_on_meta_and_where_it_has_no_token() -> None:
    _, made = pair("mixtral")
    seen: dict[str, tuple[int, ...]] = {}
    for number in range(4):
        for name in NAMES["mixtral"]:
            made.get_submodule(f"{number}.{name}").register_forward_pre_hook(
                lambda _, args, key=f"{number}.{name}": seen.update({key: tuple(args[0].shape)})
            )
    made(*routed(20, 3, range(1, 4), torch.float32))
    assert (seen["0.w1"], seen["0.w2"], seen["1.w1"]) == ((0, 64), (0, 128), (20, 64))
    made.to("meta")(*(tensor.to("meta") for tensor in routed(20, 2, range(4), torch.float32)))
    assert {seen[f"{number}.w2"] for number in range(4)} == {(20, 128)}


@torch.no_grad()
def test_some_experts_alone_see_what_they_see_among_all() -> None:
    _, made = pair("mixtral")
    seen: dict[str, list[Tensor]] = {}
    for number in range(4):
        for name in NAMES["mixtral"]:
            made.get_submodule(f"{number}.{name}").register_forward_pre_hook(
                lambda _, args, key=f"{number}.{name}": seen.setdefault(key, []).append(args[0])
            )
    for only in (None, frozenset({0, 2})):
        made.only = only
        made(*routed(20, 2, range(1, 4), torch.float32))
    assert made.received == (20, 64)
    twice = {key: inputs for key, inputs in seen.items() if len(inputs) == 2}
    assert {key[0] for key in twice} == {"0", "2"}
    assert all(torch.equal(one, other) for one, other in twice.values())


def test_names_are_the_checkpoints_own_and_routers_are_not_among_them(tmp_path: Path) -> None:
    blockwise = BlockwiseModel(
        open_checkpoint(str(tiny_checkpoint(tmp_path / "m", "mixtral"))), torch.float32, torch.device("cpu")
    )
    experts = [f"model.layers.1.block_sparse_moe.experts.{e}.{name}" for e in range(4) for name in ("w1", "w3", "w2")]
    attention = [f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"]
    assert set(blockwise.linears[1]) == {*attention, *experts}
    assert set(blockwise.experts[1]) == set(experts)
    assert blockwise.experts[1][experts[0]] == blockwise.experts[1][experts[3]] != blockwise.experts[1][experts[1]]
    blockwise.load_block(1)
    assert "model.layers.1.block_sparse_moe.gate.weight" in blockwise.as_stored(1)
    assert not any("gate" in name for name in blockwise.load_block(1).parameters()), "matching must not move a router"


def test_shared_experts_and_dense_blocks_see_every_token(tmp_path: Path) -> None:
    folder = starved_checkpoint(tmp_path / "m", "deepseek_v3", blocks=2)
    blockwise = BlockwiseModel(open_checkpoint(str(folder)), torch.float32, torch.device("cpu"))
    assert not blockwise.experts[0]
    assert len(blockwise.experts[1]) == 5 * 3
    assert "model.layers.1.mlp.shared_experts.up_proj" in blockwise.linears[1].keys() - blockwise.experts[1].keys()
    assert not any(name.endswith("mlp.gate") for name in blockwise.linears[1])


def test_the_gate_of_shared_experts_stays_dense(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "qwen2_moe", num_experts=4, moe_intermediate_size=64)
    blockwise = BlockwiseModel(open_checkpoint(str(folder)), torch.float32, torch.device("cpu"))
    blockwise.require_compressible()
    assert "model.layers.0.mlp.shared_expert.up_proj" in blockwise.linears[0]
    assert "model.layers.0.mlp.shared_expert_gate" not in blockwise.linears[0]


def test_code_that_needs_the_numbers_of_weights_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config("mixtral"))
    module = model.get_submodule("model.layers.0.mlp.experts")
    forward = inspect.unwrap(type(module).forward)

    def normalized(self: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = forward(self, x / self.get_parameter("gate_up_proj").norm(), index, weights)
        return out

    monkeypatch.setattr(type(module), "forward", normalized)
    stored = [f"model.layers.0.mlp.experts.0.{name}.weight" for name in NAMES["mixtral"]]
    conversions = get_model_conversion_mapping(model)
    apart = unfuse(model, conversions, stored)
    assert not apart.experts
    assert apart.conversions == conversions
    assert apart.refused["model.layers.0.mlp.experts.down_proj"].startswith("its own code needs their numbers")
