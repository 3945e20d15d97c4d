"""The fused step of 3BASiL without Triton, for whole solves, which would take minutes in its interpreter."""

from typing import Any

from torch import Tensor

from streamslr.solvers.threebasil_fused import step_in_torch
from streamslr.spec.pattern import NofM


class StepInTorch:
    """A module of kernels with `step_in_torch` as its kernel."""

    def __init__(self) -> None:
        self.sparse_step = self

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, Z: Tensor, weight: Tensor, scale: Tensor, product: Tensor, *rest: Any, **settings: Any) -> None:
        U, Q, next_input, counts, t, d, rank, *_, dual_scale = rest
        U, Q = (U, Q) if rank else (U.new_zeros(t, 0), U.new_zeros(d, 0))
        pattern = NofM(settings["n"], settings["m"])
        new, T, moved_and_kept = step_in_torch(Z, weight * scale, product, U, Q, pattern, dual_scale)
        Z.copy_(new)
        next_input.copy_(T)
        if settings["count_moved"]:
            counts.zero_()
            counts[0] = moved_and_kept
