"""The compressed folder: config and tokenizer, non-block tensors, a shard for each block, and the index."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from streamslr.io.durable import PARTIAL_SUFFIX, copy_file, write_json
from streamslr.io.packed_layout import (
    BLOCK_FILE,
    INDEX_FILE,
    NON_BLOCK_FILE,
    part_name,
    quantization_config,
    shard_metadata,
)
from streamslr.io.safetensors_file import TensorInfo, TensorSource, WrittenShard, shard_header, write_shard
from streamslr.spec.pattern import SparsityPattern

PackedLinear = tuple[Mapping[str, Tensor], SparsityPattern, tuple[int, int]]
"""Parts of a packed linear, its pattern, and the shape (o, d) of its dense weight."""


def is_file_name(name: object) -> bool:
    """Return True for a name that a file can have and that cannot lead out of the folder it is joined to."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        return False
    return len(name.encode("utf-8", "surrogatepass")) <= 255


def write_auxiliary_files(
    folder: Path, config: Mapping[str, Any], files: Iterable[Path], pattern: SparsityPattern | None, rank: int
) -> dict[str, str]:
    """Write config.json, which names the format, and copy the files that travel with a model.

    Args:
        folder: compressed folder.
        config: config.json of the dense model.
        files: the files to copy: tokenizer, generation config, licence.
        pattern: pattern of all linears, None where they differ.
        rank: the largest rank.

    Returns:
        The sha256 of each file by its name.
    """
    config = {**config, "quantization_config": quantization_config(pattern, rank)}
    digests = {"config.json": write_json(folder / "config.json", config)}
    for path in files:
        digests[path.name] = copy_file(path, folder / path.name)
    return digests


def write_non_block(folder: Path, tensors: Iterable[TensorInfo], read: Callable[[str], Tensor]) -> WrittenShard:
    """Write the tensors outside the blocks (embeddings, final norm, head), their names and bytes unchanged.

    Args:
        folder: compressed folder.
        tensors: description of each, from the dense checkpoint.
        read: reads the tensor of a name; called for one after another.
    """
    sources: list[TensorSource] = [(info.name, info.dtype, info.shape, partial(read, info.name)) for info in tensors]
    return write_shard(folder / NON_BLOCK_FILE, sources, {"format": "pt"})


def write_block(
    folder: Path, index: int, linears: Mapping[str, PackedLinear], other_tensors: Mapping[str, Tensor]
) -> WrittenShard:
    """Write the shard of one block.

    Args:
        folder: compressed folder.
        index: number of the block.
        linears: the packed linears by module path.
        other_tensors: norms, biases and buffers of the block by name.
    """
    tensors = dict(other_tensors)
    for linear, (parts, _, _) in linears.items():
        tensors |= {part_name(linear, part): tensor.cpu() for part, tensor in parts.items()}
    metadata = shard_metadata({linear: (pattern, shape) for linear, (_, pattern, shape) in linears.items()})
    return write_shard(folder / BLOCK_FILE.format(index), tensors, metadata)


def write_index(folder: Path, shards: Iterable[WrittenShard]) -> None:
    """Write the index of the committed shards, complete for what is there."""
    headers = {shard.file: shard_header(folder / shard.file) for shard in shards}
    weight_map = {name: file for file, header in headers.items() for name in header.tensors}
    total = sum(info.nbytes for header in headers.values() for info in header.tensors.values())
    write_json(folder / INDEX_FILE, index_json(weight_map, total))


def index_json(weight_map: Mapping[str, str], total_size: int) -> dict[str, Any]:
    """Return the content of an index as transformers reads it.

    Args:
        weight_map: tensor name -> file.
        total_size: bytes of all tensors.
    """
    return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}


def discard_uncommitted(folder: Path, committed: Iterable[WrittenShard]) -> None:
    """Remove what a killed process left behind: shards that no journal record names, and partial files."""
    keep = {shard.file for shard in committed}
    for path in folder.iterdir():
        shard = path.name == NON_BLOCK_FILE or path.match(BLOCK_FILE.replace("{:05d}", "*"))
        if (shard and path.name not in keep) or path.name.endswith(PARTIAL_SUFFIX):
            path.unlink()
