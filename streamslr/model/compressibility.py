"""Reasons why the blocks of a model that can be evaluated cannot be compressed."""

from collections.abc import Container, Iterator, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from streamslr.model.parameter_names import ParameterNames


def find_obstacles(
    blocks: Mapping[str, nn.Module],
    linears: Sequence[Mapping[str, tuple[int, int]]],
    routers: Container[str],
    shared: tuple[str, str] | None,
) -> Iterator[str]:
    """Yield each reason why a block's weights are not plain linears of its own, the most telling first.

    Args:
        blocks: module path of each block -> the block.
        linears: per block, the linears that are compressed.
        routers: parameters that stay dense.
        shared: two names of one parameter, from `find_shared_parameter`.
    """
    not_linear = []
    for path, module in (item for name, block in blocks.items() for item in block.named_modules(prefix=name)):
        if isinstance(module, nn.ModuleList):
            yield f"it is a mixture of experts or of branches: {path} is a list of {len(module)} modules"
        for leaf, parameter in module.named_parameters(recurse=False):
            found = f"{path}.{leaf} {list(parameter.shape)} in a {type(module).__name__}"
            if parameter.dim() >= 3 and not type(module).__module__.startswith("torch.nn"):
                yield (
                    f"it is a mixture of experts that cannot be taken apart, {found}: they are not plain gated ones, "
                    f"or the checkpoint does not store them one by one"
                )
            elif f"{path}.{leaf}" in routers:
                continue
            elif parameter.dim() == 2 and not isinstance(module, nn.Linear | nn.Embedding):
                not_linear.append(f"{found} is no linear layer")
    yield from not_linear
    for name, found_linears in zip(blocks, linears, strict=True):
        if not found_linears:
            yield f"{name} holds no linear layer"
    if shared:
        yield f"{shared[0]} and {shared[1]} are one parameter"


def find_shared_parameter(model: PreTrainedModel, names: ParameterNames) -> tuple[str, str] | None:
    """Return two names of one parameter that are not in the same block, or None. Ask before weights are loaded."""
    first: dict[int, str] = {}
    pairs = list(model.all_tied_weights_keys.items())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        pairs.append((first.setdefault(id(parameter), name), name))
    return next(((a, b) for a, b in pairs if names.block_of(a) != names.block_of(b)), None)
