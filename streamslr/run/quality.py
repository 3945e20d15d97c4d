"""Predictions of the compressed model beside the dense one's: figures of a window, their means, the verdict."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from torch import Tensor
from torch.nn.functional import cosine_similarity

from streamslr.run.journal import Quality

TOKENS_AT_ONCE = 128
"""Tokens whose logits exist at a time."""

_LOGITS = 6
"""Tensors [t, V] in float32 that exist at a time: logits and their logarithms of two models, and two of their terms."""

_LARGEST = 1e100
"""Largest figure that the journal takes."""

MOST_NATS = math.log(2)
"""Most nats a token, in the mean KL divergence and in the loss, by which a good result may differ from the dense model:
one bit, a perplexity of twice the dense one. Between what is poor but works and what does not, on llama-8m: SparseGPT
at 1:4 has a KL of 0.40 and OATS at 1:4 + 8 one of 0.59; Wanda at 1:4 has 1.4, a scrambled first block 2.4, and a model
without its U·V 3.7 (tools/results/check.md)."""

_LARGEST_DROP, _DROP_RATIO, _FEWEST_DROPS = 0.02, 10, 4
"""A block is suspect where the cosine falls by more than 0.02 and by ten times the median fall, of at least four falls.
A ruined block hardly shows in the predictions, since the residual stream goes around it: with one scrambled block of
eight, not the first, llama-8m has a KL of 0.12 to 0.16, as with Wanda at 2:4. But the cosine falls by 0.06 to 0.08.
Where every block is poor, the largest fall is 1.5 times the median. Block 0 is left out: its fall from 1 is always
large, and where it is ruined the predictions show it. Too few blocks tell nothing (tools/results/check.md)."""


def logits_bytes(tokens: int, vocabulary: int) -> int:
    """Return the bytes of logits and probabilities of both models in `compare_window`, for windows of `tokens`."""
    return _LOGITS * 4 * min(tokens, TOKENS_AT_ONCE) * vocabulary


@dataclass(frozen=True)
class WindowFigures:
    """Sums over the predicted tokens of one window."""

    nll_dense: float  # negative log-likelihood, nats
    nll: float  # of the compressed model
    kl: float  # KL(dense ‖ compressed) of the distributions of the next token, nats
    agreeing: int  # tokens for which both models rank the same next token first


def mean_cosine(dense: Tensor, compressed: Tensor) -> float:
    """Return the mean over tokens of the cosine between hidden states of two models, [..., T, h] each."""
    return float(cosine_similarity(dense.float(), compressed.float(), dim=-1).double().mean())


def compare_window(
    logits: Callable[[Tensor, Tensor], Tensor], ids: Tensor, dense: Tensor, compressed: Tensor
) -> WindowFigures:
    """Compare the predictions of two models on one window, `TOKENS_AT_ONCE` tokens at a time.

    Args:
        logits: Function of (ids [1, t], hidden states [1, t, h] that leave the last block), which gives [1, t, V].
        ids: Token ids [T].
        dense: Hidden states [T, h] that leave the dense model's last block.
        compressed: Those of the compressed model.
    """
    sums = []
    for start in range(0, len(ids) - 1, TOKENS_AT_ONCE):
        stop = min(start + TOKENS_AT_ONCE, len(ids) - 1)
        p, q = (logits(ids[None, start:stop], hidden[None, start:stop])[0] for hidden in (dense, compressed))
        sums.append(_compare_logits(p, q, ids[start + 1 : stop + 1].to(p.device)))
    return WindowFigures(
        sum(part.nll_dense for part in sums),
        sum(part.nll for part in sums),
        sum(part.kl for part in sums),
        sum(part.agreeing for part in sums),
    )


def _compare_logits(dense: Tensor, compressed: Tensor, following: Tensor) -> WindowFigures:
    """Compare logits [t, V] of two models, given the tokens [t] that follow."""
    agreeing = dense.argmax(-1) == compressed.argmax(-1)
    log_p, log_q = dense.float().log_softmax(-1), compressed.float().log_softmax(-1)
    nll_dense, nll = (-log.gather(-1, following[:, None]).double().sum() for log in (log_p, log_q))
    p = log_p.exp()
    kl = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0).sum(-1)  # a token that never follows adds 0, not 0 · ∞
    return WindowFigures(float(nll_dense), float(nll), float(kl.double().sum()), int(agreeing.sum()))


def judge(windows: Sequence[WindowFigures], tokens: int, cosines: Sequence[float | None]) -> Quality:
    """Return the means over all windows, and the verdict.

    Args:
        windows: Figures of each window.
        tokens: Predicted tokens of each window.
        cosines: Cosine behind each block, None where it is not finite.
    """
    count = len(windows) * tokens
    nll_dense, nll, kl = (
        math.fsum(sums) / count
        for sums in zip(*((window.nll_dense, window.nll, window.kl) for window in windows), strict=True)
    )
    perplexity_dense, perplexity = _perplexity(nll_dense), _perplexity(nll)
    reasons = []
    if perplexity_dense is None or perplexity is None or not math.isfinite(kl):
        reasons.append("a figure is not finite")
    elif nll - nll_dense > MOST_NATS:
        reasons.append(f"its perplexity is {perplexity / perplexity_dense:.3g} times that of the dense model")
    if kl > MOST_NATS:
        reasons.append(f"its predictions are {kl:.3g} nats a token from those of the dense model")
    reasons += _find_ruined(cosines)
    return Quality(
        windows=len(windows),
        tokens=count,
        perplexity_dense=perplexity_dense,
        perplexity=perplexity,
        kl=kl if abs(kl) < _LARGEST else None,
        top1_agreement=sum(window.agreeing for window in windows) / count,
        verdict="suspect" if reasons else "good",
        reason="; ".join(reasons),
    )


def _find_ruined(cosines: Sequence[float | None]) -> list[str]:
    """Return what is wrong with blocks behind which the hidden states are suddenly others than the dense model's."""
    finite = [cosine for cosine in cosines if cosine is not None]
    if len(finite) < len(cosines):
        return [f"hidden states behind block {cosines.index(None)} are not finite"]
    drops = {block: before - behind for block, (before, behind) in enumerate(pairwise(finite), 1)}
    if len(drops) < _FEWEST_DROPS:
        return []
    least = max(_LARGEST_DROP, _DROP_RATIO * median(drops.values()))
    return [
        f"behind block {block} the cosine to the dense model's hidden states falls by {drop:.3f}, elsewhere by "
        f"{median(drops.values()):.4f} (median)"
        for block, drop in drops.items()
        if drop > least
    ]


def _perplexity(nll: float) -> float | None:
    return math.exp(nll) if nll < math.log(_LARGEST) else None


def describe_quality(quality: Quality) -> str:
    """Return the figures in words."""
    dense, compressed = (
        "not finite" if figure is None else f"{figure:.4g}" for figure in (quality.perplexity_dense, quality.perplexity)
    )
    kl = "not finite" if quality.kl is None else f"{quality.kl:.3g} nats a token"
    return (
        f"perplexity {dense} dense, {compressed} compressed; KL divergence {kl}; same first choice for "
        f"{quality.top1_agreement:.1%} of {quality.tokens:,} tokens"
    )


def warn_of(quality: Quality) -> str:
    """Return the warning about a suspect result."""
    return (
        f"THE RESULT IS SUSPECT: {quality.reason}. Do not use it before `streamslr eval` shows what it is worth; more "
        "rank, a denser pattern or matching help where the settings are too harsh"
    )
