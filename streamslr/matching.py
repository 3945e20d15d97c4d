"""Transformer matching: train kept values, U, V, norms and biases of a block towards the dense block's output.

What was tried, and what it gave: tools/results/matching.md.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from streamslr.calibration.hidden_states import Span, spans
from streamslr.gpu import deterministic_operators
from streamslr.io.packing import merge
from streamslr.linear_masters import LinearMasters, VectorMasters, master_shapes, on_device, rms_of
from streamslr.masters import BlockWeights, Masters, MatchSettings, Optimizer, flats
from streamslr.model.blockwise import Block
from streamslr.ranks import ALONE, Ranks
from streamslr.spec.pattern import SparsityPattern

_SMALLEST = 1e-6
"""Least size of a token's target, as a fraction of the mean ‖t‖² of its window: else the loss might be of one alone."""


@dataclass(frozen=True)
class Loss:
    """Loss over all windows: Σ ‖f̂(x) − t‖² / ‖t‖² over their tokens, and how many tokens there are.

    Each token counts by its own size, since what follows a block normalizes each token: a few tokens of a trained model
    are a thousand times larger than the others, and would hide these (tools/results/matching.md, "Each token's loss").
    """

    error: float
    tokens: int

    @property
    def relative(self) -> float:
        return self.error / self.tokens if self.tokens else 0.0


