"""The Triton product with packed S: on a GPU as compiled, elsewhere through Triton's interpreter."""

import importlib.util
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from streamslr.io.packing import pack, unpack, unpack_codes
from streamslr.runtime import triton_product
from streamslr.runtime.linear import SparseLowRankLinear, _choose_gpu_kernel, packed_product
from streamslr.runtime.triton_product import fault, multiply
from streamslr.spec.pattern import NofM, SparsityPattern, parse_pattern
from streamslr.spec.values import spread
from tests.support.markers import slow
from tests.support.packed_linears import form_of, grid_linear, low_rank_linear, random_sparse

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
Parts = tuple[Tensor, Tensor, Tensor | None]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed, so its product was not run"
)


@pytest.fixture(autouse=True)
def _no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test check the kernel anew."""
    monkeypatch.setattr(triton_product, "_verdicts", {})


@pytest.fixture
def _on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernel on the CPU too."""
    monkeypatch.setattr(triton_product, "DEVICES", {"cuda", "cpu"})


@pytest.fixture
def _without_check(_on_any_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernel at once: in the interpreter a check takes a second."""
    monkeypatch.setattr(triton_product, "_fault_of_kernel", lambda key: None)


def width_for(pattern: SparsityPattern, least: int) -> int:
    """Return the least number of columns that the pattern can have, from `least` on."""
    return -(-least // pattern.m) * pattern.m if isinstance(pattern, NofM) else least


def parts_of(S: Tensor, pattern: SparsityPattern, dtype: torch.dtype = torch.float32) -> Parts:
    """Return values, meta and row_offsets (or None) of S, on the device."""
    packed = {name: part.to(DEVICE) for name, part in pack(S, pattern, dtype).items()}
    return packed["values"], packed["meta"], packed.get("row_offsets")


def tokens_of(n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def assert_product(y: Tensor, x: Tensor, S: Tensor, dtype: torch.dtype) -> None:
    """Assert y = x Sᵀ within a rounding to `dtype` and two of float32 of the sum of sizes, which may be in any order.

    Triton's interpreter cuts digits off where S is rounded to bfloat16: there it is two of `dtype`.
    """
    assert y.dtype == dtype
    x, S = x.double(), S.double().to(DEVICE)
    expected, sizes = x @ S.t(), x.abs() @ S.abs().t()
    of_sums = torch.finfo(dtype if DEVICE.type == "cpu" else torch.float32).eps
    allowed = torch.finfo(dtype).eps * expected.abs() + 2 * of_sums * sizes + torch.finfo(torch.float32).tiny
    excess = ((y.double() - expected).abs() - allowed).max()
    assert excess <= 0, f"{excess:.2e} more than allowed, of products of up to {expected.abs().max():.2e}"


# The kernel


@needs_triton
@pytest.mark.parametrize(
    ("o", "least", "n"), [(20, 70, 3), *slow((16, 20, 1), (5, 36, 17), (70, 600, 1), (70, 100, 70), (9, 1700, 8))]
)
@pytest.mark.parametrize(
    "pattern",
    [
        "2:4",
        "4:8",
        "8:16",
        "50%",
        *slow("50%/row", "1:4", "1:8", "3:4", "3:6", "1:2", "2:16", "1:256", "90%", "90%/row"),
    ],
)
def test_products_are_those_of_float64_and_of_tiles(pattern: str, o: int, least: int, n: int) -> None:
    parsed = parse_pattern(pattern)
    d = width_for(parsed, least)
    S = random_sparse(parsed, o, d, seed=0, zeros=0.1)  # some rows are zero, some groups have less than n
    x, parts = tokens_of(n, d), parts_of(S, parsed)
    y = multiply(x, *parts, parsed, d)
    assert y.shape == (n, o)
    assert_product(y, x, S, torch.float32)
    assert_product(_in_tiles(x, parts, pattern, d), x, S, torch.float32)


def _in_tiles(x: Tensor, parts: Parts, pattern: str, d: int, scales: Tensor | None = None) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_product, "DEVICES", set())
        y: Tensor = packed_product(x, *parts, pattern, d, False, scales)
    return y


@needs_triton
@pytest.mark.parametrize("pattern", ["50%", *slow("2:4", "4:8", "8:16", "50%/row")])
@pytest.mark.parametrize("n", [17, *slow(3)])
def test_values_are_found_across_many_blocks(pattern: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEW_TOKENS", "MANY_TOKENS"):
        monkeypatch.setattr(triton_product, name, triton_product.Blocks(16, 16, 16, 4, 1))
    parsed = parse_pattern(pattern)
    d = width_for(parsed, 100)
    S = random_sparse(parsed, 20, d, seed=1)
    x = tokens_of(n, d)
    assert_product(multiply(x, *parts_of(S, parsed), parsed, d), x, S, torch.float32)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "values_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        *slow((torch.float16, torch.float16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)),
    ],
)
def test_sums_are_float32_in_every_dtype(dtype: torch.dtype, values_dtype: torch.dtype) -> None:
    parsed = parse_pattern("2:4")
    S = random_sparse(parsed, 20, 100, seed=2)
    x = tokens_of(3, 100, dtype)
    assert_product(multiply(x, *parts_of(S, parsed, values_dtype), parsed, 100), x, S.to(values_dtype).to(dtype), dtype)


@needs_triton
@pytest.mark.parametrize(
    ("pattern", "values", "dtype", "group", "n"),
    [
        ("2:4", "int4", torch.bfloat16, 33, 3),
        ("50%", "int4", torch.float32, 128, 3),
        ("4:8", "fp8", torch.bfloat16, 128, 3),
        ("dense", "int8", torch.float32, 128, 3),
        *slow(
            *(
                (p, v, torch.float32, 33, 17)
                for p in ("2:4", "8:16", "50%/row", "90%")
                for v in ("int8", "int4", "fp8")
            ),
            ("2:4", "fp8", torch.float16, 128, 70),
            ("dense", "int4", torch.bfloat16, 7, 17),
            ("dense", "fp8", torch.float32, 128, 17),
        ),
    ],
)
def test_codes_are_multiplied_as_in_float64_and_in_tiles(
    pattern: str, values: str, dtype: torch.dtype, group: int, n: int
) -> None:
    parsed, o = parse_pattern(pattern), 20
    d = width_for(parsed, 530)
    parts = {
        name: part.to(DEVICE) for name, part in grid_linear(parsed, form_of(values, group), o, d, 0, dtype).items()
    }
    S = unpack_codes(parts, parsed, (o, d)).float() * spread(parts["scales"].float(), d)
    x, packed = tokens_of(n, d, dtype), (parts["values"], parts["meta"], parts.get("row_offsets"))
    y = multiply(x, *packed, parsed, d, parts["scales"])
    assert_product(y, x, S.to(dtype), dtype)
    assert_product(_in_tiles(x, packed, pattern, d, parts["scales"]), x, S.to(dtype), dtype)


@needs_triton
@pytest.mark.parametrize("pattern", ["50%", *slow("2:4", "dense")])
@pytest.mark.parametrize("values", ["int4", *slow("fp8")])
def test_damaged_metadata_reads_nothing_outside_of_codes(pattern: str, values: str) -> None:
    parsed, form = parse_pattern(pattern), form_of(values)
    parts = {name: part.to(DEVICE) for name, part in grid_linear(parsed, form, 20, 64, 0, torch.float32).items()}
    used = parts["values"].numel()
    around = torch.full((used + 200,), 0x7F, dtype=torch.uint8, device=DEVICE)
    around[100:-100] = 0
    guarded = around[100:-100].view(form.dtype).view(parts["values"].shape)
    meta, row_offsets = torch.full_like(parts["meta"], 255), parts.get("row_offsets")
    if row_offsets is not None:
        row_offsets[3:9] = torch.tensor([-(2**60), 2**60, -1, 2**40, 5, 2 * used + 9])
    assert not multiply(torch.ones(3, 64, device=DEVICE), guarded, meta, row_offsets, parsed, 64, parts["scales"]).any()


@needs_triton
@pytest.mark.usefixtures("_on_any_device")
@pytest.mark.parametrize("values", ["int4", *slow("int8", "fp8")])
@pytest.mark.parametrize("pattern", ["2:4", *slow("50%", "dense")])
def test_the_check_of_codes_passes(pattern: str, values: str) -> None:
    form = form_of(values)
    assert fault(parse_pattern(pattern), DEVICE, torch.bfloat16, form.dtype, torch.bfloat16) is None


@needs_triton
def test_x_may_have_any_strides() -> None:
    parsed = parse_pattern("4:8")
    parts = parts_of(random_sparse(parsed, 20, 40, seed=3), parsed)
    wide = tokens_of(80, 6)
    for x in (wide[:40].t(), wide.t()[:, ::2], wide.t()[::2, :40]):
        assert not x.is_contiguous()
        assert torch.equal(multiply(x, *parts, parsed, 40), multiply(x.contiguous(), *parts, parsed, 40))


@needs_triton
@pytest.mark.parametrize("n", [0, 3])
def test_s_without_a_value_gives_zeros(n: int) -> None:
    parsed = parse_pattern("50%")
    y = multiply(tokens_of(n, 36), *parts_of(torch.zeros(20, 36), parsed), parsed, 36)
    assert torch.equal(y.cpu(), torch.zeros(n, 20))


@needs_triton
@pytest.mark.parametrize("pattern", ["2:4", "50%", *slow("4:8", "8:16", "50%/row", "1:8")])
def test_damaged_metadata_reads_nothing_outside(pattern: str) -> None:
    parsed = parse_pattern(pattern)
    values, meta, row_offsets = parts_of(random_sparse(parsed, 20, 64, seed=4, zeros=0.0), parsed)
    around = torch.full((values.numel() + 200,), float("nan"), device=DEVICE)
    guarded = around[100:-100].view_as(values).copy_(values)
    meta = torch.randint(0, 256, meta.shape, generator=torch.Generator().manual_seed(0)).byte().to(DEVICE)
    meta[0], meta[-1] = 255, 255
    if row_offsets is not None:
        row_offsets[3:9] = torch.tensor([-(2**60), 2**60, -1, 2**40, 5, values.numel() + 9])
    assert multiply(torch.ones(3, 64, device=DEVICE), guarded, meta, row_offsets, parsed, 64).isfinite().all()


# In a linear


def linear_of(pattern: str, rank: int, o: int = 20, d: int = 48) -> tuple[SparseLowRankLinear, Tensor]:
    """Return a packed linear on the device, and the dense one's weight in float64."""
    parsed = parse_pattern(pattern)
    parts = low_rank_linear(parsed, o, d, rank, torch.float32)
    linear = SparseLowRankLinear(d, o, parsed, rank, nonzeros=len(parts["values"]))
    linear.load_state_dict({name: part for name, part in parts.items() if rank or name not in "UV"})
    S = unpack(parts, parsed, (o, d)).double()
    return linear.to(DEVICE), (S + parts["U"].double() @ parts["V"].double()).to(DEVICE)


@needs_triton
@pytest.mark.usefixtures("_without_check")
@pytest.mark.parametrize("rank", [0, *slow(4)])
@pytest.mark.parametrize("pattern", ["8:16", *slow("2:4", "50%")])
def test_a_linear_multiplies_by_it_and_passes_gradients(
    pattern: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def multiply_and_count(*args: Any) -> Tensor:
        taken.append(args)
        return multiply(*args)

    monkeypatch.setattr(triton_product, "multiply", multiply_and_count)
    linear, W = linear_of(pattern, rank)
    x = torch.randn(2, 3, 48, device=DEVICE, requires_grad=True)
    y = linear(x)
    assert taken
    assert_product(y, x.detach(), W, torch.float32)
    grad, ones = torch.autograd.grad(y.sum(), x)[0], torch.ones_like(y)
    assert_product(grad, ones, W.t(), torch.float32)


@pytest.mark.usefixtures("_without_check")
def test_many_tokens_are_multiplied_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_product, "MOST_TOKENS", 4)
    monkeypatch.setattr(triton_product, "import_module", lambda name: BrokenKernel(AssertionError("the kernel ran")))
    linear, W = linear_of("8:16", rank=4)
    x = torch.randn(5, 48, device=DEVICE)
    assert_product(linear(x), x, W, torch.float32)
    with pytest.raises(AssertionError, match="the kernel ran"):
        linear(x[:4])


@pytest.mark.slow
@needs_triton
@pytest.mark.usefixtures("_without_check")
def test_torch_compile_takes_it_whole() -> None:
    linear, W = linear_of("50%", rank=4)
    x = torch.randn(3, 48, device=DEVICE)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert_product(compiled(x), x, W, torch.float32)


# Where tiles do it


@needs_triton
@pytest.mark.usefixtures("_on_any_device")
def test_a_kernel_that_passes_its_check_is_used_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "streamslr")
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):  # as a caller may have set
        for pattern in ("60%", "60%", "61.5%"):  # the fractions of OWL share a check
            assert fault(parse_pattern(pattern), DEVICE, torch.float32, torch.float32) is None
    assert caplog.messages == [
        f"packed linears at 60% in torch.float32 on {DEVICE}: multiplied by the Triton kernel",
    ]
    linear, _ = linear_of("70%", rank=0)
    assert _choose_gpu_kernel(linear).name == "Triton: sparse tensor cores take 2:4, not 70%"


