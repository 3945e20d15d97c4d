"""Masters of a block in matching: float32 copies of what is trained, their gradients, Adam; each shared over ranks."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, cycle
from typing import Protocol

import torch
from torch import Tensor

from streamslr.ranks import Attempt, Ranks

_ALIGNED = 128
"""Numbers in float32 that masters are aligned to, 512 bytes: the last bits of a product may depend on the address."""

BUNDLED = 1 << 22
"""Numbers that ranks exchange at once, 16 MB in float32, though no linear has that many: below, the waiting for others
takes longer than the sending."""

EXCHANGED_AT_ONCE = 2
"""Buffers, each for all masters of a bundle or their gradients, in a match over ranks: one under way, one in use."""

_FULL_RATE_STEPS = 100
"""Steps from which learning rates are whole; fewer take the root of their share, since Adam's first steps move every
value by its whole rate, whatever its gradient (tools/results/matching.md, "Few steps")."""

Shapes = Sequence[tuple[int, ...]]
"""Shapes of the masters of one linear, or of a block's norms and biases."""


@dataclass(frozen=True)
class MatchSettings:
    """Settings of matching: Adam on the error by token over all parts of a block at once (3BASiL-TM, arXiv 2603.01376).

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


def epochs_on_grid(epochs: int) -> int:
    """Return the epochs of a matching that goes on behind one of `epochs`, once S has come onto its grid.

    The first only measures. Half as many steps bring nearly all that there is to gain (tools/results/matching.md,
    "Values on a grid").
    """
    return 1 + epochs // 2


@dataclass(frozen=True)
class BlockWeights:
    """All that a compressed block stores, by full names: its packed linears, and its other parameters and buffers."""

    packed: Mapping[str, Mapping[str, Tensor]]
    other_tensors: Mapping[str, Tensor]


class Bundle:
    """Float32 masters one behind the other, exchanged at once. Rank r holds and steps the r-th share of them.

    Attributes:
        own: [c], this rank's share of the masters, with its gradient; alone, all of them.
        length: world · c.
        alone: true where there is one rank.
    """

    def __init__(self, numbers: int, device: torch.device, ranks: Ranks) -> None:
        """Make room for so many numbers, which are zero at first."""
        self._ranks, self.alone = ranks, ranks.world == 1
        self._share = _round_up(-(-numbers // ranks.world), _ALIGNED)
        self.length = self._share * ranks.world
        self.own = torch.zeros(self._share, device=device)
        self.own.grad = torch.zeros_like(self.own)

    @property
    def own_gradients(self) -> Tensor:
        assert self.own.grad is not None
        return self.own.grad

    def held(self, start: int, count: int) -> tuple[slice, slice]:
        """Return which of the `count` numbers from `start` on this rank holds, and where in its share they lie."""
        first = self._ranks.rank * self._share
        begin = max(start, first)
        end = max(begin, min(start + count, first + self._share))
        return slice(begin - start, end - start), slice(begin - first, end - first)

    def add_own_gradients(self, numbers: Tensor) -> None:
        """Add this rank's share of [length] gradients."""
        self.own_gradients.add_(self._own(numbers))

    def put_own(self, numbers: Tensor) -> None:
        """Put this rank's share of the masters into its place in [length] numbers."""
        self._own(numbers).copy_(self.own)

    def _own(self, numbers: Tensor) -> Tensor:
        return numbers.view(self._ranks.world, self._share)[self._ranks.rank]


