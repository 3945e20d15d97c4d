"""All that is known before work begins: checkpoint, blockwise, pattern, device, budgets, and the plan they give."""

import hashlib
import logging
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from torch import Tensor, nn

from streamslr.calibration.grams import input_groups
from streamslr.calibration.hidden_states import HiddenStateStream
from streamslr.config import RunConfig
from streamslr.errors import InputError
from streamslr.io.shards import read_quantization_config
from streamslr.memory import free_host_memory, keep_no_freed_memory, uss
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import Checkpoint, open_checkpoint
from streamslr.run.journal import read_journal, refuse_changed_settings
from streamslr.run.plan import BlockShape, ModelShape, Pieces, Plan, make_plan
from streamslr.solvers.base import LinearProblem
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
from streamslr.version import __version__

log = logging.getLogger("streamslr")


@dataclass(frozen=True)
class RunContext:
    """A run that could start: everything opened from headers alone, nothing downloaded or written."""

    config: RunConfig
    checkpoint: Checkpoint
    blockwise: BlockwiseModel
    allocation: Allocation  # with --owl, before its survey: each linear at its densest
    method: Method
    device: torch.device
    dtype: torch.dtype  # of hidden states and products: float32 on a CPU, bfloat16 on a GPU
    host_mem: int
    gpu_mem: int | None
    plan: Plan
    fingerprint: Mapping[str, Any]  # what must be equal for a resume, but for the tokens

    @property
    def scratch(self) -> Path:
        """Of this output folder alone, also where several runs share one --scratch."""
        if self.config.scratch is None:
            return self.config.out / ".scratch"
        out = str(self.config.out.absolute())
        return self.config.scratch / f"{self.config.out.name}-{hashlib.sha256(out.encode()).hexdigest()[:12]}"

    @property
    def model_name(self) -> str:
        """What a person would call the model: its hub id, or the name of its folder."""
        folder = Path(self.config.model)
        return folder.absolute().name if folder.is_dir() else self.config.model

    @property
    def made_with(self) -> dict[str, str]:
        """What the journal says of the software and the machine."""
        return {
            "device": "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
            "threads": str(torch.get_num_threads()),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        }

    def stream(self, name: str) -> HiddenStateStream:
        """Where the hidden states that enter each block lie, or the targets of matching."""
        shape = (self.config.samples, self.config.seq_len, self.blockwise.hidden_size)
        return HiddenStateStream(self.scratch, name, shape, self.dtype, self.plan.in_memory)

    def upcoming_tensors(self, i: int) -> tuple[str, ...]:
        """What the block after block i is made of; nothing after the last."""
        following = self.blockwise.block_tensors[i + 1 : i + 2]
        return following[0] if following else ()

    def problem(self, name: str, weight: Tensor, gram: Tensor, workspace: int | None) -> LinearProblem:
        """The linear [o, d] as the solver takes it, in float32."""
        spec = self.allocation[name]
        return LinearProblem(name, weight.detach().float(), gram, spec.pattern, spec.rank, self.config.seed, workspace)

    def smaller_workspace(self, name: str, linear: nn.Linear, workspace: int | None) -> int | None:
        """The smaller workspace that the solver takes when given half of what it takes now; None if it cannot."""
        spec, gpu = self.allocation[name], self.device.type == "cuda"
        o, d = linear.out_features, linear.in_features
        takes = partial(self.method.solver.peak_bytes, o, d, spec.rank, by_row=spec.pattern.by_row, gpu=gpu)
        now = takes(workspace)
        less = takes(now // 2)
        return less if less < now else None

    def require_fit(self) -> None:
        """Raises BudgetError when the plan does not fit memory or disk."""
        self.plan.require_memory(self.host_mem, self.gpu_mem)
        self.plan.require_disk(self.config.out, self.scratch, Path(constants.HF_HUB_CACHE))

    def remove_scratch(self) -> None:
        """The work is done: nothing of it stays but the output, also where an earlier start had its scratch in it."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        shutil.rmtree(self.config.out / ".scratch", ignore_errors=True)


def open_run(config: RunConfig) -> RunContext:
    """Open the model and plan the run. Raises InputError for whatever headers can show to be wrong."""
    keep_no_freed_memory()
    share, method = parse_mean_pattern(config), find_method(config.method)
    device, dtype = pick_device(config.device)
    if device.type == "cuda":  # its context and libraries are host memory too
        torch.linalg.cholesky(torch.eye(8, device=device) @ torch.eye(8, device=device))
    baseline = uss()
    checkpoint = open_checkpoint(config.model, config.revision, config.evict_shards)
    blockwise = BlockwiseModel(checkpoint, dtype, device)
    if read_quantization_config(checkpoint.config) is not None:
        raise InputError(f"{config.model} is compressed already; give the model that it was made from")
    blockwise.compressible()
    positions = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    if positions and config.seq_len > positions:
        log.warning(
            "--seq-len %d is more than the %d positions %s was made for", config.seq_len, positions, config.model
        )
    before = read_journal(config.out)
    allocation: Allocation = allocate(config, blockwise.linears)
    for spec in dict.fromkeys(allocation.values()):
        method.require(spec.pattern, spec.rank)
    host_mem = free_host_memory() if config.host_mem is None else config.host_mem
    gpu_mem = None
    if device.type == "cuda":
        gpu_mem = torch.cuda.mem_get_info(device)[0] if config.gpu_mem is None else config.gpu_mem
    fingerprint = {
        "model": checkpoint.identity,
        **config.fixed(),
        "method": method.identity,
        # one text for 50% and 50.0%, for a default and what is left out
        "pattern": None if config.compression else str(share),
        "compression": str(share) if config.compression else None,
        "rank": DEFAULT_RANK if config.rank is None and config.rank_ratio is None else config.rank,
        "allocation": file_digest(config.allocation),
        "device": device.type,
        "streamslr": __version__,
    }
    if before:
        refuse_changed_settings(config.out, before.fingerprint, fingerprint)
        if config.owl is not None and before.allocation:
            allocation = from_json(before.allocation, blockwise.linears)
    plan = make_plan(
        config,
        _model_shape(blockwise),
        allocation,
        method.solver,
        device,
        dtype,
        baseline,
        host_mem,
        gpu_mem,
        Pieces(before.micro_batch, before.solver_workspace) if before else None,
    )
    if config.owl is not None and not (before and before.allocation):
        mean = allocate(replace(config, owl=None, owl_outlier=None), blockwise.linears)
        around = f"{in_words(mean.values())} on average, blocks by their outliers (a survey of them comes first)"
        plan = replace(plan, linears=around, parameter_fraction=parameter_fraction(mean, blockwise.linears))
    return RunContext(
        config, checkpoint, blockwise, allocation, method, device, dtype, host_mem, gpu_mem, plan, fingerprint
    )


def pick_device(name: str | None) -> tuple[torch.device, torch.dtype]:
    """The device of this name, or the best there is, and what to compute in there. Raises InputError."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no GPU here; use --device cpu")
    return device, torch.float32 if device.type == "cpu" else torch.bfloat16


