"""vLLM's plugin: `vllm serve FOLDER` runs a compressed folder, S packed in memory. Only vLLM imports it."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_pp_group, model_parallel_is_initialized
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.utils import set_weight_attrs

from streamslr.errors import InputError
from streamslr.io.packed_check import check_positions
from streamslr.io.packed_layout import QUANT_METHOD, part_dtype, read_quantization_config, without_numbers
from streamslr.runtime import triton_product
from streamslr.runtime.linear import way_of_product
from streamslr.runtime.loader import read_loadable
from streamslr.runtime.partition import StoredLinear, take_columns, take_rows
from streamslr.runtime.stacked import StackedLinear
from streamslr.runtime.stored_model import StoredModel
from streamslr.spec.pattern import SparsityPattern
from streamslr.spec.values import ValueFormat, values_text

DENSE_VARIABLE = "STREAMSLR_DENSE"
"""Environment variable: "1" has S dense in memory instead of packed."""
_REARRANGED = {"bloom", "llama4", "llama4_text"}
"""Model types of which vLLM rearranges tensors by their names alone: V too (Bloom), or `weight` only (Llama 4)."""

log = init_logger("vllm.streamslr")


def register() -> None:
    """Have vLLM take `quant_method` "streamslr" of config.json. vLLM calls it in every process, at times twice."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(StreamslrQuantization)


@dataclass(frozen=True)
class PackedHeader:
    """A packed linear as the shards' headers describe it."""

    path: str
    """Path of the linear in the folder."""
    parts: frozenset[str]
    pattern: SparsityPattern
    shape: tuple[int, int]
    values: ValueFormat | None = None


