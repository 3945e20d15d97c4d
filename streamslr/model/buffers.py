"""Buffers that no checkpoint holds (rotary tables, masks, multipliers): computed as transformers does, and checked.

transformers fills such a buffer after a model is loaded, in `_init_weights`: of its owner, or of any module that holds
the owner. Which modules write it is seen on the meta device. A buffer is then computed twice, over two different
contents of its memory; one that nobody fills, or that is filled only in part, shows by the difference.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from streamslr.errors import InputError
from streamslr.model.border import refusing
from streamslr.model.meta_model import get_tensor, set_tensor
from streamslr.model.transformers_compat import guard_torch_init_functions, initializers

Writers = Mapping[str, Mapping[int, Callable[[], None]]]
"""Buffer -> the initialisations that write it, by their place in transformers' order."""


@torch.no_grad()
def find_writers(model: PreTrainedModel) -> Writers:
    """Return the initialisations that write each buffer that no checkpoint holds.

    Args:
        model: the model, on meta.
    """
    by_storage = {_storage(buffer): name for name, buffer in model.named_non_persistent_buffers()}
    writers: dict[str, dict[int, Callable[[], None]]] = {name: {} for name in by_storage.values()}
    with torch.device("cpu"), guard_torch_init_functions():
        for place, (module, initialize) in enumerate(initializers(model)):
            if not module._non_persistent_buffers_set and next(module.children(), None) is None:
                continue  # a module alone, such as a linear, has only itself to fill; there are many, and it takes time
            # An initialisation that reads a value fails on meta; a buffer that only it fills is refused later.
            with _Writes() as writes, suppress(Exception):
                initialize()
            for storage in writes.storages & by_storage.keys():
                writers[by_storage[storage]][place] = initialize
    return writers


def compute_buffers(model: PreTrainedModel, names: Iterable[str], writers: Writers, device: torch.device) -> None:
    """Compute buffers and put them in their places in the model.

    Args:
        model: the model.
        names: buffers to compute. Other buffers that the same initialisations write should be on meta.
        writers: from `find_writers`.
        device: device of the buffers.

    Raises:
        InputError: an initialisation fails, or a buffer is left as memory was, in whole or in part.
    """
    names = tuple(names)
    steps = {place: initialize for name in names for place, initialize in writers[name].items()}
    first = _computed(model, names, steps, device, fill=0)
    second = _computed(model, names, steps, device, fill=255)
    for name in names:
        if not _same_bytes(first[name], second[name]):
            raise InputError(
                f"transformers' {type(model).__name__} does not fill {name} {list(second[name].shape)} "
                f"({'in full' if writers[name] else 'no _init_weights writes it'}), which no checkpoint holds: its "
                f"numbers would be what was in memory; use another version of transformers, or another model"
            )


def check_buffers(model: PreTrainedModel) -> None:
    """Check that `from_pretrained` will fill every buffer of a model on meta that no checkpoint holds.

    Raises:
        InputError: it leaves one as memory was, in whole or in part.
    """
    writers = find_writers(model)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, steps in writers.items():
        groups.setdefault(tuple(steps), []).append(name)
    for names in groups.values():
        on_meta = {name: get_tensor(model, name) for name in names}
        compute_buffers(model, names, writers, torch.device("cpu"))
        for name, tensor in on_meta.items():
            set_tensor(model, name, tensor)


def _computed(
    model: PreTrainedModel,
    names: tuple[str, ...],
    steps: Mapping[int, Callable[[], None]],
    device: torch.device,
    fill: int,
) -> dict[str, Tensor]:
    """Compute buffers over memory whose bytes are all `fill`, which is NaN for floating point and 255."""
    for name in names:
        buffer = torch.empty_like(get_tensor(model, name), device=device)
        _bytes(buffer).fill_(bool(fill) if buffer.dtype == torch.bool else fill)
        set_tensor(model, name, buffer)
    what = f"transformers' {type(model).__name__} cannot compute {', '.join(names)}, which no checkpoint holds"
    advice = "use another version of transformers, or another model"
    with refusing(what, advice), torch.no_grad(), torch.device("cpu"), guard_torch_init_functions():
        for _, initialize in sorted(steps.items()):
            initialize()
    return {name: get_tensor(model, name) for name in names}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1) if tensor.dtype == torch.bool else tensor.view(-1).view(torch.uint8)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata  # on meta too
    return address


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that notes the storage of each tensor that an operation writes to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            value = given.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self.storages.add(_storage(value))
        return func(*args, **kwargs)