def _model_shape(blockwise: BlockwiseModel) -> ModelShape:
    tensors = blockwise.checkpoint.tensors
    blocks = []
    for i, linears in enumerate(blockwise.linears):
        modules = {name: blockwise.linear(name) for name in linears}
        infos = [tensors[key] for key in blockwise.block_tensors[i]]
        groups = input_groups(modules, partial(blockwise.run_on_meta, i))
        blocks.append(
            BlockShape(
                linears=linears,
                grams={group[0]: modules[group[0]].in_features for group in groups},
                parameters=sum(prod(info.shape) for info in infos),
                source_bytes=sum(info.nbytes for info in infos),
                routing={name: blockwise.routing(name) for name in blockwise.experts[i]},
            )
        )
    non_block = [tensors[key] for key in blockwise.non_block_tensors]
    per_shard: dict[str, int] = {}
    for info in tensors.values():
        per_shard[info.shard] = per_shard.get(info.shard, 0) + info.nbytes
    return ModelShape(
        blocks=tuple(blocks),
        hidden_size=blockwise.hidden_size,
        non_block_parameters=sum(prod(info.shape) for info in non_block),
        non_block_bytes=sum(info.nbytes for info in non_block),
        eager_heads=blockwise.eager_heads,
        value_bytes=max(blockwise.stored_dtype(f"{name}.weight").itemsize for name in blockwise.linears[0]),
        download_bytes=blockwise.checkpoint.download_bytes,
        largest_shard_bytes=max(per_shard.values()),
    )
