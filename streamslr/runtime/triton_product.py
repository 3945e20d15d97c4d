"""The product x Sᵀ with packed S in one Triton kernel: where it is used, its check before the first use, its launch."""

import contextlib
import logging
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamslr.io.packed_layout import meta_code, of_same_code
from streamslr.io.packing import decode_mask, pack, pack_on_grid
from streamslr.spec.pattern import Dense, NofM, SparsityPattern, Unstructured, UnstructuredRows
from streamslr.spec.values import format_of, group_columns, spread

log = logging.getLogger("streamslr")

DEVICES = {"cuda"}
"""Devices that Triton compiles for; the tests add "cpu", where its interpreter runs the kernel."""
_Coded = NofM | UnstructuredRows | Unstructured | Dense
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CODES: Mapping[torch.dtype, str] = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "fp8"}
"""Dtype that codes are stored in -> their name in the kernel."""


class Blocks(NamedTuple):
    """Rows of S, tokens and columns that a program of the kernel works on at a time, its warps and pipeline stages."""

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int


# Not measured on a GPU. As compiled for compute 8.0, 8.9, 9.0 and 10.0 no registers spill and up to 120 KiB of shared
# memory are taken. For few tokens a program waits for memory alone, so it reads much at a time; for many it multiplies
# each weight that it unpacked by as many tokens as registers hold.
FEW_TOKENS, MANY_TOKENS = Blocks(16, 16, 512, 8, 3), Blocks(64, 128, 64, 8, 3)
PICKING = Blocks(4, 8, 12 * 128, 4, 1)
"""Blocks of the kernel for 2:4 and so few tokens; columns: those of 128 bytes of meta."""
PICKING_NUMBERS = 4
"""Most tokens that it multiplies where S holds numbers, not codes. On an H200, 28672×8192, time / dense for 1, 4 and 8
tokens: 1.5, 3.9 and 10.5, and for 8 the kernel for every pattern takes 9.5, sparse tensor cores 2.6. With int4: 1.6,
3.9 and 10.2, and 21.5 (tools/results/inference-graphs-*-h200.json)."""
MOST_TOKENS = 256
"""Most tokens that the kernels multiply; tiles are faster for more: on an H200 2048 tokens through a 28672×8192 linear
in int4 took 57 ms by the kernel and 7 ms in tiles (tools/results/gpu-nvidia-h200.json)."""
_TWO_OF_FOUR = NofM(2, 4)


class KernelKey(NamedTuple):
    """Device, pattern and dtypes that the kernel is checked for."""

    device: torch.device
    pattern: _Coded
    dtype: torch.dtype
    values_dtype: torch.dtype
    scales_dtype: torch.dtype | None


# Why the kernel is not used, None where it is; a check runs once in a process.
_verdicts: dict[KernelKey, str | None] = {}


def fault(
    pattern: SparsityPattern,
    device: torch.device,
    dtype: torch.dtype,
    values_dtype: torch.dtype,
    scales_dtype: torch.dtype | None = None,
) -> str | None:
    """Return why the kernel does not multiply on a device, None where it does; check it first if that is to be done.

    Args:
        pattern: pattern of S.
        device: device of all tensors.
        dtype: dtype of x.
        values_dtype: dtype of the values of S, of codes the one that they are stored in.
        scales_dtype: dtype of the scales of codes; None for numbers.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the kernel is not checked yet.
    """
    if device.type not in DEVICES:
        return f"no Triton kernel on {device.type}"
    key = KernelKey(device, of_same_code(pattern), dtype, values_dtype, scales_dtype)
    if key not in _verdicts:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the kernel of packed linears is not checked yet: run the model once before the capture")
        _verdicts[key] = reason = _fault_of_kernel(key)
        codes = "" if scales_dtype is None else f" with {_CODES.get(values_dtype, values_dtype)} codes"
        which = f"packed linears at {pattern}{codes} in {dtype} on {device}"
        if reason is None:
            log.info("%s: multiplied by the Triton kernel", which)
        else:
            log.warning("%s: unpacked in tiles: %s", which, reason)
    return _verdicts[key]


