"""Files beside config.json and the weights: which travel with a model, and which would make it another one."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from streamslr.errors import InputError
from streamslr.io.packed_layout import INDEX_FILE
from streamslr.model.quantization import ENTRIES, without_quantization
from streamslr.model.sources import CONFIG_FILE, ModelSource

ADAPTER_FILE = "adapter_config.json"
"""File of PEFT. Where it is, transformers loads the model that it names, and puts its adapter on top."""
_QUANTIZED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Descriptions of weights that ModelOpt, AutoGPTQ and AutoAWQ quantized; config.json may say nothing of it."""
_OF_OTHER_FILES = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "params.json",
    "trainer_state.json",
    "training_args.json",
)
"""Descriptions of files that no output holds: the pooling of sentence-transformers, Mistral's consolidated weights,
a training."""
TOKENIZER_TEXTS = ("merges.txt", "vocab.txt")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")

log = logging.getLogger("streamslr")


def is_auxiliary(name: str) -> bool:
    """Tell if a file belongs beside the weights in a copy of the model."""
    if name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")):
        return True
    others = (CONFIG_FILE, "streamslr.json", *_OF_OTHER_FILES, *_QUANTIZED_FILES)
    if name.startswith(".") or name in others or ".index." in name:
        return False
    # Of .txt files only these are a tokenizer's; others may be anything, and large.
    return name in TOKENIZER_TEXTS or name.endswith((".json", ".model", ".jinja", ".tiktoken"))


def refuse_other_model(source: ModelSource, config: Mapping[str, Any]) -> None:
    """Refuse a model that config.json and the safetensors alone do not describe; log what is not read.

    Args:
        source: the model's files.
        config: config.json.

    Raises:
        InputError: an adapter, a quantization or another file of weights changes what the model is.
    """
    if ADAPTER_FILE in source.files:
        raise InputError(
            f"{source.label} holds {ADAPTER_FILE}: transformers would put an adapter on the model, and streamslr does "
            f"not. Merge it once, peft.AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()"
            f".save_pretrained(...), or take the adapter's files out of the folder"
        )
    found = next((name for name in _QUANTIZED_FILES if name in source.files), None)
    if found and not config.get("quantization_config"):
        raise InputError(
            f"{source.label} holds {found}: its weights are quantized already; give the original model in bf16, fp16 "
            f"or fp32 (or take that file out, if it is not of these weights)"
        )
    if part := next(_quantized_parts(without_quantization(config)), None):
        raise InputError(
            f"{source.label} is already quantized ({part} of config.json says so); give the original model in bf16, "
            f"fp16 or fp32"
        )
    if config.get("auto_map"):
        log.warning(
            "%s names code of its own (auto_map), which is not run: the model is taken for transformers' %s",
            *(source.label, config.get("model_type")),
        )
    if weights := config.get("transformers_weights"):
        raise InputError(
            f"config.json of {source.label} has transformers read its weights from {weights!r}, which streamslr does "
            f"not; load the model once with transformers and save it again with save_pretrained"
        )
    if "model.safetensors" in source.files and INDEX_FILE in source.files:
        log.warning(
            "%s holds model.safetensors and %s: as transformers does, the first is read", source.label, INDEX_FILE
        )
    if unread := sorted(name for name in source.files if name.endswith(_OTHER_WEIGHTS)):
        log.info("%s: weights are read from safetensors, not from %s", source.label, ", ".join(unread))
    if left := sorted(set(_OF_OTHER_FILES) & set(source.files)):
        log.warning("%s: %s describe files that are neither read nor copied", source.label, ", ".join(left))


def _quantized_parts(config: object, path: str = "") -> Iterator[str]:
    """Yield the parts of config.json whose entry speaks of a quantization."""
    if isinstance(config, dict):
        for name, value in config.items():
            if name in ENTRIES and value:
                yield f"{path}{name}"
            yield from _quantized_parts(value, f"{path}{name}.")
