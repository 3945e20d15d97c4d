"""Settings whose compressed model runs on a card of a given size, with room for a context."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

from rich.table import Table

from streamslr.config import RunConfig, format_bytes
from streamslr.errors import InputError
from streamslr.io.packed_layout import packed_bytes
from streamslr.model.shape import ModelShape
from streamslr.solvers import Method, find_method
from streamslr.spec.allocation import DEFAULT_RANK, LinearSpec
from streamslr.spec.pattern import parse_pattern
from streamslr.spec.values import STORED, parse_low_rank_values, parse_values

CONTEXT_TOKENS = 8192
"""Tokens of one context whose keys and values find room beside the weights."""
_PATTERNS = ("dense", "4:8", "2:4", "1:4")
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

    Where the config gives no rank, each pattern with each values has the default rank, or 0 where only that fits.

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
    ranks = (DEFAULT_RANK, 0) if config.rank is None else (config.rank,)
    method, low_rank = find_method(config.method), parse_low_rank_values(config.low_rank_values)
    kinds = []
    for pattern in _PATTERNS if config.pattern is None else (config.pattern,):
        for values in _VALUES if config.values == STORED else (config.values,):
            form = parse_values(values, config.group)
            specs = [LinearSpec(parse_pattern(pattern), rank, form, low_rank) for rank in ranks]
            kinds.append([_fit(model, pattern, values, s, cache_bytes) for s in specs if _has_all(model, method, s)])
    if not any(kinds):
        given = [f"--pattern {config.pattern}"] if config.pattern else []
        given += [f"--values {config.values}"] if config.values != STORED else []
        given += [f"--rank {' or '.join(map(str, ranks))} by --method {method.name}"]
        raise InputError(f"not every linear of the model can have {' with '.join(given)}; give others")
    fitting = [first for kind in kinds if (first := next((fit for fit in kind if fit.needed_bytes <= card), None))]
    if not fitting:
        least = min(chain.from_iterable(kinds), key=lambda fit: fit.needed_bytes)
        raise InputError(
            f"no setting fits {format_bytes(card)}: {least.pattern} in {least.values} at rank {least.rank} needs "
            f"{format_bytes(least.needed_bytes)} with a context of {CONTEXT_TOKENS:,} tokens; give a larger card"
            f"{', or a lower --rank' if least.rank else ''}"
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


def _fit(model: ModelShape, pattern: str, values: str, spec: LinearSpec, cache_bytes: int) -> Fit:
    packed = dense = weights = 0
    for block in model.blocks:
        for shape in block.linears.values():
            rank = min(spec.rank, *shape)
            packed += packed_bytes(spec.pattern, shape, rank, model.value_bytes, spec.values, spec.low_rank_values)
            weights += prod(shape)
        dense += block.parameters - sum(map(prod, block.linears.values()))
    total = packed + dense * model.value_bytes + model.non_block_bytes
    return Fit(pattern, values, spec.rank, total, 8 * packed / weights, total + cache_bytes + _OTHERS)


def _has_all(model: ModelShape, method: Method, spec: LinearSpec) -> bool:
    """Return True where every linear can have the spec, by this method."""
    try:
        method.require(spec.pattern, spec.rank)
        for block in model.blocks:
            for name, shape in block.linears.items():
                spec.require_fits(name, shape)
    except InputError:
        return False
    return True
