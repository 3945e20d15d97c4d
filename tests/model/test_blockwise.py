"""The blockwise model gives the bits of the whole model, one block at a time, and refuses what it cannot take apart."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging as transformers_logging

from streamslr.errors import InputError
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import Checkpoint, open_checkpoint
from streamslr.model.parameter_names import unread_parts
from tests.support.markers import slow
from tests.support.tiny_models import VOCABULARY, tiny_checkpoint, tiny_config, tiny_model

CPU = torch.device("cpu")
T = 17  # longer than the sliding windows of tiny_models


def token_ids(batch: int = 3, length: int = T, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def blockwise_of(folder: Path, dtype: torch.dtype = torch.float32) -> BlockwiseModel:
    return BlockwiseModel(open_checkpoint(str(folder)), dtype, CPU)


@torch.no_grad()
def streamed_logits(blockwise: BlockwiseModel, ids: Tensor) -> Tensor:
    blockwise.load_non_block()
    hidden = blockwise.embed(ids)
    blockwise.evict_non_block()
    for i in range(len(blockwise.block_names)):
        blockwise.load_block(i)
        _, hidden = blockwise.pass_block(i, hidden)
        blockwise.evict_block(i)
    blockwise.load_non_block()
    logits = blockwise.logits(ids, hidden)
    blockwise.evict_non_block()
    return logits


@torch.no_grad()
def whole_logits(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def live_blocks(blockwise: BlockwiseModel) -> set[int | None]:
    """Return the blocks with a parameter in memory; None stands for the non-block tensors."""
    model = blockwise._model
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.is_meta]
    blocks: set[int | None] = set()
    for name in names:
        inside = [i for i, block in enumerate(blockwise.block_names) if name.startswith(block + ".")]
        blocks.add(inside[0] if inside else None)
    return blocks


# Streaming gives the whole model's bits

DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt_neox", "cohere2"]
TUPLES = ["bloom", "falcon", "gptj"]
CARRYING = ["gemma3n_text", "gemma4_text", "glm_moe_dsa", "zamba", "openai-gpt"]
"""Models whose blocks hand on more than hidden states [b, T, h], or in another shape, or return them in a list."""
EXPERTS = ["mixtral", "qwen3_moe", "ernie4_5_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe"]


@pytest.mark.parametrize("architecture", [*DENSE, *TUPLES, *EXPERTS, *CARRYING, "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_logits_are_the_whole_models(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    folder = tiny_checkpoint(tmp_path / "m", architecture, shards=3)
    assert len(list(folder.glob("*.safetensors"))) >= 2
    logits = streamed_logits(blockwise_of(folder, dtype), token_ids())
    assert logits.shape == (3, T, VOCABULARY)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert torch.equal(logits, whole_logits(folder, token_ids(), dtype))


def test_the_sliding_window_matters_in_these_tests(tmp_path: Path) -> None:
    near = tiny_checkpoint(tmp_path / "near", "mistral")
    far = tiny_checkpoint(tmp_path / "far", "mistral", sliding_window=100)
    assert not torch.equal(whole_logits(near, token_ids()), whole_logits(far, token_ids()))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt", "bloom", "zamba"])
def test_tied_embeddings(tmp_path: Path, architecture: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m", architecture, tie=True)
    blockwise = blockwise_of(folder)
    assert torch.equal(streamed_logits(blockwise, token_ids()), whole_logits(folder, token_ids()))
    assert live_blocks(blockwise) == set()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_checkpoints_in_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_checkpoint(tmp_path / "m", dtype=dtype, shards=1)
    assert torch.equal(streamed_logits(blockwise_of(folder), token_ids()), whole_logits(folder, token_ids()))


def test_parameters_that_stay_in_float32(tmp_path: Path) -> None:
    """Ernie's routers stay in float32 at any compute dtype."""
    folder = tiny_checkpoint(tmp_path / "m", "ernie4_5_moe", dtype=torch.float32)
    blockwise = blockwise_of(folder, torch.bfloat16)
    for _ in range(2):
        logits = streamed_logits(blockwise, token_ids())
        assert torch.equal(logits, whole_logits(folder, token_ids(), torch.bfloat16))


