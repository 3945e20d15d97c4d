"""Tensors that a compressed folder stores, compared with its index, its journal and the modules that they fill.

transformers fills what a folder lacks with random numbers, and reports that. Here it is refused, from headers alone,
before any weight is read.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamslr.errors import InputError
from streamslr.io.durable import is_as_written
from streamslr.io.folder import parse_index
from streamslr.io.packed_check import check_layout, check_positions
from streamslr.io.packed_layout import (
    INDEX_FILE,
    NON_BLOCK_FILE,
    Linears,
    journal_misfit,
    linears_among,
    packed_linears,
    part_name,
    stored_parts,
    value_format,
    without_numbers,
)
from streamslr.io.safetensors_file import WEIGHT_DTYPES, TensorInfo, shard_header
from streamslr.model.other_files import ADAPTER_FILE
from streamslr.model.transformers_compat import get_model_conversion_mapping
from streamslr.outside import read_bounded
from streamslr.run.journal import JOURNAL_FILE, JournalState, read_journal
from streamslr.spec.pattern import SparsityPattern, parse_pattern
from streamslr.spec.values import ValueFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("streamslr")


@dataclass(frozen=True)
class StoredModel:
    """Tensors of a compressed folder, from the headers of its shards."""

    folder: Path
    tensors: Mapping[str, TensorInfo]
    linears: Linears
    """The packed linears."""
    advice: str = "`streamslr verify` tells more. Copy the folder again from where it came from"
    """Advice to the user in error messages."""

    def parts(self, linear: str) -> dict[str, TensorInfo]:
        """Return the stored parts of a packed linear."""
        return {part: self.tensors[name] for part, name in stored_parts(linear, self.tensors).items()}

    def rank(self, linear: str) -> int:
        """Return the rank of a packed linear whose layout is checked."""
        return self.tensors[part_name(linear, "V")].shape[0] if part_name(linear, "V") in self.tensors else 0

    def value_format(self, linear: str) -> ValueFormat | None:
        """Return the format of the values of a packed linear whose layout is checked; None without a grid."""
        return value_format(self.on_meta(linear), self.linears[linear][1][1])

    def on_meta(self, linear: str) -> dict[str, Tensor]:
        """Return the parts of a packed linear on the meta device."""
        parts = self.parts(linear).items()
        return {part: torch.empty(info.shape, dtype=info.dtype, device="meta") for part, info in parts}

    def refuse(self, problem: str) -> InputError:
        """Return the error for a folder whose shards are not what they should be."""
        return InputError(f"{self.folder}: {problem}; {self.advice}")


def read_stored_model(files: list[str] | None) -> StoredModel:
    """Read the headers of the files that transformers is about to load; compare them with index and journal.

    Raises:
        InputError: a file is missing or damaged, headers, index and journal disagree, the run that wrote the folder
            has not finished, or an adapter beside the shards would change the model.
    """
    if not files:
        raise InputError("a compressed model must be loaded from its folder, not from a state_dict alone")
    paths = [Path(file) for file in files]
    folder = paths[0].parent
    if others := [path for path in paths if path.parent != folder]:
        raise InputError(f"{INDEX_FILE} in {folder} names a file outside of it ({others[0]}): it is damaged")
    if (folder / ADAPTER_FILE).exists():
        raise InputError(
            f"{folder / ADAPTER_FILE} makes transformers put an adapter on the model; move it out of the folder, and "
            f"load the adapter with peft.PeftModel.from_pretrained(model, ADAPTER)"
        )
    state = read_journal(folder)
    if state:
        state.require_complete(folder)
    headers = {path.name: shard_header(path) for path in paths}
    tensors: dict[str, TensorInfo] = {}
    linears: Linears = {}
    for header in headers.values():
        linears |= packed_linears(header.metadata)
        for name, info in header.tensors.items():
            if name in tensors:
                raise InputError(f"{folder}: {name} is in {tensors[name].shard} and in {info.shard}")
            tensors[name] = info
    packed = set(linears_among(tensors))
    # `save_pretrained` names every linear in every shard, which may be loaded without the others.
    stored = StoredModel(folder, tensors, {name: linear for name, linear in linears.items() if name in packed})
    if unnamed := sorted(packed - linears.keys()):
        raise stored.refuse(f"no header says what pattern {unnamed[0]} has ({len(unnamed)} such linears)")
    if lost := sorted(linears.keys() - packed):
        raise stored.refuse(f"{part_name(lost[0], 'meta')} is missing ({len(lost)} such linears)")
    if len(paths) > 1 or (folder / INDEX_FILE).exists():
        _compare_index(stored)
    for linear in stored.linears:
        _check_layout(stored, linear)
    if state:
        _compare_journal(stored, state, set(headers))
        _warn_of_changes(folder, state)
    else:
        _warn_of_ranks(stored)
    return stored


def _compare_index(stored: StoredModel) -> None:
    path = stored.folder / INDEX_FILE
    try:
        weight_map = parse_index(read_bounded(path))
    except ValueError as error:
        raise InputError(f"{path} has no usable weight_map ({error}); copy it again") from error
    shards = {name: info.shard for name, info in stored.tensors.items()}
    for name in sorted(shards.keys() | weight_map.keys()):
        said, found = weight_map.get(name), shards.get(name)
        if said != found:
            raise stored.refuse(
                f"{INDEX_FILE} places {name} in {said or 'no file'}, but {found or 'no shard'} holds it"
            )


def _check_layout(stored: StoredModel, linear: str) -> None:
    """Check names, shapes and dtypes of the parts of a packed linear against its pattern and shape."""
    pattern, shape = stored.linears[linear]
    if problems := check_layout(stored.on_meta(linear), pattern, shape):
        raise stored.refuse(f"{linear}: {problems[0]}")


def _warn_of_ranks(stored: StoredModel) -> None:
    """Warn of linears without U and V where others of their kind have them: without a journal it may be right."""
    with_rank = {without_numbers(linear) for linear in stored.linears if stored.rank(linear)}
    without = [name for name in stored.linears if not stored.rank(name) and without_numbers(name) in with_rank]
    if without:
        log.warning(
            "%s: %s (%d such linears) has no U and V, others of its kind do; there is no %s to say if that is right",
            *(stored.folder, min(without), len(without), JOURNAL_FILE),
        )


def _compare_journal(stored: StoredModel, state: JournalState, files: set[str]) -> None:
    """Check that the files, and the packed linears in them, are those of the journal."""
    recorded = {shard.file for shard in state.shards}
    if files != recorded:
        name = min(files ^ recorded)
        where = f"{JOURNAL_FILE} does not name" if name in files else "transformers would not read"
        raise stored.refuse(f"{where} {name}; if `save_pretrained` wrote here, delete {JOURNAL_FILE}")
    if problem := find_difference(state, {name: (*stored.linears[name], stored.rank(name)) for name in stored.linears}):
        raise stored.refuse(problem)
    for record in (linear for block in state.blocks for linear in block.linears):
        parts = stored.on_meta(record.name)
        if misfit := journal_misfit(parts, record.shape[1], record.values, record.low_rank_values):
            raise stored.refuse(f"{record.name} has {misfit}")


def find_difference(state: JournalState, linears: Mapping[str, tuple[SparsityPattern, tuple[int, int], int]]) -> str:
    """Return how packed linears, name -> (pattern, shape, rank), differ from a journal's; "" where they do not."""
    records = {linear.name: linear for block in state.blocks for linear in block.linears}
    for name in sorted(records.keys() | linears.keys()):
        if name not in records or name not in linears:
            return f"{name} is {'not in the shards' if name in records else 'not in the journal'}"
        record, (pattern, shape, rank) = records[name], linears[name]
        if (pattern, shape, rank) != (parse_pattern(record.pattern), tuple(record.shape), record.rank):
            return (
                f"{name} is stored as {pattern} of {shape[0]}x{shape[1]} at rank {rank}, the journal says "
                f"{record.pattern} of {record.shape[0]}x{record.shape[1]} at rank {record.rank}"
            )
    return ""