class LossSums:
    """Sums of the loss over batches, in float64 where they are."""

    def __init__(self) -> None:
        self._error: Tensor | None = None  # float64
        self._tokens = 0

    def add(self, output: Tensor, target: Tensor) -> None:
        error = _error(output, target).double()
        self._error = error if self._error is None else self._error + error
        self._tokens += target.shape[:-1].numel()

    def over(self, ranks: Ranks) -> Loss:
        """Wait for the batches; return the loss over those of all ranks."""
        own = 0.0 if self._error is None else float(self._error)
        error, tokens = ranks.sum_(torch.tensor([own, self._tokens], dtype=torch.float64)).tolist()
        return Loss(error, int(tokens))


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
        for name, stored in weights.packed.items():
            weight = self._block.linears[name].weight
            parts = on_device(weight.device, stored)
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
        each rank holds masters, gradients and moments of its share of the numbers and steps these. All numbers of a
        bundle of linears exist on a rank only while they are written into the block, all its gradients only until they
        are summed, after each micro-batch. A rank that lacks memory takes part in the exchanges of its epoch all the
        same, at whose end all ranks raise it.

        Args:
            weights: Weights to start from; they stay as they are, and may be in host memory.
            settings: Epochs, steps and learning rates.
            batches: Function of spans of this rank's windows. For each span, in their order, it yields what enters the
                block and what should leave it, both [b, T, h].
            windows: Number of windows of all ranks.
            micro_batch: Windows that pass the block together; a step adds up as many micro-batches as it needs.
            held_out: Windows at the end that nothing is trained on.
            ranks: The ranks, whose windows are dealt as `Ranks.share` does, those held out behind the others.

        Returns:
            The weights to store, where those to start from are; the relative loss of each epoch; and that on the
            held-out windows after each epoch, the last one with the weights to store. The first epoch trains nothing
            and gives the losses to start from; the loss of each later epoch is the mean over its steps. Where the first
            is 0 there is no later one, and the weights are those to start from.
        """
        micro_batch = min(ranks.gather(micro_batch))  # a second try may have cut that of one rank alone
        fitted = windows - held_out
        own, own_held_out = (len(range(ranks.rank, count, ranks.world)) for count in (fitted, held_out))
        unseen = spans([(own, own + own_held_out)], micro_batch)

        def begin() -> tuple[LossSums, LossSums, Masters]:
            self.load(weights)
            before = self._measure(batches, spans([(0, own)], micro_batch))
            return before, self._measure(batches, unseen), self._masters(weights, ranks)

        sums, held_out_sums, masters = ranks.together(begin)
        before = sums.over(ranks)
        curve = [before.relative]
        held_out_curve = [held_out_sums.over(ranks).relative] if held_out else []
        if not before.relative:  # as in the first block where S keeps every weight
            return weights, tuple(curve), tuple(held_out_curve)

        parts = [range(first, min(first + settings.batch, fitted)) for first in range(0, fitted, settings.batch)]
        steps = [_Step.of(part, micro_batch, ranks) for part in parts]
        optimizer = Optimizer(masters, settings, before.relative, (settings.epochs - 1) * len(steps))
        generator, attempt = torch.Generator().manual_seed(settings.seed), masters.attempt
        with masters.training():
            for _ in range(settings.epochs - 1):
                order = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
                passing = iter(batches([span for step in order for span in step.own]))
                errors: Tensor | float = 0.0  # on the device: read once an epoch, since reading waits for it
                for step in order:
                    of_step: Tensor | float = 0.0
                    for number in range(step.micro_batches):
                        upcoming = islice(passing, int(number < len(step.own)))
                        of_step = of_step + attempt.do(partial(self._add_gradients, upcoming), 0.0)
                        masters.sum_gradients()
                    errors = errors + of_step
                    optimizer.step()
                attempt.do(partial(next, passing, None), None)  # ends the reading
                attempt.settle()
                error = ranks.sum(float(errors))
                curve.append(error / before.tokens)
                if not math.isfinite(error):
                    break
                if len(curve) > 2 and curve[-1] > curve[-2]:  # of two epochs of steps
                    optimizer.hold_codes()
                if held_out:
                    held_out_curve.append(self._measure_together(batches, unseen, ranks).relative)
        refined = masters.weights(weights)
        ranks.together(partial(self.load, refined))
        if len(held_out_curve) > 1:
            held_out_curve[-1] = self._measure_together(batches, unseen, ranks).relative
        return refined, tuple(curve), tuple(held_out_curve)

    def _measure_together(
        self, batches: Callable[[Sequence[Span]], Iterable[tuple[Tensor, Tensor]]], wanted: Sequence[Span], ranks: Ranks
    ) -> Loss:
        """Return the loss of the live block over such windows of all ranks."""
        return ranks.together(partial(self._measure, batches, wanted)).over(ranks)

    def _measure(
        self, batches: Callable[[Sequence[Span]], Iterable[tuple[Tensor, Tensor]]], wanted: Sequence[Span]
    ) -> LossSums:
        """Return the loss of the live block over some of this rank's windows."""
        loss = LossSums()
        for x, target in batches(wanted):
            loss.add(self._block.run(x), target)
        return loss

    def _masters(self, weights: BlockWeights, ranks: Ranks) -> "Masters":
        """Return masters of the linears, and of every other parameter."""
        linears = self._block.linears
        names = [name for name in self._parameters if name.removesuffix(".weight") not in weights.packed]
        others = {name: self._parameters[name] for name in names}
        # the stored dtype may be finer than the compute dtype
        stored = [weights.other_tensors[name].to(parameter.device) for name, parameter in others.items()]
        of_vectors = [[tuple(tensor.shape) for tensor in stored]] if stored else []
        of_linears = [
            master_shapes(parts, self._patterns[name], (linears[name].out_features, linears[name].in_features))
            for name, parts in weights.packed.items()
        ]
        device = next(iter(self._parameters.values())).device
        places = flats([*of_vectors, *of_linears], device, ranks)
        for_vectors = next(places) if stored else None
        trained = {
            name: LinearMasters(linears[name], parts, self._patterns[name], flat)
            for (name, parts), flat in zip(weights.packed.items(), places, strict=True)
        }
        output_rms = [self._output_rms(name, trained) for name in others]
        vectors = VectorMasters(others, stored, output_rms, for_vectors) if for_vectors else None
        return Masters(trained, vectors, ranks)

    def _output_rms(self, name: str, linears: Mapping[str, "LinearMasters"]) -> float:
        """Return the rms, for inputs of rms 1, of the output of the norm or linear that parameter `name` belongs to."""
        module = name.rpartition(".")[0]
        if module in linears:
            return linears[module].values_rms * math.sqrt(linears[module].kept_per_row)
        return rms_of(self._parameters.get(f"{module}.weight", self._parameters[name])) or 1.0

    def _add_gradients(self, upcoming: Iterator[tuple[Tensor, Tensor]]) -> Tensor | float:
        """Make the gradients of a micro-batch, if there is one; return its error, float64."""
        total: Tensor | float = 0.0
        for x, target in upcoming:
            with torch.enable_grad(), deterministic_operators():
                error = _error(self._block.run(x), target)
                # times h, gradients are of order one, whatever the model's scale
                (error * target.shape[-1]).backward()  # type: ignore[no-untyped-call]
            total = error.detach().double()
        return total


@dataclass(frozen=True)
class _Step:
    """Windows of one step.

    own: spans of this rank's windows, each one micro-batch.
    micro_batches: number of micro-batches of the rank that has the most.
    """

    own: Sequence[Span]
    micro_batches: int

    @staticmethod
    def of(windows: range, micro_batch: int, ranks: Ranks) -> "_Step":
        """Return the step of these windows, which are dealt to the ranks."""
        most = -(-len(windows) // ranks.world)
        return _Step(spans([ranks.share_of(windows.start, windows.stop)], micro_batch), -(-most // micro_batch))


def _error(output: Tensor, target: Tensor) -> Tensor:
    """Return the sum over tokens of ‖output − target‖² / ‖target‖², for [b, T, h] both; float32, on their device.

    A target is never taken as smaller than `_SMALLEST` of its window's mean.
    """
    target = target.float()
    energy = target.square().sum(-1)  # [b, T]
    energy = energy.clamp_min(_SMALLEST * energy.mean(-1, keepdim=True)).clamp_min(torch.finfo(energy.dtype).tiny)
    return ((output.float() - target).square().sum(-1) / energy).sum()
