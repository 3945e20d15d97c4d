"""A compressed folder loaded as a model of transformers, through `from_pretrained`; its linears stay packed."""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from streamslr.errors import InputError, first_line
from streamslr.io.packed_layout import (
    MIXED,
    QUANT_METHOD,
    linears_among,
    packed_linears,
    read_quantization_config,
    shard_metadata,
    stored_parts,
)
from streamslr.io.safetensors_file import TensorInfo, shard_header
from streamslr.model.transformers_compat import (
    HfQuantizer,
    QuantizationConfigMixin,
    get_model_conversion_mapping,
    register_quantization_config,
    register_quantizer,
    revert_weight_conversion,
)
from streamslr.run.journal import read_journal
from streamslr.runtime.linear import SparseLowRankLinear
from streamslr.spec.pattern import SparsityPattern

# This file is imported while transformers is being imported (runtime/register.py), when AutoModelForCausalLM and
# PreTrainedModel are not there yet. What needs them is imported inside functions, streamslr's own files included.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("streamslr")


def load(
    folder: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    keep_dense: bool = False,
) -> "PreTrainedModel":
    """Load a compressed folder (or hub id) as a model whose linears are `SparseLowRankLinear`, packed in memory.

    Peak host memory is the packed model and one shard. The bytes themselves are not checked against their digests;
    `streamslr verify` does that.

    Args:
        folder: compressed folder, or hub id of one.
        device: "cpu", "cuda", … [default: cuda where there is one].
        dtype: dtype of every floating-point tensor [default: as stored].
        device_map: in place of device, as in `from_pretrained`.
        keep_dense: hold every S dense too. The model is then as fast as the dense model, for the dense model's memory
            on top: for CPUs, where unpacking costs time.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: streamslr did not write the folder, the folder is unfinished or damaged, or an argument cannot take
            effect.
    """
    from transformers import AutoConfig

    from streamslr.model.meta_model import auto_class

    if device is not None and device_map is not None:
        raise InputError(f"device {device!s} and device_map {device_map!r} cannot both hold; give one of them")
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!s}, but torch sees no GPU here; leave device out, or give cpu")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype {dtype!r} is none of torch's; give bfloat16, float16 or float32")
    try:
        config = AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no model that transformers knows: {first_line(error)}") from error
    if read_quantization_config(config) is None:
        raise InputError(
            f"{folder} was not written by streamslr; load it with AutoModelForCausalLM.from_pretrained, "
            f"or compress it with `streamslr run`"
        )
    if device_map is None:
        device_map = {"": torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))}
    model: PreTrainedModel = auto_class(config).from_pretrained(
        str(folder), dtype=dtype or "auto", device_map=device_map, offload_buffers=True
    )  # values of S are buffers, which accelerate leaves on the GPU unless it is told to offload them too
    if keep_dense:
        for linear in packed_modules(model).values():
            linear.keep_dense()
    return model


def packed_modules(model: nn.Module) -> dict[str, SparseLowRankLinear]:
    """Return the packed linears of a model, by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLowRankLinear)}


@register_quantization_config(QUANT_METHOD)
class StreamslrConfig(QuantizationConfigMixin):
    """Entry `quantization_config` of a compressed folder's config.json."""

    def __init__(self, **entry: Any) -> None:
        """Take the entry's fields. Raises InputError for a damaged one, or one of another format version."""
        vars(self).update(entry | {"quant_method": QUANT_METHOD})
        packed = read_quantization_config({"quantization_config": vars(self)})
        assert packed is not None
        self.format_version, self.rank, self.pattern = packed.format_version, packed.rank, str(packed.pattern or MIXED)


