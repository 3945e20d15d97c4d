"""CUDA made ready for hard budgets and for equal bytes: its allocator, what it takes for itself, its operators.

Everything here does nothing on a CPU. The results of a run depend on card, torch build and driver all the same.
"""

import logging
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from streamslr.config import format_bytes
from streamslr.errors import BudgetError, InputError, first_line, says_not_deterministic
from streamslr.ranks import ALONE, Ranks

_CUBLAS_WORKSPACES = ":4096:8"
"""Workspaces of 8 · 4 MiB for each thread that multiplies: one of the two settings with which cuBLAS gives the same
bits each time, and its default on an H100 (docs.nvidia.com/cuda/cublas, "Results Reproducibility")."""

_EXPANDABLE = "expandable_segments"
_CONF_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

_USABLE, _USABLE_IN_FIXED_SEGMENTS = 0.97, 0.86
"""Fractions of the allocator's limit that a plan fills. Segments that expand leave gaps of less than 20 MB. In segments
of fixed size 20.33 GB of tensors took 23.58 GB in a simulation of a 70B block, 1.16 times as much."""

_PLANNED_CONTEXT, _PLANNED_WORKSPACES = 600 * 2**20, 2 * 32 * 2**20
"""Bytes that CUDA takes beside torch's allocator, and cuBLAS within it, for a GPU that is only planned for."""

_LARGEST_CONTEXT = 2**30
"""Most bytes that are taken for CUDA's own where it is not known what other processes hold of the card."""

_OTHER_WORKSPACES = "cuBLAS was set up with other workspaces than CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8"

log = logging.getLogger("streamslr")

T = TypeVar("T")


@dataclass(frozen=True)
class GpuMemory:
    """Memory of a card that this process may take, in bytes; `nvidia-smi` shows the process with at most `budget`.

    budget: all of it.
    context: CUDA's own: its context and the kernels that are loaded. Not of torch's allocator.
    workspaces: cuBLAS's, which torch's allocator holds from the first product on.
    expandable: segments of torch's allocator grow, so that hardly any memory is lost between tensors.
    """

    budget: int
    context: int = _PLANNED_CONTEXT
    workspaces: int = _PLANNED_WORKSPACES
    expandable: bool = True

    @property
    def limit(self) -> int:
        """Bytes that torch's allocator may reserve."""
        return max(0, self.budget - self.context)

    @property
    def usable(self) -> int:
        """Bytes of tensors that a plan may fill; the rest of the limit is for gaps between them."""
        return int(self.limit * (_USABLE if self.expandable else _USABLE_IN_FIXED_SEGMENTS))

    def made_with(self) -> dict[str, str]:
        """Return what the journal keeps of it, in words."""
        return {
            "gpu allocator": "expandable segments" if self.expandable else "segments of fixed size",
            "gpu memory of CUDA itself": format_bytes(self.context),
        }


def pick_device(name: str | None, gpu_required: bool = True, index: int = 0) -> tuple[torch.device, torch.dtype]:
    """Return the device called `name`, by default the best there is, and the dtype to compute in there.

    For a GPU, set what must be set before CUDA starts.

    Args:
        name: "cpu" or "cuda"; None stands for cuda where there is one.
        gpu_required: Refuse "cuda" where torch sees no GPU.
        index: Number of the GPU to take.

    Raises:
        InputError: A GPU is asked for and required, and torch sees none, or not so many.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        return device, torch.float32
    if gpu_required and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no GPU here; use --device cpu")
    _set_environment()
    # torch's limit on memory wants a number; asking torch for it would start CUDA
    if not torch.cuda.is_available():
        return device, torch.bfloat16
    if index and index >= torch.cuda.device_count():
        raise InputError(f"GPU {index} is asked for, torch sees {torch.cuda.device_count()}; start a rank for each GPU")
    return torch.device("cuda", index), torch.bfloat16


def _set_environment() -> None:
    """Ask cuBLAS for workspaces that give the same bits, torch's allocator for segments that expand.

    What the user set stays. Both are read when CUDA starts; torch's allocator takes its setting later too.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACES)
    set_settings = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # torch 2.10 and later
    name = next((n for n in _CONF_NAMES if n in os.environ), _CONF_NAMES[1 if set_settings else 0])
    chosen = os.environ.get(name, "")
    if _EXPANDABLE in chosen or "backend" in chosen:
        return
    os.environ[name] = ",".join(filter(None, (chosen, f"{_EXPANDABLE}:True")))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        log.info("CUDA was started before streamslr: memory that it holds already stays in segments of fixed size")
        if set_settings:
            set_settings(os.environ[name])


