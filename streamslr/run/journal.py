"""The journal: what is durably done, kept in the output folder as streamslr.json. A resume believes nothing else.

The records here check themselves, so that whatever was read from a file can be computed with. `journal_writer.py` has
the journal of a run that works.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from streamslr.config import RunConfig
from streamslr.errors import InputError, first_line
from streamslr.io.durable import write_json
from streamslr.io.folder import is_file_name
from streamslr.io.packed_layout import (
    BLOCK_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    NON_BLOCK_FILE,
    READABLE_VERSIONS,
    low_rank_bytes,
    without_numbers,
)
from streamslr.io.safetensors_file import WrittenShard
from streamslr.model.other_files import is_auxiliary
from streamslr.model.pinned_shards import ShardDigest, Times
from streamslr.outside import parse_json, read_bounded
from streamslr.spec.allocation import SpecEntry
from streamslr.spec.pattern import parse_pattern
from streamslr.spec.values import STORED, parse_low_rank_values, parse_values
from streamslr.version import __version__

JOURNAL_FILE = "streamslr.json"

_SIZE_LIMIT = 1 << 30
"""Bytes of the largest journal that is read; one of 45,000 linears (DeepSeek-V3) has about 35 MB."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Number = Annotated[float, msgspec.Meta(ge=-1e100, le=1e100)]  # sums of these are finite too
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Cosine = Annotated[float, msgspec.Meta(ge=-1, le=1)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]

Sample = tuple[tuple[Number | None, ...], ...]
"""Values of a boundary at fixed places: of the hidden states and, where blocks are matched, of the targets. None in
place of a value that is not finite."""

Phases = Mapping[str, Mapping[str, Count | Annotated[float, msgspec.Meta(ge=0, le=1e100)]]]
"""Name of each phase -> its `seconds` and peak bytes, beside the planned bytes and the budgets."""

Retries = Mapping[str, tuple[str, ...]]
"""Name of a phase -> what was cut or allowed when it was tried again, in words: memory had run out, or the model has an
operator without a deterministic form."""


