"""Names of a model's parameters: the checkpoint keys they are made of, their stored names, the blocks they are in."""

import logging
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn
from transformers import Concatenate, PreTrainedModel, WeightConverter

from streamslr.errors import InputError
from streamslr.io.packed_layout import without_numbers
from streamslr.model.checkpoint import Checkpoint
from streamslr.model.transformers_compat import (
    WeightRenaming,
    WeightTransform,
    get_model_conversion_mapping,
    rename_source_key,
)

log = logging.getLogger("streamslr")


class ParameterNames:
    """Names of one model's parameters and buffers, found from the model on the meta device and the checkpoint's keys.

    A key names a tensor of the checkpoint, a parameter (or buffer) one of the model. A parameter is stored again under
    its stored name.

    Attributes:
        block_names: module path of each block.
        meta: every parameter and buffer of the model -> its tensor on the meta device.
        computed: buffers that no checkpoint holds: rotary tables …
        sources: parameter or persistent buffer -> the keys it is made of; several where transformers fuses them.
        stored: parameter or persistent buffer -> its stored name: its key, so that whatever reads the checkpoint reads
            what is stored; the name in the model where transformers fuses or splits keys.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        block_names: tuple[str, ...],
        conversions: Sequence[WeightTransform],
        keys: Iterable[str],
    ) -> None:
        """Find the names; no tensor is read.

        Args:
            model: the model, every parameter on meta.
            block_names: module path of each block.
            conversions: how transformers renames and fuses keys.
            keys: the checkpoint's keys.
        """
        computed = dict(model.named_non_persistent_buffers())
        self.block_names = block_names
        self.computed = tuple(computed)
        self.meta: dict[str, Tensor] = model.state_dict() | computed
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._base_prefix = model.base_model_prefix
        self.sources: Mapping[str, tuple[str, ...]] = self.find_sources(keys)
        own_key = {name: key for name in self.sources if (key := self.own_key(name))}
        self.stored: Mapping[str, str] = {name: own_key.get(name, name) for name in self.sources}
        self._parameter = {stored: name for name, stored in self.stored.items()}

    # From keys to parameters

    def parameters_of(self, key: str) -> tuple[str, ...]:
        """Return the parameters that a key becomes; several where transformers splits it. The model may lack them."""
        name, pattern = self._rename(key)
        if pattern is None:
            return (name,)
        parts = next(c for c in self._converters if pattern in c.source_patterns).target_patterns
        return tuple(name.replace(parts[0], part) for part in parts)

    def _rename(self, key: str) -> tuple[str, str | None]:
        """Return the parameter that a key becomes, and the pattern of the conversion that makes it; None if none."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._base_prefix, self.meta)
        if name not in self.meta and key in self.meta:  # as transformers' loader does
            return rename_source_key(key, [], [], self._base_prefix, self.meta)
        return name, pattern

    def find_sources(self, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return the keys, of those given, that each parameter of the model is made of."""
        sources: dict[str, tuple[str, ...]] = {}
        for key in keys:
            for name in self.parameters_of(key):
                if name in self.meta:
                    sources[name] = (*sources.get(name, ()), key)
        return sources

    def own_key(self, name: str) -> str | None:
        """Return the one key that a parameter is as it is stored; None where transformers makes it of keys."""
        keys = self.sources[name]
        return keys[0] if len(keys) == 1 and self._rename(keys[0])[1] is None else None

    def made_of(self, name: str) -> tuple[tuple[str, ...], WeightConverter | None]:
        """Return the keys that a parameter is made of, in the order of the conversion that makes it, and that one.

        No key where the checkpoint lacks one; no conversion where the parameter is as it is stored.
        """
        keys = {self._rename(key)[1]: key for key in self.sources.get(name, ())}
        if not keys.keys() - {None}:
            return tuple(keys.values()), None
        converter = next(c for c in self._converters if keys.keys() & set(c.source_patterns))
        complete = keys.keys() == set(converter.source_patterns)
        return tuple(keys[pattern] for pattern in converter.source_patterns) if complete else (), converter

    def joined_keys(self, name: str) -> tuple[int, tuple[str, ...]] | None:
        """Return the dimension along which a parameter is its keys joined, and these in order; None where it is not."""
        keys = {self._rename(key)[1]: key for key in self.sources[name]}
        for converter in self._converters:
            steps = converter.operations
            if keys.keys() == set(converter.source_patterns) and len(steps) == 1 and isinstance(steps[0], Concatenate):
                dim: int = steps[0].dim
                return dim, tuple(keys[pattern] for pattern in converter.source_patterns)
        return None

    def keys_by_block(self, keys: Iterable[str]) -> dict[int | None, list[str]]:
        """Return the keys of each block; under None every other key, those included that the model has no use for."""
        by_block: dict[int | None, list[str]] = {i: [] for i in (None, *range(len(self.block_names)))}
        for key in keys:
            by_block[self.block_of(self.parameters_of(key)[0])].append(key)
        return by_block

    # Parameters, their blocks and stored names

    def block_of(self, name: str) -> int | None:
        """Return the block that a parameter or buffer belongs to; None outside the blocks."""
        prefix = self.block_names[0].removesuffix("0")
        index = name.removeprefix(prefix).partition(".")[0]
        inside = name.startswith(prefix) and index.isdigit() and int(index) < len(self.block_names)
        return int(index) if inside else None

    def in_block(self, block: int | None) -> list[str]:
        """Return the parameters and persistent buffers of a block; those outside the blocks for None."""
        return [n for n in self.meta if n not in self.computed and self.block_of(n) == block]

    def shared_in_depth(self, model: PreTrainedModel) -> dict[str, str]:
        """Return the parameters of a block that are those of another block -> their names there, from the ties."""
        blocks = {n: (self.block_of(n), self.block_of(owner)) for n, owner in model.all_tied_weights_keys.items()}
        return {n: model.all_tied_weights_keys[n] for n, (a, b) in blocks.items() if None not in (a, b) and a != b}

    def stored_linear(self, path: str) -> str:
        """Return the name that a linear is stored under; the same as its module path where the model lacks it."""
        return self.stored.get(f"{path}.weight", f"{path}.weight").removesuffix(".weight")

    def module_path(self, linear: str) -> str:
        """Return the module path of a linear by its stored name."""
        return self._parameter.get(f"{linear}.weight", f"{linear}.weight").removesuffix(".weight")

    def parameter(self, stored: str) -> str:
        """Return the parameter or persistent buffer by its stored name."""
        return self._parameter[stored]


def find_routers(model: PreTrainedModel, experts: Mapping[str, int]) -> set[str]:
    """Return the parameters that route tokens to experts, which stay dense and which nothing may change.

    A router stands beside experts and has one output for each of them, or one alone: the gate of shared experts.

    Args:
        model: the model.
        experts: module path of each group of experts -> number of experts.
    """
    routers = set()
    for path, number in experts.items():
        around = path.rpartition(".")[0]
        for name, parameter in model.get_submodule(around).named_parameters(prefix=around):
            if not name.startswith(f"{path}.") and parameter.shape[0] in (1, number):
                routers.add(name)
    return routers


def find_linears(
    block: nn.Module, path: str, names: ParameterNames, routers: Container[str]
) -> dict[str, tuple[int, int]]:
    """Return the linears of a block that are compressed, by stored name -> shape (o, d) of the weight.

    Args:
        block: the block.
        path: its module path.
        names: the model's names.
        routers: parameters that stay dense, from `find_routers`.
    """
    return {
        names.stored_linear(linear): (module.out_features, module.in_features)
        for linear, module in block.named_modules(prefix=path)
        if isinstance(module, nn.Linear) and f"{linear}.weight" not in routers
    }


def find_kinds(linears: Iterable[str], names: ParameterNames, experts: Container[str]) -> dict[str, str]:
    """Return the linears that are parts of an expert, by stored name -> kind, the same in every expert beside it.

    Args:
        linears: stored names.
        names: the model's names.
        experts: module path of each group of experts.
    """
    kinds = {}
    for name in linears:
        path, _, leaf = names.module_path(name).rsplit(".", 2)
        if path in experts:
            kinds[name] = f"{path}.*.{leaf}"
    return kinds


def find_modules(model: PreTrainedModel, stored: Iterable[str], modules: Container[str]) -> dict[str, str]:
    """Return the module path in `model` of each stored name; names that the model lacks are left out.

    A base model (AutoModel) lacks a prefix of the stored names, and a checkpoint may name modules in another way than
    transformers does.

    Args:
        model: a model of transformers.
        stored: names of modules as a checkpoint stores them.
        modules: module paths that may be returned.
    """
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name in stored:
        new = rename_source_key(f"{name}.weight", renamings, [])[0].removesuffix(".weight")
        candidates = (name, new, new.removeprefix(prefix), prefix + new)
        if path := next((candidate for candidate in candidates if candidate in modules), None):
            found[name] = path
    return found


def with_tied(model: PreTrainedModel, parameters: Iterable[str]) -> set[str]:
    """Return parameters of a model, and those that are tied to one of them."""
    found, tied = set(parameters), model.all_tied_weights_keys
    return found | {a for a, b in tied.items() if b in found} | {tied[a] for a in tied if a in found}


def check_headers(model: PreTrainedModel, names: ParameterNames, checkpoint: Checkpoint) -> None:
    """Check from headers alone that a checkpoint holds the parameters of the model.

    Raises:
        InputError: parameters are missing, are not floating point, or have another shape.
    """
    present = with_tied(model, names.sources)
    wanted = [name for name in names.meta if name not in names.computed]
    if missing := [name for name in wanted if name not in present]:
        blocks = {names.block_of(name) for name in missing} - {None}
        raise InputError(
            f"{checkpoint.model} lacks {len(missing)} of the {len(wanted)} parameters of its {type(model).__name__}, "
            f"first {missing[0]} ({len(blocks)} of {len(names.block_names)} blocks are not complete): "
            f"config.json is of another model, or a download or run did not finish"
        )
    for name, keys in names.sources.items():
        info, meta = checkpoint.tensors[keys[0]], names.meta[name]
        if not info.dtype.is_floating_point and meta.is_floating_point():
            raise InputError(
                f"{info.name} in {info.shard} is {info.dtype}, not floating point; give the original model in bf16, "
                f"fp16 or fp32"
            )
        if names.own_key(name) and info.shape != tuple(meta.shape):
            raise InputError(
                f"{info.name} in {info.shard} is {list(info.shape)}, config.json asks for {list(meta.shape)}: they "
                f"are of different models; download both again"
            )


def unread_parts(keys: Iterable[str], read: Container[str]) -> dict[str, int]:
    """Return the parts of a checkpoint that nothing reads: the path of each -> number of its tensors.

    A path is as short as it can be while all keys below it are unread: `mtp`, `model.visual`, `model.layers.61`. Of
    several that differ in numbers alone there is one, with a * for each number: `h.*.attn.bias`.

    Args:
        keys: every key of the checkpoint.
        read: the keys that are read.
    """
    keys = list(keys)
    shared = {path for key in keys if key in read for path in _paths(key)}
    parts: dict[str, int] = {}
    for key in keys:
        if key not in read:
            part = next((path for path in _paths(key) if path not in shared), key)
            parts[part] = parts.get(part, 0) + 1
    kinds = Counter(without_numbers(part) for part in parts)
    merged: dict[str, int] = {}
    for part, number in parts.items():
        kind = without_numbers(part)
        name = kind if kinds[kind] > 1 else part
        merged[name] = merged.get(name, 0) + number
    return merged


def _paths(key: str) -> Iterator[str]:
    """Yield the paths that lead to a key, the shortest first, and the key itself."""
    names = key.split(".")
    for length in range(1, len(names) + 1):
        yield ".".join(names[:length])


def parts_in_words(parts: Mapping[str, int]) -> tuple[str, ...]:
    """Return the parts of `unread_parts` with their numbers of tensors, in words."""
    return tuple(f"{part} ({number} {'tensor' if number == 1 else 'tensors'})" for part, number in parts.items())


def warn_of_unused(model: PreTrainedModel, names: ParameterNames, checkpoint: Checkpoint) -> None:
    """Warn of tensors in blocks that the model has no place for: transformers reads none, no output has them.

    Of those that transformers passes over in silence (old rotary tables and masks, keys and values of blocks that take
    an earlier block's) the log says it without a warning.
    """
    patterns = (r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ()))
    ignored = [re.compile(pattern) for pattern in patterns]
    unused = [
        key
        for key in checkpoint.tensors
        if (made := names.parameters_of(key))[0] not in names.meta and names.block_of(made[0]) is not None
    ]
    known = [key for key in unused if any(pattern.search(key) for pattern in ignored)]
    for level, keys in ((logging.INFO, known), (logging.WARNING, sorted(set(unused) - set(known)))):
        if keys:
            log.log(
                level,
                "%s: a %s has no place for %s (%d such tensors): it is neither used nor copied",
                *(checkpoint.model, type(model).__name__, keys[0], len(keys)),
            )


def check_depth(model: PreTrainedModel, names: ParameterNames, keys: Iterable[str]) -> None:
    """Check that the checkpoint has no blocks beyond those of the model, which would be left out in silence.

    Layers for multi-token prediction may be stored behind the blocks (DeepSeek-V3, GLM-4.5): transformers does not run
    them, and they are kept as other tensors that it does not read (`unread_parts`).

    Raises:
        InputError: The checkpoint has more blocks than config.json says.
    """
    path, prefix = names.block_names[0].removesuffix("0"), f"{model.base_model_prefix}."
    depth = len(names.block_names)
    beyond: dict[int, list[str]] = {}
    for key in keys:
        name = names.parameters_of(key)[0]
        inside = next((n for n in (name, prefix + name) if n.startswith(path)), "")
        index = inside.removeprefix(path).partition(".")[0]
        if inside and index.isdecimal() and int(index) >= depth:
            beyond.setdefault(int(index), []).append(key)
    if not beyond:
        return
    config = model.config.get_text_config()
    predicting = getattr(config, "num_nextn_predict_layers", None) or 0
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    unused = [key for found in beyond.values() for key in found]
    if max(beyond) < depth + predicting or all(any(p.search(key) for p in ignored) for key in unused):
        return
    raise InputError(
        f"config.json says {depth} blocks, the checkpoint holds block {max(beyond)} too ({unused[0]}): config.json is "
        f"of another model, or num_hidden_layers was changed; copy or download it again"
    )
