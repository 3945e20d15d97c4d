"""Every method by name: its solver, its paper, what it reads and allows; also methods of other packages."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any

import torch
from rich.table import Table

from streamslr.errors import InputError
from streamslr.solvers.alps import Alps
from streamslr.solvers.base import Solver
from streamslr.solvers.eora import Eora
from streamslr.solvers.hassle_free import HassleFree
from streamslr.solvers.oats import Oats
from streamslr.solvers.pruning import Magnitude, Pruned, Wanda
from streamslr.solvers.sparsegpt import SparseGPT
from streamslr.solvers.threebasil import ThreeBasil
from streamslr.spec.pattern import Dense, NofM, SparsityPattern, Unstructured, UnstructuredRows

ENTRY_POINTS = "streamslr.solvers"
_PATTERN_TEXTS: Mapping[type[Any], str] = {NofM: "n:m", Unstructured: "p%", UnstructuredRows: "p%/row", Dense: "dense"}


@dataclass(frozen=True)
class Method:
    """A solver under a name, with what a user should know before choosing it.

    Another package offers one as an entry point, `name = "package.module:METHOD"` in the group "streamslr.solvers":

        METHOD = Method("halve", Halve(), "arXiv 0000.00000", diagonal_only=True, low_rank=False)

    where Halve has the three functions of `streamslr.solvers.Solver`.

    Attributes:
        name: Value of --method.
        solver: Solves linears.
        paper: Reference, for the table of methods.
        diagonal_only: True when the solver reads only the diagonal of the Gram matrix.
        low_rank: True when the solver makes U·V.
        patterns: Types of the patterns that the solver can do.
        package: Name and version of the package it comes from; empty for streamslr.
        by_rows: True when the solver solves a linear whose rows lie on several ranks (`LinearProblem.ranks`).
    """

    name: str
    solver: Solver
    paper: str
    diagonal_only: bool = False
    low_rank: bool = True
    patterns: tuple[type[Any], ...] = (NofM, Unstructured, UnstructuredRows, Dense)
    package: str = ""
    by_rows: bool = False

    @property
    def identity(self) -> str:
        """Name and package, which must be the same for a run to be resumed."""
        return f"{self.name} ({self.package})" if self.package else self.name

    def require(self, pattern: SparsityPattern, rank: int) -> None:
        """Raise InputError for a pattern or rank that the method cannot do."""
        if rank and not self.low_rank:
            able = ", ".join(m.name for m in BUILT_IN.values() if m.low_rank)
            raise InputError(
                f"method {self.name} is pure sparsity, it has no U·V for --rank {rank}; give --rank 0, or another "
                f"--method: {able}"
            )
        if not isinstance(pattern, self.patterns):
            raise InputError(
                f"method {self.name} cannot do the pattern {pattern}, only {self._patterns()}; give another --pattern"
            )

    def check_kernels(self, device: torch.device, patterns: Iterable[SparsityPattern]) -> None:
        """Compile and check on a GPU the kernels that solves of these patterns use, so that a plan knows of them."""
        pruner = getattr(self.solver, "pruner", self.solver)
        admm = getattr(pruner, "admm", pruner)
        if isinstance(admm, ThreeBasil):
            admm.check_kernels(device, patterns)

    def as_dict(self) -> dict[str, Any]:
        """Return a row of `streamslr methods`."""
        return {
            "name": self.name,
            "paper": self.paper,
            "gram": "diagonal" if self.diagonal_only else "full",
            "patterns": self._patterns(),
            "rank": "any" if self.low_rank else "0",
            "package": self.package or "streamslr",
        }

    def _patterns(self) -> str:
        return ", ".join(_PATTERN_TEXTS.get(kind, kind.__name__) for kind in self.patterns)


# ADMM at a fast pace, for the inside of an alternation (tools/results/solver.md, "HASSLE-free"). Some 20 iterations are
# usual; they are limited because the support may never settle where weights tie at zero, and ρ must not grow for ever.
_FAST_ADMM = ThreeBasil(rho_start=0.5, rho_growth=1.6, stage_iterations=4, max_iterations=60)

_METHODS = (
    Method("3basil", ThreeBasil(), "arXiv 2603.01376", by_rows=True),
    Method("hassle-free-alps", HassleFree(Alps(_FAST_ADMM)), "arXiv 2502.00899"),
    Method("hassle-free-sparsegpt", HassleFree(SparseGPT()), "arXiv 2502.00899"),
    Method("oats", Oats(), "arXiv 2409.13652", diagonal_only=True),
    Method("eora-magnitude", Eora(Magnitude()), "arXiv 2410.21271"),
    Method("eora-wanda", Eora(Wanda()), "arXiv 2410.21271"),
    Method("eora-sparsegpt", Eora(SparseGPT()), "arXiv 2410.21271"),
    Method("eora-alps", Eora(Alps()), "arXiv 2410.21271"),
    Method("magnitude", Pruned(Magnitude()), "arXiv 1506.02626", diagonal_only=True, low_rank=False, by_rows=True),
    Method("wanda", Pruned(Wanda()), "arXiv 2306.11695", diagonal_only=True, low_rank=False, by_rows=True),
    Method("sparsegpt", Pruned(SparseGPT()), "arXiv 2301.00774", low_rank=False, by_rows=True),
    Method("alps", Pruned(Alps()), "arXiv 2406.07831", low_rank=False),
)
BUILT_IN: Mapping[str, Method] = {method.name: method for method in _METHODS}


def find_method(name: str) -> Method:
    """Return the method of this name, one of streamslr before one of another package.

    Raises:
        InputError: The name is unknown, or the package that offers it is broken; the message lists the names.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    others = _load_entry_points(name)
    if name not in others:
        known = ", ".join([*BUILT_IN, *(entry.name for entry in entry_points(group=ENTRY_POINTS))])
        raise InputError(f"method {name!r} is not known; there are {known}")
    return others[name]


