"""Inputs of a block's linears -> Gram matrices H = XᵀX, one for each distinct input, and the memory they take."""

import hashlib
import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from streamslr.calibration.gram_products import Product, add_upper_panels, find_product, mirror_upper_panels
from streamslr.config import format_bytes
from streamslr.errors import BudgetError, InputError, StreamslrError, first_line
from streamslr.model.blockwise import Block
from streamslr.model.shape import BlockShape
from streamslr.ranks import Ranks

log = logging.getLogger("streamslr")

ENOUGH_TOKENS = 2
"""Calibration tokens for each input of an expert's linear from which on its own Gram is used alone (`blend_expert`).
Chosen between two measurements that disagree: tools/results/experts.md."""


_STRIP = 1 << 24
"""Numbers of a Gram that are on their way from a GPU to a file at a time: 64 MB."""


@dataclass(frozen=True)
class Gram:
    """H [d, d] float32 = Σ x xᵀ over the `rows` inputs x that all of `linears` receive.

    shared_fraction: weight 1 - w of the Gram of all experts of its kind, this one included, where too few tokens
    reached an expert (`blend_expert`).
    """

    linears: tuple[str, ...]
    matrix: Tensor
    rows: int
    shared_fraction: float = 0.0

    def warnings(self, name: str) -> tuple[str, ...]:
        """Return what the user should know about the linear `name` when it is solved with this Gram."""
        if not self.shared_fraction:
            return ()
        enough = ENOUGH_TOKENS * len(self.matrix)
        return (
            f"{name}: {self.rows} calibration tokens reached this expert, fewer than the {enough} that are enough; "
            f"{self.shared_fraction:.1%} of its Gram matrix comes from all experts",
        )


def grams_bytes(widths: Iterable[int]) -> int:
    """Return the bytes of one Gram [d, d] in float32 for each input width d."""
    return sum(4 * d * d for d in widths)


def gram_groups(
    widths: Mapping[str, int], at_once: int | None, part_of: Mapping[str, Hashable] | None = None
) -> list[list[str]]:
    """Return the Grams of a block in groups, in their order, each to be collected apart from the others.

    Args:
        widths: Owner of a Gram [d, d] -> d.
        at_once: Bytes that the Grams of one group may take; a larger Gram is a group by itself. None for one group.
        part_of: Owner -> what is never parted: the expert whose Grams stay in one group. None: any may be parted.
    """
    units: dict[Hashable, list[str]] = {}
    for owner in widths:
        units.setdefault((part_of or {}).get(owner, owner), []).append(owner)
    groups: list[list[str]] = []
    for unit in units.values():
        if not groups or (at_once is not None and grams_bytes(widths[o] for o in (*groups[-1], *unit)) > at_once):
            groups.append([])
        groups[-1] += unit
    return groups


def group_grams(
    block: BlockShape, at_once: int | None, of_experts_at_once: int | None
) -> tuple[list[list[str]], list[list[str]]]:
    """Return the owners of a block's Grams by group: those of each pass of the block, and those of kept inputs.

    Args:
        block: Shapes of the block.
        at_once: Bytes of the Grams that one pass collects; None: one pass collects all of them.
        of_experts_at_once: Bytes of the experts' Grams that are collected from kept inputs at a time; None: they are
            collected in passes of the block as the others are.
    """
    if of_experts_at_once is None:
        return gram_groups(block.grams, at_once) or [[]], []
    kept = {owner: d for owner, d in block.grams.items() if owner in block.expert_of}
    others = {owner: d for owner, d in block.grams.items() if owner not in kept}
    return gram_groups(others, at_once) or [[]], gram_groups(kept, of_experts_at_once, block.expert_of)


