"""Kept inputs of experts: they reach the linears as they did in the block, and odd calls are refused."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from streamslr.calibration.hidden_states import InMemory
from streamslr.calibration.routed_inputs import InputRecorder
from streamslr.errors import InputError
from streamslr.model.blockwise import Block, BlockwiseModel
from streamslr.model.checkpoint import open_checkpoint
from streamslr.model.experts import Experts
from tests.support.tiny_models import starved_checkpoint

WINDOWS, T, H = 4, 6, 64


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Block:
    """A live block with five experts, of which a token passes two."""
    folder = starved_checkpoint(tmp_path_factory.mktemp("models") / "mixtral", "mixtral", blocks=1)
    return BlockwiseModel(open_checkpoint(str(folder)), torch.float32, torch.device("cpu")).load_block(0)


@pytest.fixture
def experts(block: Block) -> Experts:
    return next(experts for experts, _ in block.expert_of.values())


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs of a block [windows, T, h], experts of each token and their weights; none passes expert 3."""
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(WINDOWS, T, H, generator=draw)
    first = torch.randint(0, 3, (WINDOWS * T,), generator=draw)
    return hidden, torch.stack([first, torch.full_like(first, 4)], 1), torch.rand(WINDOWS * T, 2, generator=draw)


@contextmanager
def watching(block: Block, numbers: set[int]) -> Iterator[dict[str, list[Tensor]]]:
    """Yield what reaches each linear of some experts while entered."""
    seen: dict[str, list[Tensor]] = {name: [] for name, (_, number) in block.expert_of.items() if number in numbers}
    hooks = [
        block.linears[name].register_forward_pre_hook(lambda _, args, to=found: to.append(args[0]))
        for name, found in seen.items()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("number", range(5))
def test_an_expert_receives_its_kept_tokens_as_in_the_block_to_the_bit(
    block: Block, experts: Experts, number: int
) -> None:
    hidden, index, weights = routed()
    states = InMemory(WINDOWS, T, H, torch.float32)
    recorder = InputRecorder(experts, states, states.write)
    with watching(block, {number}) as in_block:
        for first in range(0, WINDOWS, 2):
            mine = slice(first * T, (first + 2) * T)
            with recorder.passing(first, hidden[first : first + 2]):
                experts(hidden[first : first + 2].flatten(0, 1), index[mine], weights[mine])
    kept = recorder.recorded()
    with watching(block, {number}) as again:
        for first in range(0, WINDOWS, 2):
            kept.replay(first, kept.states.read(first, first + 2), {number})
    assert all(len(inputs) == 2 for inputs in in_block.values())
    for name, inputs in in_block.items():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(again[name], inputs, strict=True))


def test_no_other_expert_is_passed_again(block: Block, experts: Experts) -> None:
    hidden, index, weights = routed()
    states = InMemory(WINDOWS, T, H, torch.float32)
    recorder = InputRecorder(experts, states, states.write)
    with recorder.passing(0, hidden):
        whole = experts(hidden.flatten(0, 1), index, weights)
    with watching(block, {0, 2, 3, 4}) as others:
        recorder.recorded().replay(0, hidden, {1})
    assert not any(others.values())
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
