"""Export a compressed folder for other software: one dense model, or S as a model with U·V as its PEFT adapter."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from streamslr.errors import InputError, ResumeError, StreamslrError
from streamslr.io.durable import (
    PARTIAL_SUFFIX,
    DiskNeed,
    is_as_written,
    lock_folder,
    require_disk_space,
    write_file,
    write_json,
)
from streamslr.io.folder import config_bytes, copy_auxiliary_file, index_json, require_as_written
from streamslr.io.low_rank import unpack_low_rank
from streamslr.io.packed_layout import INDEX_FILE, LOW_RANK_PARTS, packed_linears, stored_parts
from streamslr.io.packing import merge
from streamslr.io.safetensors_file import TensorInfo, TensorSource, shard_header, write_shard
from streamslr.memory import keep_no_freed_memory
from streamslr.model.checkpoint import open_checkpoint
from streamslr.model.meta_model import build_on_meta
from streamslr.model.parameter_names import find_modules
from streamslr.model.sources import CONFIG_FILE
from streamslr.model.transposed import find_transposed, linear_shape
from streamslr.outside import parse_json, read_bounded
from streamslr.results.inspect import read_run
from streamslr.results.readers import LORA_PREFIX, open_on_meta, try_adapter
from streamslr.spec.pattern import SparsityPattern
from streamslr.tensors import is_finite

RECORD_FILE = ".streamslr-export.json"
"""Record in the exported folder: the source, the settings, and the digest of each finished shard. Its name starts with
a dot because it is no part of the model."""
_RECORD_VERSION = 1
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank (vllm/config/lora.py, MaxLoRARanks, v0.14 to v0.27)."""

log = logging.getLogger("streamslr")


@dataclass(frozen=True)
class Exported:
    """Result of `export`. Every shard was read back and equals what was written."""

    out: Path
    shards: int
    made: int
    """Number of shards that this call wrote; the others were there already."""
    nbytes: int
    """Bytes of all shards."""
    rank: int
    """Largest rank of the adapter; 0 for a dense export."""


@dataclass(frozen=True)
class _Shard:
    """A file to write. Each tensor is computed when it is written."""

    path: str
    """Path in the exported folder."""
    tensors: tuple[TensorSource, ...]

    @property
    def nbytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape, _ in self.tensors)


