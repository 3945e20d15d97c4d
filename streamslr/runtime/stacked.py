"""Linears of one input as an engine runs them: fused, such as q, k and v, and frozen; S packed or dense in memory."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor, nn

from streamslr.errors import InputError
from streamslr.io.low_rank import unpack_low_rank
from streamslr.runtime.linear import packed_product
from streamslr.runtime.partition import StoredLinear, stack
from streamslr.spec.pattern import SparsityPattern
from streamslr.tensors import is_finite


class StackedLinear(nn.Module):
    """Outputs of several linears side by side, y = x [S₁; S₂ …]ᵀ + [(x V₁ᵀ) U₁ᵀ, (x V₂ᵀ) U₂ᵀ …], for x [n, d].

    Neighbours of one pattern and value format share a product by S, and all share the product by V.
    """

    def __init__(self, linears: Sequence[StoredLinear], dtype: torch.dtype, device: torch.device) -> None:
        """Copy the parts of the linears, in the dtype and to the device."""
        super().__init__()
        d = linears[0].shape[1]
        self.sparse = nn.ModuleList(
            _Sparse(stack(group), group[0].pattern, d, dtype, device)
            for group in (list(found) for _, found in groupby(linears, key=lambda linear: linear.stacks_with))
        )
        ranks = [linear.parts["V"].shape[0] if "V" in linear.parts else 0 for linear in linears]
        self.rows = [linear.shape[0] for linear in linears]
        self.ranks = [slice(stop - rank, stop) for rank, stop in zip(ranks, accumulate(ranks), strict=True)]
        low_rank = [linear.parts for linear, rank in zip(linears, ranks, strict=True) if rank]
        # Codes beside numbers become numbers, since all share one product; in float16, which lacks their range, all do.
        coded = dtype != torch.float16 and all("low_rank_scales" in parts for parts in low_rank)
        factors = [_factors(linear.parts, coded) for linear in linears]
        self.U = nn.ParameterList(_frozen(U, dtype, device) for U, _ in factors)
        Vs = [V for (_, V), rank in zip(factors, ranks, strict=True) if rank]
        self.V = _frozen(torch.cat(Vs), dtype, device) if Vs else None
        scales = torch.cat([parts["low_rank_scales"] for parts in low_rank]) if low_rank and coded else None
        self.low_rank_scales = None if scales is None else _frozen(scales, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [n, o] for x [n, d]."""
        products = [sparse(x) for sparse in self.sparse]
        y = products[0] if len(products) == 1 else torch.cat(products, 1)
        if self.V is None:
            return y
        low = nn.functional.linear(x, self.V.to(x.dtype))
        if self.low_rank_scales is not None:
            low = low * self.low_rank_scales
        if len(self.rows) == 1:
            return torch.addmm(y, low, self.U[0].to(x.dtype).t())
        outputs = [
            torch.addmm(part, low[:, ranks], U.to(x.dtype).t()) if ranks.stop > ranks.start else part
            for part, ranks, U in zip(y.split(self.rows, 1), self.ranks, self.U, strict=True)
        ]
        return torch.cat(outputs, 1)


def _factors(parts: Mapping[str, Tensor], coded: bool) -> tuple[Tensor, Tensor]:
    """Return U and V, as codes where all are; two empty tensors at rank 0."""
    low_rank = (parts["U"], parts["V"]) if coded and "U" in parts else unpack_low_rank(parts)
    return low_rank or (torch.empty(0), torch.empty(0))


class _Sparse(nn.Module):
    """S of linears of one pattern, one below the other; dense for those without a pattern."""

    weight: nn.Parameter | None
    values: nn.Parameter
    meta: nn.Parameter
    scales: nn.Parameter | None
    row_offsets: nn.Parameter | None

    def __init__(
        self,
        parts: Mapping[str, Tensor],
        pattern: SparsityPattern | None,
        d: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.pattern, self.d = str(pattern), d
        for name in ("weight", "values", "meta", "scales", "row_offsets"):
            tensor = parts.get(name)
            self.register_parameter(name, None if tensor is None else _frozen(tensor, dtype, device))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return nn.functional.linear(x, self.weight)
        packed = self.values, self.meta, self.row_offsets
        y: Tensor = packed_product(x, *packed, self.pattern, self.d, False, self.scales)
        return y


def _frozen(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Return a parameter without gradient, of its own memory; only tensors of numbers change their dtype."""
    number = tensor.is_floating_point() and tensor.dtype.itemsize > 1  # no code of a grid
    copy = torch.empty(tensor.shape, dtype=dtype if number else tensor.dtype, device=device)
    copy.copy_(tensor)
    if number and dtype == torch.float16 and tensor.dtype != dtype and not is_finite(copy):
        raise InputError("a weight does not fit float16, which ends at 65504; serve in bfloat16 or float32")
    return nn.Parameter(copy, requires_grad=False)
