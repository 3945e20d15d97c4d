"""A float32 residual stream through blocks whose weights and products are in bf16.

A bf16 stream rounds after every addition, by 2^-9 of what has added up so far, while one block of many adds little to
it: what a block loses is then of the size of its rounding (tools/results/float32-stream.md). A float32 stream costs
memory traffic, but no tensor core: linears, attention and all between a norm and the next addition stay bf16.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from streamslr.errors import first_line
from streamslr.model.experts import Experts
from streamslr.model.meta_model import set_tensor
from streamslr.model.parameter_names import ParameterNames

log = logging.getLogger("streamslr")

_MIXING = {torch.ops.aten.cat, torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.where}
"""Operators beside the elementwise ones that take tensors of several floating-point dtypes."""


class Float32Stream:
    """Casts around the modules of a model's blocks, by hooks that stay when blocks are loaded and evicted.

    The input of a linear is cast to the dtype of its weights; linears that share an input share the cast, so that they
    share a Gram matrix too. A norm computes in float32 and returns the compute dtype. So whatever lies between a norm
    and the next addition runs as in the bf16 model.
    """

    def __init__(self, blocks: Sequence[nn.Module], dtype: torch.dtype) -> None:
        """Register the hooks.

        Args:
            blocks: the model's blocks.
            dtype: compute dtype, of the linears' weights.
        """
        self._dtype = dtype
        self._casts: list[tuple[Tensor, Tensor]] = []  # input -> its cast, of the pass that runs
        self._handles = [handle for block in blocks for handle in self._register(block)]

    def forget(self) -> None:
        """Free the casts of a pass that has ended."""
        self._casts.clear()

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _register(self, module: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        # Hooks on the linears of experts would have those without tokens called too.
        if isinstance(module, nn.Linear | Experts):
            yield module.register_forward_pre_hook(self._cast_input)
        elif is_norm(module):
            yield module.register_forward_hook(self._cast_output)
        else:
            for child in module.children():
                yield from self._register(child)

    def _cast_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].dtype != torch.float32:
            return None
        cast = next((cast for x, cast in self._casts if x is args[0]), None)
        if cast is None:
            cast = args[0].to(self._dtype)
            self._casts.append((args[0], cast))
        return (cast, *args[1:])

    def _cast_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output.to(self._dtype) if isinstance(output, Tensor) else output


def is_norm(module: nn.Module) -> bool:
    """Tell if a module has parameters, none of them a matrix, and holds no other module."""
    parameters = list(module.parameters(recurse=False))
    return bool(parameters) and not list(module.children()) and all(p.dim() <= 1 for p in parameters)


def find_float32_stream(
    model: PreTrainedModel,
    names: ParameterNames,
    blocks: Sequence[nn.Module],
    dtype: torch.dtype,
    run: Callable[[int, torch.dtype], Any],
) -> Float32Stream | None:
    """Let the residual stream be float32 in every block, or in none where one of them does not run so.

    The meta device does not compare dtypes as others do: a product of float32 and bf16 passes. Hence every operator is
    looked at, and any that takes several floating-point dtypes must be known to take them.

    Args:
        model: the model, on meta; the parameters of its norms become float32.
        names: names of its parameters.
        blocks: its blocks.
        dtype: compute dtype, of the linears' weights.
        run: passes hidden states of this dtype through block i on meta, and returns what the block returns.

    Returns:
        The casts, registered; None where a block fails or returns another dtype, which the log names.
    """
    held = {id(p) for block in blocks for module in block.modules() if is_norm(module) for p in module.parameters()}
    parameters = model.named_parameters(remove_duplicate=False)  # a layer may be a part of several blocks
    narrow = {name: names.meta[name] for name, p in parameters if id(p) in held}
    stream = Float32Stream(blocks, dtype)

    def set_norms(tensors: Mapping[str, Tensor]) -> None:
        names.meta |= tensors
        for name, tensor in tensors.items():
            set_tensor(model, name, tensor)

    set_norms({name: tensor.float() for name, tensor in narrow.items()})
    for i in range(len(blocks)):
        try:
            with _SameDtypes():
                output = run(i, torch.float32)
            returned = (output[0] if isinstance(output, tuple) else output).dtype
            why = "" if returned == torch.float32 else f"it returns {returned}"
        except Exception as error:  # a block's code may do anything
            why = first_line(error)
        finally:
            stream.forget()
        if why:
            stream.remove()
            set_norms(narrow)
            log.info("hidden states stay %s inside the blocks: block %d does not take float32 (%s)", dtype, i, why)
            return None
    return stream


class _SameDtypes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that refuses tensors of different floating-point dtypes, except where an operator promotes them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        dtypes = {x.dtype for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.dim()}
        if len(dtypes) > 1 and torch.Tag.pointwise not in func.tags and func.overloadpacket not in _MIXING:
            raise TypeError(f"{func} takes {' and '.join(sorted(map(str, dtypes)))}")
        return func(*args, **(kwargs or {}))
