"""ALPS: ADMM finds the support, conjugate gradients the values on it (arXiv 2406.07831)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from streamslr.solvers.scaled import ScaledLinear
from streamslr.solvers.threebasil import ThreeBasil, solve_bytes, solve_flops


@dataclass(frozen=True)
class Alps:
    """The paper's ADMM is 3BASiL's without U·V, so the support comes from `ThreeBasil` at rank 0.

    Differences from the paper are therefore that class's: ρ grows in stages instead of by how far the support moved,
    and inputs are scaled by Optimal Brain Surgeon's saliency. The values are then refitted by the paper's
    preconditioned conjugate gradients (its algorithm 2), every row at its own step size, `cg_iterations` as in the
    official code. Its preconditioner is the diagonal of H, which is I in the scale of the linear.
    """

    admm: ThreeBasil = field(default_factory=ThreeBasil)
    cg_iterations: int = 10
    full_gram = True

    def prepare(self, linear: ScaledLinear) -> Callable[[Tensor], Tensor]:
        problem, G = linear.problem, linear.G
        assert G is not None

        def prune(T: Tensor) -> Tensor:
            solved = self.admm.solve(replace(problem, weight=T / linear.scale, rank=0, workspace=None))
            linear.warnings.extend(warning for warning in solved.warnings if warning not in linear.warnings)
            S = solved.S.mul_(linear.scale)
            refit_(S, T, G, self.cg_iterations)
            return S

        return prune

    def prune_bytes(self, o: int, d: int, *, by_row: bool, gpu: bool) -> int:
        return max(4 * o * d + solve_bytes(o, d, 0, by_row=by_row, gpu=gpu), 25 * o * d)

    def prune_flops(self, o: int, d: int) -> float:
        return float(solve_flops(o, d, 0, 250) + self.cg_iterations * 2 * o * d * d)


def refit_(S: Tensor, T: Tensor, G: Tensor, iterations: int) -> None:
    """Moves the non-zero values of S [o, d] towards the least tr((T − S) G (T − S)ᵀ), in place; never away from it.

    Conjugate gradients, the rows' problems side by side. T [o, d], G [d, d] positive definite, unit diagonal.
    """
    support = S != 0
    residual = ((T - S) @ G).mul_(support)
    direction = residual.clone()
    energy = residual.square().sum(1, keepdim=True)  # [o, 1]
    for _ in range(iterations):
        turned = (direction @ G).mul_(support)
        step = energy / (direction * turned).sum(1, keepdim=True)
        step.nan_to_num_(0, 0, 0)  # rows that are done
        S.addcmul_(step, direction)
        residual.addcmul_(step, turned, value=-1)
        before, energy = energy, residual.square().sum(1, keepdim=True)
        direction.mul_((energy / before).nan_to_num_(0, 0, 0)).add_(residual)
