"""Quantization that config.json describes: its entry as a typed record, and the config without it."""

from collections.abc import Mapping
from typing import Any

import msgspec

from streamslr.errors import InputError
from streamslr.io.packed_layout import QUANT_METHOD
from streamslr.printable import printable

ENTRIES = ("quantization_config", "compression_config")
"""Names of the entry in config.json; older versions of compressed-tensors write the second."""

TEXT_PART = "text_config"
"""Part of config.json for the decoder of a model of several parts. Its entry counts where the top of the file has none
(Kimi K2.6)."""

Block = tuple[int, int]
"""Rows and columns of a weight that have one scale."""


class _Codes(msgspec.Struct, frozen=True):
    """Part `weights` of a group in compressed-tensors' entry."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    group_size: int | None = None
    block_structure: Block | str | None = None


class _Group(msgspec.Struct, frozen=True):
    """Linears of one format, in compressed-tensors' entry."""

    weights: _Codes | None = None
    format: str | None = None


class Quantization(msgspec.Struct, frozen=True):
    """Entry of config.json, with the fields of every method that streamslr decodes."""

    quant_method: str = "an unnamed method"
    # fp8
    weight_block_size: Block | None = None
    # gptq and awq
    bits: int | None = None
    group_size: int | None = None
    checkpoint_format: str | None = None
    version: str | None = None
    # compressed-tensors
    format: str | None = None
    config_groups: dict[str, _Group] = {}  # msgspec copies it
    transform_config: Any = None
    sparsity_config: Any = None

    @property
    def formats(self) -> set[str]:
        """Formats of compressed-tensors that linears have."""
        return {name for name in (self.format, *(group.format for group in self.config_groups.values())) if name}

    @property
    def codes(self) -> list[_Codes]:
        """Codes that linears have, in compressed-tensors."""
        return [group.weights for group in self.config_groups.values() if group.weights]

    @property
    def blocks(self) -> list[Block]:
        """Blocks that config.json names."""
        found = [self.weight_block_size, *(_block(codes.block_structure) for codes in self.codes)]
        return sorted({block for block in found if block})


def read_quantization(config: Mapping[str, Any], label: str) -> Quantization | None:
    """Return the entry that another tool wrote into config.json; None where there is none, or it is streamslr's.

    Args:
        config: config.json.
        label: folder or repository, for error messages.

    Raises:
        InputError: the entry is not what any method that streamslr decodes writes.
    """
    text = config.get(TEXT_PART)
    parts = (config, text if isinstance(text, Mapping) else {})
    entry = next((part[name] for part in parts for name in ENTRIES if part.get(name)), None)
    if isinstance(entry, Mapping) and (entry.get("load_in_4bit") or entry.get("load_in_8bit")):
        entry = {"quant_method": "bitsandbytes", **entry}  # early versions of transformers wrote no quant_method
    method = entry.get("quant_method") if isinstance(entry, Mapping) else None
    if entry is None or method == QUANT_METHOD:
        return None
    try:
        found: Quantization = msgspec.convert(entry, Quantization)
        if any(min(block) < 1 for block in found.blocks):
            raise ValueError(f"blocks of {found.blocks} weights")
    except ValueError as error:  # msgspec's is one
        raise InputError(
            f"{label} is already quantized ({printable(str(method)[:50])}), in a way that streamslr does not know "
            f"({error}); give the original model in bf16, fp16 or fp32"
        ) from error
    return found


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json as it is for a model of dense weights."""
    dense = {name: value for name, value in config.items() if name not in ENTRIES}
    if isinstance(dense.get(TEXT_PART), Mapping):
        dense[TEXT_PART] = {name: value for name, value in dense[TEXT_PART].items() if name not in ENTRIES}
    return dense


def _block(structure: Block | str | None) -> Block | None:
    """Return the block of compressed-tensors' "128x128" or [128, 128]. Raises ValueError."""
    if not isinstance(structure, str):
        return structure
    rows, columns = map(int, structure.split("x"))
    return rows, columns
