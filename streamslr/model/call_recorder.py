"""Arguments that a model calls its blocks with, recorded by running it with stand-ins that hand their input on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from streamslr.errors import InputError, first_line
from streamslr.model.transformers_compat import quiet_transformers

PROBE_SHAPE = (2, 5)
"""Batch size and length of runs that only find something out: small, and unlike any size of a model."""


@dataclass(frozen=True)
class Call:
    """Arguments of a call of a block, without the hidden states.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: arguments by name.
        positional: True when the hidden states came first, False when they came by name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    positional: bool

    def values(self) -> Iterator[tuple[str, Any]]:
        """Yield each argument with its name."""
        yield from ((f"argument {n + 2}", value) for n, value in enumerate(self.args))
        yield from self.kwargs.items()

    def replay(self, block: nn.Module, hidden: Tensor) -> Any:
        """Call `block` with these arguments on other hidden states [b, T, h]."""
        if self.positional:
            return block(hidden, *self.args, **self.kwargs)
        return block(hidden_states=hidden, **self.kwargs)

    def to_meta(self) -> "Call":
        """Return the same call with every tensor on the meta device."""
        kwargs = {name: _to_meta(value) for name, value in self.kwargs.items()}
        return Call(_to_meta(self.args), kwargs, self.positional)

    def difference(self, other: "Call") -> str | None:
        """Return the name of an argument that differs from `other`'s, or None."""
        mine, others = dict(self.values()), dict(other.values())
        for name in mine | others:
            if name not in mine or name not in others or not _same(mine[name], others[name]):
                return name
        return None


@dataclass(frozen=True)
class CallRecorder:
    """A model that runs without its blocks. Its non-block tensors must be loaded, or zeros in their place.

    Attributes:
        model: the model.
        blocks: its blocks, in order; they may be on the meta device.
        label: the model, for messages.
        returned: length of the tuple that a block returns, the hidden states first; 0 for hidden states alone.
    """

    model: PreTrainedModel
    blocks: tuple[nn.Module, ...]
    label: str
    returned: int

    @torch.no_grad()
    def record(self, ids: Tensor) -> tuple[Tensor, tuple[Call, ...]]:
        """Run the model without its head on ids [b, T], each block handing its input on.

        Returns:
            The hidden states [b, T, h] that enter block 0, and the call of each block.

        Raises:
            NoChainError: anything but the hidden states goes from one block to the next.
        """
        calls: list[Call] = []
        entering: list[Tensor] = []

        def broken(why: str) -> NoChainError:
            return NoChainError(self.label, why, reached=len(calls))

        def forward(i: int, *args: Any, **kwargs: Any) -> Any:
            if i != len(calls):
                raise broken(f"block {i} is called in place of block {len(calls)}")
            hidden, call = _split(args, kwargs)
            if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != ids.shape:
                raise broken(f"block {i} takes {_describe(hidden)} as hidden states for ids {list(ids.shape)}")
            if entering and hidden is not entering[0]:
                raise broken(f"the hidden states change between blocks {i - 1} and {i}")
            for name, value in call.values():
                if not _is_plain(value):
                    raise broken(f"blocks share state: block {i} is handed {_describe(value)} as {name!r}")
            entering[:] = [hidden]
            calls.append(call)
            return self._as_returned(hidden)

        with _blocks_replaced(self.blocks, forward):
            output = self.model.base_model(input_ids=ids, use_cache=False)
        if len(calls) != len(self.blocks):
            raise broken(f"only {len(calls)} of {len(self.blocks)} blocks are called")
        if output[0].shape[:2] != ids.shape:
            raise broken(f"the output is {_describe(output[0])} for ids {list(ids.shape)}")
        return entering[0], tuple(calls)

    @torch.no_grad()
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Run the model on ids [b, T] with `hidden` [b, T, h] as its last block's output; return logits [b, T, V]."""
        last = len(self.blocks) - 1

        def forward(i: int, *args: Any, **kwargs: Any) -> Any:
            return self._as_returned(hidden if i == last else _split(args, kwargs)[0])

        with _blocks_replaced(self.blocks, forward):
            output = self.model(input_ids=ids, use_cache=False)
        logits: Tensor = output.logits
        return logits

    def _as_returned(self, hidden: Tensor) -> Any:
        # The others have a type that `record` refuses when the model hands them to the next block.
        return (hidden, *[_Unused()] * (self.returned - 1)) if self.returned else hidden


class NoChainError(InputError):
    """The model's blocks are not a chain of hidden states.

    Attributes:
        reached: how many blocks were called before that showed.
    """

    def __init__(self, label: str, why: str, reached: int) -> None:
        super().__init__(f"{label} cannot be taken block by block: {why}; choose another architecture")
        self.reached = reached


def find_recorder(
    model: PreTrainedModel, blocks: tuple[nn.Module, ...], label: str, device: torch.device
) -> CallRecorder:
    """Find out what the model expects its blocks to return: it must hand one's output to the next unchanged.

    Args:
        model: the model, its non-block tensors loaded, or zeros in their place.
        blocks: its blocks, in order.
        label: the model, for messages.
        device: device of the non-block tensors.

    Raises:
        NoChainError: no way gives a chain of hidden states.
    """
    failures: list[NoChainError] = []
    for returned in (0, 2, 3):
        recorder = CallRecorder(model, blocks, label, returned)
        try:
            recorder.record(torch.zeros(PROBE_SHAPE, dtype=torch.int64, device=device))
            return recorder
        except NoChainError as error:
            failures.append(error)
        except Exception as error:  # the wrong guess, or anything that an unusual model does without its blocks
            failures.append(NoChainError(label, first_line(error), reached=-1))
    # A wrong guess does not get as far; where two do, the first may have passed a tensor where a tuple was unpacked.
    raise max(reversed(failures), key=lambda failure: failure.reached)


class _Unused:
    """A stand-in for the values that a block returns beside hidden states."""


@contextmanager
def _blocks_replaced(blocks: tuple[nn.Module, ...], forward: Callable[..., Any]) -> Iterator[None]:
    """Have the call of block i run `forward(i, *args, **kwargs)`."""

    def stand_in(i: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: forward(i, *args, **kwargs)

    for i, block in enumerate(blocks):
        block.forward = stand_in(i)
    try:
        with quiet_transformers():
            yield
    finally:
        for block in blocks:
            del block.forward


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Call]:
    """Return the hidden states of a block's call, and the rest of it."""
    if args:
        return args[0], Call(args[1:], kwargs, positional=True)
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs.get("hidden_states"), Call((), rest, positional=False)


def _to_meta(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_to_meta(item) for item in value)
    return value.to("meta") if isinstance(value, Tensor) else value


def _is_plain(value: Any) -> bool:
    """Return True when a value can be replayed: no object that a block might write to for the next."""
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str | torch.dtype | torch.device)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return "what another returned beside it" if isinstance(value, _Unused) else f"a {type(value).__name__}"
