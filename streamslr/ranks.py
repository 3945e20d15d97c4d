"""Processes that share work out: one alone, or the ranks that torchrun started, and what they tell each other."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from streamslr.errors import InputError, StreamslrError, first_line, says_not_deterministic, says_out_of_memory

T = TypeVar("T")
U = TypeVar("U")

_LONGEST_WAIT = timedelta(days=7)
"""Longest wait for another rank, which may solve a large linear for hours. A rank that ends is noticed at once, by its
closed connections."""
_LONGEST_START = timedelta(minutes=5)
"""Longest wait for another rank to start."""
_SECONDS_TO_END = 5.0
"""Seconds in which a rank whose connections closed is expected to end, so that it can be named."""


# Before torch 2.13 they have other names, which warn from then on.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class RankEndedError(StreamslrError):
    """Another rank ended, so this one must; `said_already` where that rank or another of this machine says so."""

    def __init__(self, message: str, said_already: bool) -> None:
        super().__init__(message)
        self.said_already = said_already


class MemoryOfRanksError(MemoryError):
    """Memory ran out on a rank, and every rank raises this."""


@dataclass
class Traffic:
    """Seconds that this rank waited in exchanges, and bytes that it put into them; read and cleared by `take`."""

    seconds: float = 0.0
    nbytes: int = 0

    def take(self) -> tuple[float, int]:
        taken = self.seconds, self.nbytes
        self.seconds, self.nbytes = 0.0, 0
        return taken


@dataclass(frozen=True)
class Ranks:
    """The processes of one command, and which of them this is; by default the only one.

    Every rank must call the functions that exchange something, in the same order. Alone, they return at once. They
    raise RankEndedError where another rank has ended.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Number of this process among those of its machine."""
    local_world: int = 1
    """Processes of this machine."""
    processes: tuple[tuple[str, int], ...] = ()
    """Machine and process id of each rank."""
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    def share(self, count: int, what: str) -> range:
        """Return which of `count` things are this rank's: every `world`-th, so that shares differ by one at most.

        Raises:
            InputError: there are fewer things, which `what` names, than ranks.
        """
        if count < self.world:
            raise InputError(
                f"{count} {what} cannot be shared out over {self.world} ranks; start at most {count} ranks"
            )
        return range(self.rank, count, self.world)

    def share_of(self, start: int, stop: int) -> tuple[int, int]:
        """Return where, in this rank's share, what it has of `start` to `stop` - 1 begins and ends."""
        first, last = (len(range(self.rank, count, self.world)) for count in (start, stop))
        return first, last

    def sum(self, value: float) -> float:
        """Return the sum of a number over all ranks, the same on each."""
        if self.world == 1:
            return value
        return float(self.sum_(torch.tensor(value, dtype=torch.float64)))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Put the sum of a tensor over all ranks into it, on each; return it."""
        if self.world > 1:
            with self._exchange(tensor):
                dist.all_reduce(tensor)
        return tensor

    def reduce_(self, tensor: Tensor, owner: int) -> None:
        """Put the sum of a tensor over all ranks into that of `owner`; on other ranks its content is lost."""
        if self.world > 1:
            with self._exchange(tensor):
                dist.reduce(tensor, owner)

    def broadcast_(self, tensor: Tensor, source: int) -> None:
        """Put the content of rank `source`'s tensor into those of all other ranks."""
        if self.world > 1:
            with self._exchange(tensor):
                dist.broadcast(tensor.view(torch.uint8) if tensor.dim() else tensor, source)

    def sum_into_shares(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to sum a flat tensor, of world · c numbers, over all ranks: rank r gets numbers r · c to (r + 1) · c.

        Returns:
            Function that waits for it. Until then the tensor must not be used; the numbers of other ranks are lost.
        """
        return self._begin(tensor, lambda: _reduce_scatter(self._own(tensor), tensor, async_op=True))

    def collect_shares(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to fill a flat tensor, of world · c numbers, with what rank r has in numbers r · c to (r + 1) · c.

        Returns:
            Function that waits for it.
        """
        return self._begin(tensor, lambda: _all_gather(tensor, self._own(tensor), async_op=True))

    def _own(self, tensor: Tensor) -> Tensor:
        """Return this rank's share of a flat tensor."""
        return tensor.view(self.world, -1)[self.rank]

    def tell(self, value: T, source: int = 0) -> T:
        """Return the value of rank `source`."""
        if self.world == 1:
            return value
        told = [value if self.rank == source else None]
        with self._exchange():
            dist.broadcast_object_list(told, source)
        return told[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, on each."""
        if self.world == 1:
            return [value]
        values: list[T] = [value] * self.world
        with self._exchange():
            dist.all_gather_object(values, value)
        return values

    def on_first(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0 alone; return what it returned, on each rank."""
        return self.tell(work() if self.rank == 0 else None)  # type: ignore[return-value]

    def together(self, work: Callable[[], T]) -> T:
        """Call `work`; where it lacks memory or a deterministic operator on some rank, raise that on every rank.

        So all ranks try again together. `work` must exchange the same things whether it fails in this way or not.

        Raises:
            MemoryOfRanksError: Memory ran out on a rank, which it names.
            RuntimeError: A deterministic operator is missing.
        """
        attempt = Attempt(self)
        result = attempt.do(work, None)
        attempt.settle()
        return result  # type: ignore[return-value]  # a rank whose work failed has left with settle

    def _begin(self, tensor: Tensor, start: Callable[[], dist.Work | None]) -> Callable[[], None]:
        if self.world == 1:
            return lambda: None
        with self._exchange(tensor):
            work = start()

        def wait() -> None:
            with self._exchange():
                if work:
                    work.wait()

        return wait

    @contextmanager
    def _exchange(self, tensor: Tensor | None = None) -> Iterator[None]:
        """Count the time and the bytes of an exchange; say which rank ended, where one did."""
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if says_out_of_memory(error):
                raise
            raise self.ended(first_line(error)) from error
        self.traffic.seconds += time.monotonic() - began
        self.traffic.nbytes += tensor.nbytes if tensor is not None else 0

    def ended(self, how_noticed: str) -> RankEndedError:
        """Return an error that names the rank that ended, and its reason if it left one."""
        until = time.monotonic() + (_SECONDS_TO_END if len(self.neighbours()) > 1 else 0)
        while not (reasons := self._reasons()) and not (gone := self._gone()) and time.monotonic() < until:
            time.sleep(0.05)
        here = [rank for rank in self.neighbours() if rank not in self._gone()]
        said_already = bool(here) and here[0] != self.rank
        for rank, reason in reasons.items():
            told_here = rank in self.neighbours()
            return RankEndedError(f"rank {rank} ended: {reason}", said_already or told_here)
        if gone:
            process = f"rank {gone[0]} (process {self.processes[gone[0]][1]})"
            message = f"{process} ended without a word: killed, perhaps for memory"
        else:
            message = f"a rank on another machine ended ({how_noticed})"
        message = f"{message}. Finished blocks are kept; start the same line again"
        # A rank that ends for this is gone too, so the first to notice is right, and says it for its machine.
        with suppress(RuntimeError):  # the store may have ended too
            first, _, message = _first_said("gone", f"{self.rank} {message}").partition(" ")
            said_already = first != str(self.rank)
        return RankEndedError(message, said_already)

    def neighbours(self) -> list[int]:
        """Return the ranks of this machine."""
        if not self.processes:
            return [self.rank]
        here, _ = self.processes[self.rank]
        return [rank for rank, (machine, _) in enumerate(self.processes) if machine == here]

    def _gone(self) -> list[int]:
        """Return the ranks of this machine whose process has ended."""
        return [rank for rank in self.neighbours() if self.processes and not _runs(self.processes[rank][1])]

    def _reasons(self) -> dict[int, str]:
        """Return why ranks ended that could say so, by rank."""
        if not dist.is_initialized():
            return {}
        found = {}
        with suppress(RuntimeError):  # the store may have ended too
            store = dist.distributed_c10d._get_default_store()
            for rank in range(self.world):
                if store.check([_reason_key(rank)]):
                    found[rank] = store.get(_reason_key(rank)).decode(errors="replace")
        return found


@dataclass
class Attempt:
    """Work of a rank between exchanges in which it takes part, whether its work fails or not.

    Once some of it lacks memory or a deterministic operator, this rank does no more of it, and goes on exchanging until
    all ranks settle what becomes of it. Alone, the work simply raises.
    """

    ranks: Ranks
    _said: str | None = None  # by what failed; not the error, whose traceback holds tensors

    def do(self, work: Callable[[], T], otherwise: U) -> T | U:
        """Call `work` and return its result; return `otherwise` where it fails, or earlier work did."""
        if self.ranks.world == 1:
            return work()
        if self._said is None:
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not (says_out_of_memory(error) or says_not_deterministic(error)):
                    raise
                self._said = first_line(error)
        return otherwise

    def settle(self) -> None:
        """Return where nothing failed on any rank; all ranks must call it.

        Raises:
            MemoryOfRanksError: Memory ran out on a rank, which it names.
            RuntimeError: A deterministic operator is missing.
        """
        if not self.ranks.sum(self._said is not None):
            return
        rank, said = next((rank, said) for rank, said in enumerate(self.ranks.gather(self._said)) if said is not None)
        if says_not_deterministic(RuntimeError(said)):
            raise RuntimeError(said)
        raise MemoryOfRanksError(f"rank {rank}: {said}")


ALONE = Ranks()
"""The one process of a command without torchrun."""


def _reason_key(rank: int) -> str:
    return f"streamslr/ended/{rank}"


def _wait_for_start(store: Store, rank: int, world: int) -> None:
    """Return once all ranks are here. Raise StreamslrError, with those that are not, where that takes too long."""
    keys = [f"streamslr/started/{rank}" for rank in range(world)]
    store.set(keys[rank], "")
    try:
        store.wait(keys, _LONGEST_START)
    except RuntimeError as error:
        missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
        raise StreamslrError(f"rank {missing} has not started in {_LONGEST_START}; its own messages say why") from error


def _machine() -> str:
    """Return what is the same for processes that see each other's process ids, and for no others."""
    names = [socket.gethostname()]
    with suppress(OSError):  # outside of Linux
        names += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").stat().st_ino)]
    return " ".join(names)


def _first_said(what: str, text: str) -> str:
    """Return what the first rank of this machine to call this has given as text."""
    store = dist.distributed_c10d._get_default_store()
    return str(store.compare_set(f"streamslr/{what}/{_machine()}", "", text).decode(errors="replace"))


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def open_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun started; without torchrun be alone.

    Tensors on CPUs are exchanged by gloo, those on GPUs by NCCL. An error that leaves the body is told to the other
    ranks as the reason why this one ends.

    Raises:
        StreamslrError: the other ranks cannot be reached.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    rank, world, local_rank, local_world = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, *_ = next(rendezvous("env://"))
        _wait_for_start(store, rank, world)
        dist.init_process_group(backend, timeout=_LONGEST_WAIT)
        processes: list[tuple[str, int]] = [("", 0)] * world
        dist.all_gather_object(processes, (_machine(), os.getpid()))
    except (RuntimeError, ValueError) as error:
        raise StreamslrError(f"the other ranks cannot be reached: {first_line(error)}") from error
    ranks = Ranks(rank, world, local_rank, local_world, tuple(processes))
    try:
        yield ranks
    except RankEndedError:
        raise
    except BaseException as error:  # leaves connections open until the process ends: when they close, it has ended
        if isinstance(error, KeyboardInterrupt):
            broken = error.__context__  # the exchange that this rank waited in, where it broke before torchrun ends all
            if isinstance(broken, RuntimeError) or ranks._reasons() or ranks._gone():
                raise ranks.ended(first_line(broken) if broken else "torchrun ends all") from None
        with suppress(RuntimeError):
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else first_line(error)
            dist.distributed_c10d._get_default_store().set(_reason_key(rank), reason)
            # Where all end for one reason, the first of each machine says it.
            first, _, its_reason = _first_said("reason", f"{rank} {reason}").partition(" ")
            error.said_already = first != str(rank) and its_reason == reason  # type: ignore[attr-defined]
        raise
    dist.destroy_process_group()
