"""Weights of single experts out of the tensors that a checkpoint stores for all experts of a block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import WeightConverter

from streamslr.io.safetensors_file import TensorInfo
from streamslr.model.decoders import Decoder

_BY_EXPERT = {"Transpose", "Interleave", "Concatenate"}
"""Operations of transformers' conversions that leave the first dimension alone, when theirs are others."""


@dataclass(frozen=True)
class Slice:
    """The weight [o, d] of one expert in tensors that a checkpoint stores for all.

    Attributes:
        sources: keys of these tensors, the expert first in their dimensions; several where transformers joins them.
        expert: number of the expert.
        shape: (o, d).
        transposed: True where the model multiplies with [d, o].
        converter: how transformers makes the parameter of the tensors; None where it is as stored.
    """

    sources: tuple[str, ...]
    expert: int
    shape: tuple[int, int]
    transposed: bool
    converter: WeightConverter | None


def can_convert_slices(converter: WeightConverter) -> bool:
    """Tell if a conversion makes a parameter [E, .., ..] of tensors [E, .., ..], each expert by itself."""
    dims = [dim for step in converter.operations for name, dim in vars(step).items() if name in ("dim", "dim0", "dim1")]
    kinds = {type(step).__name__ for step in converter.operations}
    return len(converter.target_patterns) == 1 and kinds <= _BY_EXPERT and all(dim in (1, 2) for dim in dims)


@dataclass(frozen=True)
class SlicedWeight(Decoder):
    """The weight of one expert, read and decoded without those of the others."""

    part: Slice
    whole: tuple[Decoder | None, ...]
    """For each source of the slice, how it is decoded; None where it is stored as it is."""

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        values = []
        for number, decoder in enumerate(self.whole):
            found = {
                name.partition(".")[2]: tensor
                for name, tensor in tensors.items()
                if name.partition(".")[0] == str(number)
            }
            values.append(self._decode(decoder, found))
        return _join(self.part, values)

    def _decode(self, decoder: Decoder | None, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return what a source holds of this expert, [1, .., ..]."""
        expert = self.part.expert
        if decoder is None:
            return tensors[""][expert : expert + 1]
        shape = decoder.info.shape
        of_one = replace(decoder, info=replace(decoder.info, shape=(1, *shape[1:])))
        return of_one.join(
            {
                name: tensor[expert : expert + 1] if tensor.dim() and len(tensor) == shape[0] else tensor
                for name, tensor in tensors.items()
            }
        )


def slice_weight(
    name: str, part: Slice, shown: Mapping[str, TensorInfo], decoders: Mapping[str, Decoder]
) -> SlicedWeight:
    """Return the decoder of one expert's weight.

    Args:
        name: key of the weight.
        part: where it is.
        shown: the checkpoint's tensors.
        decoders: decoders of those that are not stored as they are.
    """
    first = shown[part.sources[0]]
    o, d = part.shape
    whole = tuple(decoders.get(source) for source in part.sources)
    parts = {
        f"{number}.{piece}": stored
        for number, (source, decoder) in enumerate(zip(part.sources, whole, strict=True))
        for piece, stored in (decoder.parts if decoder else {"": source}).items()
    }
    info = TensorInfo(name, first.dtype, (o, d), first.shard, o * d * first.dtype.itemsize)
    return SlicedWeight(info, parts, part, whole)


def _join(part: Slice, values: Sequence[Tensor]) -> Tensor:
    """Return the weight [o, d] of what each source holds of its expert, [1, .., ..]."""
    o, d = part.shape
    wanted = (1, d, o) if part.transposed else (1, o, d)
    if part.converter:
        patterns, targets = part.converter.source_patterns, part.converter.target_patterns
        found: dict[str, Any] = {pattern: [value] for pattern, value in zip(patterns, values, strict=True)}
        for step in part.converter.operations:
            if getattr(step, "check_dims", False):  # transformers compares with the parameter, which is gone
                (value,) = found.values()
                value = value[0] if isinstance(value, list) else value
                found = {targets[0]: value if value.shape == wanted else value.transpose(1, 2)}
            else:
                found = step.convert(found, patterns, targets)
        values = list(found.values())
    (weight,) = values
    matrix = weight.reshape(wanted)[0]
    return (matrix.t() if part.transposed else matrix).contiguous()
