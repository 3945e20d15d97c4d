"""The model on the meta device, of which one block at a time is loaded, run and evicted."""

import logging
import math
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
from streamslr.model.call_recorder import PROBE_SHAPE, find_recorder
from streamslr.model.carried import Carried
from streamslr.model.chain import Chain
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
    parts_in_words,
    unread_parts,
    warn_of_unused,
)
from streamslr.model.stored_tensors import StoredTensors
from streamslr.model.transformers_compat import (
    get_model_conversion_mapping,
    initializers,
    uses_eager_attention,
)
from streamslr.model.transposed import hold_as_linears
from streamslr.model.weight_loading import check_loaded, load_keys
from streamslr.model.weight_reads import find_dense
from streamslr.model.windows import CheckedLookups, refusing_windows, require_ids

log = logging.getLogger("streamslr")

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
        parameters: return the parameters by stored name, without those that nothing may change: routers, and what is a
            part of other blocks too.
        run: what enters the block [b, T, w] -> its hidden states [b, T, h], as the model runs the block, with its
            masks and positions.
        hand_on: the same -> these hidden states, and what enters the next block [b, T, w'].
        expert_of: stored name of each of these -> the module of experts that it is in, and the expert's number there.
    """

    index: int
    name: str
    linears: Mapping[str, nn.Linear]
    experts: Mapping[str, str]
    parameters: Callable[[], Mapping[str, nn.Parameter]]
    run: Callable[[Tensor], Tensor]
    hand_on: Callable[[Tensor], tuple[Tensor, Tensor]]
    expert_of: Mapping[str, tuple[Experts, int]] = field(default_factory=dict)


class BlockwiseModel:
    """A causal language model of which one block at a time is in memory, and the non-block tensors when asked for.

    All other parameters are on the meta device. Blocks, linears and experts are found in the model itself; nothing
    depends on an architecture's name.

    Attributes:
        checkpoint: source of the weights.
        dtype: dtype of loaded parameters, except for those that the model keeps in float32.
        device: device of loaded parameters.
        hidden_size: width h of the hidden states, of all streams where a model has several.
        block_names: module path of each block.
        block_tensors: per block, the checkpoint keys that it is made of.
        borrowed_tensors: per block, the keys of other blocks that it is made of too.
        non_block_tensors: every other checkpoint key, those included that the model has no use for.
        unread: parts outside the blocks that the model has no use for (layers for multi-token prediction, a part for
            images that its class leaves out), by their path -> number of tensors.
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
            InputError: transformers cannot build the model, the checkpoint does not fit it, or its blocks hand on what
                a boundary cannot hold.
        """
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self._float32_stream: Float32Stream | None = None
        self._model = build_on_meta(checkpoint.config, dtype, checkpoint.tensors)
        require_modest_buffers(dict(self._model.named_non_persistent_buffers()), checkpoint.tensors)
        self._writers = find_writers(self._model)
        conversions = get_model_conversion_mapping(self._model)
        apart = unfuse(self._model, conversions, checkpoint.tensors)
        self._experts, self._conversions, self._fused = apart.experts, apart.conversions, apart.refused
        checkpoint.show_slices(apart.slices)
        list_name, self._blocks = find_blocks(self._model)
        self.block_names = tuple(f"{list_name}.{i}" for i in range(len(self._blocks)))
        self._transposed = hold_as_linears(self._model, dict(zip(self.block_names, self._blocks, strict=True)))
        self._names = ParameterNames(self._model, self.block_names, self._conversions, checkpoint.tensors)
        self._transpose(checkpoint, checkpoint.tensors)
        self._stored = StoredTensors(self._model, self._names, self._conversions, checkpoint)
        self._shared = find_shared_parameter(self._model, self._names)
        self._shared_in_depth = self._names.shared_in_depth(self._model)

        keys = self._names.keys_by_block(checkpoint.tensors)
        self.block_tensors = tuple(tuple(keys[i]) for i in range(len(self._blocks)))
        self.borrowed_tensors = tuple(
            tuple(key for owner in self._borrowed(i).values() for key in self._names.sources[owner])
            for i in range(len(self._blocks))
        )
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
        read = {key for keys in self._names.sources.values() for key in keys}
        in_blocks = {key for keys in self.block_tensors for key in keys}
        self.unread = unread_parts(checkpoint.tensors, read | in_blocks)
        if self.unread:
            message = "%s: a %s does not run these parts, which are kept as they are: %s"
            log.info(message, checkpoint.model, self._class, ", ".join(parts_in_words(self.unread)))

        self._live: int | None = None
        self._non_block_loaded = False
        self._checked_lengths: set[int] = set()
        self._init_buffers(block=None)
        with self._non_block_stand_ins():
            recorder = find_recorder(self._model, self._blocks, self._label, device)
        with self._non_block_stand_ins(math.nan):
            self._recorder = recorder.find_given(device)
        with self._non_block_stand_ins():
            self._recorder.require_plain_chain(device)
        self._chain = Chain(self._recorder, self._recording, dtype, device)
        self.hidden_size = self._chain.hidden_size

    # Questions that need no weights

    def require_compressible(self) -> None:
        """Check that the blocks' weights are plain linears, which can be solved one by one.

        Linears that must stay dense leave `linears` and `experts` for `dense`.

        Raises:
            InputError: they are not; names the most telling reason.
        """
        self._set_apart_shared()
        self._refuse_obstacles()
        self._find_dense()
        self._refuse_obstacles()  # once more: a block may have no linear left
        if self.dtype != torch.float32:
            self._float32_stream = find_float32_stream(
                self._model, self._names, self._blocks, self.dtype, self._on_meta
            )
            self._chain.use_stream_dtype(self.stream_dtype)

    def widths(self, tokens: int) -> tuple[int, ...]:
        """Return the width w of what enters each block, and of what leaves the last, for windows of so many tokens.

        It is `hidden_size`, and more where blocks hand on more than hidden states. No block may be live.
        """
        with refusing_windows(self._class, tokens, self.positions):
            return self._chain.widths(tokens)

    @property
    def stream_dtype(self) -> torch.dtype:
        """Dtype of the hidden states inside a block and of what it returns: float32, if the model allows it."""
        return torch.float32 if self._float32_stream else self.dtype

    def _refuse_obstacles(self) -> None:
        blocks = dict(zip(self.block_names, self._blocks, strict=True))
        for why in find_obstacles(blocks, self.linears, self._routers, self._shared, self.dense, self._fused):
            raise self._not_compressible(
                f"{why}; streamslr compresses blocks whose weights are plain linears of their own; choose another model"
            )

    def _set_apart_shared(self) -> None:
        """Move linears that are a part of several blocks from `linears` to `dense`, of the block that stores them."""
        shared = {*self._shared_in_depth, *self._shared_in_depth.values()}

        def is_shared(name: str) -> bool:
            return f"{self._names.module_path(name)}.weight" in shared

        why = "it is a part of several blocks"
        self.dense = tuple(
            {name: why for name in of if is_shared(name) and f"{self._names.module_path(name)}.weight" in self.sources}
            for of in self.linears
        )
        self.linears = tuple({n: shape for n, shape in of.items() if not is_shared(n)} for of in self.linears)

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
        self.dense = tuple(
            {**shared, **{name: found[path] for path, name in block.items() if path in found}}
            for shared, block in zip(self.dense, paths, strict=True)
        )
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
        with self._casting():
            return self._chain.run_on_meta(i, dtype)

    @contextmanager
    def _casting(self) -> Iterator[None]:
        """Free the casts of a float32 stream once a block has run."""
        try:
            yield
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
        self._load(source, (*keys, *self.borrowed_tensors[i]), i)
        self._blocks[i].requires_grad_(False)
        linears = {name: self.linear(name) for name in self.linears[i]}
        parameters, run, hand_on = partial(self._parameters, i), partial(self.run_block, i), partial(self.pass_block, i)
        experts = {name: self.expert_of(name) for name in self.experts[i]}
        expert_of = {name: (self._experts[path], number) for name, (path, number) in experts.items()}
        return Block(i, self.block_names[i], linears, self.experts[i], parameters, run, hand_on, expert_of)

    def as_stored(self, i: int) -> dict[str, Tensor]:
        """Return live block i's parameters and buffers by stored name, without its linears' weights.

        They are the checkpoint's own bytes. Only tensors that transformers fuses or splits come from the live block,
        in the stored dtype, unless the block holds them rounded.
        """
        weights = {f"{linear}.weight" for linear in self.linears[i]}
        names = [self._names.stored[name] for name in self._names.in_block(i) if name in self.sources]
        return {name: self._stored.read(name) for name in names if name not in weights}

    def stored_weight(self, linear: str) -> Tensor:
        """Return the stored weight [o, d] of a live linear in float32, without the rounding of the compute dtype."""
        name = f"{linear}.weight"
        weight = self._stored.read(name) if self._stored.is_rounded(name) else self.linear(linear).weight.detach()
        return weight.to(self.device).float()

    def by_key(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by stored name as the checkpoint stores them: by several keys, or transposed."""
        stored_so = {name for name in tensors if self._names.parameter(name) in self._transposed}
        tensors = {name: t.T.contiguous() if name in stored_so else t for name, t in tensors.items()}
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
        """Return what enters block 0 [b, T, w]: hidden states in the first h columns, then what is carried beside them.

        Args:
            ids: token ids, int64 [b, T].

        Raises:
            InputError: windows are longer than the model's positions, ids are outside its vocabulary, or a block is
                called with values that depend on the tokens and cannot be carried.
        """
        self._require_non_block()
        with refusing_windows(self._class, ids.shape[1], self.positions):
            return self._chain.embed(ids.to(self.device))

    def run_block(self, i: int, entering: Tensor) -> Tensor:
        """Pass what enters live block i [b, T, w] through it; return the hidden states [b, T, h] that leave it."""
        return self._chain.hidden(i, self._run(i, entering)[0])

    def pass_block(self, i: int, entering: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same; return the hidden states [b, T, h], and with what is carried beside them what enters i + 1."""
        output, carried = self._run(i, entering)
        hidden = self._chain.hidden(i, output)
        return hidden, self._chain.leaving(i, hidden, carried)

    def _run(self, i: int, entering: Tensor) -> tuple[Any, Carried]:
        if self._live != i:
            raise RuntimeError(f"block {i} is not live: load_block({i}) first")
        tokens = entering.shape[1]
        with (
            refusing(f"block {i} of {self._class} cannot run", _CHECK_CONFIG),
            refusing_windows(self._class, tokens, self.positions),
        ):
            self._chain.calls((entering.shape[0], tokens))
            with self._checked_at_first(tokens), deterministic_operators(), self._casting():
                return self._chain.run(i, entering)

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the model's logits [b, T, V] for the last block's output.

        Args:
            ids: token ids [b, T].
            hidden: hidden states [b, T, h] that leave the last block.
        """
        self._require_non_block()
        return self._chain.logits(ids.to(self.device), hidden)

    @contextmanager
    def _checked_at_first(self, tokens: int) -> Iterator[None]:
        """On a GPU, check lookups in the first pass of windows of this length: blocks may hold tables too."""
        if self.device.type == "cpu" or tokens in self._checked_lengths:
            yield
            return
        with CheckedLookups():
            yield
        self._checked_lengths.add(tokens)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Let the model be run without its blocks, whatever is loaded; lookups are checked."""
        with self._non_block_stand_ins(), CheckedLookups():
            yield

    @contextmanager
    def _non_block_stand_ins(self, fill: float = 0.0) -> Iterator[None]:
        """Put one number, which takes no memory, in place of non-block tensors that are not loaded."""
        if self._non_block_loaded:
            yield
            return
        names = self._names.in_block(None)
        for name in names:
            meta = self._names.meta[name]
            number = torch.full((), fill if meta.is_floating_point() else 0, dtype=meta.dtype, device=self.device)
            set_tensor(self._model, name, number.expand(meta.shape))
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
        fixed = {*self._routers, *self._shared_in_depth, *self._shared_in_depth.values()}
        return {stored.get(name, name): p for name, p in named.items() if name not in fixed}

    def _to_meta(self, names: Iterable[str]) -> None:
        for name in names:
            set_tensor(self._model, name, self._names.meta[name])

    def _init_buffers(self, block: int | None) -> None:
        """Compute the buffers of a block, or outside the blocks, that no checkpoint holds."""
        names = [name for name in self._names.computed if self._names.block_of(name) == block]
        compute_buffers(self._model, names, self._writers, self.device)

    def _borrowed(self, block: int) -> dict[str, str]:
        """Return the parameters of a block that the checkpoint stores for another block alone -> their names there."""
        sources = self._names.sources
        return {
            name: owner
            for name, owner in self._shared_in_depth.items()
            if self._names.block_of(name) == block and name not in sources and owner in sources
        }

    def _load(self, checkpoint: Checkpoint, keys: Iterable[str], block: int | None) -> None:
        """Set the parameters of a block, or outside the blocks, that these checkpoint keys become, and check them."""
        self._transpose(checkpoint, keys)
        load_keys(self._model, self._names, self._conversions, checkpoint, keys, self.dtype, self.device)
        borrowed = {} if block is None else self._borrowed(block)
        for name, owner in borrowed.items():
            set_tensor(self._model, name, get_tensor(self._model, owner))
        self._to_meta(borrowed.values())
        check_loaded(self._model, self._names, checkpoint, self._names.in_block(block), self.dtype)

    def _transpose(self, checkpoint: Checkpoint, keys: Iterable[str]) -> None:
        """Have a checkpoint show the weights that it stores transposed as those of plain linears."""
        if self._transposed:
            checkpoint.transpose([k for k in keys if not self._transposed.isdisjoint(self._names.parameters_of(k))])
