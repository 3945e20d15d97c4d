"""Compression of one linear, (W, H) -> S, U, V: a method a file."""

from streamslr.solvers.base import LinearProblem, Solver, SparseLowRank, relative_error
from streamslr.solvers.methods import Method, all_methods, find_method
from streamslr.solvers.threebasil import ThreeBasil
from streamslr.spec.pattern import NofM, SparsityPattern, Unstructured, UnstructuredRows, parse_pattern

__all__ = [
    "LinearProblem",
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
