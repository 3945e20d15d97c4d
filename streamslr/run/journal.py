"""The journal: what is durably done, kept in the output folder as streamslr.json. A resume believes nothing else."""

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from streamslr.errors import InputError, ResumeError, StreamslrError
from streamslr.io.durable import PARTIAL_SUFFIX, file_sha256, lock_folder, write_json
from streamslr.io.folder import is_file_name
from streamslr.io.packed_layout import FORMAT_VERSION, READABLE_VERSIONS
from streamslr.io.safetensors_file import WrittenShard
from streamslr.version import __version__

JOURNAL_FILE = "streamslr.json"

log = logging.getLogger("streamslr")


@dataclass(frozen=True)
class LinearRecord:
    """One linear W [o, d] that became S + U·V. Errors are tr(R H Rᵀ) / tr(W H Wᵀ), R as stored, H damped."""

    name: str
    shape: tuple[int, int]
    pattern: str
    density: float  # of S, counted
    rank: int
    wanda_error: float  # of pruning alone, by |W_ij|·‖X_j‖ without U·V (Wanda): the yardstick
    error: float
    iterations: int
    damping: float
    nbytes: int  # of values, meta, U and V together
    dense_nbytes: int
    warnings: tuple[str, ...] = ()
    rows: int | None = None  # calibration tokens that reached it; None in folders of versions that did not count them


@dataclass(frozen=True)
class MatchRecord:
    """Matching of one block. Losses are ‖f̂(X) − T‖² / ‖T‖², f̂(X) the block's output and T its targets.

    None in place of a loss: it was not finite, which JSON cannot say.
    """

    loss_before: float
    loss_after: float | None  # with the block rounded as it is stored
    applied: bool  # False: the loss did not fall, and the block was stored as solved
    curve: tuple[float | None, ...]  # mean loss of each epoch while the block moves; the first is before any step


@dataclass(frozen=True)
class BlockRecord:
    """One finished block.

    `measured` holds seconds and peak memory of each phase, beside what was planned and the budgets
    (PhaseTimer.take). It is all that differs between two runs of one line.
    """

    index: int
    name: str
    shard: WrittenShard
    hidden_states: str  # digest of the hidden states that leave this block
    linears: tuple[LinearRecord, ...]  # as solved, before matching
    targets: str | None = None  # digest of the block's targets, which the next block's start from
    matching: MatchRecord | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FinetuneRecord:
    """One training of U and V. Losses are means in nats per token over the held-out windows, U and V as stored."""

    data: str  # name of the text, for people
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

    fingerprint: Mapping[str, Any]  # must be equal for a resume
    calibration: str  # name of the text, for people; the digest of its tokens is in the fingerprint
    blocks_total: int
    micro_batch: (
        int  # windows that pass together; smaller once memory ran out, as solver_workspace. Both decide last bits
    )
    solver_workspace: int | None = None  # bytes that one solve may take; None: as many as it likes
    bos: bool | None = None  # each window begins with BOS; None in folders of versions that had no choice
    auxiliary_files: Mapping[str, str] = field(default_factory=dict)  # config, tokenizer, licence …: file -> sha256
    non_block: WrittenShard | None = None
    hidden_states: str | None = None  # digest of boundary 0
    blocks: tuple[BlockRecord, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)  # as a block's, of the phases before block 0
    model: str = ""  # name of the model, for people; its identity is in the fingerprint
    made_with: Mapping[str, str] = field(default_factory=dict)  # `made_with` at the first start
    allocation: Mapping[str, Any] | None = None  # of spec.allocation.as_json; None before OWL's survey
    outliers: tuple[float, ...] | None = None  # fraction of outliers in each block, once OWL's survey is done
    finetuned: tuple[FinetuneRecord, ...] = ()  # oldest first; a run does not go on in a fine-tuned folder
    format_version: int = FORMAT_VERSION

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


def read_journal(folder: Path) -> JournalState | None:
    """Return the journal of an output folder, finished or not; None where there is none.

    Raises:
        InputError: The journal cannot be read, is damaged, or is of a version that this one does not read.
    """
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
        state = _state(data if version == FORMAT_VERSION else _from_version_2(data))
        names = (*state.auxiliary_files, *(shard.file for shard in state.shards))
        if wrong := [name for name in names if not is_file_name(name)]:
            raise ValueError(f"{wrong[0]!r} is no file name")
        return state
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error!r}; copy it again from where the folder came from") from error


