"""A compressed folder loaded as a model of transformers, through `from_pretrained`; its linears stay packed."""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from streamslr.errors import BudgetError, InputError, first_line, says_out_of_memory
from streamslr.io.folder import require_as_written
from streamslr.io.packed_layout import QUANT_METHOD, read_quantization_config, shard_metadata
from streamslr.model.border import refusing
from streamslr.model.transformers_compat import (
    HfQuantizer,
    QuantizationConfigMixin,
    begin_loading,
    end_loading,
    get_model_conversion_mapping,
    register_quantization_config,
    register_quantizer,
    revert_weight_conversion,
)
from streamslr.run.journal import JOURNAL_FILE, JournalState, read_journal
from streamslr.runtime.linear import SparseLowRankLinear
from streamslr.runtime.stored_model import (
    StoredModel,
    read_stored_model,
    require_complete,
    require_same_kinds_packed,
    require_sound_positions,
)
from streamslr.spec.pattern import MIXED

# This file is imported while transformers is being imported (runtime/register.py), when AutoModelForCausalLM and
# PreTrainedModel are not there yet. What needs them is imported inside functions, streamslr's own files included.
if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger("streamslr")


def load(
    folder: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    keep_dense: bool = False,
    verify: bool = False,
    revision: str | None = None,
) -> "PreTrainedModel":
    """Load a compressed folder (or hub id) as a model whose linears are `SparseLowRankLinear`, packed in memory.

    Peak host memory is the packed model and one shard. Names, shapes, dtypes and the columns that S keeps are checked
    against the index, the journal and the model; digests of the files only with `verify`.

    Args:
        folder: compressed folder, or hub id of one.
        device: "cpu", "cuda", … [default: cuda where there is one].
        dtype: dtype of every floating-point tensor [default: that of config.json; as stored where it names none].
        device_map: in place of device, as in `from_pretrained`.
        keep_dense: hold every S dense too. The model is then as fast as the dense model, for the dense model's memory
            on top: for CPUs, where unpacking costs time.
        verify: read every file first and compare it with its digest in the journal.
        revision: branch, tag or commit of a hub model.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: streamslr did not write the folder, the folder is unfinished or damaged, or an argument cannot take
            effect.
        BudgetError: the model does not fit the memory.
        HubError: the hub could not be reached.
    """
    _check_arguments(device, dtype, device_map)
    name = str(Path(folder).expanduser())
    commit, state = _prepare_files(folder, revision, verify)
    config = _read_config(name, commit, state)
    if device_map is None:
        device_map = {"": torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))}
    model = _from_pretrained(config, name, revision=commit, dtype=dtype or "auto", device_map=device_map)
    if keep_dense:
        for linear in packed_modules(model).values():
            linear.keep_dense()
    return model


def read_loadable(folder: str, revision: str | None = None) -> StoredModel:
    """Return what a compressed folder or hub id stores, after all checks of `load`: for engines, which load otherwise.

    Of the weights only `meta` and `row_offsets` are read. Of a hub repository every shard is fetched.

    Raises:
        InputError: `load` would refuse the folder.
        HubError: the hub could not be reached.
    """
    from streamslr.model.checkpoint import open_checkpoint
    from streamslr.model.meta_model import build_on_meta

    commit, state = _prepare_files(folder, revision, verify=False)
    config = _read_config(folder, commit, state)
    checkpoint = open_checkpoint(folder, commit)
    model = build_on_meta(checkpoint.config, torch.float32, checkpoint.tensors)
    files = [str(checkpoint.fetch_file(shard)) for shard in checkpoint.shards]
    return pack_on_meta(model, files, config.quantization_config)


def _read_config(folder: str, commit: str | None, state: JournalState | None) -> "PretrainedConfig":
    """Return config.json of a compressed folder or hub id. Raises InputError where it is not the journal's, or none."""
    from transformers import AutoConfig

    with refusing(f"{folder} holds no model that transformers knows", "check config.json, or update transformers"):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, revision=commit, trust_remote_code=False)
    if read_quantization_config(config) is None:
        raise InputError(
            f"{folder} was not written by streamslr; load it with AutoModelForCausalLM.from_pretrained, "
            f"or compress it with `streamslr run`"
        )
    text = config.get_text_config()
    depth = getattr(text, "num_hidden_layers", None)  # of some models that of the halves of their blocks
    if state and state.blocks_total not in (depth, getattr(text, "num_layers", depth)):  # before all are built
        raise InputError(
            f"config.json of {folder} speaks of {depth} blocks, the journal of {state.blocks_total}: one of them is "
            f"damaged; copy both again"
        )
    return config


def _check_arguments(
    device: str | torch.device | None, dtype: str | torch.dtype | None, device_map: str | Mapping[str, Any] | None
) -> None:
    """Raise InputError for arguments of `load` that cannot hold."""
    if device is not None and device_map is not None:
        raise InputError(f"device {device!s} and device_map {device_map!r} cannot both hold; give one of them")
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!s}, but torch sees no GPU here; leave device out, or give cpu")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype {dtype!r} is none of torch's; give bfloat16, float16 or float32")