def all_methods() -> list[Method]:
    """Return the methods of streamslr, then those of other packages.

    Raises:
        InputError: A method of another package cannot be loaded.
    """
    return [*BUILT_IN.values(), *_load_entry_points().values()]


def methods_table(methods: list[Method]) -> Table:
    """Return a table with one row a method."""
    table = Table(
        caption="Gram: the method reads the full Gram matrix of a linear's inputs, or its diagonal. Patterns: n:m "
        "keeps n of every m weights, p% zeroes p% of a linear, p%/row p% of each row; dense keeps all, for --values."
    )
    rows = [method.as_dict() for method in methods]
    for key, title in zip(rows[0], ("--method", "paper", "Gram", "--pattern", "--rank", "from"), strict=True):
        table.add_column(title, no_wrap=key == "name")
    for row in rows:
        table.add_row(*row.values())
    return table


def _load_entry_points(only: str | None = None) -> dict[str, Method]:
    """Return the methods of other packages, or the one of this name; nothing else is imported."""
    found: dict[str, Method] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        if only not in (None, entry.name):
            continue
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        if entry.name in BUILT_IN or entry.name in found:
            raise InputError(f"{package} registers a method {entry.name!r}, which there is already; uninstall one")
        try:
            method = entry.load()
        except Exception as error:  # whatever another package raises when it is imported
            raise InputError(f"method {entry.name!r} of {package} cannot be loaded: {error!r}") from error
        if not isinstance(method, Method):
            raise InputError(f"method {entry.name!r} of {package} is a {type(method).__name__}, not a Method")
        if not isinstance(method.solver, Solver):
            kind = type(method.solver).__name__
            raise InputError(f"method {entry.name!r} of {package}: its {kind} lacks solve, peak_bytes or flops")
        found[entry.name] = replace(method, name=entry.name, package=package)
    return found
