"""Check a compressed folder against its journal: digests, patterns, finite values, missing and extra files."""

import logging
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING

from streamslr.errors import InputError, StreamslrError, first_line
from streamslr.io.durable import PARTIAL_SUFFIX, file_sha256, is_as_written
from streamslr.io.folder import list_uncommitted, parse_index
from streamslr.io.packed_check import check_packed
from streamslr.io.packed_layout import (
    INDEX_FILE,
    NON_BLOCK_FILE,
    journal_misfit,
    packed_linears,
    read_quantization_config,
    stored_parts,
)
from streamslr.io.safetensors_file import WrittenShard
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import open_checkpoint
from streamslr.model.meta_model import build_on_meta
from streamslr.model.other_files import TOKENIZER_TEXTS
from streamslr.model.sources import CONFIG_FILE
from streamslr.outside import parse_loose_json, read_bounded
from streamslr.results.inspect import REPORT_FILE, read_run
from streamslr.run.journal import JOURNAL_FILE, BlockRecord, JournalState, LinearRecord
from streamslr.runtime.loader import pack_on_meta
from streamslr.spec.pattern import MIXED, SparsityPattern, parse_pattern
from streamslr.tensors import is_finite

log = logging.getLogger("streamslr")

_ADDED_FILES = ("LICENSE", REPORT_FILE)
_ADDED_SUFFIXES = (".md", ".html", ".png", ".jpg", ".svg", ".log", ".txt")
"""Files that people add to a folder before they publish it, and that no reader of models takes for a part of one."""


@dataclass(frozen=True)
class Verification:
    """Result of `verify`. What the folder holds is sound when there are no problems."""

    folder: str
    complete: bool
    """False where a run is not at its end, or was stopped before its last step; its line goes on."""
    files: int
    """Number of shards checked."""
    tensors: int
    """Number of tensors in them."""
    problems: tuple[tuple[str, str], ...]
    """Pairs of a file and a sentence about it, to be read as one: "config.json" "is missing"."""
    leftovers: tuple[str, ...]
    """Files of an unfinished run that are not committed; its line writes them anew, or removes them."""

    def in_words(self) -> list[str]:
        """Return the result in lines: the problems, then what was checked, then what is left of a run."""
        lines = [f"{file}: {problem}" for file, problem in self.problems]
        verdict = "no problems"
        if self.problems:
            verdict = (
                f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}; the `streamslr run` line that "
                f"made the folder makes damaged files anew (or copy them again); delete what is not part of the model"
            )
        lines.append(f"{self.folder}: {self.files} shards, {self.tensors} tensors, {verdict}")
        if not self.complete:
            rest = f"; it writes or removes {', '.join(self.leftovers[:3])}" if self.leftovers else ""
            more = f" and {len(self.leftovers) - 3} more" if len(self.leftovers) > 3 else ""
            lines.append(f"{self.folder}: unfinished, the same `streamslr run` line goes on{rest}{more}")
        return lines


def verify(folder: Path, step: Callable[[int, int], None] = lambda done, total: None) -> Verification:
    """Read every byte of a folder, finished or not, and check it against its journal, its format and its config.json.

    Of an unfinished run only what is committed counts.

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
    last: list[str] = []
    unread: list[str] = []
    for number, (shard, block) in enumerate(shards, 1):
        last, found = _check_shard(folder / shard.file, shard, block)
        problems += [(shard.file, problem) for problem in found]
        problems += [(shard.file, f"holds {name}, as does {tensors[name]}") for name in last if name in tensors]
        tensors |= dict.fromkeys(last, shard.file)
        unread += [] if last else [shard.file]
        step(number, len(shards))
    problems += _check_auxiliary_files(folder, state)
    problems += _check_quantization_config(folder / CONFIG_FILE, state)
    leftovers = _list_leftovers(folder, state)
    complete = state.complete and not leftovers
    if state.complete:
        wrong = list(_check_index(folder / INDEX_FILE, tensors, unread))
        before_last = {name: file for name, file in tensors.items() if name not in last}
        if wrong and not list(_check_index(folder / INDEX_FILE, before_last, unread)):
            complete = False  # killed after the commit of the last block, before the index had it
        else:
            problems += [(INDEX_FILE, problem) for problem in wrong]
    if state.non_block:  # earlier, config and tokenizer may lie there before the journal records them
        problems += [
            (name, "is not part of the model: no journal record names it") for name in _strangers(folder, state)
        ]
    if complete and not problems:
        problems += _check_model(folder, state)
    return Verification(str(folder), complete, len(shards), len(tensors), tuple(problems), leftovers)


def _check_shard(path: Path, shard: WrittenShard, block: BlockRecord | None) -> tuple[list[str], list[str]]:
    """Return the names of a shard's tensors, and its problems."""
    if not path.is_file():
        return [], ["is no regular file" if path.exists() else "is missing"]
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
    if misfit := journal_misfit(parts, linear.shape[1], linear.values, linear.low_rank_values):
        yield f"{linear.name} has {misfit}"
    yield from (f"{linear.name}: {problem}" for problem in check_packed(parts, pattern, linear.shape))
    o, d = linear.shape
    for part, shape in (("U", (o, linear.rank)), ("V", (linear.rank, d))):
        there = tuple(parts[part].shape) if part in parts else None
        if (linear.rank or there) and there != shape:
            yield f"{linear.name}.{part} has shape {there}, the journal says {shape}"