@dataclass(frozen=True)
class LinearRecord:
    """One linear W [o, d] that became S + U·V. Errors are tr(R H Rᵀ) / tr(W H Wᵀ), H damped.

    R is W minus S + U·V as stored; where S comes onto its grid once the block is matched, minus S + U·V before that.
    """

    name: str
    shape: tuple[Positive, Positive]
    pattern: str
    density: Fraction  # of S, counted
    rank: Count
    wanda_error: Number  # of pruning alone, by |W_ij|·‖X_j‖ without U·V (Wanda): the yardstick
    error: Number
    iterations: Count
    damping: Number
    nbytes: Positive  # of values, meta, U and V together
    dense_nbytes: Positive
    warnings: tuple[str, ...] = ()
    rows: Count | None = None  # calibration tokens that reached it; None in folders of versions that did not count them
    values: str = STORED  # of S: its format
    low_rank_values: str = STORED  # the same of U and V
    unrounded_error: Number | None = None  # before S came onto its grid as it was solved; None where it did not
    rounding_error: Number | None = None  # of S + U·V on the grid, against that as matched; None where it came not so

    def __post_init__(self) -> None:
        weights = prod(self.shape)
        _check_values(self.values, self.low_rank_values)
        _check_pattern(self.pattern, self.name, self.shape)
        if self.dense_nbytes % weights or self.dense_nbytes // weights not in (1, 2, 4, 8):
            raise ValueError(f"dense_nbytes is {self.dense_nbytes}, for a weight of shape {list(self.shape)}")
        low_rank = parse_low_rank_values(self.low_rank_values)
        if low_rank_bytes(self.shape, self.rank, self.dense_nbytes // weights, low_rank) >= self.nbytes:
            raise ValueError(f"nbytes is {self.nbytes}, for shape {list(self.shape)} at rank {self.rank}")


@dataclass(frozen=True)
class MatchRecord:
    """Matching of one block. Losses are means over tokens of ‖f̂(x) − t‖² / ‖t‖², t the target.

    None in place of a loss: it was not finite, which JSON cannot say.
    """

    loss_before: Number
    loss_after: Number | None  # with the block rounded as it is stored
    applied: bool  # False: the loss, here or on held-out windows, did not fall, and the block was stored as solved
    curve: tuple[Number | None, ...]  # mean loss of each epoch; the first is before any step, and 0 is the only one
    held_out: tuple[Number | None, ...] = ()  # loss on the held-out windows after each epoch, the first before any step

    def __post_init__(self) -> None:
        if self.applied and self.loss_after is None:
            raise ValueError("matching is applied, but loss_after is null")


@dataclass(frozen=True)
class BlockCheck:
    """Check windows behind one block, passed through the dense blocks and through the compressed ones."""

    cosine: Cosine | None  # between their hidden states, mean over tokens; None where it is not finite
    dense: Sha256  # digest of the dense model's hidden states
    compressed: Sha256  # of the compressed model's


@dataclass(frozen=True)
class BlockRecord:
    """One finished block. `measured` and `seconds_by_rank` are all that differs between two runs of one line."""

    index: Count
    name: str
    shard: WrittenShard
    hidden_states: Sha256  # digest of the hidden states that leave this block
    linears: tuple[LinearRecord, ...]  # as solved, before matching; what is stored of them is as at the end
    targets: Sha256 | None = None  # digest of the block's targets, which the next block's start from
    matching: MatchRecord | None = None
    measured: Phases = field(default_factory=dict)
    sample: Sample | None = None  # of the boundary behind the block; None in folders of versions that took none
    dense: Mapping[str, str] = field(default_factory=dict)  # linears that had to stay dense -> why
    retries: Retries = field(default_factory=dict)
    seconds_by_rank: Mapping[str, tuple[Number, ...]] = field(default_factory=dict)  # phase -> work of each; no waiting
    check: BlockCheck | None = None  # None of a run without check windows
    matching_off_grid: MatchRecord | None = None  # the matching before S came onto its grid; None where it did not so

    def __post_init__(self) -> None:
        _check_shard(self.shard, BLOCK_FILE.format(self.index))
        if not self.linears:
            raise ValueError("linears is empty")
        _check_phases(self.measured)
        if len({len(seconds) for seconds in self.seconds_by_rank.values()}) > 1:
            raise ValueError("seconds_by_rank counts another number of ranks in each phase")

    @property
    def whole_matching(self) -> MatchRecord | None:
        """The matching of the block, before and after S came onto its grid as if it were one; None without any."""
        first, last = self.matching_off_grid, self.matching
        if first is None or last is None or not first.loss_before:  # dense, with nothing to make up for
            return last
        return MatchRecord(
            first.loss_before,
            last.loss_after if last.applied else last.loss_before,
            first.applied or last.applied,
            first.curve + last.curve,
            first.held_out + last.held_out,
        )

    @property
    def seconds_of_ranks(self) -> tuple[float, ...]:
        """Seconds that each rank worked on the block, waiting left out; none of a run by one process."""
        return tuple(float(sum(phases)) for phases in zip(*self.seconds_by_rank.values(), strict=True))


@dataclass(frozen=True)
class FinetuneRecord:
    """One training of U and V. Losses are means in nats per token over the held-out windows, U and V as stored."""

    data: str  # name of the text, for people
    tokens: Sha256  # of all its windows, trained on and held out
    windows: Count  # trained on
    held_out: Count  # the last ones of the text
    seq_len: Positive
    batch: Positive
    steps: Positive
    lr: float
    seed: int
    loss_before: Number
    loss_after: Number


@dataclass(frozen=True)
class CheckWindows:
    """Windows that a run is checked on. They decide no byte of a shard."""

    windows: Positive
    tokens: Sha256  # of all of them
    overlapping: Count  # so many share text with calibration windows or each other, because the text is too short


@dataclass(frozen=True)
class Quality:
    """Predictions of the compressed model beside those of the dense one, on the same windows.

    None in place of a figure: it is not finite, or a perplexity is above 1e100.
    """

    windows: Positive
    tokens: Positive  # predicted: all of a window but its first
    perplexity_dense: Number | None
    perplexity: Number | None  # of the compressed model
    kl: Number | None  # KL(dense ‖ compressed) of the distributions of the next token, in nats, mean over tokens
    top1_agreement: Fraction  # of the tokens for which both models rank the same next token first
    verdict: Literal["good", "suspect"]
    reason: str = ""  # of "suspect"


@dataclass(frozen=True)
class JournalState:
    """The content of streamslr.json."""

    fingerprint: Mapping[str, Any]  # must be equal for a resume
    calibration: str  # name of the text, for people; the digest of its tokens is in the fingerprint
    blocks_total: Positive
    # Windows that pass together; smaller once memory ran out, as solver_workspace. Both decide last bits.
    micro_batch: Positive
    solver_workspace: Count | None = None  # bytes that one solve may take; None: as many as it likes
    bos: bool | None = None  # each window begins with BOS; None in folders of versions that had no choice
    auxiliary_files: Mapping[str, Sha256] = field(default_factory=dict)  # config, tokenizer, licence …
    non_block: WrittenShard | None = None
    hidden_states: Sha256 | None = None  # digest of boundary 0
    sample: Sample | None = None  # of boundary 0, as a block's
    blocks: tuple[BlockRecord, ...] = ()
    measured: Phases = field(default_factory=dict)  # as a block's, of the phases before block 0, and of the last check
    retries: Retries = field(default_factory=dict)  # the same
    model: str = ""  # name of the model, for people; its identity is in the fingerprint
    made_with: Mapping[str, str] = field(default_factory=dict)  # `made_with` at the first start
    allocation: Mapping[str, SpecEntry] | None = None  # of spec.allocation.as_json; None before OWL's survey
    unread: tuple[str, ...] = ()  # parts that the model does not run, kept as they are, with their numbers of tensors
    outliers: tuple[Fraction, ...] | None = None  # fraction of outliers in each block, once OWL's survey is done
    finetuned: tuple[FinetuneRecord, ...] = ()  # oldest first; a run does not go on in a fine-tuned folder
    dense_shards: Mapping[str, ShardDigest] = field(default_factory=dict)  # of the model, once they were read
    dense_times: Mapping[str, Times] = field(default_factory=dict)  # when its files were written and changed, in ns
    check: CheckWindows | None = None  # None: the run has none
    quality: Quality | None = None  # of the finished folder, on its check windows
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check_settings(self.fingerprint)
        _check_phases(self.measured)
        for name in (*self.auxiliary_files, *self.dense_shards):
            _check_file_name(name)
        for name in self.auxiliary_files:
            # streamslr 0.2.0 copied more .json files than today
            if name in (JOURNAL_FILE, INDEX_FILE) or not (is_auxiliary(name) or name.endswith(".json")):
                raise ValueError(f"auxiliary_files names {name!r}, which is no auxiliary file")
        if self.non_block:
            _check_shard(self.non_block, NON_BLOCK_FILE)
            if self.hidden_states is None:
                raise ValueError("non_block is there without hidden_states")
        elif self.blocks:
            raise ValueError("there are blocks without non_block")
        if (found := [block.index for block in self.blocks]) != list(range(len(self.blocks))):
            wrong = next(place for place, index in enumerate(found) if place != index)
            raise ValueError(f"blocks[{wrong}] has index {found[wrong]}")
        if len(self.blocks) > self.blocks_total:
            raise ValueError(f"there are {len(self.blocks)} blocks, blocks_total is {self.blocks_total}")
        for name, entry in (self.allocation or {}).items():
            _check_pattern(entry["pattern"], name)
            _check_values(entry.get("values", STORED), entry.get("low_rank_values", STORED))

    @property
    def complete(self) -> bool:
        return self.non_block is not None and len(self.blocks) == self.blocks_total

    def require_complete(self, folder: Path) -> None:
        """Raise InputError where this is the journal of an unfinished run, in `folder`."""
        if not self.complete:
            raise InputError(
                f"{folder} is unfinished: {len(self.blocks)} of {self.blocks_total} blocks are done; "
                f"the `streamslr run` line that began it goes on"
            )

    @property
    def shards(self) -> tuple[WrittenShard, ...]:
        """Committed shards, in the model's order."""
        return (*((self.non_block,) if self.non_block else ()), *(block.shard for block in self.blocks))

    @property
    def digests(self) -> dict[str, str]:
        """Digest of each file that the journal records: the auxiliary files, then the shards."""
        return dict(self.auxiliary_files) | {shard.file: shard.sha256 for shard in self.shards}


def in_kinds(blocks: Iterable[Mapping[str, str]]) -> tuple[str, ...]:
    """Return the linears of each block that stay dense, and why, in words: those at the same place together."""
    kinds = Counter((without_numbers(name), why) for dense in blocks for name, why in dense.items())
    return tuple(f"{kind} ({count} linears): {why}" for (kind, why), count in kinds.items())


def read_journal(folder: Path) -> JournalState | None:
    """Return the journal of an output folder, finished or not; None where there is none.

    Raises:
        InputError: The journal cannot be read, is damaged or was changed, or is of a version that this one does not
            read.
    """
    path = folder / JOURNAL_FILE
    try:
        if not path.exists():
            return None
        data = parse_json(read_bounded(path, _SIZE_LIMIT), dict[str, Any])
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}; {_ADVICE}") from error
    version = data.get("format_version")
    if version not in READABLE_VERSIONS:
        raise InputError(
            f"{path} has format_version {version!r:.80}; streamslr {__version__} reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}. Use the version of streamslr that wrote it"
        )
    try:
        claimed, found = data.pop("sha256", None), _digest(data)
        data = (_from_version_2(data) if version == 2 else data) | {"format_version": FORMAT_VERSION}
        state = msgspec.convert(data, JournalState)
        if unknown := next(_unknown_fields(data, state), None):
            raise ValueError(f"{unknown} is no field of version {version}")
    except KeyError as error:
        raise InputError(f"{path} is damaged: it lacks {error}; {_ADVICE}") from error
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}; {_ADVICE}") from error
    if claimed not in (None, found):  # streamslr 0.2.0 wrote none
        raise InputError(
            f"{path} was changed after it was written: its content has sha256 {found[:12]}…, it says "
            f"{str(claimed)[:12]!r}…; {_ADVICE}"
        )
    return state


