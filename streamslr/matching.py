"""Transformer matching: train kept values, U, V, norms and biases of a block towards the dense block's output.

What was tried, and what it gave: tools/results/matching.md.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamslr.calibration.hidden_states import Span, spans
from streamslr.gpu import deterministic_operators
from streamslr.io.packing import merge, unpack
from streamslr.model.blockwise import Block
from streamslr.spec.pattern import SparsityPattern

TILE = 1 << 24
"""Elements of a dense weight's gradient that exist at once: 64 MB in float32, and enough rows for a fast product."""

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


class Loss:
    """Relative loss ‖f̂(X) − T‖² / ‖T‖² over batches, summed in float64 where they are; reading it waits for them."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # [2] float64: error, energy
        self.numbers = 0  # in all targets

    def add(self, output: Tensor, target: Tensor) -> None:
        target = target.float()
        sums = torch.stack([_energy(output.float() - target), _energy(target)])
        self._sums = sums if self._sums is None else self._sums + sums
        self.numbers += target.numel()

    @property
    def energy(self) -> float:
        """‖T‖²."""
        return 0.0 if self._sums is None else float(self._sums[1])

    @property
    def relative(self) -> float:
        error, energy = (0.0, 0.0) if self._sums is None else self._sums.tolist()
        return error / energy if energy else 0.0


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
    ) -> tuple[BlockWeights, tuple[float, ...], tuple[float, ...]]:
        """Train the block from `weights` on, and load the result into it.

        Gradients and Adam's moments exist in float32 for kept values, U, V and the other parameters alone. The dense
        weight that products read is in the compute dtype.

        Args:
            weights: Weights to start from; they stay as they are.
            settings: Epochs, steps and learning rates.
            batches: Function of spans of windows. For each span, in their order, it yields what enters the block and
                what should leave it, both [b, T, h].
            windows: Number of windows.
            micro_batch: Windows that pass the block together; a step adds up as many micro-batches as it needs.
            held_out: Windows at the end that nothing is trained on. Training stops where, from half of the epochs on,
                their loss is above what it was before training.

        Returns:
            The weights to store; the relative loss of each epoch; and that on the held-out windows after each epoch,
            the last one with the weights to store. The first epoch trains nothing and gives the losses to start from;
            the loss of each later epoch is the mean over its steps.
        """
        windows -= held_out
        unseen = spans([(windows, windows + held_out)], micro_batch)
        self.load(weights)
        before = self._measure(batches, spans([(0, windows)], micro_batch))
        curve = [before.relative]
        held_out_curve = [self._measure(batches, unseen).relative] if unseen else []

        linears, vectors = self._masters(weights)
        masters: tuple[_LinearMasters | _VectorMaster, ...] = (*linears.values(), *vectors.values())
        steps = [(start, min(start + settings.batch, windows)) for start in range(0, windows, settings.batch)]
        ends = {stop for _, stop in steps}
        optimizer = _Optimizer(masters, settings, before.relative, (settings.epochs - 1) * len(steps))
        energy = max(before.energy, 1e-30)
        scale = before.numbers / energy  # gradients of order one, whatever the model's scale
        generator = torch.Generator().manual_seed(settings.seed)
        with ExitStack() as training:
            for master in masters:
                training.enter_context(master.training())
            for _ in range(settings.epochs - 1):
                shuffled = torch.randperm(len(steps), generator=generator).tolist()
                order = spans([steps[i] for i in shuffled], micro_batch)
                errors: Tensor | float = 0.0  # on the device: read once an epoch, since reading waits for it
                for (_, stop), (x, target) in zip(order, batches(order), strict=True):
                    errors = errors + self._add_gradients(x, target, scale)
                    if stop in ends:  # else more micro-batches of this step follow
                        optimizer.step()
                        for master in masters:
                            master.write_to_block()
                error = float(errors)
                curve.append(error / energy)
                if not math.isfinite(error):
                    break
                if unseen:
                    held_out_curve.append(self._measure(batches, unseen).relative)
                    if held_out_curve[-1] > held_out_curve[0] and 2 * len(curve) > settings.epochs:
                        break
        refined = BlockWeights(
            {name: linear.parts() for name, linear in linears.items()},
            {
                **weights.other_tensors,
                **{name: v.value.detach().to(weights.other_tensors[name].dtype) for name, v in vectors.items()},
            },
        )
        self.load(refined)
        if len(held_out_curve) > 1:
            held_out_curve[-1] = self._measure(batches, unseen).relative
        return refined, tuple(curve), tuple(held_out_curve)

    def _measure(
        self, batches: Callable[[Sequence[Span]], Iterable[tuple[Tensor, Tensor]]], wanted: Sequence[Span]
    ) -> Loss:
        """Return the loss of the live block over some windows."""
        loss = Loss()
        for x, target in batches(wanted):
            loss.add(self._block.run(x), target)
        return loss

    def _masters(self, weights: BlockWeights) -> tuple[dict[str, "_LinearMasters"], dict[str, "_VectorMaster"]]:
        """Return masters of the linears, and of every other parameter."""
        linears = {
            name: _LinearMasters(self._block.linears[name], parts, self._patterns[name])
            for name, parts in weights.packed.items()
        }
        vectors = {
            name: _VectorMaster(parameter, weights.other_tensors[name], self._output_rms(name, linears))
            for name, parameter in self._parameters.items()
            if name.removesuffix(".weight") not in linears
        }
        return linears, vectors

    def _output_rms(self, name: str, linears: Mapping[str, "_LinearMasters"]) -> float:
        """Return the rms, for inputs of rms 1, of the output of the norm or linear that parameter `name` belongs to."""
        module = name.rpartition(".")[0]
        if module in linears:
            return linears[module].values_rms * math.sqrt(linears[module].kept_per_row)
        return _rms(self._parameters.get(f"{module}.weight", self._parameters[name])) or 1.0

    def _add_gradients(self, x: Tensor, target: Tensor, scale: float) -> Tensor:
        """Add the gradients of one micro-batch, times `scale`, to the masters'; return its squared error, float64."""
        with torch.enable_grad(), deterministic_operators():
            error = (self._block.run(x).float() - target.float()).square().sum()
            (error * scale).backward()  # type: ignore[no-untyped-call]
        return error.detach().double()


