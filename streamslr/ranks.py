"""Processes that share work out: one alone, or the ranks that torchrun started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from streamslr.errors import InputError, StreamslrError, first_line


@dataclass(frozen=True)
class Ranks:
    """The processes of one command, and which of them this is; by default the only one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Number of this process among those of its machine."""
    local_world: int = 1
    """Processes of this machine."""

    def share(self, count: int, what: str) -> slice:
        """Return which of `count` things are this rank's: neighbours; shares differ by one at most.

        Raises:
            InputError: there are fewer things, which `what` names, than ranks.
        """
        if count < self.world:
            raise InputError(
                f"{count} {what} cannot be shared out over {self.world} ranks; start at most {count} ranks"
            )
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def sum(self, value: float) -> float:
        """Return the sum of a number over all ranks, the same on each; every rank must call it.

        Raises:
            StreamslrError: another rank ended.
        """
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        try:
            dist.all_reduce(total)
        except RuntimeError as error:
            raise StreamslrError(f"another rank ended ({first_line(error)}); its own message says why") from error
        return float(total)


@contextmanager
def open_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun started; without torchrun be alone.

    Raises:
        StreamslrError: the other ranks cannot be reached.
    """
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    rank, world, local_rank, local_world = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    try:
        dist.init_process_group("gloo")  # numbers on the host are all that ranks exchange so far
    except (RuntimeError, ValueError) as error:
        raise StreamslrError(f"the other ranks cannot be reached: {first_line(error)}") from error
    try:
        yield Ranks(rank, world, local_rank, local_world)
    finally:
        dist.destroy_process_group()