def open_gpu(device: torch.device, budget: int | None, ranks: Ranks = ALONE) -> GpuMemory:
    """Start CUDA and its libraries, and measure what they take for themselves.

    Call `pick_device` first.

    Args:
        device: A GPU.
        budget: Bytes that the process may take of the card, all in all; None: what is free.
        ranks: Ranks that exchange tensors of their GPUs, for which NCCL takes memory; each must call this.

    Raises:
        BudgetError: The card has less than the budget, or less is free on it.
    """
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    before = None if started else _free_by_driver()
    if device.index:
        torch.cuda.set_device(device)  # for kernels that run on the current device
    expandable = _start_libraries(device)
    if ranks.world > 1:
        ranks.sum_(torch.zeros(1, device=device))
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    workspaces, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    if before is not None and (uuid := str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))) in before:
        context = max(0, before[uuid] - free - reserved)
    else:  # then what others hold of the card counts too
        context = min(max(0, total - free - reserved), _LARGEST_CONTEXT)
    available = free + reserved + context
    if budget is not None and budget > total:
        raise BudgetError(
            f"--gpu-mem {format_bytes(budget)} is more than {torch.cuda.get_device_name(device)} has, "
            f"{format_bytes(total)}; give --gpu-mem {format_bytes(available)} or less"
        )
    if budget is not None and budget > available:
        raise BudgetError(
            f"--gpu-mem {format_bytes(budget)} is more than is free on the card: {format_bytes(available)} of "
            f"{format_bytes(total)}; end what else uses it, or give a smaller --gpu-mem"
        )
    memory = GpuMemory(available if budget is None else budget, context, workspaces, expandable)
    log.info(
        "of %s of GPU memory CUDA takes %s for itself; torch's allocator has %s",
        format_bytes(memory.budget),
        format_bytes(context),
        "expandable segments" if expandable else "segments of fixed size, so less of it can be planned for",
    )
    return memory


