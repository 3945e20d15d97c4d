"""U and V as they are stored: numbers, or int8 codes with a scale for each component of the rank."""

from collections.abc import Mapping

import torch
from torch import Tensor

from streamslr.errors import InputError

LARGEST_CODE = 127


def pack_low_rank(U: Tensor, V: Tensor, dtype: torch.dtype, low_rank: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the stored parts of U·V; none at rank 0.

    Codes are the nearest ones to U and V, where the largest number of a column of U and of a row of V is code 127. Only
    the product of both scales is stored: rounded to `dtype` first, so that the codes of V make up for that.

    Args:
        U: [o, r].
        V: [r, d].
        dtype: dtype of numbers, and of scales.
        low_rank: int8 for codes; another dtype to store numbers in that; None for `dtype`.

    Raises:
        InputError: `dtype` is float16, whose range products of two scales leave.
    """
    if not U.shape[1]:
        return {}
    if low_rank != torch.int8:
        return {"U": U.to(low_rank or dtype), "V": V.to(low_rank or dtype)}
    require_range("U and V in int8", dtype)
    of_U, of_V = (largest.double().clamp_min(1e-30) / LARGEST_CODE for largest in (U.abs().amax(0), V.abs().amax(1)))
    scales = (of_U * of_V).to(dtype)
    scales = torch.where(scales > 0, scales, torch.finfo(dtype).tiny)
    return {
        "U": _nearest(U / of_U.to(U.dtype)),
        "V": _nearest(V / (scales.double() / of_U).to(V.dtype)[:, None]),
        "low_rank_scales": scales,
    }


def require_range(what: str, dtype: torch.dtype | None) -> None:
    """Raise InputError, naming what it is, where codes of U and V would meet numbers of float16.

    Scales of U·V are near 1e-6, below the normal numbers of float16, and sums of codes times inputs are beyond 65504.
    """
    if dtype == torch.float16:
        raise InputError(
            f"{what} cannot go with float16: their scales are smaller than its numbers; load in bfloat16 or float32, "
            f"or compress with --low-rank-values bf16"
        )


def unpack_low_rank(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return U [o, r] and V [r, d] as numbers, balanced where they are codes; None at rank 0.

    Numbers come back as they are. Codes come back in float32; U·V is then what is stored, up to the rounding of each
    number of U: those of V are codes times a power of two.
    """
    if "U" not in parts:
        return None
    U, V = parts["U"], parts["V"]
    if "low_rank_scales" not in parts:
        return U, V
    U, V, scales = U.double(), V.double(), parts["low_rank_scales"].double()
    sizes = U.norm(dim=0).clamp_min(1) / V.norm(dim=1).clamp_min(1)
    of_V = (scales * sizes).sqrt().log2().round().exp2()
    return (U * (scales / of_V)).float(), (V * of_V[:, None]).float()


def exact_product(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return U and V in float64 whose product is the stored U·V; None at rank 0."""
    if "U" not in parts:
        return None
    U, V = parts["U"].double(), parts["V"].double()
    return (U * parts["low_rank_scales"].double() if "low_rank_scales" in parts else U), V


def _nearest(numbers: Tensor) -> Tensor:
    return numbers.round().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)
