"""Bytes that a model keeps of a context: keys and values, or whatever its own code keeps, on the meta device."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from streamslr.errors import first_line
from streamslr.model.checkpoint import Checkpoint
from streamslr.model.meta_model import build_on_meta
from streamslr.model.transformers_compat import experts_on_meta

_SHORT = 8, 16
"""Tokens of the two passes that show what grows with the context. A state of fixed size says that the model is
recurrent; its code may take its tokens one by one, so a pass through a whole context may take minutes."""

log = logging.getLogger("streamslr")


def context_bytes(checkpoint: Checkpoint, number_bytes: int, tokens: int) -> int:
    """Return the bytes of keys, values and states of one context; 0, and a warning, where the model cannot tell.

    A sliding window counts as what it holds. Only in a recurrent model with sliding windows it counts as all tokens.

    Args:
        checkpoint: The model; its headers alone are read.
        number_bytes: Bytes of a number of the model, 2 or 4.
        tokens: Tokens of the context.
    """
    try:
        dtype = torch.bfloat16 if number_bytes == 2 else torch.float32
        model = build_on_meta(checkpoint.config, dtype, checkpoint.tensors)
        few, more = (_kept(model, count) for count in _SHORT)
        if not few or len(few) != len(more):
            raise ValueError("it returns no cache")
        if all(one < other for one, other in zip(few, more, strict=True)):
            return sum(_kept(model, tokens))
    except Exception as error:  # a model's code may do anything
        message = "keys and values of a context are not counted: %s does not run on the meta device (%s)"
        log.warning(message, checkpoint.model, first_line(error))
        return 0
    one, other = _SHORT
    return sum(a + (b - a) * (tokens - one) // (other - one) for a, b in zip(few, more, strict=True))


@torch.no_grad()
def _kept(model: Any, tokens: int) -> list[int]:
    """Return the bytes of each tensor that a pass of one window keeps for the next token."""
    with torch.device("meta"), experts_on_meta(model):
        output = model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=True)
    cache = [output.get(name) for name in ("past_key_values", "cache_params")]
    return [tensor.nbytes for tensor in dict.fromkeys(_tensors(cache)) if tensor.is_floating_point()]


def _tensors(kept: Any, depth: int = 0) -> Iterator[Tensor]:
    """Yield the tensors of a cache of transformers, whose layers are objects with lists and dicts of them."""
    if isinstance(kept, Tensor):
        yield kept
    elif depth < 6:
        within = kept.values() if isinstance(kept, dict) else kept if isinstance(kept, list | tuple) else None
        for part in within if within is not None else getattr(kept, "__dict__", {}).values():
            yield from _tensors(part, depth + 1)
