"""CUDA made ready: what is set before it starts, what a process may take of a card, which operators are allowed."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from streamslr import gpu
from streamslr.errors import BudgetError
from streamslr.model.border import refusing
from streamslr.model.windows import refusing_windows

GB = 10**9
CUDA = torch.device("cuda")
NAMES = ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Hide the variables that CUDA reads, and restore them after what a test sets."""
    with mock.patch.dict(os.environ):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        yield monkeypatch


def test_a_gpu_is_asked_for_segments_that_expand_and_for_equal_bits(environment: pytest.MonkeyPatch) -> None:
    gpu.pick_device("cuda")
    allocator = {os.environ.get(name) for name in NAMES[1:]}
    assert allocator == {None, "expandable_segments:True"}
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_cpu_is_asked_for_nothing(environment: pytest.MonkeyPatch) -> None:
    assert gpu.pick_device("cpu") == (torch.device("cpu"), torch.float32)
    assert not any(name in os.environ for name in NAMES)


@pytest.mark.parametrize(
    ("chosen", "then"),
    [
        ("max_split_size_mb:512", "max_split_size_mb:512,expandable_segments:True"),
        ("expandable_segments:False", "expandable_segments:False"),
        ("backend:cudaMallocAsync", "backend:cudaMallocAsync"),
    ],
)
def test_what_a_user_set_of_the_allocator_stays(environment: pytest.MonkeyPatch, chosen: str, then: str) -> None:
    environment.setenv("PYTORCH_CUDA_ALLOC_CONF", chosen)
    environment.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    gpu.pick_device("cuda")
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == then
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a card of 80 GB of which CUDA takes 0.5 GB, torch 0.1 GB and other processes `others`."""
    made = SimpleNamespace(others=0, by_driver=None, expandable=True)

    def free(device: torch.device) -> tuple[int, int]:
        return 80 * GB - made.others - 6 * GB // 10, 80 * GB

    replaced = {
        "is_initialized": lambda: False,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device: 67 * 10**6,
        "memory_reserved": lambda device: GB // 10,
        "mem_get_info": free,
        "get_device_name": lambda device: "a card",
        "get_device_properties": lambda device: SimpleNamespace(uuid="one"),
    }
    for name, function in replaced.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(gpu, "_start_libraries", lambda device: made.expandable)
    monkeypatch.setattr(gpu, "_free_by_driver", lambda: made.by_driver)
    return made


def test_what_cuda_takes_for_itself_is_taken_off_the_limit(card: SimpleNamespace) -> None:
    memory = gpu.open_gpu(CUDA, 45 * GB)
    assert (memory.budget, memory.context, memory.workspaces) == (45 * GB, GB // 2, 67 * 10**6)
    assert memory.limit == 45 * GB - GB // 2


def test_what_others_hold_is_not_taken_for_cudas_own(card: SimpleNamespace) -> None:
    card.others, card.by_driver = 30 * GB, {"one": 50 * GB, "two": 80 * GB}
    assert gpu.open_gpu(CUDA, 45 * GB).context == GB // 2


def test_without_the_driver_little_is_taken_for_cudas_own(card: SimpleNamespace) -> None:
    card.others = 30 * GB
    assert gpu.open_gpu(CUDA, None).context == 2**30


def test_without_a_budget_a_process_may_take_what_is_free(card: SimpleNamespace) -> None:
    assert gpu.open_gpu(CUDA, None).budget == 80 * GB


@pytest.mark.parametrize(
    ("others", "why"),
    [(0, "90.0 GB is more than a card has, 80.0 GB"), (30 * GB, "more than is free on the card: 50.0 GB of 80.0 GB")],
)
def test_a_budget_that_the_card_lacks_is_refused_with_the_numbers(card: SimpleNamespace, others: int, why: str) -> None:
    card.others, card.by_driver = others, {"one": 80 * GB - others}
    with pytest.raises(BudgetError, match=why):
        gpu.open_gpu(CUDA, 60 * GB if others else 90 * GB)


def test_the_journal_says_which_segments_the_allocator_has(card: SimpleNamespace) -> None:
    card.expandable = False
    memory = gpu.open_gpu(CUDA, 45 * GB)
    assert memory.made_with()["gpu allocator"] == "segments of fixed size"


# Equal bytes


def strictness() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def test_operators_of_a_model_are_deterministic_on_a_gpu_and_ours_where_order_matters() -> None:
    with gpu.deterministic_libraries(CUDA):
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert strictness() == (False, False)
        with gpu.deterministic_operators():
            assert strictness() == (True, False)
            with gpu.in_any_order():
                assert strictness() == (False, False)
            assert strictness() == (True, False)
        assert strictness() == (False, False)
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_nothing_changes_on_a_cpu() -> None:
    with gpu.deterministic_libraries(torch.device("cpu")), gpu.deterministic_operators():
        assert strictness() == (False, False)
        assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_an_operator_without_a_deterministic_form_is_allowed_and_noted() -> None:
    calls, notes = [], []

    def work() -> str:
        with refusing("block 0 cannot run", "…"), refusing_windows("Mamba2", 8, 16), gpu.deterministic_operators():
            calls.append(strictness())
            if len(calls) == 1:
                raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set …")
        return "done"

    with gpu.deterministic_libraries(CUDA):
        assert gpu.retry_in_any_order(work, "grams", lambda *note: notes.append(note)) == "done"
    assert calls == [(True, False), (True, True)]
    assert notes == [
        ("grams", "cumsum_cuda_kernel has no deterministic form on this GPU, last bits may differ from run to run")
    ]


def test_other_errors_pass_through() -> None:
    def work() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with gpu.deterministic_libraries(CUDA), pytest.raises(RuntimeError, match="illegal memory access"):
        gpu.retry_in_any_order(work, "grams", lambda phase, sentence: None)
