"""ALPS: ADMM finds the support, conjugate gradients the values on it (arXiv 2406.07831)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from streamslr.solvers.scaled import ScaledLinear
from streamslr.solvers.threebasil import ThreeBasil
from streamslr.spec.pattern import SparsityPattern


@dataclass(frozen=True)
class Alps:
    """Support by ADMM, then the values on it refitted by preconditioned conjugate gradients.

    The paper's ADMM is 3BASiL's without U·V, so the support is that of `ThreeBasil` at rank 0. It therefore differs
    from the paper as that class does: ρ grows in stages, not by how far the support moved, and inputs are scaled by
    Optimal Brain Surgeon's saliency. The refit is the paper's algorithm 2, each row with its own step size. Its
    preconditioner, the diagonal of H, is I in the scale of the linear.

    Attributes:
        admm: Finds the support.
        cg_iterations: Iterations of conjugate gradients; 10 in the official code.
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

    def prune_bytes(self, o: int, d: int, *, pattern: SparsityPattern, gpu: bool) -> int:
        return max(4 * o * d + self.admm.peak_bytes(o, d, 0, pattern=pattern, gpu=gpu), 25 * o * d)

    def prune_flops(self, o: int, d: int, *, gpu: bool = False) -> float:
        return self.admm.flops(o, d, 0, gpu=gpu) + self.cg_iterations * 2 * o * d * d


def refit_(S: Tensor, T: Tensor, G: Tensor, iterations: int) -> None:
    """Move the non-zero values of S towards the least tr((T − S) G (T − S)ᵀ), in place; no iteration raises it.

    The rows are problems of their own, solved side by side by conjugate gradients.

    Args:
        S: [o, d], overwritten.
        T: [o, d].
        G: [d, d], positive definite with a unit diagonal.
        iterations: Iterations of conjugate gradients.
    """
    support = S != 0
    residual = ((T - S) @ G).mul_(support)
    direction = residual.clone()
    energy = residual.square().sum(1, keepdim=True)  # [o, 1]
    for _ in range(iterations):
        product = (direction @ G).mul_(support)
        step = energy / (direction * product).sum(1, keepdim=True)
        step.nan_to_num_(0, 0, 0)  # a finished row has direction 0
        S.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        before, energy = energy, residual.square().sum(1, keepdim=True)
        direction.mul_((energy / before).nan_to_num_(0, 0, 0)).add_(residual)
