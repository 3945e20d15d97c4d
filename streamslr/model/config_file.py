"""config.json of a model: as transformers reads it, and how another tool quantized the weights."""

import logging
from typing import Any

import msgspec
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from streamslr.errors import InputError
from streamslr.model.border import refusing
from streamslr.model.bounds import refuse_huge_counts
from streamslr.model.quantization import ENTRIES, Quantization, read_quantization
from streamslr.model.sources import CONFIG_FILE, ModelSource
from streamslr.outside import parse_loose_json

log = logging.getLogger("streamslr")


class _Config(msgspec.Struct):
    """Entries of config.json that are read before transformers reads it."""

    model_type: str | None = None
    architectures: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    compression_config: dict[str, Any] | None = None
    auto_map: Any = None


def parse_config(raw: bytes, source: ModelSource) -> tuple[PretrainedConfig, dict[str, Any], Quantization | None]:
    """Return config.json as transformers reads it, its JSON, and how another tool quantized the weights.

    In the JSON, a model_type that transformers does not know is replaced by that of the class that it names.

    Raises:
        InputError: the file cannot be read, or the model is unknown to transformers.
    """
    try:
        content = parse_loose_json(raw)
        config = msgspec.convert(content, _Config)
    except (ValueError, msgspec.MsgspecError) as error:
        raise InputError(
            f"config.json of {source.label} is not JSON that describes a model ({error}); download it again"
        ) from error
    refuse_huge_counts(content, source.label)
    quantization = read_quantization(content, source.label)
    known = config.model_type in CONFIG_MAPPING
    model_type = config.model_type if known else _type_by_class(config)
    if model_type is None:
        if config.auto_map is not None:
            raise InputError(
                f"{source.label} (model_type {config.model_type!r}) brings its own modelling code, which streamslr "
                f"does not run; use a model whose architecture is part of transformers"
            )
        raise InputError(
            f"transformers does not know model_type {config.model_type!r} of {source.label}; update transformers, or "
            f"check config.json"
        )
    what = f"transformers cannot use config.json of {source.label} (model_type {config.model_type!r})"
    with refusing(what, "download it again, or update transformers"):
        parsed: PretrainedConfig
        if known:  # from the file again: AutoConfig also knows what older versions of transformers wrote
            folder = str(source.fetch(CONFIG_FILE).parent)
            parsed = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        else:
            content["model_type"] = model_type
            parsed = CONFIG_MAPPING[model_type].from_dict(content)
            log.warning(
                "transformers does not know model_type %r of %s, but its class %s: it is taken for a %s, and the "
                "output's config.json says so",
                *(config.model_type, source.label, (config.architectures or [""])[0], model_type),
            )
    if quantization is not None:  # or transformers would ask its own quantizer
        text = parsed.get_text_config()
        for part in (parsed, text) if isinstance(text, PretrainedConfig) else (parsed,):
            for name in ENTRIES:
                vars(part).pop(name, None)
    return parsed, content, quantization


def _type_by_class(config: _Config) -> str | None:
    """Return the model_type of the class of transformers that `architectures` names; None where it is none.

    A model of an existing architecture may bring code and a type of its own, so that engines can tell it (Kimi K2).
    """
    found = getattr(transformers, config.architectures[0], None) if config.auto_map and config.architectures else None
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        return None
    model_type = getattr(found.config_class, "model_type", None)
    return model_type if model_type in CONFIG_MAPPING else None
