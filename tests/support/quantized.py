"""Weights stored in 8 or 4 bits, in every layout that is decoded, each made code by code beside its dense values."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

Codes = NDArray[np.int64]
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Layout:
    """A way to store a weight: the entry of config.json, and what makes the tensors and the dense weight [o, d]."""

    entry: Mapping[str, Any]
    make: Callable[[int, int, np.random.Generator], tuple[dict[str, Tensor], Tensor]]
    """(o, d, random) -> tensors by the rest of their names after the module's, and the weight in bfloat16."""


def compressed_tensors(form: str, kind: str = "int", bits: int = 8, **weights: Any) -> dict[str, Any]:
    """Return the entry of compressed-tensors for one group."""
    codes = {"num_bits": bits, "type": kind, "symmetric": True, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": codes, "format": None}},
    }


def e4m3(byte: int) -> float:
    """Return the value of a byte as fp8 e4m3 (OCP 8-bit Floating Point Specification, section 5)."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


def dense(values: NDArray[Any], scales: Tensor, rows: Codes, columns: Codes, via: torch.dtype | None) -> Tensor:
    """Return the weight in bfloat16: each value times the scale of its row and column, rounded to `via` between.

    Args:
        values: codes less their zero points [o, d].
        scales: scales [O, D].
        rows: row of the scale of each row of the weight.
        columns: column of the scale of each column.
        via: dtype that the products are rounded to first; None: they are float32.
    """
    factors = scales.float().numpy()[rows][:, columns]
    product = torch.from_numpy(values.astype(np.float32) * factors)
    return (product if via is None else product.to(via)).to(torch.bfloat16)


def into_words(codes: Codes, bits: int) -> Tensor:
    """Pack unsigned codes [n, m] along m into int32 words, lowest bits first, code by code."""
    n, m = codes.shape
    words = np.zeros((n, -(-m * bits // 32)), dtype=np.uint32)
    for row in range(n):
        for column in range(m):
            place = column * bits
            words[row, place // 32] |= np.uint32(int(codes[row, column]) << place % 32)
    return torch.from_numpy(words.view(np.int32))


def random_scales(shape: tuple[int, ...], random: np.random.Generator, largest: float, dtype: torch.dtype) -> Tensor:
    """Return positive scales with which codes up to `largest` make weights of about a tenth."""
    return torch.tensor(random.uniform(0.05, 0.2, shape) / largest, dtype=dtype)


def bytes_layout(
    entry: Mapping[str, Any],
    suffix: str,
    grid: Callable[[int, int], tuple[int, ...]],
    block: tuple[int, int] | None,
    kind: torch.dtype = FP8,
    dtype: torch.dtype = torch.float32,
    zeros: bool = False,
) -> Layout:
    """Return a layout with a byte for each code: `grid` gives the shape of the scales, `block` what one is for."""

    def make(o: int, d: int, random: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes = random.integers(0, 256, (o, d))
        if kind is FP8:
            codes[codes & 127 == 127] = 0  # NaN
            values = np.vectorize(e4m3)(codes)
            stored = torch.from_numpy(codes.astype(np.uint8)).view(FP8)
        else:
            values = codes - 128
            stored = torch.from_numpy(values.astype(np.int8))
        scales = random_scales(grid(o, d), random, 448 if kind is FP8 else 128, dtype)
        tensors = {"weight": stored, f"weight{suffix}": scales, "input_scale": torch.ones(1)}
        table = scales.reshape(1, 1) if scales.numel() == 1 else scales
        rows, columns = block or (o if len(table) == 1 else 1, d // table.shape[1])
        at = np.arange(o) // rows, np.arange(d) // columns
        if zeros:
            points = random.integers(-20, 20, table.shape)
            tensors["weight_zero_point"] = torch.from_numpy(points.astype(np.int8)).view(scales.shape)
            values = values - points[at[0]][:, at[1]]
        return tensors, dense(values, table, *at, dtype if suffix == "_scale" else None)

    return Layout(entry, make)


def packed_layout(bits: int, group: int | None, dtype: torch.dtype, zeros: bool = False, order: bool = False) -> Layout:
    """Return pack-quantized of compressed-tensors: groups of columns, zero points, columns out of their order."""

    def make(o: int, d: int, random: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes, groups = random.integers(0, 1 << bits, (o, d)), d // group if group else 1
        columns = np.arange(d) // (d // groups)
        scales = random_scales((o, groups), random, 1 << bits, dtype)
        tensors = {
            "weight_packed": into_words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([o, d]),
        }
        points = np.full((o, groups), 1 << (bits - 1))
        if zeros:
            points = random.integers(0, 1 << bits, (o, groups))
            tensors["weight_zero_point"] = into_words(points.T, bits).t().contiguous()
        if order:
            columns = random.permutation(columns)
            tensors["weight_g_idx"] = torch.from_numpy(columns.astype(np.int32))
        return tensors, dense(codes - points[:, columns], scales, np.arange(o), columns, dtype)

    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return Layout(compressed_tensors("pack-quantized", bits=bits, symmetric=not zeros, **strategy), make)


def gptq_layout(bits: int, form: str, order: bool = False) -> Layout:
    """Return GPTQ's layout in groups of 32."""

    def make(o: int, d: int, random: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes, groups, lowest = random.integers(0, 1 << bits, (o, d)), d // 32, 0 if form == "gptq_v2" else 1
        points, columns = random.integers(lowest, 1 << bits, (o, groups)), np.arange(d) // 32
        columns = random.permutation(columns) if order else columns
        scales = random_scales((o, groups), random, 1 << bits, torch.float16)
        tensors = {
            "qweight": into_words(codes, bits).t().contiguous(),
            "qzeros": into_words((points - lowest).T, bits),
            "scales": scales.t().contiguous(),
            "g_idx": torch.from_numpy(columns.astype(np.int32)),
        }
        return tensors, dense(codes - points[:, columns], scales, np.arange(o), columns, torch.float16)

    return Layout({"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": form}, make)


def awq_layout() -> Layout:
    """Return AWQ's layout, version gemm, in groups of 32."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # column of each place in a word

    def packed(codes: Codes) -> Tensor:
        return into_words(codes.reshape(len(codes), -1, 8)[:, :, order].reshape(codes.shape), 4)

    def make(o: int, d: int, random: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes, points = random.integers(0, 16, (o, d)), random.integers(0, 16, (o, d // 32))
        scales, columns = random_scales((o, d // 32), random, 16, torch.float16), np.arange(d) // 32
        tensors = {"qweight": packed(codes.T), "qzeros": packed(points.T), "scales": scales.t().contiguous()}
        return tensors, dense(codes - points[:, columns], scales, np.arange(o), columns, torch.float16)

    return Layout({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, make)


FP4 = np.array([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def mxfp4_experts(experts: int, d: int, o: int, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return blocks, scales and the dense weights [experts, d, o] in bfloat16 of fused experts of gpt-oss.

    Blocks [experts, o, d / 32, 16] hold two codes of fp4 in a byte, the lower half first; scales are powers of two.
    """
    codes = random.integers(0, 16, (experts, o, d // 32, 32))
    powers = random.integers(120, 126, (experts, o, d // 32))
    blocks = torch.from_numpy((codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8))
    values = FP4[codes] * 2.0 ** (powers[..., None] - 127)
    weights = torch.from_numpy(values.astype(np.float32)).reshape(experts, o, d).mT.to(torch.bfloat16).contiguous()
    return blocks, torch.from_numpy(powers.astype(np.uint8)), weights


NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
BNB_FP4 = [x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)]


def four_bit_layout(
    kind: str, block: int, nested: bool = False, dtype: str = "bfloat16", storage: torch.dtype = torch.uint8
) -> Layout:
    """Return bitsandbytes' 4 bits: a scale for each `block` weights along memory, which may be codes themselves."""
    numbers = np.array(NF4 if kind == "nf4" else BNB_FP4, dtype=np.float32)

    def make(o: int, d: int, random: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes, blocks = random.integers(0, 16, o * d), -(-o * d // block)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": [o, d]}
        tensors = {
            "weight": torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8)).view(storage)[:, None],
            "weight.quant_map": torch.tensor(numbers),
        }
        scales = random.uniform(0.05, 0.2, blocks).astype(np.float32)
        if nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1171875}
            scale_codes = random.integers(0, 256, blocks)
            scale_map = random.uniform(-1, 1, 256).astype(np.float32)
            largest = random.uniform(0.05, 0.1, -(-blocks // 256)).astype(np.float32)
            for i in range(blocks):
                scales[i] = np.float32(scale_map[scale_codes[i]] * largest[i // 256]) + np.float32(0.1171875)
            tensors["weight.absmax"] = torch.from_numpy(scale_codes.astype(np.uint8))
            tensors["weight.nested_absmax"] = torch.from_numpy(largest)
            tensors["weight.nested_quant_map"] = torch.from_numpy(scale_map)
        else:
            tensors["weight.absmax"] = torch.from_numpy(scales)
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = text_tensor(json.dumps(state))
        values = np.array([numbers[code] * scales[i // block] for i, code in enumerate(codes)], dtype=np.float32)
        return tensors, torch.from_numpy(values).view(o, d).to(getattr(torch, dtype)).to(torch.bfloat16)

    entry = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return Layout({**entry, "bnb_4bit_use_double_quant": nested, "llm_int8_skip_modules": None}, make)


def text_tensor(text: str) -> Tensor:
    """Return the bytes of a text, as bitsandbytes stores JSON."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def llm_int8_layout() -> Layout:
    """Return bitsandbytes' LLM.int8(): codes, and the largest magnitude of each row, which is 127."""

    def make(o: int, d: int, random: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes = random.integers(-128, 128, (o, d)).astype(np.int8)
        largest = random.uniform(0.05, 0.2, (o, 1)).astype(np.float32)
        values = codes.astype(np.float32) * largest * np.float32(7.874015718698502e-3)  # rounded twice
        tensors = {"weight": torch.from_numpy(codes), "SCB": torch.from_numpy(largest[:, 0].copy())}
        tensors["weight_format"] = torch.tensor(0, dtype=torch.uint8)
        return tensors, torch.from_numpy(values).to(torch.bfloat16)

    return Layout({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}, make)


def blocks_of(rows: int, columns: int) -> Callable[[int, int], tuple[int, ...]]:
    return lambda o, d: (-(-o // rows), -(-d // columns))


_FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
_FLOATS = "float-quantized"
LAYOUTS: Mapping[str, Layout] = {
    "fp8 blocks": bytes_layout(_FP8_BLOCKS, "_scale_inv", blocks_of(128, 128), (128, 128)),
    "fp8 blocks, bf16 scales": bytes_layout(
        _FP8_BLOCKS, "_scale_inv", blocks_of(128, 128), (128, 128), dtype=torch.bfloat16
    ),
    "fp8 tensor": bytes_layout({"quant_method": "fp8"}, "_scale_inv", lambda o, d: (), None),
    "fbgemm": bytes_layout({"quant_method": "fbgemm_fp8"}, "_scale", lambda o, d: (o, 1), None),
    "float channel": bytes_layout(
        compressed_tensors(_FLOATS, "float", strategy="channel"),
        "_scale",
        lambda o, d: (o, 1),
        None,
        dtype=torch.bfloat16,
    ),
    "float tensor": bytes_layout(
        compressed_tensors(_FLOATS, "float", strategy="tensor"), "_scale", lambda o, d: (1,), None, dtype=torch.float16
    ),
    "float blocks": bytes_layout(
        compressed_tensors(_FLOATS, "float", strategy="block", block_structure="16x32"),
        "_scale",
        blocks_of(16, 32),
        (16, 32),
        dtype=torch.bfloat16,
    ),
    "int8 channel": bytes_layout(
        compressed_tensors("int-quantized", strategy="channel"),
        "_scale",
        lambda o, d: (o, 1),
        None,
        torch.int8,
        torch.bfloat16,
    ),
    "int8 groups, zeros": bytes_layout(
        compressed_tensors("int-quantized", strategy="group", group_size=32, symmetric=False),
        "_scale",
        lambda o, d: (o, d // 32),
        None,
        torch.int8,
        torch.bfloat16,
        zeros=True,
    ),
    "int4 groups": packed_layout(4, 32, torch.bfloat16),
    "int4 groups, zeros": packed_layout(4, 32, torch.float16, zeros=True),
    "int4 channel": packed_layout(4, None, torch.float32),
    "int4 groups out of order": packed_layout(4, 32, torch.bfloat16, order=True),
    "int8 packed, zeros": packed_layout(8, 32, torch.bfloat16, zeros=True),
    "gptq": gptq_layout(4, "gptq"),
    "gptq v2 out of order": gptq_layout(8, "gptq_v2", order=True),
    "awq": awq_layout(),
    "nf4": four_bit_layout("nf4", 64),
    "nf4 nested": four_bit_layout("nf4", 32, nested=True, dtype="float16"),
    "fp4 over rows": four_bit_layout("fp4", 1024, dtype="float32", storage=torch.bfloat16),
    "llm.int8": llm_int8_layout(),
}


def quantize_checkpoint(source: Path, folder: Path, twin: Path, layout: Layout, seed: int = 0) -> None:
    """Copy a checkpoint with its blocks' linears stored in a layout, and beside it one of their dense weights."""
    random = np.random.default_rng(seed)
    for out in (folder, twin):
        out.mkdir()
    stored: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.dim() == 2 and ".layers." in name:
            o, d = tensor.shape
            tensors, weights[name] = layout.make(o, d, random)
            stored |= {name.removesuffix("weight") + rest: part for rest, part in tensors.items()}
        else:
            stored[name] = weights[name] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(weights, twin / "model.safetensors", {"format": "pt"})
    for path in source.iterdir():
        if path.suffix == ".json":
            config = json.loads(path.read_text())
            (twin / path.name).write_text(json.dumps(config))
            if path.name == "config.json":
                config["quantization_config"] = layout.entry
            (folder / path.name).write_text(json.dumps(config))
