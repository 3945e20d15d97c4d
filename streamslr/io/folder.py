"""The compressed folder: config and tokenizer, non-block tensors, a shard for each block, and the index."""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from streamslr.errors import InputError, StreamslrError
from streamslr.io.durable import PARTIAL_SUFFIX, copy_file, file_sha256, write_file, write_json
from streamslr.io.packed_layout import (
    BLOCK_FILE,
    INDEX_FILE,
    NON_BLOCK_FILE,
    part_name,
    quantization_config,
    shard_metadata,
)
from streamslr.io.safetensors_file import TensorInfo, TensorSource, WrittenShard, shard_header, write_shard
from streamslr.outside import LARGEST_JSON, parse_json, read_bounded
from streamslr.spec.pattern import SparsityPattern
from streamslr.spec.values import STORED

PackedLinear = tuple[Mapping[str, Tensor], SparsityPattern, tuple[int, int]]
"""Parts of a packed linear, its pattern, and the shape (o, d) of its dense weight."""


def is_file_name(name: object) -> bool:
    """Return True for a name that prints, that a file can have, and that cannot lead out of the folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\"):
        return False
    return name.isprintable() and len(name.encode()) <= 255


def write_auxiliary_files(
    folder: Path,
    config: Mapping[str, Any],
    files: Iterable[Path],
    pattern: SparsityPattern | None,
    rank: int,
    values: str = STORED,
    low_rank_values: str = STORED,
) -> dict[str, str]:
    """Write config.json, which names the format, and copy the files that travel with a model.

    Args:
        folder: compressed folder.
        config: config.json of the dense model.
        files: the files to copy: tokenizer, generation config, licence.
        pattern: pattern of all linears, None where they differ.
        rank: the largest rank.
        values: format of the values of all linears, "mixed" where they differ.
        low_rank_values: the same of U and V.

    Returns:
        The sha256 of each file by its name.
    """
    entry = {"quantization_config": quantization_config(pattern, rank, values, low_rank_values)}
    digests = {"config.json": write_file(folder / "config.json", config_bytes({**config, **entry}))}
    for path in files:
        digests[path.name] = copy_auxiliary_file(path, folder)
    return digests


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """Return the content of a config.json, entries as given but without `auto_map` (see `copy_auxiliary_file`)."""
    return (json.dumps(_drop_auto_map(config), indent=2) + "\n").encode()


def copy_auxiliary_file(path: Path, folder: Path) -> str:
    """Copy a file that travels with a model into a folder, a JSON file without `auto_map`; return its sha256.

    `auto_map` names Python files of the checkpoint. streamslr computes with the classes of transformers and copies no
    code, so that an output must not ask for it. Other content stays byte for byte.
    """
    if path.suffix != ".json" or path.stat().st_size > LARGEST_JSON:
        return copy_file(path, folder / path.name)
    return write_file(folder / path.name, _without_code(read_bounded(path)))


def _without_code(content: bytes) -> bytes:
    """Return the content of a JSON file without `auto_map`."""
    if b'"auto_map"' not in content:
        return content
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):  # not for transformers to read either
        return content
    if not isinstance(parsed, dict) or not isinstance(parsed.get("auto_map"), dict):  # a word of a vocabulary
        return content
    del parsed["auto_map"]
    return (json.dumps(parsed, indent=2) + "\n").encode()


def _drop_auto_map(entry: Any) -> Any:
    """Return a part of config.json without any `auto_map`, the parts of composite models included."""
    if isinstance(entry, Mapping):
        return {name: _drop_auto_map(value) for name, value in entry.items() if name != "auto_map"}
    return entry


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


def require_as_written(path: Path, sha256: str) -> None:
    """Read a file of a compressed folder and compare it with its digest in the journal.

    Raises:
        InputError: the file is missing, cannot be read, or is not as it was written.
    """
    advice = "copy it again from where the folder came from, or let the `streamslr run` line that made it go on"
    try:
        found = file_sha256(path)
    except InputError as error:
        raise InputError(f"{error}; the journal names this file: {advice}") from error
    if found != sha256:
        raise InputError(
            f"{path} is damaged or was changed: its sha256 is {found[:12]}…, the journal says {sha256[:12]}…; {advice}"
        )


def list_uncommitted(folder: Path, committed: Iterable[WrittenShard]) -> list[Path]:
    """Return what a killed process left behind: shards that no journal record names, and partial files."""
    keep = {shard.file for shard in committed}

    def is_shard(path: Path) -> bool:
        return path.name == NON_BLOCK_FILE or path.match(BLOCK_FILE.replace("{:05d}", "*"))

    return [
        path
        for path in folder.iterdir()
        if (is_shard(path) and path.name not in keep) or path.name.endswith(PARTIAL_SUFFIX)
    ]


class _Index(msgspec.Struct):
    """Entries of an index that are read."""

    weight_map: dict[str, str]


def parse_index(raw: bytes) -> dict[str, str]:
    """Return the tensor name -> shard of an index. Raise ValueError where it is none, or names no plain files."""
    weight_map = parse_json(raw, _Index).weight_map
    if odd := [shard for shard in weight_map.values() if not is_file_name(shard)]:
        raise ValueError(f"{odd[0][:100]!r} is no name of a file")
    return weight_map


def discard_uncommitted(folder: Path, committed: Iterable[WrittenShard]) -> None:
    """Remove what a killed process left behind, as `list_uncommitted` names it."""
    for path in list_uncommitted(folder, committed):
        try:
            path.unlink()
        except OSError as error:
            raise StreamslrError(
                f"{path} is in the way of a file of this run and cannot be removed: {error.strerror}; move it away, "
                f"then run the same line again"
            ) from error