def _free_by_driver() -> dict[str, int] | None:
    """Return the free bytes of each card by its UUID, without starting CUDA; None where nvidia-smi is missing."""
    if not (tool := shutil.which("nvidia-smi")):
        return None
    query = [tool, "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        rows = [line.split(",") for line in answer.splitlines() if line.strip()]
        return {uuid.strip().removeprefix("GPU-"): int(mebibytes) * 2**20 for uuid, mebibytes in rows}
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _start_libraries(device: torch.device) -> bool:
    """Run once what a run computes with, so that its kernels are loaded; tell if the allocator's segments expand.

    cuBLAS and cuSOLVER take memory for each thread that calls them. Backward passes have a thread of their own.
    """
    expandable = _segments_expand(device)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(256, 64, device=device, dtype=dtype)
        (x @ x.T).sum()
    symmetric = torch.eye(64, device=device)
    torch.cholesky_inverse(torch.linalg.cholesky(symmetric))
    torch.linalg.qr(symmetric)
    torch.linalg.eigh(symmetric)
    query = torch.ones(1, 2, 64, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    with torch.enable_grad():
        attended = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        (attended @ attended.transpose(2, 3)).float().square().sum().backward()  # type: ignore[no-untyped-call]
    return expandable


def _segments_expand(device: torch.device) -> bool:
    """Tell if torch's allocator has a segment that expands; turn them off where the driver refuses them."""
    try:
        probe = torch.empty(32 * 2**20, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # no virtual memory: some drivers, virtual GPUs
        if isinstance(error, torch.OutOfMemoryError):
            raise
        log.warning("the driver refuses expandable segments (%s)", first_line(error))
        set_settings = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        (set_settings or torch.cuda.memory._set_allocator_settings)(f"{_EXPANDABLE}:False")
        return False
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    found = any(segment.get("is_expandable") for segment in segments)
    del probe
    return found


# Equal bytes


@dataclass
class _Operators:
    """Which operators a scope of `deterministic_operators` allows."""

    entered: bool = False  # `deterministic_libraries` holds on a GPU
    strict: bool = True  # operators without a deterministic form raise; False: they warn


_operators = _Operators()


@contextmanager
def deterministic_libraries(device: torch.device, strict: bool = True) -> Iterator[None]:
    """Make cuBLAS and attention give the same bits each time while entered, and `deterministic_operators` work.

    Products are not split into parts that are summed in bf16. Attention by cuDNN is off: its backward pass sums in any
    order (pytorch, sdp_utils.cpp, check_cudnn_deterministic).

    Args:
        device: Where is computed; nothing happens on a CPU.
        strict: Operators of the model that have no deterministic form raise RuntimeError, and attention's backward
            pass is deterministic. False: they warn.
    """
    if device.type == "cpu":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [
        (matmul, "allow_bf16_reduced_precision_reduction", False),
        (matmul, "allow_fp16_reduced_precision_reduction", False),
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
    ]
    with ExitStack() as stack:
        for holder, name, value in before:
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, value)
        with_cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        stack.callback(torch.backends.cuda.enable_cudnn_sdp, with_cudnn)
        torch.backends.cuda.enable_cudnn_sdp(False)
        stack.callback(_restore, _operators.entered, _operators.strict)
        _restore(True, strict)
        yield


def _restore(entered: bool, strict: bool) -> None:
    _operators.entered, _operators.strict = entered, strict


@contextmanager
def deterministic_operators() -> Iterator[None]:
    """Make torch choose operators that give the same bits each time, for code that is not ours: a model's.

    Does nothing outside of `deterministic_libraries`. Our own code needs it nowhere, as long as its indices are unique;
    torch would sort them for nothing.
    """
    if not _operators.entered:
        yield
        return
    filling = "fill_uninitialized_memory"  # takes time, and nothing here reads such memory
    with ExitStack() as stack:
        stack.callback(setattr, torch.utils.deterministic, filling, getattr(torch.utils.deterministic, filling))
        setattr(torch.utils.deterministic, filling, False)
        stack.enter_context(_deterministic(True, warn_only=not _operators.strict))
        if not _operators.strict:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*deterministic")
        yield


@contextmanager
def in_any_order() -> Iterator[None]:
    """Let an operator work in any order within `deterministic_operators`, since it cannot change a bit here."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    with _deterministic(False, warn_only=False):
        yield


@contextmanager
def _deterministic(mode: bool, warn_only: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def retry_in_any_order(work: Callable[[], T], phase: str, note: Callable[[str, str], None]) -> T:
    """Call `work`; where the model has an operator without a deterministic form, allow it from here on and call again.

    Args:
        work: What to do. It must leave nothing behind when it fails.
        phase: Name of the work.
        note: Called with the phase and a sentence for the journal.
    """
    try:
        return work()
    except RuntimeError as error:
        if not (_operators.entered and _operators.strict and says_not_deterministic(error)):
            raise
        operator, _, rest = first_line(error).partition(" does not have")
        sentence = f"{operator} has no deterministic form on this GPU" if rest else _OTHER_WORKSPACES
    _operators.strict = False
    sentence += ", last bits may differ from run to run"
    log.warning("phase %s: %s", phase, sentence)
    note(phase, sentence)
    return work()
