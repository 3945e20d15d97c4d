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
from streamslr.io.packing import decode_mask, pack, pack_on_grid, unpack_rows
from streamslr.spec.pattern import Dense, NofM, SparsityPattern, Unstructured, UnstructuredRows
from streamslr.spec.values import format_of, group_columns, group_count

MOST_TOKENS = 4
"""Tokens up to which rows are multiplied without a tile. The C file has the same number."""
_PAD = 32
"""Columns of x are a multiple of it, as in the C file."""
_KINDS: Mapping[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CODE_KINDS: Mapping[torch.dtype, int] = {torch.int8: 3, torch.uint8: 4, torch.float8_e4m3fn: 5}

_Coded = NofM | UnstructuredRows | Unstructured | Dense

log = logging.getLogger("streamslr")


class _Packed(ctypes.Structure):
    """struct packed of packed_rows.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "meta", "row_offsets", "scales", "sources", "shuffles")),
        *((name, ctypes.c_int64) for name in ("num_values", "per_row", "rows", "width", "d", "groups", "group")),
        *((name, ctypes.c_int32) for name in ("columns", "step", "kind", "scale_kind")),
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


def why_not_native(pattern: SparsityPattern, dtype: torch.dtype, scales_dtype: torch.dtype | None = None) -> str | None:
    """Return why the library does not unpack this pattern, or None where it does; a reason is logged.

    A small S is unpacked and multiplied by both paths, and compared, before the library is used.

    Args:
        pattern: pattern of S.
        dtype: dtype of the values, of codes the one that they are stored in.
        scales_dtype: dtype of the scales of codes; None for numbers.
    """
    return _verdict(of_same_code(pattern), dtype, scales_dtype)


@cache
def _verdict(pattern: _Coded, dtype: torch.dtype, scales_dtype: torch.dtype | None) -> str | None:
    reason = _find_fault(pattern, dtype, scales_dtype)
    if reason:
        stored = dtype if scales_dtype is None else f"{dtype} with scales in {scales_dtype}"
        log.warning("packed linears on the CPU, %s in %s: unpacked by torch: %s", pattern, stored, reason)
    return reason


def unpack_native(
    tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int], rows: slice
) -> Tensor:
    """Unpack S[rows] to the same bytes as `unpack_rows`; where meta is damaged, some S without reading past its parts.

    Args:
        tensors: values, meta, of codes scales and, where rows differ, row_offsets, on the CPU, of the layout's shapes.
        pattern: pattern of S, which `why_not_native` has nothing against.
        shape: (o, d).
        rows: rows of S, with start and stop.
    """
    packed, held = _describe(tensors, pattern, shape, rows)
    dtype = torch.float32 if "scales" in tensors else held[0].dtype
    S = torch.empty(packed.rows, shape[1], dtype=dtype, device="cpu")
    _library().streamslr_unpack(packed, S.data_ptr(), torch.get_num_threads())
    return S


def multiply_native(
    x: Tensor, tensors: Mapping[str, Tensor], pattern: SparsityPattern, shape: tuple[int, int]
) -> Tensor:
    """Return x Sᵀ [n, o] for x [n, d] in the dtype of values or scales; sums are float32, rounded once.

    Codes are summed in each group of columns before their scale multiplies the sum.

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
    if any(t.device.type != "cpu" for t in tensors.values()):
        raise ValueError("the C library reads the CPU's memory alone")
    values, meta, scales = tensors["values"], tensors["meta"][rows].contiguous(), tensors.get("scales")
    (o, d), offsets, kinds = (rows.stop - rows.start, shape[1]), None, _KINDS if scales is None else _CODE_KINDS
    tables = _tables(of_same_code(pattern), 1 if scales is not None else values.element_size())
    columns = tables.sources.shape[1]
    if values.dim() == 2:
        values = values[rows]
    else:
        offsets = tensors["row_offsets"][rows.start : rows.stop + 1].contiguous()
    values, width = values.contiguous(), -(-d // columns)
    expected = o, 0 if isinstance(pattern, Dense) else width
    if meta.shape != expected or (offsets is not None and len(offsets) != o + 1):
        raise ValueError(f"meta {list(meta.shape)} does not describe rows {rows} of S {list(shape)} by {pattern}")
    groups = scale_kind = 0
    if scales is not None:
        scales, scale_kind = scales[rows].contiguous(), _KINDS[scales.dtype]
        if scales.dim() != 2 or len(scales) != o or not scales.shape[1]:
            raise ValueError(f"scales {list(scales.shape)} do not scale rows {rows} of S {list(shape)}")
        groups = scales.shape[1]
    held = values, None if isinstance(pattern, Dense) else meta, offsets, scales, tables.sources, tables.shuffles
    in_entry = 2 if kinds[values.dtype] == _CODE_KINDS[torch.uint8] else 1
    sizes = values.numel() * in_entry, values.shape[-1] * in_entry, o, width, d, groups, group_columns(d, groups)
    code = columns, tables.step, kinds[values.dtype], scale_kind, tables.first
    packed = _Packed(*(None if tensor is None else tensor.data_ptr() for tensor in held), *sizes, *code)
    return packed, [tensor for tensor in held if tensor is not None]


@cache
def _tables(pattern: _Coded, value_bytes: int) -> _Tables:
    if isinstance(pattern, Dense):  # read as if a byte described each column; there are none
        return _Tables(torch.zeros(256, 1, dtype=torch.int16, device="cpu"), None, (0, 0, 0, 0), 1)
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
    if library.streamslr_size_of_packed() not in (0, ctypes.sizeof(_Packed)):
        raise OSError("the C library is of another version; installing streamslr again builds it")
    if not library.streamslr_runs_here():
        raise OSError("the C library needs an x86-64 CPU with AVX2")
    pointer = ctypes.c_void_p
    for function, arguments in (
        (library.streamslr_unpack, (pointer,)),
        (library.streamslr_multiply, (pointer, ctypes.c_int64, ctypes.c_int64, pointer)),
    ):
        function.argtypes, function.restype = (ctypes.POINTER(_Packed), *arguments, ctypes.c_int), None
    return library


def _find_fault(pattern: _Coded, dtype: torch.dtype, scales_dtype: torch.dtype | None) -> str | None:
    """Return why the library cannot be used: it is missing, or its S or product of a small linear is not torch's."""
    if isinstance(pattern, Dense) and scales_dtype is None:
        return "the C library multiplies by dense codes, not by dense numbers"
    for each, kinds in ((dtype, _KINDS if scales_dtype is None else _CODE_KINDS), (scales_dtype, _KINDS)):
        if each is not None and each not in kinds:
            return f"the C library has no {each}"
    try:
        _library()
    except (OSError, AttributeError) as error:  # AttributeError: a function is missing, of an older build
        return str(error)
    unit = pattern.m if isinstance(pattern, NofM) else 1
    shape = 5, unit * max(3, 2500 // unit)  # more than a block of columns
    random = torch.Generator("cpu").manual_seed(0)
    W = torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")
    if scales_dtype is None:
        tensors = pack(W * pattern.project(W), pattern, dtype)
    else:
        scales = 1 + torch.rand(5, 20, generator=random, dtype=torch.float32, device="cpu")
        form = format_of(torch.empty(0, dtype=dtype, device="cpu"), scales, shape[1])
        assert form is not None
        codes = form.nearest(W * form.largest / 2) * pattern.project(W)
        tensors = pack_on_grid(codes, scales[:, : group_count(shape[1], form.group)], pattern, scales_dtype, form)
    rows = slice(1, shape[0])
    expected = unpack_rows(tensors, pattern, shape, rows)
    if not torch.equal(unpack_native(tensors, pattern, shape, rows).view(torch.uint8), expected.view(torch.uint8)):
        return "the C library unpacked a small linear wrongly"
    x = torch.randn(3, shape[1], generator=random, dtype=torch.float32, device="cpu").to(scales_dtype or dtype)
    y = multiply_native(x, tensors, pattern, shape)[:, rows].double()
    difference, largest = (y - x.double() @ expected.double().t()).abs().max(), y.abs().max()
    if not difference <= 4 * torch.finfo(x.dtype).eps * largest:
        return "the C library multiplied a small linear wrongly"
    return None
