"""A linear that stays S + U·V: S packed in memory, multiplied by a kernel for packed S or unpacked tile by tile."""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from streamslr.errors import InputError
from streamslr.io.low_rank import require_range, unpack_low_rank
from streamslr.io.packed_layout import PACKED_PARTS, number_dtype, part_dtype, part_shapes
from streamslr.io.packing import row_chunks, unpack, unpack_rows
from streamslr.model.weight_reads import AbsentWeight
from streamslr.runtime import triton_product
from streamslr.runtime.packed_rows import MOST_TOKENS, multiply_native, unpack_native, why_not_native
from streamslr.spec.pattern import NofM, SparsityPattern, parse_pattern
from streamslr.spec.values import ValueFormat, sum_groups, values_text

_CPU_TILE, _GPU_TILE = 1 << 19, 1 << 24
"""Weights that are unpacked at once. On a CPU a tile and its parts should fit the cache: unpacking 4096x4096 at once
takes longer (tools/results/inference-cpu.json, "unfused"); tiles of 2^19 to 2^21 weights take the same time, smaller
ones more. The size for GPUs has not been measured."""
_TENSOR_CORE_PATTERN = NofM(2, 4)
"""The one pattern that sparse tensor cores multiply."""

log = logging.getLogger("streamslr")


class SparseLowRankLinear(nn.Module):
    """A linear y = x Sᵀ + (x Vᵀ) Uᵀ + bias, for x [..., d] and S [o, d] packed as in the folder's format.

    The state dict is that format (`streamslr.io.packed_layout`). Gradients reach x, U, V and bias. The backward pass
    unpacks S again, so that no dense S is held for it.

    Attributes:
        values: buffer; values of S, frozen.
        meta: buffer; positions of the values, frozen.
        scales: buffer; scale of each group of columns of a row, only for values on a grid; frozen.
        row_offsets: buffer; where each row's values begin, only for patterns whose rows differ in number; frozen.
        S: buffer; dense S [o, d] after `keep_dense`, not in the state dict.
        U: parameter [o, r], or buffer of int8 codes, frozen; None at rank 0.
        V: parameter [r, d], or buffer of int8 codes, frozen; None at rank 0.
        low_rank_scales: buffer [r]; scale of each component of U·V, only where U and V are codes; frozen.
        bias: parameter [o], or None.
    """

    values: Tensor
    meta: Tensor
    scales: Tensor | None
    row_offsets: Tensor | None
    S: Tensor | None
    U: Tensor | None
    V: Tensor | None
    low_rank_scales: Tensor | None
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
        values: ValueFormat | None = None,
        low_rank: torch.dtype | None = None,
    ) -> None:
        """Allocate the tensors; `load_state_dict` or `streamslr.load` fills them.

        Args:
            in_features: inputs d.
            out_features: outputs o.
            pattern: sparsity pattern of S.
            rank: columns r of U; 0 for none.
            bias: True for a linear with bias.
            nonzeros: number of values, for patterns whose rows differ in it.
            dtype: dtype of values or their scales, U, V and bias [default: torch's].
            device: device of all tensors [default: torch's].
            values: format of the values; None for numbers in `dtype`.
            low_rank: int8 for U and V as codes.

        Raises:
            InputError: no weight [o, d] can have the pattern, or U and V are codes and `dtype` is float16.
        """
        super().__init__()
        self.in_features, self.out_features, self.pattern, self.rank = in_features, out_features, pattern, rank
        self.value_format = values
        o, d = out_features, in_features
        pattern.require_fits("SparseLowRankLinear", (o, d))
        if rank and low_rank == torch.int8:
            require_range("U and V in int8", dtype)
        shapes = part_shapes(pattern, (o, d), rank, nonzeros or 0, values, low_rank)
        parts = {
            part: torch.empty(shape, dtype=part_dtype(part, dtype, values, low_rank), device=device)
            for part, shape in shapes.items()
        }
        for part in ("values", "meta", "scales", "row_offsets", "low_rank_scales"):
            self.register_buffer(part, parts.get(part))
        # Registered as saved until keep_dense() fills it: accelerate fails on a None that is not saved.
        self.register_buffer("S", None)
        for part in ("U", "V"):
            if "low_rank_scales" in parts:
                self.register_buffer(part, parts[part])
            else:
                self.register_parameter(part, nn.Parameter(parts[part]) if rank else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(o, dtype=dtype, device=device)) if bias else None)
        self._gpu_kernel: _GpuKernel | None = None

    @property
    def kernel(self) -> str:
        """Kernel that multiplies S on the device where the module is now, with the reason."""
        if self.S is not None:
            return "dense: keep_dense() was asked for"
        if not self.values.is_cuda:
            return _cpu_kernel(self.pattern, self.values.dtype, None if self.scales is None else self.scales.dtype)
        return self._require_gpu_kernel().name

    @property
    def weight(self) -> AbsentWeight:
        """Dtype, device and shape [o, d] of the dense weight, which some models' code asks for; it has no numbers."""
        shape = (self.out_features, self.in_features)
        return AbsentWeight.of(
            f"a linear {shape[0]}x{shape[1]}", shape, number_dtype(self.packed()), self.values.device
        )

    def packed(self) -> dict[str, Tensor]:
        """Return the parts that the folder stores (`PACKED_PARTS`), those that there are; without the bias."""
        parts = {part: getattr(self, part) for part in PACKED_PARTS}
        return {part: tensor.detach() for part, tensor in parts.items() if tensor is not None}

    @torch.no_grad()
    def make_trainable(self) -> None:
        """Make scales of S parameters, and codes of U and V numbers: parameters in the dtype of their scales."""
        if self.scales is not None:
            scales = self.scales
            del self.scales
            self.register_parameter("scales", nn.Parameter(scales))
        low_rank = unpack_low_rank(self.packed())
        if self.low_rank_scales is None or low_rank is None:
            return
        dtype, self.low_rank_scales = self.low_rank_scales.dtype, None
        for part, numbers in zip(("U", "V"), low_rank, strict=True):
            delattr(self, part)
            self.register_parameter(part, nn.Parameter(numbers.to(dtype)))

    @torch.inference_mode(False)  # a tensor made in inference mode could not be trained with later
    def keep_dense(self) -> None:
        """Hold S dense too from now on: as fast as a dense linear, for its memory on top of the packed one.

        Raises:
            InputError: accelerate offloads the weights between calls.
        """
        if self.values.is_meta:
            raise InputError("S cannot be kept dense of weights that are offloaded: leave keep_dense or device_map out")
        S = unpack(self.packed(), self.pattern, (self.out_features, self.in_features))
        self.register_buffer("S", S.to(number_dtype(self.packed())), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., o] for x [..., d]."""
        flat = x.reshape(-1, self.in_features)  # [n, d]
        if self.S is not None:
            y = nn.functional.linear(flat, self.S)
        elif flat.is_cuda and self._may_take_tensor_cores():
            y = self._on_tensor_cores(flat)
        else:
            y = self._by_operator(flat)
        if self.U is not None and self.V is not None:
            y = low_rank_product(y, flat, self.U, self.V, self.low_rank_scales)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        bias, values = self.bias is not None, values_text(self.value_format)
        kind = f"pattern={self.pattern}, values={values}, rank={self.rank}"
        return f"{self.in_features}, {self.out_features}, {kind}, bias={bias}"

    def _may_take_tensor_cores(self) -> bool:
        kernel = self._gpu_kernel
        may = self.pattern == _TENSOR_CORE_PATTERN and self.scales is None
        return may and (kernel is None or kernel.on_tensor_cores)

    def _by_operator(self, x: Tensor) -> Tensor:
        packed = self.values, self.meta, self.row_offsets
        y: Tensor = packed_product(x, *packed, str(self.pattern), self.in_features, False, self.scales)
        return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _on_tensor_cores(self, x: Tensor) -> Tensor:
        # torch.compile does not trace this: torch's sparse tensors are subclasses with kernels of their own.
        kernel = self._require_gpu_kernel()
        if kernel.weight is None or x.dtype != kernel.weight.dtype:
            return self._by_operator(x)
        if kernel.triton_for_few and triton_product.picks(len(x), self.pattern, False):
            return self._by_operator(x)
        rest = kernel.weight, self.values, self.meta, str(self.pattern), self.in_features
        y: Tensor = _SemiStructuredProduct.apply(x, *rest)  # type: ignore[no-untyped-call]
        return y

    @torch.inference_mode(False)
    def _require_gpu_kernel(self) -> "_GpuKernel":
        """Return the kernel for this device, chosen when it is first needed."""
        if self._gpu_kernel is None:
            self._gpu_kernel = _choose_gpu_kernel(self)
            if self._gpu_kernel.weight is not None:
                # Both of torch's 2:4 layouts begin with the values in our order: hold them once.
                values = self._gpu_kernel.weight.values()
                if torch.equal(values, self.values):
                    self.values = values
            _log_once(self._gpu_kernel.name)
        return self._gpu_kernel

    # The kernel is chosen again after tensors move or change, and it is never copied or saved.

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseLowRankLinear":
        self._gpu_kernel = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.value_format is not None and self.values.dtype != self.value_format.dtype:  # to(dtype) meant numbers
            self.values = self.values.to(self.value_format.dtype)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._gpu_kernel = self.S = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_gpu_kernel": None}


def low_rank_product(y: Tensor, x: Tensor, U: Tensor, V: Tensor, scales: Tensor | None) -> Tensor:
    """Return y + (x Vᵀ) Uᵀ [n, o] for x [n, d]; with scales [r], U and V are codes, and x Vᵀ is multiplied by them."""
    if scales is None:
        return torch.addmm(y, nn.functional.linear(x, V), U.t())
    require_range("U and V in int8", x.dtype)
    return torch.addmm(y, nn.functional.linear(x, V.to(x.dtype)) * scales.to(x.dtype), U.to(x.dtype).t())


@torch.library.custom_op(
    "streamslr::packed_product",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor meta, Tensor? row_offsets, str pattern, int d, bool by_columns, "
    "Tensor? scales=None) -> Tensor",
)
def packed_product(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    row_offsets: Tensor | None,
    pattern: str,
    d: int,
    by_columns: bool,
    scales: Tensor | None = None,
) -> Tensor:
    """Return x Sᵀ [n, o] for x [n, d], or by_columns x S [n, d] for x [n, o]; at most one tile of S is dense at a time.

    It is an operator of its own, so that torch.compile takes it whole and autograd saves only the packed tensors. On a
    GPU x Sᵀ of not too many tokens is one Triton kernel where that passed its check: nothing of S is dense, and the
    host does not wait. In tiles the host reads row_offsets, so that a CUDA graph cannot capture a pattern whose rows
    differ in their number of values; nor can it capture the check, which the first call makes.
    """
    parsed, o = _parse(pattern), len(meta)
    scales_dtype = None if scales is None else scales.dtype
    fault = "" if by_columns else triton_product.fault(parsed, x.device, x.dtype, values.dtype, scales_dtype)
    if fault is None and not triton_product.in_tiles(len(x), x.device, parsed):
        return triton_product.multiply(x, values, meta, row_offsets, parsed, d, scales)
    parts = {"values": values, "meta": meta, "row_offsets": row_offsets, "scales": scales}
    tensors = {part: tensor for part, tensor in parts.items() if tensor is not None}
    on_cpu = x.device.type == values.device.type == meta.device.type == "cpu"
    native = on_cpu and why_not_native(parsed, values.dtype, scales_dtype) is None
    if native and not by_columns and x.dtype == (scales_dtype or values.dtype) and 0 < len(x) <= MOST_TOKENS:
        return multiply_native(x, tensors, parsed, (o, d))
    unpack_tile = unpack_native if native else unpack_rows
    step = max(1, (_CPU_TILE if on_cpu else _GPU_TILE) // d)
    tiles = (slice(start, min(start + step, o)) for start in range(0, o, step))
    if by_columns:
        wide = torch.promote_types(x.dtype, torch.float32)  # sums over tiles would lose digits in bf16
        sums = torch.zeros(len(x), d, dtype=wide, device=x.device)
        for rows in tiles:
            sums += x[:, rows] @ unpack_tile(tensors, parsed, (o, d), rows).to(x.dtype)
        return sums.to(x.dtype)
    y = x.new_empty(len(x), o)
    for rows in tiles:
        torch.mm(x, unpack_tile(tensors, parsed, (o, d), rows).to(x.dtype).t(), out=y[:, rows])
    return y


@packed_product.register_fake
def _(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    row_offsets: Tensor | None,
    pattern: str,
    d: int,
    by_columns: bool,
    scales: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], d if by_columns else meta.shape[0])


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, meta, row_offsets, *ctx.rest, scales = inputs
    trained = scales is not None and scales.requires_grad
    ctx.save_for_backward(x if trained else None, values, meta, row_offsets, scales)


def _packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, meta, row_offsets, scales = ctx.saved_tensors
    pattern, d, by_columns = ctx.rest
    packed = values, meta, row_offsets
    dx = packed_product(grad, *packed, pattern, d, not by_columns, scales) if ctx.needs_input_grad[0] else None
    dscales = None
    if x is not None:  # saved where scales are trained
        if by_columns:  # the product of a gradient: nothing that trains scales differentiates it again
            raise NotImplementedError("scales have no gradient of a gradient")
        dscales = _scale_gradient(grad, x, *packed, _parse(pattern), scales)
    return dx, *[None] * 6, dscales


def _scale_gradient(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    row_offsets: Tensor | None,
    pattern: SparsityPattern,
    scales: Tensor,
) -> Tensor:
    """Return the gradient [o, groups] of x Sᵀ by the scales of S: of each group, Σ code · (gradᵀ x) over its columns.

    Args:
        grad: Gradient of the product [n, o].
        x: Its factor [n, d].
        values: Codes of S as they are stored, as are meta and row_offsets.
        meta: uint8 [o, width].
        row_offsets: int64 [o + 1], or None.
        pattern: Pattern of S.
        scales: Scales [o, groups].
    """
    (o, groups), d = scales.shape, x.shape[1]
    parts = {"values": values, "meta": meta, "row_offsets": row_offsets, "scales": torch.ones_like(scales)}
    tensors = {part: tensor for part, tensor in parts.items() if tensor is not None}
    result = torch.empty_like(scales)
    for rows in row_chunks(o, d):
        codes = unpack_rows(tensors, pattern, (o, d), rows).float()
        result[rows] = sum_groups(codes.mul_(grad[:, rows].float().t() @ x.float()), groups)
    return result


packed_product.register_autograd(_packed_backward, setup_context=_keep_packed)
_parse = cache(parse_pattern)


def way_of_product(
    pattern: SparsityPattern, device: torch.device, dtype: torch.dtype, values: ValueFormat | None = None
) -> str:
    """Return how `packed_product` multiplies on a device, with the reason where S is unpacked; check it if need be."""
    stored = (dtype, None) if values is None else (values.dtype, dtype)
    if device.type == "cpu":
        return _cpu_kernel(pattern, *stored)
    reason = triton_product.fault(pattern, device, dtype, *stored)
    if reason:
        return f"unpacked in tiles: {reason}"
    return f"multiplied by the Triton kernel, in tiles above {triton_product.MOST_TOKENS} tokens"


def _cpu_kernel(pattern: SparsityPattern, dtype: torch.dtype, scales_dtype: torch.dtype | None) -> str:
    if reason := why_not_native(pattern, dtype, scales_dtype):
        return f"unpacked in tiles by torch: {reason}"
    return f"unpacked in tiles by the C library, and without tiles for up to {MOST_TOKENS} tokens"


@dataclass(frozen=True)
class _GpuKernel:
    """The kernel that multiplies S on a GPU.

    Attributes:
        name: the kernel, with the reason where sparse tensor cores do not multiply.
        weight: S in torch's 2:4 layout, a torch.sparse.SparseSemiStructuredTensor [o, d]; None where S stays packed.
        on_tensor_cores: True where there is that weight; torch.compile can ask this, but not for the weight.
        triton_for_few: True where few tokens are multiplied by the Triton kernel for 2:4 all the same. One call of
            cuSPARSELt takes 1 ms of the host, and in a CUDA graph 2.6 times as long as a dense product of one token,
            the kernel 1.5 times for one token and 3.9 for four (28672×8192 on an H200).
    """

    name: str
    weight: Any = None
    on_tensor_cores: bool = False
    triton_for_few: bool = False


class _SemiStructuredProduct(torch.autograd.Function):
    """Product x Sᵀ on sparse tensor cores. Torch's layout cannot multiply by S itself, so the backward pass unpacks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, values: Tensor, meta: Tensor, pattern: str, d: int) -> Tensor:
        ctx.save_for_backward(values, meta)
        ctx.pattern, ctx.d = pattern, d
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, meta = ctx.saved_tensors
        return packed_product(grads[0], values, meta, None, ctx.pattern, ctx.d, True), None, None, None, None, None


