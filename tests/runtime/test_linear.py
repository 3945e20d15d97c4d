"""A packed linear computes what the dense one holding S + U·V does, and so do its gradients."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamslr.io.packing import merge, pack, unpack_codes
from streamslr.runtime import linear as module
from streamslr.runtime.linear import SparseLowRankLinear
from streamslr.spec.pattern import parse_pattern
from streamslr.spec.values import spread
from tests.support.packed_linears import form_of, grid_linear

PATTERNS = ["2:4", "1:4", "4:8", "3:16", "50%", "90%", "80%/row"]


def packed_linear(
    pattern: str = "2:4", rank: int = 4, dtype: torch.dtype = torch.float32, o: int = 48, d: int = 80, bias: bool = True
) -> SparseLowRankLinear:
    torch.manual_seed(0)
    parsed = parse_pattern(pattern)
    W = torch.randn(o, d)
    parts = pack(W * parsed.project(W), parsed, dtype)
    linear = SparseLowRankLinear(d, o, parsed, rank, bias, nonzeros=len(parts["values"]), dtype=dtype)
    if rank:
        parts |= {"U": torch.randn(o, rank).to(dtype), "V": torch.randn(rank, d).to(dtype)}
    if bias:
        parts["bias"] = torch.randn(o).to(dtype)
    linear.load_state_dict(parts)  # strictly: the state dict is the format
    return linear


def dense_linear(linear: SparseLowRankLinear) -> nn.Linear:
    """Return the merged linear in float64, so that its own rounding does not count."""
    shape = linear.out_features, linear.in_features
    dense = nn.Linear(shape[1], shape[0], linear.bias is not None, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(merge(linear.packed(), linear.pattern, shape, torch.float64))
        if linear.bias is not None:
            dense.bias.copy_(linear.bias)
    return dense


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Assert equality within a few roundings of the largest value in `dtype`."""
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < 4 * torch.finfo(dtype).eps, f"off by {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_forward_is_that_of_the_dense_sum(pattern: str, rank: int, dtype: torch.dtype) -> None:
    linear = packed_linear(pattern, rank, dtype)
    x = torch.randn(2, 5, 80).to(dtype)
    y = linear(x)
    assert (y.shape, y.dtype) == ((2, 5, 48), dtype)
    assert_close(y, dense_linear(linear)(x.double()), dtype)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tiles_of_any_height_give_the_same(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = packed_linear(pattern)
    x = torch.randn(3, 80, requires_grad=True)
    expected = torch.autograd.grad(linear(x).square().sum(), x)[0]
    monkeypatch.setattr(module, "_CPU_TILE", 7 * 80)
    assert torch.allclose(torch.autograd.grad(linear(x).square().sum(), x)[0], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("o", "d"), [(1, 4), (3, 12), (16, 8), (5, 36)])
def test_small_and_odd_shapes(o: int, d: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        linear = packed_linear("2:4", 1, dtype, o, d)
        x = torch.randn(3, d).to(dtype)
        assert_close(linear(x), dense_linear(linear)(x.double()), dtype)


def test_no_tokens_give_no_outputs() -> None:
    assert packed_linear()(torch.empty(0, 80)).shape == (0, 48)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_gradients_reach_x_u_v_and_bias_but_not_s(pattern: str) -> None:
    linear = packed_linear(pattern)
    assert linear.U is not None
    assert linear.V is not None
    x = torch.randn(6, 80, requires_grad=True)
    linear(x).square().sum().backward()
    dense = dense_linear(linear)
    U, V = (t.detach().double().requires_grad_() for t in (linear.U, linear.V))
    S = dense.weight.detach() - U.detach() @ V.detach()
    x64 = x.detach().double().requires_grad_()
    bias = dense.bias.detach().requires_grad_()
    nn.functional.linear(x64, S + U @ V, bias).square().sum().backward()
    for got, expected in ((x, x64), (linear.U, U), (linear.V, V), (linear.bias, bias)):
        assert got is not None
        assert got.grad is not None
        assert expected.grad is not None
        assert_close(got.grad, expected.grad, torch.float32)
    assert [name for name, _ in linear.named_parameters()] == ["U", "V", "bias"]


@pytest.mark.parametrize("values", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("pattern", ["2:4", "50%", "dense"])
def test_gradients_reach_scales(pattern: str, values: str) -> None:
    parsed, form, (o, d) = parse_pattern(pattern), form_of(values, 24), (48, 80)  # the last group has 8 columns
    parts = grid_linear(parsed, form, o, d, 0, torch.float32)
    nonzeros = int(parts["row_offsets"][-1]) if "row_offsets" in parts else None
    linear = SparseLowRankLinear(d, o, parsed, 0, nonzeros=nonzeros, values=form)
    linear.load_state_dict(parts)
    linear.make_trainable()
    x, dy = torch.randn(5, d), torch.randn(5, o)
    linear(x).backward(dy)
    scales = parts["scales"].double().requires_grad_()
    S = unpack_codes(parts, parsed, (o, d)).double() * spread(scales, d)
    (x.double() @ S.t()).backward(dy.double())
    assert linear.scales is not None
    assert linear.scales.grad is not None
    assert scales.grad is not None
    assert_close(linear.scales.grad, scales.grad, torch.float32)


def test_backward_keeps_no_dense_s() -> None:
    linear = packed_linear(o=64, d=80, rank=0, bias=False)
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        linear(torch.randn(2, 80, requires_grad=True))
    assert saved
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in linear.buffers()}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_compiles(pattern: str) -> None:
    linear = packed_linear(pattern)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 80, requires_grad=True)
    y = compiled(x)
    assert torch.allclose(y, linear(x), rtol=1e-5, atol=1e-4)
    grad = torch.autograd.grad(y.sum(), x)[0]
    assert torch.allclose(grad, torch.autograd.grad(linear(x).sum(), x)[0], rtol=1e-5, atol=1e-4)


def test_keep_dense_changes_nothing_but_memory() -> None:
    linear = packed_linear()
    x = torch.randn(3, 80)
    before, saved = linear(x), set(linear.state_dict())
    assert linear.kernel.startswith("unpacked in tiles")
    linear.keep_dense()
    assert torch.allclose(linear(x), before, rtol=1e-5, atol=1e-4)
    assert linear.kernel.startswith("dense")
    assert set(linear.state_dict()) == saved


def test_what_keep_dense_made_in_inference_mode_can_be_trained_with() -> None:
    linear = packed_linear()
    with torch.inference_mode():
        linear.keep_dense()
    x = torch.randn(3, 80, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None


def test_new_weights_replace_what_keep_dense_kept() -> None:
    linear = packed_linear()
    linear.keep_dense()
    linear.load_state_dict(linear.state_dict() | {"values": 2 * linear.values})
    x = torch.randn(3, 80)
    assert_close(linear(x), dense_linear(linear)(x.double()), torch.float32)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda linear: pickled(linear)])
