"""Every private part of transformers that streamslr uses: the one file to open when transformers changes.

Private means that `from transformers import NAME` does not give it, or that its name begins with an underscore. Checked
against transformers 5.16.1 and 5.23. transformers 4 does not convert weights while it reads them and is not supported.

`runtime/loader.py` imports this file while transformers itself is being imported. Imports at the top must therefore not
need `transformers.quantizers` or `transformers.modeling_utils`; those are imported where they are used.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import __version__ as transformers_version
from transformers import logging as transformers_logging

# Since 5.0: the renamings and fusions between a checkpoint's keys and a model's parameters, which `from_pretrained`
# applies while it loads and `save_pretrained` reverts.
from transformers.conversion_mapping import get_model_conversion_mapping as all_conversions
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)

# Keeps `_init_weights` off tensors that a checkpoint gave.
from transformers.initialization import guard_torch_init_functions

# In 5.0 already: a linear whose weight is stored transposed, [d, o].
from transformers.pytorch_utils import Conv1D

# In 5.0 already: the base class of a quantization method's entry in config.json.
from transformers.utils.quantization_config import QuantizationConfigMixin

from streamslr.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.loading_report import LoadStateDictInfo
else:

    def __getattr__(name: str) -> Any:
        """Import the seam for quantization methods of other packages when it is asked for (PEP 562); in 5.0 already.

        An import at the top would be circular: as soon as transformers.quantizers.auto has run, runtime/register.py
        imports runtime/loader.py, which asks this file for these names.
        """
        if name in ("HfQuantizer", "register_quantization_config", "register_quantizer"):
            from transformers.quantizers import auto

            return getattr(auto, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Conv1D",
    "HfQuantizer",
    "QuantizationConfigMixin",
    "WeightRenaming",
    "WeightTransform",
    "begin_loading",
    "end_loading",
    "experts_on_meta",
    "get_model_conversion_mapping",
    "guard_torch_init_functions",
    "initializers",
    "load_converted",
    "quiet_transformers",
    "register_quantization_config",
    "register_quantizer",
    "rename_source_key",
    "revert_weight_conversion",
    "uses_eager_attention",
]


def get_model_conversion_mapping(model: "PreTrainedModel") -> list[WeightTransform]:
    """Return the renamings and fusions between a checkpoint's keys and a model's parameters.

    A fusion that the whole model and a decoder in it both have (Kimi K2.6) is there once, for the whole model.
    """
    found: list[WeightTransform] = []
    for made in all_conversions(model):
        again = isinstance(made, WeightConverter) and any(
            isinstance(other, WeightConverter)
            and getattr(other, "scope_prefix", None) is None
            and other.source_patterns == made.source_patterns
            and other.target_patterns == made.target_patterns
            for other in found
        )
        if not again:
            found.append(made)
    return found


def load_converted(
    model: "PreTrainedModel",
    tensors: Mapping[str, Tensor | Callable[[], Tensor]],
    conversions: Iterable[WeightTransform],
    dtype: torch.dtype,
    device: torch.device,
) -> "LoadStateDictInfo":
    """Set the parameters that some of a checkpoint's tensors become, as `from_pretrained` does for all of them.

    `LoadStateDictConfig` holds the dtype plan since 5.8 at the latest; 5.0 took it as an argument of its own.

    Args:
        model: the model; parameters that the tensors do not become stay as they are.
        tensors: checkpoint key -> tensor on the CPU, or a function that makes it; one of these is at work at a time.
        conversions: renamings and fusions, `get_model_conversion_mapping` or fewer.
        dtype: dtype of loaded parameters, except for those that the model keeps in float32.
        device: device of loaded parameters.

    Returns:
        transformers' report: missing_keys, mismatched_keys, conversion_errors.
    """
    from transformers.modeling_utils import LoadStateDictConfig

    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=list(conversions),  # type: ignore[arg-type]  # declared narrower than what it is given
    )
    lock = threading.Lock()
    values = {key: _Deferred(value, lock) if callable(value) else value for key, value in tensors.items()}
    info: LoadStateDictInfo = convert_and_load_state_dict_in_model(model, values, config)[0]
    return info


class _Deferred:
    """A tensor made when the loader asks for it: its threads call `value[...].to(device=…, dtype=…)`."""

    def __init__(self, make: Callable[[], Tensor], lock: threading.Lock) -> None:
        self._make, self._lock = make, lock

    def __getitem__(self, _: Any) -> "_Deferred":
        return self

    def to(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        with self._lock:
            return self._make().to(device=device, dtype=dtype)


def begin_loading(quantizer: "HfQuantizer") -> None:
    """Let transformers before 5.21 cast the weights that it renames; call `end_loading` once they are loaded.

    These versions keep the checkpoint's dtype for renamed weights if the checkpoint is quantized: the head of a
    gpt_neox would stay in bf16 in a model loaded as float32. Since 5.21 the quantizer chooses (`get_new_dtype`).
    """
    quantizer.pre_quantized = hasattr(quantizer, "get_new_dtype")


def end_loading(quantizer: "HfQuantizer", integers: Mapping[str, Tensor]) -> None:
    """Undo `begin_loading`.

    Args:
        quantizer: the quantizer.
        integers: path of each packed linear -> one of its integer tensors.

    Raises:
        InputError: transformers before 5.21 cast integers of a linear that the model keeps in float32.
    """
    quantizer.pre_quantized = True
    if cast := [path for path, tensor in integers.items() if tensor.is_floating_point()]:
        raise InputError(
            f"transformers {transformers_version} does not load {cast[0]} packed, which this model keeps in float32: "
            "update transformers to 5.21 or newer, or load the model in float32"
        )


def initializers(model: "PreTrainedModel") -> Iterator[tuple[nn.Module, Callable[[], None]]]:
    """Yield each module with what fills its tensors, in the order in which `from_pretrained` fills those not loaded.

    Modules come after those that they hold. Each is filled by the innermost model around it. Parameters that a
    checkpoint gave keep their values, within `guard_torch_init_functions`.
    """
    from transformers import PreTrainedModel

    seen: set[nn.Module] = set()

    def visit(module: nn.Module, around: PreTrainedModel) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
        for child in module.children():
            yield from visit(child, child if isinstance(child, PreTrainedModel) else around)
        if module not in seen:
            seen.add(module)
            yield module, partial(around._init_weights, module)

    yield from visit(model, model)


def uses_eager_attention(config: "PretrainedConfig") -> bool:
    """Return True when attention writes its weights [b, heads, T, T] out instead of running as one fused kernel."""
    return bool(config._attn_implementation == "eager")


@contextmanager
def experts_on_meta(model: "PreTrainedModel") -> Iterator[None]:
    """Have fused experts computed in a way that runs on the meta device in every dtype; grouped products do not."""
    if not hasattr(model, "get_experts_implementation"):  # before 5.23
        yield
        return
    before = model.get_experts_implementation()
    with quiet_transformers():
        model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        with quiet_transformers():
            model.set_experts_implementation(before)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and advice, which are about loading a whole model."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
