"""Measure how fast weights stored in 8 or 4 bits are decoded, against plain reads in turn with them.

    python tools/bench_decoders.py [--size 4096] [--threads 1] [--rounds 15] [--torch]

For each format a weight of random codes is written and read back, from the system's cache, in turn

    decoded    as a run does it, to bf16 in new memory
    read       its stored bytes, by the safetensors reader, copied into new memory, as who keeps them has to
    again      the same into memory that the process had before
    memcpy     the stored bytes from memory to memory, both used before
    written    as many bytes as the decoded weight has, one value, into new memory of large pages: the least that any
               decoder takes
    bf16       the same weight stored in bf16, read into new memory

A line has the median milliseconds of the first, and how many times as long it takes as each of the others. One thread
is measured by its CPU time, which other work on the machine changes little, several by the clock. With --torch the C
library is left aside.
"""

import argparse
import json
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamslr.model import decode_codes
from streamslr.model.bitsandbytes import TABLES
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
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, n]}
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}

    def nf4(absmax: Tensor, state: dict[str, Any], **more: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        table = torch.tensor(TABLES["nf4"])
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        parts = {"absmax": absmax, "quant_map": table, "quant_state.bitsandbytes__nf4": text, **more}
        tensors = {f"{NAME}weight.{name}": part for name, part in parts.items()}
        return {"quant_method": "bitsandbytes"}, {f"{NAME}weight": random_ints(torch.uint8, n * n // 2, 1), **tensors}

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
                f"{NAME}x_scales": torch.randint(110, 130, (1, n, n // 32), dtype=torch.uint8),
            },
        ),
        "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, {f"{NAME}qweight": words, **transposed}),
        "awq": (
            {"quant_method": "awq", "bits": 4, "group_size": 128},
            {f"{NAME}qweight": words.view(n, n // 8), **transposed},
        ),
        "nf4 by 64": nf4(torch.rand(n * n // 64), state),
        "nf4 nested": nf4(
            random_ints(torch.uint8, n * n // 64),
            state | nested,
            nested_absmax=torch.rand(n * n // 2**14),
            nested_quant_map=torch.rand(256),
        ),
        "llm.int8": (
            {"quant_method": "bitsandbytes"},
            {f"{NAME}weight": random_ints(torch.int8, n, n), f"{NAME}SCB": torch.rand(n)},
        ),
    }


def new_memory(nbytes: int, large_pages: bool = False) -> Tensor:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # as malloc maps it
    if large_pages:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def used_memory(memory: Mapping[str, Tensor], name: str, nbytes: int) -> Tensor:
    return memory[name][:nbytes]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def read(path: Path, memory: Callable[[str, int], Tensor]) -> None:
    """Copy the tensors of a file into memory that is given by a tensor's name and bytes."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            tensor = as_bytes(file.get_tensor(name))
            memory(name, len(tensor)).copy_(tensor)


def write(nbytes: int) -> None:
    new_memory(nbytes, large_pages=True).fill_(1)


def copy(tensors: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        memory[name].copy_(as_bytes(tensor))


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median seconds of each, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = clock()
            way()
            seconds[name].append(clock() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight, a multiple of 128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--torch", action="store_true", help="leave the C library aside")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    library = patch.object(decode_codes, "find_spec", return_value=None) if args.torch else nullcontext()
    with library, tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.safetensors"
        save_file({"weight": torch.randn(args.size, args.size).bfloat16()}, dense)
        others = ("read", "again", "memcpy", "written", "bf16")
        print(f"{'format':12} {'ms':>6}", *(f"{'× ' + other:>10}" for other in others))
        for name, (entry, tensors) in formats(args.size).items():
            config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": entry}
            (Path(folder) / "config.json").write_text(json.dumps(config))
            stored = Path(folder) / "model.safetensors"
            save_file(tensors, stored)
            checkpoint = open_checkpoint(folder)
            (weight,) = checkpoint.tensors
            memory = {name: torch.zeros(tensor.nbytes, dtype=torch.uint8) for name, tensor in tensors.items()}
            ways: dict[str, Callable[[], object]] = {
                "decoded": partial(checkpoint.read_one, weight),
                "read": partial(read, stored, lambda _, nbytes: new_memory(nbytes)),
                "again": partial(read, stored, partial(used_memory, memory)),
                "memcpy": partial(copy, tensors, memory),
                "written": partial(write, checkpoint.tensors[weight].nbytes),
                "bf16": partial(read, dense, lambda _, nbytes: new_memory(nbytes)),
            }
            found = interleaved(ways, args.rounds, clock)
            ratios = [found["decoded"] / found[other] for other in others]
            print(f"{name:12} {1e3 * found['decoded']:6.1f}", *(f"{ratio:10.2f}" for ratio in ratios), flush=True)


if __name__ == "__main__":
    main()
