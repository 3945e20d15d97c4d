"""Run context: everything that is known before work begins, opened from headers, and the plan made of it."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from streamslr.calibration.grams import input_groups
from streamslr.config import LARGEST, RunConfig, idle_settings
from streamslr.errors import InputError
from streamslr.gpu import GpuMemory, open_gpu, pick_device
from streamslr.io.low_rank import require_range
from streamslr.io.packed_layout import read_quantization_config
from streamslr.memory import free_host_memory, held, keep_no_freed_memory
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import Checkpoint, open_checkpoint
from streamslr.model.shape import BlockShape, ModelShape
from streamslr.ranks import ALONE, Ranks
from streamslr.run.journal import in_kinds, read_journal
from streamslr.run.journal_writer import refuse_changed_settings
from streamslr.run.plan import Plan
from streamslr.run.planning import Pieces, make_plan
from streamslr.solvers.methods import Method, find_method
from streamslr.spec.allocation import (
    DEFAULT_RANK,
    Allocation,
    allocate,
    file_digest,
    from_json,
    in_words,
    parameter_fraction,
    parse_mean_pattern,
)
from streamslr.spec.values import DEFAULT_GROUP, STORED, grid_of, parse_low_rank_values, parse_values, values_text
from streamslr.version import __version__

log = logging.getLogger("streamslr")


@dataclass(frozen=True)
class RunContext:
    """A run that could start: the model opened from headers alone, nothing downloaded or written."""

    config: RunConfig
    checkpoint: Checkpoint
    blockwise: BlockwiseModel
    method: Method
    device: torch.device
    dtype: torch.dtype  # of hidden states and products: float32 on a CPU, bfloat16 on a GPU
    allocation: Allocation | None  # None with --owl until its survey is done
    host_mem: int  # budget in bytes
    gpu: GpuMemory | None  # None on a CPU, and for a GPU that is only planned for, without a budget
    plan: Plan
    fingerprint: Mapping[str, Any]  # must be equal for a resume, with the digest of the tokens
    shape: ModelShape
    ranks: Ranks = ALONE


def open_run(config: RunConfig, gpu_required: bool = True, ranks: Ranks = ALONE) -> RunContext:
    """Open the model and plan the run.

    Args:
        config: Settings of the run.
        gpu_required: False to plan for a GPU that this machine may lack. A context without its GPU cannot run.
        ranks: Ranks that share the run; --host-mem and --gpu-mem are the budgets of each. What is free on the machine
            is shared out over those of them that are on it.

    Raises:
        InputError: Settings, model or method do not go together, as far as headers show; or there are more ranks than
            windows.
        BudgetError: The card lacks the GPU memory that the run may use.
        ResumeError: The output folder holds a run with other settings.
    """
    keep_no_freed_memory()
    ranks.share(config.samples, "calibration windows")
    parse_mean_pattern(config)  # refuses a wrong --pattern or --compression before the model is opened
    method = find_method(config.method)
    device, dtype = pick_device(config.device, gpu_required, index=ranks.local_rank)
    for sentence in idle_settings(config, device.type):
        log.warning("%s", sentence)
    if config.match and config.match_batch % ranks.world:
        message = "--match-batch %d is no multiple of the %d ranks: some wait in each step of matching"
        log.warning(message, config.match_batch, ranks.world)
    present = device.type == "cpu" or torch.cuda.is_available()
    gpu = None
    if device.type == "cuda" and present:  # before the baseline, which counts what CUDA takes of the host
        gpu = open_gpu(device, config.gpu_mem if gpu_required else None, ranks if gpu_required else ALONE)
    if device.type == "cuda" and config.gpu_mem is not None:  # a plan may be for a larger card than this one
        gpu = replace(gpu or GpuMemory(0), budget=config.gpu_mem)
    baseline = held()
    checkpoint, blockwise = _open_model(config, device if present else torch.device("cpu"), dtype)
    _require_windows(config, blockwise)
    before = read_journal(config.out)
    if before:
        config = _keep_check_windows(config, before.check.windows if before.check else 0)
    densest = allocate(config, blockwise.linears)  # with --owl each linear at its densest, which the plan must hold
    for spec in dict.fromkeys(densest.values()):
        method.require(spec.pattern, spec.rank)
    _require_range(
        blockwise, [name for name, spec in densest.items() if spec.rank and spec.low_rank_values == torch.int8]
    )
    if gpu is not None and present:
        before_kernels = held()
        method.check_kernels(device, dict.fromkeys(spec.pattern for spec in densest.values()))
        baseline += max(0, held() - before_kernels)
    for sentence in _overridden(config, blockwise, densest):
        log.warning("%s", sentence)
    host_mem = free_host_memory() // ranks.local_world if config.host_mem is None else config.host_mem
    fingerprint = _fingerprint(config, checkpoint, method, device)
    allocation: Allocation | None = densest if config.owl is None else None
    if before:
        refuse_changed_settings(config.out, before.fingerprint, fingerprint)
        if allocation is None and before.allocation:
            allocation = from_json(before.allocation, blockwise.linears)
    if gpu_required:  # ranks that work together must plan alike
        host_mem, baseline = min(ranks.gather(host_mem)), max(ranks.gather(baseline))
        gpu = gpu and replace(gpu, budget=min(ranks.gather(gpu.budget)), context=max(ranks.gather(gpu.context)))
    shape = _model_shape(blockwise, config.seq_len)
    plan = make_plan(
        config,
        shape,
        allocation or densest,
        method,
        device,
        dtype,
        baseline,
        host_mem,
        gpu,
        Pieces(before.micro_batch, before.solver_workspace) if before else None,
        ranks,
    )
    if allocation is None:
        plan = _describe_mean(plan, config, blockwise)
    plan = replace(plan, dense=in_kinds(blockwise.dense))
    for which in plan.dense:
        log.info("stay dense: %s", which)
    return RunContext(
        config, checkpoint, blockwise, method, device, dtype, allocation, host_mem, gpu, plan, fingerprint, shape, ranks
    )


def require_fit(context: RunContext) -> None:
    """Raise BudgetError where the plan does not fit memory or disk."""
    config = context.config
    context.plan.require_memory()
    context.plan.require_disk(config.out, config.scratch_folder, Path(constants.HF_HUB_CACHE))


def open_shape(config: RunConfig) -> tuple[Checkpoint, ModelShape]:
    """Open the model alone, and return its shape; other settings are not looked at, nor what is in the output folder.

    Raises:
        InputError: The model cannot be compressed, or has no numbers for --low-rank-values int8.
    """
    device, dtype = pick_device("cpu")
    checkpoint, blockwise = _open_model(config, device, dtype)
    if config.rank != 0 and parse_low_rank_values(config.low_rank_values) == torch.int8:
        _require_range(blockwise, [name for linears in blockwise.linears for name in linears])
    return checkpoint, _model_shape(blockwise, min(config.seq_len, blockwise.positions or config.seq_len))


def _open_model(config: RunConfig, device: torch.device, dtype: torch.dtype) -> tuple[Checkpoint, BlockwiseModel]:
    """Open the checkpoint and its model on the meta device; refuse what cannot be compressed."""
    checkpoint = open_checkpoint(config.model, config.revision, config.evict_shards)
    blockwise = BlockwiseModel(checkpoint, dtype, device)
    if read_quantization_config(checkpoint.config) is not None:
        raise InputError(f"{config.model} is compressed already; give the model that it was made from")
    blockwise.require_compressible()
    checkpoint.require_no_outer_links()
    return checkpoint, blockwise


def _require_range(blockwise: BlockwiseModel, linears: Iterable[str]) -> None:
    """Refuse U and V in int8 of linears whose checkpoint stores them in float16."""
    for name in linears:
        require_range(f"{name}: U and V in int8", blockwise.stored_dtype(f"{name}.weight"))


def _require_windows(config: RunConfig, blockwise: BlockwiseModel) -> None:
    """Raise InputError where the model takes no windows of --seq-len; warn where it was not made for them."""
    blockwise.require_windows(config.seq_len)
    if blockwise.positions and config.seq_len > blockwise.positions:
        message = "--seq-len %d is more than the %d positions %s was made for"
        log.warning(message, config.seq_len, blockwise.positions, config.model)


def _keep_check_windows(config: RunConfig, begun_with: int) -> RunConfig:
    """Return the settings with the check windows that the run began with; it cannot go on with others."""
    if config.check_windows != begun_with:
        message = "--check-windows %d has no effect: the run began with %d"
        log.warning(message, config.check_windows, begun_with)
    return replace(config, check_windows=begun_with)


def _overridden(config: RunConfig, blockwise: BlockwiseModel, allocation: Allocation) -> list[str]:
    """Return a sentence for each setting of the allocation that was given and has no effect on any linear.

    A setting has no effect if another value of it gives the same allocation.
    """
    by_name, by_file = "--allocation or --ranks decides for every linear", "--allocation decides for every linear"
    others = []
    if config.pattern is not None and config.allocation is not None:
        others.append(("pattern", by_name, replace(config, pattern="60%" if config.pattern == "50%" else "50%")))
    if config.rank is not None and (config.allocation or config.ranks):
        others.append(("rank", by_name, replace(config, rank=config.rank + 1)))
    if config.values != STORED and config.allocation is not None:
        other = "int8" if config.values.startswith("fp8") else "fp8"  # dense may need a grid
        others.append(("values", by_file, replace(config, values=other)))
    if config.low_rank_values != STORED and config.allocation is not None:
        others.append(("low_rank_values", by_file, replace(config, low_rank_values=STORED)))
    if config.group != DEFAULT_GROUP:
        why = "no linear has values on a grid whose group is not given with them"
        others.append(("group", why, replace(config, group=config.group + 1 if config.group < LARGEST else 1)))
    found = [
        f"--{name.replace('_', '-')} {getattr(config, name)} has no effect: {why}"
        for name, why, other in others
        if allocate(other, blockwise.linears) == allocation
    ]
    if config.rounding != "solved" and all(spec.grid is None for spec in allocation.values()):
        found.append(f"--rounding {config.rounding} has no effect: no linear has values on a grid")
    if config.low_rank_values != STORED and all(spec.rank == 0 for spec in allocation.values()):
        found.append(f"--low-rank-values {config.low_rank_values} has no effect: no linear has U and V")
    return found


def _fingerprint(config: RunConfig, checkpoint: Checkpoint, method: Method, device: torch.device) -> Mapping[str, Any]:
    """Return what must be equal for a resume, each setting in one form however it was given ("50%" and "50.0%").

    The text of --values has the group; --group is kept beside it only for an allocation file.
    """
    sparsity = str(parse_mean_pattern(config))
    values = parse_values(config.values, config.group)
    return {
        "model": checkpoint.identity,
        **config.fixed(),
        "match_epochs": config.epochs,
        "method": method.identity,
        "pattern": None if config.compression else sparsity,
        "compression": sparsity if config.compression else None,
        "rank": DEFAULT_RANK if config.rank is None and config.rank_ratio is None else config.rank,
        "values": values_text(values),
        "group": config.group if config.allocation else DEFAULT_GROUP,
        "rounding": config.rounding if config.allocation or grid_of(values) else "solved",
        "allocation": file_digest(config.allocation),
        "device": device.type,
        "streamslr": __version__,
    }


def _describe_mean(plan: Plan, config: RunConfig, blockwise: BlockwiseModel) -> Plan:
    """Return a plan before OWL's survey that tells people of the mean allocation, though it holds the densest."""
    mean = allocate(replace(config, owl=None, owl_outlier=None), blockwise.linears)
    linears = f"{in_words(mean.values())} on average, blocks by their outliers (a survey of them comes first)"
    return replace(plan, linears=linears, parameter_fraction=parameter_fraction(mean, blockwise.linears))