@pytest.mark.parametrize("architecture", ["llama", "falcon"])
def test_a_model_of_one_block(tmp_path: Path, architecture: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m", architecture, blocks=1)
    assert torch.equal(streamed_logits(blockwise_of(folder), token_ids()), whole_logits(folder, token_ids()))


def test_keys_as_the_bare_model_saves_them(tmp_path: Path) -> None:
    """Checkpoints without the prefix of the base model, as Bloom's on the hub."""
    model = tiny_model(tiny_config("bloom", tie_word_embeddings=True))
    bare = model.base_model
    assert isinstance(bare, PreTrainedModel)
    bare.save_pretrained(tmp_path / "m")
    assert not any("transformer" in key for key in open_checkpoint(str(tmp_path / "m")).tensors)
    logits = streamed_logits(blockwise_of(tmp_path / "m"), token_ids())
    assert torch.equal(logits, whole_logits(tmp_path / "m", token_ids()))


def test_tensors_that_no_parameter_takes_are_no_obstacle(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", shards=1)
    extra = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.rand(8),
        "mtp.layers.0.mlp.up_proj.weight": torch.rand(128, 64),
        "some.counter": torch.tensor([3]),
    }
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors")
    blockwise = blockwise_of(folder)
    assert torch.equal(streamed_logits(blockwise, token_ids()), whole_logits(folder, token_ids()))
    # every key is somewhere, so that all of a shard can be released and copied
    assert "model.layers.1.self_attn.rotary_emb.inv_freq" in blockwise.block_tensors[1]
    assert {"mtp.layers.0.mlp.up_proj.weight", "some.counter"} <= set(blockwise.non_block_tensors)
    assert blockwise.unread == {"mtp": 1, "some": 1}


def test_unread_parts_at_the_same_place_of_several_modules_are_one() -> None:
    keys = ["h.0.attn.bias", "h.0.attn.weight", "h.1.attn.bias", "h.1.attn.weight", "h.2.attn.bias", "h.2.norm"]
    assert unread_parts(keys, {"h.0.attn.weight", "h.1.attn.weight"}) == {"h.*.attn.bias": 2, "h.2": 2}


def test_every_key_is_in_one_block_or_in_none(tmp_path: Path) -> None:
    for architecture in ("llama", "qwen3_moe"):
        folder = tiny_checkpoint(tmp_path / architecture, architecture)
        blockwise = blockwise_of(folder)
        keys = [key for block in blockwise.block_tensors for key in block] + list(blockwise.non_block_tensors)
        assert sorted(keys) == sorted(open_checkpoint(str(folder)).tensors)
        assert sorted({key for keys in blockwise.sources.values() for key in keys}) == sorted(keys)


# How blocks are called


def test_batches_of_any_shape_without_embedding_them_first(tmp_path: Path) -> None:
    """After a resume hidden states come from disk, and the non-block tensors are not loaded."""
    folder = tiny_checkpoint(tmp_path / "m", "gemma2")
    first, second = blockwise_of(folder), blockwise_of(folder)
    for batch, length in ((3, T), (1, T), (2, 30)):
        first.load_non_block()
        hidden = first.embed(token_ids(batch, length))
        first.evict_non_block()
        first.load_block(1)
        second.load_block(1)
        assert torch.equal(first.run_block(1, hidden), second.run_block(1, hidden))
        first.evict_block(1)
        second.evict_block(1)
        assert live_blocks(second) == set()


def test_masks_are_shared_between_blocks_not_copied(tmp_path: Path) -> None:
    """Gemma 2 alternates two kinds of attention, so there are two masks for a shape at any depth."""
    blockwise = blockwise_of(tiny_checkpoint(tmp_path / "m", "gemma2", blocks=8))
    calls = blockwise._chain.calls((2, 64))
    tensors = {
        id(value) for call in calls for _, value in call.values() if isinstance(value, Tensor) and value.dim() == 4
    }
    assert len(calls) == 8
    assert len(tensors) <= 2


def test_gradients_flow_through_a_block_when_asked_for(tmp_path: Path) -> None:
    blockwise = blockwise_of(tiny_checkpoint(tmp_path / "m"))
    blockwise.load_block(0)
    hidden = torch.randn(2, 5, 64)
    assert not blockwise.run_block(0, hidden).requires_grad
    linear = blockwise.linear("model.layers.0.mlp.down_proj")
    linear.weight.requires_grad_(True)
    blockwise.run_block(0, hidden).sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.abs().sum() > 0


def test_changed_weights_and_hooks_take_part(tmp_path: Path) -> None:
    blockwise = blockwise_of(tiny_checkpoint(tmp_path / "m"))
    blockwise.load_block(1)
    inputs = []
    linear = blockwise.linear("model.layers.1.mlp.up_proj")
    linear.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    before = blockwise.run_block(1, torch.ones(1, 4, 64))
    linear.weight.data = torch.zeros_like(linear.weight)
    after = blockwise.run_block(1, torch.ones(1, 4, 64))
    assert len(inputs) == 2
    assert not torch.equal(before, after)
    blockwise.load_block(1)
    assert torch.equal(blockwise.run_block(1, torch.ones(1, 4, 64)), before)
    assert blockwise.load_block(1).linears["model.layers.1.mlp.up_proj"] is linear


def test_linears_by_name_and_shape(tmp_path: Path) -> None:
    blockwise = blockwise_of(tiny_checkpoint(tmp_path / "m"))
    assert blockwise.block_names == ("model.layers.0", "model.layers.1", "model.layers.2")
    assert blockwise.linears[1] == {
        "model.layers.1.self_attn.q_proj": (64, 64),
        "model.layers.1.self_attn.k_proj": (32, 64),
        "model.layers.1.self_attn.v_proj": (32, 64),
        "model.layers.1.self_attn.o_proj": (64, 64),
        "model.layers.1.mlp.gate_proj": (128, 64),
        "model.layers.1.mlp.up_proj": (128, 64),
        "model.layers.1.mlp.down_proj": (64, 128),
    }
    with pytest.raises(KeyError, match="not a linear"):
        blockwise.linear("model.layers.1.mlp")


def test_a_block_without_its_linears_as_the_checkpoint_stores_it(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "qwen2", dtype=torch.bfloat16)
    blockwise = blockwise_of(folder)
    blockwise.load_block(1)
    blockwise.linear("model.layers.1.self_attn.q_proj").weight.data.zero_()
    stored = {key: t for path in folder.glob("*.safetensors") for key, t in load_file(path).items()}
    others = blockwise.as_stored(1)
    assert sorted(name.removeprefix("model.layers.1.") for name in others) == [
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.k_proj.bias",
        "self_attn.q_proj.bias",
        "self_attn.v_proj.bias",
    ]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in others.items())
    assert blockwise.stored_dtype("model.layers.1.self_attn.q_proj.weight") == torch.bfloat16


