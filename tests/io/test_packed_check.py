"""Damage to a packed linear: found, named, and never unpacked to a wrong matrix."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamslr.errors import InputError
from streamslr.io.packed_check import check_packed, check_positions
from streamslr.io.packing import pack, unpack
from streamslr.spec.pattern import NofM, SparsityPattern, Unstructured, parse_pattern
from tests.support.packed_linears import low_rank_linear, random_sparse

Change = Callable[[Any], Any]
"""Changes a part; gets None where the linear lacks it, and returns None to remove it."""


def damaged(pattern: SparsityPattern, **changes: Change) -> tuple[dict[str, Tensor], list[str]]:
    """Return the parts of a linear after `changes`, and what check_packed says of them."""
    tensors = low_rank_linear(pattern, 20, 20, 3, torch.float32)
    assert check_packed(tensors, pattern, (20, 20)) == []
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, change in changes.items():
        tensors[name] = change(tensors.get(name))
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return tensors, check_packed(tensors, pattern, (20, 20))


def setting(*index: int, to: float) -> Change:
    def change(tensor: Tensor) -> Tensor:
        tensor[index] = to
        return tensor

    return change


@pytest.mark.parametrize(
    ("pattern", "changes", "sentence"),
    [
        (
            "2:4",
            {"meta": setting(7, 0, to=216)},
            "row 7, group 0 keeps 0 of 4 columns, not 2",
        ),
        ("10:20", {"meta": setting(3, 1, to=0xFF)}, "row 3, group 0 keeps"),
        ("10:20", {"meta": setting(3, to=1)}, "row 3, group 0 keeps 3 of 20 columns, not 10"),
        ("50%/row", {"meta": setting(3, 1, to=0)}, "row 3, group 0 keeps"),
        ("50%/row", {"values": lambda values: values.flatten()}, "a 20x20 50%/row linear needs [20, 10]"),
        ("50%", {"meta": setting(0, 0, to=0)}, "row_offsets gives row 0"),
        ("50%", {"row_offsets": setting(4, to=999)}, "row_offsets gives row 3"),
        ("50%", {"values": lambda values: values[:-1]}, "entries, but meta keeps"),
        ("50%", {"values": lambda values: values[None]}, "a 50% linear needs one dimension"),
        (
            "2:4",
            {"meta": lambda meta: meta[:, :1]},
            "meta has shape [20, 1], a 20x20 2:4 linear needs [20, 2]",
        ),
        ("2:4", {"meta": lambda meta: meta.short()}, "meta is torch.int16, not torch.uint8"),
        ("2:4", {"values": lambda values: values[:-1]}, "values has shape [19, 10]"),
        ("2:4", {"values": lambda values: values.int()}, "values is torch.int32, not a floating-point type"),
        ("2:4", {"values": lambda values: None}, "values is missing"),
    ],
)
def test_damage_is_named_and_never_unpacked(pattern: str, changes: dict[str, Change], sentence: str) -> None:
    tensors, problems = damaged(parse_pattern(pattern), **changes)
    assert any(sentence in problem for problem in problems), problems
    with pytest.raises(InputError):
        unpack(tensors, parse_pattern(pattern), (20, 20))


@pytest.mark.parametrize(
    ("pattern", "changes", "sentence"),
    [
        ("2:4", {"meta": setting(9, 1, to=36)}, "describes more than 20 columns in row 9 (1 of 20 rows)"),
        ("1:4", {"meta": setting(9, 1, to=4)}, "describes more than 20 columns in row 9 (1 of 20 rows)"),
        ("50%", {"meta": setting(9, 2, to=0x81)}, "describes more than 20 columns in row 9 (1 of 20 rows)"),
        ("2:4", {"values": setting(1, 2, to=float("inf"))}, "values[1, 2] is inf: 1 of 200 values"),
        ("2:4", {"U": setting(4, 1, to=float("nan"))}, "U[4, 1] is nan"),
        ("2:4", {"V": lambda V: None}, "U is there without V"),
        ("2:4", {"U": lambda U: U[:, :2]}, "U [20, 2] and V [3, 20] are not the [20, r] and [r, 20]"),
        ("2:4", {"V": lambda V: V.half()}, "U is torch.float32, but V is torch.float16"),
        ("2:4", {"row_offsets": lambda _: torch.zeros(21)}, "row_offsets does not belong to a 2:4 linear"),
    ],
)
def test_other_damage_is_named(pattern: str, changes: dict[str, Change], sentence: str) -> None:
    _, problems = damaged(parse_pattern(pattern), **changes)
    assert any(sentence in problem for problem in problems), problems


def test_too_dense_is_named() -> None:
    packed = pack(torch.ones(20, 20), Unstructured(1e-9), torch.float32)
    problems = check_packed(packed, Unstructured(0.5), (20, 20))
    assert problems == ["meta keeps 400 of 400 columns, 50% allows 200"]
    assert check_packed(packed, NofM(2, 4), (20, 18)) == ["2:4 needs rows of a multiple of 4 columns, not 20x18"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["2:4", "1:4", "2:3", "4:6", "50%", "50%/row"]), st.integers(0, 10**6), st.integers(0, 255))
def test_any_changed_meta_byte_is_found_or_harmless(text: str, where: int, byte: int) -> None:
    """A changed byte either is reported, or describes another matrix of the same pattern."""
    pattern = parse_pattern(text)
    packed = pack(random_sparse(pattern, 6, 12, 1), pattern, torch.float32)
    packed["meta"].view(-1)[where % packed["meta"].numel()] = byte
    if check_packed(packed, pattern, (6, 12)) == []:
        S = unpack(packed, pattern, (6, 12))
        assert pattern.check(S != 0) is None
        assert sorted(S[S != 0].tolist()) == sorted(packed["values"][packed["values"] != 0].tolist())


@pytest.mark.parametrize(("pattern", "d"), [("4:8", 16), ("3:6", 12), ("8:16", 32), ("50%/row", 20), ("50%", 20)])
def test_each_changed_bit_of_a_bitmask_is_found(pattern: str, d: int) -> None:
    parsed = parse_pattern(pattern)
    W = torch.randn(3, d, generator=torch.Generator().manual_seed(0))
    parts = pack(W * parsed.project(W), parsed, torch.float32)
    assert check_positions(parts, parsed, (3, d)) == []
    for row in range(3):
        for column in range(8 * parts["meta"].shape[1]):
            meta = parts["meta"].clone()
            meta[row, column // 8] ^= 1 << column % 8
            assert check_positions(parts | {"meta": meta}, parsed, (3, d)), (row, column)
