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
    refuses it; of calibration and allocation it is the content that is fixed. The others (places, budgets) may change
    from one start to the next.
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
    pattern: str | None = _setting(
        None,
        "Sparsity of S: n:m keeps n of every m, 50% zeroes half, 50%/row half of each row [default: 2:4].",
        fixed=True,
    )
    rank: int | None = _setting(None, "Rank of U·V; 0 for pure sparsity [default: 64].", fixed=True)
    ranks: str | None = _setting(None, "Ranks by name, like q_proj=32,down_proj=128; others have --rank.", fixed=True)
    compression: str | None = _setting(
        None,
        "Share of each linear's parameters to leave out, 50% or 50%/row; with --rank-ratio in place of --pattern.",
        fixed=True,
    )
    rank_ratio: float | None = _setting(
        None, "Share of the parameters kept that U and V take, in place of --rank, like 0.25 (OATS).", fixed=True
    )
    owl: float | None = _setting(
        None, "Blocks with more outliers stay denser, by so much at most (OWL); the paper's is 0.08.", fixed=True
    )
    owl_outlier: float | None = _setting(
        None, "How often the mean of a block's |W|·‖X‖ makes an outlier in OWL [default: 5].", fixed=True
    )
    allocation: Path | None = _setting(
        None, 'JSON file of patterns and ranks by name, {"q_proj": {"pattern": "2:4", "rank": 32}}; others as above.'
    )
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
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        if not 0 < self.match_lr < math.inf:
            raise InputError(f"--match-lr is {self.match_lr}; it must be above 0")
        if not 0 <= self.match_recover <= 1:
            raise InputError(f"--match-recover is {self.match_recover}; it must be from 0 to 1")
        if self.device not in (None, "cpu", "cuda"):
            raise InputError(f"--device is {self.device!r}; it must be cpu or cuda")
        if self.rank_ratio is not None and not 0 <= self.rank_ratio < 1:
            raise InputError(f"--rank-ratio is {self.rank_ratio}; it must be at least 0 and below 1")
        if self.owl is not None and not 0 < self.owl < 1:
            raise InputError(f"--owl is {self.owl}; it must be above 0 and below 1")
        if self.owl_outlier is not None and not 0 < self.owl_outlier < math.inf:
            raise InputError(f"--owl-outlier is {self.owl_outlier}; it must be above 0")
        if self.owl_outlier is not None and self.owl is None:
            raise InputError(f"--owl-outlier {self.owl_outlier:g} says how --owl counts; give --owl too, like 0.08")
        for one, other in (
            ("compression", "pattern"),
            ("compression", "rank"),
            ("rank_ratio", "rank"),
            ("rank_ratio", "ranks"),
            ("owl", "allocation"),
        ):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                flags = (f"--{name.replace('_', '-')} {getattr(self, name)}" for name in (one, other))
                raise InputError(f"{' and '.join(flags)} decide the same; give one of them")
        if self.compression is not None and self.rank_ratio is None:
            raise InputError(
                f"--compression {self.compression} needs --rank-ratio, the share of what is kept that U and V take "
                f"(0 for pure sparsity)"
            )

    @classmethod
    def of(cls, **settings: Any) -> "RunConfig":
        """From what people type: paths as text, sizes like "45GB". Raises InputError for an unknown setting."""
        names = {f.name for f in fields(cls)}
        if unknown := sorted(settings.keys() - names):
            raise InputError(f"unknown setting {', '.join(unknown)}; there are {', '.join(sorted(names))}")
        for name, value in settings.items():
            if name == "model":
                settings[name] = str(value)
            elif name in ("out", "calibration", "allocation", "scratch") and value is not None:
                settings[name] = Path(value)
            elif name.endswith("_mem") and isinstance(value, str):
                settings[name] = parse_bytes(value)
        return cls(**settings)

    def fixed(self) -> dict[str, Any]:
        """The settings that decide the output, by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("fixed")}
