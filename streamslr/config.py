"""RunConfig: every setting of a run, its help text, and whether it may change when the run is resumed."""

import hashlib
import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from streamslr.errors import InputError

LARGEST = 2**31 - 1
"""Largest count that a setting may have; no work of that size would end."""

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
    """Return a size in bytes: '45GB' -> 45 * 10**9, '16GiB' -> 16 * 2**30, a bare number is bytes.

    Raises:
        InputError: The text is no size.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", text.upper())
    if not match:
        raise InputError(f"{text!r} is not a size; write it like 45GB or 16GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(count: float) -> str:
    """Return a size for people, in decimal units as disk vendors count: 2_350_000 -> '2.4 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def base_name(model: str) -> str:
    """Return the last part of a hub id or of a folder's path, of "." and ".." the folder's own name."""
    name = Path(model).name
    return Path(model).resolve().name if name in ("", "..") else name


def default_out(model: str) -> Path:
    """Return the output folder of a run that names none: NAME-slr in the current folder, NAME as in `base_name`."""
    return Path(f"{base_name(model)}-slr")


def _setting(default: Any, help: str, *, fixed: bool = False) -> Any:
    return field(default=default, metadata={"help": help, "fixed": fixed})


@dataclass(frozen=True)
class RunConfig:
    """Settings of one compression; options of the command line and parameters of `streamslr.compress`.

    Both have these fields' names and defaults, the command line also the help texts. A *fixed* field decides what is
    written: a resumed run refuses another value, which would mix two runs in one folder. Of calibration and allocation
    the content is fixed. The other fields (folders, budgets) may change from one start to the next.
    """

    model: str = field(metadata={"help": "Model folder, or a hub id such as meta-llama/Meta-Llama-3-70B."})
    out: Path = _setting(  # never None: __post_init__ puts the default in its place
        None,
        "Folder to write; the same line again resumes in it [default: ./NAME-slr, NAME the last part of --model].",
    )
    revision: str | None = _setting(None, "Branch, tag or commit of a hub model; pinned to its commit at the start.")
    calibration: Path | None = _setting(
        None,
        "Calibration text: .txt, .jsonl with a `text` field, or .gz of either [default: C4 from the hub].",
    )
    samples: int = _setting(128, "Number of calibration windows.", fixed=True)
    bos: str = _setting(
        "auto",
        "First token of each window is the tokenizer's BOS: yes, no, or auto, where the tokenizer adds one by itself.",
        fixed=True,
    )
    seq_len: int = _setting(2048, "Tokens in a window.", fixed=True)
    method: str = _setting(
        "3basil", "Method that replaces W by S + U·V: a name that `streamslr methods` lists.", fixed=True
    )
    pattern: str | None = _setting(
        None,
        "Sparsity pattern of S: n:m keeps n of every m weights, 50% zeroes half, 50%/row half of each row, "
        "dense none, for --values [default: 2:4].",
        fixed=True,
    )
    values: str = _setting(
        "stored",
        "Numbers that S may hold: stored, as the checkpoint has them, bf16, or codes with a scale a group: int8, int4, "
        "fp8.",
        fixed=True,
    )
    low_rank_values: str = _setting(
        "stored",
        "Numbers that U and V may hold: stored, as the checkpoint has them, bf16, or int8, codes with a scale for each "
        "component of the rank.",
        fixed=True,
    )
    group: int = _setting(128, "Columns of a row that share a scale, with --values int8, int4 or fp8.", fixed=True)
    rounding: str = _setting(
        "solved",
        "How S comes onto the grid of --values: solved, with scales and U·V in the metric of the inputs, or nearest, "
        "after the solve.",
        fixed=True,
    )
    rank: int | None = _setting(None, "Rank of U·V; 0 for pure sparsity [default: 64].", fixed=True)
    ranks: str | None = _setting(
        None, "Ranks by name of the linear, like q_proj=32,down_proj=128; the others have --rank.", fixed=True
    )
    compression: str | None = _setting(
        None,
        "Fraction of each linear's parameters to remove, 50% or 50%/row; with --rank-ratio, in place of --pattern.",
        fixed=True,
    )
    rank_ratio: float | None = _setting(
        None, "Fraction of the remaining parameters for U and V, like 0.25 (OATS); in place of --rank.", fixed=True
    )
    owl: float | None = _setting(
        None,
        "Blocks with more outliers keep more weights (OWL); largest difference from the mean sparsity, 0.08 in the "
        "paper.",
        fixed=True,
    )
    owl_outlier: float | None = _setting(
        None,
        "OWL counts a weight as an outlier if |W|·‖X‖ is this many times the block's mean [default: 5].",
        fixed=True,
    )
    allocation: Path | None = _setting(
        None,
        "JSON file with pattern, rank and values by name of the linear, "
        '{"q_proj": {"pattern": "2:4", "rank": 32, "values": "int4"}}; the others have --pattern, --rank and --values.',
    )
    seed: int = _setting(
        0, "Seed of the choice of windows, of the solver, and of the order of windows in matching.", fixed=True
    )
    match: bool = _setting(True, "Train each compressed block to give the dense block's output.", fixed=True)
    match_epochs: int | None = _setting(
        None,
        "Passes over the windows in matching, the first only measures [default: 10; with more than 128 windows "
        "fewer, so that as many windows pass, but at least 3].",
        fixed=True,
    )
    match_batch: int = _setting(4, "Windows in an optimizer step of matching.", fixed=True)
    match_lr: float = _setting(
        1.2,
        "Learning rate of matching; at 1, a step can change a linear's output by about the block's relative error.",
        fixed=True,
    )
    match_held_out: int = _setting(
        8,
        "Windows of the calibration text, apart from --samples, that judge matching: where a block's loss on them does "
        "not fall, it stays as it was solved; 0 for none.",
        fixed=True,
    )
    match_recover: float = _setting(
        1.0, "Fraction of the earlier blocks' error that matching corrects in a block; 0 in the paper.", fixed=True
    )
    check_windows: int = _setting(
        4,
        "Windows of the calibration text, apart from --samples, on which the result is compared with the dense model; "
        "0 for none. A resumed run keeps its first number.",
    )
    device: str | None = _setting(
        None, "Device to compute on, cpu or cuda [default: cuda where there is one].", fixed=True
    )
    scratch: Path | None = _setting(None, "Folder for hidden states, removed at the end [default: OUT/.scratch].")
    host_mem: int | None = _setting(None, "Host memory the run may use, like 16GB [default: what is free].")
    gpu_mem: int | None = _setting(
        None, "GPU memory the run may take, CUDA's own included, like 45GB [default: what is free]."
    )
    evict_shards: bool = _setting(False, "Delete each hub shard this run downloaded once its blocks are done.")

    def __post_init__(self) -> None:
        if self.out is None:
            object.__setattr__(self, "out", default_out(self.model))  # frozen, except here
        self._require_ranges()
        self._require_no_contradiction()

    def _require_ranges(self) -> None:
        for name, least in (
            ("samples", 1),
            ("seq_len", 2),
            ("rank", 0),
            ("match_epochs", 2),
            ("match_batch", 1),
            ("match_held_out", 0),
            ("group", 1),
            ("check_windows", 0),
        ):
            if (value := getattr(self, name)) is not None and not least <= value <= LARGEST:
                bound = f"at least {least}" if value < least else f"at most {LARGEST:,}"
                raise InputError(f"{_flag(name)} is {value}; it must be {bound}")
        for name in ("model", "out"):
            try:
                os.fsencode(getattr(self, name)).decode("utf-8")
            except UnicodeError as error:
                raise InputError(
                    f"{_flag(name)} {getattr(self, name)} is no path in UTF-8, which safetensors needs; rename it"
                ) from error
        if not -(2**63) <= self.seed < 2**63:
            raise InputError(f"--seed is {self.seed}; it must be below 2^63")
        if not 0 < self.match_lr < math.inf:
            raise InputError(f"--match-lr is {self.match_lr}; it must be above 0")
        if not 0 <= self.match_recover <= 1:
            raise InputError(f"--match-recover is {self.match_recover}; it must be from 0 to 1")
        if self.device not in (None, "cpu", "cuda"):
            raise InputError(f"--device is {self.device!r}; it must be cpu or cuda")
        if self.rounding not in ("solved", "nearest"):
            raise InputError(f"--rounding is {self.rounding!r}; it must be solved or nearest")
        if self.bos not in ("auto", "yes", "no"):
            raise InputError(f"--bos is {self.bos!r}; it must be auto, yes or no")
        if self.rank_ratio is not None and not 0 <= self.rank_ratio < 1:
            raise InputError(f"--rank-ratio is {self.rank_ratio}; it must be at least 0 and below 1")
        if self.owl is not None and not 0 < self.owl < 1:
            raise InputError(f"--owl is {self.owl}; it must be above 0 and below 1")
        if self.owl_outlier is not None and not 0 < self.owl_outlier < math.inf:
            raise InputError(f"--owl-outlier is {self.owl_outlier}; it must be above 0")

    def _require_no_contradiction(self) -> None:
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
                flags = (f"{_flag(name)} {getattr(self, name)}" for name in (one, other))
                raise InputError(f"{' and '.join(flags)} decide the same; give one of them")
        if self.compression is not None and self.rank_ratio is None:
            raise InputError(
                f"--compression {self.compression} needs --rank-ratio, the fraction of the remaining parameters that U "
                f"and V take (0 for pure sparsity)"
            )

    @classmethod
    def of(cls, **settings: Any) -> "RunConfig":
        """Make a RunConfig of what people type: paths as text, sizes like "45GB".

        Raises:
            InputError: A setting is unknown, or its value is impossible.
        """
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
        """Return the settings that decide the output, by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("fixed")}

    @property
    def epochs(self) -> int:
        """Passes over the windows in matching, as given or by their number.

        By default as many windows pass as with 10 epochs of 128 (tools/results, "A real model").
        """
        return self.match_epochs or max(3, min(10, round(1280 / self.samples)))

    @property
    def held_out(self) -> int:
        """Number of windows that judge matching, behind the `samples` that are fitted; 0 without matching."""
        return self.match_held_out if self.match else 0

    @property
    def scratch_folder(self) -> Path:
        """Folder for the hidden states of this output folder alone, also where runs share one --scratch."""
        if self.scratch is None:
            return self.out / ".scratch"
        out = str(self.out.absolute())
        return self.scratch / f"{self.out.name}-{hashlib.sha256(out.encode()).hexdigest()[:12]}"


def idle_settings(config: RunConfig, device: str) -> list[str]:
    """Return a sentence for each setting that was given and cannot take effect.

    Args:
        config: Settings of the run.
        device: Type of the device it computes on, "cpu" or "cuda".
    """
    found = []
    if config.gpu_mem is not None and device == "cpu":
        found.append(
            f"--gpu-mem {format_bytes(config.gpu_mem)} has no effect: the device is {device} (for a GPU: --device cuda)"
        )
    if config.evict_shards and Path(config.model).expanduser().is_dir():
        found.append(f"--evict-shards has no effect: {config.model} is a folder, and only downloads are deleted")
    if not config.match:
        changed = [f for f in fields(config) if f.name.startswith("match_") and getattr(config, f.name) != f.default]
        found += [f"{_flag(f.name)} {getattr(config, f.name):g} has no effect with --no-match" for f in changed]
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
