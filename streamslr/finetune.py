"""Train U, V and scales of a compressed folder on text, S packed, and write them back in the same format.

U·V is a low-rank adapter already, so no adapter of PEFT is added: a second one would have to be merged into it at a
higher rank to come back into this format. `streamslr export --to peft` gives U·V as a LoRA for training with PEFT.
"""

import hashlib
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from streamslr.calibration.tokens import text_windows, window_prefix
from streamslr.errors import InputError, ResumeError, StreamslrError
from streamslr.gpu import deterministic_libraries, pick_device, retry_in_any_order
from streamslr.io.durable import (
    PARTIAL_SUFFIX,
    DiskNeed,
    fsync_folder,
    lock_folder,
    require_disk_space,
    write_file,
    write_json,
)
from streamslr.io.folder import config_bytes, copy_auxiliary_file, require_as_written, write_index
from streamslr.io.packed_layout import low_rank_bytes
from streamslr.io.safetensors_file import TensorInfo, TensorSource, WrittenShard, shard_header, write_shard
from streamslr.memory import note_nothing
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import open_checkpoint
from streamslr.model.parameter_names import find_modules
from streamslr.outside import parse_json, read_bounded
from streamslr.parts_trainer import CHECKPOINTS, held_out_loss, make_trainer, train, training_arguments
from streamslr.results.inspect import read_run
from streamslr.results.verify import verify
from streamslr.run.journal import FinetuneRecord, JournalState, LinearRecord, read_journal, write_journal
from streamslr.runtime.loader import load, packed_modules
from streamslr.spec.pattern import MIXED
from streamslr.spec.values import INT8, STORED, grid_of, group_count, parse_values

_HELD_OUT_FRACTION, _MAX_HELD_OUT = 1 / 20, 64
"""Windows held out of training: a fraction of all, but at most so many, which is enough for a mean."""
_SETTINGS_FILE, _RESULT = "settings.json", "result"
"""Names in `out`.partial, beside Trainer's checkpoints."""
_CHECKPOINT_BYTES = 12
"""Bytes on disk per trained parameter: itself and Adam's two moments in float32."""

log = logging.getLogger("streamslr")


class _Training(TypedDict):
    """Settings that decide the result, and must be the same for a resume. Fields as in `FinetuneRecord`."""

    tokens: str
    seq_len: int
    steps: int
    batch: int
    lr: float
    seed: int


