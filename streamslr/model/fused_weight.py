"""A parameter of fused experts whose weights are in linears: a model's own code multiplies it, expert by expert."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class FusedWeight:
    """Stand-in for a parameter of E fused experts, which has a shape and no numbers.

    It answers what a model's own code asks: dtype, device and shape; the weight of one expert, transposed or not; and
    products, which go through the linears of the experts. Any other use raises TypeError or AttributeError.

    Attributes:
        owner: module that holds the linears, as `owner.EXPERT.NAME`.
        names: names of the linears of one expert whose outputs, one after another, are those of the weight.
        shape: of the parameter: [E, o, d], or [E, d, o] where it is transposed; [o, d] or [d, o] of one expert.
        transposed: True where the last dimension is the outputs.
        expert: the expert whose weight this is; None for all.
        called: experts that took part in a product; shared by all that are made from one.
    """

    owner: nn.Module
    names: tuple[str, ...]
    shape: torch.Size
    transposed: bool
    expert: int | None = None
    called: set[int] = field(default_factory=set)

    _is_hf_initialized = True  # the functions of transformers.initialization leave it alone

    # What code asks of a parameter

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the linears compute in: of U and V where they are packed, which fine-tuning makes float32."""
        linear = next(self._linears(0))
        return next((p.dtype for p in linear.parameters() if p.is_floating_point()), linear.weight.dtype)

    @property
    def device(self) -> torch.device:
        """Device of the linears' weights."""
        return next(self._linears(0)).weight.device

    def data_ptr(self) -> int:
        """Return 0: transformers asks if the numbers are aligned."""
        return 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int | Tensor) -> "FusedWeight":
        if self.expert is not None or len(self.shape) != 3:
            raise TypeError("a part of an expert's weight is asked for")
        return replace(self, shape=torch.Size(self.shape[1:]), expert=range(self.shape[0])[int(expert)])

    @property
    def T(self) -> "FusedWeight":  # noqa: N802  # as torch names it
        """Return the weight of one expert, transposed."""
        if self.expert is None:
            raise TypeError("all experts' weights are transposed as one matrix")
        return self.transpose(0, 1)

    def transpose(self, one: int, other: int) -> "FusedWeight":
        """Return the weights with outputs and inputs exchanged."""
        if {one % len(self.shape), other % len(self.shape)} != {len(self.shape) - 2, len(self.shape) - 1}:
            raise TypeError(f"dimensions {one} and {other} of {list(self.shape)} are exchanged")
        *experts, rows, columns = self.shape
        return replace(self, shape=torch.Size((*experts, columns, rows)), transposed=not self.transposed)

    # Products

    def product(self, expert: int, x: Tensor) -> Tensor:
        """Return x [n, d] times the weight of an expert [n, o]."""
        only: frozenset[int] | None = getattr(self.owner, "only", None)
        self.called.add(expert)
        if only is not None and expert not in only:
            return x.new_zeros(len(x), self.shape[-1 if self.transposed else -2])
        outputs = [linear(x) for linear in self._linears(expert)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def has_hooks(self, expert: int) -> bool:
        """Tell if hooks wait to see what an expert's linears are given."""
        return any(linear._forward_pre_hooks for linear in self._linears(expert))

    def _linears(self, expert: int) -> Iterator[nn.Linear]:
        held = cast(nn.ModuleDict, self.owner._modules[str(expert)])
        for name in self.names:
            yield cast(nn.Linear, held[name])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        multiply = _PRODUCTS.get(func.__name__)
        if multiply is None or len(args) < 2 or not isinstance(args[1], cls) or isinstance(args[0], cls):
            raise TypeError(f"{func.__name__} takes the weights of experts as numbers")
        return multiply(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: FusedWeight, bias: Tensor | None = None) -> Tensor:
    """Return what F.linear does for the weight [o, d] of one expert."""
    out = _matmul(x, weight.T)
    return out if bias is None else out + bias


def _matmul(x: Tensor, weight: FusedWeight) -> Tensor:
    """Return x [.., d] times the weight [d, o] of one expert."""
    if weight.expert is None:
        raise TypeError("all experts are multiplied at once")
    _require_inputs_first(weight)
    return weight.product(weight.expert, x)


def _bmm(x: Tensor, weight: FusedWeight) -> Tensor:
    """Return x [E, n, d] times the weights [E, d, o]. Rows of zeros, tokens that an expert is not for, are skipped."""
    _require_inputs_first(weight)
    outputs = x.new_zeros(*x.shape[:2], weight.shape[2])
    mine = [rows.any(-1).nonzero()[:, 0] for rows in x]
    made = [(e, rows, weight.product(e, x[e, rows])) for e, rows in enumerate(mine) if len(rows)]
    if not made:
        return outputs
    places = torch.cat([rows + e * x.shape[1] for e, rows, _ in made])
    return outputs.flatten(0, 1).index_copy(0, places, torch.cat([out for *_, out in made])).view_as(outputs)


def _grouped_mm(x: Tensor, weight: FusedWeight, offs: Tensor, **others: object) -> Tensor:
    """Return rows [n, d], those of expert e up to offs[e], times the weights [E, d, o]. Rows behind them give zeros."""
    if any(value is not None for value in others.values()):
        raise TypeError(f"grouped_mm is given {', '.join(others)}")
    _require_inputs_first(weight)
    ends = offs.tolist()
    bounds = enumerate(zip([0, *ends], ends, strict=False))
    outputs = [weight.product(e, x[start:end]) for e, (start, end) in bounds if start < end]
    rest = len(x) - ends[-1]
    return torch.cat([*outputs, x.new_zeros(rest, weight.shape[2])]) if rest or not outputs else torch.cat(outputs)


def _require_inputs_first(weight: FusedWeight) -> None:
    if not weight.transposed:
        raise TypeError("weights are multiplied the other way round")


_PRODUCTS: Mapping[str, Callable[..., Tensor]] = {
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _bmm,
    "grouped_mm": _grouped_mm,
    "_grouped_mm": _grouped_mm,
    "grouped_mm_fallback": _grouped_mm,
}
"""Functions of torch and transformers that multiply with weights of experts."""


def experts_with_hooks(weights: Sequence[FusedWeight]) -> Iterator[tuple[FusedWeight, int]]:
    """Yield each weight and expert that no product has reached since `called` was cleared, and that hooks wait for."""
    for weight in weights:
        for expert in range(len(weight)):
            if expert not in weight.called and weight.has_hooks(expert):
                yield weight, expert
