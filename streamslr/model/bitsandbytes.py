"""Weights that bitsandbytes stored, in 4 bits (nf4, fp4) or 8 (LLM.int8()): found, checked, decoded to its own bits.

The functions follow version 0.50 of bitsandbytes: `QuantState.as_dict(packed=True)` writes what is stored of 4 bits,
`dequantize_4bit` and `int8_vectorwise_dequant` decode it.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Annotated, Literal

import msgspec
import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.io.safetensors_file import DTYPE_NAMES, TensorInfo
from streamslr.model.decode_codes import decode
from streamslr.model.dequantize import Codes, Kind, Layout, Scales
from streamslr.model.quantized_parts import ORIGINAL, QuantizedWeight, Stored, names
from streamslr.outside import parse_json
from streamslr.printable import printable

_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
TABLES: Mapping[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (*_FP4, *(-number for number in _FP4)),
}
"""Numbers of the codes 0 to 15: `nf4_dequantization_lut` and `fp4_dequantization_lut` of its csrc/kernels.cu."""

_MARK = ".quant_state.bitsandbytes__"
"""Part between a weight's name and its `quant_type` in the name of its state."""
_LARGEST_STATE = 4096
"""Bytes of the largest state that is read; bitsandbytes writes about 150."""
_STORAGE = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that bytes of codes are stored as (`bnb_4bit_quant_storage`)."""
_PER_ROW = 7.874015718698502e-3
"""1 / 127 as `int8_vectorwise_dequant` has it, which multiplies codes by SCB, then by this."""

_Size = Annotated[int, msgspec.Meta(ge=1, le=2**62)]


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """State of a weight of 4 bits, without its tensors."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
    """Weights, in the order of memory, that have one scale."""
    dtype: Literal["bfloat16", "float16", "float32"]
    """Dtype that weights are rounded to."""
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(min_length=2, max_length=8)]
    nested_blocksize: _Size | None = None
    """Scales that have one scale of their own, where they are codes too (double quantization)."""
    nested_dtype: Literal["float32"] | None = None
    nested_offset: float | None = None
    """Added to scales that are codes."""


