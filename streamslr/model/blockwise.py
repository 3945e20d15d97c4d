"""The model on the meta device: finds its blocks and how they are called, brings one at a time to life."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

# Undocumented, and used nowhere else: what `from_pretrained` itself loads weights with.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from streamslr.errors import InputError, first_line
from streamslr.model.checkpoint import Checkpoint
from streamslr.model.experts import unfuse

_CALLS = 4
"""Shapes of batches whose masks are kept: whole and last micro-batches, of passes and of steps in matching."""

_PROBE = (2, 5)
"""Batch and length of the pass that finds out how blocks are called: small, and no size of any model."""


@dataclass(frozen=True)
class Block:
    """A handle on one live transformer block; it holds no tensor, so `BlockwiseModel.evict_block` frees the memory.

    linears: each linear that is compressed, by the name it is stored under. experts: those of them that see only the
    tokens routed to them -> their kind, the same in every expert beside it. parameters: return the parameters by the
    names they are stored under, without the routers, which nothing may change. run: hidden states [b, T, h] ->
    [b, T, h] as the model runs the block there, masks and positions included.
    """

    index: int
    name: str
    linears: Mapping[str, nn.Linear]
    experts: Mapping[str, str]
    parameters: Callable[[], Mapping[str, nn.Parameter]]
    run: Callable[[Tensor], Tensor]


class BlockwiseModel:
    """A causal language model of which only one block, and what is outside the blocks, is ever in memory.

    Everything is found in the model itself, by running it with its blocks replaced by recorders; nothing
    depends on an architecture's name. Parameters that are not loaded are on the meta device.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Reads no tensor. `dtype`, `device`: what loaded parameters are in and on.

        Raises InputError when transformers cannot build the model, when headers and model do not fit, and
        when blocks share more than hidden states.
        """
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self._model = _build(checkpoint.config, dtype)
        conversions = get_model_conversion_mapping(self._model)
        self._experts, self._conversions = unfuse(self._model, conversions, checkpoint.tensors)
        list_name, self._blocks = _find_blocks(self._model)
        self.block_names = tuple(f"{list_name}.{i}" for i in range(len(self._blocks)))
        computed = dict(self._model.named_non_persistent_buffers())
        self._computed = tuple(computed)  # buffers that no checkpoint holds: rotary tables ...
        self._meta: dict[str, Tensor] = self._model.state_dict() | computed
        self._tied: Mapping[str, str] = self._model.all_tied_weights_keys
        self._shared = self._find_shared()

        keys = self._keys_by_block(checkpoint)
        self.block_tensors = tuple(tuple(keys[i]) for i in range(len(self._blocks)))
        """Checkpoint keys that make block i."""
        self.non_block_tensors = tuple(keys[None])
        """Every other checkpoint key, those included that the model has no use for."""
        self.sources: Mapping[str, tuple[str, ...]] = self._sources(checkpoint)
        """Parameter or persistent buffer -> the checkpoint keys that it is made of; one, but for fused ones."""
        # Whoever reads experts one by one knows them by the checkpoint's names; adapters (PEFT) go by the model's.
        of_checkpoint = {n: key for n, keys in self.sources.items() if self._experts and (key := self._as_is(keys))}
        self._stored_name = {name: of_checkpoint.get(name, name) for name in self.sources}
        self._name_of = {stored: name for name, stored in self._stored_name.items()}
        self._routers = self._find_routers()
        self.linears: tuple[Mapping[str, tuple[int, int]], ...] = tuple(
            self._find_linears(i) for i in range(len(self._blocks))
        )
        """Per block: each linear that is compressed, by the name it is stored under -> its weight's shape (o, d). That
        name is the checkpoint's where the model has experts, its module path elsewhere."""
        self.experts: tuple[Mapping[str, str], ...] = tuple(self._find_experts(i) for i in range(len(self._blocks)))
        """Per block: each linear that only tokens routed to it see -> its kind, the same in every expert beside it."""
        self._check_headers()

        self.hidden_size = int(checkpoint.config.get_text_config().hidden_size)
        self._live: int | None = None
        self._non_block_loaded = False
        self._calls: dict[tuple[int, int], tuple[_Call, ...]] = {}
        self._init_buffers(block=None)
        self._returns_tuples = self._probe()

    # Weights in and out

    def load_block(self, i: int, checkpoint: Checkpoint | None = None) -> Block:
        """Load block i in `dtype` on `device`, without gradients; load it anew if it is live.

        checkpoint: takes the weights from another checkpoint of the same model (a compressed folder).
        Raises InputError naming each tensor that is missing, has another shape, or holds NaN or infinity.
        """
        if self._live not in (None, i):
            raise RuntimeError(f"block {self._live} is live: evict_block({self._live}) before block {i}")
        self._live = i
        self._init_buffers(block=i)
        source = checkpoint or self.checkpoint
        self._load(source, self._keys_by_block(source)[i] if checkpoint else self.block_tensors[i])
        self._check_loaded(source, self._names(i))
        self._blocks[i].requires_grad_(False)
        linears = {name: self.linear(name) for name in self.linears[i]}
        parameters, run = partial(self._parameters, i), partial(self.run_block, i)
        return Block(i, self.block_names[i], linears, self.experts[i], parameters, run)

    def linear(self, name: str) -> nn.Linear:
        """A linear, as `linears` names it."""
        module = self._model.get_submodule(self._module_of(name))
        if not isinstance(module, nn.Linear):
            raise KeyError(f"{name} is a {type(module).__name__}, not a linear")
        return module

    def _parameters(self, i: int) -> dict[str, nn.Parameter]:
        named = {f"{self.block_names[i]}.{name}": p for name, p in self._blocks[i].named_parameters()}
        return {self._stored_name.get(name, name): p for name, p in named.items() if name not in self._routers}

    def routing(self, name: str) -> tuple[int, int]:
        """(k, E) of an expert's linear: each token passes k of E experts. Known once the block has run, on meta too."""
        experts = self._experts[self._module_of(name).rsplit(".", 2)[0]]
        return experts.top_k, experts.number

    @property
    def eager_heads(self) -> int:
        """Attention heads where attention writes its weights [b, heads, T, T] out; 0 where it is fused."""
        config = self._model.config.get_text_config()
        return int(config.num_attention_heads) if config._attn_implementation == "eager" else 0

    def stored_dtype(self, name: str) -> torch.dtype:
        """What the checkpoint stores a parameter or buffer in, by the name that it is stored under again."""
        return self.checkpoint.tensors[self.sources[self._name_of[name]][0]].dtype

    def as_stored(self, i: int) -> dict[str, Tensor]:
        """Live block i's parameters and buffers but for its linears' weights, in the checkpoint's own bytes.

        What transformers fuses or splits on loading comes from the live block instead, in the stored dtype.
        """
        weights = {f"{linear}.weight" for linear in self.linears[i]}
        tensors = {}
        for name in self._names(i):
            stored = self._stored_name[name]
            if stored in weights:
                continue
            if key := self._as_is(self.sources[name]):
                tensors[stored] = self.checkpoint.read([key])[key]
            else:
                tensors[stored] = self._get(name).detach().to(self.stored_dtype(stored), copy=True)
        return tensors

    def evict_block(self, i: int) -> None:
        """Returns block i to the meta device; its memory is free once the caller drops what it took of it."""
        self._to_meta(name for name in self._meta if self._block_of(name) == i)
        if self._live == i:
            self._live = None

    def load_non_block(self) -> None:
        """Loads embeddings, norms and head, and ties what the model ties. Errors as `load_block`."""
        self._load(self.checkpoint, self.non_block_tensors)
        self._check_loaded(self.checkpoint, self._names(None))
        for name in self._names(None):
            self._get(name).requires_grad_(False)
        self._non_block_loaded = True

    def evict_non_block(self) -> None:
        self._to_meta(self._names(None))
        self._non_block_loaded = False

    # Running

    def run_on_meta(self, i: int) -> None:
        """Passes a batch without values through block i, which must not be live: its hooks see every shape."""
        call = self._calls_for(_PROBE)[i]
        hidden = torch.empty(*_PROBE, self.hidden_size, dtype=self.dtype, device="meta")
        with torch.no_grad():
            call.to_meta().replay(self._blocks[i], hidden)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [b, T] int64 -> the hidden states [b, T, h] that enter block 0.

        Raises InputError when blocks are called with values that depend on the tokens.
        """
        self._require_non_block()
        try:
            calls = self._calls_for((ids.shape[0], ids.shape[1]))
            hidden, now = self._walk(ids.to(self.device), self._returns_tuples)
        except IndexError as error:  # of the table of learned positions, or of the embedding
            raise InputError(
                f"{self._class} cannot take windows of {ids.shape[1]} tokens ({error}); give a --seq-len of at most "
                f"its max_position_embeddings, and the tokenizer it was made with"
            ) from error
        for i, (before, after) in enumerate(zip(calls, now, strict=True)):
            if name := before.difference(after):
                raise InputError(
                    f"{self._class} hands block {i} the value {name!r}, which depends on the tokens: such a "
                    f"model cannot be taken block by block"
                )
        return hidden

    def run_block(self, i: int, hidden: Tensor) -> Tensor:
        """Pass hidden states [b, T, h] through live block i."""
        if self._live != i:
            raise RuntimeError(f"block {i} is not live: load_block({i}) first")
        call = self._calls_for((hidden.shape[0], hidden.shape[1]))[i]
        output = call.replay(self._blocks[i], hidden)
        if isinstance(output, tuple) != self._returns_tuples:
            raise InputError(f"block {i} of {self._class} returns a {type(output).__name__}: not supported")
        out: Tensor = output[0] if isinstance(output, tuple) else output
        return out

    @torch.no_grad()
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """What the model makes of the last block's output: ids [b, T], hidden [b, T, h] -> [b, T, V]."""
        self._require_non_block()
        last = len(self._blocks) - 1

        def forward(i: int, *args: Any, **kwargs: Any) -> Any:
            return self._packaged(hidden if i == last else _split(args, kwargs)[0], self._returns_tuples)

        with self._blocks_replaced(forward):
            output = self._model(input_ids=ids.to(self.device), use_cache=False)
        logits: Tensor = output.logits
        return logits

    def compressible(self) -> None:
        """Raises InputError where the blocks' weights are not plain linears that can be solved one by one."""
        for why in self._obstacles():
            raise InputError(
                f"{self._name} can be evaluated, but not compressed: {why}; "
                f"streamslr compresses blocks whose weights are plain linears of their own"
            )

    def _obstacles(self) -> Iterator[str]:
        """What stands against compressing, the most telling first."""
        modules = [
            (path, module)
            for name, block in zip(self.block_names, self._blocks, strict=True)
            for path, module in block.named_modules(prefix=name)
        ]
        odd = []
        for path, module in modules:
            if isinstance(module, nn.ModuleList):
                yield f"it is a mixture of experts or of branches: {path} is a list of {len(module)} modules"
            for leaf, parameter in module.named_parameters(recurse=False):
                what = f"{path}.{leaf} {list(parameter.shape)} in a {type(module).__name__}"
                if parameter.dim() >= 3 and not type(module).__module__.startswith("torch.nn"):
                    yield (
                        f"it is a mixture of experts that cannot be taken apart, {what}: they are not plain gated "
                        f"ones, or the checkpoint does not store them one by one"
                    )
                elif f"{path}.{leaf}" in self._routers:
                    continue
                elif parameter.dim() == 2 and not isinstance(module, nn.Linear | nn.Embedding):
                    odd.append(f"{what} is no linear layer")
        yield from odd
        for name, linears in zip(self.block_names, self.linears, strict=True):
            if not linears:
                yield f"{name} holds no linear layer"
        if self._shared:
            yield f"{self._shared[0]} and {self._shared[1]} are one parameter"

    # Finding out how blocks are called

    def _probe(self) -> bool:
        """Whether blocks return tuples: the way in which the model hands one's output to the next unchanged."""
        failures: list[_NoChainError] = []
        for returns_tuples in (False, True):
            try:
                with self._non_block_stand_ins():
                    self._walk(torch.zeros(_PROBE, dtype=torch.int64, device=self.device), returns_tuples)
                return returns_tuples
            except _NoChainError as error:
                failures.append(error)
            except Exception as error:  # the wrong guess, or whatever an unusual model does without its blocks
                failures.append(_NoChainError(self._name, first_line(error), reached=-1))
        raise max(failures, key=lambda failure: failure.reached)  # the wrong guess does not get as far

    def _calls_for(self, shape: tuple[int, int]) -> tuple["_Call", ...]:
        """How the model calls each block on a batch of this shape [b, T]."""
        if shape not in self._calls:
            if len(self._calls) == _CALLS:
                del self._calls[next(iter(self._calls))]
            with self._non_block_stand_ins():
                ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
                _, self._calls[shape] = self._walk(ids, self._returns_tuples)
        return self._calls[shape]

    @torch.no_grad()
    def _walk(self, ids: Tensor, returns_tuples: bool) -> tuple[Tensor, tuple["_Call", ...]]:
        """Runs the model without head on ids [b, T], each block handing its input on: [b, T, h], and the calls.

        Raises InputError when anything but the hidden states goes from one block to the next.
        """
        calls: list[_Call] = []
        entering: list[Tensor] = []

        def broken(why: str) -> _NoChainError:
            return _NoChainError(self._name, why, reached=len(calls))

        def forward(i: int, *args: Any, **kwargs: Any) -> Any:
            if i != len(calls):
                raise broken(f"block {i} is called in place of block {len(calls)}")
            hidden, call = _split(args, kwargs)
            if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != ids.shape:
                raise broken(f"block {i} takes {_describe(hidden)} as hidden states for ids {list(ids.shape)}")
            if entering and hidden is not entering[0]:
                raise broken(f"the hidden states change between blocks {i - 1} and {i}")
            for name, value in call.values():
                if not _is_plain(value):
                    raise broken(f"blocks share state: block {i} is handed {_describe(value)} as {name!r}")
            entering[:] = [hidden]
            calls.append(call)
            return self._packaged(hidden, returns_tuples)

        with self._blocks_replaced(forward):
            output = self._model.base_model(input_ids=ids, use_cache=False)
        if len(calls) != len(self._blocks):
            raise broken(f"only {len(calls)} of {len(self._blocks)} blocks are called")
        if output[0].shape[:2] != ids.shape:
            raise broken(f"the output is {_describe(output[0])} for ids {list(ids.shape)}")
        return entering[0], tuple(calls)

    def _packaged(self, hidden: Tensor, returns_tuples: bool) -> Any:
        # The second element is of a type that `_walk` refuses if the model hands it to the next block.
        return (hidden, _Unused()) if returns_tuples else hidden

    @contextmanager
    def _blocks_replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Every block's forward is `forward(i, *args, **kwargs)`."""

        def stand_in(i: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: forward(i, *args, **kwargs)

        for i, block in enumerate(self._blocks):
            block.forward = stand_in(i)
        try:
            with _quiet():
                yield
        finally:
            for block in self._blocks:
                del block.forward

    @contextmanager
    def _non_block_stand_ins(self) -> Iterator[None]:
        """What is outside the blocks is loaded, or zeros that take no memory: enough to record calls."""
        if self._non_block_loaded:
            yield
            return
        for name in self._names(None):
            meta = self._meta[name]
            self._set(name, torch.zeros((), dtype=meta.dtype, device=self.device).expand(meta.shape))
        try:
            yield
        finally:
            self._to_meta(self._names(None))

    def _require_non_block(self) -> None:
        if not self._non_block_loaded:
            raise RuntimeError("what is outside the blocks is not loaded: load_non_block() first")

    # Names, and what they hold

    @property
    def _class(self) -> str:
        return type(self._model).__name__

    @property
    def _name(self) -> str:
        return f"{self.checkpoint.model} ({self._class})"

    def _block_of(self, name: str) -> int | None:
        """The block that a parameter's or buffer's name belongs to, None outside."""
        prefix = self.block_names[0].removesuffix("0")
        index = name.removeprefix(prefix).partition(".")[0]
        inside = name.startswith(prefix) and index.isdigit() and int(index) < len(self._blocks)
        return int(index) if inside else None

    def _names(self, block: int | None) -> list[str]:
        """Parameters and persistent buffers of a block, or outside."""
        return [n for n in self._meta if n not in self._computed and self._block_of(n) == block]

    def _get(self, name: str) -> Tensor:
        module, leaf = self._owner(name)
        tensor: Tensor = getattr(module, leaf)
        return tensor

    def _set(self, name: str, tensor: Tensor) -> None:
        module, leaf = self._owner(name)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self._model.get_submodule(path), leaf

    def _to_meta(self, names: Iterable[str]) -> None:
        for name in names:
            self._set(name, self._meta[name])

    def _init_buffers(self, block: int | None) -> None:
        """Gives the computed buffers of a block, or outside, their values, as `from_pretrained` does."""
        owners: dict[nn.Module, None] = {}
        for name in self._computed:
            if self._block_of(name) == block:
                self._set(name, torch.empty_like(self._meta[name], device=self.device))
                owners[self._owner(name)[0]] = None
        models = [m for m in self._model.modules() if isinstance(m, PreTrainedModel)]
        with torch.no_grad():
            for module in owners:
                # The innermost model around a module knows how; modules() lists outer ones first.
                around = [model for model in models if any(part is module for part in model.modules())]
                around[-1]._init_weights(module)  # type: ignore[no-untyped-call]

    def _find_shared(self) -> tuple[str, str] | None:
        """Two names of one parameter, of which at least one is in a block."""
        first: dict[int, str] = {}
        pairs = list(self._tied.items())
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            pairs.append((first.setdefault(id(parameter), name), name))
        for a, b in pairs:
            if self._block_of(a) != self._block_of(b):
                return a, b
        return None

    def _find_routers(self) -> set[str]:
        """Parameters beside experts with an output for each of them, or one alone (the gate of shared experts)."""
        routers = set()
        for path, experts in self._experts.items():
            around = path.rpartition(".")[0]
            for name, parameter in self._model.get_submodule(around).named_parameters(prefix=around):
                if not name.startswith(f"{path}.") and parameter.shape[0] in (1, experts.number):
                    routers.add(name)
        return routers

    def _find_linears(self, i: int) -> dict[str, tuple[int, int]]:
        return {
            self._stored_name.get(f"{path}.weight", f"{path}.weight").removesuffix(".weight"): (
                module.out_features,
                module.in_features,
            )
            for path, module in self._blocks[i].named_modules(prefix=self.block_names[i])
            if isinstance(module, nn.Linear) and f"{path}.weight" not in self._routers
        }

    def _find_experts(self, i: int) -> dict[str, str]:
        kinds = {}
        for name in self.linears[i]:
            path, _, leaf = self._module_of(name).rsplit(".", 2)
            if path in self._experts:
                kinds[name] = f"{path}.*.{leaf}"
        return kinds

    def _module_of(self, linear: str) -> str:
        """The module path of a linear by its name in `linears`."""
        return self._name_of.get(f"{linear}.weight", f"{linear}.weight").removesuffix(".weight")

    # From checkpoint keys to parameters

    def _as_is(self, keys: tuple[str, ...]) -> str | None:
        """The one key that a parameter is, where it is neither fused of several nor split off one."""
        return keys[0] if len(keys) == 1 == len(self._targets(keys[0])) else None

    def _targets(self, key: str) -> tuple[str, ...]:
        """The names in the model that a checkpoint key becomes, existing or not."""
        renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        prefix = self._model.base_model_prefix
        name, pattern = rename_source_key(key, renamings, converters, prefix, self._meta)
        if name not in self._meta and key in self._meta:  # as the loader does
            name, pattern = rename_source_key(key, [], [], prefix, self._meta)
        if pattern is None:
            return (name,)
        parts = next(c for c in converters if pattern in c.source_patterns).target_patterns
        return tuple(name.replace(parts[0], part) for part in parts)

    def _keys_by_block(self, checkpoint: Checkpoint) -> dict[int | None, list[str]]:
        keys: dict[int | None, list[str]] = {i: [] for i in (None, *range(len(self._blocks)))}
        for key in checkpoint.tensors:
            keys[self._block_of(self._targets(key)[0])].append(key)
        return keys

    def _sources(self, checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
        sources: dict[str, tuple[str, ...]] = {}
        for key in checkpoint.tensors:
            for name in self._targets(key):
                if name in self._meta:
                    sources[name] = (*sources.get(name, ()), key)
        return sources

    def _check_headers(self) -> None:
        """Raises InputError when the checkpoint lacks parameters of the model, or has others in their place."""
        there = set(self.sources)
        there |= {a for a, b in self._tied.items() if b in there} | {self._tied[a] for a in self._tied if a in there}
        names = [name for name in self._meta if name not in self._computed]
        missing = [name for name in names if name not in there]
        if missing:
            blocks = {self._block_of(name) for name in missing} - {None}
            raise InputError(
                f"{self.checkpoint.model} lacks {len(missing)} of the {len(names)} parameters of its "
                f"{self._class}, first {missing[0]} ({len(blocks)} of {len(self._blocks)} blocks are not complete): "
                f"config.json is of another model, or a download or run did not finish"
            )
        for name, keys in self.sources.items():
            info = self.checkpoint.tensors[keys[0]]
            if not info.dtype.is_floating_point and self._meta[name].is_floating_point():
                raise InputError(
                    f"{info.name} in {info.shard} is {info.dtype}, not floating point; give the original model "
                    f"in bf16, fp16 or fp32"
                )
            if self._as_is(keys) and info.shape != tuple(self._meta[name].shape):
                raise InputError(
                    f"{info.name} in {info.shard} is {list(info.shape)}, config.json asks for "
                    f"{list(self._meta[name].shape)}: they are of different models; download both again"
                )

    def _load(self, checkpoint: Checkpoint, keys: Iterable[str]) -> None:
        """Sets the parameters that these checkpoint keys become, converted as `from_pretrained` does."""
        used = [key for key in keys if any(name in self._meta for name in self._targets(key))]
        config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self._model._get_dtype_plan(self.dtype),
            weight_mapping=self._conversions,  # type: ignore[arg-type]  # narrower than what it is given
        )
        with _quiet():
            info, _ = convert_and_load_state_dict_in_model(self._model, checkpoint.read(used), config)
            if self._tied and any(self._block_of(self._targets(key)[0]) is None for key in used):
                self._model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        for name, error in info.conversion_errors.items():
            raise InputError(f"{name} cannot be made of {checkpoint.model}'s tensors: {error}")
        for name, found, wanted in info.mismatched_keys:
            raise InputError(
                f"{name} is {list(found)} in {checkpoint.model}, config.json asks for {list(wanted)}: they are "
                f"of different models; download both again"
            )

    def _check_loaded(self, checkpoint: Checkpoint, names: list[str]) -> None:
        missing = [name for name in names if self._get(name).is_meta]
        if missing:
            raise InputError(
                f"{checkpoint.model} lacks {len(missing)} of {len(names)} parameters asked for, first {missing[0]}"
            )
        for name in names:
            tensor = self._get(name)
            # The least and the largest carry any NaN or infinity, without a mask the size of the tensor.
            if isinstance(tensor, nn.Parameter) and tensor.numel() and not _finite(torch.aminmax(tensor)):
                bad = int((~tensor.isfinite()).sum())
                keys = self._sources(checkpoint).get(name, (name,))
                infos = [checkpoint.tensors[key] for key in keys if key in checkpoint.tensors]
                where = ", ".join(sorted({info.shard for info in infos}))
                narrower = any(info.dtype != self.dtype for info in infos)
                raise InputError(
                    f"{keys[0]} in {where} has {bad} of {tensor.numel()} values that are NaN or infinite"
                    f"{f' as {self.dtype}' if narrower else ''}; download the file again, or choose another model"
                )


class _NoChainError(InputError):
    """The model's blocks are not a chain of hidden states; `reached`: how many of them were."""

    def __init__(self, name: str, why: str, reached: int) -> None:
        super().__init__(f"{name} cannot be taken block by block: {why}; choose another architecture")
        self.reached = reached


class _Unused:
    """Stands for what a block returns beside hidden states."""


@dataclass(frozen=True)
class _Call:
    """A block's arguments without the hidden states, which came first or by name."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    positional: bool

    def values(self) -> Iterator[tuple[str, Any]]:
        yield from ((f"argument {n + 2}", value) for n, value in enumerate(self.args))
        yield from self.kwargs.items()

    def replay(self, block: nn.Module, hidden: Tensor) -> Any:
        if self.positional:
            return block(hidden, *self.args, **self.kwargs)
        return block(hidden_states=hidden, **self.kwargs)

    def to_meta(self) -> "_Call":
        """The same call without values."""
        kwargs = {name: _to_meta(value) for name, value in self.kwargs.items()}
        return _Call(_to_meta(self.args), kwargs, self.positional)

    def difference(self, other: "_Call") -> str | None:
        """The name of a value that differs."""
        mine, others = dict(self.values()), dict(other.values())
        for name in mine | others:
            if name not in mine or name not in others or not _same(mine[name], others[name]):
                return name
        return None


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, _Call]:
    """The hidden states of a block's call, and the rest of it."""
    if args:
        return args[0], _Call(args[1:], kwargs, positional=True)
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs.get("hidden_states"), _Call((), rest, positional=False)


def _to_meta(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_to_meta(item) for item in value)
    return value.to("meta") if isinstance(value, Tensor) else value


def _is_plain(value: Any) -> bool:
    """Whether a value can be replayed: no object that a block might write to for the next."""
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str | torch.dtype | torch.device)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return f"a {type(value).__name__}"


def _finite(bounds: Iterable[Tensor]) -> bool:
    return all(bool(bound.isfinite()) for bound in bounds)


def _build(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model in evaluation mode, every parameter and buffer on the meta device."""
    try:
        with _quiet(), torch.device("meta"):
            # A copy, because it notes its dtype there. No attn_implementation: some architectures refuse one.
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                copy.deepcopy(config), dtype=dtype
            )
            model.eval()  # type: ignore[no-untyped-call]
    except Exception as error:  # each architecture checks its own configuration in its own way
        raise InputError(
            f"transformers builds no causal language model from a {type(config).__name__}: {first_line(error)}; "
            f"choose a decoder-only model, or check config.json"
        ) from error
    return model


def _find_blocks(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """The decoder's one list of as many layers as the configuration says: its name, and the layers."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    lists = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(lists) != 1 or not depth:
        raise InputError(
            f"{type(model).__name__} has {len(lists)} lists of {depth} layers where one is expected: its blocks "
            f"cannot be told apart, so this architecture is not supported"
        )
    name = next(name for name, module in model.named_modules() if module is lists[0])
    return name, list(lists[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice, which speak of loading a whole model."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
