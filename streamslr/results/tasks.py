"""Scores of a compressed folder or a dense checkpoint, loaded whole, on tasks of lm-evaluation-harness."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from streamslr.errors import HubError, InputError, first_line
from streamslr.gpu import pick_device
from streamslr.io.packed_layout import read_quantization_config
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.border import refusing
from streamslr.model.checkpoint import Checkpoint, open_checkpoint
from streamslr.model.meta_model import auto_class
from streamslr.model.windows import require_ids, vocabulary_size
from streamslr.results.evaluate import read_digests
from streamslr.runtime.loader import load

PAPERS = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "rte", "openbookqa", "boolq")
"""The eight zero-shot tasks of HASSLE-free (arXiv:2502.00899) and 3BASiL (arXiv:2603.01376)."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task or a group of tasks. A field is None where the harness does not report it."""

    task: str
    metric: str
    """Name of the metric in the harness: "acc", "acc_norm", …"""
    value: float
    stderr: float | None
    """Standard error of `value`."""
    fewshot: int | None
    """Number of solved examples before each question."""
    samples: int | None
    """Number of questions."""


@dataclass(frozen=True)
class TaskScores:
    """Scores of one model, in the harness's order."""

    model: str
    device: str
    dtype: str
    tasks: tuple[TaskScore, ...]


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    include_path: Path | None = None,
    revision: str | None = None,
    device: str | None = None,
    progress: bool = True,
) -> TaskScores:
    """Score a model on tasks of lm-evaluation-harness.

    Names and data of the tasks are checked before the model is loaded. It is loaded whole, in float32 on a CPU and in
    bfloat16 on a GPU.

    Args:
        model: A compressed folder, a dense checkpoint or a hub id.
        tasks: Names of tasks or groups; "papers" stands for `PAPERS`.
        num_fewshot: Solved examples before each question; None leaves it to the task.
        limit: Use only so many questions of each task.
        batch_size: Questions at a time.
        include_path: A folder of more tasks, in the harness's YAML.
        revision: Branch, tag or commit of a hub model.
        device: "cpu" or "cuda"; None stands for cuda where there is one.
        progress: Show the harness's bars.

    Raises:
        InputError: The harness is not installed, has no task of that name, or fails in the model's code.
        HubError: The data of a task cannot be fetched.
    """
    try:
        from lm_eval import simple_evaluate  # type: ignore[import-untyped]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
        from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(f"--tasks needs lm-evaluation-harness ({error}); pip install 'streamslr[eval]'") from error
    asked = (task.strip() for task in tasks)
    names = list(dict.fromkeys(name for task in asked for name in (PAPERS if task == "papers" else (task,))))
    manager = TaskManager(include_path=include_path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise InputError(f"lm-evaluation-harness knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    try:
        manager.load(names)
    except ConnectionError as error:
        raise HubError(f"the data of {', '.join(names)} cannot be fetched: {first_line(error)}") from error
    where, dtype = pick_device(device)
    checkpoint = open_checkpoint(model, revision)
    tokenizer = checkpoint.tokenizer()
    loaded = _load_whole(checkpoint, revision, where, dtype)
    _check_ids(loaded, model)
    with refusing(f"lm-evaluation-harness cannot score {model}", "try another task, or evaluate the model with --text"):
        lm = HFLM(pretrained=loaded, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        if not progress:
            for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(lm, request, partial(getattr(lm, request), disable_tqdm=True))
        results = simple_evaluate(
            lm, tasks=names, num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False
        )
    return TaskScores(model, where.type, str(dtype).removeprefix("torch."), tuple(_scores(results)))


def _load_whole(
    checkpoint: Checkpoint, revision: str | None, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Load a model complete, a compressed folder with each file compared with its digest in the journal."""
    model = checkpoint.model
    if read_quantization_config(checkpoint.config) is not None:
        return load(model, device, dtype, verify=bool(read_digests(checkpoint)), revision=revision)
    BlockwiseModel(checkpoint, dtype, torch.device("cpu"))  # refuses what is not complete, from headers
    loaded: PreTrainedModel = auto_class(checkpoint.config).from_pretrained(
        model, revision=revision, dtype=dtype, device_map=device, trust_remote_code=False
    )
    return loaded


def _check_ids(model: PreTrainedModel, label: str) -> None:
    """Have the model refuse ids outside its vocabulary, which a GPU would answer with an assertion."""
    if vocabulary_size(model) is not None:
        model.get_input_embeddings().register_forward_pre_hook(lambda _, args: require_ids(model, args[0], label))


def task_table(scores: TaskScores) -> Table:
    """Return a table with a row per metric."""
    table = Table(title=f"{scores.model}, {scores.dtype} on {scores.device}")
    table.add_column("task")
    for name in ("shots", "questions", "metric", "value", "stderr"):
        table.add_column(name, justify="right")
    for score in scores.tasks:
        stderr = "–" if score.stderr is None else f"{score.stderr:.4f}"
        counts = ("–" if count is None else str(count) for count in (score.fewshot, score.samples))
        table.add_row(score.task, *counts, score.metric, f"{score.value:.4f}", stderr)
    return table


def _scores(results: dict[str, Any]) -> list[TaskScore]:
    """Return a record per metric from the harness's {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": …} per task."""
    scores = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if filtered == "none" else key,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    fewshot=results["n-shot"].get(task),
                    samples=results["n-samples"].get(task, {}).get("effective"),
                )
            )
    return scores
