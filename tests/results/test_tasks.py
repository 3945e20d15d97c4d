"""Tasks of lm-evaluation-harness: a tiny local one, scored as by hand; no network."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import streamslr
from streamslr.errors import HubError, InputError
from streamslr.model.checkpoint import open_checkpoint
from streamslr.results.export import export
from streamslr.results.tasks import evaluate_tasks
from tests.support.tiny_models import tiny_checkpoint

QUESTIONS: list[dict[str, Any]] = [
    {
        "question": "Each block is replaced by",
        "choices": [" a sparse matrix", " a number of cats and dogs"],
        "answer": 0,
    },
    {"question": "What was written", "choices": [" is lost", " can be read again tomorrow"], "answer": 1},
    {"question": "A language model", "choices": [" that does not fit", " return x + 1", " 2:4 and 64"], "answer": 0},
    {"question": "Nothing is held", "choices": [" longer than it is needed", " def f(x)"], "answer": 1},
]
TASK = """
task: tiny_choices
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files:
    test: {folder}/tiny.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama", blocks=2, seed=1)


@pytest.fixture
def local_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The harness's TaskManager, without its own tasks: it reads thousands of files to know them."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    return TaskManager


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "tiny.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "tiny.yaml").write_text(TASK.format(folder=folder))
    return folder


def right_answers(model: Path) -> list[bool]:
    """Return for each question whether the right choice is the most likely one to the model."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = open_checkpoint(str(model)).tokenizer()
    right = []
    for question in QUESTIONS:
        start = len(tokenizer.encode(question["question"]))
        scores = []
        for choice in question["choices"]:
            ids = torch.tensor([tokenizer.encode(f"{question['question']}{choice}")])
            with torch.inference_mode():
                log_p = dense(ids).logits.log_softmax(-1)[0, start - 1 : -1]
            scores.append(float(log_p.gather(1, ids[0, start:, None]).sum()))
        right.append(scores.index(max(scores)) == question["answer"])
    return right


@pytest.mark.usefixtures("local_tasks_alone")
def test_a_dense_checkpoint_scores_as_by_hand(model: Path, tasks: Path) -> None:
    result = evaluate_tasks(str(model), ["tiny_choices"], include_path=tasks, device="cpu", batch_size=2)
    right = right_answers(model)
    assert 0 < sum(right) < len(right), "a score that an all-or-nothing mistake cannot give"
    (score,) = result.tasks
    assert (score.task, score.metric, score.samples, score.fewshot) == ("tiny_choices", "acc", 4, 0)
    assert score.value == sum(right) / len(right)
    assert (result.device, result.dtype) == ("cpu", "float32")


@pytest.mark.slow
@pytest.mark.usefixtures("local_tasks_alone")
def test_a_compressed_folder_scores_as_its_dense_export(model: Path, text: Path, tasks: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"samples": 4, "seq_len": 16, "rank": 4, "device": "cpu", "match": False}
    streamslr.compress(model, tmp_path / "slr", calibration=text, method="eora-wanda", **settings)
    export(tmp_path / "slr", tmp_path / "dense", "dense", torch.float32)
    found = evaluate_tasks(str(tmp_path / "slr"), ["tiny_choices"], include_path=tasks, device="cpu", limit=3).tasks[0]
    assert found.samples == 3
    assert found.value == sum(right_answers(tmp_path / "dense")[:3]) / 3


@pytest.mark.slow
def test_a_model_whose_code_fails_is_one_line(model: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("the cache has no attention layers")

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM._model_call", fail)
    with pytest.raises(InputError, match=r"cannot score .*: the cache has no attention layers; try another task"):
        evaluate_tasks(str(model), ["tiny_choices"], include_path=tasks, device="cpu", progress=False)


@pytest.mark.slow
def test_an_unknown_task_is_refused_before_the_model_is_opened_and_the_papers_are_known() -> None:
    with pytest.raises(InputError, match="knows no task no_such_task;"):
        evaluate_tasks("/no/model", ["no_such_task", " papers"])


def test_data_that_cannot_be_fetched_is_the_hubs_fault(
    local_tasks_alone: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(self: object, names: list[str]) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr(local_tasks_alone, "load", offline)
    with pytest.raises(HubError, match="baber/piqa"):
        evaluate_tasks("/no/model", ["tiny_choices"], include_path=tasks)


def test_without_the_harness_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'streamslr\[eval\]'"):
        evaluate_tasks("/no/model", ["piqa"])
