"""Linears cut for tensor parallel ranks, and fused for an engine, compute what the whole ones do."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.io.low_rank import pack_low_rank
from streamslr.io.packing import merge
from streamslr.runtime.partition import StoredLinear, take_columns, take_rows
from streamslr.runtime.stacked import StackedLinear
from streamslr.spec.pattern import parse_pattern
from tests.support.packed_linears import form_of, grid_linear, low_rank_linear

CPU = torch.device("cpu")
PATTERNS = ["2:4", "1:4", "4:8", "8:16", "60%/row", "50%", None]


def on_grid(pattern: str, values: str, o: int = 48, d: int = 192, rank: int = 3, seed: int = 0) -> StoredLinear:
    parsed = parse_pattern(pattern)
    return StoredLinear(grid_linear(parsed, form_of(values), o, d, rank, torch.float32, seed), parsed, (o, d))


def with_codes(linear: StoredLinear, dtype: torch.dtype = torch.float32) -> StoredLinear:
    """Return the linear with U and V as int8 codes, and their scales in a dtype."""
    codes = pack_low_rank(linear.parts["U"], linear.parts["V"], dtype, torch.int8)
    return StoredLinear({**linear.parts, **codes}, linear.pattern, linear.shape)


def stored(pattern: str | None, o: int = 48, d: int = 192, rank: int = 3, seed: int = 0) -> StoredLinear:
    parsed = parse_pattern(pattern or "2:4")
    parts = low_rank_linear(parsed, o, d, rank, torch.float32, seed)
    if rank == 0:
        parts = {name: tensor for name, tensor in parts.items() if name not in ("U", "V")}
    linear = StoredLinear(parts, parsed, (o, d))
    return linear if pattern else StoredLinear({"weight": dense(linear).float()}, None, (o, d))


def dense(linear: StoredLinear) -> Tensor:
    """Return S + U·V in float64 [o, d]."""
    if linear.pattern is None:
        return linear.parts["weight"].double()
    return merge(linear.parts, linear.pattern, linear.shape, torch.float64)


def outputs(linears: Sequence[StoredLinear], x: Tensor) -> Tensor:
    y: Tensor = StackedLinear(linears, torch.float32, CPU)(x.float())
    return y.double()


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_of_all_ranks_side_by_side_are_the_whole(pattern: str | None, rank: int, ranks: int) -> None:
    linear, x = stored(pattern, rank=rank), torch.randn(5, 192, dtype=torch.float64)
    each = 48 // ranks
    parts = [outputs([take_rows(linear, [slice(i * each, (i + 1) * each)])], x) for i in range(ranks)]
    assert_close(torch.cat(parts, 1), x @ dense(linear).t())


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_columns_of_all_ranks_add_up_to_the_whole(pattern: str | None, rank: int, ranks: int) -> None:
    linear, x = stored(pattern, rank=rank), torch.randn(5, 192, dtype=torch.float64)
    each = 192 // ranks
    cuts = [slice(i * each, (i + 1) * each) for i in range(ranks)]
    assert_close(
        sum((outputs([take_columns(linear, cut, "down")], x[:, cut]) for cut in cuts), torch.zeros(5, 48)),
        x @ dense(linear).t(),
    )


@pytest.mark.parametrize("values", ["int4/32", "int8/192", "fp8/20"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%", "60%/row", "dense"])
def test_values_on_a_grid_are_cut_and_fused_as_others(pattern: str, values: str) -> None:
    linear, other, x = on_grid(pattern, values), on_grid(pattern, values, o=24, seed=1), torch.randn(5, 192).double()
    expected = x @ dense(linear).t()
    rows = [outputs([take_rows(linear, [slice(i, i + 16)])], x) for i in (0, 16, 32)]
    assert_close(torch.cat(rows, 1), expected)
    cuts = [slice(i, i + 48) for i in range(0, 192, 48)]
    columns = [outputs([take_columns(linear, cut, "down")], x[:, cut]) for cut in cuts]
    assert_close(torch.stack(columns).sum(0), expected)
    fused = outputs([linear, other, stored("2:4", seed=2)], x)
    assert_close(fused, torch.cat([expected, x @ dense(other).t(), x @ dense(stored("2:4", seed=2)).t()], 1))
    assert_close(outputs([linear.unpacked()], x), expected)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_codes_of_u_and_v_are_cut_as_numbers(pattern: str) -> None:
    x = torch.randn(5, 192).double()
    for linear in (with_codes(stored(pattern)), with_codes(on_grid(pattern, "int4/32"))):
        expected = x @ dense(linear).t()
        rows = [take_rows(linear, [slice(i, i + 16)]) for i in (0, 16, 32)]
        assert {part.parts["U"].dtype for part in rows} == {torch.int8}
        assert_close(torch.cat([outputs([part], x) for part in rows], 1), expected)
        cuts = [slice(i, i + 48) for i in range(0, 192, 48)]
        columns = [outputs([take_columns(linear, cut, "down")], x[:, cut]) for cut in cuts]
        assert_close(torch.stack(columns).sum(0), expected)
        assert_close(outputs([linear.unpacked()], x), expected)


def test_codes_of_u_and_v_are_fused_with_codes_numbers_and_none() -> None:
    one, other = with_codes(stored("2:4")), with_codes(stored("2:4", o=24, rank=5, seed=1))
    numbers, none = stored("2:4", o=16, seed=2), stored("2:4", o=16, rank=0, seed=3)
    x = torch.randn(5, 192).double()
    for linears in ([one, other], [one, none, other], [one, numbers, none]):
        assert_close(outputs(linears, x), torch.cat([x @ dense(linear).t() for linear in linears], 1))
    assert StackedLinear([one, none, other], torch.float32, CPU).U[0].dtype == torch.int8


def test_served_in_float16_codes_of_u_and_v_become_numbers() -> None:
    plain = stored("2:4")
    small = {part: plain.parts[part] * 0.02 for part in ("U", "V")}
    linear = with_codes(StoredLinear({**plain.parts, **small}, plain.pattern, plain.shape), torch.bfloat16)
    stacked, x = StackedLinear([linear], torch.float16, CPU), 100 * torch.randn(5, 192).double()
    low_rank = (stacked.U[0].double() @ stacked.V.double()) if stacked.V is not None else torch.zeros(())
    expected = (linear.parts["U"].double() * linear.parts["low_rank_scales"].double()) @ linear.parts["V"].double()
    torch.testing.assert_close(x @ low_rank.t(), x @ expected.t(), rtol=2e-3, atol=2e-2)


def test_linears_of_two_dtypes_are_fused_in_the_wider() -> None:
    one, x = stored("2:4"), torch.randn(5, 192).double()
    parts = {name: part.bfloat16() if part.is_floating_point() else part for name, part in one.parts.items()}
    other = StoredLinear(parts, one.pattern, one.shape)
    expected = torch.cat([x @ dense(other).t(), x @ dense(one).t()], 1)
    assert_close(outputs([other, one], x), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_several_slices_of_rows_come_one_below_the_other(pattern: str | None) -> None:
    linear, x = stored(pattern), torch.randn(5, 192, dtype=torch.float64)
    taken = take_rows(linear, [slice(8, 16), slice(40, 44), slice(0, 4)])
    expected = x @ dense(linear).t()
    assert_close(outputs([taken], x), torch.cat([expected[:, 8:16], expected[:, 40:44], expected[:, :4]], 1))


def test_a_cut_through_a_group_is_refused() -> None:
    with pytest.raises(InputError, match=r"down: columns 96 to 191 of its 192 cut a group of 64 .* 16:64"):
        take_columns(stored("16:64"), slice(96, 192), "down")


@pytest.mark.parametrize("as_dense", [False, True], ids=["packed", "dense"])
@pytest.mark.parametrize(
    ("patterns", "ranks"),
    [
        (["2:4", "2:4", "2:4"], [4, 4, 4]),
        (["50%", "50%", "2:4"], [3, 0, 5]),
        (["2:4", None, "60%/row"], [0, 0, 0]),
        (["8:16"], [2]),
    ],
)
def test_fused_linears_are_those_one_by_one(patterns: list[str | None], ranks: list[int], as_dense: bool) -> None:
    heights = [48, 16, 32]
    linears = [
        stored(pattern, o, rank=rank, seed=o) for pattern, rank, o in zip(patterns, ranks, heights, strict=False)
    ]
    x = torch.randn(5, 192, dtype=torch.float64)
    expected = torch.cat([x @ dense(linear).t() for linear in linears], 1)
    assert_close(outputs([linear.unpacked() for linear in linears] if as_dense else linears, x), expected)


def test_a_weight_that_overflows_float16_is_refused() -> None:
    linear = StoredLinear({"weight": torch.tensor([[1e5]])}, None, (1, 1))
    with pytest.raises(InputError, match="does not fit float16"):
        StackedLinear([linear], torch.float16, CPU)