class _Optimizer:
    """Adam over all masters, each with its learning rate, which falls from step to step."""

    def __init__(
        self,
        masters: Iterable["_LinearMasters | _VectorMaster"],
        settings: MatchSettings,
        relative_loss: float,
        steps: int,
    ) -> None:
        """Build Adam's groups. relative_loss: of the block before training; steps: all that will be taken."""
        lacking = math.sqrt(relative_loss * min(1.0, steps / _FULL_RATE_STEPS))
        rates = [pair for master in masters for pair in master.learning_rates(settings)]
        groups = [{"params": [tensor], "first_lr": lacking * rate} for tensor, rate in rates]
        self._adam = torch.optim.Adam(groups, fused=True)
        self._settings, self._taken, self._steps = settings, 0, steps

    def step(self) -> None:
        """Take one step and zero the gradients."""
        factor = self._settings.lr_factor(self._taken / self._steps)
        self._taken += 1
        for group in self._adam.param_groups:
            group["lr"] = group["first_lr"] * factor
        self._adam.step()
        self._adam.zero_grad(set_to_none=False)


class _LinearMasters:
    """Float32 masters of one linear [o, d]: its kept values [nnz], U [o, r] and V [r, d]."""

    def __init__(self, linear: nn.Linear, parts: Mapping[str, Tensor], pattern: SparsityPattern) -> None:
        self.linear, self._parts = linear, parts
        o, d = linear.out_features, linear.in_features
        self.values = _master(parts["values"].flatten())
        self.U = _master(parts["U"] if "U" in parts else linear.weight.new_zeros(o, 0))
        self.V = _master(parts["V"] if "V" in parts else linear.weight.new_zeros(0, d))
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
        of_x = grad @ ctx.linear.linear.weight if ctx.needs_input_grad[0] else None
        return of_x, None, rows.sum(0) if ctx.has_bias else None, None


class _VectorMaster:
    """Float32 master of a norm's weight or of a bias."""

    def __init__(self, parameter: nn.Parameter, stored: Tensor, output_rms: float) -> None:
        self._parameter, self._output_rms = parameter, output_rms
        self.value = _master(stored.to(parameter.device))  # the stored dtype may be finer than the compute dtype

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


def _master(tensor: Tensor) -> Tensor:
    """Return a float32 copy that can be trained, its gradient allocated."""
    master = tensor.detach().to(torch.float32, copy=True).requires_grad_()
    master.grad = torch.zeros_like(master)
    return master


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt()) if tensor.numel() else 0.0
