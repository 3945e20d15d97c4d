"""Files of weights: which a model has, which of them holds each tensor, and the digest that names them."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping

from streamslr.errors import InputError, StreamslrError
from streamslr.io.folder import parse_index
from streamslr.io.packed_layout import INDEX_FILE
from streamslr.io.safetensors_file import DTYPE_NAMES, WEIGHT_DTYPES, ShardHeader, TensorInfo
from streamslr.model.sources import ModelSource
from streamslr.outside import read_bounded

log = logging.getLogger("streamslr")

_SINGLE_FILE = "model.safetensors"


def shard_names(source: ModelSource) -> tuple[list[str], Mapping[str, str]]:
    """Return the safetensors files, and the index's tensor name -> file (empty for a single file)."""
    if _SINGLE_FILE in source.files:
        return [_SINGLE_FILE], {}
    if INDEX_FILE not in source.files:
        raise _no_weights(source)
    try:
        weight_map = parse_index(read_bounded(source.fetch(INDEX_FILE)))
        shards = sorted(set(weight_map.values()))
        if not shards:
            raise ValueError("it is empty")
    except ValueError as error:
        raise InputError(
            f"{INDEX_FILE} of {source.label} has no usable weight_map ({error}); download it again"
        ) from error
    missing = [shard for shard in shards if shard not in source.files]
    if missing:
        others = f" (and {len(missing) - 1} more of {len(shards)} shards)" if len(missing) > 1 else ""
        raise source.missing_file_error(missing[0], f"{others}, which {INDEX_FILE} names")
    return shards, weight_map


def _no_weights(source: ModelSource) -> StreamslrError:
    """Return the error for a model without safetensors, which names what is there instead."""
    pickled = sorted(name for name in source.files if name.endswith((".bin", ".pt", ".pth")))
    if pickled:
        return InputError(
            f"{source.label} holds PyTorch pickles ({pickled[0]}), not safetensors; convert it once: "
            f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    others = sorted(name for name in source.files if name.endswith((".safetensors", ".gguf")))
    found = f"; {others[0]} is not a name that transformers loads" if others else ""
    return source.missing_file_error(_SINGLE_FILE, f" and no {INDEX_FILE}{found}")


def list_tensors(
    source: ModelSource, headers: Mapping[str, ShardHeader], weight_map: Mapping[str, str]
) -> dict[str, TensorInfo]:
    """Return the tensors of all shards; the index decides where two shards hold the same name."""
    absent = [name for name, shard in weight_map.items() if name not in headers[shard].tensors]
    if absent:
        raise InputError(
            f"{INDEX_FILE} of {source.label} places {absent[0]} in {weight_map[absent[0]]}, which does "
            f"not hold it ({len(absent)} such tensors): "
            f"index and shards are of different models; download both again"
        )
    stored: dict[str, TensorInfo] = {}
    unnamed = []
    for shard, header in headers.items():
        for name, info in header.tensors.items():
            if weight_map and name not in weight_map:
                unnamed.append(name)
                if name in stored:
                    raise InputError(
                        f"{name} is in {stored[name].shard} and in {shard} of {source.label}, and {INDEX_FILE} does "
                        f"not say which of them counts; download the model again"
                    )
            if weight_map.get(name, shard) == shard:
                stored[name] = info
    if unnamed:  # transformers reads whole shards, so these are a part of the model
        log.warning(
            "%s of %s lacks %d tensors that the shards hold, first %s; they are read all the same",
            INDEX_FILE,
            source.label,
            len(unnamed),
            unnamed[0],
        )
    return stored


def refuse_quantized_weights(source: ModelSource, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise InputError for weights of other dtypes: config.json says nothing of how they are quantized."""
    odd = [
        info
        for name, info in tensors.items()
        if info.dtype not in WEIGHT_DTYPES and (name.endswith(".weight") or info.dtype.is_floating_point)
    ]
    if odd:
        raise InputError(
            f"{odd[0].name} in {odd[0].shard} of {source.label} is {DTYPE_NAMES[odd[0].dtype]} "
            f"({len(odd)} such weights); give the original model in bf16, fp16 or fp32"
        )


def identity_of(config: bytes, headers: Mapping[str, ShardHeader], weight_map: Mapping[str, str]) -> str:
    """Return the identity of a folder: a sha256 over config.json, file names, sizes and headers."""
    digest = hashlib.sha256(config)
    for name, header in sorted(headers.items()):
        digest.update(f"\0{name}\0{header.size}\0".encode() + header.raw)
    holders = Counter(name for header in headers.values() for name in header.tensors)
    for name, shard in sorted(weight_map.items()):
        if holders[name] > 1:
            digest.update(f"\0{name}\0{shard}\0".encode())
    return digest.hexdigest()