class Flat:
    """Masters of one linear, or of norms and biases, in a bundle.

    Each begins at a multiple of 512 bytes, as a tensor of its own would.
    """

    def __init__(self, bundle: Bundle, first: int, shapes: Shapes) -> None:
        """Lay out masters of these shapes from number `first` of the bundle on."""
        self.bundle, self._shapes = bundle, [torch.Size(shape) for shape in shapes]
        self._starts = [*accumulate((_aligned(shape) for shape in self._shapes), initial=first)]
        self._adding: list[Callable[[Sequence[Tensor]], None]] = []

    def fill(self, sources: Sequence[Tensor]) -> None:
        """Set the masters, those that this rank holds."""
        for start, source in zip(self._starts, sources, strict=False):
            held, place = self.bundle.held(start, source.numel())
            self.bundle.own[place].copy_(source.flatten()[held])

    def views(self, numbers: Tensor) -> list[Tensor]:
        """Return what of the bundle's [length] numbers belongs to each master, in the shapes of the masters."""
        return [
            numbers[start : start + shape.numel()].view(shape)
            for start, shape in zip(self._starts, self._shapes, strict=False)
        ]

    def own_part(self, index: int) -> Tensor | None:
        """Return the numbers of a master that lie in this rank's share, with their gradients."""
        _, place = self.bundle.held(self._starts[index], self._shapes[index].numel())
        if place.start == place.stop:
            return None
        own = self.bundle.own[place]
        own.grad = self.bundle.own_gradients[place]
        return own

    def add(self, gradients: Callable[[Sequence[Tensor]], None]) -> None:
        """Call a function that adds to the masters' gradients: at once, or with others when `add_gradients` is."""
        if self.bundle.alone:
            gradients(self.views(self.bundle.own_gradients))
        else:
            self._adding.append(gradients)

    def add_gradients(self, numbers: Tensor) -> None:
        """Add this rank's gradients of a micro-batch to the bundle's [length] numbers."""
        adding, self._adding = self._adding, []
        for gradients in adding:
            gradients(self.views(numbers))


def flats(shapes: Sequence[Shapes], device: torch.device, ranks: Ranks) -> Iterator[Flat]:
    """Yield a flat for the masters of one linear after another, which have these shapes.

    Ranks bundle neighbours, as long as a bundle is no longer than the longest linear, or than `BUNDLED`.
    """
    lengths = list(map(_length, shapes))
    longest = 0 if ranks.world == 1 else max(BUNDLED, *lengths)
    together: list[list[Shapes]] = []
    left = -1  # numbers that still fit into the last bundle
    for of_one, length in zip(shapes, lengths, strict=True):
        if length > left:
            together.append([])
            left = longest
        together[-1].append(of_one)
        left -= length
    for of_bundle in together:
        starts = [*accumulate(map(_length, of_bundle), initial=0)]
        bundle = Bundle(starts[-1], device, ranks)
        for start, of_one in zip(starts, of_bundle, strict=False):
            yield Flat(bundle, start, of_one)


def _length(shapes: Shapes) -> int:
    """Return the numbers that masters of these shapes take one behind the other."""
    return sum(map(_aligned, shapes))


