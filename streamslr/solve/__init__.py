"""(W, H) -> S, U, V: one layer's compression, a method a file."""

from streamslr.solve.pattern import NofM, SparsityPattern, Unstructured, parse_pattern
from streamslr.solve.problem import LayerProblem, Solver, SparseLowRank, relative_error
from streamslr.solve.threebasil import ThreeBasil

__all__ = [
    "LayerProblem",
    "NofM",
    "Solver",
    "SparseLowRank",
    "SparsityPattern",
    "ThreeBasil",
    "Unstructured",
    "parse_pattern",
    "relative_error",
]
