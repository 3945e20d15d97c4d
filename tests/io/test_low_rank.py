"""U and V as codes: the error of rounding, pinned bytes, merging, and damage that is named."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamslr.errors import InputError
from streamslr.io.low_rank import pack_low_rank, unpack_low_rank
from streamslr.io.packed_check import check_packed
from streamslr.io.packed_layout import packed_bytes
from streamslr.io.packing import merge, unpack
from streamslr.spec.pattern import NofM
from tests.support.packed_linears import low_rank_linear


def coded_linear(o: int, d: int, r: int, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the parts of a random 2:4 linear with U and V as codes, and U and V before; components differ in size."""
    parts = low_rank_linear(NofM(2, 4), o, d, r, torch.float32, seed)
    sizes = torch.logspace(-3, 1, r)
    U, V = parts.pop("U") * sizes, parts.pop("V") * sizes[:, None]
    parts = {part: t.to(dtype) if t.is_floating_point() else t for part, t in parts.items()}
    return parts | pack_low_rank(U, V, dtype, torch.int8), U, V


@settings(max_examples=60, deadline=None)
@given(
    o=st.integers(1, 20),
    groups=st.integers(1, 12),
    r=st.integers(1, 6),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**32),
)
def test_codes_are_within_half_a_step_of_the_numbers(
    o: int, groups: int, r: int, dtype: torch.dtype, seed: int
) -> None:
    d = 4 * groups
    parts, U, V = coded_linear(o, d, r, dtype, seed)
    assert check_packed(parts, NofM(2, 4), (o, d)) == []
    assert sum(part.nbytes for part in parts.values()) == packed_bytes(
        NofM(2, 4), (o, d), r, dtype.itemsize, low_rank=torch.int8
    )
    product = (parts["U"].double() * parts["low_rank_scales"].double()) @ parts["V"].double()
    low_rank = unpack_low_rank(parts)
    assert low_rank is not None
    sizes = low_rank[0].double().abs() @ low_rank[1].double().abs()  # each number of U is rounded to float32
    assert ((low_rank[0].double() @ low_rank[1].double() - product).abs() <= 1.001 * 2**-24 * sizes).all()
    # each factor is off by half a step, V by a little more where the rounded scale is too small for its largest number
    of_U, of_V = U.abs().amax(0).double() / 127, V.abs().amax(1).double() / 127
    off_U, off_V = of_U / 2 * 1.001, of_V * (0.5 + 127 * torch.finfo(dtype).eps) * 1.001
    bound = off_U @ V.abs().double() + U.abs().double() @ off_V[:, None] + (off_U * off_V).sum()
    assert ((product - U.double() @ V.double()).abs() <= bound + 1e-9).all()


def test_the_bytes_are_pinned() -> None:
    U, V = torch.tensor([[127.0, 0.5], [-63.4, 0.25]]), torch.tensor([[1.0, -2.0, 0.0], [127.0, 1.0, -127.0]])
    parts = pack_low_rank(U, V, torch.float32, torch.int8)
    assert parts["U"].tolist() == [[127, 127], [-63, 64]]
    assert parts["V"].tolist() == [[64, -127, 0], [127, 1, -127]]
    assert [parts[part].dtype for part in ("U", "V", "low_rank_scales")] == [torch.int8, torch.int8, torch.float32]
    torch.testing.assert_close(parts["low_rank_scales"], torch.tensor([2 / 127, 0.5 / 127]))


def test_scales_in_float16_are_refused() -> None:
    with pytest.raises(InputError, match="cannot go with float16"):
        pack_low_rank(torch.full((3, 1), 1e-3), torch.full((1, 4), 1e-3), torch.float16, torch.int8)


def test_components_without_numbers_stay_zero() -> None:
    parts = pack_low_rank(torch.zeros(3, 2), torch.zeros(2, 4), torch.bfloat16, torch.int8)
    assert not parts["U"].any()
    assert not parts["V"].any()
    assert parts["low_rank_scales"].isfinite().all()


def test_numbers_in_bf16_are_the_cast_ones() -> None:
    U, V = torch.randn(4, 2), torch.randn(2, 8)
    parts = pack_low_rank(U, V, torch.float32, torch.bfloat16)
    assert torch.equal(parts["U"], U.bfloat16())
    assert torch.equal(parts["V"], V.bfloat16())


def test_merging_is_exact_in_float64() -> None:
    parts, _, _ = coded_linear(8, 48, 3, torch.bfloat16)
    product = (parts["U"].double() * parts["low_rank_scales"].double()) @ parts["V"].double()
    expected = unpack(parts, NofM(2, 4), (8, 48)).double() + product
    assert torch.equal(merge(parts, NofM(2, 4), (8, 48), torch.float64), expected)


@pytest.mark.parametrize(
    ("part", "tensor", "said"),
    [
        ("low_rank_scales", torch.ones(3), r"low_rank_scales has shape \[3\], V has \[2, 48\]"),
        ("low_rank_scales", torch.ones(2, dtype=torch.int8), "low_rank_scales is torch.int8, not a floating-point"),
        ("low_rank_scales", torch.full((2,), torch.inf), "low_rank_scales.* is inf"),
        ("low_rank_scales", None, "U is torch.int8, not a floating-point"),
        ("U", torch.full((8, 2), -128, dtype=torch.int8), "16 codes of U are beyond 127"),
        ("V", torch.zeros(2, 48), "V is torch.float32, with low_rank_scales it must be torch.int8"),
        ("V", None, "U is there without V"),
    ],
)
def test_damage_is_named(part: str, tensor: Tensor | None, said: str) -> None:
    parts, _, _ = coded_linear(8, 48, 2, torch.float32)
    del parts[part]
    damaged = parts if tensor is None else parts | {part: tensor}
    problems = "; ".join(check_packed(damaged, NofM(2, 4), (8, 48)))
    assert re.search(said, problems), problems
