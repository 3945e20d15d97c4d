"""The output folder: config and tokenizer, the tensors outside the blocks, a shard a block, and the index."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from streamslr.io.durable import PARTIAL_SUFFIX, write_file, write_json
from streamslr.io.safetensors_file import TensorSource, WrittenShard, shard_header, write_shard
from streamslr.io.shards import (
    BLOCK_FILE,
    INDEX_FILE,
    NON_BLOCK_FILE,
    index_json,
    quantization_config,
    shard_metadata,
)
from streamslr.model.checkpoint import Checkpoint
from streamslr.spec.pattern import SparsityPattern


def write_auxiliary_files(
    folder: Path, checkpoint: Checkpoint, pattern: SparsityPattern | None, rank: int
) -> dict[str, str]:
    """config.json, which names the format, and the files that travel with a model; their sha256 by name.

    pattern, rank: as for `quantization_config`.
    """
    config = json.loads(checkpoint.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # where the model lay here says nothing there
    config["quantization_config"] = quantization_config(pattern, rank)
    digests = {"config.json": write_json(folder / "config.json", config)}
    for path in checkpoint.auxiliary_files():
        digests[path.name] = write_file(folder / path.name, path.read_bytes())
    return digests


def write_non_block(folder: Path, checkpoint: Checkpoint, names: Iterable[str]) -> WrittenShard:
    """Embeddings, final norm, head: the tensors outside the blocks, their names and bytes unchanged."""

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: checkpoint.read([name])[name]

    sources: list[TensorSource] = [
        (name, checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape, reader(name)) for name in names
    ]
    return write_shard(folder / NON_BLOCK_FILE, sources, {"format": "pt"})


def write_block(
    folder: Path,
    index: int,
    patterns: Mapping[str, SparsityPattern],
    packed: Mapping[str, Mapping[str, Tensor]],
    shapes: Mapping[str, tuple[int, int]],
    kept: Mapping[str, Tensor],
) -> WrittenShard:
    """The shard of one block: the parts of each packed linear, what else the block has (norms, biases)."""
    tensors = dict(kept)
    for linear, parts in packed.items():
        tensors |= {f"{linear}.{part}": tensor.cpu() for part, tensor in parts.items()}
    metadata = shard_metadata({linear: (patterns[linear], shapes[linear]) for linear in packed})
    return write_shard(folder / BLOCK_FILE.format(index), tensors, metadata)


def write_index(folder: Path, shards: Iterable[WrittenShard]) -> None:
    """model.safetensors.index.json over the committed shards, complete for what is there."""
    headers = {shard.file: shard_header(folder / shard.file).tensors for shard in shards}
    weight_map = {name: file for file, tensors in headers.items() for name in tensors}
    total = sum(info.nbytes for tensors in headers.values() for info in tensors.values())
    write_json(folder / INDEX_FILE, index_json(weight_map, total))


def discard_uncommitted(folder: Path, committed: Iterable[WrittenShard]) -> None:
    """Removes what a killed process left behind: shards that no journal record names, files half written."""
    keep = {shard.file for shard in committed}
    for path in folder.iterdir():
        shard = path.name == NON_BLOCK_FILE or path.match(BLOCK_FILE.replace("{:05d}", "*"))
        if (shard and path.name not in keep) or path.name.endswith(PARTIAL_SUFFIX):
            path.unlink()