def _warn_of_changes(folder: Path, state: JournalState) -> None:
    """Warn where a file that decides what the model does is not as it was written: someone may have meant it."""
    for name in ("config.json", "generation_config.json"):
        digest = state.auxiliary_files.get(name)
        # Of a hub repository transformers fetches generation_config.json later.
        if digest and (folder / name).is_file() and not is_as_written(folder / name, digest):
            log.warning("%s is not as it was written: the model may do something else", folder / name)


def require_complete(model: "PreTrainedModel", stored: StoredModel) -> None:
    """Check that the stored tensors are what the model needs: none missing or unexpected, shapes and dtypes right.

    Args:
        model: the model on meta, packed linears in their places.
        stored: the folder's tensors.

    Raises:
        InputError: they are not; names a tensor, what was expected and what was found.
    """
    # loader.py says why this is not imported above
    from streamslr.model.parameter_names import ParameterNames

    names = ParameterNames(model, (), get_model_conversion_mapping(model), stored.tensors)
    expected = f"a {type(model).__name__} as config.json describes it"
    _refuse_missing(model, names.meta.keys() - set(names.computed), names.sources.keys(), stored, expected)
    _refuse_unexpected(model, {key for keys in names.sources.values() for key in keys}, stored, expected)
    for name, keys in names.sources.items():
        info, wanted = stored.tensors[keys[0]], names.meta[name]
        if names.own_key(name) and info.shape != tuple(wanted.shape):
            raise stored.refuse(
                f"{info.name} in {info.shard} is {list(info.shape)}, {expected} needs {list(wanted.shape)}"
            )
        number = wanted.is_floating_point() and wanted.dtype.itemsize > 1  # no code of a grid
        if not (info.dtype in WEIGHT_DTYPES if number else info.dtype == wanted.dtype):
            needed = "a floating-point dtype of 16 bits or more" if number else wanted.dtype
            raise stored.refuse(f"{info.name} in {info.shard} is {info.dtype}, {expected} needs {needed}")


