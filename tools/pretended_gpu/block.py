"""One block of a model of any shape through the run's own code on a pretended GPU, without its weights.

The checkpoint is a sparse file: headers of all blocks, zeros that take no disk. Everything from `open_run` and its plan
to the commit of block 0 is the run's own code, but for what stands in for files: the arrays of boundaries, digests and
the writing of the shard only count their bytes. So does the solver's Triton kernel. Scalars are `Answers`, so the
solver never settles: give it a number of iterations, and matching a number of epochs.
"""

import json
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from pretended_gpu.cost import Cost
from pretended_gpu.device import PretendedGpu
from pretended_gpu.ranks import PretendedRanks
from streamslr.calibration import expert_grams, grams, hidden_states
from streamslr.config import RunConfig
from streamslr.gpu import deterministic_libraries
from streamslr.io import folder as shard_folder
from streamslr.io import packing
from streamslr.io.packed_layout import part_dtype, part_shapes
from streamslr.io.safetensors_file import WrittenShard
from streamslr.io.scratch import rank_scratch
from streamslr.matching import Loss
from streamslr.memory import held_to_gpu_limit
from streamslr.model.blockwise import Block
from streamslr.ranks import Ranks
from streamslr.run import block_solver, loop
from streamslr.run.block_compressor import BlockCompressor
from streamslr.run.check import Check
from streamslr.run.context import RunContext, open_run
from streamslr.run.dealing import Deal
from streamslr.run.passes import Passes
from streamslr.run.plan import Plan
from streamslr.run.progress import BlockProgress, NoDisplay, PhaseTimer, WarningsOfRanks
from streamslr.run.rank_windows import RankWindows
from streamslr.run.solve_linear import LinearCompressor
from streamslr.solvers import threebasil_fused
from streamslr.solvers.threebasil_fused import FusedState
from streamslr.spec.allocation import Allocation, rounds_late
from streamslr.spec.pattern import SparsityPattern