@register_quantizer(QUANT_METHOD)
class StreamslrQuantizer(HfQuantizer):
    """Part of `from_pretrained` that replaces linears by packed ones before any weight is read."""

    requires_calibration = True  # transformers cannot make packed weights from dense ones

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from streamslr.model.buffers import check_buffers
        from streamslr.model.experts import unfuse
        from streamslr.model.parameter_names import find_modules

        check_buffers(model)
        stored, patterns = _read_headers(checkpoint_files)
        unfuse(model, get_model_conversion_mapping(model), stored)
        packed = read_quantization_config({"quantization_config": self.quantization_config})
        assert packed is not None
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        paths = linears_among(stored)
        names = find_modules(model, paths, linears)
        if unknown := [path for path in paths if path not in names]:
            raise InputError(
                f"the shards hold {unknown[0]} ({len(unknown)} such linears), which {type(model).__name__} lacks: "
                "config.json is of another model, or another version of transformers wrote the folder"
            )
        for path, name in names.items():
            parts = {part: stored[key] for part, key in stored_parts(path, stored).items()}
            if "values" not in parts:
                raise InputError(f"the shards hold {path}.meta without its values; `streamslr verify` tells more")
            linear = linears.pop(name)
            pattern = patterns.get(path, packed.pattern)
            if pattern is None:
                raise InputError(f"no shard's header says what pattern {path} has; copy the folder again")
            rank = parts["U"].shape[1] if "U" in parts else 0
            model.set_submodule(
                name,
                SparseLowRankLinear(
                    linear.in_features,
                    linear.out_features,
                    pattern,
                    rank,
                    bias=linear.bias is not None,
                    nonzeros=parts["values"].shape[0],
                    dtype=linear.weight.dtype,
                    device="meta",
                ),
            )
        _require_whole(model, set(linears))

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        kernels = Counter(linear.kernel for linear in packed_modules(model).values())
        log.info("packed linears: %s", "; ".join(f"{count} {kernel}" for kernel, count in kernels.most_common()))

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[None, dict[str, str]]:
        """Return the texts for the headers of `save_pretrained`'s shards, so that `streamslr eval` reads them too."""
        linears = packed_modules(model)
        saved = revert_weight_conversion(model, {f"{name}.meta": linear.meta for name, linear in linears.items()})
        names = {id(tensor): key.removesuffix(".meta") for key, tensor in saved.items()}
        shapes = {
            names[id(linear.meta)]: (linear.pattern, (linear.out_features, linear.in_features))
            for linear in linears.values()
        }
        return None, shard_metadata(shapes)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:  # U, V, norms and biases can be trained without an adapter
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _read_headers(files: list[str] | None) -> tuple[dict[str, TensorInfo], dict[str, SparsityPattern]]:
    """Return every tensor of the shards, and the pattern of every packed linear, from the shards' headers.

    Raises:
        InputError: a header is damaged, or the run that wrote the folder has not finished.
    """
    if not files:
        raise InputError("a compressed model must be loaded from its folder, not from a state_dict alone")
    for folder in {Path(file).parent for file in files}:
        if state := read_journal(folder):
            state.require_complete(folder)
    headers = [shard_header(Path(file)) for file in files]
    stored = {name: info for header in headers for name, info in header.tensors.items()}
    linears = {name: linear for header in headers for name, linear in packed_linears(header.metadata).items()}
    return stored, {name: pattern for name, (pattern, _) in linears.items()}


def _require_whole(model: nn.Module, dense: set[str]) -> None:
    """Raise InputError when a linear stayed dense that is packed in another block: shards are missing.

    Args:
        model: the model, packed linears in their places.
        dense: module paths of the linears that stayed dense.
    """

    def without_numbers(name: str) -> str:
        return ".".join("*" if part.isdigit() else part for part in name.split("."))

    packed = {without_numbers(name) for name in packed_modules(model)}
    if not packed:
        raise InputError("config.json says that streamslr packed the linears, but the shards hold none that fit")
    if missing := sorted(name for name in dense if without_numbers(name) in packed):
        raise InputError(
            f"the shards hold no {missing[0]} ({len(missing)} such linears): the folder is unfinished or "
            f"incomplete; `streamslr verify` tells more"
        )
