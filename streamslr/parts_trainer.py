"""The trainer of U, V and scales: their rates, the steps, and checkpoints that hold them alone."""

import logging
import math
import shutil
import time
from collections.abc import Mapping
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

from streamslr.errors import BudgetError, StreamslrError, first_line, says_out_of_memory
from streamslr.gpu import deterministic_operators
from streamslr.masters import MatchSettings

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
        callbacks=[_ProgressLog()],
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
def train(trainer: PartsTrainer, work: Path, dtypes: Mapping[str, torch.dtype]) -> tuple[float, float]:
    """Train from the last checkpoint, if there is one, to the last step; round the parts to `dtypes`, by name.

    Returns:
        The held-out loss before training and after rounding.

    Raises:
        BudgetError: Memory ran out.
        StreamslrError: Training diverged; `work` is deleted.
    """
    try:
        before = trainer.evaluate()["eval_loss"]
        log.info("held-out loss %.4f", before)
        done, last = _last_checkpoint(work)
        if last and done == trainer.args.max_steps:  # train() would make one step more
            trainer._load_from_checkpoint(last)
        else:
            trainer.train(resume_from_checkpoint=last)
        with torch.no_grad():
            for name, parameter in trainer.parts.items():
                parameter.copy_(parameter.to(dtypes[name]))
        after = trainer.evaluate()["eval_loss"]
    except (RuntimeError, MemoryError) as error:
        if not says_out_of_memory(error):
            raise
        raise BudgetError(
            f"fine-tuning does not fit the memory ({first_line(error)}); give a smaller --batch or --seq-len"
        ) from error
    if not math.isfinite(after):
        shutil.rmtree(work)
        raise StreamslrError(f"training diverged, the held-out loss is {after}; nothing was written. Lower --lr")
    if after >= before:
        message = "the held-out loss did not fall: %.4f before, %.4f after; lower --lr, or train on more text"
        log.warning(message, before, after)
    return before, after


def _last_checkpoint(work: Path) -> tuple[int, str | None]:
    """Return (steps done, folder) of the last whole checkpoint; (0, None) where there is none.

    Trainer writes trainer_state.json last, so a checkpoint without it was cut off.
    """
    whole = {int(path.parent.name.rpartition("-")[2]): str(path.parent) for path in work.glob("*/trainer_state.json")}
    return max(whole.items(), default=(0, None))
