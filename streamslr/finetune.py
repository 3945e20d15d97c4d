"""Trains U and V of a compressed folder on text, S frozen and packed, and writes them back in the same format.

No adapter of PEFT is added: U·V is one already, and what it learns stays where `load`, `eval` and `export` look for it.
A second one would have to be merged into it, at a higher rank, to come back into this format. Who wants PEFT itself
has U·V as a LoRA from `streamslr export --to peft`.
"""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from streamslr.calibration.tokens import text_windows
from streamslr.errors import BudgetError, InputError, ResumeError, StreamslrError, first_line
from streamslr.io.durable import (
    PARTIAL_SUFFIX,
    DiskNeed,
    fsync_folder,
    lock_folder,
    require_disk_space,
    write_file,
    write_json,
)
from streamslr.io.folder import write_index
from streamslr.io.safetensors_file import TensorSource, WrittenShard, shard_header, write_shard
from streamslr.memory import is_out_of_memory
from streamslr.model.checkpoint import open_checkpoint
from streamslr.model.parameter_names import find_modules
from streamslr.results.inspect import read_run
from streamslr.results.verify import verify
from streamslr.run.context import pick_device
from streamslr.run.journal import JOURNAL_FILE, FinetuneRecord, JournalState
from streamslr.runtime.loader import load, packed_modules

_HELD_OUT = 1 / 20, 64
"""Of the windows, but at most so many: enough for a mean, little to lose for training."""
_SETTINGS_FILE, _RESULT = "settings.json", "result"
"""In `out`.partial, beside Trainer's checkpoints."""
_CHECKPOINT_BYTES = 2 * 12
"""Of a trained parameter: itself and Adam's two moments in float32; the old checkpoint goes after the new is there."""

