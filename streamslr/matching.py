"""Transformer matching: kept values, U, V, norms and biases of a block move until its output is the dense one's."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamslr.calibration.hidden_states import Span, spans
from streamslr.io.packing import merge, unpack
from streamslr.model.blockwise import Block
from streamslr.spec.pattern import SparsityPattern

TILE = 1 << 24
"""Elements of a weight's gradient that exist at once: 64 MB in float32, and rows enough for a fast product."""


@dataclass(frozen=True)
class Matching:
    """Adam on ‖f̂(X) − T‖², all parts of a block at once (3BASiL-TM, arXiv 2603.01376).

    epochs: passes over the samples, of which the first only measures. batch: samples a step. lr: of a linear's
    values, in units of √(the block's relative loss) · their rms / √(kept values a row): so far, relative to it, can
    one step move the linear's output, whatever its width (Yang et al., arXiv 2203.03466), and the more the more the
    block lacks. low_rank_share: of that rate for U and V (1 and 0.3 train the reference model's first blocks to the
    same loss, 0.3 to 1 or 2 % less on other text; 3 is far worse). vector_share: of the rate for norms and biases,
    in units of the output of what they belong to, for inputs of size one. At 1:4 + 8 the default is about 1e-3 for
    the reference model's values and norms. All rates fall by cosine to `final` of themselves, as in the paper's code.
    """

    epochs: int
    batch: int
    lr: float
    low_rank_share: float = 0.3
    vector_share: float = 1 / 120
    final: float = 0.2
    seed: int = 0

    def schedule(self, done: float) -> float:
        """What share of the learning rates holds when this share of the steps is done."""
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class BlockWeights:
    """All that a compressed block stores, by full names: its packed linears, and its other parameters and buffers."""

    packed: Mapping[str, Mapping[str, Tensor]]
    other_tensors: Mapping[str, Tensor]


@dataclass
class Loss:
    """‖f̂(X) − T‖² / ‖T‖² over batches, summed in float64."""

    error: float = 0.0
    energy: float = 0.0
    numbers: int = 0

    def add(self, output: Tensor, target: Tensor) -> None:
        self.error += float((output.float() - target.float()).square().sum(dtype=torch.float64))
        self.energy += float(target.float().square().sum(dtype=torch.float64))
        self.numbers += target.numel()

    @property
    def relative(self) -> float:
        return self.error / self.energy if self.energy else 0.0


