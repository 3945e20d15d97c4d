"""A linear that stays S + U·V: S packed in memory, multiplied by sparse tensor cores or unpacked tile by tile."""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from streamslr.errors import InputError
from streamslr.io.packed_layout import PACKED_PARTS, part_dtype, part_shapes
from streamslr.io.packing import unpack, unpack_rows
from streamslr.spec.pattern import SparsityPattern, parse_pattern

_CPU_TILE, _GPU_TILE = 1 << 19, 1 << 24
"""Weights unpacked at once. On the CPU a tile and what it is made of stay in the cache: 4096x4096 took 2 to 3 times as
long unpacked at once (tools/results/inference-cpu.json), and tiles of 2^17 to 2^20 were alike. Untried on GPUs."""

log = logging.getLogger("streamslr")


class SparseLowRankLinear(nn.Module):
    """y = x Sᵀ + (x Vᵀ) Uᵀ + bias, for x [..., d] and S [o, d], which is packed as in the folder's format.

    The state dict is the format: `values`, `meta`[, `row_offsets`] (`streamslr.io.packed_layout`) are buffers, and
    frozen; `U` [o, r], `V` [r, d] (absent at rank 0) and `bias` [o] are parameters. Gradients reach x, U, V and
    bias; the backward pass unpacks S again, so that no dense S is kept for it.
    """

    values: Tensor
    meta: Tensor
    row_offsets: Tensor | None
    S: Tensor | None
    U: nn.Parameter | None
    V: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: SparsityPattern,
        rank: int,
        bias: bool = False,
        nonzeros: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Tensors are allocated, not filled: `load_state_dict` or the loader does. nonzeros: where rows differ."""
        super().__init__()
        self.in_features, self.out_features, self.pattern, self.rank = in_features, out_features, pattern, rank
        o, d = out_features, in_features
        pattern.require_fits("SparseLowRankLinear", (o, d))
        shapes = part_shapes(pattern, (o, d), rank, nonzeros or 0)
        parts = {
            part: torch.empty(shape, dtype=part_dtype(part, dtype), device=device) for part, shape in shapes.items()
        }
        for part in ("values", "meta", "row_offsets"):
            self.register_buffer(part, parts.get(part))
        self.register_buffer(
            "S", None
        )  # dense, only after keep_dense(); accelerate trips over a None that is not saved
        for part in ("U", "V"):
            self.register_parameter(part, nn.Parameter(parts[part]) if rank else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(o, dtype=dtype, device=device)) if bias else None)
        self._semi: _SemiStructured | None = None

    @property
    def kernel(self) -> str:
        """What multiplies S where the module is now, and why."""
        if self.S is not None:
            return "dense: keep_dense() was asked for"
        return self._semi_structured().name if self.values.is_cuda else "unpacked in tiles: no sparse kernel on the CPU"

    def packed(self) -> dict[str, Tensor]:
        """What the folder stores of the linear, bias left out: values, meta[, row_offsets][, U, V]."""
        parts = {part: getattr(self, part) for part in PACKED_PARTS}
        return {part: tensor.detach() for part, tensor in parts.items() if tensor is not None}

    @torch.inference_mode(False)  # what is made while evaluating serves training too
    def keep_dense(self) -> None:
        """Also holds S dense from now on: the speed of a dense linear, for its memory beside the packed one.

        Raises InputError where accelerate offloads the weights between calls.
        """
        if self.values.is_meta:
            raise InputError("S cannot be kept dense of weights that are offloaded: leave keep_dense or device_map out")
        S = unpack(self.packed(), self.pattern, (self.out_features, self.in_features))
        self.register_buffer("S", S, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)  # [n, d]
        if self.S is not None:
            y = nn.functional.linear(flat, self.S)
        elif flat.is_cuda:
            y = self._on_cuda(flat)
        else:
            y = self._unpacked(flat)
        if self.U is not None and self.V is not None:
            y = torch.addmm(y, nn.functional.linear(flat, self.V), self.U.t())
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, pattern={self.pattern}, rank={self.rank}, bias={bias}"

    def _unpacked(self, x: Tensor) -> Tensor:
        pattern = str(self.pattern)
        y: Tensor = _packed_product(x, self.values, self.meta, self.row_offsets, pattern, self.in_features, False)
        return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _on_cuda(self, x: Tensor) -> Tensor:
        """Not traced: torch's sparse tensors are subclasses with kernels of their own."""
        semi = self._semi_structured()
        if semi.weight is None or x.dtype != semi.weight.dtype:
            return self._unpacked(x)
        rest = semi.weight, self.values, self.meta, str(self.pattern), self.in_features
        y: Tensor = _SemiStructuredProduct.apply(x, *rest)  # type: ignore[no-untyped-call]
        return y

    @torch.inference_mode(False)
    def _semi_structured(self) -> "_SemiStructured":
        """S for the sparse tensor cores of this device, made when first needed."""
        if self._semi is None:
            self._semi = _semi_structured(self)
            if self._semi.weight is not None:
                # both of torch's layouts begin with the kept values in our order: hold them once
                values = self._semi.weight.values()
                if torch.equal(values, self.values):
                    self.values = values
            _announce(self._semi.name)
        return self._semi

    # What was made for a device is made again after tensors move or change, and is never copied or saved.

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseLowRankLinear":
        self._semi = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._semi = self.S = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_semi": None}


