"""Small random checkpoints of every architecture the tests stream, each with a byte-level BPE tokenizer."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from streamslr.model.meta_model import auto_class

VOCABULARY = 384
TEXT = (
    "A language model that does not fit the memory is read one block at a time. "
    "Each block is replaced by a sparse matrix and a low-rank one, 2:4 and 64, and then written down. "
    "Nothing is held longer than it is needed; what was written can be read again tomorrow. "
    "def f(x):\n    return x + 1\n"
)


def _llama_like(blocks: int, hidden: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": blocks,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }


def _deepseek(hidden: int) -> dict[str, Any]:
    """Return arguments of a model with a dense first block, then experts beside shared ones."""
    return {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": hidden,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    }


# What differs from the Llama-like arguments; a value of None takes an argument away.
_ARGUMENTS: Mapping[str, Callable[[int, int], dict[str, Any]]] = {
    "llama": lambda n, h: {},
    "mistral": lambda n, h: {"sliding_window": 6},
    "qwen2": lambda n, h: {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": lambda n, h: {"head_dim": h // 4},
    "gemma2": lambda n, h: {"head_dim": h // 4, "sliding_window": 6, "query_pre_attn_scalar": h // 4},
    "phi3": lambda n, h: {"pad_token_id": 0},
    "cohere2": lambda n, h: {"sliding_window": 6, "logit_scale": 0.25},
    "opt": lambda n, h: {"ffn_dim": 2 * h, "word_embed_proj_dim": h, "intermediate_size": None},
    "gpt_neox": lambda n, h: {"num_key_value_heads": None},
    "bloom": lambda n, h: {"n_head": 4, "num_attention_heads": None, "num_key_value_heads": None},
    "falcon": lambda n, h: {"alibi": False, "num_key_value_heads": None, "intermediate_size": None},
    "gptj": lambda n, h: {
        "rotary_dim": 8,
        "n_layer": n,
        "n_embd": h,
        "n_head": 4,
        "n_positions": 512,
    },
    "gpt2": lambda n, h: {"n_layer": n, "n_embd": h, "n_head": 4, "n_positions": 512},
    "mixtral": lambda n, h: {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": lambda n, h: {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": h,
        "head_dim": h // 4,
    },
    "ernie4_5_moe": lambda n, h: {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": h},
    "gpt_oss": lambda n, h: {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": h // 4},
    "granitemoe": lambda n, h: {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": lambda n, h: _deepseek(h),
    "deepseek_v3": lambda n, h: _deepseek(h),
    "gemma3n_text": lambda n, h: {
        "head_dim": h // 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "num_kv_shared_layers": 1,
        "layer_types": ["full_attention"] * n,
        "activation_sparsity_pattern": None,
    },
    "gemma4_text": lambda n, h: {
        "head_dim": h // 4,
        "global_head_dim": h // 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 1,
        "layer_types": ["full_attention"] * n,
    },
    "glm_moe_dsa": lambda n, h: (
        _deepseek(h)
        | {
            "index_topk": 6,
            "index_head_dim": 16,
            "index_n_heads": 4,
            "indexer_types": ["full", *["shared"] * (n - 1)],
        }
    ),
    "zamba": lambda n, h: {
        "layers_block_type": ["hybrid", *["linear_attention"] * (n - 2), "hybrid"],
        "attention_hidden_size": 2 * h,
        "attention_head_dim": h // 2,
        "num_key_value_heads": 4,
    },
    "openai-gpt": lambda n, h: {"n_layer": n, "n_embd": h, "n_head": 4, "n_positions": 512},
}


def tiny_config(architecture: str, blocks: int = 3, hidden: int = 64, **more: Any) -> PretrainedConfig:
    arguments = {"vocab_size": VOCABULARY, **_llama_like(blocks, hidden)}
    arguments |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    arguments |= _ARGUMENTS.get(architecture, lambda n, h: {})(blocks, hidden) | more
    return AutoConfig.for_model(architecture, **{k: v for k, v in arguments.items() if v is not None})


def tiny_model(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0, auto: Any = None
) -> PreTrainedModel:
    """Make a model with every parameter random, norms and biases too, so that any mix-up shows.

    `auto` is the class of transformers that chooses the model's; the one that streamslr would take by default.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (auto or auto_class(config)).from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                    parameter.copy_(centre + 0.1 * torch.randn_like(parameter))
                else:
                    parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    made: PreTrainedModel = model.to(dtype).eval()
    return made


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of at most 384 tokens, every byte one of them, trained on TEXT; token 0 ends a text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()), bos_token="<|end|>", eos_token="<|end|>"
    )


def starved_checkpoint(folder: Path, architecture: str, **config: Any) -> Path:
    """Write a tiny checkpoint with five experts, two for each token, whose routers never choose expert 1."""
    count = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}.get(architecture, "n_routed_experts")
    tiny_checkpoint(folder, architecture, **{count: 5, "num_experts_per_tok": 2, **config})
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, router in tensors.items():
            if name.endswith(".gate.weight") and len(router) == 5:  # two of a, -a, b and -b always exceed zero
                tensors[name] = torch.stack([router[0], 0 * router[1], -router[0], router[3], -router[3]])
        save_file(tensors, file, {"format": "pt"})
    return folder


def tiny_checkpoint(
    folder: str | Path,
    architecture: str = "llama",
    blocks: int = 3,
    hidden: int = 64,
    shards: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    tie: bool = False,
    tokenizer: bool = True,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a random checkpoint as `save_pretrained` does, and return its folder.

    Args:
        folder: Folder to write.
        architecture: Model type of transformers.
        blocks: Number of blocks.
        hidden: Width of the hidden states.
        shards: Number of files, approximately.
        dtype: Dtype of the weights.
        tie: Whether the head is the embedding.
        tokenizer: Whether to write a tokenizer too.
        seed: Seed of the weights.
        **config: Other arguments of transformers' config; they replace the sizes chosen here.
    """
    folder = Path(folder)
    made = tiny_config(architecture, blocks, hidden, **({"tie_word_embeddings": tie} | config))
    model = tiny_model(made, dtype, seed)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    # safetensors' sharding is greedy by size, so the number of files is only about what was asked for.
    model.save_pretrained(folder, max_shard_size=10 * total if shards == 1 else -(-total // shards) + 4096)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder
