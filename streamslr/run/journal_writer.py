"""The journal of a run that works: it holds the output folder, and is durable after every commit."""

import logging
import platform
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from streamslr.errors import InputError, ResumeError, StreamslrError
from streamslr.gpu import GpuMemory
from streamslr.io.durable import PARTIAL_SUFFIX, is_as_written, lock_folder
from streamslr.io.safetensors_file import WrittenShard
from streamslr.model.checkpoint import Checkpoint
from streamslr.model.pinned_shards import PinnedShards, ShardDigest, Times
from streamslr.ranks import ALONE, Ranks
from streamslr.run.journal import (
    JOURNAL_FILE,
    BlockRecord,
    JournalState,
    Phases,
    Quality,
    Retries,
    Sample,
    read_journal,
    write_journal,
)
from streamslr.solvers.threebasil_fused import describe
from streamslr.spec.allocation import SpecEntry

log = logging.getLogger("streamslr")


class Journal:
    """The journal of a run that works: it locks the output folder while open, and is durable after every commit.

    A commit first holds the dense model's shards against what the run read of them (`pin`). Where there are ranks, rank
    0 alone holds the folder, checks and writes; all ranks call the same functions and get its state.
    """

    def __init__(self, folder: Path, start: JournalState, ranks: Ranks = ALONE):
        """Begin with `start` in `folder`, or go on with the run of the same fingerprint that is there.

        Raises:
            ResumeError: Another process holds the folder, or the folder holds another run (each setting that differs
                is named, with both values) or files that are not a run's.
        """
        self.folder, self._ranks = folder, ranks
        self._dense: PinnedShards | None = None
        self._held = ExitStack()  # the folder
        self.state: JournalState = ranks.on_first(partial(self._open, start))

    def _open(self, start: JournalState) -> JournalState:
        """Lock the folder; return the state of the run there, or `start` once it is written."""
        folder = self.folder
        with ExitStack() as opened:
            opened.enter_context(lock_folder(folder, "give another --out"))
            found = read_journal(folder)
            if found is None:
                self._refuse_foreign_files()
                # the first commit claims the folder: a file in it without a journal is never ours
                write_journal(folder, start)
            else:
                if found.finetuned:
                    raise ResumeError(
                        f"{folder} was fine-tuned, which a run cannot do again; give another --out, "
                        f"or make it again with `streamslr finetune`"
                    )
                refuse_changed_settings(folder, found.fingerprint, start.fingerprint)
                if found.blocks_total != start.blocks_total:
                    raise ResumeError(
                        f"{folder / JOURNAL_FILE} counts {found.blocks_total} blocks, the model has "
                        f"{start.blocks_total}; give another --out"
                    )
            self._held = opened.pop_all()
        return found or start

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._held.close()

    def pin(self, checkpoint: Checkpoint) -> None:
        """Hold the shards of the dense model to what this run read first, from here on at every commit.

        Raises:
            ResumeError: A shard has changed since an earlier start.
        """
        if self._ranks.local_rank == 0:  # the ranks of one machine read the same files
            self._dense = checkpoint.pin(self.state.dense_shards, self.state.dense_times)
        if self._ranks.on_first(self._has_new_times):
            # so that the next start need not read these shards again
            self._commit(self.state)

    def _has_new_times(self) -> bool:
        """Tell if the journal does not say yet when a shard was written."""
        known, dense = self.state.dense_times, self._dense
        return dense is not None and any(dense.times.get(shard) != known.get(shard) for shard in dense.digests)

    def commit_survey(
        self,
        outliers: Sequence[float],
        allocation: Mapping[str, SpecEntry],
        micro_batch: int,
        measured: Phases,
        retries: Retries | None = None,
    ) -> None:
        """Commit OWL's survey: the fraction of outliers of each block, and the allocation that follows from it."""
        self._commit(
            replace(
                self.state,
                outliers=tuple(outliers),
                allocation=allocation,
                micro_batch=micro_batch,
                measured=measured,
                retries=retries or {},
            )
        )

    def commit_non_block(
        self,
        auxiliary_files: Mapping[str, str],
        non_block: WrittenShard,
        hidden_states: str,
        sample: Sample,
        micro_batch: int,
        measured: Phases,
        retries: Retries | None = None,
    ) -> None:
        """Commit all before block 0: the auxiliary files and the non-block shard are written, boundary 0 is sealed.

        hidden_states, sample: of boundary 0. micro_batch: as for commit_block.
        """
        self._commit(
            replace(
                self.state,
                auxiliary_files=auxiliary_files,
                non_block=non_block,
                hidden_states=hidden_states,
                sample=sample,
                micro_batch=micro_batch,
                measured={**self.state.measured, **measured},  # after those of a survey
                retries={**self.state.retries, **(retries or {})},
            )
        )

    def commit_auxiliary_files(self, auxiliary_files: Mapping[str, str]) -> None:
        """Commit the auxiliary files, written anew."""
        self._commit(replace(self.state, auxiliary_files=auxiliary_files))

    def commit_block(self, record: BlockRecord, micro_batch: int, solver_workspace: int | None) -> None:
        """Commit a block whose shard and boundary are written: from here on a resume starts behind it.

        micro_batch, solver_workspace: for the next block; smaller than before if memory ran out in this one.
        """
        if record.index != len(self.state.blocks):
            raise ValueError(f"block {record.index} committed after {len(self.state.blocks)} blocks")
        blocks = (*self.state.blocks, record)
        self._commit(replace(self.state, blocks=blocks, micro_batch=micro_batch, solver_workspace=solver_workspace))

    def commit_quality(self, quality: Quality, measured: Phases, retries: Retries) -> None:
        """Commit how the finished folder compares with the dense model."""
        self._commit(
            replace(
                self.state,
                quality=quality,
                measured={**self.state.measured, **measured},
                retries={**self.state.retries, **retries},
            )
        )

    def forget_lost_shards(self) -> None:
        """Go back to before the first shard that is missing or not as it was written, with a warning.

        It reads every committed shard, because later blocks are built on what these hold.
        """
        lost = self._ranks.on_first(self._first_lost)
        if lost is None:
            return
        log.warning(
            "%s is missing or not as it was written: going on from there", self.folder / self.state.shards[lost].file
        )
        state = replace(self.state, quality=None)
        if lost == 0:
            self._commit(replace(state, non_block=None, hidden_states=None, sample=None, blocks=()))
        else:
            self._commit(replace(state, blocks=state.blocks[: lost - 1]))

    def _first_lost(self) -> int | None:
        """Return the place of the first committed shard that is missing or not as it was written."""
        return next((place for place, shard in enumerate(self.state.shards) if not self._is_sound(shard)), None)

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
        return path.is_file() and path.stat().st_size == shard.nbytes and is_as_written(path, shard.sha256)

    def _commit(self, state: JournalState) -> None:
        if self._dense:
            self._dense.check()
        self._require_same_weights(self._ranks.gather(dict(self._dense.digests) if self._dense else {}))
        digests, times = self._ranks.on_first(partial(self._write, state))
        self.state = replace(state, dense_shards=digests, dense_times=times)

    @staticmethod
    def _require_same_weights(digests: Sequence[Mapping[str, ShardDigest]]) -> None:
        """Raise InputError where a machine has read other shards of these names than rank 0's."""
        first, *others = digests
        for rank, found in enumerate(others, 1):
            if differing := sorted(shard for shard in found.keys() & first.keys() if found[shard] != first[shard]):
                raise InputError(
                    f"the machine of rank {rank} has another {differing[0]} than that of rank 0; give all ranks the "
                    "same model, and start anew in another --out"
                )

    def _write(self, state: JournalState) -> tuple[Mapping[str, ShardDigest], Mapping[str, Times]]:
        """Write the state; return what it says of the dense model's shards, all that only rank 0 knows."""
        if self._dense:
            state = replace(state, dense_shards=dict(self._dense.digests), dense_times=dict(self._dense.times))
        write_journal(self.folder, state)
        return state.dense_shards, state.dense_times

    def _refuse_foreign_files(self) -> None:
        unfinished = JOURNAL_FILE + PARTIAL_SUFFIX
        logs = {
            Path(handler.baseFilename).resolve() for handler in log.handlers if isinstance(handler, logging.FileHandler)
        }
        foreign = sorted(
            p.name
            for p in self.folder.iterdir()
            if not (p.name.startswith(".") or p.name == unfinished or _is_or_holds(p.resolve(), logs))
        )
        if foreign:
            raise ResumeError(
                f"{self.folder} holds files but no {JOURNAL_FILE} ({', '.join(foreign[:5])}"
                f"{', …' if len(foreign) > 5 else ''}); give an empty or new folder as --out"
            )


def _is_or_holds(path: Path, files: Collection[Path]) -> bool:
    """Tell if a path is one of the files, or a folder that holds nothing else."""
    if path.is_dir() and not path.is_symlink():
        return all(_is_or_holds(inside, files) for inside in path.iterdir())
    return path in files


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


def made_with(
    device: torch.device, gpu: GpuMemory | None, stream_dtype: torch.dtype, ranks: Ranks = ALONE
) -> dict[str, str]:
    """Return the machine's device and threads, and the versions of the software, for the journal.

    Args:
        device: Where the run computes.
        gpu: Its memory, if it is a GPU.
        stream_dtype: Dtype of the residual stream inside blocks.
        ranks: The processes that share the work.
    """
    of_gpu = {}
    if gpu:
        of_gpu = {**gpu.made_with(), "residual stream": str(stream_dtype).removeprefix("torch.")}
        of_gpu |= {f"3basil's step at {pattern}": how for pattern, how in describe(device).items()}
    return {
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": str(torch.get_num_threads()),
        "ranks": str(ranks.world),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        **of_gpu,
    }
