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
    dense: Sequence[Mapping[str, str]],
    fused: Mapping[str, str],
) -> Iterator[str]:
    """Yield each reason why a block's weights are not plain linears of its own, the most telling first.

    State beside the linears (convolutions, A_log and gates of recurrent blocks) is no obstacle: it stays as it is, and
    only must not be most of a block.

    Args:
        blocks: module path of each block -> the block.
        linears: per block, the linears that are compressed.
        routers: parameters that stay dense.
        shared: two names of one parameter, from `find_shared_parameter`.
        dense: per block, each linear that has to stay dense -> why.
        fused: each parameter of experts that cannot be taken apart -> why.
    """
    mostly_others = []
    for (name, block), found, kept in zip(blocks.items(), linears, dense, strict=True):
        others: list[tuple[int, str]] = []
        for path, module in block.named_modules(prefix=name):
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.dim() < 2 or isinstance(module, nn.Linear) or f"{path}.{leaf}" in routers:
                    continue
                text = f"{path}.{leaf} {list(parameter.shape)} in a {type(module).__name__}"
                others.append((parameter.numel(), text))
                if parameter.dim() >= 3 and "expert" in f"{path}.{type(module).__name__}".removeprefix(name).lower():
                    why = fused.get(f"{path}.{leaf}", "its parameters are not one for each kind of weight")
                    yield f"it is a mixture of experts that cannot be taken apart, {text}: {why}"
        largest = max(others, default=(0, "none"))[1]
        if kept and not found:
            linear, why = next(iter(kept.items()))
            mostly_others.append(f"no linear of {name} can be packed, first {linear}: {why}")
        elif not found:
            mostly_others.append(f"{name} holds no linear that can be packed (its largest other weight: {largest})")
        elif sum(size for size, _ in others) > sum(o * d for o, d in found.values()):
            mostly_others.append(f"most of the weights of {name} are in no linear, first of all {largest}")
    yield from mostly_others
    if shared:
        yield f"{shared[0]} and {shared[1]} are one parameter"


def find_shared_parameter(model: PreTrainedModel, names: ParameterNames) -> tuple[str, str] | None:
    """Return two names of one parameter that are not in the same block, or None. Ask before weights are loaded.

    A parameter that the model ties from block to block is not meant: `ParameterNames.shared_in_depth`.
    """
    first: dict[int, str] = {}
    in_depth = names.shared_in_depth(model)
    pairs = list(model.all_tied_weights_keys.items())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        pairs.append((first.setdefault(id(parameter), name), name))
    apart = [(a, b) for a, b in pairs if names.block_of(a) != names.block_of(b)]
    return next(((a, b) for a, b in apart if in_depth.get(a, a) != in_depth.get(b, b)), None)
