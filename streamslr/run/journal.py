"""What is durably done: the one truth that resume believes, kept in the output folder as streamslr.json."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from streamslr.errors import InputError, ResumeError
from streamslr.io.durable import PARTIAL_SUFFIX, lock_folder, write_json
from streamslr.io.packed_layout import FORMAT_VERSION, READABLE_VERSIONS
from streamslr.io.safetensors_file import WrittenShard
from streamslr.version import __version__

JOURNAL_FILE = "streamslr.json"

log = logging.getLogger("streamslr")


@dataclass(frozen=True)
class LinearRecord:
    """How one linear W [o, d] became S + U·V. Errors are tr(R H Rᵀ) / tr(W H Wᵀ), R as stored, H damped."""

    name: str
    shape: tuple[int, int]
    pattern: str
    density: float  # of S, counted
    rank: int
    wanda_error: float  # plain pruning: the solver's first projection, without U·V (Wanda's)
    error: float
    iterations: int
    damping: float
    nbytes: int  # of values, meta, U and V together
    dense_nbytes: int
    warnings: tuple[str, ...] = ()
    rows: int | None = None  # calibration tokens that reached it; None in folders made before they were counted


@dataclass(frozen=True)
class MatchRecord:
    """What matching did to a block. Losses: ‖f̂(X) − T‖² / ‖T‖² of what leaves the block, rounded as it is stored."""

    loss_before: float
    loss_after: float | None  # None, here and in the curve: not finite
    applied: bool  # False: the loss did not fall, so the block is as it was before
    curve: tuple[float | None, ...]  # mean loss of each epoch, the block moving; the first is before any step


@dataclass(frozen=True)
class BlockRecord:
    """One finished block. `measured` is all that differs between two runs of one line: of each phase its seconds and
    peak memory, and beside these what was planned and what the budget was (progress.py).
    """

    index: int
    name: str
    shard: WrittenShard
    hidden_states: str  # digest of the boundary that leaves this block
    linears: tuple[LinearRecord, ...]  # as solved, before matching
    targets: str | None = None  # digest of what should have left it, which the next block goes on from
    matching: MatchRecord | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FinetuneRecord:
    """One training of U and V. Losses: mean nats a token of the windows held out of the data, U and V as stored."""

    data: str  # what a person would call the text
    tokens: str  # sha256 of all its windows, trained on and held out
    windows: int  # trained on
    held_out: int  # the last ones of the text
    seq_len: int
    batch: int
    steps: int
    lr: float
    seed: int
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class JournalState:
    """The content of streamslr.json."""

    fingerprint: Mapping[str, Any]  # what must be equal for a resume
    calibration: str  # what a person would call the text; its tokens are in the fingerprint
    blocks_total: int
    micro_batch: int  # windows that pass together
    solver_workspace: int | None = None  # bytes of one solve, where the budget is tight; both decide last bits
    auxiliary_files: Mapping[str, str] = field(default_factory=dict)  # config, tokenizer …: file -> sha256
    non_block: WrittenShard | None = None
    hidden_states: str | None = None  # digest of the boundary that enters block 0
    blocks: tuple[BlockRecord, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)  # of all before block 0, as a block's
    model: str = ""  # what a person would call it; its identity is in the fingerprint
    made_with: Mapping[str, str] = field(default_factory=dict)  # versions and machine, of the first start
    allocation: Mapping[str, Any] | None = None  # what each linear becomes (allocate.as_json); None before OWL's survey
    outliers: tuple[float, ...] | None = None  # of each block, where OWL's survey is done
    finetuned: tuple[FinetuneRecord, ...] = ()  # after the run, oldest first; a run does not go on in such a folder
    format_version: int = FORMAT_VERSION

    @property
    def complete(self) -> bool:
        return self.non_block is not None and len(self.blocks) == self.blocks_total

    def require_complete(self, folder: Path) -> None:
        """Raises InputError for the journal of an unfinished run in `folder`."""
        if not self.complete:
            raise InputError(
                f"{folder} is unfinished: {len(self.blocks)} of {self.blocks_total} blocks are done; "
                f"the `streamslr run` line that began it goes on"
            )

    @property
    def shards(self) -> tuple[WrittenShard, ...]:
        """Every committed shard, in the model's order."""
        return (*((self.non_block,) if self.non_block else ()), *(block.shard for block in self.blocks))


def read_journal(folder: Path) -> JournalState | None:
    """The journal of an output folder, finished or not; None when there is none. Raises InputError."""
    path = folder / JOURNAL_FILE
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version not in READABLE_VERSIONS:
        raise InputError(
            f"{path} has format_version {version!r}; streamslr {__version__} reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}. Use the version of streamslr that wrote it"
        )
    try:
        return _state(data if version == FORMAT_VERSION else _from_version_2(data))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r}; copy it again from where the folder came from") from error


