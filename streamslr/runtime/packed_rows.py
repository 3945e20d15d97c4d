"""Rows of packed S, unpacked or multiplied by a small C library on torch's threads, after a check against torch."""

import ctypes
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from streamslr.io.packed_layout import meta_code, of_same_code
from streamslr.io.packing import decode_mask, pack, unpack_rows
from streamslr.spec.pattern import Dense, NofM, SparsityPattern, Unstructured, UnstructuredRows

MOST_TOKENS = 4
"""Tokens up to which rows are multiplied without a tile. The C file has the same number."""
_PAD = 32
"""Columns of x are a multiple of it, as in the C file."""
_KINDS: Mapping[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_Coded = NofM | UnstructuredRows | Unstructured

log = logging.getLogger("streamslr")


class _Packed(ctypes.Structure):
    """struct packed of packed_rows.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "meta", "row_offsets", "sources", "shuffles")),
        *((name, ctypes.c_int64) for name in ("num_values", "per_row", "rows", "width", "d")),
        *((name, ctypes.c_int32) for name in ("columns", "step", "kind")),
        ("first", 4 * ctypes.c_int32),
    )


@dataclass(frozen=True)
class _Tables:
    """Columns that each byte of meta stores, as the C library reads them.

    Attributes:
        sources: int16 [256, columns]; which of the byte's values goes to a column, -1 for none.
        shuffles: uint8 [256, 4, 16]; which byte goes to each of 16, for the lanes of 16 bytes that the columns fill,
            counted from the lane's first value; 0x80 for none. None where they do not fit.
        first: first value of each lane's sources, 4 numbers; in a bitmask it depends on the byte, and these are 0.
        step: values of a byte; 0 for a bitmask, which has as many as bits.
    """

    sources: Tensor
    shuffles: Tensor | None
    first: tuple[int, ...]
    step: int


def why_not_native(pattern: SparsityPattern, dtype: torch.dtype) -> str | None:
    """Return why the library does not unpack this pattern in this dtype, or None where it does; a reason is logged.

    A small S is unpacked and multiplied by both paths, and compared, before the library is used.
    """
    if dtype.itemsize == 1 or isinstance(pattern, Dense):
        return "the library unpacks no values on a grid"
    return _verdict(of_same_code(pattern), dtype)


@cache
def _verdict(pattern: _Coded, dtype: torch.dtype) -> str | None:
    reason = _find_fault(pattern, dtype)
    if reason:
        log.warning("packed linears on the CPU, %s in %s: unpacked by torch: %s", pattern, dtype, reason)
    return reason


def unpack_native(
    tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int], rows: slice
) -> Tensor:
    """Unpack S[rows] to the same bytes as `unpack_rows`; where meta is damaged, some S without reading past its parts.

    Args:
        tensors: values, meta and, where rows differ, row_offsets, on the CPU and of the layout's shapes.
        pattern: pattern of S, which `why_not_native` has nothing against.
        shape: (o, d).
        rows: rows of S, with start and stop.
    """
    packed, held = _describe(tensors, pattern, shape, rows)
    S = torch.empty(packed.rows, shape[1], dtype=held[0].dtype, device="cpu")
    _library().streamslr_unpack(packed, S.data_ptr(), torch.get_num_threads())
    return S


def multiply_native(
    x: Tensor, tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]
) -> Tensor:
    """Return x Sᵀ [n, o] for x [n, d] in the dtype of the values; sums are float32, rounded once.

    Raises:
        ValueError: n is not 1 to MOST_TOKENS, or x has not d columns.
    """
    if not 1 <= len(x) <= MOST_TOKENS or x.shape[1] != shape[1]:
        raise ValueError(f"x is {list(x.shape)}: S {list(shape)} multiplies 1 to {MOST_TOKENS} tokens")
    packed, _held = _describe(tensors, pattern, shape, slice(0, shape[0]))
    x32 = torch.nn.functional.pad(x.float(), (0, -shape[1] % _PAD)).contiguous()
    y = torch.empty(len(x), shape[0], dtype=torch.float32, device="cpu")
    _library().streamslr_multiply(packed, x32.data_ptr(), *x32.shape, y.data_ptr(), torch.get_num_threads())
    return y.to(x.dtype)


def _describe(
    tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int], rows: slice
) -> tuple[_Packed, list[Tensor]]:
    """Return S[rows] for the library, and the tensors that it points to."""
    values, meta, offsets = tensors["values"], tensors["meta"][rows].contiguous(), None
    if any(t.device.type != "cpu" for t in tensors.values()):
        raise ValueError("the C library reads the CPU's memory alone")
    tables, o = _tables(of_same_code(pattern), values.element_size()), rows.stop - rows.start
    if values.dim() == 2:
        values = values[rows]
    else:
        offsets = tensors["row_offsets"][rows.start : rows.stop + 1].contiguous()
    values = values.contiguous()
    expected = o, -(-shape[1] // tables.sources.shape[1])
    if meta.shape != expected or (offsets is not None and len(offsets) != o + 1):
        raise ValueError(f"meta {list(meta.shape)} does not describe rows {rows} of S {list(shape)} by {pattern}")
    held = (values, meta, offsets, tables.sources, tables.shuffles)
    sizes = values.numel(), values.shape[-1], *meta.shape, shape[1]
    code = tables.sources.shape[1], tables.step, _KINDS[values.dtype], tables.first
    packed = _Packed(*(None if tensor is None else tensor.data_ptr() for tensor in held), *sizes, *code)
    return packed, [tensor for tensor in held if tensor is not None]


@cache
def _tables(pattern: _Coded, value_bytes: int) -> _Tables:
    code, device, width = meta_code(pattern), torch.device("cpu"), 16 // value_bytes
    mask = decode_mask(torch.arange(256, dtype=torch.uint8, device=device)[:, None], pattern)  # [256, columns]
    sources = torch.where(mask, mask.cumsum(1) - 1, -1)
    tables = _Tables(sources.short().contiguous(), None, (0, 0, 0, 0), code.group.n * code.count if code.group else 0)
    if mask.shape[1] > 16:
        return tables
    lanes = torch.nn.functional.pad(sources, (0, 4 * width - mask.shape[1]), value=-1).view(256, 4, width)
    used = lanes >= 0
    first = torch.where(used, lanes, 255).amin(2)  # [256, 4]
    if code.group:
        first = torch.where(first.amin(0) < 255, first.amin(0), 0).expand(256, 4)
    places = lanes - first[:, :, None]
    if (places[used] >= width).any():
        return tables
    shuffles = places[..., None] * value_bytes + torch.arange(value_bytes, device=device)
    shuffles = torch.where(used[..., None], shuffles, 0x80).view(256, 4, 16)
    return replace(tables, shuffles=shuffles.byte(), first=tuple(first[0].tolist()) if code.group else tables.first)


@cache
def _library() -> ctypes.CDLL:
    """Load the library. Raises OSError with the reason where that fails or this CPU cannot run it."""
    spec = find_spec("streamslr.runtime._packed_rows")
    if spec is None or spec.origin is None:
        raise OSError("the C library was not built; installing streamslr where there is a C compiler builds it")
    library = ctypes.CDLL(spec.origin)
    if not library.streamslr_runs_here():
        raise OSError("the C library needs an x86-64 CPU with AVX2")
    pointer = ctypes.c_void_p
    for function, arguments in (
        (library.streamslr_unpack, (pointer,)),
        (library.streamslr_multiply, (pointer, ctypes.c_int64, ctypes.c_int64, pointer)),
    ):
        function.argtypes, function.restype = (ctypes.POINTER(_Packed), *arguments, ctypes.c_int), None
    return library


def _find_fault(pattern: SparsityPattern, dtype: torch.dtype) -> str | None:
    """Return why the library cannot be used: it is missing, or its S or product of a small linear is not torch's."""
    if dtype not in _KINDS:
        return f"the C library has no {dtype}"
    try:
        _library()
    except (OSError, AttributeError) as error:  # AttributeError: a function is missing, of an older build
        return str(error)
    unit = pattern.m if isinstance(pattern, NofM) else 1
    shape = 5, unit * max(3, 2500 // unit)  # more than a block of columns
    random = torch.Generator("cpu").manual_seed(0)
    W = torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")
    tensors, rows = pack(W * pattern.project(W), pattern, dtype), slice(1, shape[0])
    expected = unpack_rows(tensors, pattern, shape, rows)
    if not torch.equal(unpack_native(tensors, pattern, shape, rows).view(torch.uint8), expected.view(torch.uint8)):
        return "the C library unpacked a small linear wrongly"
    x = torch.randn(3, shape[1], generator=random, dtype=torch.float32, device="cpu").to(dtype)
    y = multiply_native(x, tensors, pattern, shape)[:, rows].double()
    difference, largest = (y - x.double() @ expected.double().t()).abs().max(), y.abs().max()
    if not difference <= 4 * torch.finfo(dtype).eps * largest:
        return "the C library multiplied a small linear wrongly"
    return None
