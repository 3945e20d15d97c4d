"""Memory of a pass without gradients through one block, beside the block itself.

The plan of the phases that consist of such a pass (grams, propagate) is 1.06 to 1.08 times their measured peak
(tools/results/run-llama-8m.json).
"""

from streamslr.model.shape import BlockShape

_STREAM_TENSORS, _NORM_TENSORS, _WIDE_TENSORS = 3, 3, 3
"""Tensors [tokens, h] of the residual stream and of its norms, and tensors as wide as the block's widest linear. In one
Llama-3-70B block on a pretended GPU, a float32 stream takes 6 bytes more for each token and channel than a bf16 one."""

_GATE_TENSORS = 3
"""Tensors as large as the outputs [tokens · k, 2i] that a gate of experts takes, these included: 2 for a plain gate
(counted by torch's profiler), 3.5 for one with clamps."""


def activation_bytes(block: BlockShape, tokens: int, hidden_size: int, value_bytes: int, stream_bytes: int) -> int:
    """Return the bytes of the activations that exist at once.

    Counted are the residual stream and its norms, three tensors of the widest linear, and `routed_bytes`.

    Args:
        block: Shapes of the block.
        tokens: Tokens of one micro-batch, b · T.
        hidden_size: Width h of the residual stream.
        value_bytes: Bytes of one number in the compute dtype.
        stream_bytes: Bytes of one number of the residual stream.
    """
    widest = max(max(shape) for shape in block.linears.values())
    stream = tokens * stream_bytes * _STREAM_TENSORS * hidden_size
    beside = tokens * value_bytes * (_NORM_TENSORS * hidden_size + _WIDE_TENSORS * widest)
    return stream + beside + routed_bytes(block, tokens, hidden_size, value_bytes)


def routed_bytes(block: BlockShape, tokens: int, hidden_size: int, value_bytes: int) -> int:
    """Return the bytes that a pass through experts holds in addition; 0 for a block without experts.

    Counted are the inputs of the experts' linears, which stay alive while Grams are collected, and the more of two: the
    float32 outputs [tokens · k, h] of the k experts of each token in two orders; what a gate makes of the outputs
    [tokens · k, 2i] that it takes, with them. Arguments as of `activation_bytes`.
    """
    inputs = sum(block.token_fraction(name) * d for name, d in block.expert_grams.items())
    chosen = max((k for k, _ in block.routing.values()), default=0)
    outputs = sum(block.token_fraction(name) * block.linears[name][0] for name in block.routing)
    gated = value_bytes * _GATE_TENSORS * max(0, outputs - chosen * hidden_size)  # without those of the last linear
    return round(tokens * (value_bytes * inputs + max(2 * 4 * chosen * hidden_size, gated)))


def kept_input_bytes(block: BlockShape, tokens: int, value_bytes: int) -> int:
    """Return the bytes of the inputs of linears before the experts, which stay alive while Grams are collected.

    0 without experts: the wide tensors of `activation_bytes` are then more. Arguments as of `activation_bytes`.
    """
    kept = sum(d for name, d in block.grams.items() if name not in block.routing)
    return tokens * value_bytes * kept if block.routing else 0


def score_bytes(windows: int, seq_len: int, heads: int) -> int:
    """Return the bytes of attention scores where attention is not fused (`heads` > 0); 0 where it is.

    Counted are the scores [b, heads, T, T] and their softmax in float32, and the masks [b, 1, T, T] of two kinds of
    call (whole and last micro-batch).

    Args:
        windows: Windows b of one micro-batch.
        seq_len: Tokens T of a window.
        heads: Attention heads of the block, 0 where attention is fused.
    """
    return windows * seq_len**2 * 4 * (2 * heads + 2) if heads else 0