def finetune(
    folder: Path,
    data: Path,
    out: Path,
    *,
    seq_len: int = 2048,
    epochs: int = 1,
    steps: int | None = None,
    batch: int = 8,
    lr: float = 2e-3,
    seed: int = 0,
    bos: str = "auto",
    device: str | None = None,
) -> FinetuneRecord:
    """Train U [o, r], V [r, d] and scales of every linear in `folder` to predict `data`; write the folder `out`.

    They are trained in float32 and rounded to the dtype they had. On a GPU a bf16 folder computes in bf16, all else in
    float32. All work is in `out`.partial, which becomes `out` at the end; called again after an interruption, training
    continues from the last twentieth, and where it was finished, its record is returned. `out` has the values and codes
    of S that `folder` has, byte for byte.

    Args:
        folder: A finished compressed folder.
        data: .txt, .jsonl with a `text` field, or .gz of either. Its last windows are held out
            of training; the loss on them is measured before and after.
        out: New folder.
        seq_len: Tokens in a window.
        epochs: Passes over all windows.
        steps: Steps of `batch` windows each, in place of `epochs`.
        batch: Windows in a step.
        lr: Learning rate of an entry of U or V, relative to the root mean square of that U or V, so that it fits every
            width of a model; of scales, a tenth of it. It rises over the first twentieth of the steps and falls to 0 by
            a cosine.
        seed: Seed of the order of the windows.
        bos: First token of each window is the tokenizer's BOS: "yes", "no", or "auto", where it adds one by itself.
        device: "cpu" or "cuda"; None stands for cuda where there is one.

    Raises:
        InputError: The folder is unfinished, damaged or of rank 0, or the text is too short.
        ResumeError: `out` or its .partial holds something else.
        BudgetError: Memory or disk are too small.
        StreamslrError: Training diverged.
    """
    out = out.resolve()
    _check_arguments(folder, out, lr)
    where, _ = pick_device(device)
    state = _read_trainable(folder)
    windows, held_out = _read_windows(folder, data, seq_len, batch, bos)
    total = steps or epochs * math.ceil((len(windows) - held_out) / batch)
    tokens = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    training = _Training(tokens=tokens, seq_len=seq_len, steps=total, batch=batch, lr=lr, seed=seed)
    if done := _finished(out, state, training):
        log.info("%s holds the result of this fine-tuning already", out)
        return done
    dtypes = _stored_dtypes(folder, state)
    parts = "U, V and scales"  # version 0.8 trained no scales: what it began does not go on
    settings = {"folder": [asdict(shard) for shard in state.shards], "parts": parts, **training}
    with _claimed(out, settings) as work:
        _require_space(work, state)
        model = load(folder, where)
        in_bf16 = where.type == "cuda" and model.dtype == torch.bfloat16
        trained = _unfreeze_parts(model, state, in_bf16)
        arguments = training_arguments(work, total, batch, seed, where, in_bf16)
        trainer = make_trainer(model, trained, windows, held_out, arguments, lr)
        message = "training %s parameters of U, V and scales on %d windows of %d tokens of %s; %d more are held out"
        count = sum(parameter.numel() for parameter in trained.values())
        log.info(message, f"{count:,}", len(windows) - held_out, seq_len, data, held_out)
        measure = partial(held_out_loss, trainer)
        run = partial(train, trainer, work, {name: dtypes[name] for name in trained})
        with deterministic_libraries(where):
            before = retry_in_any_order(measure, "evaluation", note_nothing)
            retry_in_any_order(run, "training", note_nothing)
            after = retry_in_any_order(measure, "evaluation", note_nothing)
        if not math.isfinite(after):
            shutil.rmtree(work)
            raise StreamslrError(f"training diverged, the held-out loss is {after}; nothing was written. Lower --lr")
        if after >= before:
            message = "the held-out loss did not fall: %.4f before, %.4f after; lower --lr, or train on more text"
            log.warning(message, before, after)
        record = FinetuneRecord(
            **training,
            data=data.name,
            windows=len(windows) - held_out,
            held_out=held_out,
            loss_before=before,
            loss_after=after,
        )
        _write(folder, work / _RESULT, state, trained, record)
        (work / _RESULT).replace(out)
        fsync_folder(out.parent)
        shutil.rmtree(work)
    return record


def _check_arguments(folder: Path, out: Path, lr: float) -> None:
    """Raise InputError for arguments of `finetune` that cannot hold; `out` is resolved."""
    if not 0 < lr < math.inf:
        raise InputError(f"--lr is {lr}; it must be above 0")
    if out.is_relative_to(folder.resolve()):
        raise InputError(f"{out} lies in the compressed folder itself; give an --out outside of {folder}")


def _require_space(work: Path, state: JournalState) -> None:
    """Raise BudgetError where the disk cannot hold the result and the checkpoints."""
    count = sum(map(_trained_numbers, _linears(state)))
    more = sum(_as_numbers(linear).nbytes - linear.nbytes for linear in _linears(state))
    there = sum(path.stat().st_size for path in work.glob("checkpoint-*/*"))  # of a training that goes on
    checkpoints = max(0, count * CHECKPOINTS * _CHECKPOINT_BYTES - there)
    nbytes = sum(shard.nbytes for shard in state.shards) + more + checkpoints
    require_disk_space(DiskNeed(work, "result and checkpoints", nbytes, "give --out on another disk"))


def _read_trainable(folder: Path) -> JournalState:
    """Return the journal of a folder that can be trained. Raise InputError for one that is not finished and sound."""
    state = read_run(folder)
    state.require_complete(folder)
    if not any(map(_trained_numbers, _linears(state))):
        raise InputError(
            f"{folder} has rank 0 and no values on a grid: there is no U·V and no scale to train; compress it with a "
            "--rank above 0"
        )
    _require_sound(folder)
    return state


def _require_sound(folder: Path) -> None:
    """Raise InputError where `verify` finds a problem in a folder, or what would be copied is a link out of it."""
    if problems := verify(folder).problems:
        file, problem = problems[0]
        raise InputError(f"{folder / file} {problem} ({len(problems)} problems; `streamslr verify` names them all)")
    open_checkpoint(str(folder)).require_no_outer_links()