def write_journal(folder: Path, state: JournalState) -> None:
    """Write the journal durably, with the digest of its content."""
    data = asdict(state)
    write_json(folder / JOURNAL_FILE, data | {"sha256": _digest(data)})


_ADVICE = "copy it again from where the folder came from, or make the folder anew"


def _digest(data: Mapping[str, Any]) -> str:
    """Return the sha256 of a journal's content."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _unknown_fields(data: Any, made: Any, path: str = "") -> Iterator[str]:
    """Yield the path of each value in `data` that the record made of it does not have: msgspec leaves those out."""
    if is_dataclass(made):
        names = {f.name for f in fields(made)}
        for name, value in data.items():
            if name not in names:
                yield f"{path}{name[:80]!r}"
            else:
                yield from _unknown_fields(value, getattr(made, name), f"{path}{name}.")
    elif isinstance(made, tuple):
        for place, (value, record) in enumerate(zip(data, made, strict=True)):
            yield from _unknown_fields(value, record, f"{path}{place}.")


def _from_version_2(data: dict[str, Any]) -> dict[str, Any]:
    """Give the names of version 2 (streamslr 0.1) their present form; nothing else differs."""

    def rename(entry: dict[str, Any], **names: str) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in entry.items()}

    def block(entry: dict[str, Any]) -> dict[str, Any]:
        linears = [rename(linear, error_before="wanda_error", error_after="error") for linear in entry["layers"]]
        matching = entry.get("matching")
        return rename(entry, layers="linears") | {
            "linears": linears,
            "matching": matching and rename(matching, kept="applied"),
        }

    return rename(data, description="auxiliary_files", outside="non_block", solver_room="solver_workspace") | {
        "blocks": [block(entry) for entry in data["blocks"]],
        "measured": rename(data.get("measured", {}), outside="non_block"),
    }


# Checks of records


_SETTING_TYPES = {f.name: get_type_hints(RunConfig)[f.name] for f in fields(RunConfig) if f.metadata.get("fixed")}


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a setting of the fingerprint has a type that its option cannot have, or is missing."""
    for name, value in settings.items():
        try:
            msgspec.convert(value, _SETTING_TYPES.get(name, bool | int | float | str | None))
        except msgspec.ValidationError as error:
            raise ValueError(f"fingerprint: {name[:80]}: {error}") from error
    needed = ["method", "pattern", "rank"]
    needed += ["compression"] if not settings.get("pattern") else []
    of_matching = ["match_epochs", "match_batch", "match_lr", "match_recover"] if settings.get("match") else []
    missing = [name for name in needed if name not in settings]
    if missing := missing + [name for name in of_matching if settings.get(name) is None]:
        raise ValueError(f"fingerprint lacks {missing[0]}")


def _check_phases(measured: Phases) -> None:
    if without := [phase for phase, record in measured.items() if "seconds" not in record]:
        raise ValueError(f"measured of {without[0][:80]!r} lacks seconds")


def _check_shard(shard: WrittenShard, file: str) -> None:
    _check_file_name(shard.file)
    if shard.file != file:
        raise ValueError(f"its shard is {shard.file!r}, not {file}")
    msgspec.convert((shard.sha256, shard.nbytes), tuple[Sha256, Count])


def _check_file_name(name: str) -> None:
    if not is_file_name(name):
        raise ValueError(f"{name[:80]!r} is no file name")


def _check_values(values: str, low_rank: str) -> None:
    try:
        parse_values(values)
        parse_low_rank_values(low_rank)
    except InputError as error:
        raise ValueError(str(error)) from error


def _check_pattern(pattern: str, linear: str, shape: tuple[int, int] | None = None) -> None:
    try:
        parsed = parse_pattern(pattern)
        if shape:
            parsed.require_fits(linear, shape)
    except InputError as error:
        raise ValueError(str(error)) from error
