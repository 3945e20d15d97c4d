"""Parts of a weight that another tool quantized: what of it is stored, checked by headers, and its decoder."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.io.safetensors_file import DTYPE_NAMES, TensorInfo
from streamslr.model.decoders import Decoder
from streamslr.model.quantization import Quantization

Shape = tuple[int, ...]
Make = Callable[[Mapping[str, Tensor], Tensor], None]
"""Fills a weight from the parts that are stored for it."""

_OF_ACTIVATIONS = (
    "activation_scale",
    "input_scale",
    "input_scale_ub",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
)
"""Tensors beside a stored weight that say how activations are rounded; a dense weight has no use for them."""
ORIGINAL = "give the original model in bf16, fp16 or fp32"
"""Advice where a format is not decoded."""


@dataclass(frozen=True)
class QuantizedWeight(Decoder):
    """A weight that is stored as codes and scales."""

    make: Make

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = torch.empty(self.info.shape, dtype=self.info.dtype, device="cpu")
        self.make(tensors, weight)
        return weight


@dataclass(frozen=True)
class Stored:
    """Stored tensors of a checkpoint, and what decoding needs to know beside them."""

    tensors: Mapping[str, TensorInfo]
    quantization: Quantization
    dtype: torch.dtype  # of decoded weights
    label: str
    read: Callable[[Iterable[str]], list[bytes]]
    """Returns the bytes of small stored tensors, before any weight is read."""

    def companion(self, name: str, of: TensorInfo) -> TensorInfo:
        """Return the tensor of a name, without which another one cannot be read. Raises InputError."""
        if name not in self.tensors:
            raise self.refusal(
                of,
                f"is {DTYPE_NAMES[of.dtype]} and cannot be read without {name}, which no shard holds; download "
                f"the model again",
            )
        return self.tensors[name]

    def words(self, info: TensorInfo) -> tuple[int, int]:
        """Return the shape of codes in int32 words. Raises InputError where they are none."""
        if info.dtype != torch.int32 or len(info.shape) != 2 or 0 in info.shape:
            kind = f"{DTYPE_NAMES[info.dtype]} {list(info.shape)}"
            raise self.refusal(info, f"is {kind}, where codes of 4 or 8 bits in I32 words are decoded; {ORIGINAL}")
        return info.shape[0], info.shape[1]

    def require(self, info: TensorInfo, dtypes: tuple[torch.dtype, ...], shapes: tuple[Shape, ...], of: str) -> None:
        """Check dtype and shape of a part. Raises InputError."""
        if info.dtype not in dtypes or info.shape not in shapes:
            kinds, sizes = names(dtypes), " or ".join(str(list(shape)) for shape in shapes)
            raise self.refusal(
                info,
                f"is {DTYPE_NAMES[info.dtype]} {list(info.shape)}, and {of} needs {kinds} {sizes}; download the "
                f"model again",
            )

    def refusal(self, info: TensorInfo, why: str) -> InputError:
        return InputError(f"{info.name} in {info.shard} of {self.label} {why}")

    def weight(self, name: str, shape: Shape, parts: Mapping[str, TensorInfo], make: Make) -> QuantizedWeight:
        """Return the decoder of a weight; the first of its parts are the codes."""
        shard = next(iter(parts.values())).shard
        info = TensorInfo(name, self.dtype, shape, shard, prod(shape) * self.dtype.itemsize)
        beside = [name.removesuffix("weight") + other for other in _OF_ACTIVATIONS if name.endswith(".weight")]
        unread = tuple(other for other in beside if other in self.tensors)
        return QuantizedWeight(info, {part: stored.name for part, stored in parts.items()}, make, unread=unread)

    def require_no_orphans(self, suffix: str, codes: tuple[str, ...]) -> None:
        """Raise InputError for a part of a weight whose codes are not there.

        Args:
            suffix: end of the name of such a part.
            codes: ends of the names that its codes may have instead.
        """
        for name, info in self.tensors.items():
            module = name.removesuffix(suffix)
            if module != name and not any(module + of in self.tensors for of in codes):
                needed = " or ".join(module + of for of in codes)
                raise self.refusal(info, f"belongs to {needed}, which no shard holds; download the model again")


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """Return the names of dtypes in headers, for error messages."""
    return " or ".join(DTYPE_NAMES[dtype] for dtype in dtypes)
