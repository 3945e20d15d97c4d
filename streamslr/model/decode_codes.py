"""Weights from codes by a small C library on torch's threads, after a check against torch; by torch where it cannot."""

import ctypes
import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from streamslr.model.dequantize import Codes, Kind, Layout, Scales, dequantize, powers_of_two

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

log = logging.getLogger("streamslr")


class _Coded(ctypes.Structure):
    """struct coded of decode_codes.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "order", "table", "weight")),
        *((name, ctypes.c_int64) for name in ("o", "d", "groups", "rows", "group")),
        *((name, ctypes.c_int32) for name in ("kind", "layout", "via", "dtype", "transposed")),
        ("unit", ctypes.c_float),
    )


def decode(codes: Codes, scales: Scales, weight: Tensor, via: torch.dtype | None = None) -> None:
    """Write a weight as `dequantize` does, to the same bits; those of a NaN may differ. Arguments as there."""
    if why_not_native(codes.kind, codes.layout, weight.dtype) is None:
        decode_native(codes, scales, weight, via)
    else:
        dequantize(codes, scales, weight, via)


@cache
def why_not_native(kind: Kind, layout: Layout, dtype: torch.dtype) -> str | None:
    """Return why the library does not decode such codes to this dtype, or None where it does; a reason is logged.

    A small weight is decoded in both ways, and compared, before the library is used.
    """
    reason = _find_fault(kind, layout, dtype)
    if reason:
        stored = kind.name.lower() if layout == Layout.ROWS else f"{kind.name.lower()} ({layout.name.lower()})"
        log.warning("weights stored as %s: decoded to %s by torch, slowly: %s", stored, dtype, reason)
    return reason


def decode_native(codes: Codes, scales: Scales, weight: Tensor, via: torch.dtype | None) -> None:
    """Write a weight by the library; of fp4 it may be a transposed view.

    Raises:
        ValueError: parts do not fit together.
    """
    (o, d), transposed = weight.shape, not weight.is_contiguous()
    order = scales.columns.to(torch.int32).contiguous() if isinstance(scales.columns, Tensor) else None
    group = d if isinstance(scales.columns, Tensor) else scales.columns
    factors, zeros = scales.scales, None if scales.zeros is None else scales.zeros.float().contiguous()
    if codes.kind != Kind.FP4:
        factors = (powers_of_two(factors) if factors.dtype == torch.uint8 else factors).float()
    factors, stored = factors.contiguous(), codes.stored.contiguous()
    table = None if codes.table is None else codes.table.float().contiguous()
    grid = -(-o // scales.rows), -(-d // group) if order is None else factors.shape[1]
    words = {Layout.COLUMNS: (d * codes.kind.bits // 32, o), Layout.AWQ: (d, o // 8)}
    fits = (
        stored.nbytes * 8 == o * d * codes.kind.bits
        and words.get(codes.layout, stored.shape) == stored.shape
        and factors.shape == grid
        and (zeros is None or zeros.shape == grid)
        and (order is None or (order.shape == (d,) and 0 <= int(order.min()) <= int(order.max()) < grid[1]))
        and (not transposed or weight.t().is_contiguous())
        and (codes.kind == Kind.FP4) == (factors.dtype == torch.uint8)
        and (codes.kind != Kind.FP4 or (codes.layout, group, zeros) == (Layout.ROWS, 32, None))
        and (codes.kind == Kind.FP4 or not transposed)
        and (codes.kind == Kind.TABLE) == (codes.layout == Layout.UPPER_FIRST) == (table is not None)
        and (table is None or (table.shape, zeros, order) == ((16,), None, None))
        and (codes.kind == Kind.INT8 or scales.unit == 1)
    )
    if not fits:
        raise ValueError(
            f"{codes.kind.name} codes {list(stored.shape)} in {codes.layout.name} and scales {list(factors.shape)} for "
            f"{scales.rows} rows and {group} columns do not make a weight {[o, d]} of strides {weight.stride()}"
        )
    held = stored, factors, zeros, order, table, weight
    coded = _Coded(
        *(None if tensor is None else tensor.data_ptr() for tensor in held),
        *(o, d, factors.shape[1], scales.rows, group),
        *(codes.kind, codes.layout, _DTYPES[via or torch.float32], _DTYPES[weight.dtype], transposed, scales.unit),
    )
    _library().streamslr_decode(coded, torch.get_num_threads())


@cache
def _library() -> ctypes.CDLL:
    """Load the library. Raises OSError with the reason where that fails or this CPU cannot run it."""
    spec = find_spec("streamslr.model._decode_codes")
    if spec is None or spec.origin is None:
        raise OSError("the C library was not built; installing streamslr where there is a C compiler builds it")
    library = ctypes.CDLL(spec.origin)
    if library.streamslr_size_of_coded() not in (0, ctypes.sizeof(_Coded)):
        raise OSError("the C library is of another version; installing streamslr again builds it")
    if not library.streamslr_decodes_here():
        raise OSError("the C library needs an x86-64 CPU with AVX2")
    library.streamslr_decode.argtypes = ctypes.POINTER(_Coded), ctypes.c_int
    library.streamslr_decode.restype = None
    return library


def _find_fault(kind: Kind, layout: Layout, dtype: torch.dtype) -> str | None:
    """Return why the library cannot be used: it is missing, or its small weight is not torch's."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the C library writes bfloat16 and float16, not {dtype}"
    try:
        _library()
    except (OSError, AttributeError) as error:  # AttributeError: a function is missing, of an older build
        return str(error)
    o, d, group = 72, 416, 32 if kind == Kind.FP4 else 104
    random = torch.Generator("cpu").manual_seed(0)
    stored = torch.randint(0, 256, (o, d * kind.bits // 8), generator=random, dtype=torch.uint8, device="cpu")
    factors = torch.randn(o, d // group, generator=random, dtype=torch.float32, device="cpu")
    if kind == Kind.FP4:
        factors = torch.randint(100, 150, factors.shape, generator=random, dtype=torch.uint8, device="cpu")
    elif kind == Kind.FP8:
        stored = stored.view(torch.float8_e4m3fn)
    elif kind == Kind.INT8:
        stored = stored.view(torch.int8)
    elif layout in (Layout.COLUMNS, Layout.AWQ):
        stored = stored.view(torch.int32).view((d, o // 8) if layout == Layout.AWQ else (d * kind.bits // 32, o))
    zeros = factors.round() if kind in (Kind.UINT4, Kind.UINT8) else None
    table = torch.randn(16, generator=random, device="cpu") if kind == Kind.TABLE else None
    codes = Codes(stored, kind, layout, table)
    for via, unit in ((None, 1.0), (torch.float16, 1 / 127 if kind == Kind.INT8 else 1.0)):
        scales = Scales(factors, 1, group, zeros, unit)
        native, expected = (torch.empty(d, o, dtype=dtype, device="cpu") for _ in range(2))
        if kind == Kind.FP4:
            native, expected = native.t(), expected.t()
        else:
            native, expected = native.view(o, d), expected.view(o, d)
        decode_native(codes, scales, native, via)
        dequantize(codes, scales, expected, via)
        same = (native.view(torch.int16) == expected.view(torch.int16)) | (native.isnan() & expected.isnan())
        if not bool(same.all()):
            return "the C library decoded a small weight wrongly"
    return None
