"""Arguments that a model calls its blocks with, recorded by running it with stand-ins that hand their input on."""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from streamslr.errors import InputError, first_line
from streamslr.model.carried import Carried
from streamslr.model.transformers_compat import quiet_transformers

log = logging.getLogger("streamslr")

_ABSENT = object()

PROBE_SHAPE = (2, 5)
"""Batch size and length of runs that only find something out: small, and unlike any size of a model."""

_OTHER_SHAPE = (3, 7)
"""Another such shape, to tell by what differs which axis of a tensor counts windows, and which tokens."""


@dataclass(frozen=True)
class Given:
    """Place in a call of a value that the model makes of the tokens; `number` as in `Carried.given`."""

    number: int


@dataclass(frozen=True)
class Shared:
    """Place in a call of a dict that blocks may write to for later ones; `number` as in `Carried.written`."""

    number: int
    initial: MutableMapping[Any, Any]

    def filled(self, written: Mapping[Any, Any]) -> MutableMapping[Any, Any]:
        """Return the dict as the model makes it, with what blocks have written there."""
        made = copy.copy(self.initial)
        made.update(written)
        return made


@dataclass(frozen=True)
class Beside:
    """Place in a call of what block `block` returns at `position`, beside its hidden states."""

    block: int
    position: int


@dataclass(frozen=True)
class Call:
    """Arguments of a call of a block, without the hidden states.

    What differs from window to window is not in it: there are `Given`, `Shared` and `Beside` in its place.

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

    def map(self, change: Callable[[str, Any], Any]) -> "Call":
        """Return the same call with `change`(name, value) in the place of each argument."""
        args = tuple(change(f"argument {n + 2}", value) for n, value in enumerate(self.args))
        return replace(self, args=args, kwargs={name: change(name, value) for name, value in self.kwargs.items()})

    def replay(self, block: nn.Module, hidden: Tensor, carried: Carried) -> tuple[Any, Carried]:
        """Call `block` with these arguments on other hidden states, as the model shapes them.

        Args:
            block: the block.
            hidden: the hidden states.
            carried: what enters the block beside them.

        Returns:
            What the block returns, and what is carried from it on, with all that it returned.
        """
        dicts: dict[int, tuple[MutableMapping[Any, Any], Shared]] = {}

        def fill(_: str, value: Any) -> Any:
            if isinstance(value, Given):
                return carried.given[value.number]
            if isinstance(value, Beside):
                return carried.beside[value.position]
            if isinstance(value, Shared):
                dicts[value.number] = value.filled(carried.written.get(value.number, {})), value
                return dicts[value.number][0]
            return value

        call = self.map(fill)
        if self.positional:
            output = block(hidden, *call.args, **call.kwargs)
        else:
            output = block(hidden_states=hidden, **call.kwargs)
        written = {
            number: {key: value for key, value in now.items() if value is not shared.initial.get(key, _ABSENT)}
            for number, (now, shared) in dicts.items()
        }
        returned = dict(enumerate(output)) if isinstance(output, tuple | list) else {}
        return output, Carried(carried.given, {**carried.written, **written}, returned)

    def to_meta(self) -> "Call":
        """Return the same call with every tensor on the meta device."""
        return self.map(lambda _, value: _to_meta(value))

    def difference(self, other: "Call") -> str | None:
        """Return the name of an argument that differs from `other`'s, or None."""
        mine, others = dict(self.values()), dict(other.values())
        for name in mine | others:
            if name not in mine or name not in others or not _same(mine[name], others[name]):
                return name
        return None


@dataclass(frozen=True)
class Recorded:
    """One run of a model without its blocks.

    Attributes:
        hidden: hidden states that enter block 0, as the model shapes them.
        calls: call of each block.
        given: what the model made of the tokens for some block, in the order of `CallRecorder.given`.
        output: what the model returned, without its head.
    """

    hidden: Tensor
    calls: tuple[Call, ...]
    given: tuple[Tensor, ...]
    output: Tensor


