"""Weights that other tools stored in 8 or 4 bits: found by what is stored, checked by headers, decoded one by one."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from math import prod

import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.io.safetensors_file import DTYPE_NAMES, TensorInfo
from streamslr.model.bitsandbytes import four_bits, llm_int8
from streamslr.model.decode_codes import decode
from streamslr.model.dequantize import Codes, Kind, Layout, Scales, unpack_awq, unpack_words
from streamslr.model.quantization import Block, Quantization
from streamslr.model.quantized_parts import ORIGINAL, QuantizedWeight, Shape, Stored, names

_SCALES = (torch.float32, torch.bfloat16, torch.float16)


def quantized_weights(
    quantization: Quantization,
    tensors: Mapping[str, TensorInfo],
    dtype: torch.dtype,
    label: str,
    read: Callable[[Iterable[str]], list[bytes]],
) -> dict[str, QuantizedWeight]:
    """Find the weights of a checkpoint that are stored as codes and scales, by the names of the dense weights.

    Which weights these are is read from what is stored, not from the patterns of names in config.json.

    Args:
        quantization: config.json's entry.
        tensors: stored tensors by name.
        dtype: dtype of decoded weights.
        label: folder or repository, for error messages.
        read: returns the bytes of small stored tensors by name.

    Raises:
        InputError: a format that streamslr does not decode, or a weight that lacks a part or has one that does not fit.
    """
    _require_known(quantization, label)
    stored = Stored(tensors, quantization, dtype, label, read)
    weights: dict[str, QuantizedWeight] = {}
    for find in _FINDERS[quantization.quant_method]:
        for weight in find(stored):
            name = weight.info.name
            if name in weights or (name in tensors and name not in weight.stored):
                raise stored.refusal(
                    tensors[weight.stored[0]], f"stands for {name}, which is stored in another way too; {ORIGINAL}"
                )
            weights[name] = weight
    if not weights:
        raise InputError(
            f"config.json of {label} says that it is quantized ({quantization.quant_method}), but no weight is stored "
            f"so; take quantization_config out of config.json if they are dense, or download the model again"
        )
    return weights


def _require_known(quantization: Quantization, label: str) -> None:
    """Raise InputError for a method or format without a decoder, and for what changes weights beside codes."""
    method = quantization.quant_method
    already = f"{label} is already quantized ({method}"
    if method not in _FINDERS:
        raise InputError(f"{already}); streamslr decodes {', '.join(_FINDERS)}; {ORIGINAL}")
    if unknown := sorted(quantization.formats - _FORMATS) if method == "compressed-tensors" else ():
        known = ", ".join(sorted(_FORMATS - {"dense", "mixed-precision"}))
        raise InputError(f"{already}, {unknown[0]}); of its formats streamslr decodes {known}; {ORIGINAL}")
    if method == "gptq" and quantization.checkpoint_format not in (None, "gptq", "gptq_v2"):
        form = quantization.checkpoint_format
        raise InputError(f"{already}, {form}); streamslr decodes the checkpoint_format gptq and gptq_v2; {ORIGINAL}")
    if method == "awq" and (quantization.version or "gemm").lower() != "gemm":
        raise InputError(f"{already}, version {quantization.version}); streamslr decodes version gemm; {ORIGINAL}")
    sparsity = quantization.sparsity_config
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise InputError(f"{already}, sparsity {sparsity['format']}), which streamslr does not decode; {ORIGINAL}")
    if quantization.transform_config:
        raise InputError(
            f"{already}) and rotates activations (transform_config), so that its weights alone do not make the model; "
            f"{ORIGINAL}"
        )


# Codes of 8 bits with scales: fp8 of every kind, int8


def _coded_bytes(stored: Stored, suffix: str, dtypes: tuple[torch.dtype, ...]) -> Iterator[QuantizedWeight]:
    """Yield weights [.., o, d] of which the codes are stored by the weight's name, the scales with a suffix to it."""
    in_scales_dtype = suffix == "_scale"  # compressed-tensors and fbgemm compute in it
    for name, info in stored.tensors.items():
        scales = stored.tensors.get(name + suffix)
        if info.dtype not in dtypes or name.endswith("_zero_point"):
            if scales and name.endswith(".weight"):
                raise stored.refusal(
                    info,
                    f"is {DTYPE_NAMES[info.dtype]}, and {scales.name} beside it is for {names(dtypes)}; {ORIGINAL}",
                )
            continue
        if len(info.shape) < 2 or 0 in info.shape:
            raise stored.refusal(info, f"is {DTYPE_NAMES[info.dtype]} {list(info.shape)}, no matrix; {ORIGINAL}")
        scales = stored.companion(name + suffix, info)
        block = _find_block(info.shape, scales.shape, stored.quantization.blocks, groups=in_scales_dtype)
        if block is None or scales.dtype not in (*_SCALES, torch.uint8):
            known = " and ".join(f"blocks of {rows}x{columns}" for rows, columns in stored.quantization.blocks)
            raise stored.refusal(
                scales,
                f"is {DTYPE_NAMES[scales.dtype]} {list(scales.shape)}, which fits no scales of {name} "
                f"{list(info.shape)} ({known or 'no blocks'} by config.json); download the model again",
            )
        parts = {"codes": info, "scales": scales}
        if zeros := stored.tensors.get(f"{name}_zero_point"):
            stored.require(zeros, dtypes, (scales.shape,), name)
            parts["zeros"] = zeros
        via = scales.dtype if in_scales_dtype else None
        yield stored.weight(name, info.shape, parts, partial(_decode_bytes, block=block, via=via))
    stored.require_no_orphans(f".weight{suffix}", (".weight", ".weight_packed"))