@pytest.mark.parametrize("architecture", [*DENSE, *TUPLES, *EXPERTS])
def test_shapes_are_seen_without_weights(tmp_path: Path, architecture: str) -> None:
    blockwise = blockwise_of(tiny_checkpoint(tmp_path / "m", architecture))
    seen: dict[str, int] = {}
    for name in blockwise.linears[2]:
        blockwise.linear(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].shape[-1]})
        )
    blockwise.run_on_meta(2)
    assert seen == {name: d for name, (_, d) in blockwise.linears[2].items()}
    assert live_blocks(blockwise) == set()


# Memory


@pytest.mark.parametrize("architecture", ["llama", "bloom", "mixtral"])
def test_at_most_one_block_is_live(tmp_path: Path, architecture: str) -> None:
    blockwise = blockwise_of(tiny_checkpoint(tmp_path / "m", architecture))
    assert live_blocks(blockwise) == set()
    blockwise.load_non_block()
    assert live_blocks(blockwise) == {None}
    blockwise.embed(token_ids())
    blockwise.evict_non_block()
    assert live_blocks(blockwise) == set()
    for i in range(3):
        blockwise.load_block(i)
        assert live_blocks(blockwise) == {i}
        with pytest.raises(RuntimeError, match=rf"evict_block\({i}\)"):
            blockwise.load_block((i + 1) % 3)
        blockwise.evict_block(i)
        assert live_blocks(blockwise) == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evicted_block_leaves_no_mapping_and_no_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    """No view of a mapped shard and no copy is left, even before the garbage collector runs."""
    folder = tiny_checkpoint(tmp_path / "m", dtype=torch.bfloat16)
    blockwise = blockwise_of(folder, dtype)

    def held() -> int:
        return sum(
            1 for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and not x.is_meta and x.numel() > 1000
        )

    gc.collect()
    before = held()
    gc.disable()
    try:
        for i in range(2):
            blockwise.load_block(i)
            assert held() > before
            blockwise.evict_block(i)
            assert held() == before
            assert str(folder) not in Path("/proc/self/maps").read_text()
        blockwise.load_non_block()
        blockwise.evict_non_block()
        assert held() == before
        assert str(folder) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


