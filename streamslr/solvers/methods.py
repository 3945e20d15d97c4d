"""Every method by name: its solver, its paper, what it needs and allows; those of other packages too."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any

from rich.table import Table

from streamslr.errors import InputError
from streamslr.solvers.alps import Alps
from streamslr.solvers.base import Solver
from streamslr.solvers.eora import Eora
from streamslr.solvers.hassle_free import HassleFree
from streamslr.solvers.oats import Oats
from streamslr.solvers.pruning import Magnitude, Pruned, Wanda
from streamslr.solvers.scaled import Pruner
from streamslr.solvers.sparsegpt import SparseGPT
from streamslr.solvers.threebasil import ThreeBasil
from streamslr.spec.pattern import NofM, SparsityPattern, Unstructured, UnstructuredRows

ENTRY_POINTS = "streamslr.solvers"
_PATTERNS: Mapping[type[Any], str] = {NofM: "n:m", Unstructured: "p%", UnstructuredRows: "p%/row"}

# ADMM's pace inside alternation: at 40 turns of 1:4 + 8 it lost 0.0694, against 0.0699 at 8 iterations a stage from
# ρ = 0.2 and in twice the time (four down projections of the 8 M reference model). Some 20 iterations are usual;
# where weights tie at zero the support may never settle, and ρ must not grow for ever.
_HASTY = ThreeBasil(rho_start=0.5, rho_growth=1.6, stage_iterations=4, max_iterations=60)


@dataclass(frozen=True)
class Method:
    """A solver and what a user should know before choosing it.

    Another package offers one as an entry point, `name = "package.module:METHOD"` in the group "streamslr.solvers":

        METHOD = Method("halve", Halve(), "arXiv 0000.00000", diagonal_only=True, low_rank=False)

    where Halve has the three functions of `streamslr.solvers.Solver`.
    """

    name: str
    solver: Solver
    paper: str
    diagonal_only: bool = False  # whether the diagonal of the Gram matrix is all that it reads
    low_rank: bool = True  # whether it makes U·V
    patterns: tuple[type[Any], ...] = (NofM, Unstructured, UnstructuredRows)
    package: str = ""  # name and version of the package that it is from; of streamslr nothing

    @property
    def identity(self) -> str:
        """What must be equal for a run to be resumed."""
        return f"{self.name} ({self.package})" if self.package else self.name

    def require(self, pattern: SparsityPattern, rank: int) -> None:
        """Raises InputError for a pattern or rank that the method cannot do."""
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

    def as_dict(self) -> dict[str, Any]:
        """For `streamslr methods`."""
        return {
            "name": self.name,
            "paper": self.paper,
            "gram": "diagonal" if self.diagonal_only else "full",
            "patterns": self._patterns(),
            "rank": "any" if self.low_rank else "0",
            "package": self.package or "streamslr",
        }

    def _patterns(self) -> str:
        return ", ".join(_PATTERNS.get(kind, kind.__name__) for kind in self.patterns)


def _built_in() -> tuple[Method, ...]:
    pure = "arXiv 1506.02626", "arXiv 2306.11695", "arXiv 2301.00774", "arXiv 2406.07831"
    pruners: tuple[Pruner, ...] = (Magnitude(), Wanda(), SparseGPT(), Alps())
    names = "magnitude", "wanda", "sparsegpt", "alps"
    hassle_free = HassleFree(Alps(_HASTY)), HassleFree(SparseGPT())
    return (
        Method("3basil", ThreeBasil(), "arXiv 2603.01376"),
        Method("hassle-free-alps", hassle_free[0], "arXiv 2502.00899"),
        Method("hassle-free-sparsegpt", hassle_free[1], "arXiv 2502.00899"),
        Method("oats", Oats(), "arXiv 2409.13652", diagonal_only=True),
        *(Method(f"eora-{n}", Eora(p), "arXiv 2410.21271") for n, p in zip(names, pruners, strict=True)),
        *(
            Method(n, Pruned(p), paper, diagonal_only=not p.full_gram, low_rank=False)
            for n, p, paper in zip(names, pruners, pure, strict=True)
        ),
    )


BUILT_IN: Mapping[str, Method] = {method.name: method for method in _built_in()}


def find_method(name: str) -> Method:
    """The method of this name, ours first. Raises InputError for an unknown one, with those there are."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    others = _others(name)
    if name not in others:
        known = ", ".join([*BUILT_IN, *(entry.name for entry in entry_points(group=ENTRY_POINTS))])
        raise InputError(f"method {name!r} is not known; there are {known}")
    return others[name]


def all_methods() -> list[Method]:
    """Ours, then those of other packages. Raises InputError for one that cannot be loaded."""
    return [*BUILT_IN.values(), *_others().values()]


def methods_table(methods: list[Method]) -> Table:
    """A row a method."""
    table = Table(
        caption="Gram: of a linear's inputs, all of it or the diagonal; n:m keeps n of m, p% zeroes a share of a linear, "
        "p%/row of each row"
    )
    rows = [method.as_dict() for method in methods]
    for key, title in zip(rows[0], ("--method", "paper", "Gram", "--pattern", "--rank", "from"), strict=True):
        table.add_column(title, no_wrap=key == "name")
    for row in rows:
        table.add_row(*row.values())
    return table


def _others(only: str | None = None) -> dict[str, Method]:
    """Methods of other packages, or the one of this name; what is not asked for is not imported."""
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
