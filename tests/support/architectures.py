"""A tiny configuration of any architecture of transformers, and a model of it taken through all that streamslr does."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import streamslr
from streamslr.calibration.tokens import text_windows
from streamslr.errors import InputError
from streamslr.memory import free_host_memory
from streamslr.model.meta_model import auto_class
from streamslr.results.evaluate import evaluate
from streamslr.results.export import export
from tests.support.tiny_models import TEXT, VOCABULARY, tiny_model, tiny_tokenizer

WRAPPERS = (
    *("aya_vision", "idefics3", "internvl", "llava", "llava_next", "mistral3", "paligemma", "qwen3_vl", "smolvlm"),
    "voxtral",
)
"""Models of images or sound that hold a plain decoder; more of them are in AutoModelForMultimodalLM."""
ARCHITECTURES: tuple[str, ...] = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WRAPPERS)
WINDOWS, SEQ_LEN = 3, 24
LARGEST = 8_000_000
"""Parameters of the largest model that counts as tiny."""

GUIDE = Path(__file__).parents[2] / "streamslr" / "guides" / "models.md"
BEGIN, END = "<!-- made by tools/sweep_architectures.py -->", "<!-- end -->"
FAMILIES_BEGIN = "<!-- made by tools/sweep_architectures.py --families -->"
HEADINGS = {
    "equal": "compressed, loaded, exported and saved again",
    "evaluated": "evaluated only",
    "refused": "refused",
    "not built": "not tried: transformers makes or runs no tiny model of it by our rules",
    "wrong": "WRONG",
}

_SIZES: tuple[tuple[str, int | None], ...] = (
    (r"token_id|_index$|_idx$|version|period|offset|interval|frequency|step", None),
    (r"vocab_size|num_embeddings", VOCABULARY),
    (r"max_position|n_positions|n_ctx|max_seq|seq_length|max_target_positions", 256),
    (r"shared_experts$|num_shared|n_group|topk_group|num_expert_group", 1),
    (r"experts_per|top_?k$|moe_k|topk|num_selected", 2),
    (r"experts$|n_routed_experts|expert_num", 4),
    (r"_rank$", 8),
    (r"layers$|n_layer$|num_blocks$|depth$", 2),
    (r"heads?$|multi_query_group", 4),
    (r"rope_head_dim|qk_nope|rotary_dim", 8),
    (r"head_dim$|d_kv|d_head|head_size|key_dim|value_dim|query_pre_attn", 8),
    (r"intermediate|ffn|^dff$|mlp_dim|d_inner|inner_dim|feed_forward|n_inner|mlp_hidden", 64),
    (r"d_state|state_size", 16),
    (r"hidden_size|d_model|n_embd|embed_dim|embedding_size|emb_dim|dim_model|hidden_dim|lru_width|projection_dim", 32),
    (r"window", 6),
    (r"image_size", 28),
    (r"patch_size", 14),
    (r"chunk_size$", 8),
)
"""Part of a field's name -> the largest value that it gets; the first that is found counts, None leaves it alone."""

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64}
_ZAMBA = {
    "num_hidden_layers": 4,  # two of them share a transformer layer, as in real ones
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "tie_word_embeddings": True,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
    "num_key_value_heads": 4,
}
_FIELDS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "falcon_h1": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "gemma4_text": {"num_hidden_layers": 3, "num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3},
    "gemma3n_text": {
        "num_hidden_layers": 3,
        "intermediate_size": 64,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "activation_sparsity_pattern": None,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "longcat_flash": {"qk_head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "inkling2_text": {
        "n_layers_per_attn_res_block": 1
    },  # a block is handed what earlier ones returned, as in real ones
    "rwkv": {"num_hidden_layers": 7},  # from block 6 on it rescales, as every real one does
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8},
    "xlnet": {"d_head": 8},
    "xlstm": {"embedding_dim": 32, "hidden_size": 32, "num_heads": 4},
}
"""Settings that an architecture needs beside those."""


def shrunk_config(architecture: str) -> PretrainedConfig:
    """Return the smallest configuration of an architecture that these rules give; not every one can be built."""
    return _shrink(CONFIG_MAPPING[architecture], _FIELDS.get(architecture, {}))


def _shrink(cls: type[PretrainedConfig], more: dict[str, Any]) -> PretrainedConfig:
    default = cls()
    defaults, fields = default.to_dict(), dict[str, Any]()
    for name, value in defaults.items():
        if isinstance(value, int) and not isinstance(value, bool):
            size = next((size for part, size in _SIZES if re.search(part, name)), None)
            fields[name] = value if size is None else min(size, value) if value > 0 else value
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PretrainedConfig):
            fields[name] = _shrink(type(part), {}).to_dict()
    if (defaults.get("num_key_value_heads") or 0) < (defaults.get("num_attention_heads") or 0):
        fields["num_key_value_heads"] = 2
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return cls(**fields | tokens | {"tie_word_embeddings": False} | more)


@dataclass(frozen=True)
class Outcome:
    """Result of one architecture.

    Attributes:
        architecture: model type of transformers.
        result: "equal", "evaluated" (streamed equal, compression refused), "refused", "not built", or "wrong".
        reason: why; empty when all was equal.
    """

    architecture: str
    result: str
    reason: str = ""


