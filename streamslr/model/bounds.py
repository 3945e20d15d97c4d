"""Bounds on what config.json may ask for, held against the checkpoint before anything of that size is built."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from streamslr.config import format_bytes
from streamslr.errors import InputError
from streamslr.io.safetensors_file import TensorInfo

_MOST_PARTS = 100_000
"""Most layers, heads, experts, labels … that config.json may ask for. transformers makes lists of that length already
when it reads the file."""

_COUNT = re.compile(r"(^n|^num|_num)_(?!.*(positions|ctx|token|embd|embed|inner|param))|layers$")
"""Names of such numbers in config.json; n_positions, n_embd … are sizes of tensors, not numbers of parts. Of the 802
configurations of transformers 5.23, none has more than 51,000 by default."""

_COMPUTED_BYTES = 2**30
"""Bytes that tables outside the checkpoint (rotary angles, masks) may take where the checkpoint itself is small."""


def refuse_huge_counts(config: Mapping[str, Any], label: str) -> None:
    """Raise InputError where config.json asks for more layers, heads, experts or labels than any model has.

    Args:
        config: The parsed file, with the parts of a model of several parts in it.
        label: Name of the model, for the message.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            refuse_huge_counts(value, label)
        elif isinstance(value, int) and value > _MOST_PARTS and _COUNT.search(name):
            raise InputError(
                f"config.json of {label} says {name} {str(value)[:30]}, more than any model has "
                f"({_MOST_PARTS:,}); download it again"
            )


@contextmanager
def no_more_modules_than(tensors: Mapping[str, TensorInfo]) -> Iterator[None]:
    """Stop a model that is being built once it has many more modules than the checkpoint has tensors.

    Raises:
        InputError: In the body, from the module that is one too many.
    """
    most, count = 10_000 + 20 * len(tensors), 0

    def hook(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise InputError(
                f"config.json asks for more than {most:,} modules, the checkpoint has {len(tensors):,} tensors: "
                f"config.json is of another model, or a download did not finish"
            )

    handle = register_module_module_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def require_modest_buffers(computed: Mapping[str, Tensor], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise InputError where the buffers that no checkpoint holds would take more memory than the checkpoint.

    Args:
        computed: The buffers, on meta.
        tensors: The checkpoint's tensors.
    """
    sizes = {name: buffer.numel() * buffer.itemsize for name, buffer in computed.items()}
    if sum(sizes.values()) > max(_COMPUTED_BYTES, sum(info.nbytes for info in tensors.values())):
        largest = max(sizes, key=lambda name: sizes[name])
        raise InputError(
            f"config.json asks for tables of {format_bytes(sum(sizes.values()))} beside the weights, the largest is "
            f"{largest} {list(computed[largest].shape)}: check its number of positions"
        )