def _state(data: dict[str, Any]) -> JournalState:
    """What asdict() made of a JournalState, turned back."""
    return JournalState(
        **data
        | {
            "outliers": tuple(data["outliers"]) if data.get("outliers") else None,
            "non_block": WrittenShard(**data["non_block"]) if data["non_block"] else None,
            "blocks": tuple(_block(block) for block in data["blocks"]),
            "finetuned": tuple(FinetuneRecord(**record) for record in data.get("finetuned", ())),
        }
    )


def _from_version_2(data: dict[str, Any]) -> dict[str, Any]:
    """Rename what version 2 (streamslr 0.1) called otherwise; nothing else differs."""

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
        "format_version": FORMAT_VERSION,
    }


def _block(data: dict[str, Any]) -> BlockRecord:
    linears = tuple(
        LinearRecord(**linear | {"shape": tuple(linear["shape"]), "warnings": tuple(linear["warnings"])})
        for linear in data["linears"]
    )
    matching = data.get("matching")
    if matching:
        matching = MatchRecord(**matching | {"curve": tuple(matching["curve"])})
    shard = WrittenShard(**data["shard"])
    return BlockRecord(**data | {"shard": shard, "linears": linears, "matching": matching})


class Journal:
    """The journal of the run that owns the output folder: locked while open, durable after every commit."""

    def __init__(self, folder: Path, start: JournalState):
        """Begin with `start` in `folder`, or go on with the run of the same fingerprint that is there.

        Raises ResumeError when another process holds the folder, when it holds another run (naming each
        setting that differs, with both values), or files that are no run's.
        """
        self.folder = folder
        self.state: JournalState
        with ExitStack() as opened:
            opened.enter_context(lock_folder(folder, "give another --out"))
            found = read_journal(folder)
            if found is None:
                self._refuse_foreign_files()
                # the first commit claims the folder: a file in it without a journal is never ours
                self._commit(start)
            else:
                if found.finetuned:
                    raise ResumeError(
                        f"{folder} was fine-tuned, which a run cannot do again; give another --out, "
                        f"or make it again with `streamslr finetune`"
                    )
                refuse_changed_settings(folder, found.fingerprint, start.fingerprint)
                self.state = found
            self._lock = opened.pop_all()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lock.close()

    def commit_survey(
        self, outliers: Sequence[float], allocation: Mapping[str, Any], micro_batch: int, measured: Mapping[str, Any]
    ) -> None:
        """OWL's survey is done: what each linear becomes is settled, whatever happens to the process."""
        self._commit(
            replace(
                self.state,
                outliers=tuple(outliers),
                allocation=allocation,
                micro_batch=micro_batch,
                measured=measured,
            )
        )

    def commit_non_block(
        self,
        auxiliary_files: Mapping[str, str],
        non_block: WrittenShard,
        hidden_states: str,
        micro_batch: int,
        measured: Mapping[str, Any],
    ) -> None:
        """Config, tokenizer and the tensors outside the blocks are written, and boundary 0 is sealed.

        micro_batch: as for commit_block.
        """
        self._commit(
            replace(
                self.state,
                auxiliary_files=auxiliary_files,
                non_block=non_block,
                hidden_states=hidden_states,
                micro_batch=micro_batch,
                measured={**self.state.measured, **measured},  # after those of a survey
            )
        )

    def commit_block(self, record: BlockRecord, micro_batch: int) -> None:
        """Shard and hidden states of the next block are done: from here on a resume starts behind it.

        micro_batch: what the next block starts with; smaller than before after an out-of-memory.
        """
        if record.index != len(self.state.blocks):
            raise ValueError(f"block {record.index} committed after {len(self.state.blocks)} blocks")
        self._commit(replace(self.state, blocks=(*self.state.blocks, record), micro_batch=micro_batch))

    def forget_lost_shards(self) -> None:
        """Goes back to before the first shard that is missing or has another size, saying so: it is made again."""
        for position, shard in enumerate(self.state.shards):
            path = self.folder / shard.file
            if path.is_file() and path.stat().st_size == shard.nbytes:
                continue
            log.warning("%s is missing or not as it was written: going on from there", path)
            if position == 0:
                self._commit(replace(self.state, non_block=None, hidden_states=None, blocks=()))
            else:
                self._commit(replace(self.state, blocks=self.state.blocks[: position - 1]))
            return

    def _commit(self, state: JournalState) -> None:
        write_json(self.folder / JOURNAL_FILE, asdict(state))
        self.state = state

    def _refuse_foreign_files(self) -> None:
        unfinished = JOURNAL_FILE + PARTIAL_SUFFIX
        foreign = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith(".") and p.name != unfinished)
        if foreign:
            raise ResumeError(
                f"{self.folder} holds files but no {JOURNAL_FILE} ({', '.join(foreign[:5])}"
                f"{', …' if len(foreign) > 5 else ''}); give an empty or new folder as --out"
            )


def refuse_changed_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ResumeError naming each setting of a run in `folder` that differs, with both values."""
    changed = [
        f"{name}: {before.get(name)!r} there, {value!r} now" for name, value in now.items() if before.get(name) != value
    ]
    if changed:
        raise ResumeError(
            f"{folder} belongs to a run with other settings ({'; '.join(changed)}). "
            "Start with the same settings to go on, or give another --out"
        )
