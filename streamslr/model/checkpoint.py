"""A model's tensors: known from headers alone, read when asked for, dense or packed by streamslr."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from streamslr.errors import InputError, StreamslrError, first_line
from streamslr.io.packing import merge
from streamslr.io.shards import DTYPE_NAMES, INDEX_FILE, packed_linears, read_quantization_config
from streamslr.model.sources import CONFIG_FILE, LocalFolder, ModelSource, find_source
from streamslr.spec.pattern import SparsityPattern

SINGLE_FILE = "model.safetensors"

_HEADER_GUESS = 1 << 17
"""Bytes read first of a shard: huggingface_hub found the header of 97 % of the hub's files within 100 kB."""
_HEADER_LIMIT = 100_000_000
"""The longest header that the safetensors format allows."""
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_PACKED_PARTS = ("values", "meta", "row_offsets", "U", "V")

log = logging.getLogger("streamslr")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor: what `Checkpoint.read` will give, and the shard that holds it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    nbytes: int


class Checkpoint(Protocol):
    """A model's tensors, known from headers alone and read when they are needed. Safe to use from threads."""

    @property
    def model(self) -> str:
        """The folder or hub id, as the user gave it."""
        ...

    @property
    def identity(self) -> str:
        """sha256 over config.json, file names, headers and sizes of a folder, or "hub:ID@commit"."""
        ...

    @property
    def config(self) -> PretrainedConfig: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Checkpoint key -> info. A linear that streamslr packed shows as its merged weight in float32."""
        ...

    @property
    def download_bytes(self) -> int:
        """Size of the shards that are not here yet."""
        ...

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors, on the CPU; stored ones are views of the mapped file, writes to them stay private.

        Fetches what is not here. Raises InputError for a file that changed since it was opened.
        """
        ...

    def prefetch(self, names: Iterable[str]) -> None:
        """Has what holds these tensors fetched and read ahead in the background; errors wait for `read`."""
        ...

    def release(self, names: Iterable[str]) -> None:
        """These tensors are done. With evict, a shard all of whose tensors are done is deleted from the hub's
        cache if this process downloaded it; a later `read` fetches it again."""
        ...

    def auxiliary_files(self) -> list[Path]:
        """The files that travel with config and weights: tokenizer, generation config, licence."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase: ...


def open_checkpoint(model: str, revision: str | None = None, evict: bool = False) -> Checkpoint:
    """Reads the headers of a model folder or of a hub id, dense or written by streamslr; no weights yet.

    model: a folder with config.json and safetensors (one file, or many with an index), or "org/name".
    revision: branch, tag or commit on the hub, resolved once. evict: see `Checkpoint.release`.
    Raises InputError for files that cannot be used, HubError where the hub cannot be reached or refuses.
    """
    return _OpenCheckpoint(model, find_source(model, revision), evict)


def shard_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds, as stored; InputError for a truncated or damaged one."""
    return _read_header(LocalFolder(path.parent), path.name).tensors


@dataclass(frozen=True)
class _Header:
    raw: bytes
    size: int  # of the whole file
    tensors: dict[str, TensorInfo]
    ranges: dict[str, tuple[int, int]]  # of each tensor's bytes in the file: first, last + 1
    metadata: Mapping[str, str]


