"""The blocks of a model as a chain: what enters each one, as a boundary holds it, and how the model calls it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from streamslr.errors import InputError, first_line
from streamslr.model.call_recorder import PROBE_SHAPE, Beside, Call, CallRecorder, Given, NoChainError, Shared
from streamslr.model.carried import Carried, Layout
from streamslr.model.transformers_compat import experts_on_meta

_CACHED_CALLS = 5
"""Batch shapes whose calls (masks, positions) are cached: whole and last micro-batch, in a pass and in matching; and
one window."""

_EXAMPLES = 1, 2
"""Windows of the two passes on the meta device that show what blocks hand on."""


class Chain:
    """The blocks in order, and what goes from each to the next.

    A boundary is a tensor [b, T, w]: the hidden states in its first h columns, several streams of them side by side,
    then what is carried beside them, in most models nothing.

    Attributes:
        hidden_size: width h of the hidden states.
    """

    def __init__(
        self,
        recorder: CallRecorder,
        stand_ins: Callable[[], AbstractContextManager[None]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Look at one small batch; no weight is needed.

        Args:
            recorder: the model without its blocks.
            stand_ins: put zeros in the place of non-block tensors that are not loaded, while entered.
            dtype: dtype of boundaries.
            device: device of the non-block tensors.

        Raises:
            NoChainError: blocks hand on what a boundary cannot hold.
        """
        self._recorder, self._stand_ins, self._dtype, self._device = recorder, stand_ins, dtype, device
        self._calls: dict[tuple[int, int], tuple[Call, ...]] = {}
        self._layouts: dict[int, tuple[Layout, ...]] = {}
        with stand_ins():
            probe = recorder.record(torch.zeros(PROBE_SHAPE, dtype=torch.int64, device=device))
        self._takes = tuple(tuple(value for _, value in call.values() if _is_carried(value)) for call in probe.calls)
        self._carries = any(self._takes)
        rest = [size for axis, size in enumerate(probe.hidden.shape) if axis not in recorder.axes]
        self._rest = torch.Size(rest)
        self.hidden_size = self._rest.numel()
        self.stream_dtype = dtype
        self.widths(PROBE_SHAPE[1])

    def widths(self, tokens: int) -> tuple[int, ...]:
        """Return the width w of each boundary, that behind the last block included, for windows of so many tokens.

        The blocks must be on the meta device, unless the length was asked for before.
        """
        if not self._carries:
            return (self.hidden_size,) * (len(self._takes) + 1)
        return tuple(self.hidden_size + layout.width for layout in self.layouts(tokens))

    def use_stream_dtype(self, dtype: torch.dtype) -> None:
        """Pass hidden states in this dtype through the blocks from here on."""
        self.stream_dtype = dtype
        self._layouts.clear()

    def calls(self, shape: tuple[int, int]) -> tuple[Call, ...]:
        """Return how the model calls each block on a batch of this shape [b, T]."""
        if shape not in self._calls:
            if len(self._calls) == _CACHED_CALLS:
                del self._calls[next(iter(self._calls))]
            with self._stand_ins():
                self._calls[shape] = self._recorder.record(self._zeros(shape)).calls
        return self._calls[shape]

    def embed(self, ids: Tensor) -> Tensor:
        """Return boundary 0 [b, T, w] for token ids [b, T]; the non-block tensors must be loaded.

        Raises:
            InputError: a block is called with values that depend on the tokens and are not carried.
        """
        calls, recorded = self.calls((ids.shape[0], ids.shape[1])), self._recorder.record(ids)
        for i, (call, call_with_tokens) in enumerate(zip(calls, recorded.calls, strict=True)):
            if name := call.difference(call_with_tokens):
                raise InputError(
                    f"{self._recorder.label} hands block {i} the value {name!r}, which depends on the tokens: such a "
                    f"model cannot be taken block by block"
                )
        carried = self._taken_from(0, Carried(dict(enumerate(recorded.given))))
        return self._joined(0, self._flat(recorded.hidden), carried)

    def run(self, i: int, entering: Tensor) -> tuple[Any, Carried]:
        """Pass what enters block i [b, T, w], which must be live, through it.

        Returns:
            What the block returns, and what is carried on beside it.
        """
        batch, tokens = entering.shape[:2]
        hidden, carried = self._apart(i, entering)
        return self.calls((batch, tokens))[i].replay(
            self._recorder.blocks[i], self._shaped(hidden.to(self.stream_dtype)), carried
        )

    def run_on_meta(self, i: int, dtype: torch.dtype) -> Any:
        """Pass a small batch without values, its hidden states in this dtype, through block i on the meta device."""
        entering = torch.empty(*PROBE_SHAPE, self.widths(PROBE_SHAPE[1])[i], dtype=self._dtype, device="meta")
        hidden, carried = self._apart(i, entering)
        call = self.calls(PROBE_SHAPE)[i].to_meta()
        return call.replay(self._recorder.blocks[i], self._shaped(hidden.to(dtype)), carried)[0]

    def hidden(self, i: int, output: Any) -> Tensor:
        """Return the hidden states [b, T, h] in what block i returned."""
        if isinstance(output, tuple | list) != bool(self._recorder.returned):
            raise InputError(f"block {i} of {self._recorder.label} returns a {type(output).__name__}: not supported")
        return self._flat(output[0] if isinstance(output, tuple | list) else output)

    def leaving(self, i: int, hidden: Tensor, carried: Carried) -> Tensor:
        """Return boundary i + 1 [b, T, w], given the hidden states [b, T, h] and what is carried behind block i."""
        return self._joined(i + 1, hidden, self._taken_from(i + 1, carried))

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return logits [b, T, V] for ids [b, T] and hidden states [b, T, h] that leave the last block."""
        return self._recorder.logits(ids, self._shaped(hidden))

    def layouts(self, tokens: int) -> tuple[Layout, ...]:
        """Return where each boundary holds what is carried, for windows of so many tokens."""
        if tokens not in self._layouts:
            one, two = (self._trace((windows, tokens)) for windows in _EXAMPLES)
            try:
                self._layouts[tokens] = tuple(
                    Layout.of(*pair, tokens, self._dtype) for pair in zip(one, two, strict=True)
                )
            except ValueError as error:
                raise NoChainError(self._recorder.label, str(error), reached=len(one)) from error
        return self._layouts[tokens]

    @torch.no_grad()
    def _trace(self, shape: tuple[int, int]) -> list[Carried]:
        """Return what is carried into each block and behind the last for a batch of this shape, on the meta device."""
        with self._stand_ins():
            recorded = self._recorder.record(self._zeros(shape))
        carried = Carried({number: value.to("meta") for number, value in enumerate(recorded.given)})
        hidden = recorded.hidden.to("meta", self.stream_dtype)
        found = [self._taken_from(0, carried)]
        with experts_on_meta(self._recorder.model):
            for i, call in enumerate(recorded.calls):
                try:
                    _, carried = call.to_meta().replay(self._recorder.blocks[i], hidden, found[i])
                except Exception as error:  # a block's code may do anything
                    why = f"blocks share state, and block {i} does not run on the meta device ({first_line(error)})"
                    raise NoChainError(self._recorder.label, why, reached=i) from error
                found.append(self._taken_from(i + 1, carried))
        return found

    def _taken_from(self, i: int, carried: Carried) -> Carried:
        """Return the part of what is carried that block i or a later one takes."""
        later = [value for takes in self._takes[i:] for value in takes]
        given = {value.number for value in later if isinstance(value, Given)}
        shared = {value.number for value in later if isinstance(value, Shared)}
        beside = {value.position for takes in self._takes[i : i + 1] for value in takes if isinstance(value, Beside)}
        return Carried(
            {number: value for number, value in carried.given.items() if number in given},
            {number: written for number, written in carried.written.items() if number in shared and written},
            {position: value for position, value in carried.beside.items() if position in beside},
        )

    def _joined(self, i: int, hidden: Tensor, carried: Carried) -> Tensor:
        """Return boundary i [b, T, w] of hidden states [b, T, h] and what is carried."""
        layout = self.layouts(hidden.shape[1])[i] if self._carries else None
        if layout is None or not layout.width:
            return hidden
        with self._refusing():
            return torch.cat([hidden.to(self._dtype), layout.pack(carried, len(hidden))], -1)

    def _apart(self, i: int, entering: Tensor) -> tuple[Tensor, Carried]:
        """Return the hidden states [b, T, h] of boundary i, and what is carried."""
        if not self._carries:
            return entering, Carried()
        hidden, columns = entering[..., : self.hidden_size], entering[..., self.hidden_size :]
        with self._refusing():
            return hidden.contiguous(), self.layouts(entering.shape[1])[i].unpack(columns)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Give a value that does not fit its columns the model's name."""
        try:
            yield
        except ValueError as error:
            raise InputError(
                f"{self._recorder.label} cannot be taken block by block: {error}; what was finished is kept, but "
                f"choose another model"
            ) from error

    def _flat(self, hidden: Tensor) -> Tensor:
        """Return hidden states as the model shapes them as [b, T, h]."""
        if len(self._rest) == 1 and self._recorder.axes == (0, 1):
            return hidden
        rows = hidden.movedim(self._recorder.axes, (0, 1))
        return rows.reshape(*rows.shape[:2], self.hidden_size)

    def _shaped(self, hidden: Tensor) -> Tensor:
        """Return hidden states [b, T, h] as the model shapes them."""
        if len(self._rest) == 1 and self._recorder.axes == (0, 1):
            return hidden
        return hidden.reshape(*hidden.shape[:2], *self._rest).movedim((0, 1), self._recorder.axes).contiguous()

    def _zeros(self, shape: tuple[int, int]) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)


def _is_carried(value: Any) -> bool:
    """Tell if an argument of a call differs from window to window."""
    return isinstance(value, Given | Beside | Shared)