def _check_auxiliary_files(folder: Path, state: JournalState) -> Iterator[tuple[str, str]]:
    """Yield the problems of config, tokenizer and the like, each with the file's name."""
    if state.non_block and CONFIG_FILE not in state.auxiliary_files:
        yield CONFIG_FILE, "has no record in the journal"
    for name, digest in state.auxiliary_files.items():
        if not (folder / name).is_file():
            yield name, "is no regular file" if (folder / name).exists() else "is missing"
        elif not is_as_written(folder / name, digest):
            yield name, "has changed since the run wrote it"


def _check_index(path: Path, tensors: Mapping[str, str], unread: Container[str | None]) -> Iterator[str]:
    """Yield where the index differs from `tensors`, tensor name -> shard, but for those of shards in `unread`."""
    if not path.exists():
        yield "is missing"
        return
    try:
        weight_map = parse_index(read_bounded(path))
    except (InputError, ValueError) as error:
        yield f"cannot be read: {first_line(error)}"
        return
    for name in sorted(tensors.keys() | weight_map.keys()):
        said, found = weight_map.get(name), tensors.get(name)
        if said != found and not (found is None and said in unread):
            yield f"says {name} is in {said}; it is in {found}"


def _check_quantization_config(path: Path, state: JournalState) -> Iterator[tuple[str, str]]:
    """Yield where config.json says something else of the format than the journal."""
    if not state.non_block or not path.is_file():
        return
    try:
        found = read_quantization_config(parse_loose_json(read_bounded(path)))
    except (InputError, ValueError) as error:
        yield path.name, f"cannot be read: {first_line(error)}"
        return
    specs = list((state.allocation or {}).values())
    if found is None:
        yield path.name, "does not say that streamslr compressed the model"
    elif specs:
        patterns = {parse_pattern(spec["pattern"]) for spec in specs}
        pattern = patterns.pop() if len(patterns) == 1 else None
        rank = max(spec["rank"] for spec in specs)
        if (found.pattern, found.rank) != (pattern, rank):
            yield (
                path.name,
                f"says pattern {found.pattern or MIXED} and rank {found.rank}, the journal says {pattern or MIXED} and "
                f"{rank}",
            )


def _check_model(folder: Path, state: JournalState) -> Iterator[tuple[str, str]]:
    """Yield where the shards hold less than the model of config.json needs, or the journal describes another model."""
    try:
        checkpoint = open_checkpoint(str(folder))
    except InputError as error:
        kind = parse_loose_json(read_bounded(folder / CONFIG_FILE)).get("model_type")
        if isinstance(kind, str) and kind not in CONFIG_MAPPING:  # the folder may be sound
            log.warning("the folder is not checked for completeness: %s", error)
        else:
            yield CONFIG_FILE, f"and the shards cannot be opened: {error}"
        return
    try:
        blockwise = BlockwiseModel(checkpoint, torch.float32, torch.device("cpu"))
    except InputError as error:
        yield CONFIG_FILE, f"and the shards are not of one model: {error}"
        return
    recorded = [block.name for block in state.blocks]
    if recorded != list(blockwise.block_names):
        yield JOURNAL_FILE, f"records blocks {recorded[:2]}…, the model has {list(blockwise.block_names[:2])}…"
        return
    try:
        model = build_on_meta(checkpoint.config, torch.float32, checkpoint.tensors)
        files = [str(folder / shard.file) for shard in state.shards]
        pack_on_meta(model, files, checkpoint.config.quantization_config)
    except InputError as error:
        yield CONFIG_FILE, f"and the shards do not load: {str(error).partition('; ')[0]}"
        return
    for block, linears in zip(state.blocks, blockwise.linears, strict=True):
        for linear in block.linears:
            if linears.get(linear.name) != linear.shape:
                yield (
                    JOURNAL_FILE,
                    f"records {linear.name} of shape {linear.shape}, block {block.index} has no such one",
                )
        packed = {linear.name for linear in block.linears}
        for name in block.dense:
            if name not in linears or name in packed:
                yield JOURNAL_FILE, f"records {name} as dense, block {block.index} has no such one"
    places = {NON_BLOCK_FILE: blockwise.non_block_tensors}
    places |= {block.shard.file: blockwise.block_tensors[block.index] for block in state.blocks}
    for file, names in places.items():
        for name in names:
            if checkpoint.tensors[name].shard != file:
                yield checkpoint.tensors[name].shard, f"holds {name}, which belongs into {file}"


def _list_leftovers(folder: Path, state: JournalState) -> tuple[str, ...]:
    """Return the names of what an interrupted run left: partial files, hidden states, shards before their commit.

    In a complete folder a shard without a record is none of these: nothing will commit it.
    """
    left = [path.name for path in list_uncommitted(folder, state.shards)]
    if state.complete:
        left = [name for name in left if name.endswith(PARTIAL_SUFFIX)]
    if (folder / ".scratch").exists():
        left.append(".scratch")
    return tuple(sorted(left))


def _strangers(folder: Path, state: JournalState) -> list[str]:
    """Return the names of files and folders that no journal record names, and that may be taken for model files."""
    known = {JOURNAL_FILE, INDEX_FILE, *_ADDED_FILES, *state.auxiliary_files, *_list_leftovers(folder, state)}
    known |= {shard.file for shard in state.shards}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in known and not path.name.startswith(".") and not _is_added(path)
    )


def _is_added(path: Path) -> bool:
    """Tell if a file, or all that a folder holds, is what people add and no reader of models takes for a part."""
    if path.is_dir() and not path.is_symlink():
        return all(map(_is_added, path.iterdir()))
    return path.is_file() and path.name.endswith(_ADDED_SUFFIXES) and path.name not in TOKENIZER_TEXTS