def _from_pretrained(config: "PretrainedConfig", name: str, **arguments: Any) -> "PreTrainedModel":
    """Load a model with transformers, whose errors become errors that say what to do; refuse an incomplete one."""
    from streamslr.model.meta_model import auto_class

    try:
        with refusing(f"transformers cannot load {name}", "`streamslr verify` tells more"):
            # Values of S are buffers, which accelerate leaves on the GPU unless it is told to offload them too.
            loaded: Any = auto_class(config).from_pretrained(
                name, offload_buffers=True, output_loading_info=True, trust_remote_code=False, **arguments
            )
    except (MemoryError, ImportError, RuntimeError, OSError) as error:
        if not says_out_of_memory(error):
            raise
        raise BudgetError(f"{name} does not fit the memory ({first_line(error)}); give a device_map") from error
    model: PreTrainedModel
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{name} lacks {missing[0]} ({len(missing)} such tensors); `streamslr verify` tells more")
    return model


def _prepare_files(folder: str | Path, revision: str | None, verify: bool) -> tuple[str | None, JournalState | None]:
    """Find the folder or hub repository; return the repository's commit, None for a folder, and the journal.

    Of a hub repository the journal is fetched, so that it lies beside the shards when they are loaded.

    Args:
        folder: compressed folder, or hub id of one.
        revision: branch, tag or commit of a hub model.
        verify: compare every file with its digest in the journal.

    Raises:
        InputError: there is no such folder, or a file is not as the journal says.
        HubError: the hub could not be reached.
    """
    from streamslr.model.sources import HubRepo, find_source

    source = find_source(str(folder), revision)
    state = read_journal(source.fetch(JOURNAL_FILE).parent) if JOURNAL_FILE in source.files else None
    if verify:
        if state is None:
            raise InputError(f"{folder} has no {JOURNAL_FILE} to verify it against; leave verify out")
        state.require_complete(source.fetch(JOURNAL_FILE).parent)
        for file, digest in state.digests.items():
            require_as_written(source.fetch(file), digest)
    return source.commit if isinstance(source, HubRepo) else None, state


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


def pack_on_meta(model: "PreTrainedModel", files: list[str] | None, entry: object) -> StoredModel:
    """Put packed linears into a model on meta, once the files are found to hold all that it needs and no more.

    Args:
        model: the model that config.json describes, on meta.
        files: the shards.
        entry: `quantization_config` of config.json.

    Returns:
        The tensors of the files.

    Raises:
        InputError: they are not; or what `read_stored_model` raises.
    """
    from streamslr.model.bounds import require_modest_buffers
    from streamslr.model.buffers import check_buffers
    from streamslr.model.experts import unfuse
    from streamslr.model.parameter_names import find_modules
    from streamslr.model.transposed import linear_shape

    stored = read_stored_model(files)
    require_modest_buffers(dict(model.named_non_persistent_buffers()), stored.tensors)
    check_buffers(model)
    unfuse(model, get_model_conversion_mapping(model), stored.tensors)
    linears = {name: shape for name, module in model.named_modules() if (shape := linear_shape(module))}
    names = find_modules(model, stored.linears, linears)
    if unknown := [path for path in stored.linears if path not in names]:
        raise InputError(
            f"the shards hold {unknown[0]} ({len(unknown)} such linears), which {type(model).__name__} lacks: "
            "config.json is of another model, or another version of transformers wrote the folder"
        )
    for path, name in names.items():
        (o, d), (pattern, shape), values = linears.pop(name), stored.linears[path], stored.value_format(path)
        if shape != (o, d):
            raise stored.refuse(f"{path} is {shape[0]}x{shape[1]}, config.json asks for {o}x{d}")
        linear = model.get_submodule(name)
        model.set_submodule(
            name,
            SparseLowRankLinear(
                d,
                o,
                pattern,
                stored.rank(path),
                bias=linear.bias is not None,
                nonzeros=stored.parts(path)["values"].shape[0] * (1 if values is None else 8 // values.bits),
                dtype=linear.get_parameter("weight").dtype,
                device="meta",
                values=values,
                low_rank=torch.int8 if "low_rank_scales" in stored.parts(path) else None,
            ),
        )
    require_same_kinds_packed(set(packed_modules(model)), set(linears))
    packed = read_quantization_config({"quantization_config": entry})
    if packed and packed.rank and not any(stored.rank(path) for path in names):
        raise stored.refuse(f"no linear has U and V, config.json says rank {packed.rank}")
    require_complete(model, stored)
    require_sound_positions(stored)
    return stored


@register_quantizer(QUANT_METHOD)
class StreamslrQuantizer(HfQuantizer):
    """Part of `from_pretrained` that replaces linears by packed ones before any weight is read."""

    requires_calibration = True  # transformers cannot make packed weights from dense ones

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        pack_on_meta(model, checkpoint_files, self.quantization_config)
        begin_loading(self)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        linears = packed_modules(model)
        end_loading(self, {path: linear.meta for path, linear in linears.items()})
        kernels = Counter(linear.kernel for linear in linears.values())
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