def export(
    folder: Path,
    out: Path,
    to: str,
    dtype: torch.dtype | None = None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write the model of a compressed folder into `out` for other software; called again, continue where it stopped.

    One tensor is in memory at a time. A shard is written durably, read back and recorded. A shard that is there as
    recorded is not written again.

    Args:
        folder: A finished compressed folder.
        out: Folder to write, outside of `folder`.
        to: "dense" writes W = S + U·V as a transformers folder. "peft" writes S, stored dense, as a transformers folder
            into `out`/base, and U, V into `out`/adapter as a LoRA with alpha = r.
        dtype: Dtype of every weight. None keeps the stored dtype, and that of scales where values are codes: exact for
            "peft" where they are not; the sum rounded once for "dense".
        step: Called with (shards done, shards in all).

    Raises:
        InputError: `folder` is unfinished or damaged (the message names the shard), or has no U·V for an adapter, or
            has experts, which an adapter cannot reach.
        BudgetError: The disk is too small.
        ResumeError: `out` holds something else, or another process writes it.
    """
    keep_no_freed_memory()
    if out.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{out} lies in the compressed folder itself; export to a folder outside of {folder}")
    source = _Source(folder)
    model = Path("base" if to == "peft" else "")
    config, count = source.config(dtype), len(source.files)
    on_meta, tensors = open_on_meta(
        out / model, config, {file: source.weights(file, to == "dense", dtype) for file in source.files}
    )
    shards = [
        _Shard(str(model / f"model-{i:05d}-of-{count:05d}.safetensors"), of) for i, of in enumerate(tensors.values(), 1)
    ]
    index = index_json(
        {name: Path(shard.path).name for shard in shards for name, *_ in shard.tensors},
        sum(shard.nbytes for shard in shards),
    )
    adapter: dict[str, Any] = {}
    if to == "peft":
        modules = source.module_paths(on_meta)
        adapter = _adapter_config(out / model, source.ranks(modules), on_meta)
        shards.append(_Shard("adapter/adapter_model.safetensors", source.factors(modules, dtype)))
        try_adapter(on_meta, adapter, shards[-1].tensors)
    made_from = {
        "record_version": _RECORD_VERSION,
        "compressed": source.identity,
        "to": to,
        "dtype": "as stored" if dtype is None else str(dtype).removeprefix("torch."),
    }
    with _claimed(out, made_from) as done:
        missing = sum(shard.nbytes for shard in shards if shard.path not in done)
        require_disk_space(DiskNeed(out, "shards", missing, "export to another disk"))
        made = 0
        for number, shard in enumerate(shards, 1):
            path = out / shard.path
            if not _is_as_recorded(path, done.get(shard.path)):
                done[shard.path] = _write_checked(path, shard)
                write_json(out / RECORD_FILE, made_from | {"shards": done})
                made += 1
            step(number, len(shards))
        # The files that make the folder loadable come last, so that nothing takes an unfinished one for a model.
        if adapter:
            write_json(out / "adapter/adapter_config.json", adapter)
        for path in source.auxiliary_files():
            copy_auxiliary_file(path, out / model)
        write_json(out / model / INDEX_FILE, index)
        write_file(out / model / CONFIG_FILE, config_bytes(config))
    return Exported(out, len(shards), made, sum(shard.nbytes for shard in shards), adapter.get("r", 0))


def vllm_max_lora_rank(rank: int) -> int | None:
    """Return the smallest --max-lora-rank with which vLLM takes adapters of `rank`; None when it has none so large."""
    return next((allowed for allowed in _VLLM_RANKS if rank <= allowed), None)


class _Source:
    """A finished compressed folder, read tensor by tensor; the digest of a shard is checked before its first use."""

    def __init__(self, folder: Path) -> None:
        """Read headers and auxiliary files; raise InputError for a folder that is unfinished or damaged there."""
        state = read_run(folder)
        state.require_complete(folder)
        for name, digest in state.auxiliary_files.items():
            require_as_written(folder / name, digest)
        self._folder = folder
        self._checkpoint = open_checkpoint(str(folder))  # checks that index, shards and headers agree
        self._auxiliary_files = tuple(state.auxiliary_files)
        self._digests = {shard.file: shard.sha256 for shard in state.shards}
        self._checked: set[str] = set()
        headers = {file: shard_header(folder / file) for file in self._digests}
        self._stored = {file: header.tensors for file, header in headers.items()}
        self._linears = {file: packed_linears(header.metadata) for file, header in headers.items()}
        content = json.dumps([self._digests, dict(state.auxiliary_files)], sort_keys=True)
        self.identity = hashlib.sha256(content.encode()).hexdigest()

    @property
    def files(self) -> tuple[str, ...]:
        """Return the shards in order: the tensors outside the blocks, then one per block."""
        return tuple(self._digests)

    def module_paths(self, model: PreTrainedModel) -> dict[str, str]:
        """Return stored name -> module path in `model` of each linear that has a low-rank part.

        Raises:
            InputError: No linear has one, or transformers fuses them, as it does experts.
        """
        stored = [name for file, names in self._linears.items() for name in names if f"{name}.V" in self._stored[file]]
        if not stored:
            raise InputError(
                f"{self._folder} has rank 0: there is nothing for an adapter to hold; export it --to dense"
            )
        linears = {name for name, module in model.named_modules() if linear_shape(module)}
        paths = find_modules(model, stored, linears)
        if fused := [name for name in stored if name not in paths]:
            raise InputError(
                f"{fused[0]} is an expert's: transformers fuses experts when it loads them, so a LoRA of PEFT has no "
                f"linear to adapt; export {self._folder} --to dense, or load it with streamslr.load"
            )
        return paths

    @cached_property
    def _transposed(self) -> set[str]:
        """The linears that the model stores as [d, o]."""
        model = build_on_meta(self._checkpoint.config, torch.float32, self._checkpoint.tensors)
        linears = [name for names in self._linears.values() for name in names]
        return set(find_modules(model, linears, find_transposed(model)))

    def ranks(self, modules: Mapping[str, str]) -> dict[str, int]:
        """Return module path -> rank, for linears by stored name -> module path."""
        return {
            modules[linear]: self._stored[file][f"{linear}.V"].shape[0]
            for file, linears in self._linears.items()
            for linear in linears
            if linear in modules
        }

    def weights(self, file: str, low_rank: bool, dtype: torch.dtype | None) -> tuple[TensorSource, ...]:
        """Return the tensors of a shard for the dense model.

        Args:
            file: A shard of the compressed folder.
            low_rank: True for S + U·V [o, d] in the place of a packed linear, False for S.
            dtype: Dtype of every weight; None keeps the stored dtype.
        """
        rest = dict(self._stored[file])
        sources: list[TensorSource] = []
        for linear, (pattern, shape) in self._linears[file].items():
            parts = {part: rest.pop(name) for part, name in stored_parts(linear, rest).items()}
            stored = dtype or parts["scales" if "scales" in parts else "values"].dtype
            if not low_rank:
                parts = {part: info for part, info in parts.items() if part not in LOW_RANK_PARTS}
            transposed = linear in self._transposed
            dense = partial(self._dense, parts, pattern, shape, stored, transposed)
            sources.append((f"{linear}.weight", stored, shape[::-1] if transposed else shape, dense))
        sources += (self._as_is(info, info.name, dtype) for info in rest.values())
        return tuple(sources)

    def factors(self, modules: Mapping[str, str], dtype: torch.dtype | None) -> tuple[TensorSource, ...]:
        """Return U and V by their names in a LoRA: V [r, d] is lora_A, U [o, r] is lora_B.

        Args:
            modules: Stored name -> module path of each linear that has them; PEFT goes by the latter.
            dtype: Dtype of both; None keeps the stored dtype, of codes that of their scales.
        """
        return tuple(
            self._factor(file, linear, part, f"{LORA_PREFIX}{modules[linear]}.{lora}.weight", dtype)
            for file, linears in self._linears.items()
            for linear in linears
            for part, lora in (("V", "lora_A"), ("U", "lora_B"))
            if linear in modules
        )

    def auxiliary_files(self) -> list[Path]:
        """Return tokenizer, generation config, licence: what the journal names. Errors as `Checkpoint`'s."""
        return [path for path in self._checkpoint.auxiliary_files() if path.name in self._auxiliary_files]

    def config(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """Return the config.json of the dense model: the source's own, with another dtype where one is asked for."""
        config = self._checkpoint.dense_config_json()
        if dtype is not None and not _set_dtype(config, str(dtype).removeprefix("torch.")):
            config["torch_dtype"] = str(dtype).removeprefix("torch.")  # every version of transformers reads this name
        return config

    def _as_is(self, info: TensorInfo, name: str, dtype: torch.dtype | None) -> TensorSource:
        stored = dtype if dtype and info.dtype.is_floating_point else info.dtype
        return name, stored, info.shape, lambda: self._require_finite(name, self._read([info])[info.name].to(stored))

    def _factor(self, file: str, linear: str, part: str, name: str, dtype: torch.dtype | None) -> TensorSource:
        stored = self._stored[file]
        info, scales = stored[f"{linear}.{part}"], stored.get(f"{linear}.low_rank_scales")
        if scales is None:
            return self._as_is(info, name, dtype)
        parts = {part: stored[f"{linear}.{part}"] for part in LOW_RANK_PARTS}
        wanted = dtype or scales.dtype

        def numbers() -> Tensor:
            read = self._read(parts.values())
            low_rank = unpack_low_rank({part: read[found.name] for part, found in parts.items()})
            assert low_rank is not None
            return self._require_finite(name, low_rank["UV".index(part)].to(wanted))

        return name, wanted, info.shape, numbers

    def _dense(
        self,
        parts: Mapping[str, TensorInfo],
        pattern: SparsityPattern,
        shape: tuple[int, int],
        dtype: torch.dtype,
        transposed: bool,
    ) -> Tensor:
        read = self._read(parts.values())
        dense = merge({part: read[info.name] for part, info in parts.items()}, pattern, shape, dtype)
        dense = dense.T.contiguous() if transposed else dense
        return self._require_finite(parts["values"].name.replace(".values", ".weight"), dense)

    def _read(self, infos: Collection[TensorInfo]) -> dict[str, Tensor]:
        """Return tensors of one shard by name, once the digest of the shard is checked."""
        file = next(iter(infos)).shard
        path = self._folder / file
        try:
            if file not in self._checked:
                require_as_written(path, self._digests[file])
                self._checked.add(file)
            with safe_open(path, "pt") as opened:
                return {info.name: opened.get_tensor(info.name) for info in infos}
        except (SafetensorError, OSError) as error:
            raise InputError(f"cannot read {path}: {error}; `streamslr verify` tells more") from error

    def _require_finite(self, name: str, tensor: Tensor) -> Tensor:
        """Return `tensor`. Raise InputError when it overflows the dtype asked for."""
        if tensor.is_floating_point() and not is_finite(tensor):
            raise InputError(
                f"{name} does not fit {tensor.dtype}, which ends at {torch.finfo(tensor.dtype).max:g}; "
                f"export with --dtype float32"
            )
        return tensor


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    """Set every dtype in config.json, also those of a composite model's parts; return True where its top has one."""
    names = config.keys() & {"dtype", "torch_dtype"}
    config.update(dict.fromkeys(names, dtype))
    for part in config.values():
        if isinstance(part, dict):
            _set_dtype(part, dtype)
    return bool(names)


def _adapter_config(base: Path, ranks: Mapping[str, int], model: nn.Module) -> dict[str, Any]:
    """Return the adapter_config.json of a LoRA whose scale alpha / r is 1 for every module.

    r is the largest rank, because vLLM reserves r rows for each module and pads with zeros. vLLM reads r and lora_alpha
    but not the patterns (vllm/lora/peft_helper.py), so alpha = r gives the scale 1 for smaller ranks too.

    Args:
        base: Folder of the base model.
        ranks: Rank of each module that has an adapter.
        model: The base model on meta.
    """
    rank = max(ranks.values())
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in ranks}
    # PEFT applies a target to every module whose name ends in it, so the last part of a name is enough where all
    # modules that share it have an adapter.
    targets = {name if (last := name.rpartition(".")[2]) in others else last for name in ranks}
    mixed = {name: r for name, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": mixed,
        "alpha_pattern": mixed,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not find_transposed(model).isdisjoint(ranks),
        "modules_to_save": None,
        "inference_mode": True,
    }


@contextmanager
def _claimed(out: Path, made_from: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Lock `out` for this export, and yield its finished shards: path -> sha256."""
    with lock_folder(out, "give another folder"):
        path = out / RECORD_FILE
        if not path.is_file():
            if foreign := sorted(p.name for p in out.iterdir() if p.name != RECORD_FILE + PARTIAL_SUFFIX):
                raise ResumeError(f"{out} holds files that are no export's ({foreign[0]}, …); give a new folder")
            write_json(path, {**made_from, "shards": {}})  # before the first shard, to claim the folder
        try:
            record = parse_json(read_bounded(path), dict[str, Any])
            done = msgspec.convert(record.pop("shards"), dict[str, str])
        except (ValueError, KeyError, msgspec.MsgspecError) as error:
            raise ResumeError(f"{path} is damaged ({error}); delete {out}, or give another folder") from error
        changed = [f"{k}: {record.get(k)!r} there, {v!r} now" for k, v in made_from.items() if record.get(k) != v]
        if changed:
            raise ResumeError(f"{out} holds another export ({'; '.join(changed)}); delete it, or give another folder")
        yield done


def _is_as_recorded(path: Path, sha256: str | None) -> bool:
    """Return True when a shard is there with its recorded digest; warn when a recorded one is not."""
    if sha256 is None:
        return False
    if is_as_written(path, sha256):
        return True
    log.warning("%s is missing or not as it was written: writing it again", path)
    return False


def _write_checked(path: Path, shard: _Shard) -> str:
    """Write a shard, read it back and return its sha256. Raise StreamslrError when it read back other bytes."""
    path.parent.mkdir(exist_ok=True)
    written = write_shard(path, shard.tensors, {"format": "pt"})
    _drop_cached_pages(path)
    if not is_as_written(path, written.sha256):
        path.unlink()
        raise StreamslrError(f"{path} read back other bytes than were written: check the disk, then start again")
    return written.sha256


def _drop_cached_pages(path: Path) -> None:
    """Ask the system to forget a file's pages, so that the next read comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
