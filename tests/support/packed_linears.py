"""Packed linears to test with: S in a pattern, with whatever can lie in its groups, and U·V."""

import torch
from torch import Tensor

from streamslr.io.packing import pack, pack_on_grid
from streamslr.spec.pattern import SparsityPattern
from streamslr.spec.values import DEFAULT_GROUP, ValueFormat, grid_of, group_count, parse_values


def random_sparse(pattern: SparsityPattern, o: int, d: int, seed: int, zeros: float = 0.3) -> Tensor:
    """Return S [o, d] in the pattern, where it may be non-zero: values, zeros, -0.0, and values that underflow."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(o, d, generator=generator)
    draw = torch.rand(o, d, generator=generator)
    S = torch.where(draw < zeros, torch.where(draw < zeros / 2, -0.0, 1e-43), W)
    S = torch.where(pattern.project(W), S, 0.0)
    S[torch.rand(o, generator=generator) < 0.2] = 0.0  # whole rows
    return S


def low_rank_linear(
    pattern: SparsityPattern, o: int, d: int, r: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """Return the parts of a random packed linear [o, d] of rank r."""
    generator = torch.Generator().manual_seed(seed)
    packed = pack(random_sparse(pattern, o, d, seed), pattern, dtype)
    U = torch.randn(o, r, generator=generator).to(dtype)
    V = torch.randn(r, d, generator=generator).to(dtype)
    return packed | {"U": U, "V": V}


def form_of(text: str, group: int = DEFAULT_GROUP) -> ValueFormat:
    """Return the format of codes that a text names."""
    form = grid_of(parse_values(text, group))
    assert form is not None
    return form


def random_codes(pattern: SparsityPattern, values: ValueFormat, o: int, d: int, seed: int) -> Tensor:
    """Return codes [o, d] float32 in the pattern: some the largest, some zero where it keeps them, some rows zero."""
    S = random_sparse(pattern, o, d, seed)
    return values.nearest(S * values.largest / 2) + 0.0


def grid_linear(
    pattern: SparsityPattern, values: ValueFormat, o: int, d: int, r: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """Return the parts of a random packed linear [o, d] of rank r whose values lie on a grid."""
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.rand(o, group_count(d, values.group), generator=generator) + 0.1) / values.largest
    packed = pack_on_grid(random_codes(pattern, values, o, d, seed), scales, pattern, dtype, values)
    U = torch.randn(o, r, generator=generator).to(dtype)
    V = torch.randn(r, d, generator=generator).to(dtype)
    return packed | ({"U": U, "V": V} if r else {})
