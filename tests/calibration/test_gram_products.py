"""Products for Gram matrices: what tensor cores would compute, in every form, equals the product in float64."""

from collections.abc import Callable

import pytest
import torch

from streamslr.calibration import gram_products
from streamslr.calibration.gram_products import (
    Product,
    add_upper_panels,
    find_product,
    mirror_upper_panels,
    product_bytes,
)


def widened(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return what CUDA's product with a wider result gives: exact products, sums in float32."""
    return a.to(out_dtype) @ b.to(out_dtype)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give torch the products with a wider result, which only CUDA has."""

    def addmm(
        c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype, out: torch.Tensor
    ) -> torch.Tensor:
        return out.copy_(c + widened(a, b, out_dtype))

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out_dtype: widened(a, b, out_dtype))


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    "product", [gram_products._add_in_place, gram_products._multiply_then_add, gram_products._add_in_tf32]
)
@pytest.mark.parametrize(("panel", "scratch"), [(2048, 2**26), (16, 2**26), (16, 4 * 24 * 5)])
def test_panels_add_up_to_the_whole_symmetric_product(
    product: Product, panel: int, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram_products, "PANEL", panel)
    monkeypatch.setattr(gram_products, "_SCRATCH", scratch)
    batches = torch.randn(2, 50, 40, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    gram = torch.zeros(40, 40)
    for rows in batches:
        add_upper_panels(gram, rows, product)
    mirror_upper_panels(gram)
    exact = sum(rows.double().T @ rows.double() for rows in batches)
    assert torch.equal(gram, gram.T)
    assert (gram - exact).abs().max() < 1e-6 * exact.abs().max()


def test_a_cpu_has_no_product_on_tensor_cores() -> None:
    assert find_product(torch.device("cpu"), torch.bfloat16) is None
    assert find_product(torch.device("cuda"), torch.float32) is None


def missing(*_: object, **__: object) -> None:
    raise NotImplementedError("Could not run 'aten::addmm.dtype_out'")


def no_such_argument(*_: object, **__: object) -> None:
    raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")


@pytest.mark.parametrize("fault", [missing, no_such_argument])
def test_a_build_without_wider_products_takes_tf32(fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, device: ones(*shape, dtype=dtype))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: ones(*shape))
    monkeypatch.setattr(torch, "addmm", fault)
    monkeypatch.setattr(torch, "mm", fault)
    assert find_product(torch.device("cuda"), torch.bfloat16) is gram_products._add_in_tf32


def test_tf32_is_allowed_for_the_product_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, seen = torch.backends.cuda.matmul, []
    addmm_ = torch.Tensor.addmm_

    def watched(part: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(matmul.allow_tf32)
        return addmm_(part, a, b)

    before = matmul.allow_tf32
    monkeypatch.setattr(torch.Tensor, "addmm_", watched)
    rows = torch.ones(4, 4, dtype=torch.bfloat16)
    gram_products._add_in_tf32(torch.zeros(4, 4), rows, rows)
    assert seen == [True]
    assert matmul.allow_tf32 == before


def test_a_product_on_a_gpu_takes_no_copy_of_its_inputs() -> None:
    assert product_bytes(28672, 16384, value_bytes=2, gpu=True) == 2**26
    assert product_bytes(28672, 16384, value_bytes=2, gpu=False) == 4 * 28672 * 16384
    assert product_bytes(28672, 16384, value_bytes=4, gpu=True) == 0
