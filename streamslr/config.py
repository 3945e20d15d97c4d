"""RunConfig: every setting of a run, its help text, and whether it may change when the run is resumed."""

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from streamslr.errors import InputError

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def parse_bytes(text: str) -> int:
    """'45GB' -> 45 * 10**9, '16GiB' -> 16 * 2**30, a bare number is bytes. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", text.upper())
    if not match:
        raise InputError(f"{text!r} is not a size; write it like 45GB or 16GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(count: float) -> str:
    """2_350_000 -> '2.4 MB' (decimal units, as --gpu-mem and disk vendors count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _setting(default: Any, help: str, *, fixed: bool = False) -> Any:
    return field(default=default, metadata={"help": help, "fixed": fixed})


@dataclass(frozen=True)
class RunConfig:
    """One compression. The command line's options are these fields, with these defaults and help texts.

    A *fixed* field decides what is written: changing it would mix two runs in one folder, so a resumed run
    refuses it. The others (places, budgets) may change from one start to the next.
    """

    model: str = field(metadata={"help": "Model folder, or a hub id such as meta-llama/Meta-Llama-3-70B."})
    out: Path = field(metadata={"help": "Folder to write; the same line again resumes in it."})
    revision: str | None = _setting(None, "Branch, tag or commit of a hub model; pinned to its commit at start.")
    calibration: Path | None = _setting(
        None,
        "Calibration text: .txt, .jsonl with a `text` field, or .gz of either [default: C4 from the hub].",
    )
    samples: int = _setting(128, "Calibration windows.", fixed=True)
    seq_len: int = _setting(2048, "Tokens in a window.", fixed=True)
    method: str = _setting("3basil", "How W becomes S + U·V: a name that `streamslr methods` lists.", fixed=True)
    pattern: str = _setting(
        "2:4", "Sparsity of S: n:m keeps n of every m, 50% zeroes half, 50%/row half of each row.", fixed=True
    )
    rank: int = _setting(64, "Rank of U·V; 0 for pure sparsity.", fixed=True)
    seed: int = _setting(0, "Seed of the windows, of the solver and of the order in matching.", fixed=True)
    match: bool = _setting(True, "Refine each block as a whole against its dense self.", fixed=True)
    match_epochs: int = _setting(20, "Passes over the windows in matching; the first only measures.", fixed=True)
    match_batch: int = _setting(8, "Windows in a step of matching.", fixed=True)
    match_lr: float = _setting(
        0.75, "Learning rate of matching; at 1 a step can move a linear's output by what the block lacks.", fixed=True
    )
    match_recover: float = _setting(
        1.0, "Share of what earlier blocks lost that matching has a block make up for; the paper's is 0.", fixed=True
    )
    device: str | None = _setting(None, "cpu or cuda [default: cuda where there is one].", fixed=True)
    scratch: Path | None = _setting(None, "Folder for hidden states [default: OUT/.scratch; removed at the end].")
    host_mem: int | None = _setting(None, "Host memory the run may use, like 16GB [default: what is free].")
    gpu_mem: int | None = _setting(None, "GPU memory the run may use, like 45GB [default: what is free].")
    evict_shards: bool = _setting(False, "Delete each hub shard this run downloaded once its blocks are done.")

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("seq_len", 2), ("rank", 0), ("match_epochs", 2), ("match_batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.match_lr < math.inf:
            raise InputError(f"--match-lr is {self.match_lr}; it must be above 0")
        if not 0 <= self.match_recover <= 1:
            raise InputError(f"--match-recover is {self.match_recover}; it must be from 0 to 1")
        if self.device not in (None, "cpu", "cuda"):
            raise InputError(f"--device is {self.device!r}; it must be cpu or cuda")

    @classmethod
    def of(cls, **settings: Any) -> "RunConfig":
        """From what people type: paths as text, sizes like "45GB". Raises InputError for an unknown setting."""
        names = {f.name for f in fields(cls)}
        if unknown := sorted(settings.keys() - names):
            raise InputError(f"unknown setting {', '.join(unknown)}; there are {', '.join(sorted(names))}")
        for name, value in settings.items():
            if name == "model":
                settings[name] = str(value)
            elif name in ("out", "calibration", "scratch") and value is not None:
                settings[name] = Path(value)
            elif name.endswith("_mem") and isinstance(value, str):
                settings[name] = parse_bytes(value)
        return cls(**settings)

    def fixed(self) -> dict[str, Any]:
        """The settings that decide the output, by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("fixed")}
