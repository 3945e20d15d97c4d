"""Linears that a model stores transposed, [d, o] (Conv1D of GPT-2): found, and held as plain linears [o, d]."""

from collections.abc import Mapping

from torch import nn

from streamslr.model.transformers_compat import Conv1D


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return the shape (o, d) of a linear's weight as it is used, however it is stored; None for another module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return (module.nf, module.nx) if isinstance(module, Conv1D) else None


def find_transposed(model: nn.Module) -> set[str]:
    """Return the module paths of the linears whose weight is stored as [d, o]."""
    return {path for path, module in model.named_modules() if isinstance(module, Conv1D)}


def hold_as_linears(model: nn.Module, blocks: Mapping[str, nn.Module]) -> set[str]:
    """Put a plain linear in the place of each one of the blocks that is stored transposed.

    A weight [o, d] that is a transposed view of what is stored gives the bits that the model's own module gives.

    Args:
        model: the model, on meta.
        blocks: module path of each block -> the block.

    Returns:
        The parameters whose tensors the checkpoint stores transposed.
    """
    replaced = set()
    for name, block in blocks.items():
        for path in find_transposed(block):
            module = block.get_submodule(path)
            weight = module.get_parameter("weight")
            d, o = weight.shape
            linear = nn.Linear(d, o, device="meta", dtype=weight.dtype)
            block.set_submodule(path, linear.train(module.training))
            replaced.add(f"{name}.{path}.weight")
    return replaced
