"""Inputs of a block's linears -> Gram matrices H = XᵀX, one per distinct input; what experts with few tokens get."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from streamslr.config import format_bytes
from streamslr.errors import BudgetError, InputError
from streamslr.model.blockwise import Block

log = logging.getLogger("streamslr")

ENOUGH = 2
"""Tokens for each input with which an expert's own Gram stands alone (`lean_on_all`): between two measurements.

With eight clusters of llama-8m's tokens for experts, up and down of two blocks by 3basil at 2:4 + 16, the loss on
tokens that the Gram had not seen was least at shares w of the own one of about 0.1, 0.2, 0.35, 0.5, 0.75 and 1, at
1/8, 1/4, 1/2, 1, 2 and 4 tokens an input (tools/bench_experts.py). This rule's shares lose about 5 % more up to 1, up
to 14 % at 2; at 1 the own Gram alone loses 32 to 59 % more, the shared one alone 14 to 29 %. With a Qwen3-MoE of 5.6 M
trained for 450 steps, by eora-sparsegpt at 1:4 + 8 with 0.6 and 1.2 tokens an input in the mean, perplexity was least
where only experts without any token got the shared Gram: 112.4 and 110.9; at ENOUGH = 2 it was 112.9 and 111.1, at 4
113.1 and 111.2, with the shared one alone 113.7 and 112.0 (means of four seeds; dense 105.3)."""


@dataclass(frozen=True)
class Gram:
    """H [d, d] float32 = Σ x xᵀ over the `rows` inputs x that all of `linears` receive.

    shared: how much of it is of all experts beside this one, which too few tokens reached (`lean_on_all`).
    """

    linears: tuple[str, ...]
    matrix: Tensor
    rows: int
    shared: float = 0.0

    def warnings(self, name: str) -> tuple[str, ...]:
        """What the user should know of a solution in this Gram of the linear `name`."""
        if not self.shared:
            return ()
        return (
            f"{name}: {self.rows} calibration tokens reached this expert where {ENOUGH * len(self.matrix)} would do; "
            f"{self.shared:.1%} of its Gram matrix is all experts'",
        )


def offload_grams(grams: list[Gram], place: str, folder: Path) -> list[Callable[[], Gram]]:
    """The Grams in `place`, "device" (where they are), "host" or "disk" (a file each in `folder`); empties `grams`.

    Each is to be had once, by calling. Raises BudgetError when the disk is full.
    """
    aside: list[Callable[[], Gram]] = []
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
            aside.append(partial(_from_disk, replace(gram, matrix=gram.matrix.to("meta")), path))
        else:
            moved = gram if place == "device" else replace(gram, matrix=gram.matrix.cpu())
            aside.append(partial(replace, moved))
    return aside


def _from_disk(gram: Gram, path: Path) -> Gram:
    """Its matrix mapped: the system reads pages as they are used, and may drop them."""
    d = len(gram.matrix)
    matrix = torch.from_file(str(path), size=d**2).view(d, d)
    path.unlink()  # its space is free once the mapping goes
    return replace(gram, matrix=matrix)


def input_groups(linears: Mapping[str, nn.Linear], run_block: Callable[[], object]) -> tuple[tuple[str, ...], ...]:
    """Which linears of a block share an input, found by passing anything through it once (also on meta)."""
    watch = _Watch(linears, lambda owner, x: None)
    with watch:
        run_block()
    return watch.groups()


class GramCollector:
    """Collect the Gram matrices of a block's linears while batches pass through the block.

    While entered, hooks on the linears add up Σ x xᵀ of their inputs in float32, whatever the compute dtype. Linears
    share a Gram when they are handed the very same tensor object: q, k and v, or gate and up, but in a parallel block
    all five; nothing is read off names.

        with GramCollector(block) as collector:
            outputs = [collector.run(first, hidden) for first, hidden in batches]
        grams = collector.grams()
    """

    def __init__(self, block: Block, diagonal: bool = False) -> None:
        """Collect of each Gram only the `diagonal` [d], for far less work, where that is asked for."""
        self._block, self._diagonal = block, diagonal
        self._grams: dict[str, Tensor] = {}
        # owner -> (first window, windows, not finite [rows]) of each batch
        self._not_finite: dict[str, list[tuple[int, int, Tensor]]] = {}
        self._first = self._windows = self._tokens = 0
        self._watch = _Watch(block.linears, self._add)

    def __enter__(self) -> "GramCollector":
        self._watch.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.__exit__()

    @torch.no_grad()
    def run(self, first: int, hidden: Tensor) -> Tensor:
        """Pass `hidden` [b, T, h], windows `first` to `first` + b - 1, through the block; return its output [b, T, h]."""
        self._first, self._windows = first, len(hidden)
        output = self._block.run(hidden)
        self._watch.next_pass()
        self._tokens += hidden.shape[0] * hidden.shape[1]
        return output

    def _add(self, owner: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()  # [b·T, d]
        if owner not in self._grams:
            self._grams[owner] = torch.zeros(x.shape[-1:] * (1 if self._diagonal else 2), device=x.device)
        if self._diagonal:
            self._grams[owner] += torch.linalg.vector_norm(rows, dim=0).square()  # no copy of the activations
        else:
            self._grams[owner].addmm_(rows.T, rows)
        # a row's sum is finite only if its entries are, and needs no copy of the activations
        bad = (self._first, self._windows, ~torch.isfinite(rows.sum(1)))
        self._not_finite.setdefault(owner, []).append(bad)

    def grams(self) -> list[Gram]:
        """Return the Grams, in call order; those of experts with few tokens as `lean_on_all` leaves them.

        Raises:
            InputError: An input holds NaN or infinity, or a linear that is no expert's did not see every token of
                every window exactly once (shared linears).
        """
        block, rows = self._block, self._watch.rows
        for name, seen in rows.items():
            if seen != self._tokens and name not in block.experts:
                raise InputError(
                    f"{name} saw {seen} inputs where {self._tokens} tokens passed {block.name}; only linears that see "
                    f"each token once can be compressed"
                )
        self._require_finite()
        shared = lean_on_all(self._grams, rows, block.experts)
        if shared:
            log.warning(
                "%s: too few tokens for %d of the %d Gram matrices of its experts, the least %d; they lean on all "
                "experts'",
                block.name,
                len(shared),
                len(block.experts.keys() & self._grams.keys()),
                min(rows[owner] for owner in shared),
            )
        groups = self._watch.groups()
        return [Gram(group, self._grams[group[0]], rows[group[0]], shared.get(group[0], 0.0)) for group in groups]

    def _require_finite(self) -> None:
        for owner, parts in self._not_finite.items():
            if bad := int(torch.cat([rows for *_, rows in parts]).sum()):
                where: set[int] = set()
                for first, count, rows in parts:
                    if owner in self._block.experts and rows.any():
                        where |= set(range(first, first + count))  # which window a routed token is of, nobody noted
                    else:
                        where |= {first + row * count // len(rows) for row in rows.nonzero().flatten().tolist()}
                raise InputError(
                    f"{self._block.name}: the input of {owner} is NaN or infinite for {bad} tokens, in calibration "
                    f"windows {sorted(where)}; the model overflows on this text in the compute dtype (--device cpu "
                    "computes in float32), or its weights are damaged"
                )


def lean_on_all(grams: Mapping[str, Tensor], rows: Mapping[str, int], experts: Mapping[str, str]) -> dict[str, float]:
    """Changes the Grams of experts that fewer than ENOUGH·d tokens reached; returns how much: owner -> 1 - w.

    grams: owner -> H_e [d, d], rows: linear -> n_e, experts: linear -> its kind. What an expert lacks comes from
    all of its kind, both counted per token: with w = min(1, √(n_e / (ENOUGH·d))),

        H = n_e · (w · H_e / n_e + (1 - w) · Σ H_e / Σ n_e),

    and Σ H_e alone where no token came. For gate and up that sum is k times the Gram of the linear's own input, since
    each token reaches k experts.
    """
    shared: dict[str, float] = {}
    kinds: dict[str, list[str]] = {}
    for owner in grams:
        if owner in experts:
            kinds.setdefault(experts[owner], []).append(owner)
    for owners in kinds.values():
        tokens = sum(rows[owner] for owner in owners)
        few = {owner: 1 - math.sqrt(rows[owner] / (ENOUGH * len(grams[owner]))) for owner in owners}
        few = {owner: lacking for owner, lacking in few.items() if lacking > 0}
        if few:
            of_all = torch.zeros_like(grams[owners[0]])
            for owner in owners:
                of_all += grams[owner]
            for owner, lacking in few.items():
                grams[owner].mul_(1 - lacking).add_(of_all, alpha=lacking * ((rows[owner] or tokens) / tokens))
            shared |= few
            del of_all  # before the next kind's is made
    return shared


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
