"""Masters of one linear, and those of a block's norms and biases: their gradients, and how they reach the block."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from streamslr.gpu import in_any_order
from streamslr.io.low_rank import pack_low_rank, unpack_low_rank
from streamslr.io.packed_layout import count_values, value_format
from streamslr.io.packing import stored_columns, unpack, unpack_codes
from streamslr.masters import Flat, MatchSettings
from streamslr.spec.pattern import SparsityPattern
from streamslr.spec.values import group_columns, sum_groups

TILE = 1 << 24
"""Elements of a dense weight's gradient that exist at once: 64 MB in float32, and enough rows for a fast product."""


class LinearMasters:
    """Float32 masters of one linear [o, d]: its kept values [nnz], U [o, r], V [r, d], and scales where S has a grid.

    Values on a grid are trained straight through (Bengio et al., arXiv 1308.3432). A master is a code times the scale
    that its group began with; products take the nearest code times the scale as it is now, and the gradient of that is
    the master's. A scale's gradient is the sum over its group of code times gradient. Codes whose gradients are small
    beside their noise flip back and forth; once an epoch's loss is above the last one's, codes stay as they are, and
    the rest is trained on (tools/results/matching.md, "Values on a grid"). U and V that are stored as codes are trained
    as numbers, and rounded once at the end.
    """

    def __init__(self, linear: nn.Linear, stored: Mapping[str, Tensor], pattern: SparsityPattern, flat: Flat) -> None:
        """Copy the parts of a packed linear into a flat of `master_shapes`."""
        self.linear, self._stored, self.flat, self._alone = linear, stored, flat, flat.bundle.alone
        parts = on_device(linear.weight.device, stored)
        o, d = linear.out_features, linear.in_features
        mask = stored_columns(parts["meta"], pattern, d)
        self._format = value_format(parts, d)
        values = parts["values"].flatten() if self._format is None else unpack(parts, pattern, (o, d))[mask]
        U, V = unpack_low_rank(parts) or (linear.weight.new_zeros(o, 0), linear.weight.new_zeros(0, d))
        self._first_scales = parts["scales"].float() if self._format else None
        flat.fill([values, U, V, *([parts["scales"]] if self._format else [])])
        if self._alone:
            _, self._U, self._V, *_ = flat.views(flat.bundle.own)
        else:
            self._U, self._V = (factor.to(linear.weight.dtype, copy=True) for factor in (U, V))
        self._trained = flat.bundle.own.detach().requires_grad_()  # products take it, so that they have gradients
        empty = values == 0  # slots that the solver left empty stay so; on a grid they cannot be told from a zero code
        self._empty = empty if self._format is None and bool(empty.any()) else None
        kept_values = values if self._empty is None else values[~empty]
        self.values_rms = rms_of(kept_values.float())
        self.kept_per_row = max(1.0, len(kept_values) / o)
        self._codes: Tensor | None = None  # as products take them
        if self._format:
            self._codes = unpack_codes(parts, pattern, (o, d))[mask].to(self._format.code_dtype)
        self._tiles = []  # (rows of W, their part of `values`, positions of those values in the flat rows)
        first = 0
        for start in range(0, o, step := max(1, TILE // d)):
            positions = mask[start : start + step].flatten().nonzero().flatten().int()
            self._tiles.append((slice(start, start + step), slice(first, first + len(positions)), positions))
            first += len(positions)

    @property
    def on_grid(self) -> bool:
        """True where the values of S lie on a grid."""
        return self._format is not None

    def learning_rates(self, settings: MatchSettings) -> list[float]:
        """Return the learning rate of each master at a relative block loss of 1."""
        rate = settings.lr * self.values_rms / math.sqrt(self.kept_per_row)
        low_rank = settings.low_rank_lr_ratio * rate
        rates = [rate, low_rank, low_rank]
        if self._first_scales is not None:
            rms, groups = rms_of(self._first_scales), self._first_scales.shape[1]
            rates.append(settings.scale_lr_ratio * settings.lr * rms / math.sqrt(groups))
        return rates

    @contextmanager
    def training(self) -> Iterator[None]:
        """Make backward passes through the linear add to the masters' gradients while entered."""

        def forward(x: Tensor) -> Tensor:
            y: Tensor = _Product.apply(x, self._trained, self.linear.bias, self)  # type: ignore[no-untyped-call]
            return y

        self.linear.forward = forward  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            del self.linear.forward

    def add_gradients(self, grad: Tensor, x: Tensor, gradients: Sequence[Tensor]) -> None:
        """Add to the masters' `gradients` those of y = x Wᵀ, for `grad` [n, o] of y and x [n, d]."""
        of_values, of_U, of_V, *of_scales = gradients
        V = self._V.to(x.dtype)
        for rows, span, positions in self._tiles:
            tile = grad[:, rows].t() @ x  # [rows, d], gradient of the dense weight
            values = tile.view(-1).index_select(0, positions)
            if self._empty is not None:
                values.masked_fill_(self._empty[span], 0)
            of_values[span] += values
            if self._codes is not None:
                of_scales[0][rows] += self._sum_groups(values * self._codes[span].float(), positions, len(tile))
            if len(V):
                of_U[rows] += tile @ V.t()
                of_V += self._U[rows].to(x.dtype).t() @ tile

    @torch.no_grad()
    def write_to_block(self, masters: Sequence[Tensor]) -> None:
        """Write S + U·V into the dense weight that products read."""
        kept, U, V, *scales = masters
        for rows, span, positions in self._tiles:
            tile = U[rows] @ V  # [rows, d] float32
            values = kept[span]
            if self._codes is not None:
                codes = self._nearest(values, rows, positions)
                self._codes[span] = codes.to(self._codes.dtype)
                values = codes.mul_(
                    self._scales_of(scales[0][rows].to(self._stored["scales"].dtype).float(), positions)
                )
            tile.view(-1).index_add_(0, positions, values)
            self.linear.weight[rows].copy_(tile)
        if not self._alone:
            self._U.copy_(U)
            self._V.copy_(V)

    def stored(self, masters: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the linear's parts as `pack` stores them."""
        trained = dict(zip(("values", "U", "V", "scales"), masters, strict=False))
        if self._format:
            nearest = [self._nearest(trained["values"][span], rows, positions) for rows, span, positions in self._tiles]
            codes = torch.cat(nearest)
            per_row = self._stored["values"].dim() == 2
            trained["values"] = self._format.encode(codes.view(len(self._stored["values"]), -1) if per_row else codes)
        if "low_rank_scales" in self._stored:
            scales = self._stored["low_rank_scales"]
            trained |= pack_low_rank(trained["U"], trained["V"], scales.dtype, torch.int8)
        return {
            name: trained[name].to(part.device, part.dtype, copy=not self._alone).view_as(part)
            if name in trained
            else part
            for name, part in self._stored.items()
        }

    def _nearest(self, values: Tensor, rows: slice, positions: Tensor) -> Tensor:
        """Return the nearest code of each of a tile's masters, in the scales that their groups began with."""
        assert self._format is not None
        assert self._first_scales is not None
        return self._format.nearest(values / self._scales_of(self._first_scales[rows], positions))

    def _scales_of(self, scales: Tensor, positions: Tensor) -> Tensor:
        """Return of scales [rows, groups] that of each position in the flat rows."""
        d, groups = self.linear.in_features, scales.shape[1]
        return scales.flatten()[positions // d * groups + positions % d // group_columns(d, groups)]

    def _sum_groups(self, numbers: Tensor, positions: Tensor, rows: int) -> Tensor:
        """Return the sums of a tile's numbers over the groups of each row, [rows, groups]."""
        assert self._first_scales is not None
        dense = numbers.new_zeros(rows * self.linear.in_features)
        with in_any_order():  # no position twice; in a fixed order CUDA would sort them
            dense.index_copy_(0, positions.long(), numbers)
        return sum_groups(dense.view(rows, -1), self._first_scales.shape[1])


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b. The masters' gradients are made of what its backward pass gets, never by a whole gradient of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trained: Tensor, bias: Tensor | None, linear: LinearMasters) -> Tensor:
        ctx.linear, ctx.has_bias = linear, bias is not None
        ctx.save_for_backward(x)
        return nn.functional.linear(x, linear.linear.weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # [n, o]
        ctx.linear.flat.add(partial(ctx.linear.add_gradients, rows, x.flatten(0, -2)))
        of_x = grad @ ctx.linear.linear.weight if ctx.needs_input_grad[0] else None
        return of_x, None, rows.sum(0) if ctx.has_bias else None, None


class VectorMasters:
    """Float32 masters of norms' weights and of biases."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        stored: Sequence[Tensor],
        output_rms: Sequence[float],
        flat: Flat,
    ) -> None:
        """Copy the stored tensors of these parameters; output_rms: of the norm or linear that each belongs to."""
        self._parameters, self._output_rms, self._alone = parameters, output_rms, flat.bundle.alone
        self._dtypes = [tensor.dtype for tensor in stored]
        self.flat = flat
        flat.fill(stored)

    @property
    def on_grid(self) -> bool:
        """False: norms and biases have no grid."""
        return False

    def learning_rates(self, settings: MatchSettings) -> list[float]:
        """Return the learning rate of each master at a relative block loss of 1."""
        return [settings.lr * settings.vector_lr_ratio * rms for rms in self._output_rms]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Make backward passes through the parameters add to the masters' gradients while entered."""

        def move(index: int, parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None

            def add(gradients: Sequence[Tensor]) -> None:
                gradients[index].add_(gradient)

            self.flat.add(add)

        with ExitStack() as entered:
            for index, parameter in enumerate(self._parameters.values()):
                parameter.requires_grad_(True)
                entered.callback(parameter.requires_grad_, False)
                hook = parameter.register_post_accumulate_grad_hook(partial(move, index))  # type: ignore[no-untyped-call]
                entered.callback(hook.remove)
            yield

    @torch.no_grad()
    def write_to_block(self, masters: Sequence[Tensor]) -> None:
        """Write the masters into the parameters."""
        for parameter, master in zip(self._parameters.values(), masters, strict=True):
            parameter.copy_(master)

    def stored(self, masters: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the masters as they are stored, by the names of the parameters."""
        return {
            name: master.to(dtype, copy=not self._alone)
            for name, master, dtype in zip(self._parameters, masters, self._dtypes, strict=True)
        }


def master_shapes(
    stored: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]
) -> list[tuple[int, ...]]:
    """Return the shapes of the masters of a linear [o, d]: kept values, U, V, and scales where it has any."""
    o, d = shape
    rank = stored["U"].shape[1] if "U" in stored else 0
    scales = [tuple(stored["scales"].shape)] if "scales" in stored else []
    return [(count_values(stored, pattern, shape),), (o, rank), (rank, d), *scales]


def on_device(device: torch.device, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parts of a linear on a device."""
    return {name: part.to(device) for name, part in parts.items()}


def rms_of(tensor: Tensor) -> float:
    """Return the root of the mean square of a tensor; 0 of an empty one."""
    return float(tensor.detach().square().mean().sqrt()) if tensor.numel() else 0.0
