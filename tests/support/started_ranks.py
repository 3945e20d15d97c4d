"""Ranks of a test: processes that find each other as torchrun's do, and what each of them returns."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from streamslr.ranks import open_ranks
from tests.support.forkserver import Child


class StartedRanks:
    """Processes of one thread each, that call a function of their `Ranks` and of `arguments`."""

    def __init__(self, world: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> None:
        """Start them.

        Args:
            world: How many.
            folder: Folder of their own, for what they return.
            work: Function of a module; what it returns, torch.save must be able to write.
            arguments: Its further arguments.
        """
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self._files = [folder / f"{world}-{rank}.pt" for rank in range(world)]
        self._children = [
            Child(_work, rank, world, self._store.port, file, work, arguments) for rank, file in enumerate(self._files)
        ]

    def results(self, seconds: float = 300) -> list[Any]:
        """Return what each rank returned, in their order; of one that an error ended, the type and text of the error.

        Of one that was killed it is None.

        Raises:
            TimeoutError: Some still worked after so many seconds, and were killed.
        """
        until = time.monotonic() + seconds
        codes = [child.join(max(0.0, until - time.monotonic())) for child in self._children]
        if None in codes:
            for child in self._children:
                child.kill()
            raise TimeoutError(f"exit codes {codes} after {seconds} s")
        return [torch.load(file, weights_only=False) if file.exists() else None for file in self._files]


def _work(rank: int, world: int, port: int, file: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        **{"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"},
        **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1"},
    }
    try:
        with open_ranks() as ranks:
            torch.save(work(ranks, *arguments), file)
    except Exception as error:
        torch.save(f"{type(error).__name__}: {error}", file)
        os._exit(1)  # as a rank ends, with its connections open until then; a traceback would only be noise
