"""Linears that a model's own code uses in another way than to call them, which must stay dense.

A packed linear has no dense weight. Code that asks only for the weight's dtype, device or shape gets them
(`AbsentWeight`); code that needs its numbers fails. Which linears that are is found before any work, with stand-ins for
packed linears on the meta device, and so are linears that do not see every token once.
"""

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from streamslr.errors import InputError, first_line
from streamslr.io.packed_layout import without_numbers
from streamslr.model.transformers_compat import guard_torch_init_functions

_ANSWERED = {
    *(Tensor.dtype, Tensor.device, Tensor.shape, Tensor.ndim, Tensor.layout, Tensor.requires_grad, Tensor.itemsize),
    *(Tensor.is_cuda, Tensor.is_cpu, Tensor.is_meta, Tensor.is_sparse, Tensor.is_quantized, Tensor.is_leaf),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex),
}
"""Attributes and methods of a tensor that need none of its numbers."""


class WeightReadError(InputError):
    """A model's code needs the numbers of a weight that is packed.

    Attributes:
        linear: name of the linear.
    """

    def __init__(self, linear: str) -> None:
        super().__init__(
            f"the model's own code reads the weight of {linear}, which is packed; export the folder with --to dense, "
            f"and load that"
        )
        self.linear = linear


class AbsentWeight(Tensor):
    """The weight of a packed linear, without numbers: dtype, device and shape.

    `_is_hf_initialized` has the functions of `transformers.initialization` leave it alone.
    """

    _is_hf_initialized = True
    linear: str

    @classmethod
    def of(cls, linear: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> "AbsentWeight":
        """Return the weight [o, d] of a linear; `linear` is its name in errors."""
        weight = torch.empty((), dtype=dtype, device=device).expand(shape).as_subclass(cls)  # memory of one number
        weight.linear = linear
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ANSWERED or getattr(func, "__self__", None) in _ANSWERED:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise WeightReadError(next(_absent((args, kwargs or {}))).linear)


def _absent(value: Any) -> Iterator[AbsentWeight]:
    """Yield the absent weights among a function's arguments."""
    if isinstance(value, AbsentWeight):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _absent(item)


class _StandIn(nn.Module):
    """Stand-in for a packed linear on meta, as a model's code sees it; counts its inputs."""

    def __init__(self, name: str, linear: nn.Linear) -> None:
        super().__init__()
        self.name, self.in_features, self.out_features = name, linear.in_features, linear.out_features
        self.dtype, self.bias, self.rows = linear.weight.dtype, linear.bias, 0

    @property
    def weight(self) -> AbsentWeight:
        return AbsentWeight.of(self.name, (self.out_features, self.in_features), self.dtype, torch.device("meta"))

    def forward(self, x: Tensor) -> Tensor:
        self.rows += x.shape[:-1].numel()
        return x.new_empty(*x.shape[:-1], self.out_features)


def find_dense(
    model: nn.Module,
    blocks: Sequence[Mapping[str, nn.Linear]],
    experts: Collection[str],
    run: Callable[[int], object],
    tokens: int,
    initializers: Callable[[], Iterable[tuple[nn.Module, Callable[[], None]]]],
) -> dict[str, str]:
    """Find the linears that must stay dense. What holds for one in one block holds at the same place in all others.

    Args:
        model: the model, its blocks on meta.
        blocks: per block, module path -> linear.
        experts: module paths of the linears that see only the tokens routed to them.
        run: passes a batch through block i on meta.
        tokens: number of tokens in that batch.
        initializers: yields each module with what fills its tensors; `from_pretrained` calls that of packed models too.

    Returns:
        Module path -> why.

    Raises:
        InputError: the model cannot be initialised with packed linears, for another reason than that.
    """
    reasons: dict[str, str] = {}  # by place

    def until_unread(linears: Mapping[str, nn.Linear], work: Callable[[], object]) -> dict[str, _StandIn]:
        while True:
            packed = {path: linear for path, linear in linears.items() if without_numbers(path) not in reasons}
            with _stand_ins(model, packed) as made:
                try:
                    work()
                    return made
                except WeightReadError as error:
                    reasons[without_numbers(error.linear)] = "the model's own code reads its weight"

    for i, linears in enumerate(blocks):
        for path, stand_in in until_unread(linears, partial(run, i)).items():
            if stand_in.rows != tokens and path not in experts:
                reasons[without_numbers(path)] = f"it sees {stand_in.rows} inputs where {tokens} tokens pass its block"
    everywhere = {path: linear for linears in blocks for path, linear in linears.items()}
    failing = _failures(initializers())  # on meta many lack values
    until_unread(everywhere, lambda: _require_same(_failures(initializers()), failing))
    return {path: reasons[without_numbers(path)] for path in everywhere if without_numbers(path) in reasons}


def _failures(initializers: Iterable[tuple[nn.Module, Callable[[], None]]]) -> dict[nn.Module, Exception]:
    """Fill the tensors of modules that hold others, and return the modules for which that fails."""
    failures: dict[nn.Module, Exception] = {}
    with torch.device("cpu"), torch.no_grad(), guard_torch_init_functions():
        for module, initialize in initializers:
            if next(module.children(), None) is None:
                continue  # it holds no linear, and there are many
            try:
                initialize()
            except WeightReadError:
                raise
            except Exception as error:
                failures[module] = error
    return failures


def _require_same(failures: Mapping[nn.Module, Exception], before: Container[nn.Module]) -> None:
    for module, error in failures.items():
        if module not in before:
            raise InputError(
                f"transformers cannot initialise {type(module).__name__} when its linears are packed: "
                f"{first_line(error)}; choose another architecture"
            ) from error


@contextmanager
def _stand_ins(model: nn.Module, linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, _StandIn]]:
    """Put stand-ins for packed linears into a model, by module path."""
    made = {path: _StandIn(path, linear) for path, linear in linears.items()}
    try:
        for path, stand_in in made.items():
            model.set_submodule(path, stand_in)
        yield made
    finally:
        for path, linear in linears.items():
            model.set_submodule(path, linear)
