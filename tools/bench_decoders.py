"""Measure how fast weights stored in 8 or 4 bits are decoded, against plain reads in turn with them.

    python tools/bench_decoders.py [--size 4096] [--threads 1] [--rounds 7]

For each format a weight of random codes is written and read back, from the system's cache, in three ways, in turn:
decoded as a run does it, its stored bytes copied, and the same weight stored in bf16 copied. A line has the median
seconds of the first, and how many times as long it takes as each of the others.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamslr.model.checkpoint import open_checkpoint

NAME = "model.layers.0.self_attn.q_proj."


def random_ints(dtype: torch.dtype, *shape: int) -> Tensor:
    low, high = (0, 127) if dtype == torch.uint8 else (-(2**7), 2**7) if dtype == torch.int8 else (-(2**31), 2**31)
    return torch.randint(low, high, shape, dtype=dtype)


def formats(n: int) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Return format -> the entry of config.json and the tensors of one weight [n, n], n a multiple of 128."""

    def compressed(form: str, **weights: Any) -> dict[str, Any]:
        group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
        return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}

    rows, groups = torch.rand(n, 1).bfloat16(), torch.rand(n, n // 128).bfloat16()
    fp8, words = random_ints(torch.uint8, n, n).view(torch.float8_e4m3fn), random_ints(torch.int32, n // 8, n)
    four = {"num_bits": 4, "group_size": 128}
    packed = {f"{NAME}weight_packed": words.view(n, n // 8), f"{NAME}weight_scale": groups}
    packed[f"{NAME}weight_shape"] = torch.tensor([n, n])
    transposed = {f"{NAME}scales": groups.half().t().contiguous()}
    transposed[f"{NAME}qzeros"] = torch.full((n // 128, n // 8), 0x77777777, dtype=torch.int32)
    return {
        "fp8 128x128": (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {f"{NAME}weight": fp8, f"{NAME}weight_scale_inv": torch.rand(n // 128, n // 128)},
        ),
        "fp8 by row": (
            compressed("float-quantized", type="float", num_bits=8),
            {f"{NAME}weight": fp8, f"{NAME}weight_scale": rows},
        ),
        "int8 by row": (
            compressed("int-quantized", num_bits=8),
            {f"{NAME}weight": random_ints(torch.int8, n, n), f"{NAME}weight_scale": rows},
        ),
        "int4 by 128": (compressed("pack-quantized", **four), packed),
        "mxfp4": (
            {"quant_method": "mxfp4"},
            {
                f"{NAME}x_blocks": random_ints(torch.uint8, 1, n, n // 32, 16),
                f"{NAME}x_scales": random_ints(torch.uint8, 1, n, n // 32),
            },
        ),
        "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, {f"{NAME}qweight": words, **transposed}),
        "awq": (
            {"quant_method": "awq", "bits": 4, "group_size": 128},
            {f"{NAME}qweight": words.view(n, n // 8), **transposed},
        ),
    }


def copy_all(path: Path) -> None:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            file.get_tensor(name).clone()


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight, a multiple of 128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.safetensors"
        save_file({"weight": torch.randn(args.size, args.size).bfloat16()}, dense)
        print(f"{'format':12} {'seconds':>8} {'GB/s read':>9} {'× stored':>8} {'× in bf16':>9}")
        for name, (entry, tensors) in formats(args.size).items():
            config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": entry}
            (Path(folder) / "config.json").write_text(json.dumps(config))
            stored = Path(folder) / "model.safetensors"
            save_file(tensors, stored)
            checkpoint = open_checkpoint(folder)
            (weight,) = checkpoint.tensors
            ways: dict[str, Callable[[], object]] = {
                "decoded": partial(checkpoint.read_one, weight),
                "stored": partial(copy_all, stored),
                "bf16": partial(copy_all, dense),
            }
            found = interleaved(ways, args.rounds)
            rate = stored.stat().st_size / found["decoded"] / 1e9
            ratios = found["decoded"] / found["stored"], found["decoded"] / found["bf16"]
            print(f"{name:12} {found['decoded']:8.4f} {rate:9.2f} {ratios[0]:8.1f} {ratios[1]:9.1f}", flush=True)


if __name__ == "__main__":
    main()