def _find_block(shape: Shape, scales: Shape, blocks: list[Block], groups: bool) -> Block | None:
    """Return rows and columns of the weight that one scale is for; None where the scales do not fit.

    Args:
        shape: shape [.., o, d] of the weight.
        scales: shape of the scales.
        blocks: blocks that config.json names.
        groups: True where a row may have scales for groups of columns.
    """
    *matrices, o, d = shape
    if prod(scales) == 1:
        return o, d
    for rows, columns in blocks:
        if scales == (*matrices, -(-o // rows), -(-d // columns)):
            return rows, columns
    if len(scales) != len(shape) or any(n not in (1, m) for n, m in zip(scales, matrices, strict=False)):
        return None
    height, width = scales[-2:]
    columns = {1: d, d: 1}.get(width, d // width if groups and width and d % width == 0 else 0)
    rows = {1: o, o: 1}.get(height, 0)
    return (rows, columns) if rows and columns else None


def _decode_bytes(parts: Mapping[str, Tensor], weight: Tensor, block: Block, via: torch.dtype | None) -> None:
    codes, scales, zeros = parts["codes"], parts["scales"], parts.get("zeros")
    *matrices, o, d = codes.shape
    grid, kind = (-(-o // block[0]), -(-d // block[1])), Kind.FP8 if codes.dtype.is_floating_point else Kind.INT8

    def by_matrix(tensor: Tensor) -> Tensor:
        whole = tensor.reshape((1,) * (2 - tensor.dim()) + tensor.shape)
        return whole.expand(*matrices, *grid).reshape(-1, *grid)

    scales, zeros = by_matrix(scales), None if zeros is None else by_matrix(zeros)
    for i, matrix in enumerate(codes.view(-1, o, d)):
        of = Scales(scales[i], *block, None if zeros is None else zeros[i])
        decode(Codes(matrix, kind), of, weight.view(-1, o, d)[i], via)


# fp4 with a power of two for 32 of them: experts of gpt-oss


def _mxfp4(stored: Stored) -> Iterator[QuantizedWeight]:
    """Yield fused experts [E, in, out], stored as [E, out, in] in blocks of 32."""
    for name, info in stored.tensors.items():
        if not name.endswith("_blocks"):
            continue
        weight = name.removesuffix("_blocks")
        if info.dtype != torch.uint8 or len(info.shape) != 4 or info.shape[3] != 16 or 0 in info.shape:
            raise stored.refusal(
                info,
                f"is {DTYPE_NAMES[info.dtype]} {list(info.shape)}, no fp4 codes U8 [E, out, in / 32, 16]; "
                f"download the model again",
            )
        scales = stored.companion(f"{weight}_scales", info)
        stored.require(scales, (torch.uint8,), (info.shape[:3],), name)
        experts, out, groups, _ = info.shape
        yield stored.weight(weight, (experts, 32 * groups, out), {"codes": info, "scales": scales}, _decode_mxfp4)
    stored.require_no_orphans("_scales", ("_blocks",))


def _decode_mxfp4(parts: Mapping[str, Tensor], weight: Tensor) -> None:
    for codes, scales, expert in zip(parts["codes"], parts["scales"], weight, strict=True):
        decode(Codes(codes, Kind.FP4), Scales(scales, 1, 32), expert.t())


# Codes of 4 or 8 bits in int32 words: compressed-tensors, GPTQ, AWQ


def _packed_words(stored: Stored) -> Iterator[QuantizedWeight]:
    """Yield weights [o, d] whose rows compressed-tensors packed into words."""
    for name, info in stored.tensors.items():
        if not name.endswith("_packed"):
            continue
        weight = name.removesuffix("_packed")
        o, words = stored.words(info)
        scales = stored.companion(f"{weight}_scale", info)
        bits, symmetric = _find_codes(stored, info, scales)
        d = words * 32 // bits
        groups = [(o, n) for n in scales.shape[1:] if n and d % n == 0]
        stored.require(scales, _SCALES, (*groups, (o, 1), (1,)), name)
        parts = {"codes": info, "scales": scales, "shape": stored.companion(f"{weight}_shape", info)}
        stored.require(parts["shape"], (torch.int64, torch.int32), ((2,),), name)
        if not symmetric:
            parts["zeros"] = stored.companion(f"{weight}_zero_point", info)
            stored.require(parts["zeros"], (torch.int32,), ((-(-o * bits // 32), scales.shape[-1]),), name)
        if g_idx := stored.tensors.get(f"{weight}_g_idx"):
            stored.require(g_idx, (torch.int32, torch.int64), ((d,),), name)
            parts["g_idx"] = g_idx
        refusal = partial(stored.refusal, info)
        yield stored.weight(weight, (o, d), parts, partial(_decode_packed, bits=bits, refusal=refusal))
    stored.require_no_orphans(".weight_shape", (".weight_packed",))


def _find_codes(stored: Stored, words: TensorInfo, scales: TensorInfo) -> tuple[int, bool]:
    """Return the bits of a code, and True where its middle is 0, as config.json says of codes that fit the scales."""
    groups = scales.shape[1] if len(scales.shape) == 2 else 1
    fitting = []
    for codes in stored.quantization.codes:
        d = words.shape[1] * 32 // codes.num_bits if codes.num_bits in (4, 8) and codes.type == "int" else 0
        if d and groups * (codes.group_size if codes.group_size and codes.group_size > 0 else d) == d:
            fitting.append(codes)
    if len({codes.num_bits for codes in fitting}) != 1:
        named = ", ".join(f"{c.type}{c.num_bits} of group_size {c.group_size}" for c in stored.quantization.codes)
        raise stored.refusal(
            words,
            f"{list(words.shape)} with scales {list(scales.shape)} fits {len(fitting)} of the codes that config.json "
            f"names ({named or 'none'}) where streamslr needs one, of 4 or 8 bits; {ORIGINAL}",
        )
    has_zeros = words.name.removesuffix("_packed") + "_zero_point" in stored.tensors
    return fitting[0].num_bits, not has_zeros and any(codes.symmetric for codes in fitting)


def _decode_packed(
    parts: Mapping[str, Tensor], weight: Tensor, bits: int, refusal: Callable[[str], InputError]
) -> None:
    (o, d), scales, middle = weight.shape, parts["scales"], 1 << (bits - 1)
    if parts["shape"].tolist() != [o, d]:
        raise refusal(
            f"has words for {[o, d]} weights, its weight_shape says {parts['shape'].tolist()}; streamslr decodes rows "
            f"that fill their words; {ORIGINAL}"
        )
    scales = scales.reshape(-1, scales.shape[-1]).expand(o, -1)
    zeros: Tensor = torch.full((1, 1), middle).expand(scales.shape)
    if "zeros" in parts:
        zeros = unpack_words(parts["zeros"].t(), bits)[:, :o].t()
    columns = _columns(parts.get("g_idx"), d, scales.shape[1], refusal)
    kind = Kind.UINT4 if bits == 4 else Kind.UINT8
    decode(Codes(parts["codes"], kind), Scales(scales, 1, columns, zeros), weight, scales.dtype)


def _columns(g_idx: Tensor | None, d: int, groups: int, refusal: Callable[[str], InputError]) -> int | Tensor:
    """Return the columns of a group, or the group of each column where they do not lie in order."""
    if g_idx is None or bool((g_idx == -1).any()):  # -1: compressed-tensors did not fill it in
        return d // groups
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise refusal(f"has {groups} groups, its g_idx goes from {int(g_idx.min())} to {int(g_idx.max())}; {ORIGINAL}")
    if torch.equal(g_idx.long(), torch.arange(d) // -(-d // groups)):
        return -(-d // groups)
    return g_idx.long()


def _gptq(stored: Stored) -> Iterator[QuantizedWeight]:
    """Yield weights [o, d] whose transpose GPTQ packed along d."""
    bits = stored.quantization.bits
    for weight, info, scales, zeros in _transposed(stored):
        if bits not in (4, 8):
            raise stored.refusal(
                info, f"has codes of {bits} bits by config.json, streamslr decodes 4 and 8; {ORIGINAL}"
            )
        (words, o), groups = info.shape, scales.shape[0]
        d = words * 32 // bits
        stored.require(scales, _SCALES, ((groups, o),), info.name)
        stored.require(zeros, (torch.int32,), ((groups, -(-o * bits // 32)),), info.name)
        parts = {"codes": info, "scales": scales, "zeros": zeros}
        g_idx = stored.tensors.get(info.name.removesuffix("qweight") + "g_idx")
        if g_idx:
            stored.require(g_idx, (torch.int32, torch.int64), ((d,),), info.name)
            parts["g_idx"] = g_idx
        elif d % groups:
            raise stored.refusal(scales, f"is {list(scales.shape)}, and {d} columns are no {groups} groups; {ORIGINAL}")
        lowest = 0 if stored.quantization.checkpoint_format == "gptq_v2" else 1
        make = partial(_decode_gptq, bits=bits, lowest=lowest, refusal=partial(stored.refusal, info))
        yield stored.weight(weight, (o, d), parts, make)


def _decode_gptq(
    parts: Mapping[str, Tensor], weight: Tensor, bits: int, lowest: int, refusal: Callable[[str], InputError]
) -> None:
    (o, d), scales = weight.shape, parts["scales"].t()
    zeros = unpack_words(parts["zeros"], bits)[:, :o].t().short() + lowest
    if lowest and int(zeros.max()) >> bits:
        raise refusal(f"has a zero point of {int(zeros.max())}, of which kernels of GPTQ make 0 or not; {ORIGINAL}")
    columns = _columns(parts.get("g_idx"), d, scales.shape[1], refusal)
    codes = Codes(parts["codes"], Kind.UINT4 if bits == 4 else Kind.UINT8, Layout.COLUMNS)
    decode(codes, Scales(scales, 1, columns, zeros), weight, scales.dtype)


def _awq(stored: Stored) -> Iterator[QuantizedWeight]:
    """Yield weights [o, d] whose transpose AWQ packed along o."""
    for weight, info, scales, zeros in _transposed(stored):
        (d, words), groups = info.shape, scales.shape[0]
        o = 8 * words
        if stored.quantization.bits != 4 or not groups or d % groups:
            raise stored.refusal(
                info,
                f"{list(info.shape)} has codes of {stored.quantization.bits} bits in {groups} groups ({scales.name} "
                f"{list(scales.shape)}); streamslr decodes 4 bits in equal groups; {ORIGINAL}",
            )
        stored.require(scales, _SCALES, ((groups, o),), info.name)
        stored.require(zeros, (torch.int32,), ((groups, words),), info.name)
        yield stored.weight(weight, (o, d), {"codes": info, "scales": scales, "zeros": zeros}, _decode_awq)


def _decode_awq(parts: Mapping[str, Tensor], weight: Tensor) -> None:
    scales = parts["scales"].t()
    zeros = unpack_awq(parts["zeros"]).t()
    of = Scales(scales, 1, weight.shape[1] // scales.shape[1], zeros)
    decode(Codes(parts["codes"], Kind.UINT4, Layout.AWQ), of, weight, scales.dtype)


def _transposed(stored: Stored) -> Iterator[tuple[str, TensorInfo, TensorInfo, TensorInfo]]:
    """Yield the name of each weight of GPTQ or AWQ, and its codes, scales and zero points."""
    for name, info in stored.tensors.items():
        if name.endswith(".qweight"):
            stored.words(info)
            module = name.removesuffix("qweight")
            scales, zeros = (stored.companion(module + part, info) for part in ("scales", "qzeros"))
            if len(scales.shape) != 2 or 0 in scales.shape:
                raise stored.refusal(scales, f"is {list(scales.shape)}, no scales of {name}; download the model again")
            yield f"{module}weight", info, scales, zeros
    for part in (".scales", ".qzeros"):  # AWQ has scales of activations too, which belong to the model
        stored.require_no_orphans(part, (".qweight",))


_FP8, _BYTES = (torch.float8_e4m3fn,), (torch.float8_e4m3fn, torch.int8)
_FINDERS: Mapping[str, tuple[Callable[[Stored], Iterator[QuantizedWeight]], ...]] = {
    "fp8": (partial(_coded_bytes, suffix="_scale_inv", dtypes=_FP8),),
    "fbgemm_fp8": (partial(_coded_bytes, suffix="_scale", dtypes=_FP8),),
    "mxfp4": (_mxfp4,),
    "compressed-tensors": (partial(_coded_bytes, suffix="_scale", dtypes=_BYTES), _packed_words),
    "gptq": (_gptq,),
    "awq": (_awq,),
    "bitsandbytes": (four_bits, llm_int8),
}
"""quant_method of config.json -> what finds the weights that it stores."""
_FORMATS = {"dense", "float-quantized", "int-quantized", "mixed-precision", "naive-quantized", "pack-quantized"}
"""Formats of compressed-tensors that are decoded, or that say nothing of a weight."""
