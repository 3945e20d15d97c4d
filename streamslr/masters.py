"""Masters of a block in matching: float32 copies of what is trained, their gradients, Adam; each shared over ranks."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import Protocol

import torch
from torch import Tensor

from streamslr.ranks import Ranks

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
    """Masters of a block in training."""

    def __init__(self, linears: Mapping[str, PartMasters], vectors: PartMasters | None, ranks: Ranks) -> None:
        """Hold the masters of linears, by name, and those of vectors, if there are any."""
        self._linear_names, self._has_vectors, self._ranks = list(linears), vectors is not None, ranks
        self._all: list[PartMasters] = [*linears.values(), *([vectors] if vectors else [])]
        largest = max((master.flat for master in self._all), key=lambda flat: flat.length)
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

    def _collect(self, take: Callable[[PartMasters, Tensor], None]) -> None:
        """Call `take` with each linear's masters, and with the vectors', and the [length] numbers of all ranks."""
        if self._ranks.world == 1:
            for master in self._all:
                take(master, master.flat.own)
            return
        self._exchange(lambda master, numbers: master.flat.put_own(numbers), self._ranks.collect_shares, take)

    def _exchange(
        self,
        put: Callable[[PartMasters, Tensor], None],
        begin: Callable[[Tensor], Callable[[], None]],
        take: Callable[[PartMasters, Tensor], None],
    ) -> None:
        """Exchange [length] numbers of each master: `put` fills them, `begin` exchanges them, `take` uses them.

        One is under way while the next is filled. All are exchanged, in one order, even where `put` or `take` fails,
        since other ranks wait for them; the first error is raised at the end.
        """
        failed: list[Exception] = []
        under_way: deque[tuple[PartMasters, Tensor, Callable[[], None]]] = deque()

        def attempt(
            work: Callable[[PartMasters, Tensor], None],
            master: PartMasters,
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
