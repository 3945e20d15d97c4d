"""Inputs of a block's experts, kept while the block is solved: Grams in groups then need no pass of the block each."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from streamslr.calibration.hidden_states import HiddenStates
from streamslr.errors import InputError
from streamslr.model.experts import Experts


def routing_bytes(tokens: int, chosen: int) -> int:
    """Return the bytes of the k = `chosen` experts of each token, int32, and of their weights, at most float32."""
    return (4 + 4) * tokens * chosen


@dataclass(frozen=True)
class RoutedInputs:
    """Inputs of one module of experts in the windows that Grams see.

    experts: The module.
    states: Its inputs [windows, T, h], in the scratch folder.
    routing: Its other arguments, experts of each token and their weights [windows, T, k], on the compute device.
    """

    experts: Experts
    states: HiddenStates
    routing: Sequence[Tensor]

    def replay(self, first: int, inputs: Tensor, only: Collection[int]) -> None:
        """Pass the kept inputs of windows through some experts again, as the block did.

        Args:
            first: First window.
            inputs: Inputs of the windows from there on, [b, T, h].
            only: Experts to pass, which must be dense still.
        """
        index, *others = [part[first : first + len(inputs)].flatten(0, 1) for part in self.routing]
        self.experts.only = frozenset(only)
        try:
            self.experts(inputs.flatten(0, 1), index.long(), *others)
        finally:
            self.experts.only = None


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
        self._routing: list[Tensor] = []

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
            if calls > 1 or len(args) < 2 or {len(arg) for arg in args} != {windows * T}:
                raise _not_once()
            x, *routing = args
            if not self._routing:
                index, *others = routing
                like = [index.int(), *others]
                self._routing = [part.new_empty(self._states.windows, T, *part.shape[1:]) for part in like]
            for kept, part in zip(self._routing, routing, strict=True):
                kept[first : first + windows] = part.view(windows, T, *part.shape[1:])
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
        return RoutedInputs(self._experts, self._states, self._routing)


def _not_once() -> InputError:
    return InputError(
        "a block does not call its experts once with every token, so their Gram matrices cannot be collected in "
        "groups; give --gpu-mem, on a CPU --host-mem, for all of them at once"
    )
