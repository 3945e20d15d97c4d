"""Settings whose compressed model runs on a card of a given size, with room for a context."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from streamslr.config import RunConfig, format_bytes
from streamslr.errors import InputError
from streamslr.io.packed_layout import packed_bytes
from streamslr.model.shape import ModelShape
from streamslr.spec.allocation import DEFAULT_RANK
from streamslr.spec.pattern import Dense, SparsityPattern, parse_pattern
from streamslr.spec.values import STORED, parse_low_rank_values, parse_values

CONTEXT_TOKENS = 8192
"""Tokens of one context whose keys and values find room beside the weights."""
_PATTERNS = ("dense", "2:4", "1:4")
_VALUES = (STORED, "int8", "int4")
_OTHERS = 1 << 30
"""Bytes of a card for CUDA itself and for what a pass through one block holds; chosen, not measured."""


@dataclass(frozen=True)
class Fit:
    """A setting and what its result takes of a card.

    Attributes:
        pattern: Value of --pattern.
        values: Value of --values.
        rank: Value of --rank.
        weight_bytes: Bytes of all weights as they are stored, and as `streamslr.load` and vLLM hold them.
        bits: Bits a weight of the linears, U, V and scales included.
        needed_bytes: With the context and what else is on the card.
    """

    pattern: str
    values: str
    rank: int
    weight_bytes: int
    bits: float
    needed_bytes: int


def settings_that_fit(config: RunConfig, model: ModelShape, cache_bytes: int, card: int) -> list[Fit]:
    """Return the settings whose result fits a card: the dense ones first, and of each kind those that keep most bytes.

    On the two models measured dense int4 gives a lower perplexity than every sparse setting of as many bits, and 2:4
    with bf16 of twice as many (tools/results, "Values on a grid" and "A real model").

    Args:
        config: Settings of a run. Those of --pattern and --values that it gives are the only ones that are tried.
        model: Shapes of the model.
        cache_bytes: Bytes of keys and values of a context.
        card: Bytes of the card.

    Raises:
        InputError: No setting's result fits, or a setting gives linears by name or by their parameters.
    """
    for name in ("ranks", "compression", "rank_ratio", "owl", "allocation"):
        if getattr(config, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"--fit lists settings that are the same for all linears: leave {flag} out")
    rank = DEFAULT_RANK if config.rank is None else config.rank
    every = [
        _fit(model, pattern, values, rank, config.group, config.low_rank_values, cache_bytes)
        for pattern in (_PATTERNS if config.pattern is None else (config.pattern,))
        for values in (_VALUES if config.values == STORED else (config.values,))
        if not (pattern == "dense" and values == STORED) and _has_all(model, parse_pattern(pattern))
    ]
    if not every:
        raise InputError(f"not every linear of the model can have --pattern {config.pattern}; give another")
    fitting = [fit for fit in every if fit.needed_bytes <= card]
    if not fitting:
        least = min(every, key=lambda fit: fit.needed_bytes)
        raise InputError(
            f"no setting fits {format_bytes(card)}: {least.pattern} in {least.values} at rank {rank} needs "
            f"{format_bytes(least.needed_bytes)} with a context of {CONTEXT_TOKENS:,} tokens; give a larger card, or a "
            f"lower --rank"
        )
    return sorted(fitting, key=lambda fit: (fit.pattern != "dense", -fit.needed_bytes))


def fit_table(fits: Sequence[Fit], card: int, cache_bytes: int) -> Table:
    """Return a table with a row for each setting."""
    context = f"{format_bytes(cache_bytes)} of keys and values" if cache_bytes else "keys and values, not counted here"
    table = Table(
        title=f"settings whose result runs on {format_bytes(card)}",
        caption=f"needed: weights as stored, a context of {CONTEXT_TOKENS:,} tokens ({context}), and "
        f"{format_bytes(_OTHERS)} for CUDA and the work of a block\nbits: of a weight, with U, V and scales\n"
        "order: dense first; on the models measured, dense int4 is better than sparse of as many bits",
        caption_justify="left",
    )
    for name in ("--pattern", "--values", "--rank", "bits", "weights", "needed"):
        table.add_column(name, justify="right")
    for fit in fits:
        sizes = format_bytes(fit.weight_bytes), format_bytes(fit.needed_bytes)
        table.add_row(fit.pattern, fit.values, str(fit.rank), f"{fit.bits:.2f}", *sizes)
    return table


def context_bytes(config: object, dtype_bytes: int) -> int:
    """Return the bytes of keys and values of one context of a model of transformers; 0 where its config says no sizes.

    Every layer is taken to keep all tokens: sliding windows and shared keys take less.

    Args:
        config: The model's text config.
        dtype_bytes: Bytes of a number.
    """
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    hidden = getattr(config, "hidden_size", None)
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        return 0
    of_keys = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or hidden // heads
    return 2 * layers * of_keys * width * CONTEXT_TOKENS * dtype_bytes


def _fit(model: ModelShape, pattern: str, values: str, rank: int, group: int, low_rank: str, cache_bytes: int) -> Fit:
    parsed, form, factors = parse_pattern(pattern), parse_values(values, group), parse_low_rank_values(low_rank)
    packed = dense = weights = 0
    for block in model.blocks:
        for o, d in block.linears.values():
            packed += packed_bytes(parsed, (o, d), min(rank, o, d), model.value_bytes, form, factors)
            weights += o * d
        dense += block.parameters - sum(o * d for o, d in block.linears.values())
    total = packed + dense * model.value_bytes + model.non_block_bytes
    return Fit(pattern, values, rank, total, 8 * packed / weights, total + cache_bytes + _OTHERS)


def _has_all(model: ModelShape, pattern: SparsityPattern) -> bool:
    """Return True where every linear can have the pattern."""
    if isinstance(pattern, Dense):
        return True
    try:
        for block in model.blocks:
            for name, shape in block.linears.items():
                pattern.require_fits(name, shape)
    except InputError:
        return False
    return True