@torch.library.custom_op(
    "streamslr::packed_product",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor meta, Tensor? row_offsets, str pattern, int d, bool by_columns) -> Tensor",
)
def _packed_product(
    x: Tensor, values: Tensor, meta: Tensor, row_offsets: Tensor | None, pattern: str, d: int, by_columns: bool
) -> Tensor:
    """x [n, d] -> x Sᵀ [n, o], or by_columns x [n, o] -> x S [n, d]; never more than a tile of S is dense.

    An operator of its own, so that torch.compile takes it whole and autograd keeps only what is packed.
    """
    parsed, o = _parse(pattern), len(meta)
    tensors = {"values": values, "meta": meta} | ({} if row_offsets is None else {"row_offsets": row_offsets})
    step = max(1, (_CPU_TILE if x.device.type == "cpu" else _GPU_TILE) // d)
    tiles = (slice(start, min(start + step, o)) for start in range(0, o, step))
    if by_columns:
        wide = torch.promote_types(x.dtype, torch.float32)  # sums over tiles would round in bf16
        sums = torch.zeros(len(x), d, dtype=wide, device=x.device)
        for rows in tiles:
            sums += x[:, rows] @ unpack_rows(tensors, parsed, (o, d), rows).to(x.dtype)
        return sums.to(x.dtype)
    y = x.new_empty(len(x), o)
    for rows in tiles:
        torch.mm(x, unpack_rows(tensors, parsed, (o, d), rows).to(x.dtype).t(), out=y[:, rows])
    return y


@_packed_product.register_fake
def _(
    x: Tensor, values: Tensor, meta: Tensor, row_offsets: Tensor | None, pattern: str, d: int, by_columns: bool
) -> Tensor:
    return x.new_empty(x.shape[0], d if by_columns else meta.shape[0])


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, meta, row_offsets, *ctx.rest = inputs
    ctx.save_for_backward(values, meta, row_offsets)


def _packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    pattern, d, by_columns = ctx.rest
    dx = _packed_product(grad, *ctx.saved_tensors, pattern, d, not by_columns) if ctx.needs_input_grad[0] else None
    return dx, None, None, None, None, None, None


_packed_product.register_autograd(_packed_backward, setup_context=_keep_packed)
_parse = cache(parse_pattern)


@dataclass(frozen=True)
class _SemiStructured:
    """S in torch's 2:4 layout, or the reason why it is unpacked instead."""

    name: str
    weight: Any = None  # a torch.sparse.SparseSemiStructuredTensor [o, d]


class _SemiStructuredProduct(torch.autograd.Function):
    """x Sᵀ on sparse tensor cores; torch's layout cannot multiply by S itself, so backward unpacks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, values: Tensor, meta: Tensor, pattern: str, d: int) -> Tensor:
        ctx.save_for_backward(values, meta)
        ctx.pattern, ctx.d = pattern, d
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, meta = ctx.saved_tensors
        return _packed_product(grads[0], values, meta, None, ctx.pattern, ctx.d, True), None, None, None, None, None


def _semi_structured(linear: SparseLowRankLinear) -> _SemiStructured:
    """torch's cuSPARSELt kernels where they run, CUTLASS's where only those do (compute 8.x)."""
    values, shape = linear.values, (linear.out_features, linear.in_features)

    def unpacked(why: str) -> _SemiStructured:
        return _SemiStructured(f"unpacked in tiles: {why}")

    hook = getattr(
        linear, "_hf_hook", None
    )  # accelerate's; of offloaded weights it keeps nothing on the GPU, nor may we
    if any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ()))):
        return unpacked("its weights are offloaded between calls")
    if str(linear.pattern) != "2:4":
        return unpacked(f"sparse tensor cores take 2:4, not {linear.pattern}")
    if values.dtype not in (torch.bfloat16, torch.float16):
        return unpacked(f"sparse tensor cores take bfloat16 and float16, not {values.dtype}")
    major, minor = torch.cuda.get_device_capability(values.device)
    if major < 8:
        return unpacked(f"compute capability {major}.{minor} has no sparse tensor cores")
    layout: Any
    if torch.backends.cusparselt.is_available():
        name, layout = "cuSPARSELt", torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    elif major == 8:
        name, layout = "CUTLASS", torch.sparse.SparseSemiStructuredTensorCUTLASS
    else:
        return unpacked(f"this torch has no cuSPARSELt, and CUTLASS's kernel runs on compute 8.x, not {major}.{minor}")
    S = unpack(linear.packed(), linear.pattern, shape)
    try:
        weight: Any = layout.from_dense(S)
        x = torch.linspace(-1, 1, 16 * shape[1], dtype=S.dtype, device=S.device).view(16, -1)
        got, expected = nn.functional.linear(x, weight).float(), (x @ S.t()).float()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, ValueError) as error:  # a shape or version that the kernel refuses
        return unpacked(f"{name} refused {shape[0]}x{shape[1]}: {str(error).partition(chr(10))[0]}")
    # kernels and their layouts are a prototype in torch: one wrong product, and S is unpacked instead
    if not torch.allclose(got, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())):
        return unpacked(f"{name}'s product of a {shape[0]}x{shape[1]} linear was wrong")
    return _SemiStructured(f"{name} 2:4", weight)


@cache
def _announce(kernel: str) -> None:
    """Each way and reason once in a process."""
    log.log(logging.WARNING if kernel.startswith("unpacked") else logging.INFO, "packed linears on the GPU: %s", kernel)
