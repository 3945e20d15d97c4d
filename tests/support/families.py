"""Tiny random checkpoints of the families that people use, each in the form that its repositories on the hub have."""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForMultimodalLM, PretrainedConfig

from streamslr.io.packed_layout import INDEX_FILE
from tests.support.quantized import LAYOUTS, Layout, mxfp4_experts
from tests.support.tiny_models import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer

Tensors = dict[str, Tensor]
HIDDEN = 64


@dataclass(frozen=True)
class Repository:
    """Content of a repository on the hub.

    Attributes:
        config: config.json.
        tensors: the stored tensors.
        dense: the tensors as they are for the same model of dense weights.
        dense_config: what config.json has otherwise for that model, so that transformers reads it.
    """

    config: Mapping[str, Any]
    tensors: Tensors
    dense: Tensors
    dense_config: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, twin: Path) -> None:
        """Write the repository in two shards with an index, and its dense twin in one file; both with a tokenizer."""
        for out in (folder, twin):
            out.mkdir()
            tiny_tokenizer().save_pretrained(out)
        (folder / "config.json").write_text(json.dumps(self.config))
        names = sorted(self.tensors)
        shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for shard, held in shards.items():
            save_file({name: self.tensors[name] for name in held}, folder / shard, {"format": "pt"})
        weight_map = {name: shard for shard, held in shards.items() for name in held}
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
        config = {name: value for name, value in self.config.items() if name not in ("quantization_config", "auto_map")}
        (twin / "config.json").write_text(json.dumps({**config, **self.dense_config}))
        save_file(self.dense, twin / "model.safetensors", {"format": "pt"})


# Parts of repositories


def saved(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Any], Tensors]:
    """Return config.json and the tensors that `save_pretrained` writes: transformers reverts its conversions.

    Corrections of routers are stored in float32, as DeepSeek and those after it do.
    """
    with tempfile.TemporaryDirectory() as folder:
        auto = AutoModelForMultimodalLM if "text_config" in config.sub_configs else None
        tiny_model(config, dtype, auto=auto).save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        correction = "e_score_correction_bias"
        kept = {n: t.float() if n.endswith(correction) else t.clone() for n, t in tensors.items()}
        return json.loads((Path(folder) / "config.json").read_text()), kept


