"""Grams of experts: those that too few tokens reached are blended with the Gram of all experts of their kind."""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamslr.calibration.grams import ENOUGH_TOKENS, Gram
from streamslr.errors import InputError
from streamslr.model.blockwise import Block

log = logging.getLogger("streamslr")


def blend_bytes(expert_widths: Iterable[int]) -> int:
    """Return the bytes of the sum over experts that `blend_experts` makes for one kind at a time; 0 without experts.

    Measured by `test_the_sum_over_experts_is_made_of_one_kind_at_a_time`.
    """
    return max((4 * d * d for d in expert_widths), default=0)


@dataclass
class ExpertSum:
    """Σ H_e [d, d] over experts of one kind, and Σ n_e, the tokens that reached them."""

    matrix: Tensor
    tokens: int = 0


def add_experts(sums: dict[str, ExpertSum], grams: Iterable[Gram], experts: Mapping[str, str]) -> None:
    """Add the Grams of experts to the sums of their kinds; pass other Grams by.

    Args:
        sums: Kind -> sum so far; a kind that is not there yet is added.
        grams: Grams, none of them blended yet.
        experts: Linear of an expert -> its kind, the same in every expert beside it.
    """
    for gram in grams:
        if kind := experts.get(gram.linears[0]):
            if kind not in sums:
                sums[kind] = ExpertSum(torch.zeros_like(gram.matrix))
            sums[kind].matrix += gram.matrix
            sums[kind].tokens += gram.rows


def blend_expert(gram: Gram, sums: Mapping[str, ExpertSum], experts: Mapping[str, str]) -> Gram:
    """Blend, in place, the Gram of an expert that fewer than ENOUGH_TOKENS · d tokens reached with all experts' Gram.

    The Gram of all experts of the same kind stands in for what such an expert lacks. Both count per token: with
    w = min(1, √(n_e / (ENOUGH_TOKENS · d))),

        H = n_e · (w · H_e / n_e + (1 - w) · Σ H_e / Σ n_e),

    and H = Σ H_e where no token reached the expert. For gate and up, Σ H_e is k times the Gram of the MLP's input,
    since each token reaches k experts.

    Args:
        gram: Gram over all windows, on the device of the sums.
        sums: Kind -> Σ H_e and Σ n_e over all experts and windows (`add_experts`).
        experts: Linear of an expert -> its kind.

    Returns:
        The Gram with its shared fraction 1 - w; `gram` itself where enough tokens reached it, or it is no expert's.

    Raises:
        InputError: No token reached any expert of the kind.
    """
    owner, fraction = gram.linears[0], _lacking(gram)
    if owner not in experts or not fraction:
        return gram
    of_all = sums[experts[owner]]
    _require_tokens(owner, of_all)
    share = (gram.rows or of_all.tokens) / of_all.tokens
    gram.matrix.mul_(1 - fraction).add_(of_all.matrix, alpha=fraction * share)
    return replace(gram, shared_fraction=fraction)


def blend_experts(grams: Iterable[Gram], experts: Mapping[str, str]) -> list[Gram]:
    """Return all Grams of a block, those of experts with few tokens blended (`blend_expert`); one kind at a time."""
    blended = list(grams)
    for kind in dict.fromkeys(experts.values()):
        numbers = [i for i, gram in enumerate(blended) if experts.get(gram.linears[0]) == kind]
        if any(_lacking(blended[i]) for i in numbers):
            sums: dict[str, ExpertSum] = {}
            add_experts(sums, (blended[i] for i in numbers), experts)
            for i in numbers:
                blended[i] = blend_expert(blended[i], sums, experts)
    return blended


def kinds_to_blend(grams: Iterable[Gram], experts: Mapping[str, str]) -> set[str]:
    """Return the kinds of experts of which one saw too few tokens; matrices may be on meta."""
    return {experts[gram.linears[0]] for gram in grams if gram.linears[0] in experts and _lacking(gram)}


def warn_of_few_tokens(block: Block, grams: Iterable[Gram]) -> None:
    """Log how many experts' Grams saw too few tokens, of all Grams of a block; their matrices may be on meta."""
    rows = [(gram.rows, _lacking(gram)) for gram in grams if gram.linears[0] in block.experts]
    few = [count for count, lacking in rows if lacking]
    if few:
        log.warning(
            "%s: %d of the %d Gram matrices of its experts saw too few tokens, the fewest %d; they are blended with "
            "the Gram matrix of all experts",
            block.name,
            len(few),
            len(rows),
            min(few),
        )


def _require_tokens(owner: str, of_all: ExpertSum) -> None:
    """Raise InputError where no token reached any expert of a kind."""
    if not of_all.tokens:
        raise InputError(
            f"{owner}: no token reached any expert of its kind, so its Gram is 0; give other --calibration"
        )


def _lacking(gram: Gram) -> float:
    """Return the fraction 1 - w of an expert's Gram that its own tokens are too few for."""
    return max(0.0, 1 - math.sqrt(gram.rows / (ENOUGH_TOKENS * len(gram.matrix))))
