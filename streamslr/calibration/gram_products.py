"""H += XᵀX for the Gram matrices: float32 inputs as they are, half-precision inputs on the tensor cores of a GPU.

The product of two bf16 or float16 numbers is exact in float32, so tensor cores lose nothing against a float32 product
of the same inputs; sums are in float32 either way.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from streamslr.tensors import tf32_products

PANEL = 2048
"""Columns of H that one product on tensor cores makes. H is symmetric: each panel ends at the diagonal, which saves
37 % of the FLOPs at width 8192 and 46 % at 28672."""

_TOKENS = 4096
"""Most tokens of one product on tensor cores, whose sums lose more the longer they are: the error of H was 9e-6 with
4,096 tokens and 5.5e-5 with 16,384, against 1.7e-6 of a float32 product of 4,096 (H200, torch 2.11)."""

_SCRATCH = 2**26
"""Bytes that a product may take beside its inputs and H where it cannot add in place."""

Product = Callable[[Tensor, Tensor, Tensor], None]
"""Function of (part of H [m, n] float32, A [tokens, m], B [tokens, n]) that adds AᵀB to the part."""


def product_bytes(width: int, tokens: int, value_bytes: int, gpu: bool) -> int:
    """Return the bytes that a product takes beside H and X: a float32 copy of X on a CPU, at most 64 MiB on a GPU.

    Args:
        width: Width of the widest input.
        tokens: Tokens of one micro-batch.
        value_bytes: Bytes of one number in the compute dtype. An input that is float32 already is not copied.
        gpu: Products are computed on a GPU.
    """
    copy = 0 if value_bytes == 4 else 4 * tokens * width
    return min(copy, _SCRATCH) if gpu else copy


def find_product(device: torch.device, dtype: torch.dtype) -> Product | None:
    """Return the fastest product of half-precision inputs on a GPU that this build of torch has; None on a CPU.

    torch 2.6 has no products with a wider result, 2.8 has them without a sum in place.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    for product in (_add_in_place, _multiply_then_add):
        x = torch.ones(16, 16, dtype=dtype, device=device)
        try:
            product(torch.zeros(16, 16, device=device), x, x)
        except (RuntimeError, TypeError):
            continue
        return product
    return _add_in_tf32


def add_upper_panels(gram: Tensor, rows: Tensor, product: Product) -> None:
    """Add XᵀX to the panels of `gram` [d, d], each down to the diagonal; `rows` is X [tokens, d] in half precision."""
    width = len(gram)
    for part in torch.split(rows, _TOKENS):
        for start in range(0, width, PANEL):
            stop = min(start + PANEL, width)
            product(gram[:stop, start:stop], part[:, :stop], part[:, start:stop])


def mirror_upper_panels(gram: Tensor) -> None:
    """Complete a Gram [d, d] that `add_upper_panels` summed up: what is below the panels comes from above them."""
    for stop in range(PANEL, len(gram), PANEL):
        gram[stop : stop + PANEL, :stop] = gram[:stop, stop : stop + PANEL].T


def _add_in_place(part: Tensor, a: Tensor, b: Tensor) -> None:
    torch.addmm(part, a.T, b, out_dtype=torch.float32, out=part)


def _multiply_then_add(part: Tensor, a: Tensor, b: Tensor) -> None:
    step = _SCRATCH // (4 * part.shape[1])
    for start in range(0, len(part), step):
        part[start : start + step] += torch.mm(a[:, start : start + step].T, b, out_dtype=torch.float32)


def _add_in_tf32(part: Tensor, a: Tensor, b: Tensor) -> None:
    """Multiply float32 copies of some tokens after the others; TF32 holds every bf16 and float16 number."""
    step = _SCRATCH // (4 * (part.shape[0] + part.shape[1]))
    with tf32_products():
        for start in range(0, len(a), step):
            part.addmm_(a[start : start + step].float().T, b[start : start + step].float())
