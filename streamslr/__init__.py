"""streamslr makes language models sparse plus low-rank, W ≈ S + U·V, one block at a time, out of core.

`compress(model)` is `streamslr run`: it writes a compressed folder, and goes on there when it is called again.
`load(folder)` loads such a folder as a model of transformers. streamslr/README.md describes the rooms of this package,
and where to change what.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamslr.runtime.register import register_with_transformers
from streamslr.version import __version__

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from streamslr.run.journal import JournalState

__all__ = ["__version__", "compress", "load"]

# torch and transformers take seconds to import: whatever needs them is imported when it is called
register_with_transformers()


def compress(
    model: str | Path,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    calibration: str | Path | None = None,
    samples: int = 128,
    bos: str = "auto",
    seq_len: int = 2048,
    method: str = "3basil",
    pattern: str | None = None,
    values: str = "stored",
    low_rank_values: str = "stored",
    group: int = 128,
    rounding: str = "solved",
    rank: int | None = None,
    ranks: str | None = None,
    compression: str | None = None,
    rank_ratio: float | None = None,
    owl: float | None = None,
    owl_outlier: float | None = None,
    allocation: str | Path | None = None,
    seed: int = 0,
    match: bool = True,
    match_epochs: int | None = None,
    match_batch: int = 4,
    match_lr: float = 1.2,
    match_held_out: int = 8,
    match_recover: float = 1.0,
    check_windows: int = 4,
    device: str | None = None,
    scratch: str | Path | None = None,
    host_mem: int | str | None = None,
    gpu_mem: int | str | None = None,
    evict_shards: bool = False,
) -> "JournalState":
    """Compress `model` into the folder `out`; called again, go on where it stopped.

    The same as `streamslr run`: parameters and defaults are those of its options (a test compares them with
    `streamslr.config.RunConfig`), and `streamslr run --help` describes each. `model` is a folder or a hub id; without
    `out` the result goes to ./NAME-slr, NAME the last part of `model`; sizes are in bytes or like "45GB". Messages go
    to the logger "streamslr".

    Returns:
        The journal, with a record a block (`.blocks[0].linears[0].error`).

    Raises:
        streamslr.errors.StreamslrError: Something that a user can mend.
    """
    settings = dict(locals())  # every parameter above, by its name in RunConfig
    from streamslr.config import RunConfig
    from streamslr.run.context import open_run
    from streamslr.run.loop import run

    return run(open_run(RunConfig.of(**settings)))


def load(
    folder: str | Path,
    device: "str | torch.device | None" = None,
    dtype: "str | torch.dtype | None" = None,
    device_map: Any = None,
    keep_dense: bool = False,
    verify: bool = False,
    revision: str | None = None,
) -> "PreTrainedModel":
    """Load the model of a compressed folder or hub id, packed in memory: `streamslr.runtime.loader.load`."""
    from streamslr.runtime.loader import load

    return load(folder, device, dtype, device_map, keep_dense, verify, revision)