class StreamslrQuantization(QuantizationConfig):
    """The packed linears of a folder by vLLM's names. It is read in the first process, and sent to the others."""

    def __init__(self) -> None:
        """Know no linear yet: vLLM says in `maybe_update_config` where the folder is."""
        super().__init__()
        self.linears: dict[str, PackedHeader] = {}
        self.dense = os.environ.get(DENSE_VARIABLE) == "1"
        self._claimed: set[str] | None = set()

    # What vLLM asks of every quantization

    def get_name(self) -> Any:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "StreamslrQuantization":
        """Raises InputError for a format version that this streamslr cannot read, or a damaged entry."""
        read_quantization_config({"quantization_config": config})
        return cls()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the headers of the folder (or hub id), before any process loads a weight.

        Raises:
            InputError: `streamslr.load` would refuse the folder, or vLLM cannot run its model packed.
            HubError: the hub could not be reached.
        """
        kinds = [getattr(config, "model_type", "") for config in (hf_config, getattr(hf_config, "text_config", None))]
        if unfit := [kind for kind in kinds if kind in _REARRANGED]:
            raise InputError(
                f"{model_name} is a {unfit[0]}, whose weights vLLM rearranges as only a dense weight can be: load it "
                f"with streamslr.load, or serve `streamslr export --to dense` of it"
            )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # vLLM may fork this process, and a child would wait for OpenMP's threads for ever
        try:
            stored = read_loadable(model_name, revision)
        finally:
            torch.set_num_threads(threads)
        if experts := [path for path in stored.linears if ".experts." in path]:
            raise InputError(
                f"{model_name} is a mixture of experts ({experts[0]} and others are packed), which cannot be served by "
                f"vLLM yet; load it with streamslr.load, or serve `streamslr export --to dense` of it"
            )
        self.linears = {
            path: PackedHeader(path, frozenset(stored.parts(path)), *stored.linears[path], stored.value_format(path))
            for path in stored.linears
        }
        if hf_config is not None:  # a part of the name of vLLM's cache of compiled graphs, which hold what is hashed
            hf_config.quantization_config["linears"] = _digest(stored, self.dense)
        log.info("%d linears of %s are packed", len(self.linears), model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.linears |= hf_to_vllm_mapper.apply_dict(self.linears)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            sources = self._sources(prefix)
            if not any(sources):
                return UnquantizedLinearMethod()
            if self._claimed is not None:
                self._claimed |= {without_numbers(header.path) for header in sources if header}
            return PackedLinearMethod(self, prefix, sources)
        if isinstance(layer, ParallelLMHead):  # comes after all blocks
            self.require_all_claimed()
        return None

    # Names

    def _sources(self, prefix: str) -> list[PackedHeader | None]:
        """Return the stored linears that vLLM fuses in a layer, None for a dense one."""
        if prefix in self.linears:
            return [self.linears[prefix]]
        parent, dot, leaf = prefix.rpartition(".")
        return [self.linears.get(f"{parent}{dot}{name}") for name in self.packed_modules_mapping.get(leaf, ())]

    def require_all_claimed(self) -> None:
        """Raise InputError where stored linears have no layer in vLLM's model: it would leave them out.

        Once a model is whole, once in a process; a stage of a pipeline need not have every kind of linear.
        """
        claimed, self._claimed = self._claimed, None
        if claimed is None or _in_a_pipeline():
            return
        paths = {header.path for header in self.linears.values()}
        if lost := sorted(path for path in paths if without_numbers(path) not in claimed):
            raise InputError(
                f"vLLM's model has no layer for the packed linear {lost[0]} ({len(lost)} such linears): this "
                f"architecture cannot be served yet; serve `streamslr export --to dense` of the folder"
            )


class PackedLinearMethod(LinearMethodBase):
    """A layer of vLLM whose weight is one stored linear, or several fused. It keeps what arrives until all is there."""

    def __init__(self, config: StreamslrQuantization, prefix: str, sources: list[PackedHeader | None]) -> None:
        """Make the method of one layer.

        Args:
            config: the folder's linears.
            prefix: vLLM's name of the layer.
            sources: the stored linears in their order in the layer; None for a dense one.
        """
        self.config, self.prefix, self.sources = config, prefix, sources
        self._received: list[dict[str, Tensor]] = [{} for _ in sources]
        self._linears: dict[int, StoredLinear] = {}

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register empty parameters by the names of the stored parts; `_receive` is called with what is stored."""
        self._dtype, self._device = params_dtype, torch.empty(0).device
        cut = input_size_per_partition < input_size
        first = layer.tp_rank * input_size_per_partition if cut else 0
        self._columns = slice(first, first + input_size_per_partition)
        self._rows, heights = _rows_by_source(layer, output_partition_sizes, len(self.sources))
        self._shapes = [(height, input_size) for height in heights]
        for shape, header in zip(self._shapes, self.sources, strict=True):
            if header and header.shape != shape:
                raise InputError(
                    f"{header.path} is {header.shape[0]}x{header.shape[1]}, vLLM's {self.prefix} asks for "
                    f"{shape[0]}x{shape[1]}: config.json is of another model"
                )
        self._names = sorted({part for header in self.sources for part in (header.parts if header else {"weight"})})
        for name in self._names:
            parameter = nn.Parameter(torch.empty(0, dtype=part_dtype(name, params_dtype)), requires_grad=False)
            # Falcon's q, k and v are stored in rows of another order: vLLM rearranges what has an output_dim. Parts
            # without rows cannot follow, and check_positions then finds that meta does not fit them.
            by_row = {"output_dim": 0} if name in ("weight", "meta", "scales", "U") or self._values_by_row(name) else {}
            set_weight_attrs(parameter, {"weight_loader": partial(self._receive, layer, name)} | by_row)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that all parts came, drop the empty parameters, and log how S is multiplied."""
        for index in range(len(self.sources)):
            if index not in self._linears:
                missing = sorted(self._parts(index) - self._received[index].keys())
                raise InputError(f"{self.prefix}: {missing[0]} of {self._path(index)} was not loaded")
        for name in self._names:
            delattr(layer, name)
        self._linears.clear()
        packed = [header for header in self.sources if header and not self.config.dense]
        for pattern, values in dict.fromkeys((header.pattern, header.values) for header in packed):
            way = way_of_product(pattern, self._device, self._dtype, values)
            log.info_once("S of %s in %s: %s", pattern, values_text(values), way)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = layer.packed(x.reshape(-1, x.shape[-1]))
        if bias is not None:
            y = y + bias
        return y.view(*x.shape[:-1], y.shape[-1])

    # Loading

    def _receive(self, layer: nn.Module, part: str, parameter: nn.Parameter, tensor: Tensor, shard: Any = None) -> None:
        """Keep a part. Once a stored linear is whole, take this rank's part of it; once all are, build the layer."""
        self.config.require_all_claimed()
        index = self._index(shard)
        if index in self._linears or part not in self._parts(index):
            raise InputError(f"{self.prefix}: {part} of {self._path(index)} came twice or is unexpected")
        received = self._received[index]
        received[part] = tensor
        if received.keys() < self._parts(index):
            return
        header = self.sources[index]
        linear = StoredLinear(dict(received), header.pattern if header else None, self._shapes[index])
        if header and (problems := check_positions(received, header.pattern, header.shape)):
            raise InputError(
                f"{header.path}: {problems[0]}; either its shard was damaged while it was read, or vLLM's model "
                f"rearranges its rows, which {header.pattern} cannot follow: then serve `streamslr export --to dense`"
            )
        received.clear()
        self._linears[index] = take_columns(take_rows(linear, self._rows[index]), self._columns, self._path(index))
        if len(self._linears) == len(self.sources):
            linears = [self._linears[index] for index in range(len(self.sources))]
            if self.config.dense:
                linears = [linear.unpacked() for linear in linears]
            for linear in linears:
                self._refuse_breaking_graphs(linear)
            layer.packed = StackedLinear(linears, self._dtype, self._device)

    def _refuse_breaking_graphs(self, linear: StoredLinear) -> None:
        """Raise InputError where the host must look at `row_offsets` in each product, which no CUDA graph holds."""
        vllm_config = get_current_vllm_config_or_none()
        eager = vllm_config is None or vllm_config.model_config.enforce_eager
        if eager or self._device.type != "cuda" or linear.pattern is None or "row_offsets" not in linear.parts:
            return
        stored = (self._dtype, None) if linear.values is None else (linear.values.dtype, self._dtype)
        if reason := triton_product.fault(linear.pattern, self._device, self._dtype, *stored):
            raise InputError(
                f"packed linears of {linear.pattern} can only be unpacked in tiles here ({reason}), which CUDA graphs "
                f"cannot hold; start with {DENSE_VARIABLE}=1, or with --enforce-eager"
            )

    def _index(self, shard: Any) -> int:
        """Return the index of the stored linear that vLLM calls `shard`."""
        index = {"q": 0, "k": 1, "v": 2}.get(shard, shard)
        if index is None and len(self.sources) == 1:
            return 0
        if not isinstance(index, int) or not 0 <= index < len(self.sources):
            raise InputError(
                f"vLLM loads part {shard!r} of {self.prefix}, which holds {len(self.sources)} stored linears: this "
                f"architecture cannot be served yet; serve `streamslr export --to dense` of the folder"
            )
        return index

    def _parts(self, index: int) -> frozenset[str]:
        header = self.sources[index]
        return header.parts if header else frozenset({"weight"})

    def _path(self, index: int) -> str:
        header = self.sources[index]
        return header.path if header else f"dense linear {index + 1} of {self.prefix}"

    def _values_by_row(self, name: str) -> bool:
        return name == "values" and all(h.pattern.groups(h.shape[1]) for h in self.sources if h)