def _choose_gpu_kernel(linear: SparseLowRankLinear) -> _GpuKernel:
    """Return cuSPARSELt's kernel where it runs, or CUTLASS's (compute 8.x); else Triton's or none, and the reason."""
    values, shape = linear.values, (linear.out_features, linear.in_features)

    scales_dtype, dtype = None if linear.scales is None else linear.scales.dtype, number_dtype(linear.packed())
    fault = triton_product.fault(linear.pattern, values.device, dtype, values.dtype, scales_dtype)

    def packed(why: str) -> _GpuKernel:
        return _GpuKernel(f"Triton: {why}" if fault is None else f"unpacked in tiles: {why}; {fault}")

    hook = getattr(linear, "_hf_hook", None)  # accelerate's; it leaves no offloaded weight on the GPU, nor may we
    if any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ()))):
        return packed("its weights are offloaded between calls")
    if linear.pattern != _TENSOR_CORE_PATTERN:
        return packed(f"sparse tensor cores take {_TENSOR_CORE_PATTERN}, not {linear.pattern}")
    if values.dtype not in (torch.bfloat16, torch.float16):
        return packed(f"sparse tensor cores take bfloat16 and float16, not {values.dtype}")
    major, minor = torch.cuda.get_device_capability(values.device)
    if major < 8:
        return packed(f"compute capability {major}.{minor} has no sparse tensor cores")
    layout: Any
    if torch.backends.cusparselt.is_available():
        name, layout = "cuSPARSELt", torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    elif major == 8:
        name, layout = "CUTLASS", torch.sparse.SparseSemiStructuredTensorCUTLASS
    else:
        return packed(f"this torch has no cuSPARSELt, and CUTLASS's kernel runs on compute 8.x, not {major}.{minor}")
    S = unpack(linear.packed(), linear.pattern, shape)
    try:
        weight: Any = layout.from_dense(S)
        x = torch.linspace(-1, 1, 16 * shape[1], dtype=S.dtype, device=S.device).view(16, -1)
        got, expected = nn.functional.linear(x, weight).float(), (x @ S.t()).float()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, ValueError) as error:  # a shape or version that the kernel refuses
        return packed(f"{name} refused {shape[0]}x{shape[1]}: {str(error).partition(chr(10))[0]}")
    # The kernels and their layouts are a prototype in torch: after one wrong product S stays packed instead.
    if not torch.allclose(got, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())):
        return packed(f"{name}'s product of a {shape[0]}x{shape[1]} linear was wrong")
    few = f"Triton up to {triton_product.PICKING_NUMBERS} tokens" if fault is None else f"for few tokens too: {fault}"
    return _GpuKernel(f"{name} {_TENSOR_CORE_PATTERN}, {few}", weight, True, fault is None)


@cache
def _log_once(kernel: str) -> None:
    """Log a kernel and its reason, each once in a process."""
    log.log(logging.WARNING if kernel.startswith("unpacked") else logging.INFO, "packed linears on the GPU: %s", kernel)