def _state(data: dict[str, Any]) -> JournalState:
    """Turn back what asdict() made of a JournalState."""
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
    """The journal of a running run: it locks the output folder while open, and is durable after every commit."""

    def __init__(self, folder: Path, start: JournalState):
        """Begin with `start` in `folder`, or go on with the run of the same fingerprint that is there.

        Raises:
            ResumeError: Another process holds the folder, or the folder holds another run (each setting that differs
                is named, with both values) or files that are not a run's.
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
        """Commit OWL's survey: the fraction of outliers of each block, and the allocation that follows from it."""
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
        """Commit all before block 0: the auxiliary files and the non-block shard are written, boundary 0 is sealed.

        hidden_states: digest of boundary 0. micro_batch: as for commit_block.
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

    def commit_block(self, record: BlockRecord, micro_batch: int, solver_workspace: int | None) -> None:
        """Commit a block whose shard and boundary are written: from here on a resume starts behind it.

        micro_batch, solver_workspace: for the next block; smaller than before if memory ran out in this one.
        """
        if record.index != len(self.state.blocks):
            raise ValueError(f"block {record.index} committed after {len(self.state.blocks)} blocks")
        blocks = (*self.state.blocks, record)
        self._commit(replace(self.state, blocks=blocks, micro_batch=micro_batch, solver_workspace=solver_workspace))

    def forget_lost_shards(self) -> None:
        """Go back to before the first shard that is missing or not as it was written, with a warning.

        It reads every committed shard, because later blocks are built on what these hold.
        """
        for position, shard in enumerate(self.state.shards):
            if self._is_sound(shard):
                continue
            path = self.folder / shard.file
            log.warning("%s is missing or not as it was written: going on from there", path)
            if position == 0:
                self._commit(replace(self.state, non_block=None, hidden_states=None, blocks=()))
            else:
                self._commit(replace(self.state, blocks=self.state.blocks[: position - 1]))
            return

    def require_sound_shards(self) -> None:
        """Raise StreamslrError where a committed shard is missing or not as it was written.

        The journal keeps its record, so that the next start makes the shard again.
        """
        if lost := [shard.file for shard in self.state.shards if not self._is_sound(shard)]:
            raise StreamslrError(
                f"{self.folder / lost[0]} is missing or not as it was written ({len(lost)} of "
                f"{len(self.state.shards)} shards): something else changed it while the run worked, or the disk is "
                f"damaged; start the same line again, which makes it anew"
            )

    def _is_sound(self, shard: WrittenShard) -> bool:
        path = self.folder / shard.file
        return path.is_file() and path.stat().st_size == shard.nbytes and file_sha256(path) == shard.sha256

    def _commit(self, state: JournalState) -> None:
        write_json(self.folder / JOURNAL_FILE, asdict(state))
        self.state = state

    def _refuse_foreign_files(self) -> None:
        unfinished = JOURNAL_FILE + PARTIAL_SUFFIX
        logs = {
            Path(handler.baseFilename).resolve() for handler in log.handlers if isinstance(handler, logging.FileHandler)
        }
        foreign = sorted(
            p.name
            for p in self.folder.iterdir()
            if not p.name.startswith(".") and p.name != unfinished and p.resolve() not in logs
        )
        if foreign:
            raise ResumeError(
                f"{self.folder} holds files but no {JOURNAL_FILE} ({', '.join(foreign[:5])}"
                f"{', …' if len(foreign) > 5 else ''}); give an empty or new folder as --out"
            )


def refuse_changed_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ResumeError where settings of the run in `folder` differ, naming each with both values."""
    changed = [
        f"{name}: {before.get(name)!r} there, {value!r} now" for name, value in now.items() if before.get(name) != value
    ]
    if changed:
        raise ResumeError(
            f"{folder} belongs to a run with other settings ({'; '.join(changed)}). "
            "Start with the same settings to go on, or give another --out"
        )


def made_with(device: torch.device) -> dict[str, str]:
    """Return the machine's device and threads, and the versions of the software, for the journal."""
    return {
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