def test_copies_compute_the_same(copied: Any) -> None:
    linear = packed_linear()
    x = torch.randn(3, 80)
    assert torch.equal(copied(linear)(x), linear(x))


def pickled(linear: SparseLowRankLinear) -> SparseLowRankLinear:
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    loaded: SparseLowRankLinear = torch.load(file, weights_only=False)
    return loaded


def test_other_dtypes_by_to_and_autocast() -> None:
    linear = packed_linear()
    x = torch.randn(3, 80)
    expected = dense_linear(linear)(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(linear(x), expected, torch.bfloat16)
    half = copy.deepcopy(linear).to(torch.bfloat16)
    assert half.meta.dtype == torch.uint8
    assert_close(half(x.bfloat16()), expected, torch.bfloat16)


@pytest.mark.parametrize(("pattern", "ratio"), [("2:4", 0.5 + 1 / 24), ("1:4", 0.25 + 1 / 32), ("50%", 0.5 + 1 / 16)])
def test_bytes_in_memory_are_the_packed_ones(pattern: str, ratio: float) -> None:
    o, d, rank = 256, 384, 16
    linear = packed_linear(pattern, rank, torch.bfloat16, o, d, bias=False)
    linear(torch.randn(2, d).bfloat16())
    offsets = 0 if pattern != "50%" else 8 * (o + 1)
    held = sum(t.nbytes for t in (*linear.parameters(), *linear.buffers()))
    assert held == ratio * 2 * o * d + 2 * rank * (o + d) + offsets