def in_tiles(tokens: int, device: torch.device, pattern: SparsityPattern) -> bool:
    """Return True where S had better be unpacked in tiles, for so many tokens.

    Not where a CUDA graph is captured and rows differ in their number of values: tiles read row_offsets on the host.
    """
    if tokens <= MOST_TOKENS:
        return False
    return not (
        isinstance(pattern, Unstructured) and device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    )


def picks(tokens: int, pattern: SparsityPattern, of_codes: bool) -> bool:
    """Return True where `multiply` takes the kernel that picks numbers of x, instead of unpacking S."""
    return pattern == _TWO_OF_FOUR and tokens <= (PICKING.tokens if of_codes else PICKING_NUMBERS)


def multiply(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    row_offsets: Tensor | None,
    pattern: SparsityPattern,
    d: int,
    scales: Tensor | None = None,
) -> Tensor:
    """Return x Sᵀ [n, o] in the dtype of x, summed in float32; the host does not wait for the device.

    Codes are multiplied by their scales in float32, and rounded to the dtype of x, as in tiles.

    Args:
        x: [n, d], of any strides.
        values: values of S, or their codes as they are stored.
        meta: uint8 [o, width].
        row_offsets: int64 [o + 1] for patterns whose rows differ in their number of values, else None.
        pattern: pattern of S.
        d: columns of S.
        scales: [o, groups] scales of codes, else None.
    """
    n, o = len(x), len(meta)
    y = x.new_empty(n, o)
    if not y.numel():
        return y
    values, meta = values.contiguous(), meta.contiguous()
    codes = "" if scales is None else _CODES[values.dtype]
    codes_of_entry = 2 if codes == "int4" else 1
    columns_of_byte = _columns_of_byte(pattern)
    blocks = FEW_TOKENS if n <= FEW_TOKENS.tokens else MANY_TOKENS
    num_programs = -(-o // blocks.rows) * -(-n // blocks.tokens)
    kernels = import_module("streamslr.runtime.packed_kernel")
    # An empty tensor has no address, and Triton reads float8 on some cards only.
    numbers = (values.view(torch.uint8) if codes == "fp8" else values) if values.numel() else x
    of_codes: dict[str, Any] = {
        "codes": codes,
        "columns_of_group": 0 if scales is None else group_columns(d, scales.shape[1]),
    }
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if picks(n, pattern, scales is not None):
            rows, bytes_ = PICKING.rows, PICKING.columns // columns_of_byte
            kernels.multiply_2_of_4[(-(-o // rows),)](
                x,
                numbers,
                meta,
                x if scales is None else scales.contiguous(),
                y,
                n,
                o,
                d,
                meta.shape[1],
                *x.stride(),
                0 if scales is None else scales.shape[1],
                **of_codes,
                block_rows=rows,
                block_tokens=1 << (n - 1).bit_length(),
                block_bytes=bytes_,
                num_byte_blocks=-(-meta.shape[1] // bytes_),
                num_warps=PICKING.warps,
                num_stages=PICKING.stages,
            )
            return y
        kernels.multiply_packed[(num_programs,)](
            x,
            numbers,
            meta if meta.numel() else x,
            meta if row_offsets is None else row_offsets.contiguous(),
            _ranks_of_byte(of_same_code(pattern), x.device) if columns_of_byte else x,
            x if scales is None else scales.contiguous(),
            y,
            n,
            o,
            d,
            meta.shape[1],
            0 if row_offsets is not None else values.shape[1] * codes_of_entry,
            values.numel() * codes_of_entry,
            *x.stride(),
            0 if scales is None else scales.shape[1],
            **of_codes,
            columns_of_byte=columns_of_byte,
            values_of_byte=_values_of_byte(pattern, columns_of_byte),
            has_offsets=row_offsets is not None,
            in_float32=not x.is_cuda,
            block_rows=blocks.rows,
            block_tokens=blocks.tokens,
            block_columns=blocks.columns,
            num_column_blocks=-(-d // blocks.columns),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return y


def _columns_of_byte(pattern: SparsityPattern) -> int:
    """Return how many columns a byte of meta describes; 0 where every column is stored, without meta."""
    if isinstance(pattern, Dense):
        return 0
    code = meta_code(pattern)
    return code.count * code.columns


def _values_of_byte(pattern: SparsityPattern, columns: int) -> int:
    """Return how many of its columns each byte of meta stores, but the last of a row; 0 where bytes differ in it."""
    return columns // pattern.m * pattern.n if isinstance(pattern, NofM) and columns % pattern.m == 0 else 0


@cache
def _ranks_of_byte(pattern: _Coded, device: torch.device) -> Tensor:
    """Return for each column of a byte how many the byte stores before it, int16 [256, columns]; -1 if not stored."""
    stored = decode_mask(torch.arange(256, dtype=torch.uint8, device="cpu")[:, None], pattern)
    return (stored.cumsum(1) - 1).masked_fill(~stored, -1).to(torch.int16).to(device)


def _fault_of_kernel(key: KernelKey) -> str | None:
    """Compile the kernel and run it on a small linear; return None when its products are right, else why not.

    All values are integers, so that every sum is exact in any order; in float32 too long for TF32.
    """
    numbers = key.values_dtype if key.scales_dtype is None else key.scales_dtype
    for dtype in (key.dtype, numbers):
        if dtype not in _DTYPES:
            return f"the Triton kernel takes bfloat16, float16 and float32, not {dtype}"
    if key.scales_dtype is None and isinstance(key.pattern, Dense):
        return "the Triton kernel multiplies by dense codes, not by dense numbers"
    if key.scales_dtype is not None and key.values_dtype not in _CODES:
        return f"the Triton kernel has no codes in {key.values_dtype}"
    try:
        import_module("triton")
    except ImportError:
        return "Triton is not installed"
    generator = torch.Generator().manual_seed(0)  # "cpu" is named below: servers set a default device
    m = key.pattern.m if isinstance(key.pattern, NofM) else 1
    o, d = 70, m * (FEW_TOKENS.columns // m + 1)  # multiples of no block

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(-high, high + 1, shape, generator=generator, device="cpu").float()

    scores = torch.rand(o, d, generator=generator, dtype=torch.float32, device="cpu")
    if key.scales_dtype is None:
        largest = 4095 if key.dtype == key.values_dtype == torch.float32 else 2
        S = integers(largest, o, d) * key.pattern.project(scores)
        S[3] = 0
        packed = pack(S, key.pattern, key.values_dtype)
    else:
        # One large code in a row or two, so that all bits of codes are tried and every sum is exact in bfloat16 too.
        scales = integers(1, o, 6)  # for groups of no block, either
        form = format_of(torch.empty(0, dtype=key.values_dtype, device="cpu"), scales, d)
        assert form is not None
        codes = torch.where(scores > 1 - 1 / d, form.nearest(integers(96, o, d)), integers(1, o, d))
        codes *= key.pattern.project(scores)
        S = codes * spread(scales, d)
        packed = pack_on_grid(codes, scales, key.pattern, key.scales_dtype, form)
    parts = {name: part.to(key.device) for name, part in packed.items()}
    for n in (3, PICKING.tokens + 1, FEW_TOKENS.tokens + 1):
        x = integers(1, n, d)
        sparse = parts["values"], parts["meta"], parts.get("row_offsets")
        try:
            y = multiply(x.to(key.device, key.dtype), *sparse, key.pattern, d, parts.get("scales")).cpu()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the compiler, the driver or the kernel: tiles need none of them
            return f"the Triton kernel failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        expected = x.double() @ S.double().t()  # autocast leaves float64 as it is
        if not torch.equal(y, expected.to(key.dtype)):
            return "the Triton kernel gave other products than torch in a check"
    return None
