"""Ranks of which only one is there: exchanges move nothing and count their bytes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from streamslr.ranks import Ranks
from streamslr.run.traffic import ring_bytes

T = TypeVar("T")


@dataclass(frozen=True)
class PretendedRanks(Ranks):
    """One of `world` ranks that all hold what this one does; each has a machine of its own.

    sent: bytes that a rank sends on average over ranks, by the name of the exchange, as `ring_bytes` counts them.
    """

    sent: Counter[str] = field(default_factory=Counter, compare=False)

    def sum(self, value: float) -> float:
        return value * self.world

    def sum_(self, tensor: Tensor) -> Tensor:
        self._count("sum", tensor, rounds=2)
        return tensor

    def reduce_(self, tensor: Tensor, owner: int) -> None:
        self._count("reduce", tensor)

    def broadcast_(self, tensor: Tensor, source: int) -> None:
        self._count("broadcast", tensor)

    def sum_into_shares(self, tensor: Tensor) -> Callable[[], None]:
        self._count("sum into shares", tensor)
        return lambda: None

    def collect_shares(self, tensor: Tensor) -> Callable[[], None]:
        self._count("collect shares", tensor)
        return lambda: None

    def tell(self, value: T, source: int = 0) -> T:
        return value

    def gather(self, value: T) -> list[T]:
        return [value] * self.world

    def _count(self, exchange: str, tensor: Tensor, rounds: int = 1) -> None:
        self.traffic.nbytes += tensor.nbytes
        self.sent[exchange] += rounds * ring_bytes(tensor.nbytes, self.world)
