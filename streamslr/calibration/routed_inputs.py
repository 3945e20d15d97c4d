"""Inputs of a block's experts, kept while the block is solved: Grams in groups then need no pass of the block each."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamslr.calibration.hidden_states import HiddenStates
from streamslr.errors import InputError
from streamslr.model.experts import Experts


def choices_bytes(tokens: int, chosen: int) -> int:
    """Return the bytes of the routers' choices of k = `chosen` experts for each token, on the compute device."""
    return 4 * tokens * chosen


def replay_bytes(tokens: int, chosen: int, hidden: int, inner: int, value_bytes: int) -> int:
    """Return the bytes that a replay of one micro-batch takes beside its inputs, if one expert gets every token.

    Counted are the order of the choices, the input of the expert and its output, and three tensors as wide as its
    inner width.

    Args:
        tokens: Tokens of one micro-batch, b · T.
        chosen: Experts k that each token passes.
        hidden: Width h of the expert's input.
        inner: Width i of the expert's down projection.
        value_bytes: Bytes of one number in the compute dtype.
    """
    return tokens * (value_bytes * (2 * hidden + 3 * inner) + 3 * 8 * chosen)


@dataclass(frozen=True)
class RoutedInputs:
    """What one module of experts received of the windows that Grams see.

    experts: The module.
    states: Its inputs [windows, T, h], in the scratch folder.
    choices: Numbers of the experts that each token passes [windows, T, k] int32, on the compute device.
    """

    experts: Experts
    states: HiddenStates
    choices: Tensor

    def tokens_of(self, first: int, windows: int) -> Sequence[Tensor]:
        """Return for each expert its tokens among those of windows from number `first` on, int64 [m] each."""
        return self.experts.tokens_of(self.choices[first : first + windows].flatten(0, 1).long())


class InputRecorder:
    """Recorder of what one module of experts receives."""

    def __init__(self, experts: Experts, states: HiddenStates, write: Callable[[int, Tensor], None]) -> None:
        """Prepare to record.

        Args:
            experts: The module.
            states: Where its inputs go.
            write: Function of (first window, inputs [b, T, h]) that stores them there.
        """
        self._experts, self._states, self._write = experts, states, write
        self._choices: Tensor | None = None

    @contextmanager
    def passing(self, first: int, hidden: Tensor) -> Iterator[None]:
        """Record the module's one call while entered; windows `hidden` [b, T, h] pass its block, from `first` on.

        Raises:
            InputError: It was not called once, with every token.
        """
        windows, T = hidden.shape[:2]
        calls = 0

        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal calls
            calls += 1
            if calls > 1 or len(args) < 2 or len(args[0]) != windows * T:
                raise _not_once()
            x, index = args[:2]
            if self._choices is None:
                shape = self._states.windows, T, index.shape[-1]
                self._choices = torch.empty(shape, dtype=torch.int32, device=index.device)
            self._choices[first : first + windows] = index.view(windows, T, -1)
            self._write(first, x.view(windows, T, -1))

        handle = self._experts.register_forward_pre_hook(record)
        try:
            yield
        finally:
            handle.remove()
        if not calls:
            raise _not_once()

    def recorded(self) -> RoutedInputs:
        """Return what was recorded."""
        assert self._choices is not None  # at least one window is not held out
        return RoutedInputs(self._experts, self._states, self._choices)


def _not_once() -> InputError:
    return InputError(
        "a block does not call its experts once with every token, so their Gram matrices cannot be collected in "
        "groups; give --gpu-mem, on a CPU --host-mem, for all of them at once"
    )
