"""Tensors of a block as the checkpoint stores them, often finer than the dtype that the live block computes in."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from streamslr.model.checkpoint import Checkpoint
from streamslr.model.meta_model import get_tensor, set_tensor
from streamslr.model.parameter_names import ParameterNames
from streamslr.model.transformers_compat import WeightTransform, load_converted, quiet_transformers


class StoredTensors:
    """Parameters and persistent buffers of a model of which one block is live, in the checkpoint's dtypes."""

    def __init__(
        self,
        model: PreTrainedModel,
        names: ParameterNames,
        conversions: Sequence[WeightTransform],
        checkpoint: Checkpoint,
    ) -> None:
        """Note where tensors come from; none is read.

        Args:
            model: the model.
            names: names of its parameters.
            conversions: how transformers renames and fuses the checkpoint's keys.
            checkpoint: source of the weights.
        """
        self._model, self._names, self._conversions, self._checkpoint = model, names, conversions, checkpoint

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in the checkpoint of the parameter or buffer of this stored name."""
        return self._checkpoint.tensors[self._names.sources[self._names.parameter(name)][0]].dtype

    def read(self, name: str) -> Tensor:
        """Return the parameter or buffer of this stored name, the checkpoint's own bytes, on the CPU.

        A tensor that transformers fuses or splits comes from the live block where that holds it without rounding, on
        the block's device.
        """
        parameter = self._names.parameter(name)
        if key := self._names.own_key(parameter):
            return self._checkpoint.read([key])[key]
        if self.is_rounded(name):
            return self._convert(parameter, self.dtype(name))
        return get_tensor(self._model, parameter).detach().to(self.dtype(name), copy=True)

    def is_rounded(self, name: str) -> bool:
        """Tell if the live parameter or buffer of this stored name may hold fewer digits than what is stored."""
        live = get_tensor(self._model, self._names.parameter(name)).dtype
        return live not in (self.dtype(name), torch.float32)

    def _convert(self, parameter: str, dtype: torch.dtype) -> Tensor:
        """Convert keys once more, on the CPU, as they were for the live block; that stays as it is."""
        keys, names = self._names.sources[parameter], self._names
        live = {p: get_tensor(self._model, p) for key in keys for p in names.parameters_of(key) if p in names.meta}
        try:
            for name, tensor in live.items():
                set_tensor(self._model, name, torch.empty_like(tensor, dtype=dtype, device="meta"))
            with quiet_transformers():
                tensors, cpu = self._checkpoint.read_or_defer(keys), torch.device("cpu")
                load_converted(self._model, tensors, self._conversions, dtype, cpu)
            return get_tensor(self._model, parameter).detach()
        finally:
            for name, tensor in live.items():
                set_tensor(self._model, name, tensor)

    def by_key(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by stored name; those that transformers joins of several keys (convolutions) by these keys."""
        result: dict[str, Tensor] = {}
        for stored, tensor in tensors.items():
            if joined := self._names.joined_keys(self._names.parameter(stored)):
                dim, infos = joined[0], [self._checkpoint.tensors[key] for key in joined[1]]
                parts = torch.split(tensor, [info.shape[dim] for info in infos], dim)
                result |= {info.name: part.to(info.dtype).contiguous() for info, part in zip(infos, parts, strict=True)}
            else:
                result[stored] = tensor
        return result