class BrokenKernel:
    """A module of kernels that raise, or that do nothing."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.multiply_packed = self.multiply_2_of_4 = self

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **settings: Any) -> None:
            if self.error:
                raise self.error

        return launch


def of_the_kernel(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged of the kernel; the C library, which is not built everywhere, logs too."""
    return [message for message in caplog.messages if message.startswith("packed linears at")]


@pytest.mark.usefixtures("_on_any_device")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to find C compiler\nset CC"), "the Triton kernel failed: RuntimeError: Failed to find C"),
        (None, "the Triton kernel gave other products than torch in a check"),
    ],
)
def test_a_kernel_that_fails_its_check_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception | None, reason: str
) -> None:
    monkeypatch.setattr(triton_product, "import_module", lambda name: BrokenKernel(error))
    linear, W = linear_of("8:16", rank=4)
    x = torch.randn(3, 48, device=DEVICE)
    for _ in range(2):
        assert_product(linear(x), x, W, torch.float32)
    (message,) = of_the_kernel(caplog)
    assert message.startswith(f"packed linears at 8:16 in torch.float32 on {DEVICE}: unpacked in tiles")
    assert reason in message


@pytest.mark.usefixtures("_on_any_device")
def test_without_triton_tiles_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(triton_product, "import_module", import_module)
    linear, _ = linear_of("1:4", rank=0)
    name = _choose_gpu_kernel(linear).name
    assert name == "unpacked in tiles: sparse tensor cores take 2:4, not 1:4; Triton is not installed"


@pytest.mark.usefixtures("_on_any_device")
def test_other_dtypes_go_to_tiles() -> None:
    reason = fault(parse_pattern("2:4"), DEVICE, torch.float64, torch.float32)
    assert reason == "the Triton kernel takes bfloat16, float16 and float32, not torch.float64"


@pytest.mark.usefixtures("_on_any_device")
def test_memory_that_ran_out_in_the_check_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_product, "import_module", lambda name: BrokenKernel(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        fault(parse_pattern("2:4"), DEVICE, torch.float32, torch.float32)
    assert not triton_product._verdicts


def test_the_check_is_refused_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run the model once before"):
        fault(parse_pattern("2:4"), torch.device("cuda", 0), torch.float32, torch.float32)
