"""The plan of a run, before any work: its choices, what each phase takes, and what is refused."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamslr.config import format_bytes
from streamslr.errors import BudgetError
from streamslr.io.durable import DiskNeed, require_disk_space
from streamslr.run.costs import PhaseCost
from streamslr.run.dealing import Deal

BATCH_PHASES = ("survey", "embed", "grams", "match", "propagate")
"""Phases that windows pass through; their memory grows with the micro-batch."""


@dataclass(frozen=True)
class BlockKind:
    """Blocks of one kind: their shapes are equal. Their costs are those of a model that has no others."""

    blocks: tuple[int, ...]  # their numbers
    phases: tuple[PhaseCost, ...]  # without those that pass no block
    expert_gram_groups: int  # of a block; 0 where no inputs of experts are kept

    @property
    def flops(self) -> float:
        """FLOPs of all blocks of the kind."""
        return sum(phase.flops for phase in self.phases)

    @property
    def sent_bytes(self) -> int:
        """Bytes that a rank sends to others for one block, on average over ranks."""
        return sum(phase.sent_bytes for phase in self.phases)


@dataclass(frozen=True)
class Plan:
    """Cost of a run on its busiest rank, and the choices that it obeys: `micro_batch` to `solver_workspace`.

    Blocks of all kinds obey the same choices, which the most demanding kind decides.
    """

    device: str
    blocks: int
    micro_batch: int  # windows that pass a block together
    in_memory: bool  # hidden states are kept in host memory beside the scratch folder
    resident_windows: int  # windows of a boundary that stay on the GPU while a block is matched and passed
    gram_bytes_at_once: int | None  # bytes of the Grams that one pass of a block collects; None: one pass collects all
    expert_gram_bytes_at_once: int | None  # bytes of experts' Grams that are collected from kept inputs at a time
    expert_gram_groups: int  # of a block, at most; 0 where no inputs are kept
    kept_input_bytes: int  # of these inputs, in the scratch folder, at most
    grams_at: str  # tier where Gram matrices wait to be solved: "device", "host" or "disk"
    solved_at: str  # tier where solved and refined linears wait while their block is matched: "device" or "host"
    solver_workspace: int | None  # bytes that one solve may take, which then works in tiles; None: as many as it likes
    phases: tuple[PhaseCost, ...]  # bytes of the kind of blocks that takes most in the phase, FLOPs of all blocks
    kinds: tuple[BlockKind, ...]  # that of block 0 first
    scratch_bytes: int  # of one rank
    output_bytes: int
    source_bytes: int
    download_bytes: int
    cache_bytes: int  # of the download, the most that lies on the disk at a time
    linears: str  # patterns and ranks, in words
    parameter_fraction: float  # parameters of S, U and V over those of the dense linears
    host_mem: int  # budget of host memory
    gpu_mem: int | None  # budget of GPU memory; None without one: on a CPU, and where no GPU can be asked
    gpu_context: int = 0  # bytes of gpu_mem that CUDA takes for itself
    dense: tuple[str, ...] = ()  # linears that stay dense, with the reason, in words
    world: int = 1  # ranks that share the run
    local_world: int = 1  # of these, the ranks on this machine
    deal: Deal | None = None  # who solves the linears of the block that takes most work; None in one process

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as `plan --json` prints it."""
        fields = asdict(self)
        if self.deal:
            fields["deal"]["by_rows"] = sorted(self.deal.by_rows)
        budgets = {"host_budget_bytes": fields.pop("host_mem"), "gpu_budget_bytes": fields.pop("gpu_mem")}
        totals = {"host_bytes": self.host_bytes, "gpu_bytes": self.gpu_bytes, "flops": self.flops}
        totals |= {"sent_bytes": self.sent_bytes, "sent_bytes_in_all": self.sent_bytes_in_all}
        return fields | totals | budgets

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        return sum(phase.flops for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        """Peak of host memory."""
        return max(phase.host_bytes for phase in self.phases)

    @property
    def gpu_bytes(self) -> int:
        """Peak of GPU memory."""
        return max(phase.gpu_bytes for phase in self.phases)

    @property
    def sent_bytes(self) -> int:
        """Bytes that a rank sends to others for one block, of the kind with most, on average over ranks."""
        return max(kind.sent_bytes for kind in self.kinds)

    @property
    def sent_bytes_in_all(self) -> int:
        """Bytes that a rank sends to others for all blocks, on average over ranks."""
        return sum(len(kind.blocks) * kind.sent_bytes for kind in self.kinds)

    def memory(self, block: int | None = None) -> dict[str, dict[str, int]]:
        """Return {phase: planned and budgeted bytes}, which the journal keeps beside what is measured.

        Phase grams also has the number of groups of experts' Grams, if they are cut.

        Args:
            block: Number of the block whose phases these are; None: those of the whole model.
        """
        phases, groups = self.phases, self.expert_gram_groups
        if block is not None:
            (kind,) = (kind for kind in self.kinds if block in kind.blocks)
            phases, groups = kind.phases, kind.expert_gram_groups
        memory = {}
        for phase in phases:
            memory[phase.name] = {"host_planned_bytes": phase.host_bytes, "host_budget_bytes": self.host_mem}
            if self.gpu_mem is not None:
                memory[phase.name] |= {
                    "gpu_planned_bytes": phase.gpu_bytes,
                    "gpu_context_bytes": self.gpu_context,
                    "gpu_budget_bytes": self.gpu_mem,
                }
        if groups:
            memory["grams"]["expert_gram_groups"] = groups
        return memory

    @property
    def expert_grams_in_words(self) -> str:
        """Sentence on Grams of experts that are collected in groups; "" where they are not."""
        if not self.expert_gram_groups:
            return ""
        size, kept = format_bytes(self.expert_gram_bytes_at_once or 0), format_bytes(self.kept_input_bytes)
        return (
            f"Gram matrices of experts do not fit at once: they are made in {self.expert_gram_groups} groups of at "
            f"most {size} a block, from {kept} of inputs in the scratch folder"
        )

    def require_memory(self) -> None:
        """Raise BudgetError where a phase does not fit a budget; name the phase, its bytes and the flag that helps."""
        for kind, budget, beside in (("host", self.host_mem, 0), ("gpu", self.gpu_mem, self.gpu_context)):
            if budget is None:
                continue
            phase = max(self.phases, key=lambda p: getattr(p, f"{kind}_bytes"))
            need = getattr(phase, f"{kind}_bytes") + beside
            if need > budget:
                batch = f" (windows pass {self.micro_batch} at a time)" if phase.name in BATCH_PHASES else ""
                own = f", {format_bytes(beside)} of it for CUDA itself" if beside else ""
                shorter = " or, in a new --out, shorten --seq-len" if batch else ""
                shorter = (
                    " or, in a new --out, give --check-windows 0" if phase.name in ("check", "compare") else shorter
                )
                raise BudgetError(
                    f"phase {phase.name}{batch} needs {format_bytes(need)} of {kind} memory{own}, the budget is "
                    f"{format_bytes(budget)}; raise --{kind}-mem{shorter}"
                )

    def require_disk(self, out: Path, scratch: Path, cache: Path) -> None:
        """Raise BudgetError where a file system lacks space for what the run has yet to write to it.

        Args:
            out: Output folder.
            scratch: Folder of hidden states, and of Grams that wait on the disk.
            cache: Folder of downloads.
        """
        in_out = self.output_bytes - _size(out, "*.safetensors")
        shared = scratch.absolute().is_relative_to(out.absolute())  # by the ranks of all machines, as the output is
        in_scratch = (self.world if shared else self.local_world) * self.scratch_bytes - _size(scratch, "**/*")
        require_disk_space(
            DiskNeed(out, "output", in_out, "give --out on another disk"),
            DiskNeed(scratch, "hidden states", in_scratch, "give --scratch on another disk"),
            DiskNeed(
                cache, "downloads", self.cache_bytes, "set HF_HOME to a folder on another disk, or give --evict-shards"
            ),
        )


def _size(folder: Path, glob: str) -> int:
    return sum(p.stat().st_size for p in folder.glob(glob) if p.is_file())
