"""The two modes of torch that keep up the pretence of a GPU: one sees functions, the other every aten operator.

`FunctionMode` answers `.device`, `.is_cuda`, `.to`, `.cpu`, `.numpy`, and `device="cuda"` of factories. `DispatchMode`
refuses mixed devices as CUDA does, places what comes out, and counts. Custom operators count like aten's: one kernel
that reads and writes its arguments. They compute by what they registered for "cpu", or without values by their fake.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pretended_gpu.cost import extra_launches, operator_bytes, operator_flops, workspace_bytes
from pretended_gpu.operators import (
    CHANGING_SHAPE,
    COMBINING,
    COMPARING,
    CUBLAS,
    FILLING,
    INDEXING,
    NO_KERNEL,
    NOT_DETERMINISTIC,
    TAKES_HOST_SCALARS,
    argument,
    counted,
    name_and_written,
    tensors_in,
    widened,
)
from pretended_gpu.streams import HOST

if TYPE_CHECKING:
    from pretended_gpu.device import PretendedGpu

aten = torch.ops.aten
_DEVICES = {"cuda": torch.device("cuda", 0), "cpu": torch.device("cpu"), "meta": torch.device("meta")}
_GETTERS = {getattr(torch._C.TensorBase, name).__get__: name for name in ("device", "is_cuda", "is_cpu", "is_meta")}


class DeviceMixError(RuntimeError):
    """An operator got tensors on different devices."""


def _device_type(value: object) -> str | None:
    """Return the type of the device that an argument names, if it names one."""
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, str):
        return torch.device(value).type
    return "cuda" if isinstance(value, int) and not isinstance(value, bool) else None


class FunctionMode(TorchFunctionMode):
    """Answers of a pretended GPU to functions and attributes of tensors."""

    def __init__(self, gpu: "PretendedGpu") -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        gpu, options = self.gpu, dict(kwargs or {})
        own = next((a for a in args if not isinstance(a, Tensor) and hasattr(a, "__torch_function__")), None)
        if own is not None:  # its code asks for devices too
            with self:
                return type(own).__torch_function__(func, types, args, options)
        if func in _GETTERS:
            where, asked = gpu.where(args[0]), _GETTERS[func]
            return _DEVICES.get(where) or func(*args) if asked == "device" else where == asked.removeprefix("is_")
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], Tensor):
            if name in ("to", "cpu", "cuda"):
                return self._to(args[0], ({"cpu": "cpu", "cuda": "cuda"}.get(name), *args[1:]), options)
            if handler := _OF_TENSORS.get(name):
                done, result = handler(self, args[0], args[1:])
                if done:
                    return result
        attends = func is torch.nn.functional.scaled_dot_product_attention and not gpu.values
        if attends and gpu.where(args[0]) == "cuda":
            return self._attention(*args, **options)
        if name in ("_make_subclass", "as_subclass"):
            return func(*args, **options)
        pinned = options.pop("pin_memory", False)
        device = None if options.get("device") is None else _device_type(options["device"])
        if device == "cuda":
            generator = options.get("generator")
            if generator is not None and generator.device.type != "cuda":
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu' (pretended)")
            options["device"] = gpu.backing
        if device in ("cuda", "meta") or any(isinstance(a, Tensor) and gpu.where(a) == "cuda" for a in args if device):
            made = self._making(str(device), func, args, options)
        else:
            made = func(*args, **options)
        if pinned:
            gpu.pin(made)
        return made

    def _making(self, where: str, func: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Call a function whose result is to be on a device that its arguments need not be on."""
        wanted = self.gpu.wanted
        before, wanted.where = getattr(wanted, "where", None), where
        try:
            made = func(*args, **options)
        finally:
            wanted.where = before
        if isinstance(made, Tensor) and where != "meta":
            self.gpu.place(made, where, getattr(func, "__name__", ""))
        return made

    def _to(self, x: Tensor, args: Sequence[Any], options: dict[str, Any]) -> Tensor:
        gpu, here = self.gpu, self.gpu.where(x)
        device, dtype, flags = options.pop("device", None), options.pop("dtype", None), []
        target = None if device is None else _device_type(device)
        for value in (*args, options.pop("other", None)):
            if isinstance(value, Tensor):
                target, dtype = gpu.where(value), value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, bool):
                flags.append(value)
            elif value is not None:
                target = _device_type(value)
        non_blocking = options.pop("non_blocking", flags[0] if flags else False)
        copy = options.pop("copy", flags[1] if len(flags) > 1 else False)
        dtype, target = dtype or x.dtype, target or here
        if target == here:
            return x if dtype == x.dtype and not copy else Tensor.to(x, dtype, copy=copy, **options)
        if target == "meta":
            empty = {"dtype": dtype, "device": "meta"}
            made: Tensor = self._making("meta", torch.empty_strided, (x.shape, x.stride()), empty)
            return made
        if here == "meta":
            raise NotImplementedError("Cannot copy out of meta tensor; no data! (pretended)")
        return self._cross(x, target, dtype, non_blocking, options)

    def _cross(
        self, x: Tensor, target: str, dtype: torch.dtype, non_blocking: bool, options: Mapping[str, Any]
    ) -> Tensor:
        """Copy between host and device."""
        gpu = self.gpu
        if target == "cuda":
            made: Tensor = self._making("cuda", Tensor.to, (x, gpu.backing, dtype), {"copy": True, **options})
        elif gpu.values:
            made = self._making("cpu", Tensor.to, (x, dtype), {"copy": True, **options})
        else:
            made = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="cpu")
        if target == "cpu" and non_blocking:
            gpu.pin(made)  # as torch does
        count_copy(gpu, made, x, target == "cuda", non_blocking)
        return made

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Take the kernel that CUDA would, unless flags forbid it.

        Flash takes no mask, and values only as wide as queries; then it is the kernel that takes both.
        """
        cuda: Any = torch.backends.cuda
        if attn_mask is None and query.shape[-1] == value.shape[-1] and cuda.flash_sdp_enabled():
            # grouped heads stay as they are: flash attention reads shared K and V in place
            flash = aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]  # type: ignore[no-any-return]
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if cuda.mem_efficient_sdp_enabled():
            efficient, grad = aten._scaled_dot_product_efficient_attention, torch.is_grad_enabled()
            if attn_mask is not None:
                self.gpu.note("attention with a mask: not flash")
            made = efficient(query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale)
            return made[0]  # type: ignore[no-any-return]
        self.gpu.note("attention by plain products: scores of all pairs of tokens")
        scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None:
            scores = scores + attn_mask
        return torch.softmax(scores, -1) @ value

    def _to_numpy(self, x: Tensor, rest: object) -> tuple[bool, Any]:
        if self.gpu.where(x) == "cuda":
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first (pretended)")
        pinned = self.gpu.is_pinned(x)  # numpy may then write to it
        self.gpu.streams.access(HOST, [] if pinned else [x], [x] if pinned else [])
        return False, None

    def _tolist(self, x: Tensor, rest: object) -> tuple[bool, Any]:
        if self.gpu.where(x) == "cuda":
            self.gpu.copied("d2h", x.nbytes, pinned=False)
            self.gpu.synchronized("tolist()")
            if not self.gpu.values:
                return True, self.gpu.answers.numbers(x, self.gpu.caller())
        return False, None

    def _pin_memory(self, x: Tensor, rest: object) -> tuple[bool, Any]:
        if self.gpu.where(x) != "cpu":
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned (pretended)")
        if self.gpu.is_pinned(x):
            return True, x
        copy = x.clone()
        self.gpu.pin(copy)
        return True, copy


_OF_TENSORS: Mapping[str, Callable[[FunctionMode, Tensor, Sequence[Any]], tuple[bool, Any]]] = {
    "numpy": FunctionMode._to_numpy,
    "__array__": FunctionMode._to_numpy,
    "tolist": FunctionMode._tolist,
    "pin_memory": FunctionMode._pin_memory,
    "is_pinned": lambda mode, x, rest: (True, mode.gpu.is_pinned(x)),
}
"""Name of a method of tensors -> what answers it: (whether that is all, the answer)."""


def count_copy(gpu: "PretendedGpu", to: Tensor, source: Tensor, to_device: bool, non_blocking: bool) -> None:
    """Count a copy between host and device, its waits, and check its order; functions of torch must be off.

    A cast is made on the host by a blocking copy, else on the device (Copy.cu). Only pinned memory is copied while the
    host goes on.
    """
    pinned = gpu.is_pinned(source if to_device else to)
    travelling = to.dtype if to_device != non_blocking else source.dtype
    gpu.copied("h2d" if to_device else "d2h", source.numel() * travelling.itemsize, pinned)
    packed = 0 if to_device or source.is_contiguous() else source.nbytes  # strided memory is packed on the device
    if temporary := packed or (source.numel() * travelling.itemsize if travelling != to.dtype and to_device else 0):
        with gpu.workspace(temporary, "copy"):
            pass
    gpu.streams.access(gpu.streams.current, [source], [to])
    if not (non_blocking and pinned):
        gpu.synchronized(f"copy {'to' if to_device else 'from'} the device")


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator: refuses mixed devices, places what comes out, counts what ran on the device."""

    def __init__(self, gpu: "PretendedGpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return func(*args, **(kwargs or {})) if func.namespace == "prim" else self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        gpu, (name, written) = self.gpu, name_and_written(func)
        tensors = tensors_in((*args, *kwargs.values()) if kwargs else args)
        places = {gpu.where(t) for t in tensors}
        if "cuda" not in places:
            return self._beside_device(func, name, args, kwargs, tensors, written)
        self._require_one_device(func, name, args, tensors, places)
        self._require_deterministic(name)
        changed = tensors_in([argument(a, args, kwargs) for a in written]) if written else []
        if name == "copy_" and places == {"cuda", "cpu"}:
            to, source = args[:2]
            gpu.streams.access(HOST, [t for t in (to, source) if gpu.where(t) == "cpu" and not gpu.is_pinned(t)], [])
            count_copy(gpu, to, source, gpu.where(to) == "cuda", bool(args[2]) if len(args) > 2 else False)
            return func(*args, **kwargs) if gpu.values else to
        self._count_waits(name, tensors)
        gpu.streams.access(gpu.streams.current, tensors, changed)
        extra = workspace_bytes(name, args, kwargs)
        with gpu.workspace(extra, name) if extra else nullcontext():
            done, out = (False, None) if gpu.values else self._without_values(name, args, kwargs)
            if not done:
                if name in CUBLAS and "dtype" in func._overloadname:
                    out = widened(func, args, kwargs)
                elif name == "histc" and not args[0].is_floating_point():
                    out = counted(func, args, kwargs)
                else:
                    out = func(*args, **kwargs)
            self._place(name, kwargs, tensors, out)
        if name not in NO_KERNEL:
            self._count(name, args, kwargs, tensors, changed, out)
        return out

    def _beside_device(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], written: Sequence[Any]
    ) -> Any:
        """Run an operator that has no tensor on the device."""
        gpu = self.gpu
        if gpu.streams.watching:
            on_host = [t for t in tensors if t.device.type == "cpu"]
            changed = tensors_in([argument(a, args, kwargs) for a in written]) if written else []
            gpu.streams.access(HOST, on_host, [t for t in changed if t.device.type == "cpu"])
        return func(*args, **kwargs)

    def _require_one_device(
        self, func: Any, name: str, args: Sequence[Any], tensors: list[Tensor], places: set[str]
    ) -> None:
        """Raise where CUDA would; count what it lets pass at a cost."""
        gpu = self.gpu
        if places == {"cuda"} or name in ("copy_", "_to_copy") or name.startswith("_fused_adam"):
            return
        others = [t for t in tensors if gpu.where(t) != "cuda"]
        if not gpu.values:  # a number that torch itself made a tensor of, where it thinks the others are
            others = [t for t in others if t.dim() or t.device.type != "meta"]
        # _foreach_: torch groups tensors by their real device, and so moves the scalar of clip_grad_norm_ to the host
        takes_scalars = torch.Tag.pointwise in func.tags or name in TAKES_HOST_SCALARS or name.startswith("_foreach_")
        if takes_scalars and all(t.dim() == 0 and gpu.where(t) == "cpu" for t in others):
            return
        if not others:
            return
        if name in INDEXING and gpu.where(args[0]) == "cuda" and all(gpu.where(t) == "cpu" for t in others):
            gpu.synchronized("index on the host")
            return
        raise DeviceMixError(
            f"{func}: expected all tensors to be on the same device, but found {' and '.join(sorted(places))} "
            f"(pretended): " + ", ".join(f"{gpu.where(t)} {list(t.shape)} {t.dtype}" for t in tensors)
        )

    def _require_deterministic(self, name: str) -> None:
        if not torch.are_deterministic_algorithms_enabled():
            return
        fault = None
        if name in NOT_DETERMINISTIC:
            fault = f"{name} CUDA does not have a deterministic implementation (pretended)"
        elif name in CUBLAS and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
            fault = "Deterministic behavior needs CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8 (pretended)"
        if fault and not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(fault)
        if fault:
            self.gpu.note(fault)

    def _count_waits(self, name: str, tensors: list[Tensor]) -> None:
        by_mask = name in INDEXING and any(t.dtype == torch.bool for t in tensors[1:])
        if name == "_local_scalar_dense":
            self.gpu.synchronized(".item()")
        elif name in ("nonzero", "equal") or by_mask:
            self.gpu.synchronized(name)

    def _place(self, name: str, kwargs: Mapping[str, Any], tensors: list[Tensor], out: Any) -> None:
        """Give what an operator on the device made its place."""
        gpu = self.gpu
        made = tensors_in([out])
        if not made or any(made[0] is t for t in tensors):
            return
        inputs = {id(t.untyped_storage()) for t in tensors if t.layout == torch.strided}
        new = [t for t in made if t.layout == torch.strided and id(t.untyped_storage()) not in inputs]
        elsewhere = "device" in kwargs or name in ("_to_copy", "clone")
        wanted = getattr(gpu.wanted, "where", None) if elsewhere else None
        if wanted is None:
            for tensor in new:
                gpu.place(tensor, "cuda", name)
        gpu.streams.access(gpu.streams.current, [], new)

    def _without_values(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[bool, Any]:
        """Return whether an operator that needs values, or has no kernel on meta, is done; and what it gives."""
        gpu = self.gpu
        if name == "_local_scalar_dense":
            origin = getattr(args[0].untyped_storage(), "made_by", "")
            return True, gpu.answers.scalar(args[0].dtype, origin, gpu.caller())
        if name == "equal":
            return True, True
        if name == "bincount":
            counts = torch.empty(args[2], dtype=torch.int64, device="meta")
            setattr(counts.untyped_storage(), "counted", args[0].numel())  # noqa: B010  # no attribute in torch's stubs
            return True, counts
        if name == "nonzero":
            return True, torch.empty(gpu.answers.true_in(args[0]), args[0].dim(), dtype=torch.int64, device="meta")
        if name in INDEXING and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
            if name.startswith(("index_put", "_index_put")):
                return True, args[0]
            mask = args[1][0]
            if mask is not None:
                size = (gpu.answers.true_in(mask), *args[0].shape[mask.dim() :])
                return True, torch.empty(size, dtype=args[0].dtype, device="meta")
        if name in ("masked_scatter_", "masked_scatter"):
            return True, args[0]
        # A result that exists already needs no kernel, and meta's are slow Python.
        if isinstance(kwargs.get("out"), Tensor) and kwargs["out"].numel():
            return True, kwargs["out"]
        if name.endswith("_") and not name.startswith("_") and name not in CHANGING_SHAPE:
            return True, args[0]
        if name in ("abs", "neg"):
            return True, torch.empty_like(args[0])
        if name in COMPARING | COMBINING and isinstance(args[1], Tensor) and args[0].shape == args[1].shape:
            dtype = torch.bool if name in COMPARING else torch.result_type(args[0], args[1])
            return True, torch.empty_like(args[0], dtype=dtype)
        return name.startswith("_fused_adam"), None

    def _count(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: list[Tensor],
        changed: list[Tensor],
        out: Any,
    ) -> None:
        unit, flops = operator_flops(name, args)
        only_written = {id(t) for t in tensors_in([kwargs["out"]])} if "out" in kwargs else set()
        if name in FILLING:
            only_written.add(id(args[0]))
        made = tensors_in([out])
        made += [t for t in changed if not any(t is other for other in made)]
        nbytes = operator_bytes([t for t in tensors if id(t) not in only_written], made)
        if name.startswith("_fused_adam"):  # reads four tensors of a parameter's size and writes three
            nbytes = 7 * sum(t.nbytes for t in args[0])
        with self.gpu.lock:
            cost = self.gpu.cost
            cost.work[unit, flops, nbytes] += 1
            if extra := extra_launches(name, args):
                cost.work["memory", 0.0, 2**16] += extra
            record = cost.operators[name]
            record["calls"] += 1
            record["bytes"] += nbytes
            record["flops"] += int(flops)
