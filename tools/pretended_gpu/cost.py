"""What work on a GPU costs: FLOPs by unit, bytes, launches, copies and waits of each phase, and seconds at rates.

Figures of operators are of the CUDA implementations of torch 2.13. Bytes of an operator are those of its inputs and
outputs, each read or written once; workspaces are what an implementation allocates beside its result.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MULTIPROCESSORS = 132
"""Of an H100; deterministic attention takes workspace by it."""


@dataclass(frozen=True)
class Card:
    """Achieved rates of a card and its host, in FLOP/s and bytes/s; assumed, not measured.

    flops: by unit. "lapack" is cuSOLVER's factorizations and solves in float32.
    memory: device memory.
    pinned, pageable: copies between host and device, each direction, from pinned and from pageable host memory.
    launch: seconds that Python and torch take to start one operator, whatever its size.
    disk, digest: reading or writing a file, and sha256, each in one thread.
    """

    name: str = "H100"
    flops: Mapping[str, float] = field(
        default_factory=lambda: {"bf16": 700e12, "tf32": 350e12, "fp32": 50e12, "fp64": 50e12, "lapack": 30e12}
    )
    memory: float = 2.6e12
    pinned: float = 25e9
    pageable: float = 8e9
    launch: float = 5e-6
    disk: float = 3e9
    digest: float = 1.5e9


@dataclass
class Cost:
    """Cost of one phase.

    Attributes:
        work: (unit, FLOPs, bytes) of a kernel -> how many there were, so that any card can be asked later.
        operators: Operator -> its calls, bytes and FLOPs.
        copied: ("h2d" or "d2h", "pinned" or "pageable") -> bytes.
        syncs: Times that the host waited for all work of a stream: `.item()`, blocking copies, `synchronize()`.
        event_waits: Times that the host waited for one event.
        file_bytes: (thread, "read", "write" or "digest") -> bytes that it read from and wrote to files, and put into
            digests; counted by whoever stands in for the files.
    """

    work: Counter[tuple[str, float, int]] = field(default_factory=Counter)
    operators: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    copied: Counter[tuple[str, str]] = field(default_factory=Counter)
    syncs: int | float = 0
    event_waits: int | float = 0
    file_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def h2d(self) -> int:
        """Bytes copied from host to device."""
        return self.copied["h2d", "pinned"] + self.copied["h2d", "pageable"]

    @property
    def d2h(self) -> int:
        """Bytes copied from device to host."""
        return self.copied["d2h", "pinned"] + self.copied["d2h", "pageable"]

    @property
    def launches(self) -> int:
        return sum(self.work.values())

    @property
    def bytes(self) -> int:
        """Bytes of device memory that kernels read and write."""
        return sum(nbytes * times for (_, _, nbytes), times in self.work.items())

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs by unit."""
        flops: dict[str, float] = defaultdict(float)
        for (unit, count, _), times in self.work.items():
            if count:
                flops[unit] += count * times
        return dict(flops)

    def seconds(self, card: Card) -> dict[str, float]:
        """Return the seconds of each kind of work at a card's rates, and "total".

        A kernel takes the longer of its FLOPs and its bytes. Copies of pageable memory hold the device up. Copies of
        pinned memory, launches, and each thread that reads, writes and digests files go on beside the kernels, so the
        total is the longest of these.
        """
        parts: dict[str, float] = defaultdict(float)
        for (unit, flops, nbytes), times in self.work.items():
            of_flops, of_bytes = flops / card.flops.get(unit, math.inf), nbytes / card.memory
            parts[unit if of_flops > of_bytes else "memory"] += times * max(of_flops, of_bytes)
        pageable = self.copied["h2d", "pageable"] + self.copied["d2h", "pageable"]
        held_up = sum(parts.values()) + pageable / card.pageable
        beside = {
            "pinned copies": max(self.copied["h2d", "pinned"], self.copied["d2h", "pinned"]) / card.pinned,
            "launches": self.launches * card.launch,
            "files": self._file_seconds(card),
        }
        total = max(held_up, *beside.values())
        return {**parts, "pageable copies": pageable / card.pageable, **beside, "total": total}

    def _file_seconds(self, card: Card) -> float:
        """Return the seconds of the busiest thread, or of the disk where all together keep it longer."""
        threads: dict[str, float] = defaultdict(float)
        disk = 0.0
        for (thread, kind), nbytes in self.file_bytes.items():
            seconds = nbytes / (card.digest if kind == "digest" else card.disk)
            threads[thread] += seconds
            disk += 0 if kind == "digest" else seconds
        return max(disk, *threads.values()) if threads else 0.0

    def plus(self, other: "Cost", factor: float = 1.0) -> "Cost":
        """Return this cost and `factor` times another; subtract with a negative factor."""

        def sums(mine: Counter[Any], theirs: Counter[Any]) -> Counter[Any]:
            return Counter({key: mine[key] + factor * theirs[key] for key in mine.keys() | theirs.keys()})

        made = Cost(
            work=sums(self.work, other.work),
            copied=sums(self.copied, other.copied),
            syncs=self.syncs + factor * other.syncs,
            event_waits=self.event_waits + factor * other.event_waits,
            file_bytes=sums(self.file_bytes, other.file_bytes),
        )
        for name in self.operators.keys() | other.operators.keys():
            made.operators[name] = sums(self.operators[name], other.operators[name])
        return made


