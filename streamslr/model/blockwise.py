"""The model on the meta device, of which one block at a time is loaded, run and evicted."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from streamslr.errors import InputError, first_line
from streamslr.gpu import deterministic_operators
from streamslr.model.border import refusing
from streamslr.model.bounds import require_modest_buffers
from streamslr.model.buffers import compute_buffers, find_writers
from streamslr.model.call_recorder import PROBE_SHAPE, Call, find_recorder
from streamslr.model.checkpoint import Checkpoint
from streamslr.model.compressibility import find_obstacles, find_shared_parameter
from streamslr.model.experts import Experts, unfuse
from streamslr.model.float32_stream import Float32Stream, find_float32_stream
from streamslr.model.meta_model import build_on_meta, find_blocks, get_tensor, set_tensor
from streamslr.model.parameter_names import (
    ParameterNames,
    check_depth,
    check_headers,
    find_kinds,
    find_linears,
    find_routers,
    warn_of_unused,
)
from streamslr.model.stored_tensors import StoredTensors
from streamslr.model.transformers_compat import (
    get_model_conversion_mapping,
    initializers,
    uses_eager_attention,
)
from streamslr.model.weight_loading import check_loaded, load_keys
from streamslr.model.weight_reads import find_dense
from streamslr.model.windows import CheckedLookups, refusing_windows, require_ids

_CACHED_CALLS = 5
"""Batch shapes whose calls (masks, positions) are cached: whole and last micro-batch, in a pass and in matching; and
one window."""

_CHECK_CONFIG = "check config.json, or download it again"


@dataclass(frozen=True)
class Block:
    """A handle on the live block; it holds no tensor, so that evicting the block frees its memory.

    Attributes:
        index: number of the block.
        name: module path of the block.
        linears: stored name -> each linear that is compressed.
        experts: stored name of each linear that sees only the tokens routed to it -> its kind, the same in every
            expert beside it.
        parameters: return the parameters by stored name, without the routers, which nothing may change.
        run: hidden states [b, T, h] -> [b, T, h], as the model runs the block, with its masks and positions.
        expert_of: stored name of each of these -> the module of experts that it is in, and the expert's number there.
    """

    index: int
    name: str
    linears: Mapping[str, nn.Linear]
    experts: Mapping[str, str]
    parameters: Callable[[], Mapping[str, nn.Parameter]]
    run: Callable[[Tensor], Tensor]
    expert_of: Mapping[str, tuple[Experts, int]] = field(default_factory=dict)


class BlockwiseModel:
    """A causal language model of which one block at a time is in memory, and the non-block tensors when asked for.

    All other parameters are on the meta device. Blocks, linears and experts are found in the model itself; nothing
    depends on an architecture's name.

    Attributes:
        checkpoint: source of the weights.
        dtype: dtype of loaded parameters, except for those that the model keeps in float32.
        device: device of loaded parameters.
        hidden_size: width h of the hidden states.
        block_names: module path of each block.
        block_tensors: per block, the checkpoint keys that it is made of.
        non_block_tensors: every other checkpoint key, those included that the model has no use for.
        sources: parameter or persistent buffer -> the checkpoint keys that it is made of, several where it is fused.
        linears: per block, stored name of each linear that is compressed -> shape (o, d) of its weight.
        experts: per block, stored name of each linear that sees only the tokens routed to it -> its kind, the same
            in every expert beside it.
        dense: per block, stored name of each linear that `require_compressible` found to have to stay dense -> why.
    """

    @refusing("transformers cannot make the model that config.json describes", _CHECK_CONFIG)
    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Build the model on meta, and find its blocks and names; no tensor is read.

        Args:
            checkpoint: source of the weights.
            dtype: dtype of loaded parameters.
            device: device of loaded parameters.

        Raises:
            InputError: transformers cannot build the model, the checkpoint does not fit it, or more than hidden
                states goes from one block to the next.
        """
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self._float32_stream: Float32Stream | None = None
        self._model = build_on_meta(checkpoint.config, dtype, checkpoint.tensors)
        require_modest_buffers(dict(self._model.named_non_persistent_buffers()), checkpoint.tensors)
        self._writers = find_writers(self._model)
        conversions = get_model_conversion_mapping(self._model)
        self._experts, self._conversions = unfuse(self._model, conversions, checkpoint.tensors)
        list_name, self._blocks = find_blocks(self._model)
        self.block_names = tuple(f"{list_name}.{i}" for i in range(len(self._blocks)))
        self._names = ParameterNames(self._model, self.block_names, self._conversions, checkpoint.tensors)
        self._stored = StoredTensors(self._model, self._names, self._conversions, checkpoint)
        self._shared = find_shared_parameter(self._model, self._names)

        keys = self._names.keys_by_block(checkpoint.tensors)
        self.block_tensors = tuple(tuple(keys[i]) for i in range(len(self._blocks)))
        self.non_block_tensors = tuple(keys[None])
        self.sources = self._names.sources
        self._routers = find_routers(self._model, {path: experts.number for path, experts in self._experts.items()})
        self.linears: tuple[Mapping[str, tuple[int, int]], ...] = tuple(
            find_linears(block, name, self._names, self._routers)
            for name, block in zip(self.block_names, self._blocks, strict=True)
        )
        self.experts: tuple[Mapping[str, str], ...] = tuple(
            find_kinds(linears, self._names, self._experts) for linears in self.linears
        )
        self.dense: tuple[Mapping[str, str], ...] = ({},) * len(self._blocks)
        check_headers(self._model, self._names, checkpoint)
        check_depth(self._model, self._names, checkpoint.tensors)
        warn_of_unused(self._model, self._names, checkpoint)

        self._live: int | None = None
        self._non_block_loaded = False
        self._checked_lengths: set[int] = set()
        self._calls: dict[tuple[int, int], tuple[Call, ...]] = {}
        self._init_buffers(block=None)
        with self._non_block_stand_ins():
            self._recorder = find_recorder(self._model, self._blocks, self._label, device)
            hidden, _ = self._recorder.record(torch.zeros(PROBE_SHAPE, dtype=torch.int64, device=device))
        self.hidden_size = hidden.shape[-1]

    # Questions that need no weights

    def require_compressible(self) -> None:
        """Check that the blocks' weights are plain linears, which can be solved one by one.

        Linears that must stay dense leave `linears` and `experts` for `dense`.

        Raises:
            InputError: they are not; names the most telling reason.
        """
        self._refuse_obstacles()
        self._find_dense()
        self._refuse_obstacles()  # once more: a block may have no linear left
        if self.dtype != torch.float32:
            self._float32_stream = find_float32_stream(
                self._model, self._names, self._blocks, self.dtype, self._on_meta
            )

    @property
    def stream_dtype(self) -> torch.dtype:
        """Dtype of the hidden states inside a block and of what it returns: float32, if the model allows it."""
        return torch.float32 if self._float32_stream else self.dtype

    def _refuse_obstacles(self) -> None:
        blocks = dict(zip(self.block_names, self._blocks, strict=True))
        for why in find_obstacles(blocks, self.linears, self._routers, self._shared, self.dense):
            raise self._not_compressible(
                f"{why}; streamslr compresses blocks whose weights are plain linears of their own; choose another model"
            )

    def _find_dense(self) -> None:
        """Move linears that the model's code uses in another way than to call them from `linears` to `dense`."""
        paths = [{self._names.module_path(name): name for name in linears} for linears in self.linears]
        found = find_dense(
            self._model,
            [{path: self.linear(name) for path, name in block.items()} for block in paths],
            {self._names.module_path(name) for experts in self.experts for name in experts},
            self.run_on_meta,
            PROBE_SHAPE[0] * PROBE_SHAPE[1],
            partial(initializers, self._model),
        )
        self.dense = tuple({name: found[path] for path, name in block.items() if path in found} for block in paths)
        dense = {name for block in self.dense for name in block}
        self.linears = tuple({n: shape for n, shape in of.items() if n not in dense} for of in self.linears)
        self.experts = tuple({n: kind for n, kind in of.items() if n not in dense} for of in self.experts)

    def linear(self, name: str) -> nn.Linear:
        """Return the linear of this stored name, live or on meta."""
        module = self._model.get_submodule(self._names.module_path(name))
        if not isinstance(module, nn.Linear):
            raise KeyError(f"{name} is a {type(module).__name__}, not a linear")
        return module

    def routing(self, name: str) -> tuple[int, int]:
        """Return (k, E) for a linear of an expert: each token passes k of E experts. The block must have run once."""
        path, _ = self.expert_of(name)
        return self._experts[path].top_k, self._experts[path].number

    def expert_of(self, name: str) -> tuple[str, int]:
        """Return the path of the module of experts that a linear of an expert is in, and the expert's number there."""
        path, number, _ = self._names.module_path(name).rsplit(".", 2)
        return path, int(number)

    def can_keep(self, name: str) -> bool:
        """Tell if a module of experts takes each token once, in the width of hidden states, given one of its linears.

        The block must have run once, on meta.
        """
        path, _ = self.expert_of(name)
        return self._experts[path].received == (PROBE_SHAPE[0] * PROBE_SHAPE[1], self.hidden_size)

    @property
    def positions(self) -> int | None:
        """The max_position_embeddings that the model was made for; None where config.json has none."""
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return positions if isinstance(positions, int) else None

    def require_windows(self, tokens: int, ids: Tensor | None = None) -> None:
        """Check that the model takes windows of so many tokens, and token ids [n, T] on the host.

        Raises:
            InputError: the windows are longer than a table of positions, or ids are outside the vocabulary.
        """
        if ids is not None:
            require_ids(self._model, ids, self._label)
        if self.positions and tokens > self.positions:
            # A table has as many rows, or a few more: twice as many tokens show it, however many are asked for.
            enough = min(tokens, 2 * self.positions + 64)
            with refusing_windows(self._class, tokens, self.positions), self._non_block_stand_ins(), CheckedLookups():
                self._recorder.record(torch.zeros(1, enough, dtype=torch.int64, device=self.device))

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the head ranks; 0 where config.json has none."""
        size = getattr(self._model.config.get_text_config(), "vocab_size", None)
        return size if isinstance(size, int) else 0

    @property
    def eager_heads(self) -> int:
        """Attention heads where attention writes its weights [b, heads, T, T] out; 0 where it is one fused kernel."""
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None) if uses_eager_attention(config) else None
        return heads if isinstance(heads, int) else 0  # recurrent models have none

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in the checkpoint of the parameter or buffer of this stored name."""
        return self._stored.dtype(name)

    def run_on_meta(self, i: int) -> None:
        """Pass a batch without values through block i, which must not be live: its hooks see every shape.

        Raises:
            InputError: the block needs values; or an error of one of its linears.
        """
        try:
            self._on_meta(i, self.stream_dtype)
        except InputError:
            raise
        except Exception as error:  # a block's code may do anything
            raise self._not_compressible(
                f"block {i} does not run on the meta device ({first_line(error)}); choose another model"
            ) from error

    @torch.no_grad()
    def _on_meta(self, i: int, dtype: torch.dtype) -> Any:
        call = self._calls_for(PROBE_SHAPE)[i].to_meta()
        return self._replay(i, call, torch.empty(*PROBE_SHAPE, self.hidden_size, dtype=dtype, device="meta"))

    def _replay(self, i: int, call: Call, hidden: Tensor) -> Any:
        try:
            return call.replay(self._blocks[i], hidden)
        finally:
            if self._float32_stream:
                self._float32_stream.forget()

    # Weights in and out

    def load_block(self, i: int, checkpoint: Checkpoint | None = None) -> Block:
        """Load block i, without gradients; load it anew when it is live.

        Args:
            i: number of the block.
            checkpoint: another checkpoint of the same model to take the weights from (a compressed folder).

        Returns:
            The handle on the block.

        Raises:
            InputError: a tensor is missing, has another shape, or holds NaN or infinity.
        """
        if self._live not in (None, i):
            raise RuntimeError(f"block {self._live} is live: evict_block({self._live}) before block {i}")
        self._live = i
        self._init_buffers(block=i)
        source = checkpoint or self.checkpoint
        keys = self._names.keys_by_block(source.tensors)[i] if checkpoint else self.block_tensors[i]
        self._load(source, keys, i)
        self._blocks[i].requires_grad_(False)
        linears = {name: self.linear(name) for name in self.linears[i]}
        parameters, run = partial(self._parameters, i), partial(self.run_block, i)
        experts = {name: self.expert_of(name) for name in self.experts[i]}
        expert_of = {name: (self._experts[path], number) for name, (path, number) in experts.items()}
        return Block(i, self.block_names[i], linears, self.experts[i], parameters, run, expert_of)

    def as_stored(self, i: int) -> dict[str, Tensor]:
        """Return live block i's parameters and buffers by stored name, without its linears' weights.

        They are the checkpoint's own bytes. Only tensors that transformers fuses or splits come from the live block,
        in the stored dtype, unless the block holds them rounded.
        """
        weights = {f"{linear}.weight" for linear in self.linears[i]}
        names = [self._names.stored[name] for name in self._names.in_block(i)]
        return {name: self._stored.read(name) for name in names if name not in weights}

    def stored_weight(self, linear: str) -> Tensor:
        """Return the stored weight [o, d] of a live linear in float32, without the rounding of the compute dtype."""
        name = f"{linear}.weight"
        weight = self._stored.read(name) if self._stored.is_rounded(name) else self.linear(linear).weight.detach()
        return weight.to(self.device).float()

    def by_key(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by stored name; those that transformers joins of several keys (convolutions) by these keys."""
        return self._stored.by_key(tensors)

    def evict_block(self, i: int) -> None:
        """Return block i to the meta device; its memory is free once the caller drops the tensors it took of it."""
        self._to_meta(name for name in self._names.meta if self._names.block_of(name) == i)
        if self._live == i:
            self._live = None

    def load_non_block(self, checkpoint: Checkpoint | None = None) -> None:
        """Load embeddings, norms and head, and tie the weights that the model ties.

        Args:
            checkpoint: another checkpoint of the same model to take them from. Errors as in `load_block`.
        """
        source = checkpoint or self.checkpoint
        keys = self._names.keys_by_block(source.tensors)[None] if checkpoint else self.non_block_tensors
        self._load(source, keys, None)
        for name in self._names.in_block(None):
            get_tensor(self._model, name).requires_grad_(False)
        self._non_block_loaded = True

    def evict_non_block(self) -> None:
        """Return the non-block tensors to the meta device."""
        self._to_meta(self._names.in_block(None))
        self._non_block_loaded = False

    # Running

    def embed(self, ids: Tensor) -> Tensor:
        """Return the hidden states [b, T, h] that enter block 0.

        Args:
            ids: token ids, int64 [b, T].

        Raises:
            InputError: windows are longer than the model's positions, ids are outside its vocabulary, or a block is
                called with values that depend on the tokens.
        """
        self._require_non_block()
        with refusing_windows(self._class, ids.shape[1], self.positions):
            calls = self._calls_for((ids.shape[0], ids.shape[1]))
            hidden, calls_with_tokens = self._recorder.record(ids.to(self.device))
        for i, (call, call_with_tokens) in enumerate(zip(calls, calls_with_tokens, strict=True)):
            if name := call.difference(call_with_tokens):
                raise InputError(
                    f"{self._class} hands block {i} the value {name!r}, which depends on the tokens: such a "
                    f"model cannot be taken block by block"
                )
        return hidden

    def run_block(self, i: int, hidden: Tensor) -> Tensor:
        """Pass hidden states [b, T, h] through live block i."""
        if self._live != i:
            raise RuntimeError(f"block {i} is not live: load_block({i}) first")
        with (
            refusing(f"block {i} of {self._class} cannot run", _CHECK_CONFIG),
            refusing_windows(self._class, hidden.shape[1], self.positions),
        ):
            call = self._calls_for((hidden.shape[0], hidden.shape[1]))[i]
            with self._checked_at_first(hidden.shape[1]), deterministic_operators():
                output = self._replay(i, call, hidden.to(self.stream_dtype))
        if isinstance(output, tuple) != bool(self._recorder.returned):
            raise InputError(f"block {i} of {self._class} returns a {type(output).__name__}: not supported")
        out: Tensor = output[0] if isinstance(output, tuple) else output
        return out

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the model's logits [b, T, V] for the last block's output.

        Args:
            ids: token ids [b, T].
            hidden: hidden states [b, T, h] that leave the last block.
        """
        self._require_non_block()
        return self._recorder.logits(ids.to(self.device), hidden)

    @contextmanager
    def _checked_at_first(self, tokens: int) -> Iterator[None]:
        """On a GPU, check lookups in the first pass of windows of this length: blocks may hold tables too."""
        if self.device.type == "cpu" or tokens in self._checked_lengths:
            yield
            return
        with CheckedLookups():
            yield
        self._checked_lengths.add(tokens)

    def _calls_for(self, shape: tuple[int, int]) -> tuple[Call, ...]:
        """Return how the model calls each block on a batch of this shape [b, T]."""
        if shape not in self._calls:
            if len(self._calls) == _CACHED_CALLS:
                del self._calls[next(iter(self._calls))]
            with self._non_block_stand_ins(), CheckedLookups():
                _, self._calls[shape] = self._recorder.record(torch.zeros(shape, dtype=torch.int64, device=self.device))
        return self._calls[shape]

    @contextmanager
    def _non_block_stand_ins(self) -> Iterator[None]:
        """Put zeros that take no memory in place of non-block tensors that are not loaded: enough to record calls."""
        if self._non_block_loaded:
            yield
            return
        names = self._names.in_block(None)
        for name in names:
            meta = self._names.meta[name]
            set_tensor(self._model, name, torch.zeros((), dtype=meta.dtype, device=self.device).expand(meta.shape))
        try:
            yield
        finally:
            self._to_meta(names)

    def _require_non_block(self) -> None:
        if not self._non_block_loaded:
            raise RuntimeError("the non-block tensors are not loaded: load_non_block() first")

    # Parameters by name

    @property
    def _class(self) -> str:
        return type(self._model).__name__

    @property
    def _label(self) -> str:
        return f"{self.checkpoint.model} ({self._class})"

    def _not_compressible(self, why: str) -> InputError:
        return InputError(f"{self._label} can be evaluated, but not compressed: {why}")

    def _parameters(self, i: int) -> dict[str, nn.Parameter]:
        named = {f"{self.block_names[i]}.{name}": p for name, p in self._blocks[i].named_parameters()}
        stored = self._names.stored
        return {stored.get(name, name): p for name, p in named.items() if name not in self._routers}

    def _to_meta(self, names: Iterable[str]) -> None:
        for name in names:
            set_tensor(self._model, name, self._names.meta[name])

    def _init_buffers(self, block: int | None) -> None:
        """Compute the buffers of a block, or outside the blocks, that no checkpoint holds."""
        names = [name for name in self._names.computed if self._names.block_of(name) == block]
        compute_buffers(self._model, names, self._writers, self.device)

    def _load(self, checkpoint: Checkpoint, keys: Iterable[str], block: int | None) -> None:
        """Set the parameters of a block, or outside the blocks, that these checkpoint keys become, and check them."""
        load_keys(self._model, self._names, self._conversions, checkpoint, keys, self.dtype, self.device)
        check_loaded(self._model, self._names, checkpoint, self._names.in_block(block), self.dtype)