def offload_grams(grams: list[Gram], tier: str, folder: Path, first: int = 0) -> list[Callable[[], Gram]]:
    """Move Grams to where they wait until they are solved.

    Args:
        grams: Grams to move; the list is emptied, so that each matrix can be freed.
        tier: "device" (they stay where they are), "host" or "disk".
        folder: Folder for tier "disk", which gets one file a Gram.
        first: Number of the first file, for Grams beside which others wait in the folder already.

    Returns:
        For each Gram a function that returns it. It may be called once.

    Raises:
        BudgetError: A file cannot be written.
        StreamslrError: A file is missing or not as it was written, when its Gram is taken.
    """
    offloaded: list[Callable[[], Gram]] = []
    while grams:
        gram = grams.pop(0)
        if tier == "disk":
            path = folder / f"gram-{first + len(offloaded)}.bin"
            digest = hashlib.sha256()
            try:
                path.unlink(missing_ok=True)  # a link there would lead the bytes to another file
                with path.open("xb") as file:
                    for rows in torch.split(gram.matrix, max(1, _STRIP // len(gram.matrix))):  # never all on the host
                        content = rows.cpu().numpy().data
                        file.write(content)
                        digest.update(content)
                        del rows, content  # which hold the matrix on a CPU
            except OSError as error:
                raise BudgetError(
                    f"the Gram matrix of {gram.linears[0]} ({format_bytes(gram.matrix.nbytes)}) cannot be written to "
                    f"{path}: {error.strerror}; free space there or give --scratch another folder, then start the "
                    f"same line again"
                ) from error
            on_meta = replace(gram, matrix=gram.matrix.to("meta"))
            offloaded.append(partial(_take_from_disk, on_meta, path, digest.digest()))
        else:
            moved = gram if tier == "device" else replace(gram, matrix=gram.matrix.cpu())
            offloaded.append(partial(replace, moved))
    return offloaded


def _take_from_disk(gram: Gram, path: Path, digest: bytes) -> Gram:
    """Map the matrix into memory and delete its file; the kernel reads pages as they are used, and can drop them."""
    d = len(gram.matrix)
    try:
        if path.stat().st_size != 4 * d * d:
            raise OSError(f"it has {path.stat().st_size} bytes, not {4 * d * d}")
        matrix = torch.from_file(str(path), size=d**2).view(d, d)
        path.unlink()  # its space is free once the mapping goes
    except (OSError, RuntimeError) as error:
        raise _damaged(gram, path, first_line(error)) from error
    if hashlib.sha256(matrix.numpy().data).digest() != digest:
        raise _damaged(gram, path, "it is not as it was written")
    return replace(gram, matrix=matrix)


def _damaged(gram: Gram, path: Path, fault: str) -> StreamslrError:
    return StreamslrError(
        f"the Gram matrix of {gram.linears[0]} cannot be used from {path}: {fault}. Something else deletes or changes "
        f"files there, or the disk is damaged; start the same line again, which makes it anew"
    )


def input_groups(linears: Mapping[str, nn.Linear], run_block: Callable[[], object]) -> tuple[tuple[str, ...], ...]:
    """Return the groups of linears that share an input.

    Args:
        linears: Linears of one block by name.
        run_block: Passes any batch through the block once; the meta device will do.
    """
    hooks = _InputHooks(linears, lambda owner, x: None)
    with hooks:
        run_block()
    return hooks.groups()


class GramCollector:
    """Collect the Gram matrices of a block's linears while batches pass through the block.

    While entered, hooks on the linears add up Σ x xᵀ of their inputs in float32, whatever the compute dtype. Linears
    share a Gram when they receive the very same tensor object: q, k and v; gate and up; in a parallel block all five.
    Names of linears play no part.

        with GramCollector(block) as collector:
            outputs = [collector.run(windows, hidden) for windows, hidden in batches]
        grams = collector.grams()
    """

    def __init__(self, block: Block, diagonal: bool = False, only: Collection[str] | None = None) -> None:
        """Prepare to collect.

        Args:
            block: Live block.
            diagonal: Collect only the diagonal [d] of each Gram, for far less work.
            only: Owners of the Grams to collect, one of `gram_groups`; None for all.
        """
        self._block, self._diagonal = block, diagonal
        self._only = None if only is None else frozenset(only)
        self._grams: dict[str, Tensor] = {}
        self._products: dict[torch.dtype, Product | None] = {}  # on tensor cores, by dtype of the inputs
        self._upper: set[str] = set()  # owners whose Gram has its upper half so far
        # owner -> (windows, rows that are not finite [b·T] bool) of each batch
        self._not_finite: dict[str, list[tuple[Sequence[int], Tensor]]] = {}
        self._windows: Sequence[int] = ()
        self._tokens = 0
        self._hooks = _InputHooks(block.linears, self._add)

    def __enter__(self) -> "GramCollector":
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()

    @torch.no_grad()
    def run(self, windows: Sequence[int], hidden: Tensor) -> Tensor:
        """Pass windows of these numbers, `hidden` [b, T, h], through the block; return its output."""
        self._windows = windows
        output = self._block.run(hidden)
        self._hooks.end_pass()
        self._tokens += hidden.shape[0] * hidden.shape[1]
        return output

    def pass_by(self, hidden: Tensor) -> Tensor:
        """Pass `hidden` [b, T, h] through the block, adding to no Gram; return its output. No `run` follows."""
        self._hooks.__exit__()
        return self._block.run(hidden)

    def add(self, windows: Sequence[int], run: Callable[[], object]) -> None:
        """Add what reaches the linears in `run`, which passes inputs of windows of these numbers through experts."""
        self._windows = windows
        run()
        self._hooks.end_pass()

    def _add(self, owner: str, x: Tensor) -> None:
        if self._only is not None and owner not in self._only:
            return
        # [b·T, d], as the product with the weight reads it
        rows = x.reshape(-1, x.shape[-1]).to(self._block.linears[owner].weight.dtype)
        if owner not in self._grams:
            self._grams[owner] = torch.zeros(x.shape[-1:] * (1 if self._diagonal else 2), device=x.device)
        if rows.dtype not in self._products:
            self._products[rows.dtype] = find_product(rows.device, rows.dtype)
        product = self._products[rows.dtype]
        if product is None:
            rows = rows.float()
        if self._diagonal:
            self._grams[owner] += torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).square()  # no copy
        elif product:
            add_upper_panels(self._grams[owner], rows, product)
            self._upper.add(owner)
        else:
            self._grams[owner].addmm_(rows.T, rows)
        # a row's sum is finite only if its entries are, and a sum needs no copy of the rows
        not_finite = (self._windows, ~torch.isfinite(rows.sum(1, dtype=torch.float32)))
        self._not_finite.setdefault(owner, []).append(not_finite)

    def grams(self) -> list[Gram]:
        """Return the Grams in call order, as the windows that passed here made them. Call it once.

        Raises:
            InputError: An input that was collected holds NaN or infinity, or a linear that is no expert's did not see
                every token of every window exactly once (shared linears), or one of `only` shares the Gram of another.
        """
        block, rows = self._block, self._hooks.rows
        for name, seen in rows.items():
            if seen != self._tokens and name not in block.experts:
                raise InputError(
                    f"{name} saw {seen} inputs where {self._tokens} tokens passed {block.name}; only linears that see "
                    f"each token once can be compressed"
                )
        self._require_finite()
        while self._upper:
            mirror_upper_panels(self._grams[self._upper.pop()])
        grams, self._grams = self._grams, {}  # hooks and collector hold each other, and would hold the matrices
        groups = self._hooks.groups()
        if missing := sorted((self._only or grams.keys()) - grams.keys()):
            raise InputError(
                f"{block.name}: {missing[0]} was to have a Gram matrix of its own, but shares its input with an "
                f"earlier linear; which linears share one must be the same in every pass"
            )
        return [Gram(group, grams[group[0]], rows[group[0]]) for group in groups if group[0] in grams]

    def seen(self) -> list[Gram]:
        """Return all Grams of the block, those not collected too, with their rows; the matrices are on meta."""
        rows, linears = self._hooks.rows, self._block.linears
        groups = self._hooks.groups()
        widths = [linears[owner].in_features for owner, *_ in groups]
        return [
            Gram(group, torch.empty(d, d, device="meta"), rows[group[0]])
            for group, d in zip(groups, widths, strict=True)
        ]

    def _require_finite(self) -> None:
        for owner, batches in self._not_finite.items():
            if count := int(torch.cat([rows for *_, rows in batches]).sum()):
                windows = self._windows_of(batches, routed=owner in self._block.experts)
                raise InputError(
                    f"{self._block.name}: the input of {owner} is NaN or infinite for {count} tokens, in calibration "
                    f"windows {windows}; the model overflows on this text in the compute dtype (--device cpu "
                    "computes in float32), or its weights are damaged"
                )

    @staticmethod
    def _windows_of(batches: list[tuple[Sequence[int], Tensor]], routed: bool) -> list[int]:
        """Return the windows of the marked rows; for routed rows, whose window is not known, all of their batch."""
        found: set[int] = set()
        for windows, rows in batches:
            if routed and rows.any():
                found |= set(windows)
            else:
                found |= {windows[row * len(windows) // len(rows)] for row in rows.nonzero().flatten().tolist()}
        return sorted(found)


def count_rows(grams: Iterable[Gram], ranks: Ranks) -> list[Gram]:
    """Return Grams of this rank's windows, with the rows of all ranks' windows."""
    found = list(grams)
    rows = ranks.sum_(torch.tensor([gram.rows for gram in found])).tolist()
    return [replace(gram, rows=count) for gram, count in zip(found, rows, strict=True)]


def sum_grams(grams: list[Gram], needs: Callable[[Gram], frozenset[int]], ranks: Ranks) -> list[Gram]:
    """Sum each matrix over the ranks, for those ranks that need it.

    Args:
        grams: Grams of this rank's windows; the list is emptied, so that each matrix can be freed.
        needs: Function that returns the ranks that need a Gram.
        ranks: The ranks; each calls with the same Grams in the same order.

    Returns:
        The Grams that this rank needs, in the same order.
    """
    kept = []
    while grams:
        gram = grams.pop(0)
        needing = needs(gram)
        if len(needing) == 1:
            ranks.reduce_(gram.matrix, *needing)
        else:
            ranks.sum_(gram.matrix)
        if ranks.rank in needing:
            kept.append(gram)
    return kept


@dataclass
class _InputHooks:
    """Hooks that, while entered, call on_input(owner, x) for each distinct input x of a pass through a block.

    The owner of an input is the first linear that it reaches.
    """

    linears: Mapping[str, nn.Linear]
    on_input: Callable[[str, Tensor], None]
    rows: dict[str, int] = field(default_factory=dict)  # linear -> inputs that it has seen
    _owner_of: dict[str, str] = field(default_factory=dict)  # linear -> owner of its input
    _alive: list[tuple[Tensor, str]] = field(default_factory=list)  # inputs of this pass: a dead one's id may return
    _handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def __enter__(self) -> None:
        self.rows = dict.fromkeys(self.linears, 0)
        for name, linear in self.linears.items():
            self._handles.append(linear.register_forward_pre_hook(partial(self._before_forward, name)))

    def __exit__(self, *_: object) -> None:
        self._alive.clear()
        while self._handles:
            self._handles.pop().remove()

    def end_pass(self) -> None:
        """Forget the inputs of the pass that has ended, which frees them."""
        self._alive.clear()

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Return the linears that share an input, in call order; the owner is the first of its group."""
        owners = dict.fromkeys(self._owner_of.values())
        return tuple(tuple(n for n, o in self._owner_of.items() if o == owner) for owner in owners)

    def _before_forward(self, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
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
