"""The trainer of U, V and scales: their rates, the steps, and checkpoints that hold them alone."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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

from streamslr.errors import BudgetError, InputError, first_line, says_out_of_memory
from streamslr.gpu import deterministic_operators
from streamslr.io.durable import file_sha256, fsync_folder, is_as_written
from streamslr.masters import MatchSettings
from streamslr.outside import parse_json, read_bounded

_DIGESTS_FILE = "digests.json"
"""Written last into a checkpoint."""
CHECKPOINTS = 3
"""Checkpoints that the disk holds at once: the last two, and one that is being written."""

log = logging.getLogger("streamslr")


class PartsTrainer(Trainer):
    """Trainer whose checkpoints hold U, V and scales alone, by their stored names; the rest of the model stays."""

    def __init__(self, parts: Mapping[str, nn.Parameter], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.parts = parts

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().cpu() for name, p in self.parts.items()}, Path(output_dir) / "parts.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        found = load_file(Path(resume_from_checkpoint) / "parts.safetensors")
        with torch.no_grad():
            for name, parameter in self.parts.items():
                parameter.copy_(found[name])


class _Digests(TrainerCallback):
    """Write the digests of a checkpoint's files into it, once these are on the disk."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        digests = {path.name: file_sha256(path) for path in folder.iterdir() if path.name != _DIGESTS_FILE}
        for name in digests:
            _fsync(folder / name)
        (folder / _DIGESTS_FILE).write_text(json.dumps(digests))
        _fsync(folder / _DIGESTS_FILE)
        for changed in (folder, folder.parent):
            fsync_folder(changed)


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


class _ProgressLog(TrainerCallback):
    """Log loss and time left, a line every twentieth of the steps."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start, self._first = time.monotonic(), state.global_step
        if self._first:
            log.info("continuing from step %d of %d", self._first, state.max_steps)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            seconds = (time.monotonic() - self._start) / (state.global_step - self._first)
            left = (state.max_steps - state.global_step) * seconds
            log.info("step %d of %d: loss %.4f, %.0f s left", state.global_step, state.max_steps, logs["loss"], left)


def training_arguments(
    work: Path, steps: int, batch: int, seed: int, device: torch.device, in_bf16: bool
) -> TrainingArguments:
    """Return Trainer's settings for so many `steps` of `batch` windows; log and checkpoint come every twentieth."""
    twentieth = math.ceil(steps / 20)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        lr_scheduler_type="cosine",
        warmup_steps=min(twentieth, steps - 1),  # the first step of a warm-up has a rate of 0
        bf16=in_bf16,
        seed=seed,
        logging_steps=twentieth,
        save_steps=twentieth,
        save_total_limit=CHECKPOINTS - 1,
        prediction_loss_only=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = 1  # otherwise Trainer copies the model to every GPU it sees
    return arguments


def make_trainer(
    model: PreTrainedModel,
    trained: Mapping[str, nn.Parameter],
    windows: Tensor,
    held_out: int,
    arguments: TrainingArguments,
    lr: float,
) -> PartsTrainer:
    """Return a trainer of U, V and scales on the windows [n, T]; the last `held_out` of them are for evaluation."""
    examples = [{"input_ids": window, "labels": window} for window in windows]
    trainer = PartsTrainer(
        trained,
        model=model,
        args=arguments,
        train_dataset=examples[:-held_out],
        eval_dataset=examples[-held_out:],
        optimizers=(_make_adam(trained, lr), None),
        callbacks=[_ProgressLog(), _Digests()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _make_adam(trained: Mapping[str, nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return Adam with a rate for each tensor, `lr` times the root mean square that the tensor has now.

    Scales take a tenth, as in matching: they move all of S. There is no weight decay: it would pull U·V away from the
    solution of the compression.
    """
    ratios = {name: MatchSettings.scale_lr_ratio if name.endswith(".scales") else 1.0 for name in trained}
    groups = [
        {"params": [p], "lr": ratios[name] * lr * float(p.detach().square().mean().sqrt())}
        for name, p in trained.items()
    ]
    return torch.optim.Adam(groups)


@deterministic_operators()
def held_out_loss(trainer: PartsTrainer) -> float:
    """Return the mean loss on the held-out windows. Raise BudgetError where memory runs out."""
    with _telling_of_memory():
        loss: float = trainer.evaluate()["eval_loss"]
    log.info("held-out loss %.4f", loss)
    return loss


@deterministic_operators()
def train(trainer: PartsTrainer, work: Path, dtypes: Mapping[str, torch.dtype]) -> None:
    """Train from the last checkpoint, if there is one, to the last step; round the parts to `dtypes`, by name.

    Raises:
        BudgetError: Memory ran out.
    """
    done, last = _last_checkpoint(work)
    with _telling_of_memory():
        if last and done == trainer.args.max_steps:  # train() would make one step more
            trainer._load_from_checkpoint(last)
        else:
            trainer.train(resume_from_checkpoint=last)
        with torch.no_grad():
            for name, parameter in trainer.parts.items():
                parameter.copy_(parameter.to(dtypes[name]))


@contextmanager
def _telling_of_memory() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not says_out_of_memory(error):
            raise
        raise BudgetError(
            f"fine-tuning does not fit the memory ({first_line(error)}); give a smaller --batch or --seq-len"
        ) from error


def _last_checkpoint(work: Path) -> tuple[int, str | None]:
    """Return (steps done, folder) of the last checkpoint that is whole, and delete those behind it that are not.

    It is (0, None) where there is none.
    """
    steps = {path: int(path.name.rpartition("-")[2]) for path in work.glob("checkpoint-*")}
    for path in sorted(steps, key=lambda path: -steps[path]):
        if _is_whole(path):
            return steps[path], str(path)
        log.warning("%s was not written to its end, or has changed; it is deleted", path)
        shutil.rmtree(path)
    return 0, None


def _is_whole(checkpoint: Path) -> bool:
    """Return True for a checkpoint whose files are those that were written."""
    try:
        digests = parse_json(read_bounded(checkpoint / _DIGESTS_FILE), dict[str, str])
        return all(is_as_written(checkpoint / name, digest) for name, digest in digests.items())
    except (InputError, ValueError):  # no file, or none of ours
        return False