def four_bits(stored: Stored) -> Iterator[QuantizedWeight]:
    """Yield weights that are stored as codes of 4 bits; only their states tell the shapes."""
    found = {}
    for name, info in stored.tensors.items():
        weight, mark, _ = name.rpartition(_MARK)
        if not mark:
            continue
        if info.dtype != torch.uint8 or len(info.shape) != 1 or info.nbytes > _LARGEST_STATE:
            kind = f"{DTYPE_NAMES[info.dtype]} {list(info.shape)}"
            raise stored.refusal(info, f"is {kind}, no state U8 [n] of at most {_LARGEST_STATE} bytes; {ORIGINAL}")
        found[name] = weight
    for (name, weight), raw in zip(found.items(), stored.read(found), strict=True):
        yield _find_four_bits(stored, weight, stored.tensors[name], raw)
    for part in (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"):
        stored.require_no_orphans(part, tuple(_MARK + kind for kind in TABLES))


def _find_four_bits(stored: Stored, weight: str, info: TensorInfo, raw: bytes) -> QuantizedWeight:
    """Return the decoder of a weight, from its state. Raises InputError."""
    try:
        state = parse_json(raw, _State)
        if not info.name.endswith(_MARK + state.quant_type):
            raise ValueError(f"it says quant_type {state.quant_type}")
        if len({value is None for value in (state.nested_blocksize, state.nested_dtype, state.nested_offset)}) > 1:
            raise ValueError("of nested_blocksize, nested_dtype and nested_offset it holds only some")
    except ValueError as error:
        raise stored.refusal(
            info,
            f"is no state of a weight that streamslr decodes ({printable(str(error))}); download the model again, or "
            f"{ORIGINAL}",
        ) from error
    codes, size = stored.companion(weight, info), prod(state.shape)
    if codes.dtype not in _STORAGE or codes.shape[1:] != (1,) or 2 * codes.nbytes != size:
        raise stored.refusal(
            codes,
            f"is {DTYPE_NAMES[codes.dtype]} {list(codes.shape)}, where {info.name} speaks of codes of 4 bits for a "
            f"weight {list(state.shape)}, {names(_STORAGE)} of {size / 2:g} bytes in one column; download the model "
            f"again",
        )
    parts = {"codes": codes, "state": info}
    for part in ("absmax", "quant_map"):
        parts[part] = stored.companion(f"{weight}.{part}", codes)
    stored.require(parts["quant_map"], (torch.float32,), ((16,),), weight)
    blocks = -(-size // state.blocksize)
    stored.require(parts["absmax"], (torch.uint8 if state.nested_blocksize else torch.float32,), ((blocks,),), weight)
    if state.nested_blocksize:
        for part, length in (("nested_absmax", -(-blocks // state.nested_blocksize)), ("nested_quant_map", 256)):
            parts[part] = stored.companion(f"{weight}.{part}", codes)
            stored.require(parts[part], (torch.float32,), ((length,),), weight)
    make = partial(_decode_four_bits, state=state, raw=raw, refusal=partial(stored.refusal, info))
    return stored.weight(weight, state.shape, parts, make)


def _decode_four_bits(
    parts: Mapping[str, Tensor], weight: Tensor, state: _State, raw: bytes, refusal: Callable[[str], InputError]
) -> None:
    if parts["state"].numpy().tobytes() != raw:
        raise refusal("changed since it was opened: something else writes there; let it end, then run the line again")
    table = torch.tensor(TABLES[state.quant_type], dtype=torch.float32, device="cpu")
    if not torch.allclose(parts["quant_map"], table, rtol=0, atol=1e-6):  # as QuantState compares them
        raise refusal(
            f"says {state.quant_type}, and the 16 numbers beside it are others, which bitsandbytes reads or not; "
            f"{ORIGINAL}"
        )
    scales = _four_bit_scales(parts, state)
    codes, flat, block = parts["codes"].view(torch.uint8).flatten(), weight.view(-1), state.blocksize
    # Blocks lie along memory, so that they may go over the ends of rows; the last one may be smaller.
    width = weight.shape[-1] if weight.shape[-1] % block == 0 else block
    whole = len(flat) // width * width
    for start, stop, columns in ((0, whole, width), (whole, len(flat), len(flat) - whole)):
        if start < stop:
            rows = (stop - start) // columns
            some = codes[start // 2 : stop // 2].view(rows, -1)
            of = Scales(scales[start // block : -(-stop // block)].view(rows, -1), 1, block)
            part = flat[start:stop].view(rows, columns)
            decode(Codes(some, Kind.TABLE, Layout.UPPER_FIRST, table), of, part, getattr(torch, state.dtype))


def _four_bit_scales(parts: Mapping[str, Tensor], state: _State) -> Tensor:
    """Return the scale of each block in float32."""
    scales = parts["absmax"]
    if state.nested_blocksize is None:
        return scales
    factors = parts["nested_absmax"].repeat_interleave(min(state.nested_blocksize, len(scales)))[: len(scales)]
    return parts["nested_quant_map"][scales.int()].mul_(factors).add_(state.nested_offset or 0.0)


def llm_int8(stored: Stored) -> Iterator[QuantizedWeight]:
    """Yield weights [o, d] in int8, with the largest magnitude of each row (`SCB`) beside them."""
    for name, info in stored.tensors.items():
        module = name.removesuffix("weight")
        scales = stored.tensors.get(f"{module}SCB")
        if info.dtype != torch.int8:
            if scales and name.endswith(".weight"):
                raise stored.refusal(
                    info, f"is {DTYPE_NAMES[info.dtype]}, and {scales.name} beside it is for I8; {ORIGINAL}"
                )
            continue
        if len(info.shape) != 2 or 0 in info.shape:
            raise stored.refusal(info, f"is I8 {list(info.shape)}, no matrix; {ORIGINAL}")
        parts = {"codes": info, "scales": stored.companion(f"{module}SCB", info)}
        stored.require(parts["scales"], (torch.float32,), (info.shape[:1],), name)
        if form := stored.tensors.get(f"{module}weight_format"):
            stored.require(form, (torch.uint8,), ((), (1,)), name)
            parts["form"] = form
        yield stored.weight(name, info.shape, parts, partial(_decode_llm_int8, refusal=partial(stored.refusal, info)))
    for part in (".SCB", ".weight_format"):
        stored.require_no_orphans(part, (".weight",))


def _decode_llm_int8(parts: Mapping[str, Tensor], weight: Tensor, refusal: Callable[[str], InputError]) -> None:
    if "form" in parts and int(parts["form"]) != 0:
        raise refusal(
            f"has weight_format {int(parts['form'])}, an order of older GPU kernels, where streamslr, as "
            f"bitsandbytes 0.50, reads rows (0); {ORIGINAL}"
        )
    of = Scales(parts["scales"][:, None], 1, weight.shape[1], unit=_PER_ROW)
    decode(Codes(parts["codes"], Kind.INT8), of, weight)