def _model_shape(blockwise: BlockwiseModel, seq_len: int) -> ModelShape:
    """Return what the plan needs to know of the model: from its headers, and from a pass on the meta device."""
    tensors = blockwise.checkpoint.tensors
    blocks = []
    for i, linears in enumerate(blockwise.linears):
        modules = {name: blockwise.linear(name) for name in linears}
        keys = blockwise.block_tensors[i]
        blocks.append(
            BlockShape(
                linears=linears,
                groups=input_groups(modules, partial(blockwise.run_on_meta, i)),
                parameters=sum(prod(tensors[key].shape) for key in (*keys, *blockwise.borrowed_tensors[i])),
                source_bytes=sum(tensors[key].nbytes for key in keys),
                routing={name: blockwise.routing(name) for name in blockwise.experts[i]},
                expert_of={
                    name: blockwise.expert_of(name) for name in filter(blockwise.can_keep, blockwise.experts[i])
                },
            )
        )
    non_block = [tensors[key] for key in blockwise.non_block_tensors]
    read = {key for keys in blockwise.sources.values() for key in keys}
    return ModelShape(
        blocks=tuple(blocks),
        hidden_size=blockwise.hidden_size,
        non_block_parameters=sum(prod(info.shape) for info in non_block if info.name in read),
        non_block_bytes=sum(info.nbytes for info in non_block),
        eager_heads=blockwise.eager_heads,
        value_bytes=max(blockwise.stored_dtype(f"{name}.weight").itemsize for name in blockwise.linears[0]),
        download_bytes=blockwise.checkpoint.download_bytes,
        largest_shard_bytes=blockwise.checkpoint.largest_shard_bytes,
        vocabulary=blockwise.vocabulary,
        float32_stream=blockwise.stream_dtype == torch.float32,
        carried=max(blockwise.widths(seq_len)) - blockwise.hidden_size,
    )
