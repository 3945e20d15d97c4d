"""Experts that a compressed folder holds one by one, for a dense model whose files hold them fused."""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from streamslr.io.safetensors_file import TensorSource
from streamslr.model.experts import unfuse
from streamslr.model.parameter_names import find_modules
from streamslr.model.transformers_compat import get_model_conversion_mapping, revert_weight_conversion

log = logging.getLogger("streamslr")


def fuse_experts(
    model: PreTrainedModel, tensors: Mapping[str, Iterable[TensorSource]]
) -> dict[str, tuple[TensorSource, ...]]:
    """Return the tensors of each file, with fused ones in the place of experts' weights that have names of our own.

    The fused ones have the names and the layout that `save_pretrained` gives them. They are made whole, one at a time.

    Args:
        model: the dense model, on meta.
        tensors: file -> its tensors.
    """
    conversions = get_model_conversion_mapping(model)
    apart = unfuse(copy.deepcopy(model), conversions, [name for of in tensors.values() for name, *_ in of])
    places: dict[str, tuple[str, int]] = {}  # linear -> the parameter that it is a part of, the expert
    transposed: dict[str, bool] = {}
    for path, experts in apart.experts.items():
        for parameter, weight in experts.weights.items():
            if f"{path}.{parameter}" in apart.named_here:
                transposed[f"{path}.{parameter}"] = weight.transposed
                for expert in range(len(weight)):
                    places[f"{path}.{expert}.{parameter}"] = f"{path}.{parameter}", expert
    files: dict[str, tuple[TensorSource, ...]] = {}
    for file, sources in tensors.items():
        by_name = {source[0]: source for source in sources}
        stored = [name.removesuffix(".weight") for name in by_name if name.endswith(".weight")]
        parts: dict[str, dict[int, TensorSource]] = {}
        names: dict[str, str] = {}
        for linear, path in find_modules(model, stored, places).items():
            parameter, expert = places[path]
            parts.setdefault(parameter, {})[expert] = by_name.pop(f"{linear}.weight")
            leaf = path.rpartition(".")[2]
            names[parameter] = f"{linear.removesuffix(f'.{expert}.{leaf}')}.{leaf}"
        fused = [
            _fuse(model, parameter, names[parameter], [of[e] for e in sorted(of)], transposed[parameter])
            for parameter, of in parts.items()
        ]
        files[file] = (*by_name.values(), *fused)
    return files


def _fuse(
    model: PreTrainedModel, path: str, name: str, experts: Sequence[TensorSource], transposed: bool
) -> TensorSource:
    """Return the tensor that holds the weights [o, d] of all experts.

    Args:
        model: the dense model, on meta.
        path: path of the parameter.
        name: its name beside what else is stored.
        experts: the weights in the order of the experts.
        transposed: True where the model takes them as [d, o].
    """
    _, dtype, (o, d), _ = experts[0]
    shape = (len(experts), d, o) if transposed else (len(experts), o, d)
    on_meta = torch.empty(shape, dtype=dtype, device="meta")
    # Names that still have the source's prefix are the source's own.
    saved = revert_weight_conversion(model, {path: on_meta}) if name == path else {}
    key, like = next(iter(saved.items())) if len(saved) == 1 else (name, on_meta)
    if name == path and len(saved) != 1:
        log.warning(
            "%s: transformers would save it as %d tensors; it is written as the model holds it, under this name",
            path,
            len(saved),
        )

    def make() -> Tensor:
        fused = torch.empty(shape, dtype=dtype)
        for place, (*_, weight) in zip(fused, experts, strict=True):
            place.copy_(weight().t() if transposed else weight())
        return revert_weight_conversion(model, {path: fused})[key].contiguous() if len(saved) == 1 else fused

    return key, dtype, tuple(like.shape), make