def _read_windows(folder: Path, data: Path, seq_len: int, batch: int, bos: str) -> tuple[Tensor, int]:
    """Return the windows of `data` [n, T], and how many of the last are held out. Raise InputError for too few."""
    checkpoint = open_checkpoint(str(folder))
    tokenizer = checkpoint.tokenizer()
    windows = text_windows(tokenizer, data, seq_len, limit=None, prefix=window_prefix(tokenizer, bos))
    BlockwiseModel(checkpoint, torch.float32, torch.device("cpu")).require_windows(seq_len, windows)
    held_out = min(math.ceil(len(windows) * _HELD_OUT_FRACTION), _MAX_HELD_OUT)
    if len(windows) - held_out < batch:
        raise InputError(
            f"{data} holds {len(windows)} windows of {seq_len} tokens, {held_out} of them held out: less than a batch "
            f"of {batch}; give more text, or a smaller --seq-len or --batch"
        )
    return windows, held_out


def _stored_dtypes(folder: Path, state: JournalState) -> dict[str, torch.dtype]:
    """Return the dtype that every tensor of the blocks is written in, by its stored name."""
    headers = [shard_header(folder / block.shard.file) for block in state.blocks]
    return {name: dtype for header in headers for name, dtype in _written_dtypes(header.tensors).items()}


def _written_dtypes(tensors: Mapping[str, TensorInfo]) -> dict[str, torch.dtype]:
    """Return the dtype of each tensor that is written: codes of U and V become numbers in the dtype of their scales."""
    dtypes = {name: info.dtype for name, info in tensors.items()}
    for name in [name for name in dtypes if name.endswith(".low_rank_scales")]:
        linear, dtype = name.removesuffix(".low_rank_scales"), dtypes.pop(name)
        dtypes |= {f"{linear}.U": dtype, f"{linear}.V": dtype}
    return dtypes


def _finished(out: Path, state: JournalState, training: _Training) -> FinetuneRecord | None:
    """Return the record of `out` where it is the result of this training, of a folder with the journal `state`."""
    found = read_journal(out)
    if found is None or not found.finetuned:
        return None
    *earlier, last = found.finetuned
    if (found.fingerprint, tuple(earlier)) != (state.fingerprint, state.finetuned):
        return None
    if any(getattr(last, name) != value for name, value in training.items()):
        return None
    _require_sound(out)
    shutil.rmtree(out.with_name(out.name + PARTIAL_SUFFIX), ignore_errors=True)  # a kill may have come before this
    return last


