"""Transformer matching: train kept values, U, V, norms and biases of a block towards the dense block's output.

What was tried, and what it gave: tools/results/matching.md.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from streamslr.calibration.hidden_states import Span, spans
from streamslr.gpu import deterministic_operators
from streamslr.io.packing import merge, unpack
from streamslr.model.blockwise import Block
from streamslr.ranks import ALONE, Ranks
from streamslr.spec.pattern import SparsityPattern

TILE = 1 << 24
"""Elements of a dense weight's gradient that exist at once: 64 MB in float32, and enough rows for a fast product."""

_ALIGNED = 128
"""Numbers in float32 that masters are aligned to, 512 bytes: the last bits of a product may depend on the address."""

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
    vector_lr_ratio: learning rate of norms and biases, relative to `lr` and multiplied by sqrt(relative block loss) ·
        rms(output of the norm or linear for inputs of rms 1).
    final_lr_ratio: fraction of each learning rate that is left at the end of a cosine, as in the paper's code.
    seed: seed of the order of the steps.
    """

    epochs: int
    batch: int
    lr: float
    low_rank_lr_ratio: float = 0.3
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


@dataclass(frozen=True)
class Loss:
    """Loss over all windows: ‖f̂(X) − T‖², ‖T‖², and how many numbers T has."""

    error: float
    energy: float
    numbers: int

    @property
    def relative(self) -> float:
        return self.error / self.energy if self.energy else 0.0


class LossSums:
    """Sums of the loss over batches, in float64 where they are."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # [2] float64: error, energy
        self._numbers = 0  # in all targets

    def add(self, output: Tensor, target: Tensor) -> None:
        target = target.float()
        sums = torch.stack([_energy(output.float() - target), _energy(target)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._numbers += target.numel()

    def over(self, ranks: Ranks) -> Loss:
        """Wait for the batches; return the loss over those of all ranks."""
        own = [0.0, 0.0] if self._sums is None else self._sums.tolist()
        error, energy, numbers = ranks.sum_(torch.tensor([*own, self._numbers], dtype=torch.float64)).tolist()
        return Loss(error, energy, int(numbers))


class CompressedBlock:
    """A live block that computes with S + U·V, written dense into its weights. The support of S never changes."""

    def __init__(self, block: Block, patterns: Mapping[str, SparsityPattern]) -> None:
        """Wrap a live block.

        Args:
            block: Live block; its weights are overwritten by `load` and `refine`.
            patterns: Pattern of each of the block's linears, by its stored name.
        """
        self._block, self._patterns, self._parameters = block, patterns, block.parameters()

    @property
    def index(self) -> int:
        """Number of the block."""
        return self._block.index

    @torch.no_grad()
    def load(self, weights: BlockWeights) -> None:
        """Copy stored weights into the live block."""
        for name, parts in weights.packed.items():
            weight = self._block.linears[name].weight
            weight.copy_(merge(parts, self._patterns[name], (weight.shape[0], weight.shape[1]), weight.dtype))
        for name in weights.other_tensors.keys() & self._parameters.keys():
            self._parameters[name].copy_(weights.other_tensors[name])

    def refine(
        self,
        weights: BlockWeights,
        settings: MatchSettings,
        batches: Callable[[Sequence[Span]], Iterable[tuple[Tensor, Tensor]]],
        windows: int,
        micro_batch: int,
        held_out: int = 0,
        ranks: Ranks = ALONE,
    ) -> tuple[BlockWeights, tuple[float, ...], tuple[float, ...]]:
        """Train the block from `weights` on, and load the result into it.

        Gradients and Adam's moments exist in float32 for kept values, U, V and the other parameters alone. The dense
        weight that products read is in the compute dtype.

        Ranks train one block together: each passes its share of the windows of a step, gradients are summed over ranks,
        each rank holds Adam's moments of its share of the numbers and steps these, and all get the result.

        Args:
            weights: Weights to start from; they stay as they are.
            settings: Epochs, steps and learning rates.
            batches: Function of spans of this rank's windows. For each span, in their order, it yields what enters the
                block and what should leave it, both [b, T, h].
            windows: Number of windows of all ranks.
            micro_batch: Windows that pass the block together; a step adds up as many micro-batches as it needs.
            held_out: Windows at the end that nothing is trained on. Training stops where, from half of the epochs on,
                their loss is above what it was before training.
            ranks: The ranks, whose windows are dealt as `Ranks.share` does, those held out behind the others.

        Returns:
            The weights to store; the relative loss of each epoch; and that on the held-out windows after each epoch,
            the last one with the weights to store. The first epoch trains nothing and gives the losses to start from;
            the loss of each later epoch is the mean over its steps.
        """
        fitted = windows - held_out
        own, own_held_out = (len(range(ranks.rank, count, ranks.world)) for count in (fitted, held_out))
        unseen = spans([(own, own + own_held_out)], micro_batch)

        def begin() -> tuple[LossSums, LossSums, _Masters]:
            self.load(weights)
            before = self._measure(batches, spans([(0, own)], micro_batch))
            return before, self._measure(batches, unseen), self._masters(weights, ranks)

        sums, held_out_sums, masters = ranks.together(begin)
        before = sums.over(ranks)
        curve = [before.relative]
        held_out_curve = [held_out_sums.over(ranks).relative] if held_out else []

        firsts = range(0, fitted, settings.batch)
        steps = [ranks.share_of(first, min(first + settings.batch, fitted)) for first in firsts]
        optimizer = _Optimizer(masters, settings, before.relative, (settings.epochs - 1) * len(steps))
        energy = max(before.energy, 1e-30)
        scale = before.numbers / energy  # gradients of order one, whatever the model's scale
        generator = torch.Generator().manual_seed(settings.seed)
        with masters.training():
            for _ in range(settings.epochs - 1):
                order = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
                passing = iter(batches(spans(order, micro_batch)))
                errors: Tensor | float = 0.0  # on the device: read once an epoch, since reading waits for it
                for step in order:
                    pieces = len(spans([step], micro_batch))
                    errors = errors + ranks.together(partial(self._add_step, passing, pieces, scale, masters))
                    optimizer.step()
                    masters.write_to_block()
                next(passing, None)  # ends the reading
                error = ranks.sum(float(errors))
                curve.append(error / energy)
                if not math.isfinite(error):
                    break
                if held_out:
                    held_out_curve.append(self._measure(batches, unseen).over(ranks).relative)
                    if held_out_curve[-1] > held_out_curve[0] and 2 * len(curve) > settings.epochs:
                        break
        refined = masters.weights(weights)
        self.load(refined)
        if len(held_out_curve) > 1:
            held_out_curve[-1] = self._measure(batches, unseen).over(ranks).relative
        return refined, tuple(curve), tuple(held_out_curve)

    def _measure(
        self, batches: Callable[[Sequence[Span]], Iterable[tuple[Tensor, Tensor]]], wanted: Sequence[Span]
    ) -> LossSums:
        """Return the loss of the live block over some of this rank's windows."""
        loss = LossSums()
        for x, target in batches(wanted):
            loss.add(self._block.run(x), target)
        return loss

    def _masters(self, weights: BlockWeights, ranks: Ranks) -> "_Masters":
        """Return masters of the linears, and of every other parameter."""
        linears = {
            name: _LinearMasters(self._block.linears[name], parts, self._patterns[name], ranks)
            for name, parts in weights.packed.items()
        }
        others = {n: p for n, p in self._parameters.items() if n.removesuffix(".weight") not in linears}
        # the stored dtype may be finer than the compute dtype
        stored = [weights.other_tensors[name].to(parameter.device) for name, parameter in others.items()]
        flat = _Flat(stored, ranks) if stored else None
        vectors = {
            name: _VectorMaster(parameter, value, self._output_rms(name, linears))
            for (name, parameter), value in zip(others.items(), flat.tensors if flat else (), strict=True)
        }
        return _Masters(linears, vectors, flat)

    def _output_rms(self, name: str, linears: Mapping[str, "_LinearMasters"]) -> float:
        """Return the rms, for inputs of rms 1, of the output of the norm or linear that parameter `name` belongs to."""
        module = name.rpartition(".")[0]
        if module in linears:
            return linears[module].values_rms * math.sqrt(linears[module].kept_per_row)
        return _rms(self._parameters.get(f"{module}.weight", self._parameters[name])) or 1.0

    def _add_step(
        self, passing: Iterator[tuple[Tensor, Tensor]], pieces: int, scale: float, masters: "_Masters"
    ) -> Tensor | float:
        """Add the gradients of the next `pieces` micro-batches; return their squared error, float64.

        Sums over ranks have begun for all masters when it returns or fails, since other ranks wait for them.
        """
        errors: Tensor | float = 0.0
        try:
            for left in reversed(range(pieces)):
                x, target = next(passing)
                masters.sums.may_begin = not left
                errors = errors + self._add_gradients(x, target, scale)
        finally:
            masters.sums.begin_rest()
        return errors

    def _add_gradients(self, x: Tensor, target: Tensor, scale: float) -> Tensor:
        """Add the gradients of one micro-batch, times `scale`, to the masters'; return its squared error, float64."""
        with torch.enable_grad(), deterministic_operators():
            error = (self._block.run(x).float() - target.float()).square().sum()
            (error * scale).backward()  # type: ignore[no-untyped-call]
        return error.detach().double()


class _Flat:
    """Float32 masters one behind the other, and their gradients. Rank r steps the r-th share of both.

    Attributes:
        numbers: [world · c], the masters; each begins at a multiple of 512 bytes, as a tensor of its own would.
        grads: [world · c], their gradients.
        tensors: The masters in the shapes of what they were made of, with their gradients; views of both.
    """

    def __init__(self, sources: Sequence[Tensor], ranks: Ranks) -> None:
        """Copy the sources."""
        self.ranks = ranks
        self._starts = [0, *accumulate(_round_up(source.numel(), _ALIGNED) for source in sources)]
        self._share = _round_up(-(-self._starts[-1] // ranks.world), _ALIGNED)
        self.numbers = sources[0].new_zeros(self._share * ranks.world, dtype=torch.float32)
        self.grads = torch.zeros_like(self.numbers)
        self.tensors = []
        for source, start in zip(sources, self._starts, strict=False):
            master, grad = (
                flat[start : start + source.numel()].view(source.shape) for flat in (self.numbers, self.grads)
            )
            master.copy_(source)
            self.tensors.append(master.detach().requires_grad_())
            self.tensors[-1].grad = grad

    def own_part(self, tensor: Tensor) -> Tensor | None:
        """Return the numbers of one of the tensors that lie in this rank's share, with their gradients."""
        start = self._starts[next(i for i, one in enumerate(self.tensors) if one is tensor)]
        first = self.ranks.rank * self._share
        part = slice(max(start, first), min(start + tensor.numel(), first + self._share))
        if part.start >= part.stop:
            return None
        own = self.numbers[part]
        own.grad = self.grads[part]
        return own

    def zero_gradients(self) -> None:
        for tensor in self.tensors:
            assert tensor.grad is not None
            tensor.grad.zero_()


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class _Sums:
    """Sums of gradients over ranks, each begun when a backward pass has made the gradients, in one order on all ranks.

    Attributes:
        may_begin: False while more micro-batches of the step follow.
    """

    def __init__(self, flats: Sequence[_Flat]) -> None:
        self.may_begin = False
        self._flats = flats  # in the order of a backward pass
        self._made: set[int] = set()
        self._waiting: list[Callable[[], None]] = []

    def made(self, flat: _Flat) -> None:
        """Note that the gradients of this micro-batch are made."""
        if self.may_begin:
            self._made.add(id(flat))
            while len(self._waiting) < len(self._flats) and id(self._flats[len(self._waiting)]) in self._made:
                self._begin_next()

    def begin_rest(self) -> None:
        """Begin the sums of all gradients that no backward pass has made."""
        while len(self._waiting) < len(self._flats):
            self._begin_next()

    def wait(self) -> None:
        """Wait for the sums that have begun."""
        while self._waiting:
            self._waiting.pop(0)()
        self._made.clear()

    def _begin_next(self) -> None:
        flat = self._flats[len(self._waiting)]
        self._waiting.append(flat.ranks.sum_into_shares(flat.grads))


class _Masters:
    """Masters of a block in training."""

    def __init__(
        self, linears: Mapping[str, "_LinearMasters"], vectors: Mapping[str, "_VectorMaster"], flat: _Flat | None
    ) -> None:
        """Hold the masters; flat: that of the vectors, if there are any."""
        self._linears, self._vectors = linears, vectors
        self.all: list[_LinearMasters | _VectorMaster] = [*linears.values(), *vectors.values()]
        self.flats = [linear.flat for linear in reversed(list(linears.values()))] + ([flat] if flat else [])
        self.sums = _Sums(self.flats)
        for linear in linears.values():
            linear.made_gradients = partial(self.sums.made, linear.flat)

    def own_rates(self, settings: MatchSettings) -> list[tuple[Tensor, float]]:
        """Return the parts of the masters that this rank steps, with their learning rates at a relative loss of 1."""
        flat_of = {id(tensor): flat for flat in self.flats for tensor in flat.tensors}
        rates = [pair for master in self.all for pair in master.learning_rates(settings)]
        parts = [(flat_of[id(tensor)].own_part(tensor), rate) for tensor, rate in rates]
        return [(part, rate) for part, rate in parts if part is not None]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Make backward passes through the block add to the masters' gradients while entered."""
        with ExitStack() as entered:
            entered.callback(self.sums.wait)  # which write into the gradients
            for master in self.all:
                entered.enter_context(master.training())
            yield

    def write_to_block(self) -> None:
        """Collect what the other ranks stepped, and write the masters into the live block."""
        collected = [flat.ranks.collect_shares(flat.numbers) for flat in self.flats]
        for wait in collected:
            wait()
        for master in self.all:
            master.write_to_block()

    def weights(self, before: BlockWeights) -> BlockWeights:
        """Return the masters as they are stored, with what `before` has beside them."""
        return BlockWeights(
            {name: linear.parts() for name, linear in self._linears.items()},
            {
                **before.other_tensors,
                **{name: v.value.detach().to(before.other_tensors[name].dtype) for name, v in self._vectors.items()},
            },
        )


class _Optimizer:
    """Adam over this rank's share of all masters, each with its learning rate, which falls from step to step."""

    def __init__(self, masters: _Masters, settings: MatchSettings, relative_loss: float, steps: int) -> None:
        """Build Adam's groups. relative_loss: of the block before training; steps: all that will be taken."""
        lacking = math.sqrt(relative_loss * min(1.0, steps / _FULL_RATE_STEPS))
        groups = [{"params": [part], "first_lr": lacking * rate} for part, rate in masters.own_rates(settings)]
        self._adam = torch.optim.Adam(groups, fused=True) if groups else None  # a tiny block has not enough for all
        self._masters = masters
        self._settings, self._taken, self._steps = settings, 0, steps

    def step(self) -> None:
        """Wait for the sums over ranks, take one step, and zero the gradients."""
        factor = self._settings.lr_factor(self._taken / self._steps)
        self._taken += 1
        self._masters.sums.wait()
        if self._adam:
            for group in self._adam.param_groups:
                group["lr"] = group["first_lr"] * factor
            self._adam.step()
        for flat in self._masters.flats:
            flat.zero_gradients()


class _LinearMasters:
    """Float32 masters of one linear [o, d]: its kept values [nnz], U [o, r] and V [r, d]."""

    def __init__(self, linear: nn.Linear, parts: Mapping[str, Tensor], pattern: SparsityPattern, ranks: Ranks) -> None:
        self.linear, self._parts = linear, parts
        o, d = linear.out_features, linear.in_features
        U = parts["U"] if "U" in parts else linear.weight.new_zeros(o, 0)
        V = parts["V"] if "V" in parts else linear.weight.new_zeros(0, d)
        self.flat = _Flat([parts["values"].flatten(), U, V], ranks)
        self.values, self.U, self.V = self.flat.tensors
        self.made_gradients: Callable[[], None]
        empty = parts["values"].flatten() == 0  # slots of the pattern that the solver left empty stay empty
        self._empty = empty if bool(empty.any()) else None
        kept_values = self.values if self._empty is None else self.values[~empty]
        self.values_rms = _rms(kept_values)
        self.kept_per_row = max(1.0, len(kept_values) / o)
        mask = unpack({**parts, "values": torch.ones_like(parts["values"])}, pattern, (o, d))
        self._tiles = []  # (rows of W, their part of `values`, positions of those values in the flat rows)
        first = 0
        for start in range(0, o, step := max(1, TILE // d)):
            positions = mask[start : start + step].flatten().nonzero().flatten().int()
            self._tiles.append((slice(start, start + step), slice(first, first + len(positions)), positions))
            first += len(positions)

    def learning_rates(self, settings: MatchSettings) -> list[tuple[Tensor, float]]:
        """Return each master with its learning rate at a relative block loss of 1."""
        rate = settings.lr * self.values_rms / math.sqrt(self.kept_per_row)
        low_rank = settings.low_rank_lr_ratio * rate
        return [(self.values, rate), *([(self.U, low_rank), (self.V, low_rank)] if len(self.V) else [])]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Make backward passes through the linear add to the masters' gradients while entered."""

        def forward(x: Tensor) -> Tensor:
            y: Tensor = _Product.apply(x, self.values, self.linear.bias, self)  # type: ignore[no-untyped-call]
            return y

        self.linear.forward = forward  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            del self.linear.forward

    def add_gradients(self, grad: Tensor, x: Tensor) -> None:
        """Add the masters' gradients of y = x Wᵀ, for `grad` [n, o] of y and x [n, d]."""
        assert self.values.grad is not None
        assert self.U.grad is not None
        assert self.V.grad is not None
        V = self.V.detach().to(x.dtype)
        for rows, span, positions in self._tiles:
            tile = grad[:, rows].t() @ x  # [rows, d], gradient of the dense weight
            values = tile.view(-1).index_select(0, positions)
            if self._empty is not None:
                values.masked_fill_(self._empty[span], 0)
            self.values.grad[span] += values
            if len(V):
                self.U.grad[rows] += tile @ V.t()
                self.V.grad += self.U.detach()[rows].to(x.dtype).t() @ tile

    @torch.no_grad()
    def write_to_block(self) -> None:
        """Write S + U·V into the dense weight that products read."""
        for rows, span, positions in self._tiles:
            tile = self.U[rows] @ self.V  # [rows, d] float32
            tile.view(-1).index_add_(0, positions, self.values[span])
            self.linear.weight[rows].copy_(tile)

    def parts(self) -> dict[str, Tensor]:
        """Return the linear's parts as `pack` stores them."""
        trained = {"values": self.values, "U": self.U, "V": self.V}
        return {
            name: trained[name].detach().to(part.dtype).view_as(part) if name in trained else part
            for name, part in self._parts.items()
        }


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b. The backward pass adds to the masters' gradients and never holds a whole gradient of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, linear: _LinearMasters) -> Tensor:
        ctx.linear, ctx.has_bias = linear, bias is not None  # `values` is an input so that y requires a gradient
        ctx.save_for_backward(x)
        return nn.functional.linear(x, linear.linear.weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # [n, o]
        ctx.linear.add_gradients(rows, x.flatten(0, -2))
        ctx.linear.made_gradients()
        of_x = grad @ ctx.linear.linear.weight if ctx.needs_input_grad[0] else None
        return of_x, None, rows.sum(0) if ctx.has_bias else None, None


class _VectorMaster:
    """Float32 master of a norm's weight or of a bias."""

    def __init__(self, parameter: nn.Parameter, value: Tensor, output_rms: float) -> None:
        self._parameter, self.value, self._output_rms = parameter, value, output_rms

    def learning_rates(self, settings: MatchSettings) -> list[tuple[Tensor, float]]:
        """Return the master with its learning rate at a relative block loss of 1."""
        return [(self.value, settings.lr * settings.vector_lr_ratio * self._output_rms)]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Make backward passes through the parameter add to the master's gradient while entered."""

        def move(parameter: Tensor) -> None:
            assert self.value.grad is not None
            assert parameter.grad is not None
            self.value.grad += parameter.grad
            parameter.grad = None

        self._parameter.requires_grad_(True)
        hook = self._parameter.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            hook.remove()
            self._parameter.requires_grad_(False)

    @torch.no_grad()
    def write_to_block(self) -> None:
        """Write the master into the parameter."""
        self._parameter.copy_(self.value)


def _energy(tensor: Tensor) -> Tensor:
    """Return the sum of squares, in float64, on the tensor's device."""
    return tensor.square().sum(dtype=torch.float64)


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt()) if tensor.numel() else 0.0
