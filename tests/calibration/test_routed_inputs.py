"""Kept inputs of experts: they reach the linears as they did in the block, and odd calls are refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from streamslr.calibration.hidden_states import InMemory
from streamslr.calibration.routed_inputs import InputRecorder
from streamslr.errors import InputError
from streamslr.model.experts import Experts

WINDOWS, T, H = 4, 6, 8


@pytest.fixture
def experts() -> Experts:
    """Five experts, of which a token passes two."""
    torch.manual_seed(0)
    return Experts((5, H, 3), ("gate", "up", "down"), nn.SiLU())


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs of a block [windows, T, h], experts of each token and their weights; none passes expert 3."""
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(WINDOWS, T, H, generator=draw)
    first = torch.randint(0, 3, (WINDOWS * T,), generator=draw)
    return hidden, torch.stack([first, torch.full_like(first, 4)], 1), torch.rand(WINDOWS * T, 2, generator=draw)


def watch(linear: nn.Module, seen: list[Tensor]) -> None:
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))


@pytest.mark.parametrize("number", range(5))
def test_an_expert_receives_its_kept_tokens_as_in_the_block_to_the_bit(experts: Experts, number: int) -> None:
    hidden, index, weights = routed()
    states = InMemory(WINDOWS, T, H, torch.float32)
    recorder = InputRecorder(experts, states, states.write)
    gate, _, down = experts.linears(number)
    inputs: list[Tensor] = []
    watch(gate, inputs)
    watch(down, inputs)
    for first in range(0, WINDOWS, 2):
        mine = slice(first * T, (first + 2) * T)
        with recorder.passing(first, hidden[first : first + 2]):
            experts(hidden[first : first + 2].flatten(0, 1), index[mine], weights[mine])
    in_block, kept = inputs.copy(), recorder.recorded()
    inputs.clear()
    for first in range(0, WINDOWS, 2):
        kept.replay(first, kept.states.read(first, first + 2), {number})
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(inputs, in_block, strict=True))


def test_no_other_expert_is_passed_again(experts: Experts) -> None:
    hidden, index, weights = routed()
    states = InMemory(WINDOWS, T, H, torch.float32)
    recorder = InputRecorder(experts, states, states.write)
    with recorder.passing(0, hidden):
        whole = experts(hidden.flatten(0, 1), index, weights)
    others: list[Tensor] = []
    for number in (0, 2, 3, 4):
        for linear in experts.linears(number):
            watch(linear, others)
    recorder.recorded().replay(0, hidden, {1})
    assert others == []
    assert torch.equal(experts(hidden.flatten(0, 1), index, weights), whole), "afterwards all pass"


@pytest.mark.parametrize(
    "call",
    [
        lambda experts, x, index, weights: None,
        lambda experts, x, index, weights: [experts(x, index, weights) for _ in range(2)],
        lambda experts, x, index, weights: experts(x[1:], index[1:], weights[1:]),
    ],
    ids=["never", "twice", "some tokens"],
)
def test_experts_that_are_not_called_once_with_every_token_are_refused(
    experts: Experts, call: Callable[..., object]
) -> None:
    hidden, index, weights = routed()
    states = InMemory(WINDOWS, T, H, torch.float32)
    recorder = InputRecorder(experts, states, states.write)
    with pytest.raises(InputError, match=r"once with every token.*give --gpu-mem"), recorder.passing(0, hidden):
        call(experts, hidden.flatten(0, 1), index, weights)
