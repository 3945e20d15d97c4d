"""The readers of an export, asked before it is written: transformers and PEFT open it on meta, by their own rules."""

import logging
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from streamslr.errors import InputError
from streamslr.io.folder import config_bytes
from streamslr.io.safetensors_file import TensorInfo, TensorSource
from streamslr.model.border import refusing
from streamslr.model.meta_model import build_on_meta
from streamslr.model.sources import CONFIG_FILE
from streamslr.results.fused_experts import fuse_experts
from streamslr.runtime.stored_model import StoredModel, require_complete

LORA_PREFIX = "base_model.model."
"""Beginning of every name in an adapter of PEFT, before the module path."""

log = logging.getLogger("streamslr")


def open_on_meta(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Iterable[TensorSource]]
) -> tuple[PreTrainedModel, dict[str, tuple[TensorSource, ...]]]:
    """Return the model that transformers builds from a config.json, on meta, and the tensors that fill it.

    Args:
        folder: Folder that is going to be written, for error messages.
        config: Its config.json.
        tensors: Its tensors, by the file of the compressed folder that they come from, experts taken apart.

    Returns:
        The model, and the tensors by file as the model takes them (`fuse_experts`).

    Raises:
        InputError: transformers does not read the configuration, or names, shapes or dtypes do not fit its model.
    """
    with tempfile.TemporaryDirectory(prefix="streamslr-config-") as made:
        (Path(made) / CONFIG_FILE).write_bytes(config_bytes(config))
        what = f"transformers does not read the config.json that {folder} would get"
        with refusing(what, "update transformers, or compress the model again"):
            parsed = AutoConfig.from_pretrained(made, trust_remote_code=False, local_files_only=True)
    model = build_on_meta(parsed, torch.float32, _infos(tensors))
    fused = fuse_experts(model, tensors)
    require_complete(model, StoredModel(folder, _infos(fused), {}, advice="nothing was exported"))
    return model, fused


def _infos(tensors: Mapping[str, Iterable[TensorSource]]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, dtype, tuple(shape), file, torch.Size(shape).numel() * dtype.itemsize)
        for file, sources in tensors.items()
        for name, dtype, shape, _ in sources
    }


def try_adapter(model: nn.Module, config: Mapping[str, Any], tensors: Iterable[TensorSource]) -> None:
    """Have PEFT put an adapter on a model on meta, and compare its names and shapes with the tensors.

    Without PEFT a warning says that it was not tried.

    Args:
        model: The base model; PEFT changes it.
        config: The adapter_config.json.
        tensors: The tensors of the adapter.

    Raises:
        InputError: PEFT refuses the adapter, or would not find its tensors.
    """
    try:
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    except ImportError:
        log.warning("PEFT is not installed here: it was not tried whether it takes the adapter (pip install peft)")
        return
    advice = "export it --to dense, or load it with streamslr.load"
    # Without the base's name, which the model on meta does not have.
    settings = {name: value for name, value in config.items() if name not in ("peft_type", "base_model_name_or_path")}
    with refusing("PEFT refuses an adapter for this model", advice):  # it has rules of its own for some architectures
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's calls of transformers, nothing for the user
            adapted: Any = get_peft_model(model, LoraConfig(**settings), low_cpu_mem_usage=True)
        state_dict = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    needed = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    there = {name: tuple(shape) for name, _, shape, _ in tensors}
    if wrong := sorted(name for name in needed.keys() | there.keys() if needed.get(name) != there.get(name)):
        raise InputError(
            f"PEFT needs {wrong[0]} as {needed.get(wrong[0])}, the adapter would hold it as {there.get(wrong[0])} "
            f"({len(wrong)} such tensors); {advice}"
        )
