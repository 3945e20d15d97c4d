"""State that blocks hand on beside hidden states (shared keys and values, their inputs), as columns of a boundary."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Carried:
    """Values that enter a block beside its hidden states, for the windows of one batch.

    Attributes:
        given: number -> a value that the model makes of the tokens before block 0, and hands to some block.
        written: number of a dict that blocks share -> what blocks have written there so far, by key.
        beside: place in what the block before returned -> what it returned there.
    """

    given: Mapping[int, Tensor] = field(default_factory=dict)
    written: Mapping[int, Mapping[Any, Any]] = field(default_factory=dict)
    beside: Mapping[int, Any] = field(default_factory=dict)

    def flatten(self) -> tuple[list[Any], TreeSpec]:
        """Return the tensors and constants that this consists of, and its structure."""
        return tree_flatten((dict(self.given), {n: dict(d) for n, d in self.written.items()}, dict(self.beside)))


@dataclass(frozen=True)
class _Columns:
    """Place of one tensor among the columns of a boundary.

    Attributes:
        axes: axes of the tensor that count windows and tokens.
        shared: all windows have one tensor in common (RoFormer's positions); `axes` then count one more axis before it.
        rest: its shape without these.
        dtype: its dtype.
        start: first column.
        width: number of columns.
    """

    axes: tuple[int, int]
    shared: bool
    rest: tuple[int, ...]
    dtype: torch.dtype
    start: int
    width: int


@dataclass(frozen=True)
class Layout:
    """Columns [b, T, width] that hold what is carried into one block, bit for bit, whatever its dtypes.

    Attributes:
        spec: structure of what is carried.
        leaves: `_Columns` of each tensor in it, or the constant.
        dtype: dtype of the columns.
        width: number of columns.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]
    dtype: torch.dtype
    width: int

    @classmethod
    def of(cls, one: Carried, two: Carried, tokens: int, dtype: torch.dtype) -> "Layout":
        """Lay out what is carried into a block, given examples of one and of two windows of `tokens` tokens.

        Raises:
            ValueError: a value does not have a part for each token of each window.
        """
        (some, spec), (others, other_spec) = one.flatten(), two.flatten()
        if spec != other_spec:
            raise ValueError("what blocks hand on depends on the number of windows")
        leaves, start = list[Any](), 0
        for tensor, other in zip(some, others, strict=True):
            if not isinstance(tensor, Tensor):
                if not (tensor is None or isinstance(tensor, bool | int | float | str)) or tensor != other:
                    raise ValueError(f"blocks hand on a {type(tensor).__name__}")
                leaves.append(tensor)
                continue
            shared = tensor.shape == other.shape
            shape, other_shape = (((n,) if shared else ()) + tuple(t.shape) for n, t in ((1, tensor), (2, other)))
            axes = _axes(shape, other_shape, tokens)
            rest = tuple(size for axis, size in enumerate(shape) if axis not in axes)
            width = -(-math.prod(rest) * tensor.dtype.itemsize // dtype.itemsize)
            leaves.append(_Columns(axes, shared, rest, tensor.dtype, start, width))
            start += width
        return cls(spec, tuple(leaves), dtype, start)

    def pack(self, carried: Carried, windows: int) -> Tensor:
        """Return the columns [b, T, width] for what is carried beside b = `windows` windows.

        Raises:
            ValueError: it has another structure, shape or dtype than this layout.
        """
        tensors, spec = carried.flatten()
        if spec != self.spec:
            raise ValueError("a block hands on other values than it did on the meta device")
        pairs = [pair for pair in zip(tensors, self.leaves, strict=True) if isinstance(pair[1], _Columns)]
        return torch.cat([self._to_columns(tensor, place, windows) for tensor, place in pairs], -1)

    def unpack(self, columns: Tensor) -> Carried:
        """Return what is carried from its columns [b, T, width].

        Raises:
            ValueError: a tensor that the windows have in common differs from window to window.
        """
        values = [self._from_columns(columns, leaf) if isinstance(leaf, _Columns) else leaf for leaf in self.leaves]
        return Carried(*tree_unflatten(values, self.spec))

    def _to_columns(self, tensor: Tensor, place: _Columns, windows: int) -> Tensor:
        if place.shared:
            tensor = tensor.expand(windows, *tensor.shape)
        rows = tensor.movedim(place.axes, (0, 1))
        if tensor.dtype != place.dtype or tuple(rows.shape[2:]) != place.rest:
            raise ValueError(
                f"a block hands on {tensor.dtype} {list(tensor.shape)}, on the meta device it was {place.dtype} with "
                f"{list(place.rest)} for each token"
            )
        rows = rows.reshape(*rows.shape[:2], math.prod(place.rest))
        if tensor.dtype == self.dtype:
            return rows
        bytes_ = rows.contiguous().view(torch.uint8)
        missing = place.width * self.dtype.itemsize - bytes_.shape[-1]
        return torch.nn.functional.pad(bytes_, (0, missing)).view(self.dtype)

    def _from_columns(self, columns: Tensor, place: _Columns) -> Tensor:
        rows = columns[..., place.start : place.start + place.width]
        if place.shared and not rows.is_meta and not torch.equal(rows, rows[:1].expand_as(rows)):
            raise ValueError(f"blocks hand on a tensor {list(place.rest)} that depends on which windows pass together")
        if place.dtype != self.dtype:
            bytes_ = rows.clone(memory_format=torch.contiguous_format).view(torch.uint8)
            rows = bytes_[..., : math.prod(place.rest) * place.dtype.itemsize].contiguous().view(place.dtype)
        tensor = rows.reshape(*rows.shape[:2], *place.rest).movedim((0, 1), place.axes)
        return (tensor[0] if place.shared else tensor).contiguous()


def _axes(one: tuple[int, ...], two: tuple[int, ...], tokens: int) -> tuple[int, int]:
    """Return the axes that count windows and tokens of a tensor, given its shapes for one and for two windows."""
    differ = [axis for axis, sizes in enumerate(zip(one, two, strict=False)) if sizes == (1, 2)]
    if len(differ) == 1 and len(one) == len(two):
        by_token = [axis for axis, size in enumerate(one) if size == tokens and axis != differ[0]]
        if by_token:
            return differ[0], by_token[0]
    raise ValueError(f"blocks hand on a tensor {list(one)}, which has no part for each of {tokens} tokens")