class CompressedBlock:
    """A live block whose linears are packed. What of it is not on a support can never change."""

    def __init__(self, block: Block, patterns: Mapping[str, SparsityPattern]) -> None:
        """patterns: of each of the block's linears, by its stored name."""
        self._block, self._patterns, self._parameters = block, patterns, block.parameters()

    @property
    def index(self) -> int:
        """Number of the block."""
        return self._block.index

    @torch.no_grad()
    def place(self, weights: BlockWeights) -> None:
        """Has the block compute with what is stored."""
        for name, parts in weights.packed.items():
            weight = self._block.linears[name].weight
            weight.copy_(merge(parts, self._patterns[name], (weight.shape[0], weight.shape[1]), weight.dtype))
        for name in weights.other_tensors.keys() & self._parameters.keys():
            self._parameters[name].copy_(weights.other_tensors[name])

    def refine(
        self,
        weights: BlockWeights,
        settings: Matching,
        batches: Callable[[Sequence[Span]], Iterable[tuple[Tensor, Tensor]]],
        samples: int,
        micro_batch: int,
    ) -> tuple[BlockWeights, tuple[float, ...]]:
        """Trains from `weights` on; places and returns what came out, and the relative loss of each epoch.

        batches: for spans of samples, in their order, what enters the block and what should
        leave it, both [b, T, h]. The first epoch trains nothing and gives the loss to start from; the others'
        losses are means while the block moves. Gradients and Adam's moments exist in float32 for kept values,
        U, V and the other parameters alone; the dense weight that products read is in the compute dtype.
        """
        self.place(weights)
        before = Loss()
        for x, target in batches(spans([(0, samples)], micro_batch)):
            before.add(self._block.run(x), target)
        curve = [before.relative]
        scale = before.numbers / max(before.energy, 1e-30)  # gradients of order one, whatever the model's scale
        linears = {
            name: _Linear(self._block.linears[name], parts, self._patterns[name])
            for name, parts in weights.packed.items()
        }
        vectors = {
            name: _Vector(parameter, weights.other_tensors[name], self._output_size(name, linears))
            for name, parameter in self._parameters.items()
            if name.removesuffix(".weight") not in linears
        }
        trained: tuple[_Linear | _Vector, ...] = (*linears.values(), *vectors.values())
        lacking = math.sqrt(before.relative)
        rates = [pair for part in trained for pair in part.masters(settings)]
        groups = [{"params": [master], "full": lacking * rate} for master, rate in rates]
        optimizer = torch.optim.Adam(groups, fused=True)
        draw = torch.Generator().manual_seed(settings.seed)
        steps = [(start, min(start + settings.batch, samples)) for start in range(0, samples, settings.batch)]
        last = {stop for _, stop in steps}
        taken = 0
        with ExitStack() as learning:
            for part in trained:
                learning.enter_context(part.learning())
            for _ in range(settings.epochs - 1):
                order = spans([steps[i] for i in torch.randperm(len(steps), generator=draw)], micro_batch)
                error = 0.0
                for (_, stop), (x, target) in zip(order, batches(order), strict=True):
                    with torch.enable_grad():
                        loss = (self._block.run(x).float() - target.float()).square().sum()
                        (loss * scale).backward()  # type: ignore[no-untyped-call]
                    error += float(loss)
                    if stop not in last:
                        continue  # more of this step is to come
                    share = settings.schedule(taken / ((settings.epochs - 1) * len(steps)))
                    taken += 1
                    for group in optimizer.param_groups:
                        group["lr"] = group["full"] * share
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=False)
                    for part in trained:
                        part.show()
                curve.append(error / max(before.energy, 1e-30))
                if not math.isfinite(error):
                    break
        stored = BlockWeights(
            {name: linear.parts() for name, linear in linears.items()},
            {
                **weights.other_tensors,
                **{name: v.value.detach().to(weights.other_tensors[name].dtype) for name, v in vectors.items()},
            },
        )
        self.place(stored)
        return stored, tuple(curve)

    def _output_size(self, name: str, linears: Mapping[str, "_Linear"]) -> float:
        """Of the module that a norm's weight or a bias is of, for inputs of size one."""
        module = name.rpartition(".")[0]
        if module in linears:
            return linears[module].size * math.sqrt(linears[module].kept_a_row)
        return _rms(self._parameters.get(f"{module}.weight", self._parameters[name])) or 1.0


