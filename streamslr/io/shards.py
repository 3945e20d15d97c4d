"""Files that last: safetensors shards and JSON, written whole or not at all, the same bytes every time."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from streamslr.errors import InputError
from streamslr.spec.pattern import SparsityPattern, parse_pattern

BLOCK_FILE = "model-block-{:05d}.safetensors"
NON_BLOCK_FILE = "model-outside.safetensors"
INDEX_FILE = "model.safetensors.index.json"
QUANT_METHOD = "streamslr"
FORMAT_VERSION = 3
"""3: names in the journal (`linears`, `wanda_error`, `non_block` …); 2: metadata of n:m in digits, the same bytes of
shards as in 3; 1: a nibble for a group of 2:4."""
READABLE_VERSIONS = (2, 3)
MIXED = "mixed"
"""What config.json says of the pattern where linears differ in it."""


@dataclass(frozen=True)
class PackedFormat:
    """What a compressed folder's config.json says of its linears; the rank of each is read off its U."""

    pattern: SparsityPattern | None
    """None: they differ, and the header of each shard says which linear has which."""
    rank: int
    """The largest asked for; a small linear may have less."""
    format_version: int


def index_json(weight_map: Mapping[str, str], total_size: int) -> dict[str, Any]:
    """The content of model.safetensors.index.json: tensor name -> shard, and the bytes of all tensors."""
    return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}


def quantization_config(pattern: SparsityPattern | None, rank: int) -> dict[str, Any]:
    """The entry of config.json by which a compressed folder is known; `read_quantization_config` reads it.

    pattern: None where linears differ; rank: the largest.
    """
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "pattern": MIXED if pattern is None else str(pattern),
        "rank": rank,
    }


def read_quantization_config(config: Mapping[str, Any] | PretrainedConfig) -> PackedFormat | None:
    """How the folder of this config.json is packed; None when streamslr did not write it.

    Raises InputError for a format_version that this version cannot read, and for a damaged entry.
    """
    if isinstance(config, PretrainedConfig):
        entry = getattr(config, "quantization_config", None)
    else:
        entry = config.get("quantization_config")
    if entry is not None and not isinstance(entry, Mapping):
        entry = entry.to_dict()  # transformers may have parsed it already
    if entry is None or entry.get("quant_method") != QUANT_METHOD:
        return None
    version = entry.get("format_version")
    if version not in READABLE_VERSIONS:
        raise InputError(
            f"config.json says streamslr format_version {version!r}, this version reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}: use the streamslr that wrote it, or compress the model again"
        )
    pattern, rank = entry.get("pattern"), entry.get("rank")
    if not isinstance(pattern, str) or not isinstance(rank, int) or rank < 0:
        raise InputError(
            f"quantization_config in config.json is damaged: pattern {pattern!r}, rank {rank!r}; "
            f"copy config.json again from where the folder came from"
        )
    return PackedFormat(None if pattern == MIXED else parse_pattern(pattern), rank, version)


def shard_metadata(
    linears: Mapping[str, tuple[SparsityPattern, tuple[int, int]]],
) -> dict[str, str]:
    """A shard's __metadata__: {"format": "pt"}, and "2:4 OxD" for each packed linear by its module path."""
    return {"format": "pt"} | {name: f"{pattern} {o}x{d}" for name, (pattern, (o, d)) in linears.items()}


def packed_linears(
    metadata: Mapping[str, str] | None,
) -> dict[str, tuple[SparsityPattern, tuple[int, int]]]:
    """The packed linears that a shard's __metadata__ names: module path -> pattern and dense shape (o, d)."""
    linears = {}
    for name, text in (metadata or {}).items():
        if name == "format":
            continue
        match = re.fullmatch(r"(\S+) (\d+)x(\d+)", text)
        if match is None:
            raise InputError(f'the header of a shard says {text!r} of {name}, not "PATTERN OxD": it is damaged')
        linears[name] = parse_pattern(match[1]), (int(match[2]), int(match[3]))
    return linears
