"""A compressed folder -> a model of transformers, through `from_pretrained`, packed all the way."""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from streamslr.errors import InputError, first_line
from streamslr.io.shards import MIXED, QUANT_METHOD, packed_linears, read_quantization_config, shard_metadata
from streamslr.runtime.linear import SparseLowRankLinear

# No more of transformers up here: this module is imported while transformers is (runtime/register.py).
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from streamslr.model.checkpoint import TensorInfo
    from streamslr.spec.pattern import SparsityPattern

log = logging.getLogger("streamslr")


def load(
    folder: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    keep_dense: bool = False,
) -> "PreTrainedModel":
    """The model of a compressed folder (or hub id), its linears `SparseLowRankLinear`, packed in memory.

    device: "cpu", "cuda", … [default: cuda where there is one]; or device_map, as in `from_pretrained`.
    dtype: of every floating-point tensor [default: as stored]. keep_dense: also hold every S dense, which costs
    the dense model's memory on top and is as fast as the dense model; for CPUs, where unpacking costs time.
    Peak host memory is the packed model and one shard. Raises InputError for a folder that streamslr did not
    write, or that is unfinished; the bytes themselves are checked by `streamslr verify`, not here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

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
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype or "auto", device_map=device_map, offload_buffers=True
    )  # S is in buffers, which accelerate leaves on the GPU unless it is told to offload them too
    if keep_dense:
        for linear in packed_modules(model).values():
            linear.keep_dense()
    return model


def packed_modules(model: nn.Module) -> dict[str, SparseLowRankLinear]:
    """The compressed linears of a model, by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLowRankLinear)}


@register_quantization_config(QUANT_METHOD)
class StreamslrConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed folder's config.json; InputError when it is damaged or too new."""

    def __init__(self, **entry: Any) -> None:
        vars(self).update(entry | {"quant_method": QUANT_METHOD})
        packed = read_quantization_config({"quantization_config": vars(self)})
        assert packed is not None
        self.format_version, self.rank, self.pattern = packed.format_version, packed.rank, str(packed.pattern or MIXED)


@register_quantizer(QUANT_METHOD)
class StreamslrQuantizer(HfQuantizer):
    """Has `from_pretrained` put packed linears where the folder stores them, before any weight is read."""

    requires_calibration = True  # transformers cannot make such weights on the fly

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        from streamslr.model.experts import names_in, unfuse

        stored, patterns = _stored(checkpoint_files)
        unfuse(model, get_model_conversion_mapping(model), stored)
        packed = read_quantization_config({"quantization_config": self.quantization_config})
        assert packed is not None
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        paths = [key.removesuffix(".meta") for key in stored if key.endswith(".meta")]
        names = names_in(model, paths, linears)
        if strangers := [path for path in paths if path not in names]:
            raise InputError(
                f"the shards hold {strangers[0]} ({len(strangers)} such linears), which {type(model).__name__} lacks: "
                "config.json is of another model, or another version of transformers wrote the folder"
            )
        for path, name in names.items():
            if f"{path}.values" not in stored:
                raise InputError(f"the shards hold {path}.meta without its values; `streamslr verify` tells more")
            linear = linears.pop(name)
            pattern = patterns.get(path, packed.pattern)
            if pattern is None:
                raise InputError(f"no shard's header says what pattern {path} has; copy the folder again")
            rank = stored[f"{path}.U"].shape[1] if f"{path}.U" in stored else 0
            model.set_submodule(
                name,
                SparseLowRankLinear(
                    linear.in_features,
                    linear.out_features,
                    pattern,
                    rank,
                    bias=linear.bias is not None,
                    nonzeros=stored[f"{path}.values"].shape[0],
                    dtype=linear.weight.dtype,
                    device="meta",
                ),
            )
        _require_whole(model, set(linears))

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        ways = Counter(linear.kernel for linear in packed_modules(model).values())
        log.info("packed linears: %s", "; ".join(f"{count} {way}" for way, count in ways.most_common()))

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[None, dict[str, str]]:
        """What `save_pretrained` puts in its shards' headers, so that `streamslr eval` reads its folders too."""
        from transformers.core_model_loading import revert_weight_conversion

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
    def is_qat_trainable(self) -> bool:  # U, V, norms and biases train without an adapter
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _stored(files: list[str] | None) -> "tuple[dict[str, TensorInfo], dict[str, SparsityPattern]]":
    """Every tensor of the shards, and the pattern of every linear, from their headers.

    Raises InputError for damaged ones, and an unfinished run.
    """
    from streamslr.model.checkpoint import shard_header
    from streamslr.run.journal import read_journal

    if not files:
        raise InputError("a compressed model is loaded from its folder; a state_dict alone does not do")
    for folder in {Path(file).parent for file in files}:
        if state := read_journal(folder):
            state.require_complete(folder)
    stored = {name: info for file in files for name, info in shard_header(Path(file)).items()}
    patterns = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            patterns.update({name: pattern for name, (pattern, _) in packed_linears(opened.metadata()).items()})
    return stored, patterns


def _require_whole(model: nn.Module, dense: set[str]) -> None:
    """Raises InputError when a linear is dense whose like is packed in another block: shards are missing."""

    def anywhere(name: str) -> str:
        return ".".join("*" if part.isdigit() else part for part in name.split("."))

    packed = {anywhere(name) for name in packed_modules(model)}
    if not packed:
        raise InputError("config.json says that streamslr packed the linears, but the shards hold none that fit")
    if missing := sorted(name for name in dense if anywhere(name) in packed):
        raise InputError(
            f"the shards hold no {missing[0]} ({len(missing)} such linears): the folder is unfinished or "
            f"incomplete; `streamslr verify` tells more"
        )