def unit_of(dtype: torch.dtype) -> str:
    """Return the unit that multiplies matrices of a dtype; float32 ones by TF32 where torch's flags allow it."""
    if dtype == torch.float32:
        return "tf32" if torch.get_float32_matmul_precision() != "highest" else "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float64: "fp64"}.get(dtype, "fp32")


def operator_flops(name: str, args: Sequence[Any]) -> tuple[str, float]:
    """Return (unit, FLOPs) of an aten operator by its name without overload; everything else is ("memory", 0)."""
    sizes = [tuple(a.shape) if isinstance(a, Tensor) else () for a in args]
    if name in ("addmm", "addmm_", "baddbmm", "baddbmm_", "addmv", "addmv_"):  # the first is what is added to
        args, sizes = args[1:], sizes[1:]
    if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"):
        return unit_of(args[0].dtype), 2.0 * math.prod(sizes[0]) * sizes[1][-1]
    if name == "linear":
        return unit_of(args[0].dtype), 2.0 * math.prod(sizes[0]) * sizes[1][0]
    if name in ("mv", "addmv", "addmv_"):
        return unit_of(args[0].dtype), 2.0 * math.prod(sizes[0])
    if name in ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"):
        b, h, t, d = sizes[0]
        return "bf16", 2.0 * b * h * t * t * d  # causal: half of two products
    if name in (
        "_scaled_dot_product_flash_attention_backward",
        "_scaled_dot_product_efficient_attention_backward",
    ):
        b, h, t, d = sizes[1]
        return "bf16", 5.0 * b * h * t * t * d
    if name in ("linalg_cholesky_ex", "cholesky"):
        return "lapack", sizes[0][-1] ** 3 / 3
    if name == "cholesky_inverse":  # by potrs on the identity, not potri
        return "lapack", 2.0 * sizes[0][-1] ** 3
    if name == "linalg_solve_triangular":
        return unit_of(args[0].dtype), float(math.prod(sizes[1]) * sizes[0][-1])
    if name == "linalg_qr":
        rows, columns = sizes[0][-2:]
        return "lapack", 4.0 * rows * columns * columns
    if name in ("linalg_eigh", "_linalg_eigh"):
        return "lapack", 9.0 * sizes[0][-1] ** 3
    return "memory", 0.0


def extra_launches(name: str, args: Sequence[Any]) -> int:
    """Return the kernels beyond the first of an operator that is many: Householder columns one after another."""
    if name == "linalg_qr":
        return 6 * int(min(args[0].shape[-2:]))
    return 300 if name in ("linalg_eigh", "_linalg_eigh") else 0


_WORKSPACE: Mapping[str, Callable[[Sequence[Any]], int]] = {
    # the working copy of the factor (BatchLinearAlgebraLib.cpp), and what cuSOLVER asks for
    "cholesky_inverse": lambda a: a[0].nbytes + min(64 * 2**20, a[0].nbytes),
    "linalg_cholesky_ex": lambda a: 128 * a[0].shape[-1] * 4 + 2**20,
    "linalg_qr": lambda a: 3 * a[0].nbytes,
    "masked_scatter_": lambda a: 8 * a[0].numel(),  # int64 prefix sums
    "nonzero": lambda a: 4 * a[0].numel() + a[0].numel() // 4,
    "kthvalue": lambda a: a[0].nbytes,
    "topk": lambda a: a[0].nbytes,
    "sort": lambda a: 2 * (a[0].nbytes + 8 * a[0].numel()),
    "argsort": lambda a: 2 * (a[0].nbytes + 8 * a[0].numel()),
}


def workspace_bytes(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the bytes that CUDA's implementation of an operator allocates beside what it returns."""
    if name in _WORKSPACE:
        return int(_WORKSPACE[name](args))
    if name == "_scaled_dot_product_flash_attention_backward":
        query = args[1]  # [b, heads, t, d]; dQ in float32, once for each split where the order of sums is fixed
        heads = query.shape[0] * query.shape[1]
        splits = -(-MULTIPROCESSORS // heads) if torch.are_deterministic_algorithms_enabled() else 1
        return int(4 * query.numel() * splits + 2 * query.numel())  # and dK, dV of expanded heads
    if name in ("sum", "nansum") and kwargs.get("dtype") not in (None, args[0].dtype):
        return int(args[0].numel() * kwargs["dtype"].itemsize)  # a wider sum casts the whole input first
    return 0


def operator_bytes(tensors: Sequence[Tensor], written: Sequence[Tensor]) -> int:
    """Return the bytes that a kernel reads from `tensors` and writes to `written`; what is expanded counts once."""
    seen = set()
    nbytes = 0
    for tensor in tensors:
        key = (id(tensor.untyped_storage()), tensor.storage_offset(), tensor.numel())
        if key not in seen:
            seen.add(key)
            nbytes += _distinct_bytes(tensor)
    return nbytes + sum(map(_distinct_bytes, written))


def _distinct_bytes(tensor: Tensor) -> int:
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return int(math.prod(sizes)) * tensor.dtype.itemsize
