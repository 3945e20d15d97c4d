"""A model of transformers on the meta device: built there, its blocks found, its tensors read and set by name."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GradientCheckpointingLayer,
    PretrainedConfig,
    PreTrainedModel,
)

from streamslr.errors import InputError
from streamslr.io.safetensors_file import TensorInfo
from streamslr.model.border import refusing
from streamslr.model.bounds import no_more_modules_than
from streamslr.model.transformers_compat import quiet_transformers


def auto_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that makes the language model of `config`.

    It is AutoModelForCausalLM; for a decoder that a model of images or sound holds, AutoModelForMultimodalLM. Where
    either would do (Llama 4, Qwen3.5), `architectures` decides which of the two models was stored.
    """
    if type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForCausalLM
    whole: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
    stored_whole = whole.__name__ in (config.architectures or ())
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not stored_whole
    return AutoModelForCausalLM if causal else AutoModelForMultimodalLM


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype, tensors: Mapping[str, TensorInfo]) -> PreTrainedModel:
    """Return the language model of `config` in evaluation mode, every parameter and buffer on meta.

    Args:
        config: config.json as transformers reads it.
        dtype: dtype of the parameters.
        tensors: the checkpoint's tensors, which bound the size of the model.

    Raises:
        InputError: transformers builds none from this configuration, or one of many more modules than tensors.
    """
    what = f"transformers builds no causal language model from a {type(config).__name__}"
    with (
        refusing(what, "choose a decoder-only model, or check config.json"),
        quiet_transformers(),
        torch.device("meta"),
        no_more_modules_than(tensors),
    ):
        # A copy, because transformers notes the dtype in it. No attn_implementation: some architectures refuse one.
        model: PreTrainedModel = auto_class(config).from_config(copy.deepcopy(config), dtype=dtype)
        model.eval()  # type: ignore[no-untyped-call]
    return model


def find_blocks(model: PreTrainedModel) -> tuple[str, tuple[nn.Module, ...]]:
    """Return the decoder's one list of layers: its module path, and the layers.

    Of several lists it is the one of as many layers as the configuration says.

    Raises:
        InputError: there is no such list, or several.
    """
    with refusing(f"{type(model).__name__} has no one decoder", "choose another model"):
        depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    if depth is not None and (not isinstance(depth, int) or depth < 1):
        raise InputError(f"config.json says num_hidden_layers {depth!r}; check it, or download it again")
    # ModernBERT's `decoder` is its head.
    lists = list(_outer_lists(decoder)) or list(_outer_lists(model.base_model))
    layers = [blocks for blocks in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in blocks)]
    found: list[nn.ModuleList] = []
    for candidates in (layers, lists):
        found = found or [blocks for blocks in candidates if len(blocks) == depth] or candidates
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__} has {len(found)} lists of layers where one is expected: its blocks cannot be told "
            f"apart, so this architecture is not supported; choose another model"
        )
    name = next(name for name, module in model.named_modules() if module is found[0])
    return name, tuple(found[0])


def _outer_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Yield the lists of modules that are in no other list."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child):
            yield child
        else:
            yield from _outer_lists(child)


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer of this name."""
    module, leaf = _owner(model, name)
    tensor: Tensor = getattr(module, leaf)
    return tensor


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter (without gradient) or buffer of this name; devices may differ."""
    module, leaf = _owner(model, name)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