log = logging.getLogger("streamslr")


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
    device: str | None = None,
) -> FinetuneRecord:
    """Train U [o, r] and V [r, d] of every linear in `folder` to predict `data`; the result is the folder `out`.

    data: .txt, .jsonl with a `text` field, or .gz of either, cut into windows of `seq_len` tokens; the last of them
    are held out, and the loss on them is measured before and after. steps: of `batch` windows each, instead of
    `epochs` over all windows. lr: how far a step of Adam moves an entry, as a share of the root mean square of its U or
    V, so that it need not follow the model's width; it rises over the first twentieth and falls to 0 by a cosine.
    U and V are trained in float32 and rounded to the dtype they had; gradients and Adam's moments exist for them
    alone. On a GPU a bf16 folder computes in bf16 (autocast), everything else in float32.

    All work is in `out`.partial, which becomes `out` when it is whole; called again after an interruption, it goes on
    from the last twentieth. `folder` stays as it is; `out` has its S byte for byte, and errors of linears as solved.
    Raises InputError for an unfinished or damaged folder, rank 0 and too little text; ResumeError when `out` or its
    .partial holds something else; BudgetError when memory or disk are too small; StreamslrError when training diverges.
    """
    where, _ = pick_device(device)
    out = out.resolve()
    if out.is_relative_to(folder.resolve()):
        raise InputError(f"{out} lies in the compressed folder itself; give an --out outside of {folder}")
    state = _sound(folder)
    windows = text_windows(open_checkpoint(str(folder)).tokenizer(), data, seq_len, limit=None)  # [n, T]
    held_out = min(math.ceil(len(windows) * _HELD_OUT[0]), _HELD_OUT[1])
    if len(windows) - held_out < batch:
        raise InputError(
            f"{data} holds {len(windows)} windows of {seq_len} tokens, {held_out} of them held out: less than a batch "
            f"of {batch}; give more text, or a smaller --seq-len or --batch"
        )
    total = steps or epochs * math.ceil((len(windows) - held_out) / batch)
    tokens = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    settings = {
        "folder": [asdict(shard) for shard in state.shards],
        "tokens": tokens,
        "seq_len": seq_len,
        "steps": total,
        "batch": batch,
        "lr": lr,
        "seed": seed,
    }
    headers = [shard_header(folder / block.shard.file) for block in state.blocks]
    stored = {name: info for header in headers for name, info in header.tensors.items()}
    with _claimed(out, settings) as work:
        count = sum(linear.rank * sum(linear.shape) for block in state.blocks for linear in block.linears)
        needed = sum(shard.nbytes for shard in state.shards) + count * _CHECKPOINT_BYTES
        require_disk_space(DiskNeed(work, "result and checkpoints", needed, "give --out on another disk"))
        model = load(folder, where)
        trained = _low_rank(model, state)
        in_bf16 = where.type == "cuda" and model.dtype == torch.bfloat16
        for parameter in model.parameters():  # packed values stay as they are: bf16 to float32 is exact
            if parameter.requires_grad or not in_bf16:
                parameter.data = parameter.data.float()
        samples = [{"input_ids": window, "labels": window} for window in windows]
        trainer = _LowRankTrainer(
            trained,
            model=model,
            args=_arguments(work, total, batch, seed, where, in_bf16),
            train_dataset=samples[:-held_out],
            eval_dataset=samples[-held_out:],
            optimizers=(_adam(trained, lr), None),
            callbacks=[_Say()],
        )
        trainer.remove_callback(PrinterCallback)
        log.info(
            f"training {count:,} parameters of U and V on {len(samples) - held_out} windows of {seq_len} tokens "
            f"of {data}; {held_out} more are held out"
        )
        try:
            before = trainer.evaluate()["eval_loss"]
            log.info("held-out loss %.4f", before)
            done, last = _last_checkpoint(work)
            if last and done == total:  # Trainer would make one step more
                trainer._load_from_checkpoint(last)
            else:
                trainer.train(resume_from_checkpoint=last)
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(parameter.to(stored[name].dtype))
            after = trainer.evaluate()["eval_loss"]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise BudgetError(
                f"fine-tuning does not fit the memory ({first_line(error)}); give a smaller --batch or --seq-len"
            ) from error
        if not math.isfinite(after):
            shutil.rmtree(work)
            raise StreamslrError(f"training diverged, the held-out loss is {after}; nothing was written. Lower --lr")
        if after >= before:
            log.warning(
                f"the held-out loss did not fall: {before:.4f} before, {after:.4f} after; "
                f"lower --lr, or train on more text"
            )
        record = FinetuneRecord(
            data=data.name,
            tokens=tokens,
            windows=len(samples) - held_out,
            held_out=held_out,
            seq_len=seq_len,
            batch=batch,
            steps=total,
            lr=lr,
            seed=seed,
            loss_before=before,
            loss_after=after,
        )
        _write(folder, work / _RESULT, state, trained, record)
        (work / _RESULT).replace(out)
        fsync_folder(out.parent)
        shutil.rmtree(work)
    return record