@contextmanager
def _claimed(out: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Lock `out`.partial, new or with earlier work of this fine-tuning, and yield it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ResumeError(f"{out} is there already; give a new folder as --out")
    work = out.with_name(out.name + PARTIAL_SUFFIX)
    record = work / _SETTINGS_FILE
    with lock_folder(work, "give another --out"):
        if not record.is_file():
            if any(path.name != _SETTINGS_FILE + PARTIAL_SUFFIX for path in work.iterdir()):
                raise ResumeError(f"{work} holds files that are no fine-tuning's; delete it, or give another --out")
            write_json(record, settings)
        try:
            there = parse_json(read_bounded(record), dict[str, Any])
        except ValueError as error:
            raise ResumeError(f"{record} is damaged ({error}); delete {work}, or give another --out") from error
        if changed := [name for name, value in settings.items() if there.get(name) != value]:
            raise ResumeError(
                f"{work} holds an unfinished fine-tuning with other settings ({', '.join(changed)}); "
                f"give the same to go on, delete it, or give another --out"
            )
        yield work


def _linears(state: JournalState) -> list[LinearRecord]:
    """Return the records of all linears."""
    return [linear for block in state.blocks for linear in block.linears]


def _trained_numbers(linear: LinearRecord) -> int:
    """Return how many numbers of a linear are trained: those of U and V, and its scales."""
    grid = grid_of(parse_values(linear.values))
    scales = linear.shape[0] * group_count(linear.shape[1], grid.group) if grid else 0
    return linear.rank * sum(linear.shape) + scales


def _parts(model: PreTrainedModel, state: JournalState) -> dict[str, nn.Parameter]:
    """Return U, V and scales by their stored names, as parameters."""
    modules = packed_modules(model)
    trained: dict[str, nn.Parameter] = {}
    coded = sum(module.low_rank_scales is not None for module in modules.values())
    if coded:
        log.info("U and V of %d linears are int8 codes: they are trained, and stored, as numbers", coded)
    for module in modules.values():
        module.make_trainable()
    linears = [linear.name for linear in _linears(state) if _trained_numbers(linear)]
    for stored, name in find_modules(model, linears, modules).items():
        own = dict(modules[name].named_parameters(recurse=False))
        trained |= {f"{stored}.{part}": own[part] for part in ("scales", "U", "V") if part in own}
    return trained


def _unfreeze_parts(model: PreTrainedModel, state: JournalState, in_bf16: bool) -> dict[str, nn.Parameter]:
    """Give a gradient to U, V and scales alone, and return them in float32 by their stored names.

    The other parameters, packed values of S excepted, become float32 too unless the model computes `in_bf16`.
    """
    trained = _parts(model, state)
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad or not in_bf16:
            parameter.data = parameter.data.float()
    return trained


def _as_numbers(linear: LinearRecord) -> LinearRecord:
    """Return the record of a linear whose codes of U and V, if it has them, became numbers."""
    if linear.low_rank_values != INT8:
        return linear
    number_bytes = linear.dense_nbytes // math.prod(linear.shape)
    codes, numbers = (low_rank_bytes(linear.shape, linear.rank, number_bytes, kind) for kind in (torch.int8, None))
    return replace(linear, low_rank_values=STORED, nbytes=linear.nbytes - codes + numbers)


def _write(
    folder: Path, out: Path, state: JournalState, trained: Mapping[str, nn.Parameter], record: FinetuneRecord
) -> None:
    """Write the folder again, with what was trained; one tensor in memory at a time, the journal last."""

    def rewritten(file: str) -> WrittenShard:
        require_as_written(folder / file, state.digests[file])  # it was verified before the training, hours ago
        with safe_open(folder / file, "pt") as opened:

            def fetch(name: str, dtype: torch.dtype) -> Tensor:
                tensor: Tensor = trained[name].to(dtype) if name in trained else opened.get_tensor(name)
                return tensor

            header = shard_header(folder / file).tensors
            dtypes = _written_dtypes(header)
            sources: list[TensorSource] = [
                (name, dtype, header[name].shape, partial(fetch, name, dtype)) for name, dtype in dtypes.items()
            ]
            return write_shard(out / file, sources, opened.metadata())

    out.mkdir(exist_ok=True)
    auxiliary_files = {}
    for name, digest in state.auxiliary_files.items():
        require_as_written(folder / name, digest)
        write = partial(_write_config, state) if name == "config.json" else copy_auxiliary_file
        auxiliary_files[name] = write(folder / name, out)
    assert state.non_block is not None
    non_block = rewritten(state.non_block.file)
    # What the run's check found is not true of the trained model.
    blocks = tuple(
        replace(block, shard=rewritten(block.shard.file), check=None, linears=tuple(map(_as_numbers, block.linears)))
        for block in state.blocks
    )
    write_index(out, (non_block, *(block.shard for block in blocks)))
    finetuned = (*state.finetuned, record)
    write_journal(
        out,
        replace(
            state,
            auxiliary_files=auxiliary_files,
            non_block=non_block,
            blocks=blocks,
            finetuned=finetuned,
            check=None,
            quality=None,
        ),
    )


def _write_config(state: JournalState, path: Path, out: Path) -> str:
    """Write config.json, which says how U and V are stored once codes became numbers; return its sha256."""
    if not any(linear.low_rank_values == INT8 for linear in _linears(state)):
        return copy_auxiliary_file(path, out)
    config = parse_json(read_bounded(path), dict[str, Any])
    entry = config["quantization_config"]
    texts = {_as_numbers(linear).low_rank_values for linear in _linears(state)}
    entry["low_rank_values"] = texts.pop() if len(texts) == 1 else MIXED
    if entry["low_rank_values"] == STORED:
        del entry["low_rank_values"]
    return write_file(out / path.name, config_bytes(config))