class _OpenCheckpoint:
    """The Checkpoint of any source: which shard holds what, and which of them are still needed."""

    def __init__(self, model: str, source: ModelSource, evict: bool) -> None:
        self.model = model
        self._source = source
        self._evict = evict
        raw_config = _config_bytes(source)
        self.config = _parse_config(raw_config, source)
        shards, weight_map = _shard_names(source)
        with ThreadPoolExecutor(8) as pool:  # on the hub a header costs a round trip or two
            headers = list(pool.map(lambda shard: _read_header(source, shard), shards))
        self._headers = dict(zip(shards, headers, strict=True))
        self.identity = source.pinned or _digest(raw_config, self._headers)
        stored = _stored_tensors(source, self._headers, weight_map)
        self._packed: dict[str, tuple[SparsityPattern, tuple[int, int], tuple[str, ...]]] = {}
        if read_quantization_config(self.config) is not None:
            stored = self._unpacked(stored)
        self.tensors: Mapping[str, TensorInfo] = stored
        _refuse_quantized_weights(source, self.tensors)
        self._done: set[str] = set()
        self._lock = threading.Lock()  # guards _done

    def _unpacked(self, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The parts of each packed linear P replaced by one dense P.weight."""
        tensors = dict(stored)
        for shard, header in self._headers.items():
            for linear, (pattern, shape) in packed_linears(header.metadata).items():
                parts = [part for part in _PACKED_PARTS if f"{linear}.{part}" in header.tensors]
                elsewhere = [part for part in _PACKED_PARTS if f"{linear}.{part}" in stored and part not in parts]
                if elsewhere and not parts:
                    continue  # `save_pretrained` names every linear in every shard
                if elsewhere:
                    raise InputError(
                        f"{self._source.label} has {linear}.{parts[0]} in {shard} and {linear}.{elsewhere[0]} in "
                        f"another shard, where only `streamslr.load` can put them together; save the model again "
                        f"with a larger max_shard_size"
                    )
                if not {"values", "meta"} <= set(parts):
                    raise InputError(
                        f"{shard} in {self._source.label} names the packed linear {linear}, but holds only "
                        f"{parts or 'nothing'} of it; `streamslr verify` tells more"
                    )
                for part in parts:
                    del tensors[f"{linear}.{part}"]
                name = f"{linear}.weight"
                tensors[name] = TensorInfo(name, torch.float32, shape, shard, 4 * shape[0] * shape[1])
                self._packed[name] = pattern, shape, tuple(parts)
        return tensors

    @property
    def download_bytes(self) -> int:
        return sum(header.size for shard, header in self._headers.items() if self._source.local_path(shard) is None)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = {}
        for shard, wanted in self._by_shard(names, done=False).items():
            path = self._source.fetch(shard)
            size = self._headers[shard].size
            if path.stat().st_size != size:
                raise InputError(
                    f"{path} had {size} bytes when it was opened and has {path.stat().st_size} now: "
                    f"something else writes there; let it end, then run the same line again"
                )
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    for name in wanted:
                        tensors[name] = self._tensor(file, name)
            except (SafetensorError, OSError) as error:
                raise InputError(f"cannot read {path}: {error}; copy or download the file again") from error
        return tensors

    def _tensor(self, file: Any, name: str) -> Tensor:
        if name not in self._packed:
            tensor: Tensor = file.get_tensor(name)
            return tensor
        pattern, shape, parts = self._packed[name]
        linear = name.removesuffix(".weight")
        stored = {part: file.get_tensor(f"{linear}.{part}") for part in parts}
        return merge(stored, pattern, shape, torch.float32)

    def prefetch(self, names: Iterable[str]) -> None:
        missing = []
        for shard, wanted in self._by_shard(names, done=False).items():
            path = self._source.local_path(shard)
            if path is None:
                missing.append(shard)
            else:
                _read_ahead(path, [self._headers[shard].ranges[part] for part in self._parts(wanted)])
        if missing:
            # A daemon: Ctrl-C must not wait for a download; the hub's client goes on with a partial file.
            threading.Thread(target=self._fetch_ahead, args=(missing,), daemon=True).start()

    def _fetch_ahead(self, shards: list[str]) -> None:
        for shard in shards:
            try:
                self._source.fetch(shard)
            except StreamslrError as error:  # `read` will try again, and raise it where someone listens
                log.info("fetching %s ahead failed: %s", shard, error)
                return

    def release(self, names: Iterable[str]) -> None:
        shards = self._by_shard(names, done=True)
        if not self._evict:
            return
        for shard in shards:
            with self._lock:
                finished = all(name in self._done for name, info in self.tensors.items() if info.shard == shard)
            if finished:
                self._source.evict(shard)

    def auxiliary_files(self) -> list[Path]:
        return [self._source.fetch(name) for name in sorted(self._source.files) if _is_auxiliary(name)]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        self.auxiliary_files()
        folder = self._source.fetch(CONFIG_FILE).parent
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the files are the user's: whatever they trip over, it is the tokenizer
            raise InputError(
                f"{self._source.label} holds no tokenizer that transformers can load ({first_line(error)}); "
                f"put the model's tokenizer files beside its config.json"
            ) from error
        return tokenizer

    def _by_shard(self, names: Iterable[str], done: bool) -> dict[str, list[str]]:
        """The names grouped by shard, and noted as done or as needed (again)."""
        wanted: dict[str, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise InputError(f"{self._source.label} holds no tensor {name}")
            wanted.setdefault(self.tensors[name].shard, []).append(name)
        flat = {name for group in wanted.values() for name in group}
        with self._lock:
            if done:
                self._done |= flat
            else:
                self._done -= flat
        return wanted

    def _parts(self, names: Iterable[str]) -> Iterator[str]:
        """What is stored for these names."""
        for name in names:
            if name in self._packed:
                yield from (f"{name.removesuffix('.weight')}.{part}" for part in self._packed[name][2])
            else:
                yield name


def _config_bytes(source: ModelSource) -> bytes:
    if CONFIG_FILE not in source.files:
        raise source.missing_file_error(CONFIG_FILE, ", so nothing says what architecture it is")
    return source.fetch(CONFIG_FILE).read_bytes()


def _parse_config(raw: bytes, source: ModelSource) -> PretrainedConfig:
    try:
        config = json.loads(raw)
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise InputError(f"config.json of {source.label} is not JSON ({error}); download it again") from error
    quantization = config.get("quantization_config") or config.get("compression_config") or {}
    method = quantization.get("quant_method", "an unnamed method")
    if quantization and method != "streamslr":
        raise InputError(
            f"{source.label} is already quantized ({method}); give the original model in bf16, fp16 or fp32"
        )
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in config:
            raise InputError(
                f"{source.label} (model_type {model_type!r}) brings its own modelling code, which streamslr "
                f"does not run; use a model whose architecture is part of transformers"
            )
        raise InputError(
            f"transformers does not know model_type {model_type!r} of {source.label}; update transformers, or "
            f"check config.json"
        )
    try:
        # From the file again: AutoConfig also knows what older versions of transformers wrote.
        parsed: PretrainedConfig = AutoConfig.from_pretrained(
            str(source.fetch(CONFIG_FILE).parent), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the values are the user's, and each architecture checks its own in its own way
        raise InputError(
            f"transformers cannot use config.json of {source.label} (model_type {model_type!r}): "
            f"{first_line(error)}; download it again, or update transformers"
        ) from error
    return parsed


def _shard_names(source: ModelSource) -> tuple[list[str], Mapping[str, str]]:
    """The safetensors files, and the index's tensor name -> file (empty for a single file)."""
    if SINGLE_FILE in source.files:
        return [SINGLE_FILE], {}
    if INDEX_FILE not in source.files:
        raise _no_weights(source)
    try:
        weight_map = json.loads(source.fetch(INDEX_FILE).read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
            raise ValueError(f"its files are {shards[:3]}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{INDEX_FILE} of {source.label} has no usable weight_map ({error!r}); download it again"
        ) from error
    missing = [shard for shard in shards if shard not in source.files]
    if missing:
        others = f" (and {len(missing) - 1} more of {len(shards)} shards)" if len(missing) > 1 else ""
        raise source.missing_file_error(missing[0], f"{others}, which {INDEX_FILE} names")
    return shards, weight_map


def _no_weights(source: ModelSource) -> StreamslrError:
    pickled = sorted(name for name in source.files if name.endswith((".bin", ".pt", ".pth")))
    if pickled:
        return InputError(
            f"{source.label} holds PyTorch pickles ({pickled[0]}), not safetensors; convert it once: "
            f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    others = sorted(name for name in source.files if name.endswith((".safetensors", ".gguf")))
    found = f"; {others[0]} is not a name that transformers loads" if others else ""
    return source.missing_file_error(SINGLE_FILE, f" and no {INDEX_FILE}{found}")


def _read_header(source: ModelSource, name: str) -> _Header:
    """The header of one shard, checked against itself and against the file's size."""

    def damaged(what: str) -> InputError:
        return InputError(f"{name} in {source.label}: {what}; copy or download the file again")

    start, size = source.read_start(name, _HEADER_GUESS)
    length = int.from_bytes(start[:8], "little")
    if size < 8:
        raise damaged(f"{size} bytes are no safetensors file")
    if length > _HEADER_LIMIT:
        raise damaged(f"its first 8 bytes claim a header of {length} bytes, so it is no safetensors file")
    if length > size - 8:
        raise damaged(f"truncated: {size} bytes, of which the header alone takes {length + 8}")
    if len(start) < 8 + length:
        start, _ = source.read_start(name, 8 + length)
    raw = start[8 : 8 + length]
    tensors: dict[str, TensorInfo] = {}
    ranges: dict[str, tuple[int, int]] = {}
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", {})
        for key, entry in entries.items():
            shape = tuple(int(n) for n in entry["shape"])
            first, end = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise InputError(
                    f"{key} in {name} of {source.label} has dtype {entry['dtype']}, which streamslr cannot "
                    f"read; give the original model in bf16, fp16 or fp32"
                )
            dtype = _DTYPES[entry["dtype"]]
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            if min((0, *shape)) < 0 or first < 0 or end - first != nbytes:
                raise damaged(f"{key} {list(shape)} takes {nbytes} bytes, its offsets hold {end - first}")
            tensors[key] = TensorInfo(key, dtype, shape, name, nbytes)
            ranges[key] = (8 + length + first, 8 + length + end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(f"its header is not a safetensors header ({error!r})") from error
    need = max((end for _, end in ranges.values()), default=8 + length)
    if need != size:
        wrong = "truncated" if need > size else "longer than its header says"
        raise damaged(f"{wrong}: {size} bytes, the header speaks of {need}")
    return _Header(raw, size, tensors, ranges, metadata)


def _stored_tensors(
    source: ModelSource, headers: Mapping[str, _Header], weight_map: Mapping[str, str]
) -> dict[str, TensorInfo]:
    """Every tensor of every shard; the index decides where two shards hold the same name."""
    stored = {name: info for header in headers.values() for name, info in header.tensors.items()}
    absent = [name for name, shard in weight_map.items() if name not in headers[shard].tensors]
    if absent:
        raise InputError(
            f"{INDEX_FILE} of {source.label} places {absent[0]} in {weight_map[absent[0]]}, which does "
            f"not hold it ({len(absent)} such tensors): "
            f"index and shards are of different models; download both again"
        )
    return stored | {name: headers[shard].tensors[name] for name, shard in weight_map.items()}


def _refuse_quantized_weights(source: ModelSource, tensors: Mapping[str, TensorInfo]) -> None:
    """Some quantized checkpoints say nothing in config.json; their weights' dtype does."""
    odd = [info for name, info in tensors.items() if name.endswith(".weight") and info.dtype not in _WEIGHT_DTYPES]
    if odd:
        raise InputError(
            f"{odd[0].name} in {odd[0].shard} of {source.label} is {DTYPE_NAMES[odd[0].dtype]} "
            f"({len(odd)} such weights); give the original model in bf16, fp16 or fp32"
        )


def _is_auxiliary(name: str) -> bool:
    """Whether a file belongs beside the weights in a copy of the model."""
    if name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")):
        return True
    if name.startswith(".") or name == CONFIG_FILE or name == "streamslr.json" or ".index." in name:
        return False
    # of .txt files only these are a tokenizer's; others may be anything, and large
    return name in ("merges.txt", "vocab.txt") or name.endswith((".json", ".model", ".jinja", ".tiktoken"))


def _digest(config: bytes, headers: Mapping[str, _Header]) -> str:
    digest = hashlib.sha256(config)
    for name, header in sorted(headers.items()):
        digest.update(f"\0{name}\0{header.size}\0".encode() + header.raw)
    return digest.hexdigest()


def _read_ahead(path: Path, ranges: Iterable[tuple[int, int]]) -> None:
    if not hasattr(os, "posix_fadvise"):  # macOS: its own read-ahead has to do
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for first, end in ranges:
            os.posix_fadvise(descriptor, first, end - first, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