def _rows_by_source(layer: Any, partition_sizes: Sequence[int], sources: int) -> tuple[list[list[slice]], list[int]]:
    """Return the rows of each stored linear that this rank holds, and the rows that each has in all.

    A layer has several outputs (q, k and v); each is one stored linear, or all are one.
    """
    replicas = [1] * len(partition_sizes)
    if hasattr(layer, "total_num_kv_heads"):  # q, k and v; more ranks than k has heads hold the same ones
        kv_heads, head = layer.total_num_kv_heads, layer.head_size
        whole = [layer.total_num_heads * head, kv_heads * head, kv_heads * getattr(layer, "v_head_size", head)]
        replicas = [1, layer.num_kv_head_replicas, layer.num_kv_head_replicas]
    else:
        whole = list(getattr(layer, "output_sizes", [layer.output_size]))
    if len(whole) != len(partition_sizes):
        raise _unknown_outputs(layer, partition_sizes, sources)
    rows = []
    for size, full, copies in zip(partition_sizes, whole, replicas, strict=True):
        first = 0 if size == full else layer.tp_rank // copies * size
        rows.append(slice(first, first + size))
    if sources == len(rows):
        return [[part] for part in rows], whole
    if sources == 1:
        starts = accumulate(whole, initial=0)
        return [[slice(s + r.start, s + r.stop) for s, r in zip(starts, rows, strict=False)]], [sum(whole)]
    raise _unknown_outputs(layer, partition_sizes, sources)


def _unknown_outputs(layer: Any, partition_sizes: Sequence[int], sources: int) -> InputError:
    return InputError(
        f"a {type(layer).__name__} of {len(partition_sizes)} outputs is stored as {sources} linears, which cannot be "
        f"served yet; serve `streamslr export --to dense` of the folder"
    )


def _digest(stored: StoredModel, dense: bool) -> str:
    """Return a digest of pattern, shape, rank, values, parts of every packed linear, and of whether S is held dense."""
    linears: Mapping[str, object] = {
        path: (
            *map(str, stored.linears[path]),
            stored.rank(path),
            values_text(stored.value_format(path)),
            *stored.parts(path),
        )
        for path in stored.linears
    }
    return hashlib.sha256(repr((dense, sorted(linears.items()))).encode()).hexdigest()


def _in_a_pipeline() -> bool:
    return bool(model_parallel_is_initialized() and get_pp_group().world_size > 1)