def test_misuse_is_told(tmp_path: Path) -> None:
    blockwise = blockwise_of(tiny_checkpoint(tmp_path / "m"))
    with pytest.raises(RuntimeError, match=r"load_non_block\(\) first"):
        blockwise.embed(token_ids())
    with pytest.raises(RuntimeError, match=r"load_non_block\(\) first"):
        blockwise.logits(token_ids(), torch.zeros(3, T, 64))
    with pytest.raises(RuntimeError, match=r"load_block\(1\) first"):
        blockwise.run_block(1, torch.zeros(3, T, 64))


def test_transformers_settings_are_left_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    capfd.readouterr()
    streamed_logits(blockwise_of(folder), token_ids())
    assert capfd.readouterr() == ("", "")
    assert before == (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())


# Checkpoints that do not fit the model


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "m", shards=1, dtype=torch.float32)


def rewrite(folder: Path, change: dict[str, Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path) | change
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


def test_missing_parameters_are_named_before_loading(single: Path) -> None:
    rewrite(single, {f"model.layers.{i}.mlp.up_proj.weight": None for i in (1, 2)})
    with pytest.raises(InputError) as caught:
        blockwise_of(single)
    assert "lacks 2 of the 30 parameters" in str(caught.value)
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert "2 of 3 blocks" in str(caught.value)


def test_wrong_shapes_are_named_before_loading(single: Path) -> None:
    rewrite(single, {"model.layers.1.mlp.up_proj.weight": torch.rand(64, 128)})
    with pytest.raises(InputError) as caught:
        blockwise_of(single)
    assert "model.layers.1.mlp.up_proj.weight in model.safetensors is [64, 128]" in str(caught.value)
    assert "[128, 64]" in str(caught.value)


def test_integers_for_a_parameter_are_named_before_loading(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "gpt_neox", shards=1)
    name = "gpt_neox.layers.0.attention.dense.bias"
    rewrite(folder, {name: load_file(folder / "model.safetensors")[name].to(torch.int32)})
    with pytest.raises(InputError, match=rf"{name} in model\.safetensors is torch\.int32"):
        blockwise_of(folder)


def test_values_that_are_not_finite(single: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(single / "model.safetensors")[name]
    weight[3, 4], weight[5, 6] = float("nan"), float("-inf")
    rewrite(single, {name: weight, "model.norm.weight": torch.full((64,), float("inf"))})
    blockwise = blockwise_of(single)
    blockwise.load_block(0)
    blockwise.evict_block(0)
    with pytest.raises(InputError) as caught:
        blockwise.load_block(1)
    assert f"{name} in model.safetensors has 2 of 8192 values" in str(caught.value)
    with pytest.raises(InputError, match=r"model\.norm\.weight in model\.safetensors has 64 of 64 values"):
        blockwise.load_non_block()


def test_values_that_overflow_the_compute_dtype(single: Path) -> None:
    rewrite(single, {"model.layers.0.mlp.up_proj.weight": torch.full((128, 64), 1e6)})
    with pytest.raises(InputError, match=r"up_proj\.weight .*8192 of 8192 .* as torch\.float16"):
        blockwise_of(single, torch.float16).load_block(0)


def test_a_block_from_another_checkpoint(tmp_path: Path) -> None:
    """A replay of finished blocks loads them like this, and leaves the model's own weights alone."""
    a = tiny_checkpoint(tmp_path / "a", seed=0)
    b = tiny_checkpoint(tmp_path / "b", seed=1)
    hidden = torch.randn(2, 5, 64)
    blockwise, other = blockwise_of(a), blockwise_of(b)
    blockwise.load_block(1, open_checkpoint(str(b)))
    other.load_block(1)
    assert torch.equal(blockwise.run_block(1, hidden), other.run_block(1, hidden))
    blockwise.load_block(1)
    assert not torch.equal(blockwise.run_block(1, hidden), other.run_block(1, hidden))


def test_a_block_that_another_checkpoint_lacks(tmp_path: Path) -> None:
    a = tiny_checkpoint(tmp_path / "a")
    b = tiny_checkpoint(tmp_path / "b", blocks=1)
    with pytest.raises(InputError, match=r"b lacks 9 of 9 parameters .* model\.layers\.1\."):
        blockwise_of(a).load_block(1, open_checkpoint(str(b)))


def test_tensors_in_blocks_that_the_model_does_not_use_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path / "m", blocks=2, shards=1)
    tensors = load_file(folder / "model.safetensors")
    unused = "model.layers.1.mlp.up_proj.lora_A.weight"
    inv_freq = "model.layers.1.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {unused: torch.ones(2, 64), inv_freq: torch.ones(8)}, folder / "model.safetensors")
    BlockwiseModel(open_checkpoint(str(folder)), torch.float32, torch.device("cpu"))
    assert f"LlamaForCausalLM has no place for {unused} (1 such tensors)" in caplog.text


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "mpt", "codegen"])
def test_windows_longer_than_the_models_positions(tmp_path: Path, architecture: str) -> None:
    """The table of positions is beside the blocks or in them, and may be a mask."""
    sizes: dict[str, Any] = {"n_positions": 8, "max_position_embeddings": 8, "max_seq_len": 8, "rotary_dim": 8}
    blockwise = blockwise_of(tiny_checkpoint(tmp_path / "m", architecture, blocks=1, **sizes))
    with pytest.raises(InputError, match="cannot take windows of 17 tokens"):
        streamed_logits(blockwise, token_ids())


