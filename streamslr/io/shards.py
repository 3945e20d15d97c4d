"""Files that last: safetensors shards and JSON, written whole or not at all, the same bytes every time."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from streamslr.errors import InputError
from streamslr.io.durable import durable_file
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

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""torch's dtypes as safetensors headers name them."""


@dataclass(frozen=True)
class WrittenShard:
    """A shard that is durably on disk."""

    file: str
    """The file's name in its folder."""
    sha256: str
    """Of the whole file, as hex."""
    nbytes: int


@dataclass(frozen=True)
class PackedFormat:
    """What a compressed folder's config.json says of its linears; the rank of each is read off its U."""

    pattern: SparsityPattern | None
    """None: they differ, and the header of each shard says which linear has which."""
    rank: int
    """The largest asked for; a small linear may have less."""
    format_version: int


TensorSource = tuple[str, torch.dtype, tuple[int, ...], Callable[[], Tensor]]
"""Name, dtype, shape, and how to get the tensor when its turn comes."""


def write_shard(
    path: Path, tensors: Iterable[TensorSource] | Mapping[str, Tensor], metadata: Mapping[str, str]
) -> WrittenShard:
    """Writes one safetensors file durably, fetching one tensor at a time; returns its digest and size.

    The bytes depend on names, values and metadata alone: tensors are ordered by falling element size, then
    by name (so each is aligned for a zero-copy view; safetensors' own writer does the same), and the header
    is padded with spaces to a multiple of 8. A file of that name is replaced. Raises BudgetError when the
    disk is full, StreamslrError when it refuses the file; no part of the file is left then.
    """
    sources = _sources_of(tensors)
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, dtype, shape, _ in sources:
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)

    nbytes = 8 + len(header) + end
    with durable_file(path, nbytes) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for source in sources:
            file.write(_bytes_of(source))
    return WrittenShard(path.name, file.sha256, nbytes)


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


def _sources_of(tensors: Iterable[TensorSource] | Mapping[str, Tensor]) -> list[TensorSource]:
    """The tensors in the file's order."""
    if isinstance(tensors, Mapping):
        tensors = [(name, t.dtype, tuple(t.shape), partial(_itself, t)) for name, t in tensors.items()]
    sources: list[TensorSource] = list(tensors)
    names = [name for name, *_ in sources]
    if len(set(names)) != len(names) or "__metadata__" in names:
        raise ValueError(f"tensor names must be unique and not __metadata__: {sorted(names)}")
    for name, dtype, _, _ in sources:
        if dtype not in DTYPE_NAMES:
            raise InputError(f"{name}: a shard cannot hold {dtype}")
    return sorted(sources, key=lambda source: (-source[1].itemsize, source[0]))


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _bytes_of(source: TensorSource) -> memoryview:
    """A tensor's bytes as they go to disk, little-endian as every machine that torch supports."""
    name, dtype, shape, fetch = source
    tensor = fetch().detach()
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} was declared {dtype} {list(shape)}, but is {tensor.dtype} {list(tensor.shape)}")
    flat = tensor.to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