def as_before_5(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json as transformers 4 wrote it: rope_theta and rope_scaling, torch_dtype."""
    old = {name: as_before_5(value) if isinstance(value, dict) else value for name, value in config.items()}
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    rope = old.pop("rope_parameters", None)
    if rope:
        old["rope_theta"] = rope.pop("rope_theta", 10000.0)
        old["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    if "transformers_version" in old:
        old["transformers_version"] = "4.51.0"
    return old


def random_like(tensors: Mapping[str, Tensor], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(tensor.shape, generator=generator) / 8 + (tensor.dim() == 1)).to(tensor.dtype)
        for name, tensor in tensors.items()
    }


def predicting_layer(tensors: Mapping[str, Tensor], block: int, hidden: int = HIDDEN) -> Tensors:
    """Return DeepSeek's layer for multi-token prediction, stored as one more block behind the last one, `block`."""
    old, new = f"model.layers.{block}.", f"model.layers.{block + 1}."
    like = {new + name.removeprefix(old): tensor for name, tensor in tensors.items() if name.startswith(old)}
    like |= {new + name: torch.empty(hidden, dtype=torch.bfloat16) for name in ("enorm.weight", "hnorm.weight")}
    like[f"{new}shared_head.norm.weight"] = like[f"{new}enorm.weight"]
    like[f"{new}eh_proj.weight"] = torch.empty(hidden, 2 * hidden, dtype=torch.bfloat16)
    like |= {new + name: tensors["lm_head.weight"] for name in ("embed_tokens.weight", "shared_head.head.weight")}
    return random_like(like, seed=1)


def quantized(
    config: Mapping[str, Any],
    tensors: Tensors,
    layout: Layout,
    which: str,
    entry: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    **dense_config: Any,
) -> Repository:
    """Return a repository with the weights that `which` matches stored in a layout.

    Args:
        config: config.json of the dense model.
        tensors: tensors of the dense model.
        layout: how a weight is stored.
        which: regular expression for names of weights.
        entry: config.json's quantization_config.
        names: name in the repository of parts of the layout; a part named "" is not stored.
        **dense_config: as in `Repository`.
    """
    random, stored, dense = np.random.default_rng(0), Tensors(), Tensors()
    for name, tensor in tensors.items():
        if not re.search(which, name):
            stored[name] = dense[name] = tensor
            continue
        o, d = tensor.shape
        parts, dense[name] = layout.make(o, d, random)
        renamed = {(names or {}).get(part, part): value for part, value in parts.items()}
        stored |= {name.removesuffix("weight") + part: value for part, value in renamed.items() if part}
    return Repository({**config, "quantization_config": entry}, stored, dense, dense_config)


def fused_experts(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return tensors with the experts of each block fused, as Qwen3.5 stores them: [E, 2i, h] and [E, h, i]."""
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for path in {name.partition(".experts.")[0] for name in tensors if ".experts." in name}:
        number = len({name for name in tensors if re.match(rf"{re.escape(path)}\.experts\.\d+\.up_proj", name)})
        gate, up, down = (
            torch.stack([tensors[f"{path}.experts.{e}.{part}_proj.weight"] for e in range(number)])
            for part in ("gate", "up", "down")
        )
        fused |= {f"{path}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{path}.experts.down_proj": down}
    return fused


def plain(config: Mapping[str, Any], tensors: Tensors, **dense_config: Any) -> Repository:
    return Repository(config, tensors, tensors, dense_config)


def whole(model_type: str, text: PretrainedConfig, vision: Mapping[str, Any], **more: Any) -> PretrainedConfig:
    """Return the configuration of a model that holds a decoder and a part for images."""
    parts = {"text_config": text.to_dict(), "vision_config": dict(vision)}
    return AutoConfig.for_model(model_type, **parts, tie_word_embeddings=text.tie_word_embeddings, **more)


# The families

_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 192}
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
_DYNAMIC: dict[str, str] = {"input_scale": ""}


def deepseek_v3() -> Repository:
    config, tensors = saved(tiny_config("deepseek_v3", 3, HIDDEN, **_MOE))
    tensors |= predicting_layer(tensors, 2)
    config = as_before_5(config) | {"num_nextn_predict_layers": 1, "rope_scaling": _YARN, "topk_method": "noaux_tc"}
    linears = r"layers\.\d+\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight"
    return quantized(config, tensors, LAYOUTS["fp8 blocks"], linears, _FP8, _DYNAMIC)


def kimi_k2() -> Repository:
    """Kimi K2 Thinking: DeepSeek's class under a model type of its own."""
    config, tensors = saved(tiny_config("deepseek_v3", 3, HIDDEN, **_MOE))
    config = as_before_5(config) | {
        "model_type": "kimi_k2",
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
        "num_nextn_predict_layers": 0,
    }
    layout = LAYOUTS["int4 groups"]
    entry = {**layout.entry, "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"]}
    return quantized(config, tensors, layout, r"\.experts\.", entry, model_type="deepseek_v3")


def kimi_k2_6() -> Repository:
    """Kimi K2.6: a model of images that holds Kimi K2, and says in text_config how it is quantized."""
    text = tiny_config("deepseek_v3", 3, HIDDEN, **_MOE)
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config, tensors = saved(whole("kimi_k25", text, {**vision, "pos_emb_height": 4, "pos_emb_width": 4}))
    hub_names = {  # which transformers reads, and does not restore
        "language_model.model.blocks.": "language_model.model.layers.",
        "model.mm_projector.": "mm_projector.",
        "vision_tower.encoder.patch_embed.": "vision_tower.patch_embed.",
    }
    for made, name in hub_names.items():
        tensors = {key.replace(made, name): tensor for key, tensor in tensors.items()}
    config["text_config"]["model_type"] = "kimi_k2"
    layout, text_config = LAYOUTS["int4 groups"], config["text_config"]
    stored = quantized(config, tensors, layout, r"\.experts\.", {})
    config["text_config"] = {**text_config, "quantization_config": layout.entry}
    return Repository(config, stored.tensors, stored.dense, {"text_config": text_config})


def qwen3_moe() -> Repository:
    config, tensors = saved(tiny_config("qwen3_moe", 2, HIDDEN, **_MOE))
    return plain(as_before_5(config), tensors)


def glm4_moe() -> Repository:
    sizes = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16, **_MOE}
    config, tensors = saved(tiny_config("glm4_moe", 3, HIDDEN, use_qk_norm=True, n_group=1, topk_group=1, **sizes))
    return plain(
        as_before_5(config) | {"num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5},
        tensors | predicting_layer(tensors, 2),
    )


def mixtral() -> Repository:
    config, tensors = saved(tiny_config("mixtral", 2, HIDDEN))
    return plain(as_before_5(config), tensors)


def minimax_m2() -> Repository:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 192}
    config, tensors = saved(tiny_config("minimax_m2", 2, HIDDEN, **sizes))
    config = as_before_5(config) | {
        "attn_type_list": [1, 1],
        "rotary_dim": 8,
        "use_mtp": True,
        "num_mtp_modules": 3,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    }
    entry = {**_FP8, "fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}
    linears = r"layers\.\d+\..*(_proj|\.w\d)\.weight"
    return quantized(config, tensors, LAYOUTS["fp8 blocks"], linears, entry, _DYNAMIC)


def _qwen3_5(model_type: str, **more: Any) -> Repository:
    text = tiny_config(
        f"{model_type}_text",
        4,
        HIDDEN,
        head_dim=16,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [1, 1, 0],
        },
        **more,
    )
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN}
    config, tensors = saved(whole(model_type, text, {**vision, "num_position_embeddings": 16}))
    tensors = fused_experts(tensors)
    last = "model.language_model.layers.3."
    like = {f"mtp.layers.0.{n.removeprefix(last)}": t for n, t in tensors.items() if n.startswith(last)}
    norm = torch.empty(HIDDEN, dtype=torch.bfloat16)
    like |= {f"mtp.{name}.weight": norm for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    like["mtp.fc.weight"] = torch.empty(HIDDEN, 2 * HIDDEN, dtype=torch.bfloat16)
    config["text_config"] |= {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    return plain(config, tensors | random_like(like, seed=1))


def qwen3_5() -> Repository:
    return _qwen3_5("qwen3_5")


def qwen3_5_moe() -> Repository:
    return _qwen3_5("qwen3_5_moe", num_experts=4, shared_expert_intermediate_size=64, **_MOE)


def gpt_oss() -> Repository:
    config, tensors = saved(tiny_config("gpt_oss", 2, HIDDEN, sliding_window=6))
    random, stored, dense = np.random.default_rng(0), Tensors(), Tensors()
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, d, o = tensor.shape
            blocks, scales, dense[name] = mxfp4_experts(experts, d, o, random)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            stored[name] = dense[name] = tensor
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    entry = {"modules_to_not_convert": kept, "quant_method": "mxfp4"}
    return Repository(as_before_5(config) | {"quantization_config": entry}, stored, dense)


def llama4() -> Repository:
    text = tiny_config(
        "llama4_text",
        4,
        HIDDEN,
        intermediate_size_mlp=128,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=8,
        head_dim=16,
    )
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    vision |= {"vision_output_dim": 64, "image_size": 28, "projector_input_dim": 64, "projector_output_dim": 64}
    config, tensors = saved(whole("llama4", text, vision))
    return plain(as_before_5(config), tensors)


def _granite_4(experts: int, of_a_token: int) -> Repository:
    sizes = {"shared_intermediate_size": 64, "num_local_experts": experts, "num_experts_per_tok": of_a_token}
    kinds = {"layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "nope"}
    config, tensors = saved(tiny_config("granitemoehybrid", 3, HIDDEN, mamba_expand=2, **sizes, **kinds, **_MAMBA_2))
    return plain(as_before_5(config), tensors)


def granite_4_small() -> Repository:
    return _granite_4(4, 2)


def granite_4_micro() -> Repository:
    return _granite_4(0, 0)


def _nemotron_h(pattern: str) -> Repository:
    config, tensors = saved(
        tiny_config(
            "nemotron_h",
            len(pattern),
            HIDDEN,
            hybrid_override_pattern=pattern,
            n_routed_experts=4,
            moe_shared_expert_intermediate_size=128,
            mamba_num_heads=8,
            mamba_head_dim=16,
            n_groups=2,
            ssm_state_size=16,
            chunk_size=8,
            head_dim=16,
            **_MOE,
        )
    )
    config = as_before_5(config)
    del config["layers_block_type"]
    return plain(config | {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}, tensors)


def nemotron_h() -> Repository:
    return _nemotron_h("M-*-")


def nemotron_3_nano() -> Repository:
    return _nemotron_h("ME*E")


def jamba() -> Repository:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 8}
    places = {"attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
    config, tensors = saved(tiny_config("jamba", 4, HIDDEN, **sizes, **places))
    return plain(as_before_5(config), tensors)


def falcon_h1() -> Repository:
    multipliers = {"lm_head_multiplier": 0.5, "key_multiplier": 0.5, "ssm_multipliers": [0.5, 0.25, 0.5, 0.5, 0.5]}
    config, tensors = saved(
        tiny_config("falcon_h1", 2, HIDDEN, mamba_d_ssm=128, head_dim=16, **_MAMBA_2, **multipliers)
    )
    return plain(as_before_5(config), tensors)


def gemma_3n() -> Repository:
    config, tensors = saved(
        tiny_config(
            "gemma3n_text",
            3,
            HIDDEN,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            sliding_window=6,
        )
    )
    return plain(config, tensors)


def _gemma_4(**more: Any) -> Repository:
    text = tiny_config(
        "gemma4_text",
        4,
        HIDDEN,
        head_dim=16,
        global_head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        tie_word_embeddings=True,
        **more,
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16}
    config, tensors = saved(whole("gemma4", text, vision, audio_config=None))
    unshared, shared = (f"model.language_model.layers.{i}.self_attn." for i in (0, 2))
    like = {shared + part: tensors[unshared + part] for part in ("k_proj.weight", "v_proj.weight", "k_norm.weight")}
    # Blocks that take keys and values of earlier ones have weights for their own all the same; nothing reads them.
    return plain(config, random_like(like, seed=1) | tensors)


def gemma_4_e2b() -> Repository:
    return _gemma_4(num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY)


def gemma_4_26b_a4b() -> Repository:
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    own = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    return _gemma_4(attention_k_eq_v=True, num_global_key_value_heads=1, **own, **experts)


def gpt2() -> Repository:
    """GPT-2: names without the prefix that transformers adds, with the masks that old versions stored, in float32."""
    config, tensors = saved(tiny_config("gpt2", 2, HIDDEN), torch.float32)
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items() if name != "lm_head.weight"}
    tensors |= {f"h.{i}.attn.bias": torch.ones(512, 512).tril()[None, None] for i in range(2)}
    return plain({name: value for name, value in config.items() if name != "dtype"}, tensors)


def olmo3() -> Repository:
    kinds = ["sliding_attention", "full_attention"]
    config, tensors = saved(tiny_config("olmo3", 2, HIDDEN, layer_types=kinds, sliding_window=6))
    return plain(as_before_5(config), tensors)


def smollm3() -> Repository:
    config, tensors = saved(tiny_config("smollm3", 2, HIDDEN, no_rope_layers=[1, 0], tie_word_embeddings=True))
    return plain(as_before_5(config), tensors)


def ministral3() -> Repository:
    text = tiny_config(
        "ministral3",
        2,
        HIDDEN,
        head_dim=16,
        sliding_window=None,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 128,
            "llama_4_scaling_beta": 0.1,
        },
    )
    vision = {"model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 64, "image_size": 28, "patch_size": 14, "head_dim": 16}
    config, tensors = saved(whole("mistral3", text, vision))
    entry = {
        "activation_scheme": "static",
        "dequantize": False,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        "quant_method": "fp8",
        "weight_block_size": None,
    }
    linears = r"language_model\.model\.layers\.\d+\..*_proj\.weight"
    return quantized(config, tensors, LAYOUTS["fp8 tensor"], linears, entry, {"input_scale": "activation_scale"})


@dataclass(frozen=True)
class Family:
    """A family of models, and what becomes of a tiny one.

    Attributes:
        model: its name.
        stored: how its repositories on the hub store it.
        make: makes one.
        result: "all" (compressed, resumed, loaded, exported, saved), "evaluated" or "refused".
        reason: why it is not compressed, in the words of the refusal.
        left_out: expression for names of tensors that nothing reads and no output has.
        unread: parts that are kept although the model does not run them, as the journal names them.
    """

    model: str
    stored: str
    make: Callable[[], Repository]
    result: str = "all"
    reason: str = ""
    left_out: str = "$^"
    unread: tuple[str, ...] = ()


_PREDICTS = "a layer for multi-token prediction"
FAMILIES: Mapping[str, Family] = {
    "deepseek_v3": Family(
        "DeepSeek-V3",
        f"fp8 in blocks of 128 × 128; {_PREDICTS} behind the blocks",
        deepseek_v3,
        unread=("model.layers.3 (32 tensors)",),
    ),
    "qwen3_moe": Family("Qwen3-MoE", "bf16, experts one by one", qwen3_moe),
    "qwen3_5": Family("Qwen3.5", "bf16, with a part for images; `mtp.*`", qwen3_5, unread=("mtp (15 tensors)",)),
    "qwen3_5_moe": Family(
        "Qwen3.5-MoE",
        "bf16, experts fused; with a part for images; `mtp.*`",
        qwen3_5_moe,
        unread=("mtp (19 tensors)",),
    ),
    "gpt_oss": Family("gpt-oss", "mxfp4, experts fused, with biases", gpt_oss),
    "llama4": Family("Llama 4", "bf16, experts fused and transposed; with a part for images", llama4),
    "mixtral": Family("Mixtral", "bf16, experts one by one (`w1`, `w2`, `w3`)", mixtral),
    "glm4_moe": Family(
        "GLM-4.5",
        f"bf16, experts one by one; {_PREDICTS} behind the blocks",
        glm4_moe,
        unread=("model.layers.3 (31 tensors)",),
    ),
    "minimax_m2": Family("MiniMax M2", "fp8 in blocks of 128 × 128, experts one by one", minimax_m2),
    "kimi_k2": Family("Kimi K2 Thinking", "experts in int4 (`pack-quantized`); model_type `kimi_k2`", kimi_k2),
    "kimi_k2_6": Family(
        "Kimi K2.6", "the same, within a model with a part for images; model_type `kimi_k25`", kimi_k2_6
    ),
    "granite_4_small": Family("Granite 4 H Small", "bf16, Mamba-2 and attention, experts fused", granite_4_small),
    "granite_4_micro": Family("Granite 4 H Micro", "bf16, Mamba-2 and attention", granite_4_micro),
    "nemotron_h": Family("Nemotron-H", "bf16, blocks of Mamba-2, attention or an MLP", nemotron_h),
    "nemotron_3_nano": Family("Nemotron 3 Nano", "bf16, with experts without gates", nemotron_3_nano),
    "jamba": Family("Jamba", "bf16, Mamba-1 and attention, experts one by one", jamba),
    "falcon_h1": Family("Falcon-H1", "bf16, Mamba-2 beside attention", falcon_h1),
    "gemma_3n": Family("Gemma 3n", "bf16, the decoder alone", gemma_3n),
    "gemma_4_e2b": Family(
        "Gemma 4 E2B", "bf16, with a part for images", gemma_4_e2b, left_out=r"\.2\.self_attn\.[kv]_"
    ),
    "gemma_4_26b_a4b": Family("Gemma 4 26B-A4B", "bf16, experts fused; with a part for images", gemma_4_26b_a4b),
    "gpt2": Family(
        "GPT-2",
        "float32, weights transposed, masks stored",
        gpt2,
        unread=("h.*.attn.bias (2 tensors)",),
    ),
    "olmo3": Family("OLMo 3", "bf16", olmo3),
    "smollm3": Family("SmolLM3", "bf16, embeddings tied", smollm3),
    "ministral3": Family("Ministral 3", "fp8 with one scale for a weight; with a part for images", ministral3),
}
"""Every family. One that comes to be compressed loses its result and reason here, and the guide's table is made anew:
`python tools/sweep_architectures.py --families`."""


def families_table() -> str:
    """Return the table of the models guide."""
    results = {"all": "compressed", "evaluated": "evaluated only", "refused": "refused"}
    rows = [
        f"| {family.model} | {family.stored} | {results[family.result]} | {family.reason} |"
        for family in FAMILIES.values()
    ]
    return "\n".join(["| model | stored on the hub as | result | why |", "|---|---|---|---|", *rows]) + "\n"
