"""Weights of a checkpoint put into a model on meta, converted as `from_pretrained` does, and checked."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from streamslr.errors import InputError
from streamslr.model.checkpoint import Checkpoint
from streamslr.model.meta_model import get_tensor
from streamslr.model.parameter_names import ParameterNames
from streamslr.model.transformers_compat import WeightTransform, load_converted, quiet_transformers
from streamslr.tensors import count_not_finite, is_finite


def load_keys(
    model: PreTrainedModel,
    names: ParameterNames,
    conversions: Sequence[WeightTransform],
    checkpoint: Checkpoint,
    keys: Iterable[str],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Set the parameters that keys of a checkpoint become, and tie the weights that the model ties.

    Args:
        model: the model; its other parameters stay as they are.
        names: names of its parameters.
        conversions: how transformers renames and fuses keys.
        checkpoint: source of the weights.
        keys: keys to load; those that the model has no use for are skipped.
        dtype: dtype of loaded parameters; one that has another dtype on meta keeps that.
        device: device of loaded parameters.

    Raises:
        InputError: a tensor has another shape than the model's, or cannot be converted.
    """
    used = [key for key in keys if any(name in names.meta for name in names.parameters_of(key))]
    with quiet_transformers():
        info = load_converted(model, checkpoint.read_or_defer(used), conversions, dtype, device)
        outside = any(names.block_of(names.parameters_of(key)[0]) is None for key in used)
        if outside and model.all_tied_weights_keys:
            model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    for name, error in info.conversion_errors.items():
        raise InputError(f"{name} cannot be made of {checkpoint.model}'s tensors: {error}")
    for name, found, wanted in info.mismatched_keys:
        raise InputError(
            f"{name} is {list(found)} in {checkpoint.model}, config.json asks for {list(wanted)}: they are "
            f"of different models; download both again"
        )


def check_loaded(
    model: PreTrainedModel, names: ParameterNames, checkpoint: Checkpoint, wanted: Sequence[str], dtype: torch.dtype
) -> None:
    """Check that parameters and buffers are loaded and hold no NaN or infinity.

    Args:
        model: the model.
        names: names of its parameters.
        checkpoint: where they were loaded from.
        wanted: parameters and buffers to check.
        dtype: dtype that they were loaded in.

    Raises:
        InputError: one was not loaded, or holds NaN or infinity.
    """
    missing = [name for name in wanted if get_tensor(model, name).is_meta]
    if missing:
        raise InputError(
            f"{checkpoint.model} lacks {len(missing)} of {len(wanted)} parameters asked for, first {missing[0]}"
        )
    for name in wanted:
        tensor = get_tensor(model, name)
        if isinstance(tensor, nn.Parameter) and not is_finite(tensor):
            keys = names.find_sources(checkpoint.tensors).get(name, (name,))
            infos = [checkpoint.tensors[key] for key in keys if key in checkpoint.tensors]
            where = ", ".join(sorted({info.shard for info in infos}))
            narrower = any(info.dtype != dtype for info in infos)
            raise InputError(
                f"{keys[0]} in {where} has {count_not_finite(tensor)} of {tensor.numel()} values that are NaN or "
                f"infinite{f' as {dtype}' if narrower else ''}; download the file again, or choose another "
                f"model"
            )