_ANSWERS = {"_read": [1.0, 0.0], "inverse_error": 0.0}
"""Function of the solver -> what it reads: a support that moves, no failure of CholeskyQR2, inverses that are near."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, or of a DeepSeek-V3 where it has experts: `ffn` is then the width of one."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    blocks: int
    vocabulary: int = 128256
    experts: int = 0

    def config(self, positions: int, blocks: int) -> PretrainedConfig:
        """Return the config of `blocks` blocks. Those of a DeepSeek-V3 all have experts; the rest is as published."""
        sizes = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": blocks,
            "max_position_embeddings": positions,
            "dtype": "bfloat16",
        }
        if self.experts:
            routing = {"n_routed_experts": self.experts, "moe_intermediate_size": self.ffn, "first_k_dense_replace": 0}
            return AutoConfig.for_model("deepseek_v3", **sizes, **routing, architectures=["DeepseekV3ForCausalLM"])
        return AutoConfig.for_model("llama", **sizes, intermediate_size=self.ffn, architectures=["LlamaForCausalLM"])


SHAPES = {
    "8b": Shape(4096, 14336, 32, 8, 32),
    "70b": Shape(8192, 28672, 64, 8, 80),
    "405b": Shape(16384, 53248, 128, 8, 126),
    "small-mixture": Shape(512, 256, 8, 8, 2, vocabulary=512, experts=16),
    "deepseek-v3": Shape(7168, 2048, 128, 128, 61, vocabulary=129280, experts=256),
    "small": Shape(512, 1792, 8, 2, 2, vocabulary=512),
}


_SHARD_BYTES = 4 * 10**9
"""Bytes from which on a shard is full: a machine must be able to map it, though it takes no memory."""


@dataclass
class Peak:
    """The most bytes that a phase had allocated and reserved, and the largest allocations then (with `trace`)."""

    allocated: int = 0
    reserved: int = 0
    largest: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class BlockRun:
    """What one block took: its plan, and the cost and peak of each phase."""

    plan: Plan
    costs: Mapping[str, Cost]
    peaks: Mapping[str, Peak]
    retries: int
    """Times that the allocator gave back its cached memory because the limit was hit."""
    failures: int
    """Times that memory ran out."""
    sent: Mapping[str, int]
    """Bytes that a rank sent on average over ranks, by the name of the exchange."""

    def plan_over_peak(self, phase: str) -> float:
        """Return planned over allocated bytes of a phase."""
        (planned,) = (cost.gpu_bytes for cost in self.plan.phases if cost.name == phase)
        return planned / self.peaks[phase].allocated


def write_sparse_checkpoint(folder: Path, shape: Shape, positions: int, blocks: int | None = None) -> None:
    """Write a model of zeros that takes no disk: config.json, and shards with the headers of all tensors."""
    config = shape.config(positions, blocks or shape.blocks)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in _stored_shapes(model.state_dict().items()):
        if 2 * sum(map(prod, shards[-1].values())) > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = size
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_sparse_shard(folder / file_name, shard)
        index |= dict.fromkeys(shard, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _write_sparse_shard(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in shapes.items():
        start, end = end, end + 2 * prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


def _stored_shapes(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor in the checkpoint, which has the fused weights of experts one by one."""
    for name, tensor in tensors:
        module, _, kind = name.rpartition(".")
        names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind, ())
        if not names:
            yield name, tuple(tensor.shape)
            continue
        experts, o, d = tensor.shape
        for number in range(experts):
            yield from ((f"{module}.{number}.{own}.weight", (o // len(names), d)) for own in names)


@contextmanager
def watching_phases(gpu: PretendedGpu) -> Iterator[dict[str, Peak]]:
    """Add costs to the phase that is on, while entered; yield the peak of each phase as it becomes known."""
    peaks: dict[str, Peak] = defaultdict(Peak)
    gpu.phase_of_thread["shard-writer"] = "propagate"  # it may start before the phase does
    original = PhaseTimer.phase

    @contextmanager
    def phase(timer: PhaseTimer, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        before, gpu.phase = gpu.phase, name
        try:
            with original(timer, name, *args, **kwargs) as step:
                yield step
        finally:
            gpu.phase = before
            peak, now = peaks[name], gpu.allocator
            if now.peak_allocated > peak.allocated:
                peak.largest = gpu.at_peak
            peak.allocated = max(peak.allocated, now.peak_allocated)
            peak.reserved = max(peak.reserved, now.peak_reserved)

    with mock.patch.object(PhaseTimer, "phase", phase):
        yield peaks


def run_block(
    folder: Path,
    gpu: PretendedGpu,
    iterations: int = 20,
    windows: int | None = None,
    epochs: int = 2,
    world: int = 1,
    **settings: Any,
) -> BlockRun:
    """Compress block 0 of the checkpoint in `folder`, which `write_sparse_checkpoint` wrote.

    Args:
        folder: Folder of the checkpoint; the run's own folder is made beside it.
        gpu: Device without values; it must not be entered yet.
        iterations: Iterations of the solver for each linear, where its method has any.
        windows: Windows that pass, of all ranks; None for all. The plan is that of all.
        epochs: Epochs of matching.
        world: Ranks that share the run; rank 0 is there, the others are pretended (`PretendedRanks`).
        **settings: Settings of the run.
    """
    config = RunConfig(**{"model": str(folder), "out": folder.with_name("out"), "device": "cuda", **settings})
    gpu.answers.by_function |= _ANSWERS
    with ExitStack() as stack:
        for tables in (packing._flags_of_byte, packing._shifts_of_byte):
            stack.callback(tables.cache_clear)  # those made on this device have no values
        stack.enter_context(gpu)
        gpu.phase = "open"
        for target, name, stand_in in _stand_ins(gpu):
            stack.enter_context(mock.patch.object(target, name, stand_in))
        ranks = PretendedRanks(0, world, local_world=world)
        context = open_run(config, ranks=ranks)
        peaks = stack.enter_context(watching_phases(gpu))
        gpu.phase = "between phases"
        passing = replace(config, samples=windows or config.samples, match_epochs=epochs)
        _compress_block(replace(context, config=passing), iterations)
    allocator = gpu.allocator
    return BlockRun(
        context.plan, dict(gpu.by_phase), dict(peaks), allocator.retries, allocator.failures, dict(ranks.sent)
    )


def _compress_block(context: RunContext, iterations: int) -> None:
    """Do what `loop.run` does, for block 0 alone, with a journal that keeps nothing."""
    config, plan = context.config, context.plan
    ids = torch.zeros(config.samples + config.held_out, config.seq_len, dtype=torch.int64)
    journal: Any = SimpleNamespace(state=SimpleNamespace(shards=[], blocks=[]), commit_block=lambda *_, **__: None)
    assert context.allocation is not None
    traffic = context.ranks.traffic if context.ranks.world > 1 else None
    with (
        PhaseTimer(context.device, NoDisplay(), None, plan.memory, traffic=traffic) as timer,
        held_to_gpu_limit(context.device, context.gpu.limit if context.gpu else None),
        deterministic_libraries(context.device),
        torch.no_grad(),
        ExitStack() as stack,
    ):
        scratch = rank_scratch(config, context.ranks)
        sizes = plan.micro_batch, plan.in_memory, plan.resident_windows
        windows = RankWindows(config, context.blockwise, ids, *sizes, context.ranks, timer.note_retry)
        passes = Passes(windows, timer)
        method: Any = context.method.solver
        if hasattr(method, "max_iterations"):
            method = replace(method, max_iterations=iterations)
        rounding = config.rounding, rounds_late(config, context.allocation)
        of_linears = LinearCompressor(method, context.allocation, config.seed, plan.solver_workspace, *rounding)
        solver = block_solver.BlockSolver(context, context.allocation, passes, of_linears)
        progress = BlockProgress(NoDisplay(), 0, plan.kinds)
        warnings = WarningsOfRanks(context.ranks)
        check = Check(context.blockwise, ids[: config.check_windows], scratch, plan.in_memory, context.ranks)
        compressor = BlockCompressor(context, context.allocation, passes, solver)
        parts = timer, progress, passes, check, solver, compressor, warnings
        compression = loop.Compression(context, context.allocation, journal, *parts)
        exchange = partial(_exchange_with_others, block_solver.exchange_solved, context.allocation)
        if context.ranks.world > 1:
            stack.enter_context(mock.patch.object(block_solver, "exchange_solved", exchange))
        boundary = passes.embed(targets=config.match)
        check.embed()
        compression.compress_block(0, boundary).drop()
        if check.windows:
            with timer.phase("compare", steps=0):
                check.compare([])


def _exchange_with_others(
    exchange: Callable[..., dict[str, Any]],
    allocation: Allocation,
    block: Block,
    own: dict[str, Any],
    deal: Deal,
    patterns: Mapping[str, SparsityPattern],
    ranks: Ranks,
) -> dict[str, Any]:
    """Exchange linears as if other ranks had solved theirs, of the shapes that their parts have in bf16."""
    _, record = next(iter(own.values()))
    others = {}
    for name, owner in deal.owners.items():
        if owner != ranks.rank:
            shape = (block.linears[name].out_features, block.linears[name].in_features)
            sizes = part_shapes(patterns[name], shape, min(allocation[name].rank, *shape))
            others[name] = record, {part: (size, part_dtype(part, torch.bfloat16)) for part, size in sizes.items()}
    with mock.patch.object(PretendedRanks, "gather", lambda _, described: [described, others]):
        return exchange(block, own, deal, patterns, ranks)


def _stand_ins(gpu: PretendedGpu) -> list[tuple[Any, str, Any]]:
    """Return (module or class, name, what takes its place): files that only count, and a loss that matching lowers."""
    propagate = Passes.propagate
    local = threading.local()  # .stream: boundary that this thread last read or wrote

    def count(kind: str, nbytes: int) -> None:
        gpu.cost.file_bytes[getattr(local, "stream", threading.current_thread().name), kind] += nbytes

    def propagate_below(*args: Any, **kwargs: Any) -> Any:
        leaving, *_ = propagate(*args, **kwargs)
        return leaving, SimpleNamespace(over=lambda ranks: Loss(0.0, 1))

    def write_shard(path: Path, tensors: Any, metadata: object) -> WrittenShard:
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        for kind in ("write", "digest"):
            count(kind, nbytes)
        return WrittenShard(path.name, "0" * 64, nbytes)

    class Digest:
        """A sha256 that only counts."""

        def __init__(self, content: Any = b"") -> None:
            self.update(content)

        def update(self, content: Any) -> None:
            count("digest", memoryview(content).nbytes)

        def digest(self) -> bytes:
            return bytes(32)

        def hexdigest(self) -> str:
            return "0" * 64

    class Array:
        """A zarr array that only counts."""

        metadata = SimpleNamespace(encode_chunk_key=lambda chunk: f"c/{chunk[0]}")

        def __init__(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
            self.shape, self._name, self._itemsize = shape, name, np.dtype(dtype).itemsize

        def __setitem__(self, key: object, values: Any) -> None:
            local.stream = f"writes {self._name}"
            count("write", values.nbytes)

        def get_basic_selection(self, selection: slice, out: Any) -> None:
            local.stream = f"reads {self._name}"
            windows = len(range(*selection.indices(self.shape[0])))
            count("read", windows * self.shape[1] * self.shape[2] * self._itemsize)

    def update_rows(state: FusedState, rows: slice, product: Tensor, *_: Any) -> Tensor:
        """Count what the kernel reads and writes: Z twice, W, the product and T."""
        with gpu.lock:
            gpu.cost.work["memory", 0.0, 16 * product.numel()] += 1
            gpu.cost.operators["sparse_step"].update(calls=1, bytes=16 * product.numel())
        return torch.zeros(1, 2, dtype=torch.int32, device="cuda")

    def count_one(_: str, of_all: expert_grams.ExpertSum) -> None:
        """Count a token for all experts of a kind: routers choose nothing where there are no values."""
        of_all.tokens = max(1, of_all.tokens)

    def create_array(**options: Any) -> Array:
        return Array(Path(options["store"]).name, options["shape"], options["dtype"])

    counting = SimpleNamespace(sha256=Digest)
    return [
        (Passes, "propagate", propagate_below),
        (RankWindows, "in_order", lambda _, of_windows: list(of_windows)),  # other ranks have none to put between
        (Passes, "sample", lambda *_: ()),
        (shard_folder, "write_shard", write_shard),
        (loop, "write_index", lambda *_: None),
        (hidden_states, "zarr", SimpleNamespace(create_array=create_array)),
        (hidden_states, "hashlib", counting),
        (grams, "hashlib", counting),
        (expert_grams, "_require_tokens", count_one),
        (threebasil_fused, "_verdicts", {}),
        (threebasil_fused, "_fault_of_kernel", lambda *_: None),
        (threebasil_fused, "import_module", lambda _: SimpleNamespace(sparse_step=None)),
        (FusedState, "update_rows", update_rows),
    ]