# Models that cannot be compressed, or not even be taken apart


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*DENSE, *TUPLES, *EXPERTS, "gpt2", "olmoe", *slow("qwen2_moe", "glm4_moe")])
def test_what_can_be_compressed(tmp_path: Path, architecture: str) -> None:
    blockwise_of(tiny_checkpoint(tmp_path / "m", architecture)).require_compressible()


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("jetmoe", "its own code takes neither tokens alone nor tokens with the experts chosen for them"),
    ],
)
def test_what_cannot_be_compressed(tmp_path: Path, architecture: str, words: str) -> None:
    blockwise = blockwise_of(tiny_checkpoint(tmp_path / "m", architecture))
    with pytest.raises(InputError) as caught:
        blockwise.require_compressible()
    assert words in str(caught.value)
    assert "can be evaluated, but not compressed" in str(caught.value)


def test_models_that_are_no_decoders(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    config = {"model_type": "t5", "d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 64}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="builds no causal language model from a T5Config"):
        blockwise_of(folder)


class OddConfig(LlamaConfig):
    model_type = "streamslr_odd"
    oddity: str = ""


class OddModel(LlamaModel):
    """A Llama whose blocks are no plain chain; config.oddity says in which way."""

    config_class = OddConfig

    def forward(self, input_ids: Tensor, use_cache: bool = False, **_: Any) -> BaseModelOutputWithPast:
        oddity = self.config.oddity
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=hidden.device)[None]
        rope = self.rotary_emb(hidden, position_ids=positions)
        memory: list[Tensor] = []
        first = hidden
        for i, layer in enumerate(self.layers if oddity != "skips a block" else self.layers[:-1]):
            more: dict[str, Any] = {}
            if oddity == "list":
                more["memory"] = memory
            elif oddity == "token values":
                more["bias"] = (input_ids.float(),)
            elif oddity == "keeps":
                more["first"] = first
            elif oddity == "between" and i:
                hidden = hidden + 1
            hidden = layer(hidden, position_embeddings=rope, attention_mask=None, **more)
            first = hidden if i == 0 else first
        output = hidden + first if oddity == "adds" else hidden
        return BaseModelOutputWithPast(last_hidden_state=self.norm(output))


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.model = OddModel(config)
        if config.oddity == "shared weights":
            self.model.layers[2].mlp = self.model.layers[0].mlp
        if config.oddity == "no linears":
            for layer in self.model.layers:
                layer.mlp = nn.Identity()
                layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    setattr(layer.self_attn, name, nn.Identity())
        self.post_init()


@pytest.fixture(scope="module")
def odd() -> None:
    AutoConfig.register(OddConfig.model_type, OddConfig)
    AutoModelForCausalLM.register(OddConfig, OddForCausalLM)


def odd_checkpoint(folder: Path, oddity: str) -> Checkpoint:
    config = OddConfig(**(tiny_config("llama").to_dict() | {"oddity": oddity, "model_type": OddConfig.model_type}))
    model = OddForCausalLM(config)
    model.save_pretrained(folder)
    return open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("oddity", "words"),
    [
        ("list", "blocks share state: block 0 is handed a list as 'memory'"),
        ("between", "the hidden states change between blocks 0 and 1"),
        ("skips a block", "only 2 of 3 blocks are called"),
        ("keeps", "block 1 is handed 'first', which the model makes of what an earlier block returned"),
        ("adds", "the model makes its output of what several blocks return"),
    ],
)
def test_blocks_that_are_no_chain(odd: None, tmp_path: Path, oddity: str, words: str) -> None:
    checkpoint = odd_checkpoint(tmp_path / "m", oddity)
    with pytest.raises(InputError) as caught:
        BlockwiseModel(checkpoint, torch.float32, CPU)
    assert words in str(caught.value)