def sweep(architecture: str, folder: Path) -> Outcome:
    """Take a tiny model through all that streamslr does, and compare its loss on the same windows at each step.

    Streamed and whole; compressed, streamed and loaded; exported dense and loaded by transformers; saved again from the
    loaded model, and loaded.

    Raises:
        Exception: anything but a refusal that streamslr words itself.
    """
    text, dense, packed = folder / "text.txt", folder / "dense", folder / "packed"
    text.write_text(TEXT * 20)
    try:
        config = shrunk_config(architecture)
        with torch.device("meta"):
            size = sum(p.numel() for p in auto_class(config).from_config(config).parameters())
        if size > LARGEST:
            return Outcome(architecture, "not built", f"{size / 1e6:.0f} M parameters at the least")
        save(tiny_model(config), dense)
        ids = text_windows(AutoTokenizer.from_pretrained(dense), text, SEQ_LEN, WINDOWS)
        expected = whole_loss(auto_class(config).from_pretrained(dense, dtype=torch.float32), ids)
    except Exception as error:  # transformers cannot make or run it: nothing of ours has run
        return Outcome(architecture, "not built", " ".join(str(error).split())[:120])

    def streamed_loss(model: Path) -> float:
        free = free_host_memory()
        return evaluate(str(model), text, SEQ_LEN, windows=WINDOWS, device="cpu", free_memory=free).nll

    def differs(step: str, loss: float, other: float) -> Outcome | None:
        equal = abs(loss - other) <= 2e-5 * abs(other)
        return None if equal else Outcome(architecture, "wrong", f"{step}: {loss} for {other}")

    try:
        if wrong := differs("streamed", streamed_loss(dense), expected):
            return wrong
    except InputError as error:
        return Outcome(architecture, "refused", short(error, dense))
    settings: dict[str, Any] = {"samples": 4, "seq_len": SEQ_LEN, "rank": 4, "device": "cpu", "match": False}
    try:
        streamslr.compress(dense, packed, calibration=text, method="eora-wanda", **settings)
    except InputError as error:
        return Outcome(architecture, "evaluated", short(error, dense))
    export(packed, folder / "export", "dense")
    loaded = streamslr.load(packed, device="cpu")
    save(loaded, folder / "again")
    expected = streamed_loss(packed)
    steps: dict[str, Callable[[], float]] = {
        "loaded": lambda: whole_loss(loaded, ids),
        "exported": lambda: whole_loss(auto_class(config).from_pretrained(folder / "export", dtype=torch.float32), ids),
        "saved again, streamed": lambda: streamed_loss(folder / "again"),
        "saved again, loaded": lambda: whole_loss(streamslr.load(folder / "again", device="cpu"), ids),
        "exported, streamed": lambda: streamed_loss(folder / "export"),
    }
    return next((wrong for step, loss in steps.items() if (wrong := differs(step, loss(), expected))), None) or Outcome(
        architecture, "equal"
    )


def save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@torch.no_grad()
def whole_loss(model: PreTrainedModel, ids: Tensor) -> float:
    """Return the mean loss of a whole model of transformers on windows [n, T], all tokens but the first predicted."""

    def loss(row: Tensor) -> float:
        logits = model.eval()(input_ids=row[None], use_cache=False).logits[0].float()
        return float(torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum"))

    return sum(loss(row) for row in ids) / (len(ids) * (SEQ_LEN - 1))


def section(text: str, begin: str) -> str:
    """Return the part of a page between a mark and the next END."""
    return text.partition(f"{begin}\n")[2].partition(END)[0]


def replace_section(page: Path, begin: str, content: str) -> None:
    """Write the part of a page between a mark and the next END anew."""
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n{content}{END}{rest.partition(END)[2]}")


def short(error: InputError, folder: Path) -> str:
    """Return what a refusal says, without the folder."""
    return str(error).replace(f"{folder} ", "").replace(str(folder), "it")


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the guide's section: the equal ones in a line, one row for each other one with its reason."""
    groups: dict[str, list[Outcome]] = {result: [] for result in HEADINGS}
    for outcome in outcomes:
        groups[outcome.result].append(outcome)
    lines = [f"With transformers {transformers.__version__}, on random weights of the smallest shapes:\n"]
    for result, found in groups.items():
        if not found:
            continue
        lines.append(f"**{HEADINGS[result].capitalize()}** ({len(found)})\n")
        if result == "equal":
            lines.append(", ".join(f"`{outcome.architecture}`" for outcome in found) + "\n")
        else:
            rows = [f"| `{outcome.architecture}` | {cell(outcome.reason)} |" for outcome in found]
            lines.append("\n".join(["| model type | why |", "|---|---|", *rows]) + "\n")
    return "\n".join(lines)


def cell(reason: str) -> str:
    """Return a reason without what the table says already, and without the advice at its end."""
    short = re.sub(r"^\(\w+\) (can be evaluated, but not compressed: )?", "", reason)
    return short.replace("|", "\\|").partition("; ")[0]