def _aligned(shape: Sequence[int]) -> int:
    return _round_up(math.prod(shape), _ALIGNED)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class PartMasters(Protocol):
    """Masters of one linear, or of norms and biases."""

    flat: Flat

    @property
    def on_grid(self) -> bool:
        """True where the first master has values on a grid."""
        ...

    def learning_rates(self, settings: MatchSettings) -> list[float]:
        """Return the learning rate of each master at a relative block loss of 1."""
        ...

    def training(self) -> AbstractContextManager[None]:
        """Make backward passes add to the masters' gradients while entered."""
        ...

    def write_to_block(self, masters: Sequence[Tensor]) -> None:
        """Write the masters into the live block."""
        ...

    def stored(self, masters: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Return the masters as they are stored, by name."""
        ...


class Masters:
    """Masters of a block in training.

    Attributes:
        attempt: work of this rank between exchanges. Where it failed, the rank gives zeros for gradients from there on,
            and the masters that it has, so that exchanges go on until all ranks settle it.
    """

    def __init__(self, linears: Mapping[str, PartMasters], vectors: PartMasters | None, ranks: Ranks) -> None:
        """Hold the masters of linears, by name, and those of vectors, if there are any."""
        self._linears, self._vectors, self._ranks = linears, vectors, ranks
        self.attempt = Attempt(ranks)
        self._all = [*linears.values(), *([vectors] if vectors else [])]
        self._bundles: dict[Bundle, list[PartMasters]] = {}
        for master in self._all:
            self._bundles.setdefault(master.flat.bundle, []).append(master)
        largest = max(self._bundles, key=lambda bundle: bundle.length)
        count = EXCHANGED_AT_ONCE if ranks.world > 1 else 0
        self._buffers = [largest.own.new_empty(largest.length) for _ in range(count)]

    def own_rates(self, settings: MatchSettings) -> list[tuple[Tensor, float, bool]]:
        """Return the parts of the masters that this rank steps.

        Each comes with its learning rate at a relative loss of 1, and with True for values on a grid.
        """
        rated = [
            (m.flat.own_part(i), rate, i == 0 and m.on_grid)
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

        def put(bundle: Bundle, numbers: Tensor) -> None:
            numbers.zero_()
            for master in self._bundles[bundle]:
                self.attempt.do(partial(master.flat.add_gradients, numbers), None)

        if self._ranks.world > 1:
            self._exchange(put, self._ranks.sum_into_shares, Bundle.add_own_gradients)

    def write_to_block(self) -> None:
        """Write the masters of all ranks into the live block."""
        self._collect(lambda master, numbers: master.write_to_block(numbers))

    def weights(self, before: BlockWeights) -> BlockWeights:
        """Return the masters of all ranks as they are stored, with what `before` has beside them.

        Raises:
            MemoryOfRanksError: Memory ran out on a rank since the last time that all settled.
        """
        stored: dict[PartMasters, Mapping[str, Tensor]] = {}
        self._collect(lambda master, numbers: stored.update({master: master.stored(numbers)}))
        self.attempt.settle()
        for bundle in self._bundles:
            bundle.own.grad = None  # what is stored may be views of the masters
        vectors = stored[self._vectors] if self._vectors else {}
        packed = {name: stored[linear] for name, linear in self._linears.items()}
        return BlockWeights(packed, {**before.other_tensors, **vectors})

    def _collect(self, take: Callable[[PartMasters, Sequence[Tensor]], None]) -> None:
        """Call `take` for each linear, and for the vectors, with the masters of all ranks."""

        def take_all(bundle: Bundle, numbers: Tensor) -> None:
            for master in self._bundles[bundle]:
                self.attempt.do(partial(take, master, master.flat.views(numbers)), None)

        if self._ranks.world > 1:
            self._exchange(Bundle.put_own, self._ranks.collect_shares, take_all)
        else:
            for bundle in self._bundles:
                take_all(bundle, bundle.own)

    def _exchange(
        self,
        put: Callable[[Bundle, Tensor], None],
        begin: Callable[[Tensor], Callable[[], None]],
        take: Callable[[Bundle, Tensor], None],
    ) -> None:
        """Exchange [length] numbers of each bundle: `put` fills them, `begin` exchanges them, `take` uses them.

        One is under way while the next is filled.
        """
        under_way: deque[tuple[Bundle, Tensor, Callable[[], None]]] = deque()

        def finish() -> None:
            bundle, numbers, wait = under_way.popleft()
            wait()
            take(bundle, numbers)

        for bundle, buffer in zip(self._bundles, cycle(self._buffers), strict=False):
            if len(under_way) == len(self._buffers):
                finish()
            numbers = buffer[: bundle.length]
            put(bundle, numbers)
            under_way.append((bundle, numbers, begin(numbers)))
        while under_way:
            finish()


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
        if self._adam:
            for group in self._adam.param_groups:
                group["lr"] = group["first_lr"] * factor
            self._masters.attempt.do(self._adam.step, None)
            self._adam.zero_grad(set_to_none=False)
        self._masters.write_to_block()
