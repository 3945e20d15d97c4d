"""Masters of a block in matching: float32 copies of what is trained, their gradients, Adam; each shared over ranks."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, cycle
from typing import Any

import torch
from torch import Tensor, nn

from streamslr.io.low_rank import pack_low_rank, unpack_low_rank
from streamslr.io.packed_layout import value_format
from streamslr.io.packing import stored_columns, unpack, unpack_codes
from streamslr.ranks import Ranks
from streamslr.spec.pattern import SparsityPattern
from streamslr.spec.values import group_columns, sum_groups

TILE = 1 << 24
"""Elements of a dense weight's gradient that exist at once: 64 MB in float32, and enough rows for a fast product."""

_ALIGNED = 128
"""Numbers in float32 that masters are aligned to, 512 bytes: the last bits of a product may depend on the address."""

EXCHANGED_AT_ONCE = 2
"""Buffers, each for all masters of a linear or their gradients, in a match over ranks: one under way, one in use."""

_FULL_RATE_STEPS = 100
"""Steps from which learning rates are whole; fewer take the root of their share, since Adam's first steps move every
value by its whole rate, whatever its gradient (tools/results/matching.md, "Few steps")."""


@dataclass(frozen=True)
class MatchSettings:
    """Settings of matching: Adam on ‖f̂(X) − T‖² over all parts of a block at once (3BASiL-TM, arXiv 2603.01376).

    epochs: passes over the windows; the first one only measures.
    batch: windows in one step.
    lr: learning rate of the kept values, multiplied by sqrt(relative block loss) · rms(values) / sqrt(kept values per
        row). One Adam step then changes a linear's output by about lr · sqrt(relative block loss) of its size, at any
        width (muP, arXiv 2203.03466). Fewer than 100 steps take less (`_FULL_RATE_STEPS`).
    low_rank_lr_ratio: learning rate of U and V, relative to that of the linear's kept values.
    scale_lr_ratio: learning rate of the scales of values on a grid, relative to `lr` · sqrt(relative block loss) ·
        rms(scales) / sqrt(scales per row).
    vector_lr_ratio: learning rate of norms and biases, relative to `lr` and multiplied by sqrt(relative block loss) ·
        rms(output of the norm or linear for inputs of rms 1).
    final_lr_ratio: fraction of each learning rate that is left at the end of a cosine, as in the paper's code.
    seed: seed of the order of the steps.
    """

    epochs: int
    batch: int
    lr: float
    low_rank_lr_ratio: float = 0.3
    scale_lr_ratio: float = 0.1
    vector_lr_ratio: float = 1 / 120
    final_lr_ratio: float = 0.2
    seed: int = 0

    def lr_factor(self, done: float) -> float:
        """Return the factor of all learning rates when the fraction `done` of the steps is done."""
        return self.final_lr_ratio + (1 - self.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class BlockWeights:
    """All that a compressed block stores, by full names: its packed linears, and its other parameters and buffers."""

    packed: Mapping[str, Mapping[str, Tensor]]
    other_tensors: Mapping[str, Tensor]


class Flat:
    """Float32 masters one behind the other, and their gradients. Rank r holds and steps the r-th share of both.

    Attributes:
        own: [c], this rank's share of the masters, with its gradient; alone, all of them. Each master begins at a
            multiple of 512 bytes, as a tensor of its own would.
        length: world · c.
    """

    def __init__(self, sources: Sequence[Tensor], ranks: Ranks) -> None:
        """Lay out masters of the shapes of the sources."""
        self._ranks, self._shapes = ranks, [source.shape for source in sources]
        self._starts = [0, *accumulate(_round_up(source.numel(), _ALIGNED) for source in sources)]
        self._share = _round_up(-(-self._starts[-1] // ranks.world), _ALIGNED)
        self.length = self._share * ranks.world
        numbers = sources[0].new_zeros(self.length, dtype=torch.float32)
        for master, source in zip(self.views(numbers), sources, strict=True):
            master.copy_(source)
        self.own = numbers if ranks.world == 1 else self._own(numbers).clone()
        self.own.grad = torch.zeros_like(self.own)
        self._adding: list[Callable[[Sequence[Tensor]], None]] = []

    def views(self, numbers: Tensor) -> list[Tensor]:
        """Return what of [length] numbers belongs to each master, in the shapes of the masters."""
        return [
            numbers[start : start + shape.numel()].view(shape)
            for start, shape in zip(self._starts, self._shapes, strict=False)
        ]

    def own_part(self, index: int) -> Tensor | None:
        """Return the numbers of a master that lie in this rank's share, with their gradients."""
        first = self._ranks.rank * self._share
        start, stop = self._starts[index] - first, self._starts[index] + self._shapes[index].numel() - first
        part = slice(max(0, start), min(stop, self._share))
        if part.start >= part.stop:
            return None
        own = self.own[part]
        own.grad = self._own_gradients[part]
        return own

    def add(self, gradients: Callable[[Sequence[Tensor]], None]) -> None:
        """Call a function that adds to the masters' gradients: at once, or with others when `put_gradients` is."""
        if self._ranks.world == 1:
            gradients(self.views(self._own_gradients))
        else:
            self._adding.append(gradients)

    def put_gradients(self, numbers: Tensor) -> None:
        """Put this rank's gradients of a micro-batch into [length] numbers."""
        adding, self._adding = self._adding, []
        numbers.zero_()
        for gradients in adding:
            gradients(self.views(numbers))

    def add_own_gradients(self, numbers: Tensor) -> None:
        """Add this rank's share of [length] gradients."""
        self._own_gradients.add_(self._own(numbers))

    def put_own(self, numbers: Tensor) -> None:
        """Put this rank's share of the masters into its place in [length] numbers."""
        self._own(numbers).copy_(self.own)

    @property
    def _own_gradients(self) -> Tensor:
        assert self.own.grad is not None
        return self.own.grad

    def _own(self, numbers: Tensor) -> Tensor:
        return numbers.view(self._ranks.world, self._share)[self._ranks.rank]


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class Masters:
    """Masters of a block in training."""

    def __init__(self, linears: Mapping[str, "LinearMasters"], vectors: "VectorMasters | None", ranks: Ranks) -> None:
        """Hold the masters of linears, by name, and those of vectors, if there are any."""
        self._linear_names, self._has_vectors, self._ranks = list(linears), vectors is not None, ranks
        self._all: list[LinearMasters | VectorMasters] = [*linears.values(), *([vectors] if vectors else [])]
        largest = max((master.flat for master in self._all), key=lambda flat: flat.length)
        count = EXCHANGED_AT_ONCE if ranks.world > 1 else 0
        self._buffers = [largest.own.new_empty(largest.length) for _ in range(count)]

    def own_rates(self, settings: MatchSettings) -> list[tuple[Tensor, float, bool]]:
        """Return the parts of the masters that this rank steps.

        Each comes with its learning rate at a relative loss of 1, and with True for values on a grid.
        """
        rated = [
            (m.flat.own_part(i), rate, i == 0 and isinstance(m, LinearMasters) and m.on_grid)
            for m in self._all
            for i, rate in enumerate(m.learning_rates(settings))
        ]
        return [(part, rate, on_grid) for part, rate, on_grid in rated if part is not None]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Make backward passes through the block add to the masters' gradients while entered."""
        with ExitStack() as entered:
            for master in self._all:
                entered.enter_context(master.training())
            yield

    def sum_gradients(self) -> None:
        """Sum the gradients of a micro-batch over ranks; each rank adds its share."""
        if self._ranks.world > 1:
            self._exchange(
                lambda master, numbers: master.flat.put_gradients(numbers),
                self._ranks.sum_into_shares,
                lambda master, numbers: master.flat.add_own_gradients(numbers),
            )

    def write_to_block(self) -> None:
        """Write the masters of all ranks into the live block."""
        self._collect(lambda master, numbers: master.write_to_block(master.flat.views(numbers)))

    def weights(self, before: BlockWeights) -> BlockWeights:
        """Return the masters of all ranks as they are stored, with what `before` has beside them."""
        stored: list[Mapping[str, Tensor]] = []  # of the linears, and then of the vectors
        self._collect(lambda master, numbers: stored.append(master.stored(master.flat.views(numbers))))
        vectors = stored[-1] if self._has_vectors else {}
        packed = dict(zip(self._linear_names, stored, strict=False))
        return BlockWeights(packed, {**before.other_tensors, **vectors})

    def _collect(self, take: Callable[["LinearMasters | VectorMasters", Tensor], None]) -> None:
        """Call `take` with each linear's masters, and with the vectors', and the [length] numbers of all ranks."""
        if self._ranks.world == 1:
            for master in self._all:
                take(master, master.flat.own)
            return
        self._exchange(lambda master, numbers: master.flat.put_own(numbers), self._ranks.collect_shares, take)

    def _exchange(
        self,
        put: Callable[["LinearMasters | VectorMasters", Tensor], None],
        begin: Callable[[Tensor], Callable[[], None]],
        take: Callable[["LinearMasters | VectorMasters", Tensor], None],
    ) -> None:
        """Exchange [length] numbers of each master: `put` fills them, `begin` exchanges them, `take` uses them.

        One is under way while the next is filled. All are exchanged, in one order, even where `put` or `take` fails,
        since other ranks wait for them; the first error is raised at the end.
        """
        failed: list[Exception] = []
        under_way: deque[tuple[LinearMasters | VectorMasters, Tensor, Callable[[], None]]] = deque()

        def attempt(
            work: Callable[[LinearMasters | VectorMasters, Tensor], None],
            master: LinearMasters | VectorMasters,
            numbers: Tensor,
        ) -> None:
            try:
                work(master, numbers)
            except (MemoryError, RuntimeError) as error:
                failed.append(error)

        def finish() -> None:
            master, numbers, wait = under_way.popleft()
            wait()
            attempt(take, master, numbers)

        for master, buffer in zip(self._all, cycle(self._buffers), strict=False):
            if len(under_way) == len(self._buffers):
                finish()
            numbers = buffer[: master.flat.length]
            attempt(put, master, numbers)
            under_way.append((master, numbers, begin(numbers)))
        while under_way:
            finish()
        if failed:
            raise failed[0]


class Optimizer:
    """Adam over this rank's share of all masters, each with its learning rate, which falls from step to step."""

    def __init__(self, masters: Masters, settings: MatchSettings, relative_loss: float, steps: int) -> None:
        """Build Adam's groups. relative_loss: of the block before training; steps: all that will be taken."""
        lacking = math.sqrt(relative_loss * min(1.0, steps / _FULL_RATE_STEPS))
        groups = [
            {"params": [part], "first_lr": lacking * rate, "on_grid": on_grid}
            for part, rate, on_grid in masters.own_rates(settings)
        ]
        self._adam = torch.optim.Adam(groups, fused=True) if groups else None  # a tiny block has not enough for all
        self._masters = masters
        self._settings, self._taken, self._steps = settings, 0, steps

    def hold_codes(self) -> None:
        """Leave values on a grid at their codes from here on."""
        for group in self._adam.param_groups if self._adam else ():
            if group["on_grid"]:
                group["first_lr"] = 0.0

    def step(self) -> None:
        """Take one step, zero the gradients, and write the masters into the block."""
        factor = self._settings.lr_factor(self._taken / self._steps)
        self._taken += 1
        try:
            if self._adam:
                for group in self._adam.param_groups:
                    group["lr"] = group["first_lr"] * factor
                self._adam.step()
                self._adam.zero_grad(set_to_none=False)
        finally:  # other ranks wait for this one's masters
            self._masters.write_to_block()


class LinearMasters:
    """Float32 masters of one linear [o, d]: its kept values [nnz], U [o, r], V [r, d], and scales where S has a grid.

    Values on a grid are trained straight through (Bengio et al., arXiv 1308.3432). A master is a code times the scale
    that its group began with; products take the nearest code times the scale as it is now, and the gradient of that is
    the master's. A scale's gradient is the sum over its group of code times gradient. Codes whose gradients are small
    beside their noise flip back and forth; once an epoch's loss is above the last one's, codes stay as they are, and
    the rest is trained on (tools/results/matching.md, "Values on a grid"). U and V that are stored as codes are trained
    as numbers, and rounded once at the end.
    """

    def __init__(self, linear: nn.Linear, stored: Mapping[str, Tensor], pattern: SparsityPattern, ranks: Ranks) -> None:
        self.linear, self._stored, self._alone = linear, stored, ranks.world == 1
        parts = on_device(linear.weight.device, stored)
        o, d = linear.out_features, linear.in_features
        mask = stored_columns(parts["meta"], pattern, d)
        self._format = value_format(parts, d)
        values = parts["values"].flatten() if self._format is None else unpack(parts, pattern, (o, d))[mask]
        U, V = unpack_low_rank(parts) or (linear.weight.new_zeros(o, 0), linear.weight.new_zeros(0, d))
        self._first_scales = parts["scales"].float() if self._format else None
        self.flat = Flat([values, U, V, *([parts["scales"]] if self._format else [])], ranks)
        if self._alone:
            _, self._U, self._V, *_ = self.flat.views(self.flat.own)
        else:
            self._U, self._V = (factor.to(linear.weight.dtype, copy=True) for factor in (U, V))
        self._trained = self.flat.own.detach().requires_grad_()  # an input of products, so that they require a gradient
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
        dense = numbers.new_zeros(rows * self.linear.in_features).index_copy_(0, positions.long(), numbers)
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
        ranks: Ranks,
    ) -> None:
        """Copy the stored tensors of these parameters; output_rms: of the norm or linear that each belongs to."""
        self._parameters, self._output_rms, self._alone = parameters, output_rms, ranks.world == 1
        self._dtypes = [tensor.dtype for tensor in stored]
        self.flat = Flat(stored, ranks)

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


def on_device(device: torch.device, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parts of a linear on a device."""
    return {name: part.to(device) for name, part in parts.items()}


def rms_of(tensor: Tensor) -> float:
    """Return the root of the mean square of a tensor; 0 of an empty one."""
    return float(tensor.detach().square().mean().sqrt()) if tensor.numel() else 0.0