def _refuse_missing(
    model: "PreTrainedModel", wanted: set[str], found: Iterable[str], stored: StoredModel, expected: str
) -> None:
    """Refuse a folder that lacks parameters. The head of another task (of a classifier) may be new."""
    from streamslr.model.parameter_names import with_tied

    present = with_tied(model, found)
    if not _has_its_own_head(model) and model.base_model is not model:
        wanted = {name for name in wanted if name.startswith(f"{model.base_model_prefix}.")}
    if missing := sorted(wanted - present):
        raise stored.refuse(f"{missing[0]} is missing ({len(missing)} of {len(wanted)} tensors that {expected} needs)")


def _refuse_unexpected(model: "PreTrainedModel", used: set[str], stored: StoredModel, expected: str) -> None:
    """Refuse tensors that the model has no place for; warn of those that the source had outside its blocks."""
    # loader.py says why this is not imported above
    from streamslr.model.parameter_names import parts_in_words, unread_parts

    if not _has_its_own_head(model):  # the stored head has no place; what is missing elsewhere was named before
        return
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    unused = {name for name in stored.tensors if name not in used and not any(p.search(name) for p in ignored)}
    if surplus := sorted(name for name in unused if stored.tensors[name].shard != NON_BLOCK_FILE):
        raise stored.refuse(f"{surplus[0]} is unexpected ({len(surplus)} tensors that {expected} has no place for)")
    if unused:
        parts = parts_in_words(unread_parts(stored.tensors, stored.tensors.keys() - unused))
        log.warning("%s: %s has no place for these parts: %s", stored.folder, expected, ", ".join(parts))


def _has_its_own_head(model: "PreTrainedModel") -> bool:
    """Return False for a model without a head (AutoModel), or with the head of another task than the stored one."""
    architectures = model.config.architectures
    return not architectures or type(model).__name__ in architectures


def require_sound_positions(stored: StoredModel) -> None:
    """Read `meta` and `row_offsets` of every packed linear, and check the columns that they name.

    Raises:
        InputError: a byte of `meta` describes no group of the pattern, or `row_offsets` disagrees with `meta`.
    """
    by_file: dict[str, list[str]] = {}
    for name in stored.tensors:
        if name.endswith((".meta", ".row_offsets")):
            by_file.setdefault(stored.tensors[name].shard, []).append(name)
    waiting: dict[str, Tensor] = {}  # meta and row_offsets of a linear may be in two shards
    for file, names in by_file.items():
        try:
            with safe_open(stored.folder / file, "pt") as opened, torch.device("cpu"):
                for name in names:
                    waiting[name] = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"cannot read {stored.folder / file}: {error}; copy the file again") from error
        for linear in {name.rpartition(".")[0] for name in names}:
            parts = stored.parts(linear)
            read = {part: info.name for part, info in parts.items() if part in ("meta", "row_offsets")}
            if not all(name in waiting for name in read.values()):
                continue
            tensors = stored.on_meta(linear) | {part: waiting.pop(name) for part, name in read.items()}
            pattern, shape = stored.linears[linear]
            if problems := check_positions(tensors, pattern, shape):
                raise stored.refuse(f"{linear} in {file}: {problems[0]}")


def require_same_kinds_packed(packed: set[str], dense: set[str]) -> None:
    """Raise InputError when a linear stayed dense that is packed in another block: shards are missing.

    Args:
        packed: module paths of the packed linears.
        dense: module paths of the linears that stayed dense.
    """
    places = {without_numbers(name) for name in packed}
    if not places:
        raise InputError("config.json says that streamslr packed the linears, but the shards hold none that fit")
    if missing := sorted(name for name in dense if without_numbers(name) in places):
        raise InputError(
            f"the shards hold no {missing[0]} ({len(missing)} such linears): the folder is unfinished or "
            f"incomplete; `streamslr verify` tells more"
        )
