"""Check a compressed folder against its journal: digests, patterns, finite values, missing and extra files."""

import json
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from streamslr.errors import StreamslrError
from streamslr.io.durable import file_sha256
from streamslr.io.packed_check import check_packed
from streamslr.io.packed_layout import INDEX_FILE, packed_linears, stored_parts
from streamslr.io.safetensors_file import WrittenShard
from streamslr.results.inspect import REPORT_FILE, read_run
from streamslr.run.journal import JOURNAL_FILE, BlockRecord, JournalState, LinearRecord
from streamslr.spec.pattern import SparsityPattern, parse_pattern
from streamslr.tensors import is_finite

_ADDED_FILES = ("README.md", "LICENSE", REPORT_FILE)  # files that users add to a folder before they publish it


@dataclass(frozen=True)
class Verification:
    """Result of `verify`. The folder is sound when there are no problems."""

    folder: str
    complete: bool
    """False for an unfinished run; only its finished part was checked."""
    files: int
    """Number of shards checked."""
    tensors: int
    """Number of tensors in them."""
    problems: tuple[tuple[str, str], ...]
    """Pairs of a file and a sentence about it, to be read as one: "config.json" "is missing"."""


def verify(folder: Path, step: Callable[[int, int], None] = lambda done, total: None) -> Verification:
    """Read every byte of a folder, finished or not, and check it against its journal and its format.

    Args:
        folder: A compressed folder.
        step: Called with (shards done, shards in all).

    Raises:
        InputError: `folder` is no output folder.
    """
    state = read_run(folder)
    problems: list[tuple[str, str]] = []
    tensors: dict[str, str] = {}
    shards: list[tuple[WrittenShard, BlockRecord | None]] = [(block.shard, block) for block in state.blocks]
    if state.non_block:
        shards.insert(0, (state.non_block, None))
    for number, (shard, block) in enumerate(shards, 1):
        names, found = _check_shard(folder / shard.file, shard, block)
        problems += [(shard.file, problem) for problem in found]
        tensors |= dict.fromkeys(names, shard.file)
        step(number, len(shards))
    problems += check_auxiliary_files(folder, state)
    if state.non_block:
        problems += [(INDEX_FILE, problem) for problem in _check_index(folder / INDEX_FILE, tensors)]
    if [block.index for block in state.blocks] != list(range(len(state.blocks))):
        problems.append((JOURNAL_FILE, f"counts blocks {[block.index for block in state.blocks]}"))
    if state.non_block:  # earlier, config and tokenizer may lie there before the journal records them
        problems += [
            (name, "is not part of the model: no journal record names it") for name in _extra_files(folder, state)
        ]
    return Verification(str(folder), state.complete, len(shards), len(tensors), tuple(problems))


def _check_shard(path: Path, shard: WrittenShard, block: BlockRecord | None) -> tuple[list[str], list[str]]:
    """Return the names of a shard's tensors, and its problems."""
    if not path.is_file():
        return [], ["is missing"]
    problems = []
    if path.stat().st_size != shard.nbytes:
        problems.append(f"has {path.stat().st_size:,} bytes, the journal says {shard.nbytes:,}")
    elif (digest := file_sha256(path)) != shard.sha256:
        problems.append(f"has sha256 {digest[:12]}…, the journal says {shard.sha256[:12]}…")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            there = set(names)
            metadata = file.metadata()
            linears = packed_linears(metadata)
            recorded = {linear.name for linear in block.linears} if block else set()
            problems += [f"{name} has no record in the journal" for name in sorted(linears.keys() - recorded)]
            for linear in block.linears if block else ():
                problems += _check_linear(linear, linears, there, file.get_tensor)
            packed = {stored for name in linears for stored in stored_parts(name, there).values()}
            for name in names:
                if name not in packed and not is_finite(file.get_tensor(name)):
                    problems.append(f"{name} holds NaN or infinite values")
    except (SafetensorError, OSError, ValueError, StreamslrError) as error:
        return [], [*problems, f"cannot be read: {error}"]
    return names, problems


def _check_linear(
    linear: LinearRecord,
    linears: Mapping[str, tuple[SparsityPattern, tuple[int, int]]],
    names: Container[str],
    read: Callable[[str], torch.Tensor],
) -> Iterator[str]:
    """Yield the problems of one packed linear.

    Args:
        linear: Its record in the journal.
        linears: Pattern and shape (o, d) of each packed linear, from the header of the shard.
        names: The tensors of the shard.
        read: Function that returns a tensor of the shard by name.
    """
    pattern = parse_pattern(linear.pattern)
    if linears.get(linear.name) != (pattern, linear.shape):
        yield f"{linear.name} is not there as {linear.pattern} of {linear.shape[0]}×{linear.shape[1]}"
        return
    parts = {part: read(name) for part, name in stored_parts(linear.name, names).items()}
    yield from (f"{linear.name}: {problem}" for problem in check_packed(parts, pattern, linear.shape))
    o, d = linear.shape
    for part, shape in (("U", (o, linear.rank)), ("V", (linear.rank, d))):
        there = tuple(parts[part].shape) if part in parts else None
        if linear.rank and there != shape:
            yield f"{linear.name}.{part} has shape {there}, the journal says {shape}"


def check_auxiliary_files(folder: Path, state: JournalState) -> Iterator[tuple[str, str]]:
    """Yield the problems of config, tokenizer and the like, each with the file's name."""
    for name, digest in state.auxiliary_files.items():
        if not (folder / name).is_file():
            yield name, "is missing"
        elif file_sha256(folder / name) != digest:
            yield name, "has changed since the run wrote it"


def _check_index(path: Path, tensors: dict[str, str]) -> Iterator[str]:
    """Yield where the index differs from `tensors`, tensor name -> shard."""
    try:
        weight_map = dict(json.loads(path.read_text())["weight_map"])
    except FileNotFoundError:
        yield "is missing"
        return
    except (ValueError, KeyError, TypeError) as error:
        yield f"cannot be read: {error!r}"
        return
    for name in sorted(tensors.keys() | weight_map.keys()):
        if weight_map.get(name) != tensors.get(name):
            yield f"says {name} is in {weight_map.get(name)}; it is in {tensors.get(name)}"


def _extra_files(folder: Path, state: JournalState) -> list[str]:
    """Return the names of files and folders that no journal record names."""
    known = {shard.file for shard in state.shards} | set(state.auxiliary_files)
    known |= {JOURNAL_FILE, INDEX_FILE, *_ADDED_FILES}
    hidden = () if state.complete else (".scratch",)  # a finished run leaves no hidden states behind
    return sorted(
        p.name
        for p in folder.iterdir()
        if p.name not in known and p.name not in hidden and (p.name == ".scratch" or not p.name.startswith("."))
    )
