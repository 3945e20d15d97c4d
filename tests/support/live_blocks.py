"""Blocks made of any module, with nothing to hand on beside hidden states, for tests of what passes through blocks."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from streamslr.model.blockwise import Block


def live_block(
    index: int,
    name: str,
    linears: Mapping[str, nn.Linear],
    experts: Mapping[str, str],
    parameters: Callable[[], Mapping[str, nn.Parameter]],
    run: Callable[[Tensor], Tensor],
) -> Block:
    """Return a handle on a block that `run` computes."""

    def hand_on(entering: Tensor) -> tuple[Tensor, Tensor]:
        hidden = run(entering)
        return hidden, hidden

    return Block(index, name, linears, experts, parameters, run, hand_on)