class _Linear:
    """One linear [o, d]: float32 masters of its kept values [nnz], U [o, r] and V [r, d]."""

    def __init__(self, linear: nn.Linear, parts: Mapping[str, Tensor], pattern: SparsityPattern) -> None:
        self.linear, self._parts = linear, parts
        o, d = linear.out_features, linear.in_features
        self.values = _master(parts["values"].flatten())
        self.U = _master(parts["U"] if "U" in parts else linear.weight.new_zeros(o, 0))
        self.V = _master(parts["V"] if "V" in parts else linear.weight.new_zeros(0, d))
        empty = parts["values"].flatten() == 0  # slots of the pattern that the solver left empty: they stay so
        self._empty = empty if bool(empty.any()) else None
        kept_values = self.values if self._empty is None else self.values[~empty]
        self.size = _rms(kept_values)
        self.kept_a_row = max(1.0, len(kept_values) / o)
        kept = unpack({**parts, "values": torch.ones_like(parts["values"])}, pattern, (o, d))
        self._tiles = []  # (rows of W, where their values are, which of the rows' elements those are)
        first = 0
        for start in range(0, o, step := max(1, TILE // d)):
            positions = kept[start : start + step].flatten().nonzero().flatten().int()
            self._tiles.append((slice(start, start + step), slice(first, first + len(positions)), positions))
            first += len(positions)

    def masters(self, settings: Matching) -> list[tuple[Tensor, float]]:
        """Each with its learning rate."""
        rate = settings.lr * self.size / math.sqrt(self.kept_a_row)
        low_rank = settings.low_rank_share * rate
        return [(self.values, rate), *([(self.U, low_rank), (self.V, low_rank)] if len(self.V) else [])]

    @contextmanager
    def learning(self) -> Iterator[None]:
        """While entered, a backward pass through the linear adds to the masters' gradients."""

        def forward(x: Tensor) -> Tensor:
            y: Tensor = _Product.apply(x, self.values, self.linear.bias, self)  # type: ignore[no-untyped-call]
            return y

        self.linear.forward = forward  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            del self.linear.forward

    def add_gradients(self, grad: Tensor, x: Tensor) -> None:
        """Those of y = x Wᵀ for grad [n, o] of y and x [n, d]."""
        assert self.values.grad is not None and self.U.grad is not None and self.V.grad is not None
        V = self.V.detach().to(x.dtype)
        for rows, span, positions in self._tiles:
            tile = grad[:, rows].t() @ x  # [rows, d], of the dense weight
            values = tile.view(-1).index_select(0, positions)
            if self._empty is not None:
                values.masked_fill_(self._empty[span], 0)
            self.values.grad[span] += values
            if len(V):
                self.U.grad[rows] += tile @ V.t()
                self.V.grad += self.U.detach()[rows].to(x.dtype).t() @ tile

    @torch.no_grad()
    def show(self) -> None:
        """Puts S + U·V into the weight that products read."""
        for rows, span, positions in self._tiles:
            tile = self.U[rows] @ self.V  # [rows, d] float32
            tile.view(-1).index_add_(0, positions, self.values[span])
            self.linear.weight[rows] = tile.to(self.linear.weight.dtype)

    def parts(self) -> dict[str, Tensor]:
        """As `pack` stores it."""
        moved = {"values": self.values, "U": self.U, "V": self.V}
        return {
            name: moved[name].detach().to(part.dtype).view_as(part) if name in moved else part
            for name, part in self._parts.items()
        }


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b. Its backward pass hands the masters their gradients and forms none of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, linear: _Linear) -> Tensor:
        ctx.linear, ctx.has_bias = linear, bias is not None  # `values` comes along so that y wants a gradient
        ctx.save_for_backward(x)
        return nn.functional.linear(x, linear.linear.weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # [n, o]
        ctx.linear.add_gradients(rows, x.flatten(0, -2))
        of_x = grad @ ctx.linear.linear.weight if ctx.needs_input_grad[0] else None
        return of_x, None, rows.sum(0) if ctx.has_bias else None, None


class _Vector:
    """A norm's weight or a bias: its float32 master."""

    def __init__(self, parameter: nn.Parameter, stored: Tensor, output_size: float) -> None:
        self._parameter, self._output_size = parameter, output_size
        self.value = _master(stored.to(parameter.device))  # which may be finer than the compute dtype

    def masters(self, settings: Matching) -> list[tuple[Tensor, float]]:
        return [(self.value, settings.lr * settings.vector_share * self._output_size)]

    @contextmanager
    def learning(self) -> Iterator[None]:
        def move(parameter: Tensor) -> None:
            assert self.value.grad is not None and parameter.grad is not None
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
    def show(self) -> None:
        self._parameter.copy_(self.value)


def _master(tensor: Tensor) -> Tensor:
    """A float32 copy that can be trained, with room for its gradient."""
    master = tensor.detach().to(torch.float32, copy=True).requires_grad_()
    master.grad = torch.zeros_like(master)
    return master


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt()) if tensor.numel() else 0.0