@dataclass(frozen=True)
class CallRecorder:
    """A model that runs without its blocks. Its non-block tensors must be loaded, or zeros in their place.

    Attributes:
        model: the model.
        blocks: its blocks, in order; they may be on the meta device.
        label: the model, for messages.
        returned: length of the tuple that a block returns, the hidden states first; 0 for hidden states alone.
        axes: axes of the hidden states that count windows and tokens.
        given: (block, name of the argument) of each value that depends on the tokens -> its number; one that several
            blocks are handed has one number.
    """

    model: PreTrainedModel
    blocks: tuple[nn.Module, ...]
    label: str
    returned: int
    axes: tuple[int, int] = (0, 1)
    given: Mapping[tuple[int, str], int] = field(default_factory=dict)

    @torch.no_grad()
    def record(self, ids: Tensor, hand_on: Callable[[int, Tensor], Tensor] = lambda i, hidden: hidden) -> Recorded:
        """Run the model without its head on ids [b, T], each block handing its input on.

        Args:
            ids: token ids, int64.
            hand_on: what block i returns for the hidden states that enter it.

        Raises:
            NoChainError: the blocks are no chain, or one is handed what cannot be carried from block to block.
        """
        calls: list[Call] = []
        entering: list[Tensor] = []
        returned: list[Tensor] = []
        given: dict[int, Any] = {}
        dicts: list[MutableMapping[Any, Any]] = []

        def broken(why: str) -> NoChainError:
            return NoChainError(self.label, why, reached=len(calls))

        def forward(i: int, *args: Any, **kwargs: Any) -> Any:
            if i != len(calls):
                raise broken(f"block {i} is called in place of block {len(calls)}")
            hidden, call = _split(args, kwargs)
            if not isinstance(hidden, Tensor) or self._counted(hidden) != tuple(ids.shape):
                raise broken(f"block {i} takes {_describe(hidden)} as hidden states for ids {list(ids.shape)}")
            if returned and not _is_view_of_all(hidden, returned[-1]):
                raise broken(f"the hidden states change between blocks {i - 1} and {i}")

            def place(name: str, value: Any) -> Any:
                if (i, name) in self.given:
                    number = self.given[i, name]
                    if not isinstance(value, Tensor) or given.setdefault(number, value) is not value:
                        raise broken(f"block {i} is handed {_describe(value)} as {name!r}, which depends on the tokens")
                    return Given(number)
                if isinstance(value, MutableMapping):
                    if not any(value is known for known in dicts):
                        dicts.append(value)
                    return Shared(next(n for n, known in enumerate(dicts) if known is value), value)
                if not _is_plain(value) and not (isinstance(value, Beside) and value.block == i - 1):
                    raise broken(f"blocks share state: block {i} is handed {_describe(value)} as {name!r}")
                return value

            entering.append(hidden)
            returned.append(hand_on(i, hidden))
            calls.append(call.map(place))
            return self._as_returned(returned[-1], i)

        with _blocks_replaced(self.blocks, forward):
            output = self.model.base_model(input_ids=ids, use_cache=False)
        if len(calls) != len(self.blocks):
            raise broken(f"only {len(calls)} of {len(self.blocks)} blocks are called")
        if output[0].shape[:2] != ids.shape:
            raise broken(f"the output is {_describe(output[0])} for ids {list(ids.shape)}")
        return Recorded(entering[0], tuple(calls), tuple(given[number] for number in sorted(given)), output[0])

    @torch.no_grad()
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Run the model on ids [b, T] with `hidden` as its last block's output, as the model shapes it.

        Returns:
            Logits [b, T, V].
        """
        last = len(self.blocks) - 1

        def forward(i: int, *args: Any, **kwargs: Any) -> Any:
            return self._as_returned(hidden if i == last else _split(args, kwargs)[0], i)

        with _blocks_replaced(self.blocks, forward):
            output = self.model(input_ids=ids, use_cache=False)
        logits: Tensor = output.logits
        return logits

    @torch.no_grad()
    def find_given(self, device: torch.device) -> "CallRecorder":
        """Return the recorder that tells apart the arguments which depend on the tokens.

        The floating-point non-block tensors must be NaN, so that all that is made of them is NaN, too.

        Args:
            device: device of the non-block tensors.
        """
        ids = torch.arange(PROBE_SHAPE[0] * PROBE_SHAPE[1], device=device).view(PROBE_SHAPE)
        try:
            recorded, other = (self.record(of, lambda i, hidden: hidden.clone()) for of in (ids % 2, 0 * ids))
        except Exception as error:  # an unusual model may do anything with NaN
            log.info("%s is taken to hand its blocks nothing made of the tokens: %s", self.label, first_line(error))
            return self
        values: list[Any] = []
        given = {}
        for i, (call, other_call) in enumerate(zip(recorded.calls, other.calls, strict=True)):
            for (name, value), (_, other_value) in zip(call.values(), other_call.values(), strict=True):
                if isinstance(value, Tensor) and not _same(value, other_value):  # NaN differs from itself
                    if not any(value is known for known in values):
                        values.append(value)
                    given[i, name] = next(n for n, known in enumerate(values) if known is value)
        return replace(self, given=given)

    def require_plain_chain(self, device: torch.device) -> None:
        """Check that the model uses what a block returns for the next block alone, and for the output the last one's.

        Args:
            device: device of the non-block tensors, which must not be NaN.

        Raises:
            NoChainError: it keeps what a block returned for a later block, or for the output.
        """
        ids, last = torch.zeros(PROBE_SHAPE, dtype=torch.int64, device=device), len(self.blocks) - 1

        def record(fill: float) -> Recorded:
            return self.record(ids, lambda i, hidden: torch.full_like(hidden, 0.0 if i == last else fill))

        finite, marked = record(0.0), record(math.nan)
        for (i, name), number in self.given.items():
            if not _has_nan(finite.given[number]) and _has_nan(marked.given[number]):
                why = f"block {i} is handed {name!r}, which the model makes of what an earlier block returned"
                raise NoChainError(self.label, why, reached=i)
        if not _has_nan(finite.output) and _has_nan(marked.output):
            raise NoChainError(self.label, "the model makes its output of what several blocks return", reached=last)

    def _counted(self, hidden: Tensor) -> tuple[int, ...]:
        """Return the windows and tokens that hidden states are for."""
        return tuple(hidden.shape[axis] for axis in self.axes if axis < hidden.dim() - 1)

    def _as_returned(self, hidden: Tensor, i: int) -> Any:
        return (hidden, *(Beside(i, position) for position in range(1, self.returned))) if self.returned else hidden


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
    ids = torch.zeros(PROBE_SHAPE, dtype=torch.int64, device=device)
    axes = _find_axes(model, blocks, device)
    for returned in (0, 2, 3):
        recorder = CallRecorder(model, blocks, label, returned, axes)
        try:
            recorder.record(ids)
            return recorder
        except NoChainError as error:
            failures.append(error)
        except Exception as error:  # the wrong guess, or anything that an unusual model does without its blocks
            failures.append(NoChainError(label, first_line(error), reached=-1))
    # A wrong guess does not get as far; where two do, the first may have passed a tensor where a tuple was unpacked.
    raise max(reversed(failures), key=lambda failure: failure.reached)


class _ReachedError(Exception):
    """Block 0 was called, with these hidden states."""


def _find_axes(model: PreTrainedModel, blocks: tuple[nn.Module, ...], device: torch.device) -> tuple[int, int]:
    """Return the axes of the hidden states that count windows and tokens; (0, 1) where they cannot be told."""

    def shape(of_ids: tuple[int, int]) -> tuple[int, ...]:
        def forward(i: int, *args: Any, **kwargs: Any) -> Any:
            raise _ReachedError(_split(args, kwargs)[0])

        with _blocks_replaced(blocks, forward), torch.no_grad():
            try:
                model.base_model(input_ids=torch.zeros(of_ids, dtype=torch.int64, device=device), use_cache=False)
            except _ReachedError as reached:
                return tuple(getattr(reached.args[0], "shape", ()))
            except Exception:  # an unusual model may do anything; `record` says so
                return ()
        return ()

    first = shape(PROBE_SHAPE)
    if len(first) == 3 and first[:2] == PROBE_SHAPE:
        return 0, 1
    pairs = list(zip(first, shape(_OTHER_SHAPE), strict=False))
    counting = [
        [axis for axis, pair in enumerate(pairs) if pair == sizes]
        for sizes in zip(PROBE_SHAPE, _OTHER_SHAPE, strict=True)
    ]
    return (counting[0][0], counting[1][0]) if all(len(axes) == 1 for axes in counting) else (0, 1)


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
    if isinstance(value, Shared):
        return replace(value, initial=value.filled({key: _to_meta(item) for key, item in value.initial.items()}))
    return value.to("meta") if isinstance(value, Tensor) else value


def _is_view_of_all(tensor: Tensor, other: Tensor) -> bool:
    """Tell if a tensor is another, or a slice of it that leaves nothing out."""
    same_numbers = tensor.data_ptr() == other.data_ptr() and tensor.stride() == other.stride()
    return tensor is other or (same_numbers and tensor.shape == other.shape and tensor.dtype == other.dtype)


def _has_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


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
    if isinstance(a, Shared) and isinstance(b, Shared):
        mine, others = a.initial, b.initial
        return a.number == b.number and mine.keys() == others.keys() and all(_same(mine[k], others[k]) for k in mine)
    return type(a) is type(b) and bool(a == b)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return "what another returned beside it" if isinstance(value, Beside) else f"a {type(value).__name__}"
