"""Decoders: a dense weight from the tensors that a checkpoint stores instead of it.

A decoder names the weight that it gives and the stored tensors that it takes, so that a checkpoint shows the one and
hides the others. Here is that of linears that streamslr packed; those of other tools are in `quantized_weights.py`.
Another stored format needs a class of `Decoder`'s kind, and a function that finds such weights by headers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.io.packed_layout import packed_linears, stored_parts
from streamslr.io.packing import merge
from streamslr.io.safetensors_file import ShardHeader, TensorInfo
from streamslr.spec.pattern import SparsityPattern


@dataclass(frozen=True)
class Decoder(ABC):
    """A weight that is stored in another form: a `PackedWeight`, or a `QuantizedWeight`."""

    info: TensorInfo
    """Description of the decoded weight; its shard holds the first of its parts."""
    parts: Mapping[str, str]
    """Name of each part -> name of the stored tensor."""
    unread: tuple[str, ...] = field(default=(), kw_only=True)
    """Names of stored tensors beside these that only what multiplies in codes needs."""

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the stored tensors that `decode` reads."""
        return tuple(self.parts.values())

    def decode(self, read: Callable[[str], Tensor]) -> Tensor:
        """Return the weight.

        Args:
            read: reads the stored tensor of a name.

        Raises:
            InputError: the parts do not fit together.
        """
        return self.join({part: read(name) for part, name in self.parts.items()})

    @abstractmethod
    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the weight that these parts are stored for. Errors as `decode`."""


@dataclass(frozen=True)
class PackedWeight(Decoder):
    """Weight S + U·V of a packed linear, merged in float32."""

    pattern: SparsityPattern
    shape: tuple[int, int]

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return merge(tensors, self.pattern, self.shape, self.info.dtype)


@dataclass(frozen=True)
class TransposedWeight(Decoder):
    """Weight [o, d] of a linear that is stored as [d, o]: a view of what is stored."""

    @classmethod
    def of(cls, stored: TensorInfo) -> "TransposedWeight":
        """Return the weight of a stored tensor."""
        return cls(replace(stored, shape=stored.shape[::-1]), {"weight": stored.name})

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"].T


def packed_weights(headers: Mapping[str, ShardHeader], label: str) -> dict[str, PackedWeight]:
    """Find the packed linears of a folder that streamslr wrote, by the names of their weights.

    Args:
        headers: header of each shard by its file name.
        label: folder or repository, for error messages.

    Raises:
        InputError: a linear lacks a part, or its parts are in different shards.
    """
    shard_of = {name: shard for shard, header in headers.items() for name in header.tensors}
    weights = {}
    for shard, header in headers.items():
        for linear, (pattern, shape) in packed_linears(header.metadata).items():
            parts = stored_parts(linear, header.tensors)
            elsewhere = [name for name in stored_parts(linear, shard_of).values() if name not in header.tensors]
            if elsewhere and not parts:
                continue  # `save_pretrained` names every linear in every shard
            if elsewhere:
                raise InputError(
                    f"{label} has {next(iter(parts.values()))} in {shard} and {elsewhere[0]} in "
                    f"another shard, where only `streamslr.load` can put them together; save the model again "
                    f"with a larger max_shard_size"
                )
            if not {"values", "meta"} <= parts.keys():
                raise InputError(
                    f"{shard} in {label} names the packed linear {linear}, but holds only "
                    f"{list(parts) or 'nothing'} of it; `streamslr verify` tells more"
                )
            name, nbytes = f"{linear}.weight", shape[0] * shape[1] * torch.float32.itemsize
            weights[name] = PackedWeight(TensorInfo(name, torch.float32, shape, shard, nbytes), parts, pattern, shape)
    return weights
