"""What the pretended GPU knows of aten's operators beside their cost: tables of names, and their arguments."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

NO_KERNEL = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unbind", "detach", "alias"),
    *("as_strided", "unsqueeze", "squeeze", "diagonal", "split", "split_with_sizes", "chunk", "_reshape_alias"),
    *("unfold", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_"),
    *("narrow", "movedim", "_conj", "is_pinned", "record_stream", "resize_", "_local_scalar_dense", "equal"),
}
"""Operators that start no kernel, or that are counted as a wait."""

CHANGING_SHAPE = {
    "resize_",
    "resize_as_",
    "set_",
    "t_",
    "transpose_",
    "squeeze_",
    "unsqueeze_",
    "as_strided_",
    "detach_",
}
"""Operators in place after which a tensor has another shape or memory."""

COMPARING = {"ge", "gt", "le", "lt", "eq", "ne"}
COMBINING = {"maximum", "minimum", "add", "sub", "mul", "bitwise_and", "bitwise_or", "bitwise_xor"}

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
FILLING = {"copy_", "zero_", "fill_"}
"""Operators in place that do not read what they overwrite."""

TAKES_HOST_SCALARS = {"masked_fill", "masked_fill_", "where", "fill_", "index_fill_", "add_", "mul_"}
"""Operators that take scalars from the host, beside all pointwise ones."""

NOT_DETERMINISTIC = {"kthvalue", "put_", "histc", "bincount"}
"""Operators that CUDA refuses while deterministic algorithms are wanted."""

CUBLAS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "linear", "mv", "addmv", "addmv_"}


@cache
def name_and_written(func: Any) -> tuple[str, tuple[tuple[int, str], ...]]:
    """Return an operator's name without namespace and overload, and (position, name) of arguments that it changes."""
    arguments = func._schema.arguments
    changed = [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    return func._schema.name.partition("::")[2], tuple(changed)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among arguments or results, those in lists too."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def argument(which: tuple[int, str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    position, name = which
    return args[position] if position < len(args) else kwargs.get(name)


def counted(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Compute histc of integers, which only CUDA does."""
    made: Tensor = func(args[0].to(torch.float32), *args[1:], **kwargs)
    return made.to(args[0].dtype)


def widened(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Compute mm, addmm, bmm or baddbmm with an `out_dtype` wider than the operands, which only CUDA does."""
    tensors = [a.to(torch.float32) for a in args if isinstance(a, Tensor)]
    plain = getattr(aten, func._schema.name.partition("::")[2])
    scale = {name: value for name, value in kwargs.items() if name in ("beta", "alpha", "out")}
    made: Tensor = plain(*tensors, **scale)
    return made
