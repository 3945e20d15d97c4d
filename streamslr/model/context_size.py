"""Bytes that a model keeps of a context: keys and values, or whatever its own code keeps, on the meta device."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from streamslr.errors import first_line
from streamslr.model.checkpoint import Checkpoint
from streamslr.model.meta_model import build_on_meta
from streamslr.model.transformers_compat import experts_on_meta

_SHORT = 8, 16
"""Tokens of two passes of a recurrent model, from which the rest follows: its states have one size, its keys and values
grow with the tokens. Such a model may take its tokens one by one, a whole context in minutes."""

log = logging.getLogger("streamslr")


def context_bytes(checkpoint: Checkpoint, number_bytes: int, tokens: int) -> int:
    """Return the bytes of keys, values and states of one context; with a warning an estimate, or 0 if there is none.

    A sliding window counts as what it holds, but in a recurrent model as all tokens.

    Args:
        checkpoint: The model; its headers alone are read.
        number_bytes: Bytes of a number of the model, 2 or 4.
        tokens: Tokens of the context.
    """
    try:
        dtype = torch.bfloat16 if number_bytes == 2 else torch.float32
        model = build_on_meta(checkpoint.config, dtype, checkpoint.tensors)
        few, is_recurrent = _kept(model, _SHORT[0])
        if not few:
            raise ValueError("it returns no cache")
        if not is_recurrent:
            return sum(_kept(model, tokens)[0])
        more, _ = _kept(model, _SHORT[1])
    except Exception as error:  # a model's code may do anything
        estimate = _estimate(checkpoint.config.get_text_config(), number_bytes, tokens)
        how = "are estimated from config.json" if estimate else "are not counted"
        message = "keys and values of a context %s: a pass of %s on the meta device does not tell them (%s)"
        log.warning(message, how, checkpoint.model, first_line(error))
        return estimate
    growth = (sum(more) - sum(few)) / (_SHORT[1] - _SHORT[0])
    return sum(few) + round(growth * (tokens - _SHORT[0]))


@torch.no_grad()
def _kept(model: Any, tokens: int) -> tuple[list[int], bool]:
    """Return the bytes of each tensor that a pass of one window keeps for the next token, and if any is a state."""
    decoder = model.get_decoder()
    with torch.device("meta"), experts_on_meta(model):
        output = decoder(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=True)
    cache = [output.get(name) for name in ("past_key_values", "cache_params")]
    found = [(tensor, path) for tensor, path in _tensors(cache) if tensor.is_floating_point()]
    sizes = {id(tensor): tensor.nbytes for tensor, _ in found}
    return list(sizes.values()), any("states" in path for _, path in found)


def _tensors(kept: Any, path: str = "") -> Iterator[tuple[Tensor, str]]:
    """Yield the tensors of a cache of transformers, whose layers are objects with lists and dicts of them, by path."""
    if isinstance(kept, Tensor):
        yield kept, path
    elif path.count(".") < 6 and not isinstance(kept, nn.Module):
        parts = kept if isinstance(kept, dict) else getattr(kept, "__dict__", {})
        parts = dict(enumerate(kept)) if isinstance(kept, list | tuple) else parts
        for name, part in parts.items():
            yield from _tensors(part, f"{path}.{name}")


def _estimate(config: Any, number_bytes: int, tokens: int) -> int:
    """Return what attention with all tokens in every layer keeps; 0 where the config does not say its sizes."""
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    hidden = getattr(config, "hidden_size", None)
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        return 0
    of_keys = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or hidden // heads
    return 2 * layers * of_keys * width * tokens * number_bytes
