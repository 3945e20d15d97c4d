"""Scratch folders: temporary ones, and the parts of a run's that its ranks have; what killed processes left goes."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from streamslr.config import RunConfig
from streamslr.ranks import Ranks


@contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Yield a new folder, which is removed at the end.

    A folder is locked while its process lives, so one that is not locked was left by a killed process. Every folder of
    this user and prefix that was left in `parent` is removed first.

    Args:
        prefix: Start of the folder's name.
        parent: Folder to make it in; None stands for the system's temporary folder.
    """
    parent = parent or Path(tempfile.gettempdir())
    for left in parent.glob(f"{prefix}*"):
        with suppress(OSError), _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_mine:
            if is_mine:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with _locked(folder, fcntl.LOCK_EX):
            if not folder.is_dir():  # another process came between and took it for one that was left
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool]:
    """Hold a folder, which is no link; yield True where it belongs to this user. Raise OSError where it cannot be."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, how)
        yield os.fstat(descriptor).st_uid == os.geteuid()
    finally:
        os.close(descriptor)


def rank_scratch(config: RunConfig, ranks: Ranks) -> Path:
    """Return the folder of a rank's hidden states and Grams: the run's own without torchrun."""
    if ranks.world == 1:
        return config.scratch_folder
    return config.scratch_folder / f"rank-{ranks.rank}-of-{ranks.world}"


def drop_scratch_of_others(config: RunConfig, ranks: Ranks) -> None:
    """Remove what an earlier start with another number of ranks left in this machine's scratch folder."""
    if ranks.local_rank == 0:
        own = {rank_scratch(config, Ranks(rank, ranks.world)) for rank in range(ranks.world)}
        stale = [
            *config.scratch_folder.glob("rank-*-of-*"),
            *(config.scratch_folder.glob("*.zarr") if ranks.world > 1 else ()),
            *(config.scratch_folder.glob("gram-*.bin") if ranks.world > 1 else ()),
        ]
        for path in set(stale) - own:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
