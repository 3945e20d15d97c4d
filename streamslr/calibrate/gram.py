"""Inputs of a block's linears -> Gram matrices H = XᵀX, one per distinct input tensor."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from streamslr.config import format_bytes
from streamslr.errors import BudgetError, InputError


@dataclass(frozen=True)
class Gram:
    """H [d, d] float32 = Σ x xᵀ over the inputs that all of `linears` receive."""

    linears: tuple[str, ...]
    matrix: Tensor


@dataclass(frozen=True)
class GramOnDisk:
    """A Gram that waits for its turn in a file."""

    linears: tuple[str, ...]
    path: Path
    d: int

    @property
    def matrix(self) -> Tensor:
        """[d, d], mapped: the system reads its pages as they are used, and may drop them. To be had once."""
        matrix = torch.from_file(str(self.path), size=self.d**2).view(self.d, self.d)
        self.path.unlink()  # its space is free once the mapping goes
        return matrix


def set_aside(grams: list[Gram], place: str, folder: Path) -> list[Gram | GramOnDisk]:
    """The Grams in `place`, "device" (where they are), "host" or "disk" (a file each in `folder`); empties `grams`.

    Raises BudgetError when the disk is full.
    """
    aside: list[Gram | GramOnDisk] = []
    while grams:
        gram = grams.pop(0)
        if place == "disk":
            path = folder / f"gram-{len(aside)}.bin"
            try:
                path.write_bytes(gram.matrix.cpu().numpy().data)
            except OSError as error:
                raise BudgetError(
                    f"the Gram matrix of {gram.linears[0]} ({format_bytes(gram.matrix.nbytes)}) cannot be written to "
                    f"{path}: {error.strerror}; free space there or give --scratch another folder, then start the "
                    f"same line again"
                ) from error
            aside.append(GramOnDisk(gram.linears, path, len(gram.matrix)))
        else:
            aside.append(gram if place == "device" else Gram(gram.linears, gram.matrix.cpu()))
    return aside


def input_groups(linears: Mapping[str, nn.Linear], run_block: Callable[[], object]) -> tuple[tuple[str, ...], ...]:
    """Which linears of a block share an input, found by passing anything through it once (also on meta)."""
    watch = _Watch(linears, lambda owner, x: None)
    with watch:
        run_block()
    return watch.groups()


@torch.no_grad()
def collect_grams(
    block_name: str,
    linears: Mapping[str, nn.Linear],
    run_block: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[int, Tensor]],
    diagonal: bool = False,
) -> list[Gram]:
    """Pass every batch (first sample, hidden [b, T, h]) through the block; its Grams, in call order.

    diagonal: of each Gram only that, [d], for far less work.
    Linears share a Gram when they are handed the very same tensor object: q, k and v, or gate and up, but in
    a parallel block all five; nothing is read off names. Grams add up in float32 whatever the compute dtype.
    Raises InputError when an input holds NaN or infinity, or when a linear did not see every token of every
    window exactly once (experts, shared layers).
    """
    grams: dict[str, Tensor] = {}
    unsound: dict[str, list[Tensor]] = {}  # owner -> which rows are not finite, [b·T] a batch

    def add(owner: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()  # [b·T, d]
        if owner not in grams:
            grams[owner] = torch.zeros(x.shape[-1:] * (1 if diagonal else 2), device=x.device)
        if diagonal:
            grams[owner] += torch.linalg.vector_norm(rows, dim=0).square()  # no copy of the activations
        else:
            grams[owner].addmm_(rows.T, rows)
        # a row's sum is finite only if its entries are, and needs no copy of the activations
        unsound.setdefault(owner, []).append(~torch.isfinite(rows.sum(1)))

    tokens = seq_len = first = 0
    watch = _Watch(linears, add)
    with watch:
        for start, hidden in batches:
            if not tokens:
                first, seq_len = start, hidden.shape[1]
            run_block(hidden)
            watch.next_pass()
            tokens += hidden.shape[0] * hidden.shape[1]
    for name, seen in watch.rows.items():
        if seen != tokens:
            raise InputError(
                f"{name} saw {seen} inputs where {tokens} tokens passed {block_name}; only layers that see each "
                "token once can be compressed"
            )
    for owner, parts in unsound.items():
        if bad := torch.cat(parts).nonzero().flatten().tolist():
            samples = sorted({first + row // seq_len for row in bad})
            raise InputError(
                f"{block_name}: the input of {owner} is NaN or infinite for {len(bad)} tokens, in calibration "
                f"samples {samples}; the model overflows on this text in the compute dtype (--device cpu computes "
                "in float32), or its weights are damaged"
            )
    return [Gram(group, grams[group[0]]) for group in watch.groups()]


@dataclass
class _Watch:
    """While entered, calls on_input(owner, x) for each distinct input x; its owner is the first linear it reaches."""

    linears: Mapping[str, nn.Linear]
    on_input: Callable[[str, Tensor], None]
    rows: dict[str, int] = field(default_factory=dict)
    _owner_of: dict[str, str] = field(default_factory=dict)
    _alive: list[tuple[Tensor, str]] = field(default_factory=list)  # this pass's inputs: a dead one's id may return
    _hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def __enter__(self) -> None:
        self.rows = dict.fromkeys(self.linears, 0)
        for name, linear in self.linears.items():
            self._hooks.append(linear.register_forward_pre_hook(self._before_forward(name)))

    def __exit__(self, *_: object) -> None:
        self._alive.clear()
        while self._hooks:
            self._hooks.pop().remove()

    def next_pass(self) -> None:
        self._alive.clear()

    def groups(self) -> tuple[tuple[str, ...], ...]:
        owners = dict.fromkeys(self._owner_of.values())
        return tuple(tuple(n for n, o in self._owner_of.items() if o == owner) for owner in owners)

    def _before_forward(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            self.rows[name] += x.shape[:-1].numel()
            owner = next((owner for tensor, owner in self._alive if tensor is x), None)
            if owner is None:
                owner = name
                self._alive.append((x, name))
                self.on_input(name, x)
            if self._owner_of.setdefault(name, owner) != owner:
                raise InputError(
                    f"{name} shared its input with {self._owner_of[name]} in one pass and with {owner} in "
                    "another; its Gram matrix is not defined"
                )

        return hook
