"""Memory and floating point operations that matching takes, from shapes."""

import math

from streamslr.linear_masters import TILE
from streamslr.masters import BUNDLED, EXCHANGED_AT_ONCE
from streamslr.model.pass_costs import routed_bytes
from streamslr.model.shape import BlockShape
from streamslr.spec.allocation import Allocation, LinearSpec
from streamslr.spec.values import group_count

_TILE_COPIES = 4
"""Tiles of a dense weight that a refinement is planned to hold at once: two are made (a gradient, a product), and the
products take temporaries of their own. With 4 the plan is 1.02 to 1.04 of the measured peak (in
tools/results/run-llama-8m.json)."""
_GRID_TILE_COPIES = 5
"""Tiles of float32 beside these where values lie on a grid: of codes, of their scales, of the gradients of scales, and
of positions in int64."""

_NORM_COPIES, _LOSS_TENSORS = 2, 4
"""Float32 tensors [b, T, h] that a pass in 16 bits holds in addition when its backward pass begins: inputs of norms,
which compute in float32; the difference from the targets, and three tensors of its gradient."""

_SAVED_HIDDEN = 6
"""Tensors [b, T, h] that a pass saves for its gradients beside the inputs and outputs of linears. Counted in Llama's
block in float32 on a CPU: inputs and outputs of two norms, two residuals."""


def refine_bytes(
    block: BlockShape,
    allocation: Allocation,
    tokens: int,
    hidden_size: int,
    value_bytes: int,
    stream_bytes: int,
    refined: int,
    world: int = 1,
) -> int:
    """Return the bytes that `CompressedBlock.refine` takes beside the live block and the weights before.

    Counted are, in float32, master, gradient and two moments of this rank's share of the numbers that are trained
    (`count_masters`); with ranks, U and V for the products, and the buffers through which all numbers of one bundle of
    linears go; the int32 position of each kept value; what a micro-batch saves for its gradients; tiles of a dense
    weight; and the weights after. Ranks make gradients once a micro-batch has passed, so that they do not need the last
    three at once. Behind experts a backward pass holds the float32 gradient [tokens · k, h] of their outputs in
    addition. In one process the plan of phase match is 1.02 to 1.04 times its measured peak
    (tools/results/run-llama-8m.json, tools/results/block-small-cpu.json).

    Args:
        block: Shapes of the block.
        allocation: Pattern and rank of each of its linears.
        tokens: Tokens of one micro-batch.
        hidden_size: Width h of the residual stream.
        value_bytes: Bytes of one number in the compute dtype.
        stream_bytes: Bytes of one number of the residual stream, which two norms save.
        refined: Bytes of the weights after; 0 where they go to the host.
        world: Number of ranks that match the block together.
    """
    trained = count_masters(block, allocation)
    inputs = sum(block.token_fraction(name) * d for name, d in block.grams.items())
    outputs = sum(block.token_fraction(name) * o for name, (o, _) in block.linears.items())
    saved = round(inputs + outputs) + _SAVED_HIDDEN * hidden_size  # numbers a token
    if value_bytes < 4:
        saved += max(o for o, _ in block.linears.values())  # an activation beside what goes into it
        saved += (_NORM_COPIES + _LOSS_TENSORS) * hidden_size * 4 // value_bytes
    on_grid = [name for name in block.linears if allocation[name].grid is not None]
    copies = _TILE_COPIES + (_GRID_TILE_COPIES if on_grid else 0)
    tiles = copies * 4 * min(max(o * d for o, d in block.linears.values()), TILE)
    passing = tokens * saved * value_bytes + tokens * 2 * hidden_size * (stream_bytes - value_bytes)
    passing += routed_bytes(block, tokens, hidden_size, value_bytes)
    passing += 4 * tokens * max((k for k, _ in block.routing.values()), default=0) * hidden_size
    masters = 16 * -(-trained // world) + 4 * _count_kept(block, allocation)
    for name in on_grid:  # codes as products take them, and the scales that groups began with
        o, d = block.linears[name]
        masters += round(allocation[name].pattern.density * o * d) + 4 * _count_scales(allocation[name], o, d)
    if world == 1:
        return masters + refined + passing + tiles
    low_rank = {name: min(allocation[name].rank, *shape) * sum(shape) for name, shape in block.linears.items()}
    numbers = {
        name: round(allocation[name].pattern.density * o * d) + low_rank[name] + _count_scales(allocation[name], o, d)
        for name, (o, d) in block.linears.items()
    }
    for_products = value_bytes * sum(low_rank.values())
    buffers = EXCHANGED_AT_ONCE * 4 * max(*numbers.values(), min(trained, BUNDLED))
    making = tokens * round(inputs + outputs) * value_bytes + tiles  # inputs, and gradients of outputs
    merging = max(value_bytes * o * d + 8 * low_rank[name] for name, (o, d) in block.linears.items()) + tiles
    return masters + for_products + buffers + max(passing, making, refined + merging)


def count_masters(block: BlockShape, allocation: Allocation) -> int:
    """Return how many numbers are trained: kept values, U, V, scales, every parameter that is no linear's weight."""
    low_rank = sum(min(allocation[name].rank, o, d) * (o + d) for name, (o, d) in block.linears.items())
    scales = sum(_count_scales(allocation[name], o, d) for name, (o, d) in block.linears.items())
    vectors = block.parameters - sum(o * d for o, d in block.linears.values())
    return _count_kept(block, allocation) + low_rank + scales + vectors


def _count_scales(spec: LinearSpec, o: int, d: int) -> int:
    return 0 if spec.grid is None else o * group_count(d, spec.grid.group)


def _count_kept(block: BlockShape, allocation: Allocation) -> int:
    return sum(round(allocation[name].pattern.density * o * d) for name, (o, d) in block.linears.items())


def refine_steps(windows: int, batch: int, epochs: int) -> int:
    """Return the steps of `epochs` epochs, the first of which has none, given the windows that are trained on."""
    return (epochs - 1) * -(-windows // batch)


def refine_micro_batches(windows: int, batch: int, epochs: int, micro_batch: int, world: int) -> int:
    """Return the micro-batches of the steps of `epochs` epochs, on the rank that has the most windows of each step."""
    whole, rest = divmod(windows, batch)
    of_whole, of_rest = (math.ceil(math.ceil(count / world) / micro_batch) for count in (batch, rest))
    return (epochs - 1) * (whole * of_whole + of_rest)


def refine_flops(forward: float, windows: int, batch: int, epochs: int, held_out: int, world: int) -> float:
    """Return the FLOPs of `epochs` epochs on the busiest rank, given those of one forward pass of one window.

    Backward costs two; the first epoch has none. In a step each rank waits for the one with the most windows of it.
    Held-out windows pass in each epoch, and once more at the end.
    """
    own = refine_micro_batches(windows, batch, epochs, 1, world)
    return forward * (3 * own + math.ceil(windows / world) + (epochs + 1) * math.ceil(held_out / world))