def test_values_that_depend_on_tokens_are_found_when_embedding(odd: None, tmp_path: Path) -> None:
    blockwise = BlockwiseModel(odd_checkpoint(tmp_path / "m", "token values"), torch.float32, CPU)
    blockwise.load_non_block()
    with pytest.raises(InputError, match="hands block 0 the value 'bias', which depends on the tokens"):
        blockwise.embed(token_ids())


def test_an_ordinary_registered_model_is_taken(odd: None, tmp_path: Path) -> None:
    blockwise = BlockwiseModel(odd_checkpoint(tmp_path / "m", ""), torch.float32, CPU)
    blockwise.require_compressible()
    assert torch.equal(streamed_logits(blockwise, token_ids()), whole_logits(tmp_path / "m", token_ids()))


def test_blocks_without_linears_are_not_compressible(odd: None, tmp_path: Path) -> None:
    blockwise = BlockwiseModel(odd_checkpoint(tmp_path / "m", "no linears"), torch.float32, CPU)
    with pytest.raises(InputError, match=r"model\.layers\.0 holds no linear that can be packed"):
        blockwise.require_compressible()


def test_a_layer_that_is_a_part_of_several_blocks_stays_dense(tmp_path: Path) -> None:
    """Zamba's transformer layer, which the checkpoint stores once."""
    blockwise = blockwise_of(tiny_checkpoint(tmp_path / "m", "zamba", tie=True))
    blockwise.require_compressible()
    layer = "model.layers.{}.shared_transf.self_attn.q_proj"
    assert blockwise.dense[0][layer.format(0)] == "it is a part of several blocks"
    assert layer.format(2) not in blockwise.dense[2]
    assert "model.layers.2.mamba_decoder.mamba.in_proj" in blockwise.linears[2]
    assert not any("shared_transf" in name for name in blockwise.load_block(0).parameters())


def test_blocks_that_share_weights_are_not_compressible(odd: None, tmp_path: Path) -> None:
    odd_checkpoint(tmp_path / "m", "")
    config = tmp_path / "m/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"oddity": "shared weights"}))
    with pytest.raises(InputError, match=r"layers\.0\.mlp.* and model\.layers\.2\.mlp.* are one parameter"):
        blockwise_of(tmp_path / "m").require_compressible()
