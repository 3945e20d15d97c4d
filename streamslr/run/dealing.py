"""Which rank solves which linear of a block, by the time that each takes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from streamslr.solvers.base import SolverByRows
from streamslr.solvers.methods import Method
from streamslr.solvers.rounding import flops as rounding_flops
from streamslr.spec.allocation import Allocation
from streamslr.spec.pattern import Dense

_SMALL_GROUP = 0.1
"""Fraction of a rank's fair share up to which linears that share a Gram matrix stay together, which saves a copy of it
and the inverses that they share."""
_PASSES = 2500
"""Passes over a weight take as long as twice so many FLOPs of a product, which itself takes 2 d for each weight of an
iteration. Fitted to solves of 256×256 to 512×2048 on a Xeon with AMX; an H200 gives 2900 (fused-h200.json in
tools/results). By FLOPs alone the gate and up projections of an 8 M Llama are two thirds of its down projection; they
take 1.5 of its time."""
_WORTH_SPLITTING = 1.05
"""Load of the busiest rank, relative to the least that splitting linears by rows can give, that is near enough."""


@dataclass(frozen=True)
class Deal:
    """Deal of the linears of one block to ranks.

    groups: linears that share a Gram matrix.
    owners: linear -> the rank that solves it alone.
    by_rows: linears that all ranks solve together, each some rows of the weight.
    loads: FLOPs of each rank; as many as they are, ranks need not take as long.
    """

    groups: Sequence[tuple[str, ...]]
    owners: Mapping[str, int]
    by_rows: frozenset[str]
    loads: tuple[float, ...]

    @property
    def linears(self) -> list[str]:
        """All linears, in the order of their groups."""
        return [name for group in self.groups for name in group]

    def needs(self, linears: Iterable[str], world: int) -> frozenset[int]:
        """Return the ranks that need the Gram matrix that these linears share."""
        if self.by_rows.intersection(linears):
            return frozenset(range(world))
        return frozenset(self.owners[name] for name in linears)


def rows_of_ranks(o: int, world: int) -> list[slice]:
    """Return the rows of each rank where a linear of o rows is solved by rows: consecutive, as even as can be."""
    return [slice(o * rank // world, o * (rank + 1) // world) for rank in range(world)]


def deal_linears(
    groups: Sequence[tuple[str, ...]],
    shapes: Mapping[str, tuple[int, int]],
    allocation: Allocation,
    method: Method,
    world: int,
    gpu: bool,
) -> Deal:
    """Deal the linears of a block to ranks so that the busiest takes little time.

    The largest remaining linear goes to the rank with the least work (longest processing time first). Linears that
    dwarf the rest are split by rows over all ranks, where the method and the pattern allow it: as many of the largest
    as lower the load of the busiest rank by more than a twentieth.

    Args:
        groups: linears that share a Gram matrix, of all linears of the block.
        shapes: linear -> (o, d).
        allocation: pattern and rank of each linear.
        method: the method, which knows its work.
        world: number of ranks.
        gpu: True for solves on GPUs.
    """

    def flops(name: str, ranks: int = 1) -> float:
        (o, d), spec = shapes[name], allocation[name]
        rounding = 0.0 if spec.grid is None else rounding_flops(o, d, spec.rank, gpu=gpu, ranks=ranks)
        if isinstance(spec.pattern, Dense):  # S begins as the weight
            return rounding
        if ranks == 1:
            return method.solver.flops(o, d, spec.rank, gpu=gpu) + rounding
        return cast(SolverByRows, method.solver).flops(o, d, spec.rank, gpu=gpu, ranks=ranks) + rounding

    def time(name: str, ranks: int = 1) -> float:  # in FLOPs of a product
        return flops(name, ranks) * (1 + _PASSES / shapes[name][1])

    work = {name: time(name) for group in groups for name in group}
    fair = sum(work.values()) / world
    splittable = [
        name
        for name in sorted(work, key=lambda name: -work[name])
        if method.by_rows and allocation[name].pattern.by_row and shapes[name][0] >= world
    ]
    deals: list[tuple[float, Deal]] = []
    for count in range(len(splittable) + 1 if world > 1 else 1):
        by_rows = frozenset(splittable[:count])
        together = sum(time(name, world) for name in by_rows)
        if deals and together >= min(longest for longest, _ in deals):
            break  # every rank does these, so no further split lowers the load
        units = []
        for group in groups:
            alone = [name for name in group if name not in by_rows]
            small = sum(work[name] for name in alone) <= _SMALL_GROUP * fair
            units += [alone] if small and alone else [[name] for name in alone]
        times = [together] * world
        owners: dict[str, int] = {}
        for unit in sorted(units, key=lambda unit: -sum(work[name] for name in unit)):
            rank = times.index(min(times))
            times[rank] += sum(work[name] for name in unit)
            owners |= dict.fromkeys(unit, rank)
        loads = [sum(flops(name, world) for name in by_rows)] * world
        for name, rank in owners.items():
            loads[rank] += flops(name)
        deals.append((max(times), Deal(groups, owners, by_rows, tuple(loads))))
        if max(times) <= _WORTH_SPLITTING * fair:
            break  # rows of a linear never take less than their share of its time
    least = min(longest for longest, _ in deals)
    return next(deal for longest, deal in deals if longest <= _WORTH_SPLITTING * least)
