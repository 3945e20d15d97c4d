"""One linear: results of a method that are no solution."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from streamslr.errors import StreamslrError
from streamslr.run.solve_linear import compress_linear
from streamslr.solvers import LinearProblem, SparseLowRank
from streamslr.spec.pattern import SparsityPattern
from tests.support.problems import made_problem


@dataclass(frozen=True)
class Returns:
    """A method that returns what it is told to."""

    S: Tensor
    U: Tensor
    V: Tensor

    def solve(self, problem: LinearProblem) -> SparseLowRank:
        return SparseLowRank(self.S, self.U, self.V, 1)

    def peak_bytes(
        self, o: int, d: int, rank: int, workspace: int | None = None, *, pattern: SparsityPattern, gpu: bool = False
    ) -> int:
        return 0

    def flops(self, o: int, d: int, rank: int, *, gpu: bool = False) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("S", "U", "V", "says"),
    [
        ((48, 64), (48, 2), (2, 64), r"S breaks 2:4: row 0, group 0"),
        ((64, 48), (48, 2), (2, 64), r"S \[64, 48\], .* for a 48×64 weight at rank 4"),
        ((48, 64), (48, 3), (2, 64), r"U \[48, 3\], V \[2, 64\] for"),
        ((48, 64), (48, 5), (5, 64), r"U \[48, 5\], V \[5, 64\] for"),
    ],
)
def test_what_is_no_solution_is_refused_naming_linear_and_solver(
    S: tuple[int, int], U: tuple[int, int], V: tuple[int, int], says: str
) -> None:
    problem = made_problem()
    solver = Returns(torch.ones(S), torch.ones(U), torch.ones(V))
    with pytest.raises(StreamslrError, match=rf"{problem.name}: Returns returned no valid solution: .*{says}"):
        compress_linear(problem, nn.Linear(64, 48), solver, torch.bfloat16)


def test_so_are_values_that_are_not_finite() -> None:
    problem = made_problem()
    S = torch.full((48, 64), float("nan"))
    with pytest.raises(StreamslrError, match=r"S\[0, 0\] is nan"):
        compress_linear(problem, nn.Linear(64, 48), Returns(S, torch.ones(48, 0), torch.ones(0, 64)), torch.bfloat16)
