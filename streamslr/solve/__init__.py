"""(W, H) -> S, U, V: one layer's compression, a method a file."""

from streamslr.solve.methods import Method, all_methods, find_method
from streamslr.solve.pattern import NofM, SparsityPattern, Unstructured, UnstructuredRows, parse_pattern
from streamslr.solve.problem import LayerProblem, Solver, SparseLowRank, relative_error
from streamslr.solve.threebasil import ThreeBasil

__all__ = [
    "LayerProblem",
    "Method",
    "NofM",
    "Solver",
    "SparseLowRank",
    "SparsityPattern",
    "ThreeBasil",
    "Unstructured",
    "UnstructuredRows",
    "all_methods",
    "find_method",
    "parse_pattern",
    "relative_error",
]
