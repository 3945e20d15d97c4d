"""Layers of vLLM on each tensor parallel rank, without a server: their outputs are those of the whole linears."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamslr.errors import InputError
from streamslr.io.packing import merge
from streamslr.spec.pattern import parse_pattern
from tests.support.packed_linears import low_rank_linear

pytest.importorskip("vllm", reason="vLLM is not installed here: tools/test_serving")

HEADS, KV_HEADS, HEAD, WIDTH = 4, 2, 16, 96
ROWS = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]


class Stored:
    """A stored linear: what vLLM's loader finds of it, and its dense weight."""

    def __init__(self, path: str, pattern: str | None, o: int, d: int, rank: int) -> None:
        from streamslr.runtime.vllm import PackedHeader

        parsed = parse_pattern(pattern or "2:4")
        self.parts = low_rank_linear(parsed, o, d, rank, torch.float32, seed=o + rank)
        self.weight = merge(self.parts, parsed, (o, d), torch.float64)
        self.header = PackedHeader(path, frozenset(self.parts), parsed, (o, d)) if pattern else None
        if not pattern:
            self.parts = {"weight": self.weight.float()}


def loaded(layer: nn.Module, stored: dict[Any, Stored], inputs: int, outputs: list[int], whole_input: int) -> Any:
    """Make the layer's weights, hand it every part as vLLM does, and return its method."""
    from streamslr.runtime.vllm import PackedLinearMethod, StreamslrQuantization

    method = PackedLinearMethod(StreamslrQuantization(), "layer", [one.header for one in stored.values()])
    method.create_weights(layer, inputs, outputs, whole_input, sum(outputs), torch.float32)
    for shard, one in stored.items():
        for part, tensor in one.parts.items():
            parameter = getattr(layer, part)
            parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    method.process_weights_after_loading(layer)
    return method


def layer_of(**attributes: Any) -> nn.Module:
    layer = nn.Module()
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def attention(rank: int, ranks: int) -> tuple[nn.Module, list[int]]:
    """Return a fused layer for q, k and v on one rank, and the rows of each there."""
    heads = {"total_num_heads": HEADS, "total_num_kv_heads": KV_HEADS, "head_size": HEAD}
    kv = max(1, KV_HEADS // ranks)
    layer = layer_of(tp_rank=rank, num_kv_head_replicas=max(1, ranks // KV_HEADS), output_size=sum(ROWS), **heads)
    return layer, [HEADS // ranks * HEAD, kv * HEAD, kv * HEAD]


def expected_heads(weights: list[Tensor], rank: int, ranks: int, x: Tensor) -> Tensor:
    """Return q, k and v of one rank from the dense weights of all, computed head by head."""
    q, k, v = (weight.view(-1, HEAD, WIDTH) for weight in weights)
    of_q = range(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
    of_kv = sorted({head * KV_HEADS // HEADS for head in of_q})
    rows = [q[list(of_q)], k[of_kv], v[of_kv]]
    return torch.cat([x @ part.reshape(-1, WIDTH).t() for part in rows], 1)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2), (0, 4), (3, 4)])
@pytest.mark.parametrize("patterns", [["2:4", "2:4", "2:4"], ["50%", "4:8", None], ["60%/row", "50%", "50%"]])
def test_a_rank_holds_its_heads_of_q_k_and_v(patterns: list[str | None], rank: int, ranks: int) -> None:
    stored = {
        shard: Stored(shard, pattern, rows, WIDTH, 3)
        for shard, pattern, rows in zip("qkv", patterns, ROWS, strict=True)
    }
    layer, outputs = attention(rank, ranks)
    method = loaded(layer, stored, WIDTH, outputs, WIDTH)
    x = torch.randn(2, 3, WIDTH)
    y = method.apply(layer, x)
    assert y.shape == (2, 3, sum(outputs))
    weights = [one.weight for one in stored.values()]
    assert_close(y.view(6, -1), expected_heads(weights, rank, ranks, x.double().view(6, -1)))


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_a_rank_holds_its_heads_of_one_stored_linear(pattern: str, rank: int, ranks: int) -> None:
    one = Stored("qkv", pattern, sum(ROWS), WIDTH, 3)
    layer, outputs = attention(rank, ranks)
    method = loaded(layer, {None: one}, WIDTH, outputs, WIDTH)
    x = torch.randn(5, WIDTH)
    weights = list(one.weight.split(ROWS))
    assert_close(method.apply(layer, x), expected_heads(weights, rank, ranks, x.double()))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "50%", "60%/row"])
def test_row_parallel_outputs_add_up(pattern: str, ranks: int) -> None:
    one, x, bias = Stored("down", pattern, 40, WIDTH, 3), torch.randn(5, WIDTH), torch.randn(40)
    each = WIDTH // ranks
    total = torch.zeros(5, 40)
    for rank in range(ranks):
        layer = layer_of(tp_rank=rank, output_size=40)
        method = loaded(layer, {None: one}, each, [40], WIDTH)
        total += method.apply(layer, x[:, rank * each : (rank + 1) * each], bias if rank == 0 else None)
    assert_close(total, x.double() @ one.weight.t() + bias.double())


def test_a_replicated_layer_is_whole_on_every_rank() -> None:
    one, x = Stored("router", "2:4", 40, WIDTH, 0), torch.randn(5, WIDTH)
    layer = layer_of(tp_rank=1, output_size=40)
    assert_close(loaded(layer, {None: one}, WIDTH, [40], WIDTH).apply(layer, x), x.double() @ one.weight.t())


def test_a_part_that_never_came_is_named() -> None:
    one = Stored("model.down", "2:4", 40, WIDTH, 3)
    del one.parts["V"]
    with pytest.raises(InputError, match=r"V of model\.down was not loaded"):
        loaded(layer_of(tp_rank=0, output_size=40), {None: one}, WIDTH, [40], WIDTH)


def test_a_linear_of_another_shape_is_refused() -> None:
    one = Stored("model.down", "2:4", 40, WIDTH, 3)
    with pytest.raises(InputError, match=r"model\.down is 40x96, vLLM's layer asks for 44x96"):
        loaded(layer_of(tp_rank=0, output_size=44), {None: one}, WIDTH, [44], WIDTH)


def test_rows_in_another_order_are_refused_where_their_values_cannot_follow() -> None:
    one = Stored("qkv", "50%", 40, WIDTH, 3)
    one.parts["meta"] = one.parts["meta"].flip(0)  # as vLLM rearranges Falcon's
    with pytest.raises(InputError, match=r"qkv: row_offsets .* rearranges its rows, which 50% cannot follow"):
        loaded(layer_of(tp_rank=0, output_size=40), {None: one}, WIDTH, [40], WIDTH)