class _LowRankTrainer(Trainer):
    """Its checkpoints hold U and V alone, by their stored names: the rest of the model does not change."""

    def __init__(self, trained: Mapping[str, nn.Parameter], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._trained = trained

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(
            {name: p.detach().cpu() for name, p in self._trained.items()}, Path(output_dir) / "low-rank.safetensors"
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        found = load_file(Path(resume_from_checkpoint) / "low-rank.safetensors")
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(found[name])


class _Say(TrainerCallback):
    """A line every twentieth: loss, and the time that is left."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start, self._first = time.monotonic(), state.global_step
        if self._first:
            log.info("going on from step %d of %d", self._first, state.max_steps)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            seconds = (time.monotonic() - self._start) / (state.global_step - self._first)
            left = (state.max_steps - state.global_step) * seconds
            log.info("step %d of %d: loss %.4f, %.0f s left", state.global_step, state.max_steps, logs["loss"], left)


def _sound(folder: Path) -> JournalState:
    """The journal of a finished folder with something to train, every byte as it says. Raises InputError."""
    state = read_run(folder)
    state.require_complete(folder)
    if not any(linear.rank for block in state.blocks for linear in block.linears):
        raise InputError(f"{folder} has rank 0: there is no U·V to train; compress it with a --rank above 0")
    if problems := verify(folder).problems:
        file, problem = problems[0]
        raise InputError(f"{folder / file} {problem} ({len(problems)} problems; `streamslr verify` names them all)")
    return state


@contextmanager
def _claimed(out: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of the work, `out`.partial, new or of this very fine-tuning; nobody else writes it while entered."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ResumeError(f"{out} is there already; give a new folder as --out")
    work = out.with_name(out.name + PARTIAL_SUFFIX)
    record = work / _SETTINGS_FILE
    with lock_folder(work, "give another --out"):
        if not record.is_file():
            if any(path.name != _SETTINGS_FILE + PARTIAL_SUFFIX for path in work.iterdir()):
                raise ResumeError(f"{work} holds files that are no fine-tuning's; delete it, or give another --out")
            write_json(record, settings)
        there = json.loads(record.read_text())
        if changed := [name for name, value in settings.items() if there.get(name) != value]:
            raise ResumeError(
                f"{work} holds an unfinished fine-tuning with other settings ({', '.join(changed)}); "
                f"give the same to go on, delete it, or give another --out"
            )
        yield work


def _last_checkpoint(work: Path) -> tuple[int, str | None]:
    """(steps done, folder). Trainer writes trainer_state.json last: a checkpoint without it was cut off."""
    whole = {int(path.parent.name.rpartition("-")[2]): str(path.parent) for path in work.glob("*/trainer_state.json")}
    return max(whole.items(), default=(0, None))


def _low_rank(model: PreTrainedModel, state: JournalState) -> dict[str, nn.Parameter]:
    """U and V by their stored names, from now on the only parameters with a gradient."""
    modules = packed_modules(model)
    trained: dict[str, nn.Parameter] = {}
    linears = [linear.name for block in state.blocks for linear in block.linears if linear.rank]
    for stored, name in find_modules(model, linears, modules).items():
        trained |= {f"{stored}.{part}": modules[name].get_parameter(part) for part in ("U", "V")}
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def _arguments(work: Path, steps: int, batch: int, seed: int, device: torch.device, in_bf16: bool) -> TrainingArguments:
    twentieth = math.ceil(steps / 20)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        lr_scheduler_type="cosine",
        warmup_steps=twentieth,
        bf16=in_bf16,
        seed=seed,
        logging_steps=twentieth,
        save_steps=twentieth,
        save_total_limit=1,
        prediction_loss_only=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = 1  # otherwise Trainer copies the model to every GPU it sees
    return arguments


def _adam(trained: Mapping[str, nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """A rate for each tensor, from its size before any step; no weight decay: it would pull U·V off its solution."""
    groups = [{"params": [p], "lr": lr * float(p.detach().square().mean().sqrt())} for p in trained.values()]
    return torch.optim.Adam(groups)


def _write(
    folder: Path, out: Path, state: JournalState, trained: Mapping[str, nn.Parameter], record: FinetuneRecord
) -> None:
    """The folder again, with these U and V; one tensor in memory at a time, the journal last."""

    def rewritten(file: str) -> WrittenShard:
        with safe_open(folder / file, "pt") as opened:

            def fetch(name: str, dtype: torch.dtype) -> Tensor:
                tensor: Tensor = trained[name].to(dtype) if name in trained else opened.get_tensor(name)
                return tensor

            header = shard_header(folder / file).tensors
            sources: list[TensorSource] = [
                (name, info.dtype, info.shape, partial(fetch, name, info.dtype)) for name, info in header.items()
            ]
            return write_shard(out / file, sources, opened.metadata())

    out.mkdir(exist_ok=True)
    for name in state.auxiliary_files:
        write_file(out / name, (folder / name).read_bytes())
    assert state.non_block is not None
    non_block = rewritten(state.non_block.file)
    blocks = tuple(replace(block, shard=rewritten(block.shard.file)) for block in state.blocks)
    write_index(out, (non_block, *(block.shard for block in blocks)))
    made = replace(state, non_block=non_block, blocks=blocks, finetuned=(*state.finetuned, record))
    write_json(out / JOURNAL_FILE, asdict(made))
